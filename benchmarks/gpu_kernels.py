"""Triton kernels that only the benchmarks need: bytes read, and a peer's fused arg-min.

`read_words`: programs share the words and add them up; nothing but one word a program is written.
`nearest_keys`: one program takes BLOCK_B queries and BLOCK_N keys, multiplies them and keeps the
least |k|^2 - 2 q.k + |q|^2 of each query, packed with its row, by an atomic minimum of int64.
`within_radius`: one program tells of all queries whether the least is in its ball.

The arg-min is in float32 by the expansion: it may be wrong near a radius, which a row says.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 8192  # of a program's step: eight 16-byte loads in flight for each of 256 threads
PROGRAMS = 132 * 8  # all that an H200 holds at once
OPTIONS = {"enable_fp_fusion": True}  # no canonical sum is in here
NOTHING = 0x7FFFFFFFFFFFFFFF  # packed: no key yet


@triton.jit
def read_words(
    words,  # [count] int32, whole steps
    sink,  # [programs] int32, written
    count,
    BLOCK: tl.constexpr,
) -> None:
    """Read every programs-th step and write what it adds up to."""
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for at in range(first, count, tl.num_programs(0).to(tl.int64) * BLOCK):
        total += tl.load(words + at + tl.arange(0, BLOCK))
    tl.store(sink + tl.program_id(0), tl.sum(total, axis=0))


def read_all(words: Tensor, sink: Tensor) -> None:
    """Read all of words [n] int32, a multiple of WORDS; sink: [programs] int32."""
    if len(words) % WORDS:
        raise ValueError(f"words must be a multiple of {WORDS}, got {len(words)}")
    read_words[(len(sink),)](words, sink, len(words), BLOCK=WORDS, num_warps=8, **OPTIONS)


@triton.jit(do_not_specialize=["batch", "rows"])
def nearest_keys(
    queries,  # [B, D] bf16, fp16 or fp32
    keys,  # [N, D] of the same type
    query_norm,  # [B] float32
    key_norm,  # [N] float32
    best,  # [B] int64 packed, lowered
    batch,  # B
    rows,  # N
    width,  # D
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Lower the best of BLOCK_B queries by what BLOCK_N keys are away."""
    query = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    asks, here = query < batch, row < rows
    product = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
    for first in range(0, width, BLOCK_D):
        j = first + tl.arange(0, BLOCK_D)
        inside = j < width
        q = tl.load(
            queries + query[:, None] * width + j[None, :],
            mask=asks[:, None] & inside[None, :],
            other=0,
        )
        k = tl.load(
            keys + row[None, :] * width + j[:, None], mask=here[None, :] & inside[:, None], other=0
        )
        product = tl.dot(q, k, product)
    norms = tl.load(query_norm + query, mask=asks, other=0.0)[:, None]
    norms += tl.load(key_norm + row, mask=here, other=float("inf"))[None, :]
    squared = tl.maximum(norms - 2.0 * product, 0.0)
    bits = squared.to(tl.int32, bitcast=True).to(tl.int64)
    least = tl.min((bits << 32) | row[None, :], axis=1)
    tl.atomic_min(best + query, least, mask=asks)


@triton.jit(do_not_specialize=["batch"])
def within_radius(
    best,  # [B] int64 packed
    limits,  # [N] float32, radius^2, or -1 for a dead key
    hit,  # [B] bool, written
    found,  # [B] int64, written: the row, -1 for a miss
    batch,  # B
    BLOCK: tl.constexpr,
) -> None:
    """Tell whether the nearest key's ball holds each query."""
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    asks = query < batch
    least = tl.load(best + query, mask=asks, other=0)
    squared = (least >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    row = least & 0xFFFFFFFF
    holds = squared <= tl.load(limits + row, mask=asks, other=-1.0)
    tl.store(hit + query, holds, mask=asks)
    tl.store(found + query, tl.where(holds, row, -1), mask=asks)


def fused_argmin(
    queries: Tensor, keys: Tensor, key_norm: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor]:
    """Return hit [B] and row [B] of queries [B, D] among keys [N, D], nothing of [B, N] written."""
    batch, width = queries.shape
    best = torch.full((batch,), NOTHING, dtype=torch.int64, device=queries.device)
    hit = torch.empty(batch, dtype=torch.bool, device=queries.device)
    row = torch.empty(batch, dtype=torch.int64, device=queries.device)
    query_norm = queries.float().square().sum(dim=1)
    block = min(128, max(16, triton.next_power_of_2(batch)))
    grid = (triton.cdiv(len(keys), 128), triton.cdiv(batch, block))
    tile = {"BLOCK_B": block, "BLOCK_N": 128, "BLOCK_D": 64, "num_warps": 8 if block > 64 else 4}
    nearest_keys[grid](
        queries,
        keys,
        query_norm,
        key_norm,
        best,
        batch,
        len(keys),
        width,
        num_stages=3,
        **tile,
        **OPTIONS,
    )
    within_radius[(triton.cdiv(batch, 256),)](best, limits, hit, row, batch, BLOCK=256, **OPTIONS)
    return hit, row
