"""Candidates of one query, appended by any number of programs and settled by one.

    limit = min(above(widest radius squared), above(least float32 sum of the candidates))

A candidate is a row, or a position whose row a table knows; in a table of positions -1 - row is a
row that has no position. `settle` reads the keys of all candidates in float32 and sums those within
`limit` again in the canonical order, unless there is one and its float32 sum decides.

Ties: the lowest row. Masks: candidates past the last one and rows that are removed or past N count
for nothing. A ring that was asked for more than it holds says nothing: whoever reads its `entries`
gives the query up to `doubtful.find` then, so that no answer depends on a capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from grace_fast.kernels.exact import (
    above,
    above_every_ball,
    any_of,
    float_sums,
    in_ball,
    is_live,
    nearer_of,
    nearest_of_rows,
    radius_of,
    slots_of,
    sure_of,
)
from torch import Tensor

LANES = tl.constexpr(16)  # candidates whose keys are read together
CHUNK = tl.constexpr(128)  # columns of them; a lane of 128 adds 16 numbers of a row at most
WARPS = 4


class Ring(NamedTuple):
    """Room for the candidates of queries [B]: an argument of the kernels."""

    candidates: Tensor  # [B, size] int32
    entries: Tensor  # [B] int32, the candidates that were appended, or did not fit
    doubtful: Tensor  # [B] int32, 1 where all keys have to be read, -1 where it is a miss already
    sums: Tensor  # [B, size] float32, scratch of `settle`
    size: tl.constexpr  # a power of two

    @staticmethod
    def room(batch: int, size: int, device: torch.device) -> Ring:
        """Return rings that nothing has been written to, not even `entries`."""
        candidates = torch.empty(batch, size, dtype=torch.int32, device=device)
        entries = torch.empty(batch, dtype=torch.int32, device=device)
        sums = torch.empty(batch, size, dtype=torch.float32, device=device)
        return Ring(candidates, entries, torch.empty_like(entries), sums, tl.constexpr(size))


@triton.jit
def of_query(ring, query) -> Ring:
    """Return the ring of one query, or [m] of a query each; a size that is returned is a tensor."""
    at = query * ring.size
    counts = ring.entries + query, ring.doubtful + query
    return Ring(ring.candidates + at, counts[0], counts[1], ring.sums + at, ring.size)


@triton.jit
def append(ring, candidate, keep) -> None:
    """Append candidates [n] where `keep` to what `of_query` returned."""
    entries = ring.entries + tl.zeros(keep.shape, dtype=tl.int32)
    at = tl.atomic_add(entries, tl.full(keep.shape, 1, dtype=tl.int32), mask=keep, sem="relaxed")
    tl.store(ring.candidates + at, candidate, mask=keep & (at < ring.size))


@triton.jit
def row_of(candidate, row_at, here) -> tl.tensor:
    """Return the rows of candidates as int64; -1 for one that has none, or is not `here`."""
    if row_at is None:
        row = candidate
    else:
        row = tl.load(row_at + candidate, mask=here & (candidate >= 0), other=-1)
        row = tl.where(candidate >= 0, row, -1 - candidate)
    return tl.where(here, row, -1).to(tl.int64)


@triton.jit
def settle(
    vector,  # [D], the query
    keys,
    ring,
    query,  # its number
    entries,  # of its ring, `size` at most
    row_at,  # [positions] int32, the rows of positions; None where candidates are rows
    SUMS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return whether the nearest row of a ring holds the query, that row, its S and its candidate.

    The S is canonical if SUMS, and within float32 otherwise.
    """
    candidates, sums = ring.candidates + query * ring.size, ring.sums + query * ring.size
    rows = tl.load(keys.rows)
    lane = tl.arange(0, LANES)
    least = above_every_ball(keys)
    limit = least
    for first in range(0, entries, LANES):
        at = first + lane
        row = row_of(tl.load(candidates + at, mask=at < entries, other=0), row_at, at < entries)
        here = is_live(keys, row, (row >= 0) & (row < rows))
        float_sum = float_sums(vector, keys, slots_of(keys, row, here), here, LANES, CHUNK)
        tl.store(sums + at, tl.where(here, float_sum, -1.0), mask=at < entries)
        least = tl.minimum(least, tl.min(tl.where(here, float_sum, float("inf")), axis=0))
    tl.debug_barrier()  # sums are read by other lanes than wrote them
    limit = tl.minimum(limit, above(least, keys.width))
    place = tl.arange(0, ring.size)
    known = tl.load(sums + place, mask=place < entries, other=-1.0)
    within = (known >= 0) & (known <= limit)
    number = tl.sum(within.to(tl.int32), axis=0)
    chosen = tl.max(tl.where(within, place, -1), axis=0)
    has_one = chosen >= 0
    squared = tl.load(sums + chosen, mask=has_one, other=0.0)
    candidate = tl.load(candidates + chosen, mask=has_one, other=0)
    best_row = row_of(candidate, row_at, has_one)
    best = squared.to(tl.float64)
    sure, is_hit = sure_of(squared, radius_of(keys, best_row), keys.width, SUMS)
    if (number > 1) | ((number == 1) & (not sure)):
        best_row = best_row * 0 - 1
        best = float("inf") - best_row.to(tl.float64)
        for first in range(0, entries, LANES):
            at = first + lane
            float_sum = tl.load(sums + at, mask=at < entries, other=-1.0)
            here = (float_sum >= 0) & (float_sum <= limit)
            if any_of(here):
                some = tl.load(candidates + at, mask=here, other=0)
                row = row_of(some, row_at, here)
                slot = slots_of(keys, row, here)
                exact, exact_row = nearest_of_rows(vector, keys, row, slot, here, LANES)
                before = best_row
                best, best_row = nearer_of(best, best_row, exact, exact_row)
                is_its = here & (row == exact_row)
                taken = tl.max(tl.where(is_its, some, -2147483648), axis=0)
                candidate = tl.where(best_row == before, candidate, taken)
        is_hit = in_ball(best, radius_of(keys, best_row))
    return is_hit & has_one, best_row, best, candidate
