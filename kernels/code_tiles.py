"""The codes multiplied, for many queries: tensor cores as an integer filter before the codes.

A product cannot wrap around a circle, so codes are folded first, onto a triangle wave:

    f(c) = |(c + 64) mod 256 - 128| - 64         |f(a) - f(b)| <= what a and b are apart

The squares of what folded codes are apart, over any of the slots, sum to no more than those of the
codes do; what `codes.collect` prunes at a cut is pruned at the same cut here, in exact integers:

    |f(q) - f(k)|^2 = |f(q)|^2 + |f(k)|^2 - 2 f(q) f(k)
    pruned          where |f(k)|^2 // 2 - f(q) f(k) > (cut - |f(q)|^2) // 2

Halves are rounded down on both sides, so that nothing is pruned that the sum keeps. The first 32
slots are multiplied, without the slot of the norm where far rows take part. Tiles of a super leaf
that no query touches are left out, a tile is cut at its widest reach, and what is left of it goes
through the box and the codes of its own leaf: the candidates are those of `codes.collect`.

Folding costs little because the wave turns at 64 and 192: codes of centred keys lie around 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from grace_fast.kernels.code_cuts import (
    ERRORS,
    NOTES,
    SLOPE,
    box_sums,
    cut_of,
    query_errors,
    within_cuts,
)
from grace_fast.kernels.exact import any_of
from grace_fast.kernels.nearest import OPTIONS
from grace_fast.kernels.ring import append
from grace_fast.kernels.tiles import first_candidate
from torch import Tensor

if TYPE_CHECKING:
    from grace_fast.kernels.codes import DeviceCodes

FOLDED = 32  # slots that are multiplied, the least that int8 tensor cores take
POSITION_BYTES = FOLDED + 4  # read for a position
TILED = 32  # queries from which on the codes are multiplied. Not measured.
# Queries and positions of a tile, and the chunks of positions in flight. Not measured.
TILE = {"BLOCK_B": 64, "BLOCK_N": 128, "STAGES": 3}
WARPS = 4
PADDING = 64  # positions past the last one: a tile may begin with the last leaf
STEPS = 32  # tiles of a group at most: a bit of an int32 each, and within one super leaf
PROGRAMS_PER_PROCESSOR = 3  # what the registers of sm_90 leave room for; not measured
NEVER = tl.constexpr(1 << 30 | 1 << 20)  # half a norm so large that no cut reaches it
_FRESH = tl.constexpr(16)  # rows without a code that are appended together


def fold(codes: Tensor) -> Tensor:
    """Return f of code bytes, uint8, as int8 in [-64, 64]; 0 stays 0."""
    turned = (codes.to(torch.int16) + 64) & 255
    return ((turned - 128).abs() - 64).to(torch.int8)


def folded_room(positions: int, device: torch.device | str) -> dict[str, Tensor]:
    """Return room for what is multiplied of so many positions; none of them has a row yet."""
    count = positions + PADDING
    return {
        "folded": torch.zeros(count, FOLDED, dtype=torch.int8, device=device),
        "half_norm": torch.full((count,), NEVER.value, dtype=torch.int32, device=device),
    }


def fold_positions(codes: DeviceCodes, first: int, last: int) -> None:
    """Write what is multiplied of positions from `first` up to `last`."""
    for at in range(first, last, 1 << 18):
        here = slice(at, min(at + (1 << 18), last))
        row = codes.row[here]
        slots = torch.zeros(len(row), FOLDED, dtype=torch.uint8, device=row.device)
        near = codes.near[here].view(torch.uint8)
        slots[:, : near.shape[1]] = near
        if codes.has_far:
            if codes.norm_slot:  # what rows 0 .. 14 leave over is what the far rows look at
                slots[:, near.shape[1] - 1] = 0
            far = codes.far[here].view(torch.uint8)
            slots[:, near.shape[1] :] = far[:, : FOLDED - near.shape[1]]
        folded = fold(slots)
        half = folded.to(torch.int16).square().sum(dim=1, dtype=torch.int32) >> 1
        codes.folded[here] = folded
        codes.half_norm[here] = half.masked_fill(row < 0, NEVER.value)


@triton.jit
def folded_queries(
    code, query, asks, SLOTS: tl.constexpr, NORM_SLOT: tl.constexpr, HAS_FAR: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return -f of queries [m, SLOTS] int8 and |f|^2 [m] int32; see `fold`."""
    slot = tl.arange(0, SLOTS)
    used = slot < (SLOTS if HAS_FAR else 16)
    if NORM_SLOT and HAS_FAR:
        used = used & (slot != 15)
    at = code + query[:, None] * 64 + slot[None, :]
    byte = tl.load(at, mask=asks[:, None] & used[None, :], other=0).to(tl.int32)
    negated = 64 - tl.abs(((byte + 64) & 255) - 128)
    return negated.to(tl.int8), tl.sum(negated * negated, axis=1)


