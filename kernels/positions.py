"""The codes of an index on a device: one space of positions, which every engine reads.

    [ whole level-2 nodes, 64 leaves of 64 keys | segments without boxes | delta buffer | room ]

The ordered positions come first, under two levels of bounding boxes; what has no boxes follows. A
position that nothing uses has row -1. What is placed of sorted segments does not change. The delta
buffer's positions are filled by who looks keys up by them, as it grows.

`csrc/lookup.h` has the contract of the codes, `csrc/cuda/layout.h` and `code_layout` say who reads
them how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

NEAR, FAR = 16, 48
LEAF = 64  # keys of a leaf, and leaves of a level-2 node
NODE = LEAF * LEAF  # keys of a level-2 node
_AWAY = 32000  # a corner of a box that is far from every query


class Positions(NamedTuple):
    """The codes of some segments on a device."""

    first: dict[Any, int]  # of each segment, its first position
    near: Tensor  # [positions, 4] int32, four code bytes each
    far: Tensor  # [positions, 12] int32
    row: Tensor  # [positions] int32
    leaf_boxes: Tensor  # [leaves in order + 1, 2, 16] int16, low and -high
    node_boxes: Tensor  # [nodes + 1, 2, 16] int16

    @property
    def room(self) -> int:
        """The positions that the delta buffer may fill: those after all others."""
        return len(self.row) - max(self.first.values())

    def codes_of(self, segment: Any) -> dict[str, Tensor]:
        """Return what lies here of a segment, by name: views."""
        first, count = self.first[segment], segment.count
        here = slice(first, first + count)
        views = {"near": self.near[here], "far": self.far[here], "rows": self.row[here]}
        if segment.leaf_boxes is not None:
            leaves = whole(count, LEAF) // LEAF
            views["leaf_boxes"] = self.leaf_boxes[first // LEAF :][:leaves]
            views["node_boxes"] = self.node_boxes[first // NODE :][: whole(leaves, LEAF) // LEAF]
        return views


def place(
    segments: Sequence[Any],
    device: torch.device | str,
    room: int = 0,
    known: Positions | None = None,
) -> Positions:
    """Return segments of `index.segments` on a device: sorted ones, then the delta buffer.

    room: positions to keep for the delta buffer; known: from where sorted segments are copied that
    lie there already.
    """
    ordered, linear = by_order(segments)
    sizes = [whole(segment.count, NODE) for segment in ordered]
    nodes = sum(sizes) // NODE
    sizes += [whole(segment.count, LEAF) for segment in linear]
    if linear:
        sizes[-1] = max(sizes[-1], room)
    positions = sum(sizes)
    made = Positions(
        first={},
        near=torch.zeros(positions, NEAR // 4, dtype=torch.int32, device=device),
        far=torch.zeros(positions, FAR // 4, dtype=torch.int32, device=device),
        row=torch.full((positions,), -1, dtype=torch.int32, device=device),
        leaf_boxes=_no_boxes(nodes * LEAF + 1, device),
        node_boxes=_no_boxes(nodes + 1, device),
    )
    at = 0
    for segment, size in zip([*ordered, *linear], sizes, strict=True):
        made.first[segment] = at
        stays = known is not None and segment in known.first and segment is not segments[-1]
        codes = known.codes_of(segment) if known is not None and stays else codes_on_host(segment)
        for name, view in made.codes_of(segment).items():
            view.copy_(codes[name])
        at += size
    return made


def put(positions: Any, segment: Any, first: int) -> None:
    """Write the codes of a segment from a position on; `positions` has them by their names."""
    here = slice(first, first + segment.count)
    codes = codes_on_host(segment)
    positions.near[here], positions.far[here] = codes["near"], codes["far"]
    positions.row[here] = codes["rows"]


def by_order(segments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the segments under bounding boxes, and the others."""
    ordered = [segment for segment in segments if segment.leaf_boxes is not None]
    return ordered, [segment for segment in segments if segment.leaf_boxes is None]


def whole(count: int, step: int) -> int:
    """Return a count rounded up to a multiple of a step."""
    return -(-count // step) * step


def codes_on_host(segment: Any) -> dict[str, Tensor]:
    """Return the codes of a segment in this layout, by name."""
    count = segment.count
    leaves = whole(count, LEAF)
    blocks = torch.from_numpy(segment.near[: leaves // NEAR])  # [blocks, 4, 16 keys, 4]
    near = blocks.transpose(1, 2).reshape(-1, NEAR)[:count]
    rows = {
        "near": near.view(torch.int32),
        "far": torch.from_numpy(segment.far[:count]).view(torch.int32),
        "rows": torch.from_numpy(segment.rows[:count]),
    }
    if segment.leaf_boxes is not None:
        rows["leaf_boxes"] = _box_rows(segment.leaf_boxes, leaves // LEAF)
        nodes = whole(leaves // LEAF, LEAF) // LEAF
        rows["node_boxes"] = _box_rows(segment.node_boxes, nodes)
    return rows


def _no_boxes(count: int, device: torch.device | str) -> Tensor:
    """Return boxes that no query is near."""
    boxes = torch.full((count, 2, NEAR), _AWAY, dtype=torch.int16, device=device)
    boxes[:, 1] = -_AWAY
    return boxes


def _box_rows(boxes: Any, count: int) -> Tensor:
    """Return `count` boxes [count, 2, 16] of groups of 16, low and -high."""
    groups = torch.from_numpy(boxes)  # [groups, 8 slot pairs, 2, 16 boxes, 2]
    rows = groups.permute(0, 3, 2, 1, 4).reshape(-1, 2, NEAR)[:count].clone()
    rows[:, 1].neg_()
    return rows
