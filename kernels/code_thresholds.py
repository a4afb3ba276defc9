"""How far codes may be apart: the sums that every scan of them compares with a threshold.

    sum of squared code differences <= (radius * slope + e_query + e_keys)^2, rounded up

holds for every key within a radius of a query, around a circle of 256: for the near slots, and for
all slots that look at rows. So a key whose codes are farther apart is not within the radius. Masks:
positions that are not `here` are never within it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from grace_fast.kernels.exact import any_of
from torch import Tensor

NOTES = tl.constexpr(8)  # float64 of a query: near error, far rounding, residuals of 4 x 16 slots
SLACK_STEPS = tl.constexpr(1e-3)  # what underflow may take from a projection

# Where `Codes.numbers` holds what.
PER_STEP, SLOPE, LIPSCHITZ, ROW_NORM, ETA, MIN_RADIUS = (tl.constexpr(i) for i in range(6))
ERRORS = tl.constexpr(6)  # e_keys: near and far of ordered positions, then near and far of others


class Query(NamedTuple):
    """Queries [B] as `encode` writes them: an argument of the kernels."""

    code: Tensor  # [B, 64] uint8
    words: Tensor  # [B, 16] int32, the same memory
    point: Tensor  # [B, 16] int16
    notes: Tensor  # [B, 8] float64


class CodeThreshold(NamedTuple):
    """The thresholds of one query, or [m] of them, as functions of a radius; all float64."""

    slope: tl.tensor
    near: tl.tensor  # e_query, with or without e_keys, of the near slots
    far: tl.tensor  # the same of all slots; says nothing where there are no far ones


@triton.jit
def root(square) -> tl.tensor:
    """Return no less than a square root, as float64, by the approximate one of float32."""
    return tl.sqrt(square.to(tl.float32)).to(tl.float64) * (1.0 + 1e-6)


@triton.jit
def largest_sum(radius, slope, offset) -> tl.tensor:
    """Return the largest sum of squared code differences of a key within a radius, as int32."""
    steps = radius * slope + offset
    return tl.minimum(steps * steps * (1.0 + 1e-6) + 1.0, 2147483647.0).to(tl.int32)


@triton.jit
def query_threshold(asked, query, codes) -> CodeThreshold:
    """Return the thresholds of queries without e_keys, from their notes."""
    notes = asked.notes + query * NOTES
    near_error = tl.load(notes) + SLACK_STEPS
    far_error = near_error
    if codes.has_far:
        residual = tl.load(notes + 2) + tl.load(notes + 3) + tl.load(notes + 4)
        residual += tl.load(notes + 5)
        far_error = root(residual) + tl.load(notes + 1) + SLACK_STEPS
    return CodeThreshold(tl.load(codes.numbers + SLOPE), near_error, far_error)


@triton.jit
def threshold_of(own, codes, kind) -> CodeThreshold:
    """Return the thresholds of ordered positions, of kind 0, or of the others, of kind 2."""
    errors = codes.numbers + ERRORS + kind
    near, far = own.near + tl.load(errors), own.far + tl.load(errors + 1)
    return CodeThreshold(own.slope, near, far)


@triton.jit
def circular_squares(words, others, NATIVE: tl.constexpr) -> tl.tensor:
    """Return sums of four squared differences of bytes, around a circle of 256, of int32 words.

    |a - b| of unsigned bytes, squared as signed ones, is the circular square for every pair.
    """
    if NATIVE:
        sums = tl.inline_asm_elementwise(
            "{ .reg .b32 t, z; mov.b32 z, 0; vabsdiff4.u32.u32.u32 t, $1, $2, z;"
            " dp4a.s32.s32 $0, t, t, 0; }",
            "=r,r,r",
            [words, tl.broadcast_to(others, words.shape)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        sums = tl.zeros(words.shape, dtype=tl.int32)
        for byte in tl.static_range(4):
            apart = (((words >> (8 * byte)) - (others >> (8 * byte))) << 24) >> 24
            sums += apart * apart
    return sums


@triton.jit
def box_sums(boxes, index, here, point) -> tl.tensor:
    """Return squared distances, in steps, between points [m or 1, 16] int32 and boxes [n or 1].

    Each slot is cut off where 16 squares still fit an int32.
    """
    at = boxes + index[:, None] * 32 + tl.arange(0, 16)[None, :]
    low = tl.load(at, mask=here[:, None], other=0).to(tl.int32)
    minus_high = tl.load(at + 16, mask=here[:, None], other=0).to(tl.int32)
    apart = tl.maximum(tl.maximum(low - point, point + minus_high), 0)
    apart = tl.minimum(apart, 2047)
    return tl.sum(apart * apart, axis=1)


@triton.jit
def within_thresholds(position, here, radius, threshold, codes, words) -> tl.tensor:
    """Tell which positions [n] have codes that a key within `radius` float64 may have.

    words: where the 16 words of the one query begin, or [n, 1] of a query each.
    """
    j = tl.arange(0, 4)
    keys = tl.load(codes.near + position[:, None] * 4 + j[None, :], mask=here[:, None], other=0)
    wanted = tl.load(words + j[None, :])
    sums = tl.sum(circular_squares(keys, wanted, codes.native), axis=1)
    keep = here & (sums <= largest_sum(radius, threshold.slope, threshold.near))
    if codes.has_far:
        some = any_of(keep)
        if some:
            if codes.norm_slot:  # what rows 0 .. 14 leave over is what the far rows look at
                rows_only = tl.where(j == 3, 0x00FFFFFF, -1)[None, :]
                sums = circular_squares(keys & rows_only, wanted & rows_only, codes.native)
                sums = tl.sum(sums, axis=1)
            for part in tl.static_range(3):
                at = codes.far + position[:, None] * 12 + (part * 4 + j)[None, :]
                keys = tl.load(at, mask=keep[:, None], other=0)
                wanted = tl.load(words + 4 + part * 4 + j[None, :])
                sums += tl.sum(circular_squares(keys, wanted, codes.native), axis=1)
            keep = keep & (sums <= largest_sum(radius, threshold.slope, threshold.far))
    return keep
