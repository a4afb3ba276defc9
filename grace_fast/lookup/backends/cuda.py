"""Few queries on a GPU, decided in one or two launches by the compiled extension.

`Table` is a version as the kernels read it (csrc/cuda/layout.h): addresses in one small struct on
the device, which may be rewritten between two replays of a graph. Without a certificate's state it
reads every key; with one, the codes first. The decision is the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_fast.codebook.caches import Cache
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import certificate, quantizer, segments
from grace_fast.index.native_view import State
from grace_fast.index.segments import Array, Part
from grace_fast.lookup.backends import graphs
from grace_fast.lookup.backends.workload import Workload

_cuda: Any = None
_missing = ""
try:
    _cuda = importlib.import_module("grace_fast._cuda")
except ImportError as error:
    _missing = f"the extension grace_fast._cuda was not built ({error})"

NAME = "cuda"
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # layout.h, Dtype
MOST_QUERIES = 32  # layout.h, kMostQueries
OLDEST = (8, 0)  # compute capability that setup.py builds for
_OF_BLOCK = 16384  # bytes of a block's shared memory that are not a query


def why_not(workload: Workload) -> str | None:
    """Return why the compiled GPU path cannot take a call, or None."""
    if workload.device != "cuda":
        return f"keys are on {workload.device}, not on a CUDA GPU"
    if _cuda is None:
        return _missing
    if torch.version.hip is not None:
        return "the kernels are CUDA's, and this torch is for AMD"
    if workload.verb != "find":
        return "the kernels find, they do not look for the nearest key outside all balls"
    if workload.batch > MOST_QUERIES:
        return f"{workload.batch} queries are more than {MOST_QUERIES}"
    if workload.rows >= 2**31:
        return "2^31 rows or more"
    found = _cuda.devices()
    if isinstance(found, str):
        return found
    if found == 0:
        return "there is no CUDA device"
    index = torch.cuda.current_device() if workload.index is None else workload.index
    device = _device(index)
    if device["capability"] < OLDEST:
        major, minor = device["capability"]
        return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0"
    if 4 * workload.key_dim + _OF_BLOCK > device["shared_memory"]:
        return f"a query of width {workload.key_dim} does not fit in shared memory"
    return None


def find(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor, Tensor]:
    """Return hit [B] bool, the row that hit [B] int64 and its S [B] float64; see `backends`."""
    return table_of(snapshot).find(queries)


def replace_(output: Tensor, queries: Tensor, snapshot: Snapshot, mask: Tensor) -> None:
    """Write the hits' values over output [B, T, V] where mask [B, T] is set, by the same launch."""
    table_of(snapshot).replace_(output, queries, mask)


def keep_for_graphs(codebook: Codebook) -> None:
    """Bring every version to the device before it is published; see `graphs`."""
    graphs.retain(codebook, NAME, Listener())


class Listener:
    """What writes each version's description to where the captured graphs read it."""

    version = -1  # that was told last

    def on_publish(self, snapshot: Snapshot) -> None:
        """Bring a version to the device."""
        table_of(snapshot)
        self.version = snapshot.version


def table_of(snapshot: Snapshot) -> Table:
    """Return a version as the kernels read it, with what its certificate says by now."""
    if graphs.is_capturing(snapshot):
        graphs.retained(snapshot, NAME)
    table = _tables.of(snapshot, _newest)
    if table is None:
        return Table(_cuda, snapshot)
    known = certificate.of(snapshot)
    if graphs.is_capturing(snapshot) or known is None or known.current is table.state:
        return table
    table = _newest(snapshot, table)
    _tables.put(snapshot, table)
    return table


def _newest(snapshot: Snapshot, previous: Table | None) -> Table:
    known = certificate.of(snapshot)
    if known is None:
        return Table(_cuda, snapshot, None, snapshot.widest)
    with known.held(snapshot) as state:
        return Table(_cuda, snapshot, state, snapshot.widest, previous=previous)


@cache
def _device(index: int) -> dict[str, Any]:
    return _cuda.device(index)  # type: ignore[no-any-return]


