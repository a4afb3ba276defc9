"""The index as the Triton kernels read it: the projection, and one space of `positions`.

Every earlier version may still be looked up: a `leaf_max_radius` only grows, isolated bits are only
cleared, and the delta buffer grows where those versions have no rows.

`grace_fast/index/quantizer.py` has the proof and `csrc/lookup.h` the contract of the codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from grace_fast.kernels import positions as layout
from grace_fast.kernels.positions import LEAF, Positions, by_order, place, put, whole
from torch import Tensor

NEAR, NODE, SLOTS = layout.NEAR, layout.NODE, 64
FOLDED = 32  # slots that are multiplied, the least that int8 tensor cores take
PLACED = ("near", "far", "row", "leaf_boxes", "node_boxes")  # what every engine reads
PADDING = 192  # positions past the last one: a tile may begin with the last leaf
NEVER = tl.constexpr(1 << 30 | 1 << 20)  # half a norm so large that no threshold reaches it


class Codes(NamedTuple):
    """An index on a device: an argument of the kernels."""

    centre: Tensor  # [Dp] float32
    rows: Tensor  # [64, Dp] bfloat16, of the projection, in order
    turn: Tensor  # [16, 16] float64
    numbers: Tensor  # [10] float64: see `code_thresholds`
    counts: Tensor  # [3] int64: rows with a position, level-2 nodes, positions after them
    near: Tensor  # [positions, 4] int32, four code bytes each
    far: Tensor  # [positions, 12] int32
    row: Tensor  # [positions] int32
    folded: Tensor  # [positions + 192, 32] int8, what `code_tiles` multiplies
    half_norm: Tensor  # [positions + 192] int32, half the squares of their norms
    leaf_max_radius: Tensor  # [leaves] float32
    node_max_radius: Tensor  # [nodes] float32
    leaf_boxes: Tensor  # [leaves in order, 2, 16] int16, low and -high
    node_boxes: Tensor  # [nodes, 2, 16] int16
    isolated: Tensor  # [positions / 8] uint8; bits of ordered positions only
    norm_slot: tl.constexpr  # bool: slot 15 is what rows 0 .. 14 leave over
    has_far: tl.constexpr  # bool
    native: tl.constexpr  # bool: the device is NVIDIA's

    @property
    def nbytes(self) -> int:
        """The memory that it takes on the device."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return what lies on the device, by name."""
        fields = self._asdict()
        return {name: field for name, field in fields.items() if isinstance(field, Tensor)}


