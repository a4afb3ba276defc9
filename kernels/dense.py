"""Every key read, for few queries: whether each is in the ball of its nearest key.

    limit = min(above(widest radius squared), above(least float32 sum))

`scan_keys`: programs share the keys, in blocks of ROWS rows, and each keeps its best two in float32
as packed pairs. `decide`: one program takes one query and the best pairs of all programs. Those
within `limit` are summed again in the canonical order; where a program's second best is within it
too, all of its rows are looked through again.

A packed minimum alone would lose what the bound needs: row 5 at 1 + 1e-9 beats row 1000 at 1. Ties:
the lowest row. Masks: rows past N, removed rows and queries past B are NONE.

Two launches. They are specialised on the width and the types, and on whether there is one query or
more; never on N, which is read from the device, nor on how many programs share the keys. Nothing
waits for the host.
"""

# A tuple of tensors grows in a loop that is unrolled.
# mypy: disable-error-code="assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from grace_fast.kernels import launch
from grace_fast.kernels.exact import (
    NONE,
    Found,
    Keys,
    above,
    above_every_ball,
    any_of,
    bits_of,
    distance_of,
    float_sums,
    in_ball,
    is_finite,
    is_live,
    nearer_of,
    nearest_of_rows,
    packed,
    radius_of,
    slots_of,
    sure_of,
    write_verdict,
)
from grace_fast.kernels.nearest import OPTIONS
from torch import Tensor

# Elements read at a time, for one query and for several that share a read: a lane of 128 has 16 or
# 8 of them, so that it holds as many sums as 128 registers leave room for. Not measured.
TILE, TILE_TOGETHER = 2048, 1024
WIDEST, NARROWEST = 256, 64  # columns of it
# Rows that `decide` reads together at least, and elements: a lane reads 8 bytes of a row at once.
_LANES, _ELEMENTS = tl.constexpr(16), tl.constexpr(2048)
WARPS = 4
STAGES = tl.constexpr(6)  # chunks in flight; not measured
PROGRAMS_PER_PROCESSOR = 4  # what 128 registers a lane leave room for
PROGRAMS = 1024  # that share the keys of a query at most
MOST_TOGETHER = 4  # queries that share a read of the keys; arithmetic outweighs memory beyond


class Pairs(NamedTuple):
    """The best two keys of queries, by each program that looks: an argument of the kernels."""

    best: Tensor  # [programs of all groups of queries, TOGETHER] int64, packed
    second: Tensor  # the same

    @staticmethod
    def room(programs: int, together: int, device: torch.device) -> Pairs:
        """Return room for what so many programs find."""
        both = torch.empty(2, programs, together, dtype=torch.int64, device=device)
        return Pairs(both[0], both[1])


@triton.jit
def one_of(numbers, at) -> tl.tensor:
    """Return one of a few numbers [n]."""
    lane = tl.arange(0, numbers.shape[0])
    return tl.sum(tl.where(lane == at, numbers, 0), axis=0)


