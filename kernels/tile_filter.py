"""The tiles of many queries: tensor cores multiply queries and keys, and bounds name candidates.

    |q - k|^2 = |q|^2 + |k|^2 - 2 q k

in float32 loses what cancels, so it is only a filter, with a bound on its error:

    q', k'      what is multiplied: 16-bit, q and k moved by no more than e_q and e_k
    s           |q'|^2 + |k'|^2 - 2 q'k' as the tensor cores say it, within E of the truth,
                E = gap * (|q'|^2 + |k'|^2)
    upper       sqrt(s + E) + e_q + e_k: some key is this near or nearer
    candidate   unless s - E > (limit + e_q + e_k)^2, where `limit` is the least `upper` so far, and
                the widest radius to begin with; e_k is the largest of a tile

`gap` rests on how tensor cores sum. Products of 16-bit numbers are exact. Blocks of n of them and
the sum so far are aligned to the largest of the n + 1, cut at 2^-23 of it, added, and cut to
float32: n + 2 losses of 2^-23 |q'| |k'| at most, and |q'| |k'| <= (|q'|^2 + |k'|^2) / 2. For D / n
blocks and twice the product that is (1 + 2 / n) D 2^-23 of |q'|^2 + |k'|^2. n is 8 on sm_80 and 16
on sm_90, and both keep bits beyond those, which halve it (Khattak and Mikaitis, "Accurate models of
NVIDIA tensor cores", arXiv 2512.07004): `gap` is 2.5 D 2^-24, as for n = 8 and no more bits. Sums
that are rounded to nearest, in any order, lose less.

A program takes tiles of BLOCK_B queries and BLOCK_N rows. Candidates are rare: one minimum over a
tile's rows tells whether a query has any, and only then are they looked for, as bits of words.
Masks: queries past B, rows past N and removed rows are no candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl
from grace_fast.kernels.exact import any_of, is_live, slots_of
from grace_fast.kernels.ring import append, of_query

_UNIT = tl.constexpr(2.0**-24)
_LARGE = tl.constexpr(1e37)


@triton.jit
def gap_of(width) -> tl.tensor:
    """Return what s may be wrong by, of |q'|^2 + |k'|^2; rounded norms and bounds take 128."""
    return (2.5 * width + 128.0) * _UNIT


@triton.jit
def tile_at(number, beside, along, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return which queries and which rows are tile `number` of beside * along.

    Tiles that are close in time share what is in L2: GROUP tiles of queries go together along all
    rows, queries fastest.
    """
    group = number // (GROUP * along)
    together = tl.minimum(beside - group * GROUP, GROUP)
    within = number - group * GROUP * along
    return group * GROUP + within % together, within // together


