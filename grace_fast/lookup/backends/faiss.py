"""FAISS: candidates from one of its indexes, each rechecked, each answer marked proved or not.

    proved   no key that was not returned is as near as the nearest that was, or none is within the
             widest radius of the query: the decision is then that of `semantics`

A flat index proves every answer: where float32 leaves candidates out it is asked for more, and at
last every key is read. An IVF index over whole vectors proves what lies clear of the cells that it
did not read. HNSW, product quantisation and whatever else FAISS knows find but prove nothing.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.caches import Cache
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.lookup.backends import faiss_index
from grace_fast.lookup.backends.faiss_bounds import Array, norms
from grace_fast.lookup.backends.faiss_index import INT32, MISSING, FaissIndex, Filled
from grace_fast.lookup.backends.workload import Workload

NAME = "faiss"
FLAT = FaissIndex()
MORE = (32, 1024)  # keys asked for where fewer prove nothing
_PAIR_ELEMENTS = 1 << 22  # of pairs rechecked at a time


def why_not(workload: Workload) -> str | None:
    """Return why FAISS cannot take a call, or None."""
    faiss = faiss_index.library()
    if faiss is None:
        return MISSING
    if workload.rows > INT32:
        return f"{workload.rows} rows are more than FAISS counts in 32 bits; use row shards"
    if workload.device == "cpu":
        return None
    if workload.device != "cuda":
        return f"keys are on {workload.device}, neither on the host nor on a GPU"
    if not hasattr(faiss, "index_cpu_to_gpu"):
        return "this faiss has no GPU part (pip install 'grace_fast[faiss-gpu]')"
    return None


def nearest(
    queries: Tensor, snapshot: Snapshot, within: float = math.inf, index: FaissIndex = FLAT
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest live row [B], its S [B] float64, and whether that is proved [B] bool.

    A row farther than `within` may be left out: -1 and inf then.

    Raises: ValueError for an index that FAISS does not know or cannot train.
    """
    batch, device = len(queries), queries.device
    row, squared = semantics.no_row(batch, torch.device("cpu"))
    proved = torch.ones(batch, dtype=torch.bool, device="cpu")
    finite = queries.isfinite().all(dim=1)
    if len(snapshot) and finite.any():
        asked = queries[finite]
        kept = _kept(snapshot, index)
        # An index may not change while it is searched, nor between what is asked of it.
        with kept.lock:
            _follow(kept, snapshot, index)
            answers = _Search(kept, asked, snapshot, within).answers()
        here = finite.cpu()
        row[here], squared[here], proved[here] = answers
        row, squared = semantics.not_beyond(within, row, squared)
    return row.to(device), squared.to(device), proved.to(device)


