"""How far codes may be apart: the limits and the sums that every scan of them compares.

A key within a radius of a query has codes whose squared differences, around a circle of 256, sum to
`cut_of` the radius at most. That is so of the near slots, and of all that look at rows.
"""

import triton
import triton.language as tl
from grace_fast.kernels.exact import any_of

NOTES = tl.constexpr(8)  # float64 of a query: near error, far rounding, residuals of 4 x 16 slots
SLACK_STEPS = tl.constexpr(1e-3)  # what underflow may take from a projection

# Where `numbers` holds what.
PER_STEP, SLOPE, LIPSCHITZ, ROW_NORM, ETA, FLOOR = (tl.constexpr(i) for i in range(6))
ERRORS = tl.constexpr(6)  # e_k: near and far of ordered positions, then near and far of the others


@triton.jit
def root(square) -> tl.tensor:
    """Return no less than a square root, as float64, by the approximate one of float32."""
    return tl.sqrt(square.to(tl.float32)).to(tl.float64) * (1.0 + 1e-6)


@triton.jit
def cut_of(radius, slope, offset) -> tl.tensor:
    """Return the largest sum of squared code differences of a key within a radius, as int32."""
    steps = radius * slope + offset
    return tl.minimum(steps * steps * (1.0 + 1e-6) + 1.0, 2147483647.0).to(tl.int32)


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
    high = tl.load(at + 16, mask=here[:, None], other=0).to(tl.int32)
    apart = tl.maximum(tl.maximum(low - point, point - high), 0)
    apart = tl.minimum(apart, 2047)
    return tl.sum(apart * apart, axis=1)


@triton.jit
def query_errors(notes, HAS_FAR: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return what the near and the far slots of queries may be off, in steps, from their notes."""
    near_error = tl.load(notes) + SLACK_STEPS
    far_error = near_error
    if HAS_FAR:
        residual = tl.load(notes + 2) + tl.load(notes + 3) + tl.load(notes + 4)
        residual += tl.load(notes + 5)
        far_error = root(residual) + tl.load(notes + 1) + SLACK_STEPS
    return near_error, far_error


@triton.jit
def within_cuts(
    position,
    here,
    radius,  # float64
    slope,
    near_offset,
    far_offset,
    code,  # of one query, or [n, 1] of a query each
    near,
    far,
    NORM_SLOT: tl.constexpr,
    HAS_FAR: tl.constexpr,
    NATIVE: tl.constexpr,
) -> tl.tensor:
    """Tell which positions [n] have codes within the cuts of their radius."""
    j = tl.arange(0, 4)
    words = tl.load(near + position[:, None] * 4 + j[None, :], mask=here[:, None], other=0)
    wanted = tl.load(code + j[None, :])
    sums = tl.sum(circular_squares(words, wanted, NATIVE), axis=1)
    keep = here & (sums <= cut_of(radius, slope, near_offset))
    if HAS_FAR:
        some = any_of(keep)
        if some:
            if NORM_SLOT:  # what rows 0 .. 14 leave over is what the far rows look at
                rows_only = tl.where(j == 3, 0x00FFFFFF, -1)[None, :]
                sums = circular_squares(words & rows_only, wanted & rows_only, NATIVE)
                sums = tl.sum(sums, axis=1)
            for part in tl.static_range(3):
                at = far + position[:, None] * 12 + (part * 4 + j)[None, :]
                words = tl.load(at, mask=keep[:, None], other=0)
                wanted = tl.load(code + 4 + part * 4 + j[None, :])
                sums += tl.sum(circular_squares(words, wanted, NATIVE), axis=1)
            keep = keep & (sums <= cut_of(radius, slope, far_offset))
    return keep
