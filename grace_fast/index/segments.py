"""Sorted segments of quantized keys under two levels of bounding boxes, and the delta buffer.

A segment is made once and only its bounds move afterwards: the largest radius of a leaf of 64 keys
may grow and an isolated bit may be cleared while readers look, because either only makes them read
more. The delta buffer takes single keys at its end, where no reader of an earlier version looks.
`csrc/lookup.h` has the layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grace_fast.index.quantizer import FAR, NEAR, Quantized

Array = npt.NDArray[Any]

LEAF = 64  # keys of a leaf, and leaves of a level-2 node
BLOCK = 16  # keys of a block of codes
ORDER_ROWS = 4096  # below this the linear scan is as fast (lookup.md)
MOST_ROWS = 2**31 - LEAF  # positions and their rows are int32; later rows are read as they are
POINT_LIMIT = 16000  # box coordinates are int16, with room for a difference
# e_k of the delta's keys before they are known: half a step in every slot, and rounding.
DELTA_NEAR_ERROR, DELTA_FAR_ERROR = (NEAR**0.5) / 2 + 1e-2, ((NEAR + FAR) ** 0.5) / 2 + 1e-2


@dataclass(eq=False)
class Segment:
    """Quantized keys at `count` positions; see `Segment` in csrc/lookup.h."""

    count: int
    rows: Array  # [capacity] int32, the row at each position
    near: Array  # [capacity / 16, 4, 16, 4] uint8
    far: Array  # [capacity, 48] uint8, whole leaves
    leaf_max_radius: Array  # [leaves, padded] float32
    near_error: float
    far_error: float
    first: int = 0  # a sorted one holds the rows [first, last), each once
    last: int = 0
    places: Array | None = None  # [last - first] int32, the position of each row of a sorted one
    leaf_boxes: Array | None = None  # [leaves / 16, 8, 2, 16, 2] int16
    node_boxes: Array | None = None
    node_max_radius: Array | None = None  # [nodes, padded] float32
    isolated: Array | None = None  # [capacity / 8] uint8

    def raise_max_radius(self, position: int, radius: float) -> None:
        """Let the leaf of a position have at least `radius`; it may be isolated no longer."""
        leaf = position // LEAF
        if radius > self.leaf_max_radius[leaf]:
            self.leaf_max_radius[leaf] = radius
        if self.node_max_radius is not None and radius > self.node_max_radius[leaf // LEAF]:
            self.node_max_radius[leaf // LEAF] = radius
        self.clear_isolated(position)

    def clear_isolated(self, position: int) -> None:
        """Forget that the key at a position has its surroundings for itself."""
        if self.isolated is not None:
            self.isolated[position // 8] &= np.uint8(~(1 << position % 8) & 255)

    def fields(self) -> dict[str, Any]:
        """Return all fields as the extensions take them: an array by its address, 0 for none."""
        return {name: _address(field) for name, field in vars(self).items()}

    @property
    def nbytes(self) -> int:
        """The memory that the segment takes."""
        return sum(array.nbytes for array in vars(self).values() if isinstance(array, np.ndarray))


def _address(field: Any) -> Any:
    if isinstance(field, np.ndarray):
        return field.ctypes.data
    return 0 if field is None else field


def _padded(count: int, step: int) -> int:
    return -(-count // step) * step


def max_radius_of_each(radii: Array, min_radius: float) -> Array:
    """Return the largest radius of each 64, at least `min_radius`, padded for 16 at a time."""
    leaves = _padded(len(radii), LEAF) // LEAF
    largest = np.full(_padded(leaves, BLOCK) + BLOCK, min_radius, np.float32)
    here = np.maximum.reduceat(radii, np.arange(0, len(radii), LEAF))
    np.maximum(here, min_radius, out=largest[:leaves], casting="same_kind")
    return largest


def _gathered(codes: Array, order: Array) -> Array:
    """Return codes [n, width] in an order, zeros behind them up to whole leaves."""
    room = np.zeros((_padded(len(order), LEAF), codes.shape[1]), codes.dtype)
    # "clip" writes to where it is to go; "raise" has a copy of all made first.
    np.take(codes, order, axis=0, out=room[: len(order)], mode="clip")
    return room


def _packed(padded: Array) -> Array:
    """Return codes [n, 16] of whole leaves as blocks [n / 16, 4, 16, 4]."""
    blocks = padded.reshape(-1, BLOCK, NEAR // 4, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks)


def _boxes(low: Array, high: Array) -> Array:
    """Return boxes [n, 16] in groups of 16, [n / 16, 8 slot pairs, low and high, 16, 2]."""
    groups = _padded(len(low), BLOCK) // BLOCK
    packed = np.full((groups, 8, 2, BLOCK, 2), 2 * POINT_LIMIT, np.int16)
    for side, edge in enumerate((low, high)):
        padded = np.full((groups * BLOCK, NEAR), 2 * POINT_LIMIT, np.int16)
        padded[: len(edge)] = edge
        packed[:, :, side] = padded.reshape(groups, BLOCK, 8, 2).transpose(0, 2, 1, 3)
    return packed


def _edges(low: Array, high: Array) -> tuple[Array, Array]:
    """Return the boxes around each 64 of boxes [n, 16]."""
    firsts = np.arange(0, len(low), LEAF)
    return np.minimum.reduceat(low, firsts), np.maximum.reduceat(high, firsts)


@dataclass(eq=False)
class Encoded:
    """What a segment is made of, in order of rows."""

    points: Array  # [n, 16] int16
    near: Array  # [n, 16] uint8
    far: Array  # [n, 48] uint8
    near_error: float = 0.0
    far_error: float = 0.0
    rows: int = 0  # encoded so far

    @staticmethod
    def room(count: int) -> Encoded:
        """Return room for `count` keys."""
        points = np.empty((count, NEAR), np.int16)
        return Encoded(points, np.empty((count, NEAR), np.uint8), np.empty((count, FAR), np.uint8))

    def put(self, codes: Quantized) -> None:
        """Take the codes of the next keys in."""
        whole = codes.whole.numpy()
        rows = slice(self.rows, self.rows + len(whole))
        self.points[rows] = np.clip(whole[:, :NEAR], -POINT_LIMIT, POINT_LIMIT)
        self.near[rows] = whole[:, :NEAR].astype(np.uint8)
        self.far[rows] = whole[:, NEAR:].astype(np.uint8)
        self.near_error = max(self.near_error, float(codes.near_error.max()))
        self.far_error = max(self.far_error, float(codes.far_error.max()))
        self.rows = rows.stop


def sorted_segment(
    encoded: Encoded, first: int, radii: Array, min_radius: float, kd_order: Any
) -> Segment:
    """Return the segment of rows from `first` on, in kd order where there are enough of them.

    kd_order(points=, count=, order=) writes the order; radii: [n] float32.
    """
    count = len(encoded.points)
    order = np.arange(count, dtype=np.int32)
    ordered = count >= ORDER_ROWS
    if ordered:
        points = np.ascontiguousarray(encoded.points)
        kd_order(points=points.ctypes.data, count=count, order=order.ctypes.data)
    leaf_max_radius = max_radius_of_each(radii[order], min_radius)
    boxes: dict[str, Array] = {}
    if ordered:
        points = encoded.points[order]
        low, high = _edges(points, points)
        del points  # of a large segment, before there are more copies
        boxes["leaf_boxes"] = _boxes(low, high)
        boxes["node_boxes"] = _boxes(*_edges(low, high))
        boxes["node_max_radius"] = max_radius_of_each(
            leaf_max_radius[: _padded(count, LEAF) // LEAF], min_radius
        )
    places = np.empty(count, np.int32)
    places[order] = np.arange(count, dtype=np.int32)
    # Whole leaves: a code of the rest of the last one may survive until its position is looked at.
    return Segment(
        count=count,
        rows=order + np.int32(first),
        near=_packed(_gathered(encoded.near, order)),
        far=_gathered(encoded.far, order),
        leaf_max_radius=leaf_max_radius,
        near_error=encoded.near_error + 1e-9,
        far_error=encoded.far_error + 1e-9,
        first=first,
        last=first + count,
        places=places,
        isolated=np.zeros(_padded(count, LEAF) // 8, np.uint8),
        **boxes,
    )


def delta_buffer(capacity: int, min_radius: float) -> Segment:
    """Return an empty delta buffer with room for `capacity` keys."""
    capacity = _padded(capacity, LEAF)
    return Segment(
        count=0,
        rows=np.zeros(capacity, np.int32),
        near=np.zeros((capacity // BLOCK, NEAR // 4, BLOCK, 4), np.uint8),
        far=np.zeros((capacity, FAR), np.uint8),
        leaf_max_radius=max_radius_of_each(np.full(capacity, min_radius, np.float32), min_radius),
        near_error=DELTA_NEAR_ERROR,
        far_error=DELTA_FAR_ERROR,
    )


def append(
    segment: Segment, codes: Quantized, rows: Array, radii: Array, min_radius: float
) -> Segment | None:
    """Return the buffer with keys added, itself or a larger one; None if one cannot be bounded."""
    near_error, far_error = float(codes.near_error.max()), float(codes.far_error.max())
    if near_error > segment.near_error or far_error > segment.far_error:
        return None
    whole = codes.whole.numpy()
    near, far = whole[:, :NEAR].astype(np.uint8), whole[:, NEAR:].astype(np.uint8)
    return append_codes(segment, near, far, rows, radii, min_radius)


def append_codes(
    segment: Segment, near: Array, far: Array, rows: Array, radii: Array, min_radius: float
) -> Segment:
    """Return the buffer with codes [n, 16] and [n, 48] of rows added, itself or a larger one."""
    count = segment.count + len(rows)
    if count > len(segment.rows):
        larger = delta_buffer(2 * count, min_radius)
        for name in ("rows", "near", "far", "leaf_max_radius"):
            known = getattr(segment, name)
            getattr(larger, name)[: len(known)] = known
        larger.count, segment = segment.count, larger
    at = np.arange(segment.count, count)
    segment.rows[at], segment.far[at] = rows, far
    segment.near[at // BLOCK, :, at % BLOCK, :] = near.reshape(-1, NEAR // 4, 4)
    np.maximum.at(segment.leaf_max_radius, at // LEAF, radii.astype(np.float32))
    segment.count = count
    return segment


def unpacked(segment: Segment, positions: Array) -> tuple[Array, Array]:
    """Return the near and far codes at positions of a segment."""
    near = segment.near[positions // BLOCK, :, positions % BLOCK, :].reshape(len(positions), NEAR)
    return near, segment.far[positions]
