"""The codes multiplied, for many queries: tensor cores as an integer filter before the codes.

A product cannot wrap around a circle, so codes are folded first, onto a triangle wave:

    f(c) = |(c + 64) mod 256 - 128| - 64         |f(a) - f(b)| <= what a and b are apart

The squares of what folded codes are apart, over any of the slots, sum to no more than those of the
codes do; what `codes.collect` drops at a threshold is dropped at the same one here, in exact
integers:

    |f(q) - f(k)|^2 = |f(q)|^2 + |f(k)|^2 - 2 f(q) f(k)
    dropped         where |f(k)|^2 // 2 - f(q) f(k) > (threshold - |f(q)|^2) // 2

Halves are rounded down on both sides, so that nothing is dropped that the sum keeps. The first 32
slots are multiplied, without the slot of the norm where far rows take part. One program takes
BLOCK_B queries and a share of the positions. Tiles of a level-2 node that no query touches are left
out, a tile is dropped at its widest radius, and what is left of it goes through the bounding box
and the codes of its own leaf: the candidates are those of `codes.collect`. Masks: doubtful queries
ask for nothing, and positions without a row have a norm that no threshold reaches.

Folding costs little because the wave turns at 64 and 192: codes of centred keys lie around 0.
"""

from __future__ import annotations

import triton
import triton.language as tl
from grace_fast.kernels.code_layout import FOLDED, Codes
from grace_fast.kernels.code_thresholds import (
    Query,
    box_sums,
    largest_sum,
    query_threshold,
    threshold_of,
    within_thresholds,
)
from grace_fast.kernels.exact import Keys, any_of
from grace_fast.kernels.nearest import OPTIONS
from grace_fast.kernels.ring import Ring, append, of_query

POSITION_BYTES = FOLDED + 4  # read for a position
TILED = 32  # queries from which on the codes are multiplied. Not measured.
# Queries and positions of a tile, and the chunks of positions in flight. Not measured.
TILE = {"BLOCK_B": 64, "BLOCK_N": 256, "STAGES": 3}
WARPS = 4
STEPS = 32  # tiles of a group at most: a bit of an int32 each, and within one level-2 node
PROGRAMS_PER_PROCESSOR = 2  # what the registers of sm_90 leave room for; not measured
_SLOTS = tl.constexpr(FOLDED)
_FRESH = tl.constexpr(16)  # rows without a code that are appended together


@triton.jit
def folded_queries(asked, query, asks, codes) -> tuple[tl.tensor, tl.tensor]:
    """Return -f of queries [m, 32] int8 and |f|^2 [m] int32; see `code_layout.fold`."""
    slot = tl.arange(0, _SLOTS)
    used = slot < (_SLOTS if codes.has_far else 16)
    if codes.norm_slot and codes.has_far:
        used = used & (slot != 15)
    at = asked.code + query[:, None] * 64 + slot[None, :]
    byte = tl.load(at, mask=asks[:, None] & used[None, :], other=0).to(tl.int32)
    negated = 64 - tl.abs(((byte + 64) & 255) - 128)
    return negated.to(tl.int8), tl.sum(negated * negated, axis=1)


