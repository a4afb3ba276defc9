"""Candidates of one query, appended by any number of programs and settled by one.

An entry is a row, or a position whose row a table knows; in a table of positions -1 - row is a row
that has no position. A ring of RING entries that was asked for more says nothing: whoever reads its
count looks the query up densely then, so that no answer depends on a capacity.
"""

import triton
import triton.language as tl
from grace_fast.kernels.exact import (
    above,
    above_every_ball,
    any_of,
    float_sums,
    in_ball,
    nearer_of,
    nearest_of_rows,
    radius_of,
    slots_of,
    sure_of,
)

LANES = 16  # entries whose keys are read together
CHUNK = 128  # columns of them; a lane of 128 adds 16 numbers of a row at most
WARPS = 4


@triton.jit
def append(ring, entries, entry, keep, RING: tl.constexpr) -> None:
    """Append entries to the ring of one query where `keep`; `entries` [1] counts all of them."""
    counter = entries + tl.zeros(keep.shape, dtype=tl.int32)
    at = tl.atomic_add(counter, tl.full(keep.shape, 1, dtype=tl.int32), mask=keep, sem="relaxed")
    tl.store(ring + at, entry, mask=keep & (at < RING))


@triton.jit
def row_of(entry, row_at, here) -> tl.tensor:
    """Return the rows of entries as int64; -1 where an entry has none, or `here` is not set."""
    if row_at is None:
        row = entry
    else:
        row = tl.load(row_at + entry, mask=here & (entry >= 0), other=-1)
        row = tl.where(entry >= 0, row, -1 - entry)
    return tl.where(here, row, -1).to(tl.int64)


@triton.jit
def is_live(live, row, rows) -> tl.tensor:
    """Tell which rows are rows of this codebook that were not removed."""
    here = (row >= 0) & (row < rows)
    return here & (tl.load(live + row, mask=here, other=0) != 0)


@triton.jit
def settle(
    query,  # [D]
    keys,
    key_slot,
    live,
    radius,
    count,
    widest,
    ring,  # [RING] int32
    sums,  # [RING] float32, written: scratch
    row_at,  # [positions] int32, the rows of positions; None where entries are rows
    entries,  # how many there are, RING at most
    width,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    RING: tl.constexpr,
    SUMS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return whether the nearest row of the ring holds the query, that row, its S and its entry.

    The S is canonical if SUMS, and within float32 otherwise.
    """
    rows = tl.load(count)
    lane = tl.arange(0, LANES)
    least = above_every_ball(widest, width)
    limit = least
    for at in range(0, entries, LANES):
        here = at + lane < entries
        row = row_of(tl.load(ring + at + lane, mask=here, other=0), row_at, here)
        here = is_live(live, row, rows)
        slot = slots_of(row, key_slot, here)
        float_sum = float_sums(query, keys, slot, here, width, LANES, CHUNK)
        tl.store(sums + at + lane, tl.where(here, float_sum, -1.0), mask=at + lane < entries)
        least = tl.minimum(least, tl.min(tl.where(here, float_sum, float("inf")), axis=0))
    tl.debug_barrier()  # sums are read by other lanes than wrote them
    limit = tl.minimum(limit, above(least, width))
    place = tl.arange(0, RING)
    found = tl.load(sums + place, mask=place < entries, other=-1.0)
    within = (found >= 0) & (found <= limit)
    number = tl.sum(within.to(tl.int32), axis=0)
    chosen = tl.max(tl.where(within, place, -1), axis=0)
    has_one = chosen >= 0
    squared = tl.load(sums + chosen, mask=has_one, other=0.0)
    entry = tl.load(ring + chosen, mask=has_one, other=0)
    best_row = row_of(entry, row_at, has_one)
    best = squared.to(tl.float64)
    sure, is_hit = sure_of(squared, radius_of(radius, best_row), width, SUMS)
    if (number > 1) | ((number == 1) & (not sure)):
        best_row = best_row * 0 - 1
        best = float("inf") - best_row.to(tl.float64)
        for first in range(0, entries, LANES):
            some = first + lane
            float_sum = tl.load(sums + some, mask=some < entries, other=-1.0)
            in_band = (float_sum >= 0) & (float_sum <= limit)
            if any_of(in_band):
                some_entry = tl.load(ring + some, mask=in_band, other=0)
                some_row = row_of(some_entry, row_at, in_band)
                exact, exact_row = nearest_of_rows(
                    query,
                    keys,
                    some_row,
                    slots_of(some_row, key_slot, in_band),
                    in_band,
                    width,
                    LANES,
                    COLUMNS,
                )
                known = best_row
                best, best_row = nearer_of(best, best_row, exact, exact_row)
                is_its = in_band & (some_row == exact_row)
                taken = tl.max(tl.where(is_its, some_entry, -2147483648), axis=0)
                entry = tl.where(best_row == known, entry, taken)
        is_hit = in_ball(best, radius_of(radius, best_row))
    return is_hit & has_one, best_row, best, entry
