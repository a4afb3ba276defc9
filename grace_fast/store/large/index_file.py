"""An index as named tensors, and back: the projection, every segment, the delta buffer.

What an index says is believed, so all of it is checksummed. What can be made again from rows
and radii (places, reaches) is, and every covered row must have a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_fast.codebook.snapshot import Snapshot
from grace_fast.errors import CodebookCorrupt
from grace_fast.index import quantizer, segments
from grace_fast.index.native_view import IndexState
from grace_fast.index.quantizer import FAR, NEAR, SLOTS
from grace_fast.index.segments import BLOCK, LEAF, Array, Segment

_NOT_IN_NUMPY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_ARRAYS = ("rows", "near", "far", "isolated", "leaf_boxes", "node_boxes")


def pack_map(phi: quantizer.Projection) -> dict[str, Tensor]:
    """Return a map as tensors."""
    numbers = (phi.step, phi.norm_slot, phi.eta, phi.lipschitz, phi.row_norm)
    return {
        "map.centre": phi.centre,
        "map.rows": phi.rows,
        "map.turn": phi.turn,
        "map.numbers": torch.tensor(numbers, dtype=torch.float64, device="cpu"),
    }


def pack_state(state: IndexState, rows: int) -> dict[str, Tensor]:
    """Return what is known of the first `rows` keys as tensors."""
    known = (state.fitted_rows, state.min_radius, min(state.covered, rows), state.predicted_bytes)
    tensors = pack_map(state.projection) | {
        "state": torch.tensor(known, dtype=torch.float64, device="cpu")
    }
    for number, part in enumerate(state.segments):
        for name in _ARRAYS:
            array = getattr(part, name)
            if array is not None:
                # Look-ups clear isolated bits in place; the others stay as they are.
                array = array.copy() if name == "isolated" else array
                on_disk = "super_boxes" if name == "node_boxes" else name
                tensors[f"run{number}.{on_disk}"] = torch.from_numpy(array)
        errors = (part.near_error, part.far_error)
        tensors[f"run{number}.errors"] = torch.tensor(errors, dtype=torch.float64, device="cpu")
    # Later rows than these may be given to other keys once the codebook was opened again.
    stays = np.flatnonzero(state.delta.rows[: state.delta.count] < rows)
    near, far = segments.unpacked(state.delta, stays)
    for name, array in (("rows", state.delta.rows[stays]), ("near", near), ("far", far)):
        tensors[f"tail.{name}"] = torch.from_numpy(array)
    return tensors


def unpack_state(tensors: Mapping[str, Tensor], snapshot: Snapshot) -> IndexState:
    """Return the state of `pack_state`, for the version that it was saved with.

    Raises: CodebookCorrupt naming the tensor that does not fit.
    """
    fitted_rows, floor, covered, predicted_bytes = _numbers(tensors, "state", 4)
    if not (0 <= covered <= snapshot.rows and floor >= 0):
        raise CodebookCorrupt(f"state says that {covered:g} of {snapshot.rows} rows have codes")
    state = IndexState(unpack_map(tensors, snapshot.key_dim), int(fitted_rows), floor)
    state.covered, state.oldest = int(covered), snapshot.version
    state.predicted_bytes = predicted_bytes
    radii = snapshot.radii.numpy()
    first = 0
    while f"run{len(state.segments)}.rows" in tensors:
        part = _run(tensors, f"run{len(state.segments)}", first, radii, floor)
        state.segments = (*state.segments, part)
        first = part.last
    rows = _array(tensors, "tail.rows", np.int32, None)
    near = _array(tensors, "tail.near", np.uint8, (len(rows), NEAR))
    far = _array(tensors, "tail.far", np.uint8, (len(rows), FAR))
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < state.covered):
        raise CodebookCorrupt(f"tail.rows points outside the {state.covered} rows there are")
    if len(np.unique(rows[rows >= first])) != state.covered - first:
        raise CodebookCorrupt(f"tail.rows must hold every row from {first} to {state.covered}")
    state.delta = segments.append_codes(
        segments.delta_buffer(max(256, len(rows)), floor), near, far, rows, radii[rows], floor
    )
    return state


def unpack_map(tensors: Mapping[str, Tensor], width: int) -> quantizer.Projection:
    """Return the map of `pack_map` for keys of a width.

    Raises: CodebookCorrupt as `unpack_state`.
    """
    step, norm_slot, eta, lipschitz, row_norm = _numbers(tensors, "map.numbers", 5)
    phi = quantizer.Projection(
        torch.from_numpy(_array(tensors, "map.centre", np.float32, (width,))),
        torch.from_numpy(_array(tensors, "map.rows", np.float32, (SLOTS, width))),
        torch.from_numpy(_array(tensors, "map.turn", np.float64, (NEAR, NEAR))),
        step,
        bool(norm_slot),
        eta,
        lipschitz,
        row_norm,
    )
    if not (step > 0 and eta >= 0 and lipschitz >= 1 and row_norm >= 0):
        raise CodebookCorrupt("map.numbers are not those of a map")
    return phi


def _run(
    tensors: Mapping[str, Tensor], name: str, first: int, radii: Array, floor: float
) -> Segment:
    rows = _array(tensors, f"{name}.rows", np.int32, None)
    count, last = len(rows), first + len(rows)
    places = np.full(count, -1, np.int32)
    inside = count and first <= int(rows.min()) and int(rows.max()) < last <= len(radii)
    if inside:
        places[rows - np.int32(first)] = np.arange(count, dtype=np.int32)
    if not inside or int(places.min()) < 0:
        raise CodebookCorrupt(f"{name}.rows must hold every row from {first} to {last} once")
    leaves = -(-count // LEAF)
    supers = -(-leaves // LEAF)
    near_error, far_error = _numbers(tensors, f"{name}.errors", 2)
    part = Segment(
        count=count,
        rows=rows,
        near=_array(
            tensors, f"{name}.near", np.uint8, (leaves * LEAF // BLOCK, NEAR // 4, BLOCK, 4)
        ),
        far=_array(tensors, f"{name}.far", np.uint8, (leaves * LEAF, FAR)),
        leaf_max_radius=segments.max_radius_of_each(radii[rows], floor),
        near_error=near_error,
        far_error=far_error,
        first=first,
        last=last,
        places=places,
        isolated=_array(tensors, f"{name}.isolated", np.uint8, (leaves * LEAF // 8,)),
    )
    if f"{name}.leaf_boxes" in tensors:
        boxes = [
            _array(tensors, f"{name}.{level}_boxes", np.int16, (-(-n // BLOCK), 8, 2, BLOCK, 2))
            for level, n in (("leaf", leaves), ("super", supers))
        ]
        part.leaf_boxes, part.node_boxes = boxes
        part.node_max_radius = segments.max_radius_of_each(part.leaf_max_radius[:leaves], floor)
    return part


def _numbers(tensors: Mapping[str, Tensor], name: str, count: int) -> list[float]:
    found = _array(tensors, name, np.float64, (count,))
    if not np.isfinite(found[: count - 1]).all() or np.isnan(found).any():
        raise CodebookCorrupt(f"{name} must be finite")
    return found.tolist()  # type: ignore[no-any-return]


def _array(
    tensors: Mapping[str, Tensor], name: str, kind: Any, shape: tuple[int, ...] | None
) -> Array:
    """Return a tensor of the codes that must have one element type and shape; any [n] for None."""
    if name not in tensors:
        raise CodebookCorrupt(f"the tensor {name} is missing")
    if tensors[name].dtype in _NOT_IN_NUMPY:
        raise CodebookCorrupt(f"{name} must be {np.dtype(kind)}, got {tensors[name].dtype}")
    array = tensors[name].numpy()
    if array.dtype != kind or array.ndim != len(shape or (0,)) or shape not in (None, array.shape):
        wanted = list(shape) if shape is not None else ["*"]
        raise CodebookCorrupt(
            f"{name} must be {np.dtype(kind)} {wanted}, got {array.dtype} {array.shape}"
        )
    return array
