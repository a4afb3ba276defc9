"""The nearest key of every query, with every key read: the canonical sum in float64.

    S_i = sum over j of (q_j - k_ij)^2      in float64, j ascending, products rounded before added
    row = argmin S_i                        the lowest row among equal S

`nearest_in_share`: one program takes one query and a share of the rows, BLOCK_N together, one row
to a lane. It reads CHUNK columns at a time, STAGES chunks in flight, and halves a chunk until
single columns are left, so that they are added in ascending order whatever the layout.
`nearest_of_shares`: one program takes one query and the winners of all its shares.

The order is the law, so a product and a sum may not be contracted: every launch passes `OPTIONS`.
Ties: the lowest row of a share, then the lowest share. Masks: past D both sides are 0 and add +0
exactly; rows past N, removed rows and sums that are not finite count as infinity, and infinity
never wins.

Two launches, of as many programs as the device runs at once or one a query, whatever N is. They are
specialised on the type of the keys, the width and whether rows point to slots; never on B or N.
"""

import torch
import triton
import triton.language as tl
from grace_fast.kernels import launch
from torch import Tensor

OPTIONS = {"enable_fp_fusion": False}

BLOCK_N = 64
CHUNK_BYTES = 64  # of one row: whole 32-byte sectors; 48 registers a lane on sm_90 (triton 3.9)
PROGRAMS_PER_PROCESSOR = 64  # four times what its registers hold, so that none is the last long
SHARES = 256  # winners read together
WARP = {"cuda": 32, "hip": 64}
STAGES = {"cuda": 3, "hip": 2}  # AMD's scalar registers hold no third one


