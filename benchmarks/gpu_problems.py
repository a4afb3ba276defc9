"""Codebooks on a GPU, questions to them, and what the law says of some of them.

Keys are normal with a variance of 1 / j (synthetic), radii a tenth of the median spacing. What is
not kept is made again from its seed. Codebooks beyond a million rows alias: their rows share the
keys of a million slots, and their codes and boxes are those of that million, many times over. All
codes are read as if they were of keys apart; boxes are those of the smaller codebook, so that more
of them are touched than of as many keys apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grace_fast as gf
from benchmarks.gpu_cells import ALIASED, NAN, SUMS, WRITTEN, Cell
from benchmarks.gpu_law import Decision, Expected, decision
from benchmarks.workloads import median_spacing
from grace_fast.codebook.labels import Labels
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import maintained, segments
from grace_fast.index.native_view import IndexState
from grace_fast.index.segments import LEAF, Segment

VALUE_WIDTH = 512  # V
EPSILON_RATIO = 0.1
CHECKED = 16  # queries of a batch that are held against the law
MOST_HITS = 64  # queries that hit
_CHUNK = 1 << 16  # rows made at a time
_MOST_QUERIES = 4096


@dataclass
class Book:
    """A codebook, where its keys came from, and what contestants keep of it."""

    codebook: gf.Codebook
    epsilon: float
    unseen: Tensor  # [4096, D], near no key
    base: Book | None = None  # whose keys the rows share; None where each has its own
    kept: dict[str, Any] = field(default_factory=dict)  # tables and norms, by contestant
    _decided: dict[tuple[bool, int], Decision] = field(default_factory=dict)

    @property
    def snapshot(self) -> Snapshot:
        """The version that is asked."""
        return self.codebook.snapshot()

    @property
    def own(self) -> Book:
        """The book whose keys are all apart: this one, or the one whose keys it shares."""
        return self.base or self

    @cached_property
    def ordered(self) -> IndexState:
        """The codes and boxes of all rows; made at the first call."""
        if self.base is None:
            gf.prepare(self.codebook)
            known = maintained.of(self.snapshot)
            if known is None or known.current is None:
                raise RuntimeError("the codebook has no index: grace_fast._cpu has to be built")
            return known.current
        return repeated(self.base.ordered, self.snapshot.rows // self.base.snapshot.rows)

    @cached_property
    def linear(self) -> IndexState:
        """The same codes without boxes: every one is read."""
        made = IndexState(
            self.ordered.projection, self.ordered.fitted_rows, self.ordered.min_radius
        )
        bare = {"leaf_boxes": None, "node_boxes": None, "node_max_radius": None}
        made.segments = tuple(replace(segment, **bare) for segment in self.ordered.segments)
        made.delta = self.ordered.delta
        made.covered, made.predicted_bytes = self.ordered.covered, self.ordered.predicted_bytes
        return made

    @cached_property
    def near(self) -> Tensor:
        """[n, D]: queries half a radius away from keys, all over the book."""
        snapshot = self.own.snapshot
        rows = torch.arange(MOST_HITS, device=snapshot.device) * 997 % snapshot.rows
        keys = snapshot.keys[rows].float()
        generator = torch.Generator(keys.device).manual_seed(1)
        away = torch.randn(keys.shape, device=keys.device, generator=generator)
        keys += 0.5 * self.epsilon * torch.nn.functional.normalize(away, dim=1)
        return keys.to(snapshot.dtype)

    def queries(self, batch: int, asks: str) -> Tensor:
        """Return queries [B, D]: all miss, one is a NaN, or all hit; of more, the first."""
        queries = (self.near if asks in (WRITTEN, SUMS) else self.unseen)[:batch].clone()
        if len(queries) < batch:
            raise ValueError(f"there are {len(queries)} queries of {asks!r}, wanted {batch}")
        if asks == NAN:
            queries[batch // 2, 0] = torch.nan
        return queries

    def expected(self, batch: int, asks: str) -> Expected:
        """Return what the law says of some of those queries, the middle one among them."""
        queries, own = self.queries(batch, asks), self.own
        at = sorted({*range(0, batch, -(-batch // CHECKED)), batch // 2})
        found = []
        for index in at:
            known = asks in (WRITTEN, SUMS), index
            if asks == NAN and index == batch // 2:
                found.append(Decision(False, -1, math.inf))
                continue
            if known not in own._decided:
                own._decided[known] = decision(queries[index], own.snapshot)
            found.append(own._decided[known])
        device = queries.device
        hit, row, squared = zip(*found, strict=True)
        return Expected(
            torch.tensor(at, device=device),
            torch.tensor(hit, device=device),
            torch.tensor(row, device=device),
            torch.tensor(squared, dtype=torch.float64, device=device),
        )


class Books:
    """Codebooks by shape, made when they are first asked for and kept."""

    def __init__(self, device: str = "cuda", aliased: dict[int, int] | None = None) -> None:
        self._device = device
        self._aliased = ALIASED if aliased is None else aliased
        self._made: dict[tuple[int, int, str], Book] = {}

    def of(self, cell: Cell) -> Book:
        """Return the codebook of a cell."""
        return self._book(cell.N, cell.D, cell.dtype)

    def has(self, cell: Cell) -> bool:
        """Tell whether the codebook of a cell is there."""
        return (cell.N, cell.D, cell.dtype) in self._made

    def _book(self, rows: int, width: int, dtype: str) -> Book:
        shape = (rows, width, dtype)
        if shape not in self._made:
            times = self._aliased.get(rows)
            if times is None:
                self._made[shape] = _book_of(*shape, self._device)
            else:
                self._made[shape] = _sharing(self._book(rows // times, width, dtype), times)
        return self._made[shape]


def _book_of(rows: int, width: int, dtype: str, device: str) -> Book:
    generator = torch.Generator(device).manual_seed(rows)
    element = getattr(torch, dtype)
    deviation = torch.arange(1, width + 1, device=device).float().rsqrt()

    def drawn(count: int) -> Tensor:
        return torch.randn(count, width, device=device, generator=generator) * deviation

    unseen = drawn(_MOST_QUERIES)
    first = drawn(min(rows, _CHUNK))
    epsilon = EPSILON_RATIO * median_spacing(first[:20_000])
    book = gf.Codebook(width, VALUE_WIDTH, dtype=element, device=device, reserve_rows=2 * rows)
    for start in range(0, rows, _CHUNK):
        count = min(_CHUNK, rows - start)
        keys = first if start == 0 else drawn(count)
        values = value_of(torch.arange(start, start + count, device=device))
        book.append(
            keys.to(element),
            values.to(element)[:, None].expand(-1, VALUE_WIDTH),
            torch.full((count,), epsilon),
        )
    return Book(book, epsilon, unseen.to(element))


def value_of(row: Tensor) -> Tensor:
    """Return what every element of a row's value is, exact in bf16 and never 0."""
    return (row % 255 + 1).float()


