"""Where the codes of keys are kept: runs in kd order under two levels of boxes, and a tail.

A run is made once and only its bounds move afterwards: a reach (the largest radius of a leaf of 64)
may grow and an isolated bit may be cleared while readers look, because either only makes them read
more. The tail takes single keys at its end, where no reader of an earlier version looks.
`csrc/lookup.h` has the layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grace_fast.index.quantizer import FAR, NEAR, Codes

Array = npt.NDArray[Any]

LEAF = 64  # keys of a leaf, and leaves of a super leaf
BLOCK = 16  # keys of a block of codes
ORDER_ROWS = 4096  # below this the linear scan is as fast (lookup.md)
MOST_ROWS = 2**31 - LEAF  # positions and their rows are int32; later rows are read as they are
POINT_LIMIT = 16000  # box coordinates are int16, with room for a difference
# e_k of a tail's keys before they are known: half a step in every slot, and rounding.
TAIL_NEAR_ERROR, TAIL_FAR_ERROR = (NEAR**0.5) / 2 + 1e-2, ((NEAR + FAR) ** 0.5) / 2 + 1e-2


@dataclass(eq=False)
class Part:
    """Codes of `count` positions; see `Part` in csrc/lookup.h."""

    count: int
    rows: Array  # [capacity] int32, the row at each position
    near: Array  # [capacity / 16, 4, 16, 4] uint8
    far: Array  # [capacity, 48] uint8, whole leaves
    reach: Array  # [leaves, padded] float32
    near_error: float
    far_error: float
    first: int = 0  # a run holds the rows [first, last), each once
    last: int = 0
    places: Array | None = None  # [last - first] int32, the position of each row of a run
    leaf_boxes: Array | None = None  # [leaves / 16, 8, 2, 16, 2] int16
    super_boxes: Array | None = None
    super_reach: Array | None = None  # [supers, padded] float32
    isolated: Array | None = None  # [capacity / 8] uint8

    def raise_reach(self, position: int, radius: float) -> None:
        """Let the leaf of a position reach at least `radius`; it may be isolated no longer."""
        leaf = position // LEAF
        if radius > self.reach[leaf]:
            self.reach[leaf] = radius
        if self.super_reach is not None and radius > self.super_reach[leaf // LEAF]:
            self.super_reach[leaf // LEAF] = radius
        self.clear_isolated(position)

    def clear_isolated(self, position: int) -> None:
        """Forget that the key at a position has its surroundings for itself."""
        if self.isolated is not None:
            self.isolated[position // 8] &= np.uint8(~(1 << position % 8) & 255)

    @property
    def nbytes(self) -> int:
        """The memory that the part takes."""
        return sum(array.nbytes for array in vars(self).values() if isinstance(array, np.ndarray))


def _padded(count: int, step: int) -> int:
    return -(-count // step) * step


def reach_of(radii: Array, floor: float) -> Array:
    """Return the largest radius of each 64, at least `floor`, padded for 16 at a time."""
    leaves = _padded(len(radii), LEAF) // LEAF
    padded = np.full(leaves * LEAF, floor, np.float32)
    np.maximum(radii, floor, out=padded[: len(radii)], casting="same_kind")
    reach = np.full(_padded(leaves, BLOCK) + BLOCK, floor, np.float32)
    reach[:leaves] = padded.reshape(leaves, LEAF).max(axis=1)
    return reach


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
    return _each_64(np.min, low), _each_64(np.max, high)


def _each_64(extreme: Any, edges: Array) -> Array:
    whole = len(edges) // LEAF * LEAF
    found = extreme(edges[:whole].reshape(-1, LEAF, NEAR), axis=1)
    if whole == len(edges):
        return found  # type: ignore[no-any-return]
    return np.concatenate([found, extreme(edges[whole:], axis=0)[None]])


@dataclass(eq=False)
class Encoded:
    """What a run is made of, in order of rows."""

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

    def put(self, codes: Codes) -> None:
        """Take the codes of the next keys in."""
        whole = codes.whole.numpy()
        rows = slice(self.rows, self.rows + len(whole))
        self.points[rows] = np.clip(whole[:, :NEAR], -POINT_LIMIT, POINT_LIMIT)
        self.near[rows] = whole[:, :NEAR].astype(np.uint8)
        self.far[rows] = whole[:, NEAR:].astype(np.uint8)
        self.near_error = max(self.near_error, float(codes.near_error.max()))
        self.far_error = max(self.far_error, float(codes.far_error.max()))
        self.rows = rows.stop


def run(encoded: Encoded, first: int, radii: Array, floor: float, kd_order: Any) -> Part:
    """Return the run of rows from `first` on, in kd order where there are enough of them.

    kd_order(points=, count=, order=) writes the order; radii: [n] float32.
    """
    count = len(encoded.points)
    order = np.arange(count, dtype=np.int32)
    ordered = count >= ORDER_ROWS
    if ordered:
        points = np.ascontiguousarray(encoded.points)
        kd_order(points=points.ctypes.data, count=count, order=order.ctypes.data)
    reach = reach_of(radii[order], floor)
    boxes: dict[str, Array] = {}
    if ordered:
        points = encoded.points[order]
        low, high = _edges(points, points)
        del points  # of a large run, before there are more copies
        boxes["leaf_boxes"] = _boxes(low, high)
        boxes["super_boxes"] = _boxes(*_edges(low, high))
        boxes["super_reach"] = reach_of(reach[: _padded(count, LEAF) // LEAF], floor)
    places = np.empty(count, np.int32)
    places[order] = np.arange(count, dtype=np.int32)
    # Whole leaves: a code of the rest of the last one may survive until its position is looked at.
    return Part(
        count=count,
        rows=order + np.int32(first),
        near=_packed(_gathered(encoded.near, order)),
        far=_gathered(encoded.far, order),
        reach=reach,
        near_error=encoded.near_error + 1e-9,
        far_error=encoded.far_error + 1e-9,
        first=first,
        last=first + count,
        places=places,
        isolated=np.zeros(_padded(count, LEAF) // 8, np.uint8),
        **boxes,
    )


def tail(capacity: int, floor: float) -> Part:
    """Return an empty tail with room for `capacity` keys."""
    capacity = _padded(capacity, LEAF)
    return Part(
        count=0,
        rows=np.zeros(capacity, np.int32),
        near=np.zeros((capacity // BLOCK, NEAR // 4, BLOCK, 4), np.uint8),
        far=np.zeros((capacity, FAR), np.uint8),
        reach=reach_of(np.full(capacity, floor, np.float32), floor),
        near_error=TAIL_NEAR_ERROR,
        far_error=TAIL_FAR_ERROR,
    )


def append(part: Part, codes: Codes, rows: Array, radii: Array, floor: float) -> Part | None:
    """Return the tail with keys added, itself or a larger one; None if a key cannot be bounded."""
    if float(codes.near_error.max()) > part.near_error or (
        float(codes.far_error.max()) > part.far_error
    ):
        return None
    whole = codes.whole.numpy()
    near, far = whole[:, :NEAR].astype(np.uint8), whole[:, NEAR:].astype(np.uint8)
    return append_codes(part, near, far, rows, radii, floor)


def append_codes(
    part: Part, near: Array, far: Array, rows: Array, radii: Array, floor: float
) -> Part:
    """Return the tail with codes [n, 16] and [n, 48] of rows added, itself or a larger one."""
    count = part.count + len(rows)
    if count > len(part.rows):
        larger = tail(2 * count, floor)
        used = part.count
        larger.rows[:used], larger.far[:used] = part.rows[:used], part.far[:used]
        larger.near[: len(part.near)] = part.near
        larger.reach[: len(part.reach)] = np.maximum(part.reach, floor)
        larger.count, part = used, larger
    at = np.arange(part.count, count)
    part.rows[at], part.far[at] = rows, far
    part.near[at // BLOCK, :, at % BLOCK, :] = near.reshape(-1, NEAR // 4, 4)
    np.maximum.at(part.reach, at // LEAF, radii.astype(np.float32))
    part.count = count
    return part


def unpacked(part: Part, positions: Array) -> tuple[Array, Array]:
    """Return the near and far codes at positions of a part."""
    near = part.near[positions // BLOCK, :, positions % BLOCK, :].reshape(len(positions), NEAR)
    return near, part.far[positions]