@cache
def _workspace(module: Any, device: torch.device, stream: int, width: int, blocks: int) -> Tensor:
    """Return what one stream's launches write to; zero before the first."""
    size = module.workspace_bytes(width=width, blocks=blocks)
    return torch.zeros(size, dtype=torch.uint8, device=device)


def arrays_of(part: Part, names: Sequence[str]) -> dict[str, Array]:
    """Return those of a part's arrays that it has, in the kernels' layout: key-major, unpadded."""
    count = part.count
    leaves = -(-count // segments.LEAF)
    supers = -(-leaves // segments.LEAF)
    makers: dict[str, Callable[[], Array | None]] = {
        "row": lambda: part.rows[:count],
        "near": lambda: segments.unpacked(part, np.arange(count))[0],
        "far": lambda: part.far[:count],
        "reach": lambda: part.reach[:leaves],
        "leaf_boxes": lambda: _boxes(part.leaf_boxes, leaves),
        "super_boxes": lambda: _boxes(part.super_boxes, supers),
        "super_reach": lambda: None if part.super_reach is None else part.super_reach[:supers],
        "isolated": lambda: part.isolated,
    }
    made = {name: makers[name]() for name in names}
    return {name: array for name, array in made.items() if array is not None}


def _boxes(groups: Array | None, count: int) -> Array | None:
    """Return boxes [n / 16, 8, 2, 16, 2] as [count, 2, 16], low and -high."""
    if groups is None:
        return None
    boxes = groups.transpose(0, 3, 2, 1, 4).reshape(-1, 2, quantizer.NEAR)[:count].copy()
    boxes[:, 1] *= -1
    return boxes


def packed_map(phi: quantizer.Map) -> dict[str, Tensor]:
    """Return the map's arrays in the kernels' layout: rows [64, Dp], an element after the other."""
    padded = len(phi.padded_centre)
    rows = torch.zeros(quantizer.SLOTS, padded, dtype=torch.bfloat16, device="cpu")
    rows[:, : len(phi.centre)] = phi.rows
    return {"centre": phi.padded_centre, "rows": rows, "turn": phi.turn.contiguous()}


class Graphs:
    """The description that captured graphs read: that of the newest version, at one address.

    It is rewritten in one copy, on the stream of who publishes an edit (or looks up first once more
    codes are there, which decide the same): what is replayed on that stream sees all of an edit or
    nothing. Another stream has to wait for that one, and that one for what is replayed there.
    """

    def __init__(self) -> None:
        self._book: Tensor | None = None
        self._version = -1

    def book_of(self, version: int, packed: bytearray, device: torch.device) -> Tensor:
        """Return a version's description on the device, the one of the graphs if it is newest."""
        book = torch.frombuffer(packed, dtype=torch.uint8)
        if version < self._version:
            return book.to(device)
        self._version = version
        if self._book is None:
            self._book = torch.empty_like(book, device=device)
        return self._book.copy_(book)


class Table:
    """One version on its device, with a certificate's state or without.

    Tables of one codebook share the description that a captured graph reads, so that a graph sees
    the edits that were looked up since; which of reading codes or keys was captured stays.
    """

    def __init__(
        self,
        module: Any,
        snapshot: Snapshot,
        state: State | None = None,
        widest: float = float("inf"),
        blocks: int | None = None,
        previous: Table | None = None,
    ) -> None:
        self.module, self.snapshot, self.state = module, snapshot, state
        self._runs: list[tuple[Part, dict[str, Tensor]]] = []
        known = {id(part): (part, held) for part, held in previous._runs} if previous else {}
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
        # By codes where that is predicted to read less: one query at a time, as blocks do.
        key_bytes = snapshot.key_dim * snapshot.dtype.itemsize
        self.certified = state is not None
        if blocks is None and state is not None:
            self.certified = state.predicted_bytes < snapshot.rows * key_bytes
        phi, parts = None, []
        if state is not None:
            self.tensors |= {k: v.to(device) for k, v in packed_map(state.phi).items()}
            phi = self._map(state.phi)
            everything = enumerate((*state.runs, state.tail))
            parts = [self._part(i, part, known) for i, part in everything]
        packed = module.pack_book(
            **{name: self._address(name) for name in _COLUMNS},
            rows=snapshot.rows,
            covered=min(state.covered, snapshot.rows) if state else 0,
            widest=widest,
            floor=state.floor if state else 0.0,
            map=phi,
            parts=parts,
        )
        self._graphs: Graphs = previous._graphs if previous is not None else Graphs()
        self.book = self._graphs.book_of(snapshot.version, bytearray(packed), device)
        self._lookups: dict[int, Any] = {}  # by stream

    def find(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hit [B] bool, the row that hit [B] int64 and its S [B] float64."""
        batch, queries = len(queries), _in_rows(queries)
        hit = torch.empty(batch, dtype=torch.bool, device=self.device)
        row = torch.empty(batch, dtype=torch.int64, device=self.device)
        squared = torch.empty(batch, dtype=torch.float64, device=self.device)
        if batch:
            lookup, stream = self._lookup()
            outputs = (hit.data_ptr(), row.data_ptr(), squared.data_ptr())
            with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]
                lookup.find(*_asked(queries), *outputs, stream)
        return hit, row, squared

    def replace_(self, output: Tensor, queries: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Write the hits' values over output [B, T, V] where mask [B, T] is set; return hit, row.

        Nobody has to wait for the decision: which rows are written is known on the device only.
        """
        batch, tokens, width = output.shape
        if output.stride(2) != 1 or width != self.snapshot.value_dim:
            raise ValueError(f"output must be [B, T, {self.snapshot.value_dim}], rows side by side")
        queries = _in_rows(queries)
        hit = torch.empty(batch, dtype=torch.bool, device=self.device)
        row = torch.empty(batch, dtype=torch.int64, device=self.device)
        if batch and tokens:
            mask = mask.contiguous()
            lookup, stream = self._lookup()
            with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]
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
        width = self.snapshot.key_dim
        if graphs.is_capturing(self.snapshot):
            # A graph has a workspace of its own, which every replay clears first.
            made = _workspace.__wrapped__(self.module, self.device, stream, width, self.blocks)
            return self._made_for(made), stream
        if lookup is None:
            made = _workspace(self.module, self.device, stream, width, self.blocks)
            lookup = self._lookups[stream] = self._made_for(made)
        return lookup, stream

    def _made_for(self, workspace: Tensor) -> Any:
        width = self.snapshot.key_dim
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

    def _map(self, phi: quantizer.Map) -> dict[str, Any]:
        numbers = ("step", "lipschitz", "row_norm", "eta", "norm_slot", "far")
        arrays = {name: self._address(name) for name in ("centre", "rows", "turn")}
        return arrays | {name: getattr(phi, name) for name in numbers}

    def _part(self, index: int, part: Part, known: dict[int, Any]) -> dict[str, Any]:
        """Bring a part to the device; what never changes of a run is there from another version."""
        arrays = arrays_of(part, _CHANGING if id(part) in known else _PART_COLUMNS)
        held = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        if id(part) in known:
            held = known[id(part)][1] | held
        if part.leaf_boxes is not None:
            self._runs.append((part, held))
        self.tensors |= {f"{name} {index}": tensor for name, tensor in held.items()}
        addresses = {name: self._address(f"{name} {index}") for name in _PART_COLUMNS}
        return addresses | {
            "count": part.count,
            "first": part.first,
            "last": part.last,
            "near_residual": part.near_error,
            "far_residual": part.far_error,
        }


_tables: Cache[Table] = Cache(NAME)
_CHANGING = ("reach", "super_reach", "isolated")
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


def _in_rows(queries: Tensor) -> Tensor:
    return queries if queries.stride(1) == 1 else queries.contiguous()


def _asked(queries: Tensor) -> tuple[int, int, int, int]:
    return queries.data_ptr(), queries.stride(0), DTYPE_NUMBERS[queries.dtype], len(queries)