def _sharing(base: Book, times: int) -> Book:
    """Return a codebook of `times` as many rows, row i with the key and value of row i % N."""
    snapshot = base.snapshot
    rows = times * snapshot.rows
    ids = torch.arange(rows)
    columns = {
        "id": ids,
        "key_slot": ids % snapshot.rows,
        "value_slot": ids % snapshot.rows,
        "label_slot": torch.zeros_like(ids),
        "radius": torch.full((rows,), base.epsilon),
        "live": torch.ones(rows, dtype=torch.bool),
    }
    keys, values = (slots[: snapshot.rows] for slots in (snapshot.key_slots, snapshot.value_slots))
    nothing = Labels(torch.tensor([-1]), torch.zeros(0, dtype=torch.int64))
    book = gf.Codebook.restore(keys, values, nothing, columns, snapshot.device)
    return Book(book, base.epsilon, base.unseen, base)


def repeated(state: IndexState, times: int) -> IndexState:
    """Return the index of rows that are `times` over those of a state of one sorted segment."""
    (one,) = state.segments
    leaves = one.count // LEAF
    if one.count % (LEAF * LEAF * segments.BLOCK):
        raise ValueError(
            f"only groups of {segments.BLOCK} level-2 nodes can be repeated, got {one.count} keys"
        )
    many = Segment(
        count=times * one.count,
        rows=np.concatenate([one.rows[: one.count] + k * one.count for k in range(times)]),
        near=_tiled(one.near, times),
        far=_tiled(one.far, times),
        leaf_max_radius=_extended(one.leaf_max_radius, leaves, times),
        near_error=one.near_error,
        far_error=one.far_error,
        first=0,
        last=times * one.count,
        leaf_boxes=_tiled(one.leaf_boxes, times),
        node_boxes=_tiled(one.node_boxes, times),
        node_max_radius=_extended(one.node_max_radius, leaves // LEAF, times),
        isolated=np.zeros(times * one.count // 8, np.uint8),
    )
    made = IndexState(state.projection, times * state.fitted_rows, state.min_radius)
    made.segments, made.covered = (many,), many.count
    made.predicted_bytes = times * state.predicted_bytes
    return made


def _tiled(array: Any, times: int) -> Any:
    return np.tile(array, (times, *(1,) * (array.ndim - 1)))


def _extended(radii: Any, count: int, times: int) -> Any:
    """Return the largest radii of `count` leaves many times over, and the padding behind them."""
    return np.concatenate([np.tile(radii[:count], times), radii[count:]])
