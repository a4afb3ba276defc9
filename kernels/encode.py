"""The codes of queries: their projection in steps, rounded, and what may be wrong with it.

    z(q) = projection of q - centre, in steps; code = round(z) mod 256; point = round(z) of 16 slots

One program takes one query and 16 slots. The program of the first 16 turns them, as the host does
with those of keys, and writes how far its own point may be off: `csrc/lookup.h` has the contract.
A query that is not finite is a miss, which is written here, and one too large for float32 is
doubtful; neither has codes. Ties: halves go to the even step. Masks: past D a query is 0, past the
padding so are centre and rows.

One launch, specialised on types, the padded width and what kind of codes there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from grace_fast.kernels.code_layout import NEAR, SLOTS, Codes
from grace_fast.kernels.code_thresholds import ETA, LIPSCHITZ, NOTES, PER_STEP, ROW_NORM, Query
from grace_fast.kernels.exact import Found, is_finite, write_verdict
from grace_fast.kernels.nearest import OPTIONS
from grace_fast.kernels.ring import Ring
from torch import Tensor

CHUNK, WARPS = 256, 8  # a lane adds 16 numbers of a row, then lanes are added
_UNIT = tl.constexpr(2.0**-24)
_SLOT_LIMIT = tl.constexpr(2.0**21)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # added and taken away, it leaves a whole number
_POINT_LIMIT = tl.constexpr(16000)


@triton.jit
def rounded(steps) -> tuple[tl.tensor, tl.tensor]:
    """Return the whole numbers next to float64 steps as int32, and the squares of what is left."""
    t = tl.minimum(tl.maximum(steps, -_SLOT_LIMIT), _SLOT_LIMIT).to(tl.float32)
    whole = (t + _ROUNDER) - _ROUNDER
    apart = (t - whole).to(tl.float64)
    return whole.to(tl.int32), apart * apart


@triton.jit(do_not_specialize=["width"])
def encode(
    queries,  # [B, D] fp32, bf16 or fp16
    width,  # D
    codes,
    padded,  # Dp
    asked,  # Query, written
    ring,  # `doubtful` is written, `entries` set to 0
    found,  # written where the query is not finite
    CHUNK: tl.constexpr,
) -> None:
    """Write the codes of 16 slots of one query, and what may be wrong with them."""
    query = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    slot = tl.arange(0, 16)
    sums = tl.zeros((16, CHUNK), dtype=tl.float32)
    squares = tl.zeros((CHUNK,), dtype=tl.float32)
    for first in tl.range(0, padded, CHUNK, num_stages=3):
        j = first + tl.arange(0, CHUNK)
        q = tl.load(queries + query * width + j, mask=j < width, other=0).to(tl.float32)
        x = q - tl.load(codes.centre + j, mask=j < padded, other=0)
        at = (group * 16 + slot)[:, None] * padded + j[None, :]
        w = tl.load(codes.rows + at, mask=(j < padded)[None, :], other=0).to(tl.float32)
        sums += w * x[None, :]
        squares += x * x
    square = tl.sum(squares, axis=0).to(tl.float64)
    known = square < 1e30  # false for NaN
    if group == 0:
        tl.store(ring.entries + query, 0)
        if known:
            tl.store(ring.doubtful + query, 0)
        elif is_finite(queries + query * width, width, CHUNK):
            tl.store(ring.doubtful + query, 1)
        else:
            tl.store(ring.doubtful + query, -1)
            write_verdict(found, query, query < 0, query, square)
    if not known:
        return
    per_step = tl.load(codes.numbers + PER_STEP)
    lipschitz, row_norm = tl.load(codes.numbers + LIPSCHITZ), tl.load(codes.numbers + ROW_NORM)
    norm = tl.sqrt(square) * 1.0001 + 1e-16
    relative = (48.0 + width / 256.0) * (_UNIT * 1.0001)
    value = tl.sum(sums, axis=1).to(tl.float64)
    residual_note = asked.notes + query * NOTES + 2 + group
    if group > 0:
        whole, residual = rounded(value * per_step)
        tl.store(residual_note, tl.sum(residual, axis=0))
        tl.store(asked.code + query * 64 + group * 16 + slot, (whole & 255).to(tl.uint8))
        return
    far_error = norm * (8.0 * relative * row_norm + _UNIT * lipschitz)
    error = norm * (4.0 * relative * row_norm + _UNIT * lipschitz)
    matrix = tl.load(codes.turn + slot[:, None] * 16 + slot[None, :])  # symmetric
    turned = tl.sum(matrix * value[:, None], axis=0)
    of_rows = slot < (15 if codes.norm_slot else 16)
    if codes.norm_slot:
        inside = tl.sum(tl.where(of_rows, turned * turned, 0.0), axis=0)
        eta = tl.load(codes.numbers + ETA)
        wrong = (relative + 4.0 * _UNIT) * norm * norm + 2.0 * tl.sqrt(inside) * error
        wrong = 1.001 * (wrong + error * error + 2.0 * eta * inside) + 1e-30
        left = tl.sqrt(tl.maximum(square - inside, 0.0))
        apart = wrong / tl.maximum(left, tl.sqrt(wrong)) + left * (2.0 * _UNIT)
        turned = tl.where(of_rows, turned, left)
        error = tl.sqrt(error * error + apart * apart)
    whole, residual = rounded(turned * per_step)
    tl.store(asked.code + query * 64 + slot, (whole & 255).to(tl.uint8))
    clamped = tl.minimum(tl.maximum(whole, -_POINT_LIMIT), _POINT_LIMIT)
    tl.store(asked.point + query * 16 + slot, clamped.to(tl.int16))
    near_error = tl.sqrt(tl.sum(residual, axis=0)) + error * per_step
    tl.store(asked.notes + query * NOTES, near_error)
    tl.store(asked.notes + query * NOTES + 1, far_error * per_step)
    tl.store(residual_note, tl.sum(tl.where(of_rows, residual, 0.0), axis=0))


def encoded(queries: Tensor, codes: Codes, ring: Ring, found: Found) -> Query:
    """Return queries [B, D] as codes; say in `ring` which are doubtful, and empty it.

    The verdict on those that are not finite is in `found`.
    """
    batch, width = queries.shape
    code = queries.new_empty(batch, SLOTS, dtype=torch.uint8)
    point = queries.new_empty(batch, NEAR, dtype=torch.int16)
    notes = queries.new_empty(batch, NOTES.value, dtype=torch.float64)
    asked = Query(code, code.view(torch.int32), point, notes)
    encode[(batch, 4 if codes.has_far else 1)](
        queries,
        width,
        codes,
        codes.rows.shape[1],
        asked,
        ring,
        found,
        CHUNK=CHUNK,
        num_warps=WARPS,
        **OPTIONS,
    )
    return asked
