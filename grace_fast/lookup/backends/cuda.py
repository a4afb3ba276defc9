"""Few queries on a GPU, decided in one or two launches by the compiled extension.

`Table` is a version as the kernels read it (csrc/cuda/layout.h): addresses in one small struct on
the device, which may be rewritten between two replays of a graph. Without an index's state it
reads every key; with one, the codes first. The decision is the same.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_fast.codebook.caches import Cache
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import maintained, quantizer, segments
from grace_fast.index.native_view import DTYPE_NUMBERS, IndexState, asked, in_rows
from grace_fast.index.segments import Array, Segment
from grace_fast.lookup.backends import graphs
from grace_fast.lookup.backends.workload import Workload

_cuda: Any = None
_missing = ""
try:
    _cuda = importlib.import_module("grace_fast._cuda")
except ImportError as error:
    _missing = f"the extension grace_fast._cuda was not built ({error})"

NAME = "cuda"
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
    """Return a version as the kernels read it, with what its index says by now."""
    if graphs.is_capturing(snapshot):
        graphs.retained(snapshot, NAME)
    table = _tables.of(snapshot, _newest)
    if table is None:
        return Table(_cuda, snapshot)
    known = maintained.of(snapshot)
    if graphs.is_capturing(snapshot) or known is None or known.current is table.state:
        return table
    table = _newest(snapshot, table)
    _tables.put(snapshot, table)
    return table


def _newest(snapshot: Snapshot, previous: Table | None) -> Table:
    known = maintained.of(snapshot)
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


def device_layout(segment: Segment, is_known: bool) -> dict[str, Array]:
    """Return a segment's arrays in the kernels' layout, key-major and unpadded.

    is_known: only those that change while a segment is in use.
    """
    count = segment.count
    leaves = -(-count // segments.LEAF)
    nodes = -(-leaves // segments.LEAF)
    arrays = {
        "leaf_max_radius": segment.leaf_max_radius[:leaves],
        "node_max_radius": None
        if segment.node_max_radius is None
        else segment.node_max_radius[:nodes],
        "isolated": segment.isolated,
    }
    if not is_known:
        arrays |= {
            "rows": segment.rows[:count],
            "near": segments.unpacked(segment, np.arange(count))[0],
            "far": segment.far[:count],
            "leaf_boxes": _boxes(segment.leaf_boxes, leaves),
            "node_boxes": _boxes(segment.node_boxes, nodes),
        }
    return {name: array for name, array in arrays.items() if array is not None}


def _boxes(groups: Array | None, count: int) -> Array | None:
    """Return boxes [n / 16, 8, 2, 16, 2] as [count, 2, 16], low and -high."""
    if groups is None:
        return None
    boxes = groups.transpose(0, 3, 2, 1, 4).reshape(-1, 2, quantizer.NEAR)[:count].copy()
    boxes[:, 1] *= -1
    return boxes


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
    """One version on its device, with an index's state or without.

    Tables of one codebook share the description that a captured graph reads, so that a graph sees
    the edits that were looked up since; which of reading codes or keys was captured stays.
    """

    def __init__(
        self,
        module: Any,
        snapshot: Snapshot,
        state: IndexState | None = None,
        widest: float = float("inf"),
        blocks: int | None = None,
        previous: Table | None = None,
    ) -> None:
        self.module, self.snapshot, self.state = module, snapshot, state
        self._ordered: dict[Segment, dict[str, Tensor]] = {}  # what later versions take from here
        known = previous._ordered if previous else {}
        self.device = device = snapshot.device
        self._index = device.index or 0
        self.blocks = blocks or module.device(self._index)["multiprocessors"]
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
        self.indexed = state is not None
        if blocks is None and state is not None:
            self.indexed = state.predicted_bytes < snapshot.rows * key_bytes
        projection, described = None, []
        if state is not None:
            projection = self._projection(state.projection)
            everything = enumerate((*state.segments, state.delta))
            described = [self._segment(i, segment, known) for i, segment in everything]
        packed = module.pack_book(
            columns={name: self._address(name) for name in _COLUMNS},
            rows=snapshot.rows,
            covered=min(state.covered, snapshot.rows) if state else 0,
            widest=widest,
            min_radius=state.min_radius if state else 0.0,
            projection=projection,
            segments=described,
        )
        self._graphs: Graphs = previous._graphs if previous is not None else Graphs()
        self.book = self._graphs.book_of(snapshot.version, bytearray(packed), device)
        self._lookups: dict[int, Any] = {}  # by stream

    def find(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hit [B] bool, the row that hit [B] int64 and its S [B] float64."""
        hit, row = self._room(queries, torch.bool), self._room(queries, torch.int64)
        squared = self._room(queries, torch.float64)
        if len(queries):
            queries = in_rows(queries)
            lookup, stream = self._lookup()
            outputs = (hit.data_ptr(), row.data_ptr(), squared.data_ptr())
            with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]
                lookup.find(*asked(queries), *outputs, stream)
        return hit, row, squared

    def replace_(self, output: Tensor, queries: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Write the hits' values over output [B, T, V] where mask [B, T] is set; return hit, row.

        Nobody has to wait for the decision: which rows are written is known on the device only.
        """
        _, tokens, width = output.shape
        if output.stride(2) != 1 or width != self.snapshot.value_dim:
            raise ValueError(f"output must be [B, T, {self.snapshot.value_dim}], rows side by side")
        hit, row = self._room(queries, torch.bool), self._room(queries, torch.int64)
        if len(queries) and tokens:
            queries, mask = in_rows(queries), mask.contiguous()
            lookup, stream = self._lookup()
            written = (output.data_ptr(), DTYPE_NUMBERS[output.dtype], *output.stride()[:2], tokens)
            outputs = (hit.data_ptr(), row.data_ptr(), *written, mask.data_ptr())
            with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]
                lookup.replace(*asked(queries), *outputs, stream)
        return hit, row

    def _room(self, queries: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(queries), dtype=dtype, device=self.device)

    def _lookup(self) -> tuple[Any, int]:
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0
        launched = (self.module, self.device, stream, self.snapshot.key_dim, self.blocks)
        if graphs.is_capturing(self.snapshot):
            # A graph has a workspace of its own, which every replay clears first.
            return self._made_for(_workspace.__wrapped__(*launched)), stream
        if stream not in self._lookups:
            self._lookups[stream] = self._made_for(_workspace(*launched))
        return self._lookups[stream], stream

    def _made_for(self, workspace: Tensor) -> Any:
        return self.module.Lookup(
            book=self.book.data_ptr(),
            workspace=workspace.data_ptr(),
            blocks=self.blocks,
            width=self.snapshot.key_dim,
            dtype=DTYPE_NUMBERS[self.snapshot.dtype],
            value_width=self.snapshot.value_dim,
            indexed=self.indexed,
            device=self._index,
        )

    def _address(self, name: str) -> int:
        tensor = self.tensors.get(name)
        return tensor.data_ptr() if tensor is not None else 0

    def _projection(self, projection: quantizer.Projection) -> dict[str, Any]:
        arrays = {"centre": projection.padded_centre, "rows": projection.padded_rows}
        arrays["turn"] = projection.turn.contiguous()
        placed = {name: array.to(self.device) for name, array in arrays.items()}
        self.tensors |= placed
        return projection.numbers | {name: array.data_ptr() for name, array in placed.items()}

    def _segment(
        self, number: int, segment: Segment, known: dict[Segment, dict[str, Tensor]]
    ) -> dict[str, Any]:
        """Bring a segment to the device; of one that an earlier version has, what changes."""
        arrays = device_layout(segment, segment in known)
        placed = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        placed = known.get(segment, {}) | placed
        if segment.leaf_boxes is not None:
            self._ordered[segment] = placed
        self.tensors |= {f"{name} {number}": tensor for name, tensor in placed.items()}
        return segment.fields() | _NO_ARRAYS | {n: t.data_ptr() for n, t in placed.items()}


_tables: Cache[Table] = Cache(NAME)
_COLUMNS = ("keys", "key_slot", "live", "radius", "values", "value_slot")
_NO_ARRAYS = dict.fromkeys(("leaf_boxes", "node_boxes", "node_max_radius", "isolated"), 0)