@triton.jit
def product_of(
    rounded,
    multiplied,
    query_tiles,
    key_tiles,
    query,  # [BLOCK_B], the first is where the tile begins
    asks,
    slot,  # [BLOCK_N], of rows that begin where the tile does
    here,
    first_query,
    first_row,
    width,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """Return q'k' of a tile [BLOCK_B, BLOCK_N]; by descriptors, what is not `here` is anything."""
    product = tl.zeros((query.shape[0], slot.shape[0]), dtype=tl.float32)
    for first in tl.range(0, width, BLOCK_D, num_stages=STAGES):
        if key_tiles is None:
            j = (first + tl.arange(0, BLOCK_D))[None, :]
            q_mask, k_mask = asks[:, None] & (j < width), here[:, None] & (j < width)
            q = tl.load(rounded.vectors + query[:, None] * width + j, mask=q_mask, other=0)
            k = tl.load(multiplied.slots + slot[:, None] * width + j, mask=k_mask, other=0)
        else:
            q = query_tiles.load([first_query, first])
            k = key_tiles.load([first_row, first])
        if UPCAST:
            q, k = q.to(tl.float32), k.to(tl.float32)
        product = tl.dot(q, tl.trans(k), product)
    return product


@triton.jit
def words_of(candidates) -> tl.tensor:
    """Return a mask [m, n] as words [m, n / 32] int32."""
    m: tl.constexpr = candidates.shape[0]
    n: tl.constexpr = candidates.shape[1]
    bits = tl.where(candidates, 1 << (tl.arange(0, n) % 32)[None, :], 0)
    return tl.reduce_or(tl.reshape(bits, (m, n // 32, 32)), axis=2)


@triton.jit
def append_words(ring, query, first_row, words) -> None:
    """Append the rows of words [m, n] to the rings of queries [m]."""
    row = first_row + (tl.arange(0, words.shape[1]) * 32)[None, :]
    rings = of_query(ring, query[:, None])
    while tl.reduce_or(tl.reduce_or(words, axis=1), axis=0) != 0:
        lowest = words & -words
        power = lowest.to(tl.uint32, bitcast=True).to(tl.float32)
        exponent = (power.to(tl.int32, bitcast=True) >> 23) - 127
        append(rings, (row + exponent).to(tl.int32), words != 0)
        words = words ^ lowest


@triton.jit(do_not_specialize=["batch", "programs"])
def filter_tiles(
    rounded,  # FilterQueries; `limit` is lowered
    multiplied,  # FilterKeys
    query_tiles,  # descriptor of rounded.vectors; None where pointers are loaded from
    key_tiles,  # descriptor of multiplied.slots: row i is slot i; None where pointers are
    keys,
    ring,  # appended to
    batch,  # B
    programs,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,  # tiles of queries that share what is in L2
    UPCAST: tl.constexpr,  # the interpreter has no dot of bf16
) -> None:
    """Append the candidates among every programs-th tile of BLOCK_B queries and BLOCK_N rows."""
    rows, width = tl.load(keys.rows), keys.width
    beside, along = tl.cdiv(batch, BLOCK_B), tl.cdiv(rows, BLOCK_N)
    gap = gap_of(width)
    tiny = width * (2.0**-118)
    for tile in range(tl.program_id(0).to(tl.int64), beside * along, programs):
        query_tile, row_tile = tile_at(tile, beside, along, GROUP)
        query = query_tile * BLOCK_B + tl.arange(0, BLOCK_B)
        row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        asks = query < batch
        here = is_live(keys, row, row < rows)
        slot = slots_of(keys, row, here)
        # Norms so large that a product may overflow bound nothing: such a key is a candidate.
        key_squares = tl.load(multiplied.norm + slot, mask=here, other=0)
        tame_key = key_squares < _LARGE
        low = tl.where(tame_key, key_squares * (1.0 - gap), -float("inf"))
        low = tl.where(here, low, float("inf"))
        widest = tl.max(tl.where(tame_key, key_squares, float("inf")), axis=0)
        farthest = tl.max(tl.load(multiplied.error + slot, mask=here, other=0), axis=0)
        squares = tl.load(rounded.norm + query, mask=asks, other=0)
        apart = tl.load(rounded.error + query, mask=asks, other=0) + farthest
        # The limit may have been lowered since: any earlier one is a limit too.
        limit = rounded.limit + query
        known = tl.load(limit, mask=asks, other=-1, cache_modifier=".cg")
        product = product_of(
            rounded,
            multiplied,
            query_tiles,
            key_tiles,
            query,
            asks,
            slot,
            here,
            (query_tile * BLOCK_B).to(tl.int32),
            (row_tile * BLOCK_N).to(tl.int32),
            width,
            BLOCK_D,
            STAGES,
            UPCAST,
        )
        lower = low[None, :] - 2.0 * product  # s - E, but for |q'|^2
        least = tl.min(lower, axis=1)
        tame = squares < _LARGE
        reach = least + (2.0 * gap * widest + squares * (1.0 + gap) + tiny)
        upper = tl.sqrt(tl.maximum(reach, 1e-30)) * (1.0 + 1e-5) + apart
        # Comparisons are false for what is not a number, and a maximum leaves it out.
        known_reach = tame & (reach < float("inf")) & (upper < float("inf"))
        upper = tl.where(known_reach, upper, float("inf"))
        # Numbers >= 0 are in the order of their bits, and -1 is below all of them.
        bits = upper.to(tl.int32, bitcast=True)
        tl.atomic_min(limit, bits, mask=asks & (bits < known), sem="relaxed")
        allowed = tl.minimum(known, bits).to(tl.float32, bitcast=True)
        bound = (allowed + apart) * (allowed + apart) * (1.0 + 1e-5) + 1e-30
        bound = tl.where(tame, bound - squares * (1.0 - gap) + tiny, float("inf"))
        may = asks & (allowed >= 0)
        # What is not a number is not farther than a bound; a minimum may leave it out.
        near = may & ((least > tl.where(widest < float("inf"), bound, float("inf"))) == 0)
        while any_of(near):  # once at most; triton 3.6 cannot compile this as a branch for sm_100
            candidates = ((lower > bound[:, None]) == 0) & may[:, None]
            candidates = candidates & (low < float("inf"))[None, :]
            append_words(ring, query, row_tile * BLOCK_N, words_of(candidates))
            near = near & (query < 0)