@triton.jit
def bounded_tile(
    negated,
    squares,
    asks,
    first,
    leaves,
    slope,
    offset,
    folded,
    half_norm,
    reach,
    BLOCK_N: tl.constexpr,
    SLOTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return |f(k)|^2 // 2 - f(q) f(k) [m, BLOCK_N], and what it is at most within the reach [m].

    Both are int32. Positions without a row, of which there is a tile past the last, are farther
    than any bound, and so is every position from a query that does not ask.
    """
    position = first + tl.arange(0, BLOCK_N)
    k = tl.load(folded + position[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :])
    half = tl.load(half_norm + position)
    leaf = first // 64 + tl.arange(0, BLOCK_N // 64)
    widest = tl.max(tl.load(reach + leaf, mask=leaf < leaves, other=0), axis=0)
    cut = cut_of(widest.to(tl.float64), slope, offset)
    bound = tl.where(asks, (cut - squares) >> 1, -2147483648)
    return tl.dot(negated, tl.trans(k), out_dtype=tl.int32) + half[None, :], bound


@triton.jit
def in_box(point, query, boxes, reach, index, slope, offset) -> tl.tensor:
    """Tell for which queries [m] a key within the reach of a box may be in it."""
    wanted = tl.load(point + query[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.int32)
    one = index + tl.arange(0, 1)
    limit = cut_of(tl.load(reach + index).to(tl.float64), slope, offset)
    return box_sums(boxes, one, one >= 0, wanted) <= limit


@triton.jit
def append_fresh(ring, entries, asks, covered, rows, RING: tl.constexpr) -> None:
    """Append the rows from `covered` on, which have no code, to rings [m] of queries that ask."""
    fresh = rows - covered
    if fresh > 0:
        # A ring that is asked for more than it holds is given up, however much more it is.
        taken = tl.minimum(fresh, RING + 1).to(tl.int32)
        taken = tl.zeros(asks.shape, dtype=tl.int32) + taken
        start = tl.atomic_add(entries, taken, mask=asks, sem="relaxed")
        lane = tl.arange(0, _FRESH)
        for first in range(0, tl.minimum(fresh, RING), _FRESH):
            at = start[:, None] + (first + lane)[None, :]
            entry = (-1 - (covered + first + lane)).to(tl.int32)[None, :]
            holds = asks[:, None] & (at < RING) & (first + lane < fresh)[None, :]
            tl.store(ring[:, None] + at, entry + tl.zeros(at.shape, dtype=tl.int32), mask=holds)


@triton.jit(do_not_specialize=["batch", "shares", "steps"])
def filter_codes(
    code,  # [B, 64] uint8, the bytes that `encode` wrote
    words,  # [B, 16] int32, the same
    point,  # [B, 16] int16
    notes,  # [B, 8] float64
    doubtful,  # [B] int32
    numbers,
    counts,
    folded,  # [positions, SLOTS] int8
    half_norm,  # [positions] int32
    near,
    far,
    reach,
    super_reach,
    leaf_boxes,
    super_boxes,
    count,  # [1] int64, N
    ring,  # [B, RING] int32, written
    entries,  # [B] int32, added to
    batch,
    shares,  # programs that share the positions of a query
    steps,  # tiles of a group, a power of two; a group ends where a super leaf does
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    NORM_SLOT: tl.constexpr,
    HAS_FAR: tl.constexpr,
    NATIVE: tl.constexpr,
    RING: tl.constexpr,
) -> None:
    """Append what may be the nearest key of BLOCK_B queries to their rings: a program's share."""
    beside = tl.cdiv(batch, BLOCK_B)
    # Queries run fastest: programs that read the same codes are close in time.
    share = (tl.program_id(0) // beside).to(tl.int64)
    query = ((tl.program_id(0) % beside) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    asks = query < batch
    query = tl.minimum(query, batch - 1)
    asks = asks & (tl.load(doubtful + query) == 0)
    if share == 0:
        append_fresh(
            ring + query * RING, entries + query, asks, tl.load(counts), tl.load(count), RING
        )
    negated, squares = folded_queries(code, query, asks, SLOTS, NORM_SLOT, HAS_FAR)
    near_error, far_error = query_errors(notes + query * NOTES, HAS_FAR)
    slope = tl.load(numbers + SLOPE)
    start = tl.load(counts + 1) * 4096
    stop = start + tl.load(counts + 2)
    leaves = stop // 64
    column = tl.arange(0, 64)
    for group in range(share, tl.cdiv(stop, steps * BLOCK_N), shares):
        origin = group * steps * BLOCK_N
        errors = numbers + ERRORS + tl.where(origin < start, 0, 2)
        near_offset, far_offset = near_error + tl.load(errors), far_error + tl.load(errors + 1)
        offset = far_offset if HAS_FAR else near_offset
        inside = asks
        if origin < start:
            inside = asks & in_box(
                point, query, super_boxes, super_reach, origin // 4096, slope, near_offset
            )
        touched = tl.zeros((BLOCK_B,), dtype=tl.int32)
        tiles = tl.where(any_of(inside), tl.minimum(steps, tl.cdiv(stop - origin, BLOCK_N)), 0)
        for step in tl.range(0, tiles.to(tl.int32), num_stages=STAGES):
            lower, bound = bounded_tile(
                negated,
                squares,
                inside,
                origin + step * BLOCK_N,
                leaves,
                slope,
                offset,
                folded,
                half_norm,
                reach,
                BLOCK_N,
                SLOTS,
            )
            touched |= tl.where(tl.min(lower, axis=1) <= bound, 1 << step, 0)
        some = tl.reduce_or(touched, axis=0)
        if some != 0:
            # Leaf by leaf: a tile's registers, and its reach, would be too wide.
            here = tl.minimum(tiles * (BLOCK_N // 64), leaves - origin // 64).to(tl.int32)
            for leaf in range(0, here):
                if ((some >> (leaf // (BLOCK_N // 64))) & 1) != 0:
                    first = origin + leaf * 64
                    may = inside
                    if origin < start:
                        may = inside & in_box(
                            point, query, leaf_boxes, reach, first // 64, slope, near_offset
                        )
                    # A ring that was asked for more than it holds needs no more.
                    may = may & (tl.load(entries + query) <= RING)
                    lower, bound = bounded_tile(
                        negated,
                        squares,
                        may,
                        first,
                        leaves,
                        slope,
                        offset,
                        folded,
                        half_norm,
                        reach,
                        64,
                        SLOTS,
                    )
                    # Those of each query from left to right, one a query at a time: they are few.
                    next_one = first_candidate(
                        lower, bound, may, column >= 0, column, query.to(tl.int32) * 0 - 1
                    )
                    own = tl.load(reach + first // 64).to(tl.float64)
                    while any_of(next_one < 64):
                        position = first + next_one
                        keep = within_cuts(
                            position,
                            next_one < 64,
                            own,
                            slope,
                            near_offset,
                            far_offset,
                            words + query[:, None] * 16,
                            near,
                            far,
                            NORM_SLOT,
                            HAS_FAR,
                            NATIVE,
                        )
                        entry = position.to(tl.int32)
                        append(ring + query * RING, entries + query, entry, keep, RING)
                        next_one = first_candidate(lower, bound, may, column >= 0, column, next_one)


def collect(
    code: Tensor,
    point: Tensor,
    notes: Tensor,
    doubtful: Tensor,
    codes: DeviceCodes,
    count: Tensor,
    candidates: Tensor,
    entries: Tensor,
    processors: int,
    native: bool,
) -> None:
    """Append what may be the nearest key of each query to its ring, as `codes.collect` does.

    code: [B, 64] uint8, point, notes and doubtful as `codes.encode` wrote them; candidates:
    [B, RING].
    """
    batch = len(code)
    beside = triton.cdiv(batch, TILE["BLOCK_B"])
    tiles = triton.cdiv(len(codes.row), TILE["BLOCK_N"])
    room = max(1, PROGRAMS_PER_PROCESSOR * processors // beside)
    steps = min(STEPS, 4096 // TILE["BLOCK_N"])
    while steps > 1 and triton.cdiv(tiles, steps) < room:
        steps //= 2
    shares = int(max(1, min(room, triton.cdiv(tiles, steps))))
    filter_codes[(beside * shares,)](
        code,
        code.view(torch.int32),
        point,
        notes,
        doubtful,
        codes.numbers,
        codes.counts,
        codes.folded,
        codes.half_norm,
        codes.near,
        codes.far,
        codes.reach,
        codes.super_reach,
        codes.leaf_boxes,
        codes.super_boxes,
        count,
        candidates,
        entries,
        batch,
        shares,
        steps,
        **TILE,
        SLOTS=codes.folded.shape[1],
        NORM_SLOT=codes.norm_slot,
        HAS_FAR=codes.has_far,
        NATIVE=native,
        RING=candidates.shape[1],
        num_warps=WARPS,
        **OPTIONS,
    )
