"""Few queries on a GPU, decided in one or two launches by the compiled extension.

`Table` is a version as the kernels read it (csrc/cuda/layout.h): addresses in one small struct on
the device, which may be rewritten between two replays of a graph. Without a certificate's state it
reads every key; with one, the codes first. The decision is the same.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_fast import codes, order
from grace_fast.backends.workload import Workload
from grace_fast.codebook import Snapshot
from grace_fast.order import Array, Part
from grace_fast.views import State

_cuda: Any = None
try:
    _cuda = importlib.import_module("grace_fast._cuda")
except ImportError as error:
    _missing = f"the extension grace_fast._cuda was not built ({error})"

NAME = "cuda"
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # layout.h, Dtype
MOST_QUERIES = 32  # layout.h, kMostQueries
_OF_BLOCK = 16384  # bytes of a block's shared memory that are not a query


def why_not(workload: Workload) -> str | None:
    """Return why the compiled GPU path cannot take a call, or None."""
    if workload.device != "cuda":
        return f"keys are on {workload.device}, not on a CUDA GPU"
    if _cuda is None:
        return _missing
    if torch.version.hip is not None:
        return "the kernels are CUDA's, and this torch is for AMD"
    if workload.batch > MOST_QUERIES:
        return f"{workload.batch} queries are more than {MOST_QUERIES}"
    if workload.rows >= 2**31:
        return "2^31 rows or more"
    found = _cuda.devices()
    if isinstance(found, str):
        return found
    if found == 0:
        return "there is no CUDA device"
    if 4 * workload.key_dim + _OF_BLOCK > _device(torch.cuda.current_device())["shared_memory"]:
        return f"a query of width {workload.key_dim} does not fit in shared memory"
    return None


def find(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor, Tensor]:
    """Return hit [B] bool, the row that hit [B] int64 and its S [B] float64; see `backends`."""
    table = snapshot.derived(NAME, _table)
    if table is None:  # a draft
        table = _table(snapshot)
    return table.find(queries)  # type: ignore[no-any-return]


def _table(snapshot: Snapshot, previous: Any = None) -> Table:
    return Table(_cuda, snapshot)


@cache
def _device(index: int) -> dict[str, Any]:
    return _cuda.device(index)  # type: ignore[no-any-return]


@cache
def _workspace(module: Any, device: torch.device, stream: int, width: int, blocks: int) -> Tensor:
    """Return what one stream's launches write to; zero before the first."""
    size = module.workspace_bytes(width=width, blocks=blocks)
    return torch.zeros(size, dtype=torch.uint8, device=device)


