"""Every key read, for many queries: tensor cores find candidates, the law decides.

    |q - k|^2 = |q|^2 + |k|^2 - 2 q k

in float32 loses what cancels, so it is only a filter, with a bound on its error:

    q', k'      what is multiplied: 16-bit, q and k moved by no more than e_q and e_k
    s           |q'|^2 + |k'|^2 - 2 q'k' as the tensor cores say it, within E of the truth,
                E = gap * (|q'|^2 + |k'|^2)
    upper       sqrt(s + E) + e_q + e_k: some key is this near or nearer
    candidate   unless s - E > (limit + e_q + e_k)^2, where `limit` is the least `upper` so far, and
                the widest radius to begin with; e_k is the largest of a tile

`gap` takes every one of D products and sums to lose 2^-23 of the largest term it is aligned to.

`round_queries`: one program takes one query and makes its q'. `filter_tiles`: programs share the
tiles of BLOCK_B queries and BLOCK_N rows and append candidates to the ring of each query. `decide`:
one program settles one ring, ties and all. A query whose ring was too small is looked up by
`doubtful.find`. Masks: queries past B, rows past N and removed rows are no candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from grace_fast.kernels import dense, doubtful, launch
from grace_fast.kernels.exact import (
    Found,
    Keys,
    any_of,
    is_finite,
    is_live,
    slots_of,
    write_verdict,
)
from grace_fast.kernels.nearest import OPTIONS
from grace_fast.kernels.ring import WARPS, Ring, append, of_query, settle
from torch import Tensor

RING = 256  # candidates of a query; more and it is doubtful
# Queries, rows and columns of a tile, its warps and the chunks in flight. Not measured.
TILE = {"BLOCK_B": 64, "BLOCK_N": 128, "BLOCK_D": 64, "STAGES": 3}
TILE_WARPS = 4
PROGRAMS_PER_PROCESSOR = 2  # not measured
_UNIT = tl.constexpr(2.0**-24)
_LARGE = tl.constexpr(1e37)


class FilterKeys(NamedTuple):
    """What the tensor cores multiply for the keys, by slot: an argument of the kernels."""

    slots: Tensor  # [slots, D] bf16 or fp16: k'
    norm: Tensor  # [slots] float32, |k'|^2
    error: Tensor  # [slots] float32, e_k
    centre: Tensor | None  # [D] float32, taken from keys and queries first


class FilterQueries(NamedTuple):
    """What they multiply for the queries: an argument of the kernels."""

    vectors: Tensor  # [B, D] of the type of FilterKeys.slots: q'
    bits: Tensor  # the same memory; bf16 as int16
    norm: Tensor  # [B] float32, |q'|^2
    error: Tensor  # [B] float32, e_q
    limit: Tensor  # [B] int32, the bits of a float32

    @staticmethod
    def room(queries: Tensor, dtype: torch.dtype) -> FilterQueries:
        """Return room for queries [B, D]."""
        vectors = torch.empty_like(queries, dtype=dtype)
        bits = vectors.view(torch.int16) if dtype == torch.bfloat16 else vectors
        types = (torch.float32, torch.float32, torch.int32)
        fields = (queries.new_empty(len(queries), dtype=dtype) for dtype in types)
        return FilterQueries(vectors, bits, *fields)


def filter_keys(
    slots: Tensor, centre: Tensor | None = None, known: FilterKeys | None = None
) -> FilterKeys:
    """Return the filter of keys [slots, D].

    bf16 and fp16 keys are multiplied as they are, unless a centre is to be taken from them first;
    that, and fp32 keys, take a bf16 copy. A centre pays where the keys' mean is large against their
    distances. `known` is the filter of the first of the same slots, around the same centre.
    """
    first = 0 if known is None else len(known.norm)
    if slots.dtype != torch.float32 and centre is None:
        kept = slots
    else:
        kept = torch.empty_like(slots, dtype=torch.bfloat16)
        if known is not None:
            kept[:first] = known.slots
    norm = torch.empty(len(slots), device=slots.device, dtype=torch.float32)
    error = torch.zeros(len(slots), device=slots.device, dtype=torch.float32)
    if known is not None:
        norm[:first], error[:first] = known.norm, known.error
    for at in range(first, len(slots), 4096):
        here = slice(at, at + 4096)
        exact = slots[here].double() - (0.0 if centre is None else centre.double())
        if kept is not slots:
            kept[here] = exact.bfloat16()
            apart = (exact - kept[here].double()).norm(dim=1)
            error[here] = (apart * (1 + 1e-6) + 1e-30).float()
        norm[here] = kept[here].double().square().sum(dim=1).float()
    return FilterKeys(kept, norm, error, centre)


@triton.jit
def round_queries(
    queries,  # [B, D] fp32, bf16 or fp16
    keys,
    centre,  # [D] float32 or None
    rounded,  # FilterQueries, written
    entries,  # [B] int32, set to 0
    CHUNK: tl.constexpr,
) -> None:
    """Write one query as it is multiplied. A limit of -1 says that it holds no candidates."""
    query = tl.program_id(0).to(tl.int64)
    width, start = keys.width, query * keys.width
    squares = tl.zeros((CHUNK,), dtype=tl.float64)
    errors = tl.zeros((CHUNK,), dtype=tl.float64)
    for first in range(0, width, CHUNK):
        j = first + tl.arange(0, CHUNK)
        exact = tl.load(queries + start + j, mask=j < width, other=0).to(tl.float32).to(tl.float64)
        if centre is not None:
            exact -= tl.load(centre + j, mask=j < width, other=0).to(tl.float64)
        narrow = exact.to(tl.float32)
        if rounded.bits.dtype.element_ty == tl.int16:  # to the nearest bf16, ties to even
            bits = narrow.to(tl.int32, bitcast=True)
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
            half = (bits >> 16).to(tl.int16)
            taken = (bits & -65536).to(tl.float32, bitcast=True).to(tl.float64)
        else:
            half = narrow.to(tl.float16)
            taken = half.to(tl.float64)
        tl.store(rounded.bits + start + j, half, mask=j < width)
        squares += taken * taken
        errors += (exact - taken) * (exact - taken)
    radius = tl.load(keys.widest)
    may_hit = (radius >= 0) & is_finite(queries + start, width, CHUNK)
    limit = tl.where(may_hit, radius * (1.0 + 1e-6), -1.0)
    tl.store(rounded.limit + query, limit.to(tl.int32, bitcast=True))
    tl.store(rounded.norm + query, tl.sum(squares, axis=0).to(tl.float32))
    moved = tl.sqrt(tl.sum(errors, axis=0).to(tl.float32)) * (1.0 + 1e-5)
    tl.store(rounded.error + query, tl.where(moved > 0, moved + 1e-18, 0.0))
    tl.store(entries + query, 0)


@triton.jit
def first_candidate(lower, bound, may, here, after) -> tl.tensor:
    """Return the first column after `after` [m] that is not farther than bound [m]; n for none.

    lower: [m, n], may: [m], here: [n]. What is not a number is not farther.
    """
    column = tl.arange(0, here.shape[0])[None, :]
    candidate = ((lower > bound[:, None]) == 0) & (here[None, :] & may[:, None])
    candidate = candidate & (column > after[:, None])
    return tl.min(tl.where(candidate, column, here.shape[0]), axis=1)


@triton.jit(do_not_specialize=["batch", "programs"])
def filter_tiles(
    rounded,  # FilterQueries; `limit` is lowered
    multiplied,  # FilterKeys
    keys,
    ring,  # appended to
    batch,  # B
    programs,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter has no dot of bf16
) -> None:
    """Append the candidates among every programs-th tile of BLOCK_B queries and BLOCK_N rows."""
    rows, width = tl.load(keys.rows), keys.width
    beside = tl.cdiv(batch, BLOCK_B)
    tiles = tl.cdiv(rows, BLOCK_N) * beside
    gap = (2.5 * width + 128.0) * _UNIT
    tiny = width * (2.0**-118)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, programs):
        # Queries run fastest: tiles that read the same keys are close in time.
        query = (tile % beside) * BLOCK_B + tl.arange(0, BLOCK_B)
        row = (tile // beside) * BLOCK_N + tl.arange(0, BLOCK_N)
        asks = query < batch
        here = is_live(keys, row, row < rows)
        slot = slots_of(keys, row, here)
        product = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
        for first in tl.range(0, width, BLOCK_D, num_stages=STAGES):
            j = (first + tl.arange(0, BLOCK_D))[None, :]
            q_mask, k_mask = asks[:, None] & (j < width), here[:, None] & (j < width)
            q = tl.load(rounded.vectors + query[:, None] * width + j, mask=q_mask, other=0)
            k = tl.load(multiplied.slots + slot[:, None] * width + j, mask=k_mask, other=0)
            if UPCAST:
                q, k = q.to(tl.float32), k.to(tl.float32)
            product = tl.dot(q, tl.trans(k), product)
        # Norms so large that a product may overflow bound nothing: such a key is a candidate.
        key_squares = tl.load(multiplied.norm + slot, mask=here, other=0)
        tame_key = key_squares < _LARGE
        high = tl.where(here & tame_key, key_squares * (1.0 + gap), float("inf"))
        low = tl.where(tame_key, key_squares * (1.0 - gap), -float("inf"))
        squares = tl.load(rounded.norm + query, mask=asks, other=0)
        tame = squares < _LARGE
        apart = tl.max(tl.load(multiplied.error + slot, mask=here, other=0), axis=0)
        apart = apart + tl.load(rounded.error + query, mask=asks, other=0)
        least = tl.min(high[None, :] - 2.0 * product, axis=1) + (squares * (1.0 + gap) + tiny)
        upper = tl.sqrt(tl.maximum(least, 1e-30)) * (1.0 + 1e-5) + apart
        upper = tl.where(tame & (upper < float("inf")), upper, float("inf"))
        # Numbers >= 0 are in the order of their bits, and -1 is below all of them.
        bits = upper.to(tl.int32, bitcast=True)
        known = tl.atomic_min(rounded.limit + query, bits, mask=asks, sem="relaxed")
        allowed = tl.minimum(known, bits).to(tl.float32, bitcast=True)
        bound = (allowed + apart) * (allowed + apart) * (1.0 + 1e-5) + 1e-30
        bound = tl.where(tame, bound - squares * (1.0 - gap) + tiny, float("inf"))
        may = asks & (allowed >= 0)
        # Candidates of each query from left to right, one a query at a time: they are few.
        lower = low[None, :] - 2.0 * product
        column = first_candidate(lower, bound, may, here, query.to(tl.int32) * 0 - 1)
        while any_of(column < BLOCK_N):
            candidate = ((tile // beside) * BLOCK_N + column).to(tl.int32)
            append(of_query(ring, query), candidate, column < BLOCK_N)
            column = first_candidate(lower, bound, may, here, column)


@triton.jit
def decide(
    queries,  # [B, D] fp32, bf16 or fp16
    keys,
    ring,  # `doubtful` is written: whether the ring was too small
    found,  # written
    SUMS: tl.constexpr,
) -> None:
    """Write the verdict on one query from its ring."""
    query = tl.program_id(0).to(tl.int64)
    entries = tl.load(ring.entries + query)
    tl.store(ring.doubtful + query, (entries > ring.size).to(tl.int32))
    if entries > ring.size:
        return
    vector = queries + query * keys.width
    is_hit, row, squared, _ = settle(vector, keys, ring, query, entries, None, SUMS)
    write_verdict(found, query, is_hit, row, squared)


def programs_of(keys: Keys, batch: int) -> int:
    """Return how many programs share the tiles."""
    rows = triton.cdiv(max(1, keys.capacity), TILE["BLOCK_N"])
    tiles = rows * triton.cdiv(batch, TILE["BLOCK_B"])
    return int(min(tiles, PROGRAMS_PER_PROCESSOR * dense.processors(keys)))


def find(
    queries: Tensor, keys: Keys, multiplied: FilterKeys, sums: bool = True, ring_size: int = RING
) -> Found:
    """Return whether each query [B, D] is in the ball of its nearest key, by the law (R64).

    queries: contiguous, on the keys' device, B at least 1. ring_size: room for candidates, a power
    of two. Without `sums` the S of a hit is the law's only to within float32.
    """
    queries = launch.aligned(queries)
    batch, device = len(queries), queries.device
    found = Found.room(queries)
    ring = Ring.room(batch, ring_size, device)
    rounded = FilterQueries.room(queries, multiplied.slots.dtype)
    programs = programs_of(keys, batch)
    with torch.cuda.device_of(queries):
        round_queries[(batch,)](
            queries,
            keys,
            multiplied.centre,
            rounded,
            ring.entries,
            CHUNK=1024,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        filter_tiles[(programs,)](
            rounded,
            multiplied,
            keys,
            ring,
            batch,
            programs,
            **TILE,
            UPCAST=device.type != "cuda",
            num_warps=TILE_WARPS,
            enable_fp_fusion=True,
        )
        decide[(batch,)](queries, keys, ring, found, SUMS=sums, num_warps=WARPS, **OPTIONS)
    return doubtful.find(queries, keys, ring.doubtful, found, sums)