def device_codes(
    projection: Any,
    segments: list[Any],
    covered: int,
    min_radius: float,
    device: torch.device | str,
    room: int = 0,
    placed: Positions | None = None,
) -> Codes:
    """Return a host index as tensors on a device.

    projection: quantizer.Projection; segments: of `index.segments`, every sorted one, then the
    delta buffer; covered: rows below have a position; min_radius: every leaf_max_radius is at least
    this; room: positions to keep for the delta buffer to grow; placed: the segments there, if they
    are.
    """
    if placed is None:
        placed = place(segments, device, room)
    ordered, linear = by_order(segments)
    nodes, positions = len(placed.node_boxes) - 1, len(placed.row)
    # Steps for a unit, a power of two, and steps for a unit of radius.
    numbers = [1 / projection.step, projection.lipschitz * (1 + 1e-6) / projection.step]
    numbers += [projection.lipschitz, projection.row_norm, projection.eta, min_radius]
    numbers += [*_errors(ordered), *_errors(linear)]
    padded = projection.padded_centre
    rows = torch.zeros(SLOTS, len(padded), dtype=torch.bfloat16, device="cpu")
    rows[:, : projection.rows.shape[1]] = projection.rows
    fields = {
        "centre": padded,
        "rows": rows,
        "turn": projection.turn.contiguous(),
        "numbers": torch.tensor(numbers, dtype=torch.float64, device="cpu"),
        "counts": torch.tensor([0, nodes, 0], dtype=torch.int64, device="cpu"),
        "leaf_max_radius": torch.zeros(positions // LEAF, dtype=torch.float32, device="cpu"),
        "node_max_radius": torch.zeros(nodes + 1, dtype=torch.float32, device="cpu"),
        "isolated": torch.zeros(max(1, positions // 8), dtype=torch.uint8, device="cpu"),
    }
    folded = torch.zeros(positions + PADDING, FOLDED, dtype=torch.int8, device=device)
    half_norm = torch.full((len(folded),), NEVER.value, dtype=torch.int32, device=device)
    codes = Codes(
        **{name: field.to(device) for name, field in fields.items()},
        **{name: getattr(placed, name) for name in PLACED},
        folded=folded,
        half_norm=half_norm,
        norm_slot=tl.constexpr(projection.norm_slot),
        has_far=tl.constexpr(projection.far),
        native=tl.constexpr(folded.is_cuda and torch.version.hip is None),
    )
    _fold_positions(codes, 0, positions)
    assert refresh(codes, segments, covered)
    return codes


def refresh(codes: Codes, segments: list[Any], covered: int) -> bool:
    """Bring what changes about the same segments to the device: radii, isolated bits, new keys.

    False where the delta buffer has no room.
    """
    ordered, linear = by_order(segments)
    at = 0
    for segment in ordered:
        leaves, nodes = whole(segment.count, LEAF) // LEAF, whole(segment.count, NODE) // NODE
        codes.leaf_max_radius[at // LEAF :][:leaves] = torch.from_numpy(
            segment.leaf_max_radius[:leaves]
        )
        codes.node_max_radius[at // NODE :][:nodes] = torch.from_numpy(
            segment.node_max_radius[:nodes]
        )
        at += nodes * NODE
    # Of several ordered segments an isolated key of one says nothing about the others.
    if len(ordered) == 1 and ordered[0].isolated is not None:
        bits = ordered[0].isolated
        codes.isolated[: len(bits)] = torch.from_numpy(bits)
    first = at
    for segment in linear:
        leaves = whole(segment.count, LEAF) // LEAF
        if at + leaves * LEAF > len(codes.row):
            return False
        codes.leaf_max_radius[at // LEAF :][:leaves] = torch.from_numpy(
            segment.leaf_max_radius[:leaves]
        )
        at += leaves * LEAF
    if linear:
        before = at - whole(linear[-1].count, LEAF)
        put(codes, linear[-1], before)
        _fold_positions(codes, before, at)
    codes.counts[2] = at - first
    codes.counts[0] = covered
    return True


def fold(codes: Tensor) -> Tensor:
    """Return f of code bytes, uint8, as int8 in [-64, 64]; 0 stays 0. See `code_tiles`."""
    turned = (codes.to(torch.int16) + 64) & 255
    return ((turned - 128).abs() - 64).to(torch.int8)


def _fold_positions(codes: Codes, first: int, last: int) -> None:
    """Write what is multiplied of positions from `first` up to `last`."""
    for at in range(first, last, 1 << 18):
        here = slice(at, min(at + (1 << 18), last))
        row = codes.row[here]
        slots = torch.zeros(len(row), FOLDED, dtype=torch.uint8, device=row.device)
        slots[:, :NEAR] = codes.near[here].view(torch.uint8)
        if codes.has_far:
            if codes.norm_slot:  # what rows 0 .. 14 leave over is what the far rows look at
                slots[:, NEAR - 1] = 0
            slots[:, NEAR:] = codes.far[here].view(torch.uint8)[:, : FOLDED - NEAR]
        folded = fold(slots)
        half = folded.to(torch.int16).square().sum(dim=1, dtype=torch.int32) >> 1
        codes.folded[here] = folded
        codes.half_norm[here] = half.masked_fill(row < 0, NEVER.value)


def _errors(segments: list[Any]) -> tuple[float, float]:
    near = max((segment.near_error for segment in segments), default=0.0)
    return near, max((segment.far_error for segment in segments), default=0.0)