def arrays_of(part: Part) -> dict[str, Array]:
    """Return a part's arrays in the kernels' layout: key-major, nothing padded."""
    count = part.count
    leaves = -(-count // order.LEAF)
    near, far = order.unpacked(part, np.arange(count))
    arrays = {
        "row": part.rows[:count],
        "near": near,
        "far": far,
        "reach": part.reach[:leaves],
    }
    if part.leaf_boxes is not None and part.super_boxes is not None:
        assert part.super_reach is not None
        supers = -(-leaves // order.LEAF)
        arrays["leaf_boxes"] = _boxes(part.leaf_boxes, leaves)
        arrays["super_boxes"] = _boxes(part.super_boxes, supers)
        arrays["super_reach"] = part.super_reach[:supers]
    if part.isolated is not None:
        arrays["isolated"] = part.isolated
    return arrays


def _boxes(groups: Array, count: int) -> Array:
    """Return boxes [n / 16, 8, 2, 16, 2] as [count, 2, 16], low and -high."""
    boxes = groups.transpose(0, 3, 2, 1, 4).reshape(-1, 2, codes.NEAR)[:count].copy()
    boxes[:, 1] *= -1
    return boxes


def packed_map(phi: codes.Map) -> dict[str, Tensor]:
    """Return the map's arrays in the kernels' layout: rows [64, Dp], an element after the other."""
    padded = len(phi.padded_centre)
    rows = torch.zeros(codes.SLOTS, padded, dtype=torch.bfloat16)
    rows[:, : len(phi.centre)] = phi.rows
    return {"centre": phi.padded_centre, "rows": rows, "turn": phi.turn.contiguous()}


class Table:
    """One version on its device, with a certificate's state or without."""

    def __init__(
        self,
        module: Any,
        snapshot: Snapshot,
        state: State | None = None,
        widest: float = float("inf"),
        blocks: int | None = None,
    ) -> None:
        self.module, self.snapshot = module, snapshot
        self.device = device = snapshot.device
        index = device.index if device.index is not None else 0
        self.blocks = blocks or module.device(index)["multiprocessors"]
        self.tensors: dict[str, Tensor] = {
            "keys": snapshot.key_slots,
            "live": snapshot.live.contiguous(),
            "radius": snapshot.radii.to(device).contiguous(),
            "values": snapshot.value_slots,
        }
        if snapshot.counts.key_moves:
            self.tensors["key_slot"] = snapshot.key_slot.to(device).contiguous()
        if snapshot.counts.value_moves:
            self.tensors["value_slot"] = snapshot.column("value_slot").to(device).contiguous()
        self.certified = state is not None
        phi, parts = None, []
        if state is not None:
            self.tensors |= {k: v.to(device) for k, v in packed_map(state.phi).items()}
            phi = self._map(state.phi)
            parts = [self._part(i, part) for i, part in enumerate((*state.runs, state.tail))]
        packed = module.pack_book(
            **{name: self._address(name) for name in _COLUMNS},
            rows=snapshot.rows,
            covered=min(state.covered, snapshot.rows) if state else 0,
            widest=widest,
            floor=state.floor if state else 0.0,
            map=phi,
            parts=parts,
        )
        self.book = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(device)
        self._lookups: dict[int, Any] = {}  # by stream

    def find(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hit [B] bool, the row that hit [B] int64 and its S [B] float64."""
        batch = len(queries)
        hit = torch.empty(batch, dtype=torch.bool, device=self.device)
        row = torch.empty(batch, dtype=torch.int64, device=self.device)
        squared = torch.empty(batch, dtype=torch.float64, device=self.device)
        if batch:
            lookup, stream = self._lookup()
            outputs = (hit.data_ptr(), row.data_ptr(), squared.data_ptr())
            lookup.find(*_asked(queries), *outputs, stream)
        return hit, row, squared

    def replace_(self, output: Tensor, queries: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Write the hits' values over output [B, T, V] where mask [B, T] is set; return hit, row.

        Nobody has to wait for the decision: which rows are written is known on the device only.
        """
        batch, tokens, width = output.shape
        if output.stride(2) != 1 or width != self.snapshot.value_dim:
            raise ValueError(f"output must be [B, T, {self.snapshot.value_dim}], rows side by side")
        hit = torch.empty(batch, dtype=torch.bool, device=self.device)
        row = torch.empty(batch, dtype=torch.int64, device=self.device)
        if batch and tokens:
            mask = mask.contiguous()
            lookup, stream = self._lookup()
            lookup.replace(
                *_asked(queries),
                hit.data_ptr(),
                row.data_ptr(),
                output.data_ptr(),
                DTYPE_NUMBERS[output.dtype],
                output.stride(0),
                output.stride(1),
                tokens,
                mask.data_ptr(),
                stream,
            )
        return hit, row

    def _lookup(self) -> tuple[Any, int]:
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0
        lookup = self._lookups.get(stream)
        if lookup is None:
            lookup = self._lookups[stream] = self._made_for(stream)
        return lookup, stream

    def _made_for(self, stream: int) -> Any:
        width = self.snapshot.key_dim
        workspace = _workspace(self.module, self.device, stream, width, self.blocks)
        return self.module.Lookup(
            book=self.book.data_ptr(),
            workspace=workspace.data_ptr(),
            blocks=self.blocks,
            width=width,
            dtype=str(self.snapshot.dtype).removeprefix("torch."),
            value_width=self.snapshot.value_dim,
            certified=self.certified,
        )

    def _address(self, name: str) -> int:
        tensor = self.tensors.get(name)
        return tensor.data_ptr() if tensor is not None else 0

    def _map(self, phi: codes.Map) -> dict[str, Any]:
        numbers = ("step", "lipschitz", "row_norm", "eta", "norm_slot", "far")
        arrays = {name: self._address(name) for name in ("centre", "rows", "turn")}
        return arrays | {name: getattr(phi, name) for name in numbers}

    def _part(self, index: int, part: Part) -> dict[str, Any]:
        arrays = {name: torch.from_numpy(array) for name, array in arrays_of(part).items()}
        held = {f"{name} {index}": array.to(self.device) for name, array in arrays.items()}
        self.tensors |= held
        addresses = {name: self._address(f"{name} {index}") for name in _PART_COLUMNS}
        return addresses | {
            "count": part.count,
            "first": part.first,
            "last": part.last,
            "near_residual": part.near_error,
            "far_residual": part.far_error,
        }


_COLUMNS = ("keys", "key_slot", "live", "radius", "values", "value_slot")
_PART_COLUMNS = (
    "row",
    "near",
    "far",
    "reach",
    "leaf_boxes",
    "super_boxes",
    "super_reach",
    "isolated",
)


def _asked(queries: Tensor) -> tuple[int, int, int, int]:
    if queries.stride(1) != 1:
        queries = queries.contiguous()
    return queries.data_ptr(), queries.stride(0), DTYPE_NUMBERS[queries.dtype], len(queries)