@triton.jit
def bounded_tile(
    folded,  # what `folded_queries` returns
    asks,
    first,
    leaves,
    codes,
    threshold,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return |f(k)|^2 // 2 - f(q) f(k) [m, BLOCK_N], and what it is at most within the radius [m].

    Both are int32. Positions without a row, of which there is a tile past the last, are farther
    than any bound, and so is every position from a query that does not ask.
    """
    negated, squares = folded
    position = first + tl.arange(0, BLOCK_N)
    k = tl.load(codes.folded + position[:, None] * _SLOTS + tl.arange(0, _SLOTS)[None, :])
    half = tl.load(codes.half_norm + position)
    leaf = first // 64 + tl.arange(0, BLOCK_N // 64)
    radius = tl.load(codes.leaf_max_radius + leaf, mask=leaf < leaves, other=0)
    offset = threshold.far if codes.has_far else threshold.near
    limit = largest_sum(tl.max(radius, axis=0).to(tl.float64), threshold.slope, offset)
    bound = tl.where(asks, (limit - squares) >> 1, -2147483648)
    return tl.dot(negated, tl.trans(k), out_dtype=tl.int32) + half[None, :], bound


@triton.jit
def first_candidate(lower, bound, may, here, after) -> tl.tensor:
    """Return the first column after `after` [m] that is not farther than bound [m]; n for none.

    lower: [m, n], may: [m], here: [n]. What is not a number is not farther.
    """
    column = tl.arange(0, here.shape[0])[None, :]
    candidate = ((lower > bound[:, None]) == 0) & (here[None, :] & may[:, None])
    candidate = candidate & (column > after[:, None])
    return tl.min(tl.where(candidate, column, here.shape[0]), axis=1)


@triton.jit
def in_box(asked, query, boxes, radius, index, threshold) -> tl.tensor:
    """Tell for which queries [m] a key within the radius of a box may be in it."""
    point = tl.load(asked.point + query[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.int32)
    one = index + tl.arange(0, 1)
    within = tl.load(radius + index).to(tl.float64)
    limit = largest_sum(within, threshold.slope, threshold.near)
    return box_sums(boxes, one, one >= 0, point) <= limit


@triton.jit
def append_fresh(ring, query, asks, covered, rows) -> None:
    """Append the rows from `covered` on, which have no code, to rings [m] of queries that ask."""
    fresh = rows - covered
    if fresh > 0:
        # A ring that is asked for more than it holds is given up, however much more it is.
        taken = tl.minimum(fresh, ring.size + 1).to(tl.int32)
        taken = tl.zeros(asks.shape, dtype=tl.int32) + taken
        start = tl.atomic_add(ring.entries + query, taken, mask=asks, sem="relaxed")
        to = (ring.candidates + query * ring.size)[:, None]
        lane = tl.arange(0, _FRESH)
        for first in range(0, tl.minimum(fresh, ring.size), _FRESH):
            at = start[:, None] + (first + lane)[None, :]
            candidate = (-1 - (covered + first + lane)).to(tl.int32)[None, :]
            holds = asks[:, None] & (at < ring.size) & (first + lane < fresh)[None, :]
            tl.store(to + at, candidate + tl.zeros(at.shape, dtype=tl.int32), mask=holds)


@triton.jit(do_not_specialize=["batch", "shares", "steps"])
def filter_codes(
    asked,  # Query, what `encode` wrote
    codes,
    keys,
    ring,  # appended to
    batch,  # B
    shares,  # programs that share the positions of a query
    steps,  # tiles of a group, a power of two; a group ends where a level-2 node does
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Append what may be the nearest key of BLOCK_B queries to their rings: a program's share."""
    beside = tl.cdiv(batch, BLOCK_B)
    # Queries run fastest: programs that read the same codes are close in time.
    share = (tl.program_id(0) // beside).to(tl.int64)
    query = ((tl.program_id(0) % beside) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    asks = query < batch
    query = tl.minimum(query, batch - 1)
    asks = asks & (tl.load(ring.doubtful + query) == 0)
    if share == 0:
        append_fresh(ring, query, asks, tl.load(codes.counts), tl.load(keys.rows))
    folded = folded_queries(asked, query, asks, codes)
    start = tl.load(codes.counts + 1) * 4096
    stop = start + tl.load(codes.counts + 2)
    leaves = stop // 64
    every, nowhere = tl.arange(0, 64) >= 0, query.to(tl.int32) * 0 - 1
    for group in range(share, tl.cdiv(stop, steps * BLOCK_N), shares):
        origin = group * steps * BLOCK_N
        kind = tl.where(origin < start, 0, 2)
        threshold = threshold_of(query_threshold(asked, query, codes), codes, kind)
        inside = asks
        if origin < start:
            inside = asks & in_box(
                asked, query, codes.node_boxes, codes.node_max_radius, origin // 4096, threshold
            )
        touched = tl.zeros((BLOCK_B,), dtype=tl.int32)
        tiles = tl.where(any_of(inside), tl.minimum(steps, tl.cdiv(stop - origin, BLOCK_N)), 0)
        for step in tl.range(0, tiles.to(tl.int32), num_stages=STAGES):
            first = origin + step * BLOCK_N
            lower, bound = bounded_tile(folded, inside, first, leaves, codes, threshold, BLOCK_N)
            touched |= tl.where(tl.min(lower, axis=1) <= bound, 1 << step, 0)
        some = tl.reduce_or(touched, axis=0)
        if some != 0:
            # Leaf by leaf: a tile's registers, and its widest radius, would be too wide.
            here = tl.minimum(tiles * (BLOCK_N // 64), leaves - origin // 64).to(tl.int32)
            for leaf in range(0, here):
                if ((some >> (leaf // (BLOCK_N // 64))) & 1) != 0:
                    first = origin + leaf * 64
                    lower, bound = bounded_tile(folded, inside, first, leaves, codes, threshold, 64)
                    may = inside & (tl.min(lower, axis=1) <= bound)
                    if any_of(may):
                        # Made again: held through the products they would take registers there.
                        fine = threshold_of(query_threshold(asked, query, codes), codes, kind)
                        if origin < start:
                            may = may & in_box(
                                asked,
                                query,
                                codes.leaf_boxes,
                                codes.leaf_max_radius,
                                first // 64,
                                fine,
                            )
                        # A ring that was asked for more than it holds needs no more.
                        may = may & (tl.load(ring.entries + query) <= ring.size)
                        # Each query's from left to right, one a query at a time: they are few.
                        column = first_candidate(lower, bound, may, every, nowhere)
                        radius = tl.load(codes.leaf_max_radius + first // 64).to(tl.float64)
                        while any_of(column < 64):
                            position = first + column
                            words = asked.words + query[:, None] * 16
                            keep = within_thresholds(
                                position, column < 64, radius, fine, codes, words
                            )
                            append(of_query(ring, query), position.to(tl.int32), keep)
                            column = first_candidate(lower, bound, may, every, column)


def collect(asked: Query, codes: Codes, keys: Keys, ring: Ring, processors: int) -> None:
    """Append what may be the nearest key of each query to its ring, as `codes.collect` does."""
    batch = len(asked.code)
    beside = triton.cdiv(batch, TILE["BLOCK_B"])
    tiles = triton.cdiv(len(codes.row), TILE["BLOCK_N"])
    room = max(1, PROGRAMS_PER_PROCESSOR * processors // beside)
    steps = min(STEPS, 4096 // TILE["BLOCK_N"])
    while steps > 1 and triton.cdiv(tiles, steps) < room:
        steps //= 2
    shares = int(max(1, min(room, triton.cdiv(tiles, steps))))
    filter_codes[(beside * shares,)](
        asked,
        codes,
        keys,
        ring,
        batch,
        shares,
        steps,
        **TILE,
        num_warps=WARPS,
        **OPTIONS,
    )