@triton.jit
def add_in_order(total, square, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Return ((total + square[:, 0]) + square[:, 1]) + ... of square [BLOCK_N, WIDTH]."""
    if WIDTH > 1:
        halves = tl.reshape(square, (BLOCK_N, 2, WIDTH // 2))
        low, high = tl.split(tl.permute(halves, (0, 2, 1)))
        total = add_in_order(total, low, BLOCK_N, WIDTH // 2)
        total = add_in_order(total, high, BLOCK_N, WIDTH // 2)
    else:
        total += tl.reshape(square, (BLOCK_N,))
    return total


@triton.jit
def canonical_sums(
    query,
    keys,
    slot,
    here,
    width,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr = 3,
) -> tl.tensor:
    """Return S [BLOCK_N] float64 of one query [D] and the keys in slots, where `here` is set."""
    squared = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for first in tl.range(0, width, CHUNK, num_stages=STAGES):
        j = first + tl.arange(0, CHUNK)
        q = tl.load(query + j, mask=j < width, other=0)
        k = tl.load(
            keys + slot[:, None] * width + j[None, :],
            mask=here[:, None] & (j < width)[None, :],
            other=0,
        )
        # By way of fp32, which holds bf16 and fp16 exactly: the interpreter has no bf16 of its own.
        difference = q.to(tl.float32).to(tl.float64)[None, :] - k.to(tl.float32).to(tl.float64)
        squared = add_in_order(squared, difference * difference, BLOCK_N, CHUNK)
    return squared


@triton.jit
def lowest(squared, row) -> tuple[tl.tensor, tl.tensor]:
    """Return the least of squared and the lowest row that has it."""
    best = tl.min(squared, axis=0)
    best_row = tl.min(tl.where(squared == best, row, 0x7FFFFFFFFFFFFFFF), axis=0)
    return best, best_row


@triton.jit(do_not_specialize=["batch", "rows", "shares", "share_blocks"])
def nearest_in_share(
    queries,  # [B, D] fp32
    keys,  # [slots, D] fp32, bf16 or fp16
    key_slot,  # [N] int64, the slot of each row; None where row i is slot i
    live,  # [N] bool, False for a removed row
    share_squared,  # [B, shares] float64, written
    share_row,  # [B, shares] int64, written
    batch,  # B
    rows,  # N
    width,  # D
    shares,
    share_blocks,  # blocks of BLOCK_N rows that a share has
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Write the nearest live row of one query among a share of the rows, and its S."""
    # Queries run fastest: the programs that read the same keys are close in time.
    share = tl.program_id(0) // batch
    query = (tl.program_id(0) % batch).to(tl.int64)
    lane = tl.arange(0, BLOCK_N)
    best = tl.full((BLOCK_N,), float("inf"), dtype=tl.float64)
    best_block = tl.full((BLOCK_N,), -1, dtype=tl.int32)
    first = share * share_blocks
    last = tl.minimum(first + share_blocks, tl.cdiv(rows, BLOCK_N).to(tl.int32))
    for block in tl.range(first, last, disable_licm=True):  # what is lifted out takes registers
        row = (tl.zeros((BLOCK_N,), dtype=tl.int64) + block) * BLOCK_N + lane
        slot = row
        if key_slot is not None:
            slot = tl.load(key_slot + row, mask=row < rows, other=0)
        is_live = tl.load(live + row, mask=row < rows, other=0) != 0
        squared = canonical_sums(
            queries + query * width, keys, slot, is_live, width, BLOCK_N, CHUNK, STAGES
        )
        # Later blocks do not take over at an equal S. NaN < S is false, so this takes NaN out too.
        nearer = is_live & (squared < best)
        best, best_block = tl.where(nearer, squared, best), tl.where(nearer, block, best_block)
    least, least_row = lowest(best, best_block.to(tl.int64) * BLOCK_N + lane)
    tl.store(share_squared + query * shares + share, least)
    tl.store(share_row + query * shares + share, least_row)


@triton.jit(do_not_specialize=["shares"])
def nearest_of_shares(
    share_squared,  # [B, shares] float64
    share_row,  # [B, shares] int64, ascending along the shares; not read where S is infinite
    squared,  # [B] float64, written
    row,  # [B] int64, written
    shares,
    SHARES: tl.constexpr,
) -> None:
    """Write the nearest row of one query and its S, given the winners of its shares."""
    query = tl.program_id(0).to(tl.int64)
    best = tl.full((SHARES,), float("inf"), dtype=tl.float64)
    best_row = tl.full((SHARES,), -1, dtype=tl.int64)
    for first in range(0, shares, SHARES):
        share = first + tl.arange(0, SHARES)
        here = query * shares + share
        found = tl.load(share_squared + here, mask=share < shares, other=float("inf"))
        found_row = tl.load(share_row + here, mask=share < shares, other=0)
        # Later shares hold later rows, so an equal S does not take over; infinity leaves -1.
        nearer = found < best
        best, best_row = tl.where(nearer, found, best), tl.where(nearer, found_row, best_row)
    least, least_row = lowest(best, best_row)
    tl.store(squared + query, least)
    tl.store(row + query, least_row)


def shares_of(rows: int, batch: int, processors: int) -> tuple[int, int]:
    """Return in how many shares the rows of a query are read, and how many blocks each has."""
    blocks = triton.cdiv(rows, BLOCK_N)
    share_blocks = triton.cdiv(blocks, triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, batch))
    return int(triton.cdiv(blocks, share_blocks)), int(share_blocks)


def nearest(
    queries: Tensor, keys: Tensor, key_slot: Tensor | None, live: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the nearest live row [B] int64 and its S [B] float64; -1 and inf where there is none.

    queries: [B, D] fp32, keys: [slots, D], key_slot: [N] int64 or None, live: [N] bool; all
    contiguous and on one device, B and N at least 1.
    """
    queries = launch.aligned(queries)
    batch, width = queries.shape
    shares, share_blocks = shares_of(len(live), batch, launch.processors(queries.device))
    share_squared = queries.new_empty(batch, shares, dtype=torch.float64)
    share_row = queries.new_empty(batch, shares, dtype=torch.int64)
    squared = queries.new_empty(batch, dtype=torch.float64)
    row = queries.new_empty(batch, dtype=torch.int64)
    backend = "hip" if torch.version.hip else "cuda"
    with torch.cuda.device_of(queries):
        nearest_in_share[(batch * shares,)](
            queries,
            keys,
            key_slot,
            live,
            share_squared,
            share_row,
            batch,
            len(live),
            width,
            shares,
            share_blocks,
            BLOCK_N=BLOCK_N,
            CHUNK=CHUNK_BYTES // keys.element_size(),
            STAGES=STAGES[backend],
            num_warps=BLOCK_N // WARP[backend],
            **OPTIONS,
        )
        nearest_of_shares[(batch,)](
            share_squared, share_row, squared, row, shares, SHARES=SHARES, num_warps=4, **OPTIONS
        )
    return row, squared
