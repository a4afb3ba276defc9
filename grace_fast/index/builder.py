"""The making of one sorted segment: fit, encode, sort, look around, calibrate.

It works from a snapshot, in the background, and shares nothing with look-ups until `maintained`
publishes what it made.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import quantizer, segments
from grace_fast.index.native_view import IndexState, NativeView, plan_of
from grace_fast.index.segments import Segment

OUTLIERS = 4096  # keys of large radius whose surroundings are looked at when a segment is made
# Keys encoded at a time: with 2 048 the float64 copies leave the cache (EPYC, D = 1536: 8 us a key
# against 3 us).
_CHUNK = 512


class Build:
    """One segment in the making: of the rows of a version from `start` on.

    state: what it is to be a part of; None where the projection is to be fitted anew.
    """

    def __init__(self, cpu: Any, snapshot: Snapshot, state: IndexState | None, start: int) -> None:
        self._cpu, self.snapshot, self.state, self._start = cpu, snapshot, state, start
        self.delta_count = state.delta.count if state else 0
        self.predicted_bytes = state.predicted_bytes if state else float("inf")
        self.rows = min(snapshot.rows, segments.MOST_ROWS)
        self.fitted_rows = state.fitted_rows if state else self.rows
        self.min_radius = 0.0
        self.projection: quantizer.Projection

    def steps(self) -> Generator[str, None, Segment | None]:
        """Give the name of each step before it is done; return the segment, None if there is none.

        Between two steps nothing is held, and it may be left for good.
        """
        yield "fit"
        if not self.fit():
            return None
        encoded = segments.Encoded.room(self.rows - self._start)
        for first in self._chunks(encoded):
            yield "encode"
            encoded.put(self._encoded(first))
        yield "sort"
        segment = self._sorted(encoded)
        yield "look around"
        self._look_around(segment)
        yield "predict"
        self._predict(segment)
        return segment

    def fit(self) -> bool:
        """Have the projection and least radius, fitted or as they are; False where none will do."""
        snapshot, state = self.snapshot, self.state
        if state is not None:
            self.projection, self.min_radius = state.projection, state.min_radius
            return True
        live, radii = snapshot.live.cpu(), snapshot.radii.cpu()
        small = snapshot.rows <= 8192
        sample = snapshot.keys_between(0, snapshot.rows).cpu() if small else self._sample()
        positive = radii[live & (radii >= 0)]
        self.min_radius = float(positive.median()) if len(positive) else 0.0
        projection = quantizer.fit(sample, quantizer.scale_of(positive, sample))
        if projection is None:
            return False
        self.projection = projection
        return True

    def encode(self, encoded: segments.Encoded, threads: int) -> None:
        """Encode what is not yet, in threads of our own, each with one of torch's."""
        for some in _in_order(self._encoded, self._chunks(encoded), threads):
            encoded.put(some)

    def sort(self, encoded: segments.Encoded, threads: int = 1) -> Segment:
        """Return the segment of what was encoded, with all that is known of it."""
        segment = self._sorted(encoded, threads)
        self._look_around(segment)
        self._predict(segment)
        return segment

    def _chunks(self, encoded: segments.Encoded) -> range:
        return range(self._start + encoded.rows, self.rows, _CHUNK)

    def _encoded(self, first: int) -> quantizer.Quantized:
        keys = self.snapshot.keys_between(first, min(first + _CHUNK, self.rows))
        return quantizer.encode_keys(self.projection, keys)

    def _sorted(self, encoded: segments.Encoded, threads: int = 1) -> Segment:
        radii = self.snapshot.radii.cpu()[self._start : self.rows].numpy()
        kd_order = partial(self._cpu.kd_order, threads=threads)
        return segments.sorted_segment(encoded, self._start, radii, self.min_radius, kd_order)

    def _sample(self) -> torch.Tensor:
        count = self.snapshot.rows
        rows = torch.arange(0, count, max(1, count // 4096), device="cpu")
        return self.snapshot.keys_at(rows).cpu()

    def _alone(self, segment: Segment) -> NativeView:
        """Return the version under an index of this segment only, to ask it about itself."""
        snapshot = self.snapshot
        state = IndexState(self.projection, self.fitted_rows, self.min_radius)
        state.segments, state.covered = (segment,), self.rows
        view = NativeView(self._cpu, snapshot, None)
        view.plan = plan_of(self._cpu, state, snapshot.rows, float(snapshot.radii.max()))
        view.holds = (state, state.delta)
        return view

    def _look_around(self, segment: Segment) -> None:
        """Set the isolated bits of a few keys whose radius is above `min_radius`."""
        if self.snapshot.device.type != "cpu":
            return
        assert segment.isolated is not None
        radii = self.snapshot.radii
        large = np.flatnonzero(radii.numpy()[segment.first : segment.last] > self.min_radius)
        if not 0 < len(large) <= OUTLIERS:
            return
        assert segment.places is not None
        view = self._alone(segment)
        positions = segment.places[large].astype(np.int64)
        bits = np.zeros_like(segment.isolated)
        view.version.isolated(
            segment=0,
            positions=positions.ctypes.data,
            count=len(positions),
            bits=bits.ctypes.data,
        )
        segment.isolated = bits

    def _predict(self, segment: Segment) -> None:
        """Calibrate: the bytes a look-up reads, asked of keys themselves."""
        if self.state is not None:
            return
        snapshot = self.snapshot
        if snapshot.device.type != "cpu":
            self.predicted_bytes = self._predicted_on_a_device(segment)
            return
        view = self._alone(segment)
        count = min(64, snapshot.rows)
        rows = torch.linspace(0, snapshot.rows - 1, count, dtype=torch.float32, device="cpu").long()
        queries = snapshot.keys_at(rows).float().contiguous()
        effort = view.effort(queries)
        # A key finds itself; every other re-rank misses the cache, so it counts twice. The
        # projection reads 16 rows from the cache: a tenth of what memory would cost.
        projection = quantizer.NEAR * snapshot.key_dim * 2
        again = view.key_bytes * (
            max(0.0, effort.exact_reranks - 1) - min(1.0, effort.exact_reranks)
        )
        self.predicted_bytes = effort.bytes + again - 0.9 * projection

    def _predicted_on_a_device(self, segment: Segment) -> float:
        """Return what a look-up reads if it scans all near codes: of a sample, as codes say."""
        snapshot = self.snapshot
        keys = self._sample()
        made = quantizer.encode_keys(self.projection, keys)
        asked = quantizer.encode_queries(self.projection, keys[:: max(1, len(keys) // 64)].float())
        survives = quantizer.lower_bounds(self.projection, asked, made) <= self.min_radius
        others = (float(survives.sum(dim=1).double().mean()) - 1) / len(keys) * segment.count
        key_bytes = snapshot.key_dim * snapshot.dtype.itemsize
        return quantizer.NEAR * segment.count + max(0.0, others) * (quantizer.FAR + key_bytes)


def _in_order(work: Any, items: Sequence[int], threads: int) -> Iterator[Any]:
    """Give work(item) for each item, in order; a few hundred are made ahead."""
    usual = torch.get_num_threads()
    one_each = partial(torch.set_num_threads, 1)
    try:
        with ThreadPoolExecutor(threads, initializer=one_each) as pool:
            for at in range(0, len(items), 256):
                yield from pool.map(work, items[at : at + 256])
    finally:
        torch.set_num_threads(usual)  # it is for all threads that are still to come
