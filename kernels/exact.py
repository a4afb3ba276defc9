"""What the exact look-ups share: float32 sums that only find candidates, and the law's verdict.

    |float32 sum - S| <= slack * S + tiny      for the canonical S, whatever the order of the sum
    above(S)          the float32 above which a float32 sum belongs to a larger S

A key whose float32 sum is larger than `above(S of another key)` has a larger canonical S and cannot
win. The others are summed again in the canonical order (`nearest.canonical_sums`) wherever that
could change the answer.

A query is a row [D], a slot is where a key is. A verdict is hit, the row that hit (or -1) and its S
(or infinity). Ties: the lowest row. Masks: what is not `here` counts as infinitely far. Every
kernel that holds a canonical sum is launched with `nearest.OPTIONS`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from grace_fast.kernels.nearest import CHUNK_BYTES, canonical_sums, lowest
from torch import Tensor

NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # packed: no key; as a distance it is a NaN
_UNIT = tl.constexpr(2.0**-24)
_TINY = tl.constexpr(2.0**-118)
_CHUNK_BYTES = tl.constexpr(CHUNK_BYTES)


class Keys(NamedTuple):
    """The keys, all on one device and contiguous: an argument of the kernels.

    Arrays by row may be longer than N: what is in use is said by `rows`, in device memory, so that
    a captured graph stays right while the codebook grows.
    """

    slots: Tensor  # [slots, D] fp32, bf16 or fp16
    width: int  # D
    live: Tensor  # [capacity] bool, False for a removed row
    radius: Tensor  # [capacity] float32, negative for a dead key
    rows: Tensor  # [1] int64, N
    widest: Tensor  # [1] float32, at least every radius
    key_slot: Tensor | None = None  # [capacity] int64; None where row i is slot i

    @property
    def capacity(self) -> int:
        """The rows that there is room for."""
        return len(self.live)


class Found(NamedTuple):
    """The verdict on queries [B]: an argument of the kernels, and what a look-up returns."""

    hit: Tensor  # [B] bool
    row: Tensor  # [B] int64, -1 for a miss
    squared: Tensor  # [B] float64, inf for a miss

    @staticmethod
    def room(queries: Tensor) -> Found:
        """Return room for the verdict on queries [B, D]."""
        types = (torch.bool, torch.int64, torch.float64)
        return Found(*(queries.new_empty(len(queries), dtype=dtype) for dtype in types))


@triton.jit
def slack_of(width) -> tl.tensor:
    """Return the relative error of a float32 sum: its longest chain of additions, and to spare.

    No lane adds more than D / 8 + 32 numbers in a row, reduction included (tile shapes in `dense`).
    """
    return (width * 0.125 + 48.0) * _UNIT


@triton.jit
def above(squared, width) -> tl.tensor:
    """Return the float32 above which a float32 sum belongs to a larger S than `squared`, a float.

    Near the end of float32 its sums overflow, so that nothing is above.
    """
    bound = squared.to(tl.float64) * (1.0 + 3.0 * slack_of(width)) + width * _TINY
    narrow = (bound * (1.0 + 4.0 * _UNIT)).to(tl.float32)
    return tl.where(bound < 1e37, narrow, float("inf"))


@triton.jit
def above_every_ball(keys) -> tl.tensor:
    """Return the float32 above which no key holds its query; -1 where every key is dead."""
    radius = tl.load(keys.widest).to(tl.float64)
    return tl.where(radius >= 0, above(radius * radius, keys.width), -1.0)


@triton.jit
def bits_of(number) -> tl.tensor:
    """Return the bits of a float32 >= 0 as an int64: they are in the order of the numbers."""
    return number.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def packed(squared, row, here) -> tl.tensor:
    """Return (squared, row) as one int64 in lexicographic order; NONE where `here` is not set.

    A sum that is not a number counts as infinity.
    """
    number = tl.where(squared < float("inf"), squared, float("inf"))
    return tl.where(here, (bits_of(number) << 32) | row, NONE)


@triton.jit
def distance_of(pack) -> tl.tensor:
    """Return the float32 sum of a packed pair; NaN for NONE."""
    return (pack >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def any_of(mask) -> tl.tensor:
    """Tell whether any element of a mask is set."""
    return tl.max(mask.to(tl.int32), axis=0) > 0


@triton.jit
def is_live(keys, row, here) -> tl.tensor:
    """Tell which rows were not removed, where `here` is set."""
    return tl.load(keys.live + row, mask=here, other=0) != 0


@triton.jit
def slots_of(keys, row, here) -> tl.tensor:
    """Return the slots of rows, 0 where `here` is not set."""
    if keys.key_slot is None:
        slot = tl.where(here, row, 0)
    else:
        slot = tl.load(keys.key_slot + row, mask=here, other=0)
    return slot


@triton.jit
def is_finite(query, width, CHUNK: tl.constexpr) -> tl.tensor:
    """Tell whether a query [D] holds neither NaN nor infinity."""
    wrong = tl.zeros((CHUNK,), dtype=tl.int32)
    for first in range(0, width, CHUNK):
        j = first + tl.arange(0, CHUNK)
        q = tl.load(query + j, mask=j < width, other=0).to(tl.float32)
        wrong = tl.where(tl.abs(q) < float("inf"), wrong, 1)
    return tl.max(wrong, axis=0) == 0


@triton.jit
def float_sums(query, keys, slot, here, ROWS: tl.constexpr, CHUNK: tl.constexpr) -> tl.tensor:
    """Return float32 sums [ROWS] of one query [D] and the keys in slots, where `here` is set."""
    width = keys.width
    total = tl.zeros((ROWS, CHUNK), dtype=tl.float32)
    for first in tl.range(0, width, CHUNK, num_stages=3):
        j = first + tl.arange(0, CHUNK)
        q = tl.load(query + j, mask=j < width, other=0).to(tl.float32)
        k = tl.load(
            keys.slots + slot[:, None] * width + j[None, :],
            mask=here[:, None] & (j < width)[None, :],
            other=0,
        )
        difference = q[None, :] - k.to(tl.float32)
        total += difference * difference
    return tl.sum(total, axis=1)


@triton.jit
def nearer_of(best, best_row, squared, row) -> tuple[tl.tensor, tl.tensor]:
    """Return the lesser of two pairs (S, row), in lexicographic order; no row is -1, at inf."""
    takes = (squared < best) | ((squared == best) & (row < best_row) & (best_row >= 0))
    return tl.where(takes, squared, best), tl.where(takes, row, best_row)


@triton.jit
def nearest_of_rows(
    query, keys, row, slot, here, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the least canonical S of rows [ROWS] where `here`, and the lowest row that has it."""
    CHUNK: tl.constexpr = _CHUNK_BYTES * 8 // keys.slots.dtype.element_ty.primitive_bitwidth
    squared = canonical_sums(query, keys.slots, slot, here, keys.width, BLOCK_N=ROWS, CHUNK=CHUNK)
    may_win = here & (squared < float("inf"))
    best, best_row = lowest(tl.where(may_win, squared, float("inf")), row.to(tl.int64))
    return best, tl.where(best < float("inf"), best_row, -1)