@triton.jit
def write_best_two(
    queries,
    keys,
    query,  # [TOGETHER] int64, their numbers
    pairs,  # written
    to,  # the number of this program among those of all groups
    program,
    programs,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    """Write the best two of TOGETHER queries among every programs-th block of ROWS rows."""
    width, rows = keys.width, tl.load(keys.rows)
    vectors, firsts, seconds = (), (), ()
    for i in tl.static_range(TOGETHER):
        vectors += (queries + one_of(query, i) * width,)
        firsts += (tl.full((ROWS,), NONE, dtype=tl.int64),)
        seconds += (tl.full((ROWS,), NONE, dtype=tl.int64),)
    for at in range(program.to(tl.int64) * ROWS, rows, programs.to(tl.int64) * ROWS):
        row = at + tl.arange(0, ROWS)
        here = is_live(keys, row, row < rows)
        slot = slots_of(keys, row, here)
        totals = ()
        for _ in tl.static_range(TOGETHER):
            totals += (tl.zeros((ROWS, CHUNK), dtype=tl.float32),)
        for first in tl.range(0, width, CHUNK, num_stages=STAGES):
            j = first + tl.arange(0, CHUNK)
            k = tl.load(
                keys.slots + slot[:, None] * width + j[None, :],
                mask=here[:, None] & (j < width)[None, :],
                other=0,
            ).to(tl.float32)
            sums = ()
            for i in tl.static_range(TOGETHER):
                q = tl.load(vectors[i] + j, mask=j < width, other=0)
                difference = q.to(tl.float32)[None, :] - k
                sums += (totals[i] + difference * difference,)
            totals = sums
        nearer, next_nearer = (), ()
        for i in tl.static_range(TOGETHER):
            pair = packed(tl.sum(totals[i], axis=1), row, here)
            next_nearer += (tl.minimum(seconds[i], tl.maximum(firsts[i], pair)),)
            nearer += (tl.minimum(firsts[i], pair),)
        firsts, seconds = nearer, next_nearer
    for i in tl.static_range(TOGETHER):
        least = tl.min(firsts[i], axis=0)
        others = tl.where(firsts[i] == least, seconds[i], firsts[i])
        tl.store(pairs.best + to.to(tl.int64) * TOGETHER + i, least)
        tl.store(pairs.second + to.to(tl.int64) * TOGETHER + i, tl.min(others, axis=0))


@triton.jit
def decide_by_pairs(
    queries,
    keys,
    query,
    pairs,
    first_pair,  # of the query; that of the next program is TOGETHER behind
    programs,  # that looked for it
    found,  # written
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """Write the verdict on one query, given the best two rows of each program."""
    LANES: tl.constexpr = _LANES if ROWS < _LANES else ROWS
    CHUNK: tl.constexpr = _ELEMENTS // LANES
    lane, width = tl.arange(0, PROGRAMS), keys.width
    at = first_pair.to(tl.int64) + lane * TOGETHER
    firsts = tl.load(pairs.best + at, mask=lane < programs, other=NONE)
    seconds = tl.load(pairs.second + at, mask=lane < programs, other=NONE)
    least = tl.min(firsts, axis=0)
    limit = tl.minimum(above_every_ball(keys), above(distance_of(least), width))
    within = (bits_of(tl.maximum(limit, 0.0)) << 32) | 0xFFFFFFFF  # at most `limit`
    is_hit = query < 0  # false, as a tensor
    nearest = query - query - 1
    nearest_squared = nearest.to(tl.float64)
    vector = queries + query * width
    # False for NONE, which is a NaN.
    if distance_of(least) <= limit and is_finite(vector, width, CHUNK):
        nearest = least & 0xFFFFFFFF
        nearest_squared = distance_of(least).to(tl.float64)
        sure, is_hit = sure_of(distance_of(least), radius_of(keys, nearest), width, SUMS)
        open_ = firsts <= within
        alone = tl.sum((open_ | (seconds <= within)).to(tl.int32), axis=0) == 1
        alone = alone & (not any_of(seconds <= within))
        if not (alone & sure):
            rows = tl.load(keys.rows)
            blocks, offset = tl.arange(0, LANES) // ROWS, tl.arange(0, LANES) % ROWS
            nearest = query - query - 1
            nearest_squared = float("inf") - nearest.to(tl.float64)
            while any_of(open_):
                # The program of the least pair that is left: its own row, or all of its rows.
                taken = tl.min(tl.where(open_, firsts, NONE), axis=0)
                mine = open_ & (firsts == taken)
                open_ = open_ & (firsts != taken)
                program = tl.max(tl.where(mine, lane, 0), axis=0).to(tl.int64)
                whole = any_of(mine & (seconds <= within))
                first = tl.where(whole, program * ROWS, taken & 0xFFFFFFFF)
                last = tl.where(whole, rows, first + 1)
                step = programs.to(tl.int64) * ROWS  # from one block of a program to its next
                for start in range(first, last, step * (LANES // ROWS)):
                    row = start + blocks * step + offset
                    here = is_live(keys, row, row < last)
                    slot = slots_of(keys, row, here)
                    here = here & (float_sums(vector, keys, slot, here, LANES, CHUNK) <= limit)
                    if any_of(here):
                        exact, exact_row = nearest_of_rows(vector, keys, row, slot, here, LANES)
                        nearest_squared, nearest = nearer_of(
                            nearest_squared, nearest, exact, exact_row
                        )
            is_hit = in_ball(nearest_squared, radius_of(keys, nearest))
    write_verdict(found, query, is_hit, nearest, nearest_squared)


@triton.jit(do_not_specialize=["batch", "programs"])
def scan_keys(
    queries,  # [B, D] fp32, bf16 or fp16
    keys,
    pairs,  # written
    batch,  # B
    programs,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    """Write the best two of TOGETHER queries among a program's share of the keys."""
    # Queries run fastest: the programs that read the same keys are close in time.
    groups = tl.cdiv(batch, TOGETHER)
    program, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    query = tl.minimum(group * TOGETHER + tl.arange(0, TOGETHER), batch - 1).to(tl.int64)
    to = group * programs + program
    write_best_two(queries, keys, query, pairs, to, program, programs, ROWS, CHUNK, TOGETHER)


@triton.jit(do_not_specialize=["programs"])
def decide(
    queries,  # [B, D] fp32, bf16 or fp16
    keys,
    pairs,
    found,  # written
    programs,
    ROWS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROGRAMS: tl.constexpr,  # a power of two, >= programs
    SUMS: tl.constexpr,  # whether the canonical S of a hit is wanted
) -> None:
    """Write the verdict on one query, given the best two rows of each program."""
    query = tl.program_id(0).to(tl.int64)
    first_pair = query // TOGETHER * programs * TOGETHER + query % TOGETHER
    decide_by_pairs(
        queries,
        keys,
        query,
        pairs,
        first_pair,
        programs,
        found,
        ROWS,
        TOGETHER,
        PROGRAMS,
        SUMS,
    )


def tile_of(width: int, together: int) -> dict[str, int]:
    """Return the rows of a block, the columns read at a time and the queries that share them."""
    columns = min(WIDEST, max(NARROWEST, triton.next_power_of_2(width)))
    elements = TILE if together == 1 else TILE_TOGETHER
    return {"ROWS": elements // columns, "CHUNK": columns, "TOGETHER": together}


def programs_of(keys: Keys, groups: int, rows: int) -> int:
    """Return among how many programs the keys are shared, for so many groups of queries."""
    blocks = triton.cdiv(max(1, keys.capacity), rows)
    room = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(keys), groups)
    return int(max(1, min(blocks, room, PROGRAMS)))


def processors(keys: Keys) -> int:
    """Return how many multiprocessors the keys' device has; 1 for the interpreter."""
    return launch.processors(keys.slots.device)


def find(queries: Tensor, keys: Keys, sums: bool = True) -> Found:
    """Return whether each query [B, D] is in the ball of its nearest key, by the law (R64).

    queries: contiguous, on the keys' device, B at least 1. Without `sums` the S of a hit is the
    law's only to within float32.
    """
    queries = launch.aligned(queries)
    found = Found.room(queries)
    batch = len(queries)
    together = 1 if batch == 1 else MOST_TOGETHER
    tile = tile_of(keys.width, together)
    groups = triton.cdiv(batch, together)
    programs = programs_of(keys, groups, tile["ROWS"])
    pairs = Pairs.room(programs * groups, together, queries.device)
    with torch.cuda.device_of(queries):
        scan_keys[(programs * groups,)](
            queries,
            keys,
            pairs,
            batch,
            programs,
            **tile,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        decide[(batch,)](
            queries,
            keys,
            pairs,
            found,
            programs,
            ROWS=tile["ROWS"],
            TOGETHER=together,
            PROGRAMS=PROGRAMS,
            SUMS=sums,
            num_warps=WARPS,
            **OPTIONS,
        )
    return found