def find(
    queries: Tensor, snapshot: Snapshot, index: FaissIndex = FLAT
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return hit [B], the row that hit [B] and its S [B]; and whether they are proved [B] bool."""
    row, squared, proved = nearest(queries, snapshot, snapshot.widest * (1 + 1e-6), index)
    hit = semantics.in_ball(squared, snapshot.radii_of(row)) & (row >= 0)
    return (hit, row.masked_fill(~hit, -1), squared.masked_fill(~hit, math.inf)), proved


def train(codebook: Codebook, index: FaissIndex) -> Filled:
    """Train and fill an index now, so that no look-up waits for it; return it.

    Raises: ValueError for an index that FAISS does not know or cannot train.
    """
    snapshot = codebook.snapshot()
    kept = _kept(snapshot, index)
    with kept.lock:
        _follow(kept, snapshot, index)
    return kept


def drop(codebook: Codebook, index: FaissIndex) -> None:
    """Forget an index and give its memory back; the next look-up builds it again."""
    _cache(index.description).invalidate(codebook.snapshot())


def _kept(snapshot: Snapshot, index: FaissIndex) -> Filled:
    """Return the index of a version's codebook, as it is."""
    filled = _cache(index.description).of(
        _published(snapshot), lambda _, known: known or Filled(index)
    )
    assert filled is not None, "a draft's version was published"
    return filled


@cache
def _cache(description: str) -> Cache[Filled]:
    # How it is searched makes no other index.
    return Cache(f"{NAME} {description}")


def _follow(kept: Filled, snapshot: Snapshot, index: FaissIndex) -> None:
    published = _published(snapshot)
    kept.ask_as(index)
    if len(published):
        kept.follow(published)


def _published(snapshot: Snapshot) -> Snapshot:
    """Return the version itself, or the one that a draft changes: a draft may yet be dropped."""
    if not snapshot.is_draft:
        return snapshot
    assert snapshot.base is not None
    return snapshot.base


class _Search:
    """Finite queries [B, D] put to an index that holds a version's keys, but for a draft's own."""

    def __init__(self, kept: Filled, queries: Tensor, snapshot: Snapshot, within: float) -> None:
        self._kept, self._queries, self._snapshot = kept, queries, snapshot
        self._within = within
        self._owners = _Owners(snapshot)
        used = faiss_index.used_slots(snapshot)
        self._own = np.flatnonzero(used & ~kept.holds(len(used)))  # a draft's, in no index
        batch = len(queries)
        self._row, self._squared = np.full(batch, -1), np.full(batch, math.inf)
        self._proved = np.zeros(batch, bool)

    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return row, S, and whether they are proved."""
        kept = self._kept
        numbers: tuple[int, ...] = (kept.asked.candidates,)
        exhaustive = kept.count > 0 and kept.bounds.is_exhaustive
        if exhaustive:
            # That the nearest is outside of every ball is proved by its distance alone.
            numbers = (1 if self._within < math.inf else 4, *MORE)
        if kept.count:
            asked = self._queries.float().cpu().numpy()
            with np.errstate(over="ignore", invalid="ignore"):
                moved = np.ascontiguousarray(asked - kept.centre)
                safe = kept.bounds.is_safe(norms(moved))
            for number in numbers:
                left = np.flatnonzero(safe & ~self._proved)
                if len(left):
                    self._ask(left, moved[left], number)
        if exhaustive or not kept.count:
            for at in np.flatnonzero(~self._proved).tolist():
                self._read_every_key(at)
        return tuple(map(torch.from_numpy, (self._row, self._squared, self._proved)))  # type: ignore[return-value]

    def _ask(self, left: Array, moved: Array, number: int) -> None:
        """Take the answers of some queries from their `number` nearest vectors."""
        kept, within = self._kept, self._within
        rough, vectors, unseen = kept.search(moved, number, self._snapshot)
        worth = vectors >= 0
        if kept.bounds.is_faithful:
            worth &= kept.bounds.least_distances(rough, norms(moved)) <= within
        at, place = np.nonzero(worth)
        slots = kept.slots_of(vectors[at, place])
        if len(self._own):
            at = np.concatenate([at, np.repeat(np.arange(len(left)), len(self._own))])
            slots = np.concatenate([slots, np.tile(self._own, len(left))])
        pair, rows = self._owners.of(slots)
        self._keep_best(left[at[pair]], rows, slots[pair])
        known = np.minimum(within, np.sqrt(self._squared[left]) * (1 + 1e-9))
        self._proved[left] = unseen > known

    def _keep_best(self, at: Array, rows: Array, slots: Array) -> None:
        """Recheck pairs of query and row; keep of each query the least S, the lowest row."""
        step = max(1, _PAIR_ELEMENTS // self._snapshot.key_dim)
        device = self._queries.device
        exact = np.empty(len(at))
        for start in range(0, len(at), step):
            here = slice(start, start + step)
            queries = self._queries[torch.from_numpy(at[here]).to(device)]
            keys = self._snapshot.key_slots[torch.from_numpy(slots[here]).to(device)]
            exact[here] = semantics.pair_squared_distances(queries, keys).numpy()
        exact[~np.isfinite(exact)] = math.inf
        order = np.lexsort((rows, exact, at))
        order = order[np.isfinite(exact[order])]
        first = order[np.unique(at[order], return_index=True)[1]]
        self._row[at[first]], self._squared[at[first]] = rows[first], exact[first]

    def _read_every_key(self, at: int) -> None:
        snapshot = self._snapshot
        row, squared = semantics.nearest_of_one(self._queries[at], snapshot.keys, snapshot.live)
        self._row[at], self._squared[at] = int(row), float(squared)
        self._proved[at] = True


class _Owners:
    """Which live rows of a version have their key in a slot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._live = snapshot.live.cpu().numpy()
        self._sorted: tuple[Array, Array] | None = None
        if snapshot.counts.key_moves:
            rows = np.flatnonzero(self._live)
            slots = snapshot.key_slot.numpy()[rows]
            order = np.argsort(slots, kind="stable")
            self._sorted = slots[order], rows[order]

    def of(self, slots: Array) -> tuple[Array, Array]:
        """Return pairs of a place in `slots` and a row that owns the slot there."""
        if self._sorted is None:
            known = np.flatnonzero((slots >= 0) & (slots < len(self._live)))
            known = known[self._live[slots[known]]]
            return known, slots[known]
        held, rows = self._sorted
        first, last = (np.searchsorted(held, slots, side) for side in ("left", "right"))
        count = last - first
        place = np.repeat(np.arange(len(slots)), count)
        within = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count)
        return place, rows[first[place] + within]