@triton.jit
def radius_of(keys, row) -> tl.tensor:
    """Return a row's radius as a float64; -1 for row -1."""
    radius = tl.load(keys.radius + tl.maximum(row, 0), mask=row >= 0, other=-1.0)
    return radius.to(tl.float64)


@triton.jit
def in_ball(squared, radius) -> tl.tensor:
    """Tell whether S is within a radius, both float64: inclusive, never within a negative one."""
    return (radius >= 0) & (squared <= radius * radius)


@triton.jit
def sure_of(squared, radius, width, SUMS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Tell whether a float32 sum decides on its own about a key with nobody beside it, and how.

    With SUMS a hit is never sure, so that its canonical S is found.
    """
    wide, square = squared.to(tl.float64), radius * radius
    inside = (radius >= 0) & (wide * (1.0 + 2.0 * slack_of(width)) + width * _TINY <= square)
    outside = (radius < 0) | (squared > above(square, width))
    return (inside & (not SUMS)) | outside, inside


@triton.jit
def write_verdict(found, query, is_hit, row, squared) -> None:
    """Write what is known of a query."""
    tl.store(found.hit + query, is_hit)
    tl.store(found.row + query, tl.where(is_hit, row, -1))
    tl.store(found.squared + query, tl.where(is_hit, squared, float("inf")))
