"""Every key read, for many queries: tensor cores find candidates, the law decides.

`round_queries`: one program takes one query and makes what is multiplied for it. `filter_tiles`
(`tile_filter` has its bounds): programs share the tiles and append candidates to the ring of each
query. `decide`: one program settles one ring, ties and all. A query whose ring was too small is
looked up by `doubtful.find`.

A tile reads BLOCK_B + BLOCK_N rows from L2 for BLOCK_B * BLOCK_N products. Of B = 4 096 queries
and N = 1e5 keys of D = 4 096 in 16 bits, tiles of 64 x 128 read 79 GB and those of 128 x 256 39 GB,
for 3.4e12 operations. The larger ones fill a multiprocessor of sm_90, one program to each: 128 of a
thread's 255 registers hold sums, 192 KiB the chunks in flight, which the copy engine brings where
rows are slots and begin at multiples of 16 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from grace_fast.kernels import dense, doubtful, launch
from grace_fast.kernels.exact import Found, Keys, is_finite, write_verdict
from grace_fast.kernels.nearest import OPTIONS
from grace_fast.kernels.ring import WARPS, Ring, settle
from grace_fast.kernels.tile_filter import filter_tiles
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

RING = 256  # candidates of a query; more and it is doubtful
# Queries, rows and columns of a tile, its warps and the chunks in flight. Not measured.
TILE = {"BLOCK_B": 64, "BLOCK_N": 128, "BLOCK_D": 64, "STAGES": 3}
TILE_WARPS = 4
PROGRAMS_PER_PROCESSOR = 2  # not measured
# The same of the larger tile, one program to a multiprocessor.
LARGE_TILE = {"BLOCK_B": 128, "BLOCK_N": 256, "BLOCK_D": 64, "STAGES": 4}
LARGE_WARPS = 8
LARGE = 128  # queries from which on it pays; not measured
# Queries that go along all keys together: 17 MB of D = 4 096 that stay in L2. Not measured.
TOGETHER = 2048


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


def is_hopper(device: torch.device) -> bool:
    """Tell whether a device has what the large tile takes; the interpreter has everything."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def tiles_of(tile: dict[str, int], keys: Keys, batch: int) -> int:
    """Return how many tiles there are, for all rows that there is room for."""
    rows = triton.cdiv(max(1, keys.capacity), tile["BLOCK_N"])
    return int(rows * triton.cdiv(batch, tile["BLOCK_B"]))


def tile_of(keys: Keys, batch: int) -> dict[str, int]:
    """Return the larger tile where the device can take it and there are enough to fill it."""
    fills = tiles_of(LARGE_TILE, keys, batch) >= dense.processors(keys)
    return LARGE_TILE if batch >= LARGE and fills and is_hopper(keys.slots.device) else TILE


def descriptors_of(
    tile: dict[str, int], rounded: FilterQueries, multiplied: FilterKeys, keys: Keys
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Return queries and keys for the copy engine; None where it cannot read them."""
    told = []
    pairs = ((rounded.vectors, "BLOCK_B"), (multiplied.slots, "BLOCK_N"))
    for vectors, rows in pairs:
        aligned = vectors.data_ptr() % 16 == 0 and keys.width * vectors.itemsize % 16 == 0
        if keys.key_slot is not None or not (aligned and is_hopper(vectors.device)):
            return None, None
        block = [tile[rows], tile["BLOCK_D"]]
        told.append(TensorDescriptor(vectors, list(vectors.shape), [keys.width, 1], block))
    return told[0], told[1]


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
    tile = tile_of(keys, batch)
    query_tiles, key_tiles = descriptors_of(tile, rounded, multiplied, keys)
    room = (1 if tile is LARGE_TILE else PROGRAMS_PER_PROCESSOR) * dense.processors(keys)
    programs = min(tiles_of(tile, keys, batch), room)
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
            query_tiles,
            key_tiles,
            keys,
            ring,
            batch,
            programs,
            **tile,
            GROUP=max(1, TOGETHER // tile["BLOCK_B"]),
            UPCAST=device.type != "cuda",
            num_warps=LARGE_WARPS if tile is LARGE_TILE else TILE_WARPS,
            enable_fp_fusion=True,
        )
        decide[(batch,)](queries, keys, ring, found, SUMS=sums, num_warps=WARPS, **OPTIONS)
    return doubtful.find(queries, keys, ring.doubtful, found, sums)
