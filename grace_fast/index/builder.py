"""One run of codes in the making: fit, encode, sort, look around, calibrate.

It works from a snapshot, in the background, and shares nothing with look-ups until `certificate`
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
from grace_fast.index.native_view import State, View, plan_of
from grace_fast.index.segments import Part

OUTLIERS = 4096  # keys of large radius whose surroundings are looked at when a run is made
# Keys encoded at a time: with 2 048 the float64 copies leave the cache (EPYC, D = 1536: 8 us a key
# against 3 us).
_CHUNK = 512


class Build:
    """One run in the making: of the rows of a version from `start` on.

    state: what the run is to be a part of; None where the map is to be fitted anew.
    """

    def __init__(self, cpu: Any, snapshot: Snapshot, state: State | None, start: int) -> None:
        self._cpu, self.snapshot, self.state, self._start = cpu, snapshot, state, start
        self.tail_count = state.tail.count if state else 0
        self.predicted_bytes = state.predicted_bytes if state else float("inf")
        self.rows = min(snapshot.rows, segments.MOST_ROWS)
        self.fitted_rows = state.fitted_rows if state else self.rows
        self.floor = 0.0
        self.phi: quantizer.Map

    def steps(self) -> Generator[str, None, Part | None]:
        """Give the name of each step before it is done; return the run, None if there can be none.

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
        part = self._sorted(encoded)
        yield "look around"
        self._look_around(part)
        yield "predict"
        self._predict(part)
        return part

    def fit(self) -> bool:
        """Have the map and the floor, from the keys or as they are; False where no map will do."""
        snapshot, state = self.snapshot, self.state
        if state is not None:
            self.phi, self.floor = state.phi, state.floor
            return True
        live, radii = snapshot.live.cpu(), snapshot.radii.cpu()
        small = snapshot.rows <= 8192
        sample = snapshot.keys_between(0, snapshot.rows).cpu() if small else self._sample()
        positive = radii[live & (radii >= 0)]
        self.floor = float(positive.median()) if len(positive) else 0.0
        phi = quantizer.fit(sample, quantizer.scale_of(positive, sample))
        if phi is None:
            return False
        self.phi = phi
        return True

    def encode(self, encoded: segments.Encoded, threads: int) -> None:
        """Encode what is not yet, in threads of our own, each with one of torch's."""
        for some in _in_order(self._encoded, self._chunks(encoded), threads):
            encoded.put(some)

    def sort(self, encoded: segments.Encoded, threads: int = 1) -> Part:
        """Return the run of what was encoded, with all that is known of it."""
        part = self._sorted(encoded, threads)
        self._look_around(part)
        self._predict(part)
        return part

    def _chunks(self, encoded: segments.Encoded) -> range:
        return range(self._start + encoded.rows, self.rows, _CHUNK)

    def _encoded(self, first: int) -> quantizer.Codes:
        keys = self.snapshot.keys_between(first, min(first + _CHUNK, self.rows))
        return quantizer.encode_keys(self.phi, keys)

    def _sorted(self, encoded: segments.Encoded, threads: int = 1) -> Part:
        radii = self.snapshot.radii.cpu()[self._start : self.rows].numpy()
        kd_order = partial(self._cpu.kd_order, threads=threads)
        return segments.run(encoded, self._start, radii, self.floor, kd_order)

    def _sample(self) -> torch.Tensor:
        count = self.snapshot.rows
        rows = torch.arange(0, count, max(1, count // 4096), device="cpu")
        return self.snapshot.keys_at(rows).cpu()

    def _alone(self, part: Part) -> View:
        """Return the version under a certificate of this part only, to ask it about itself."""
        snapshot = self.snapshot
        state = State(self.phi, self.fitted_rows, self.floor)
        state.runs, state.covered = (part,), self.rows
        view = View(self._cpu, snapshot, None)
        view.plan = plan_of(self._cpu, state, snapshot.rows, float(snapshot.radii.max()))
        view.holds = (state, state.tail)
        return view

    def _look_around(self, part: Part) -> None:
        """Set the isolated bits of a few keys whose radius is above the floor."""
        if self.snapshot.device.type != "cpu":
            return
        assert part.isolated is not None
        radii = self.snapshot.radii
        large = np.flatnonzero(radii.numpy()[part.first : part.last] > self.floor)
        if not 0 < len(large) <= OUTLIERS:
            return
        assert part.places is not None
        view = self._alone(part)
        positions = part.places[large].astype(np.int64)
        bits = np.zeros_like(part.isolated)
        view.plan.isolated(
            book=view.book,
            part=0,
            positions=positions.ctypes.data,
            count=len(positions),
            bits=bits.ctypes.data,
        )
        part.isolated = bits

    def _predict(self, part: Part) -> None:
        """Calibrate: the bytes a look-up reads, asked of keys themselves."""
        if self.state is not None:
            return
        snapshot = self.snapshot
        if snapshot.device.type != "cpu":
            self.predicted_bytes = self._predicted_on_a_device(part)
            return
        view = self._alone(part)
        count = min(64, snapshot.rows)
        rows = torch.linspace(0, snapshot.rows - 1, count, dtype=torch.float32, device="cpu").long()
        queries = snapshot.keys_at(rows).float().contiguous()
        effort = view.effort(queries)
        # A key finds itself; every other recheck misses the cache, so it counts twice. The
        # projection reads 16 rows from the cache: a tenth of what memory would cost.
        projection = quantizer.NEAR * snapshot.key_dim * 2
        again = view.key_bytes * (max(0.0, effort.rechecks - 1) - min(1.0, effort.rechecks))
        self.predicted_bytes = effort.bytes + again - 0.9 * projection

    def _predicted_on_a_device(self, part: Part) -> float:
        """Return what a look-up reads if it scans all near codes: of a sample, as codes say."""
        snapshot = self.snapshot
        keys = self._sample()
        made = quantizer.encode_keys(self.phi, keys)
        asked = quantizer.encode_queries(self.phi, keys[:: max(1, len(keys) // 64)].float())
        survives = quantizer.lower_bounds(self.phi, asked, made) <= self.floor
        others = (float(survives.sum(dim=1).double().mean()) - 1) / len(keys) * part.count
        key_bytes = snapshot.key_dim * snapshot.dtype.itemsize
        return quantizer.NEAR * part.count + max(0.0, others) * (quantizer.FAR + key_bytes)


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
