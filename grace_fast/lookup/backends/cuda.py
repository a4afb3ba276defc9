"""Few queries on a GPU, decided in one or two launches by the compiled extension.

`Table` is a version as the kernels read it (csrc/cuda/layout.h): addresses in one small struct on
the device. Without an index's state it reads every key, in one launch; with one, the codes first,
in two. The decision is the same, and values are written by the same launches. What a captured graph
reads is a struct of its own (`Listener`), rewritten for every version.
"""

from __future__ import annotations

import importlib
import logging
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
from grace_fast.semantics import Replacement

_log = logging.getLogger("grace_fast")
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
SPARES = 2  # workspaces that are there before a capture asks for one
GROWTH = 8  # times the rows at its capture that a graph is made for; it answers for any number
MODES = {"replace_all": 0, "replace_last": 1, "replace_prompt": 2}  # layout.h, Replacement


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


def find(
    queries: Tensor, snapshot: Snapshot, sums: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hit [B] bool, the row that hit [B] int64 and its S [B] float64; see `backends`."""
    return table_of(snapshot).find(queries, sums)


def replace_(
    output: Tensor,
    queries: Tensor,
    snapshot: Snapshot,
    positions: Tensor | None,
    mode: Replacement,
) -> None:
    """Write the hits' values over output [B, T, V], by the launches that decide."""
    table_of(snapshot).replace_(output, queries, positions, mode)


def keep_for_graphs(codebook: Codebook) -> None:
    """Bring every version to the device before it is published; see `graphs`."""
    graphs.retain(codebook, NAME, Listener())


def table_of(snapshot: Snapshot) -> Table:
    """Return a version as the kernels read it, with what its index says by now."""
    if graphs.is_capturing(snapshot):
        captured: Table = graphs.retained(snapshot, NAME).table
        return captured
    table = _tables.of(snapshot, _newest)
    if table is None:
        return Table(_cuda, snapshot)
    known = maintained.of(snapshot)
    if known is not None and known.current is not table.state:
        table = _newest(snapshot, table)
        _tables.put(snapshot, table)
    listener = graphs.listening(snapshot, NAME)
    if listener is not None:
        listener.have_spares(table)
    return table


def _newest(snapshot: Snapshot, previous: Table | None) -> Table:
    known = maintained.of(snapshot)
    if known is None:
        return Table(_cuda, snapshot, None, snapshot.widest)
    with known.held(snapshot) as state:
        return Table(_cuda, snapshot, state, snapshot.widest, previous=previous)


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream that launches on a device go to now; None on a host, for tests."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@cache
def _device(index: int) -> dict[str, Any]:
    return _cuda.device(index)  # type: ignore[no-any-return]


@cache
def _workspace(module: Any, device: torch.device, stream: int, width: int, blocks: int) -> Tensor:
    """Return what one stream's launches write to; its counters are zero before the first."""
    made = torch.empty(
        module.workspace_bytes(width=width, blocks=blocks), dtype=torch.uint8, device=device
    )
    made[: module.COUNTER_BYTES].zero_()
    return made


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


class Listener:
    """The newest version as captured graphs read it, and the memory that their launches write to.

    The description is at one address, and rewritten in one copy, on the stream of who publishes an
    edit: what is replayed on that stream sees all of an edit or nothing. Another stream has to wait
    for that one, and that one for what is replayed there. Which of reading codes or keys was
    captured stays.

    Launches of one capture on one stream come one after the other and share a workspace; each
    capture has its own, for as long as the codebook lives, because graphs may be replayed beside
    each other. It is made before the capture, so that no node of the graph clears it.
    """

    version = -1  # that was told last
    table: Table  # of that version; it keeps what the description points to

    def __init__(self) -> None:
        self._book: Tensor | None = None
        self._spares: list[Tensor] = []
        self._taken: dict[tuple[int, int], Tensor] = {}  # by capture and stream

    def on_publish(self, snapshot: Snapshot) -> None:
        """Bring a version to the device. What is raised leaves the version before."""
        self.hold(table_of(snapshot))
        self.version = snapshot.version

    def hold(self, table: Table) -> None:
        """Let graphs read a table's version."""
        self.have_spares(table)
        if self._book is None:
            self._book = torch.empty_like(table.book)
        self._book.copy_(table.book)
        self.table = table

    def have_spares(self, table: Table) -> None:
        """Have workspaces ready for the next captures."""
        while len(self._spares) < SPARES:
            made = _workspace.__wrapped__(table.module, table.device, 0, *table.shape)
            if table.device.type == "cuda":  # a graph may be replayed on any stream
                torch.cuda.current_stream(table.device).synchronize()
            self._spares.append(made)

    def lookup(self, stream: int) -> Any:
        """Return what a capture on a stream launches."""
        assert self._book is not None
        table = self.table
        capture = (table.module.capture_of(stream), stream)
        if capture not in self._taken:
            try:
                self._taken[capture] = self._spares.pop()
            except IndexError:
                self._taken[capture] = self._within(table)
        return table.lookup_in(self._book, self._taken[capture])

    def _within(self, table: Table) -> Tensor:
        """Return a workspace of the graph's own memory, which every replay clears."""
        _log.warning(
            "%d captures without a look-up before them: this one clears its memory at each "
            "replay; look up once before each capture",
            SPARES + 1,
        )
        return _workspace.__wrapped__(table.module, table.device, 0, *table.shape)


class Table:
    """One version on its device, with an index's state or without.

    Nothing of it changes, and what it shares with tables of other versions does not change either:
    who reads an old version, on whatever stream, reads that one.
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
        self.book = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(device)
        self._lookups: dict[int, Any] = {}  # by stream
        self._stream = _current_stream(device)  # that all of this was brought there on
        self._brought = None if self._stream is None else self._stream.record_event()

    @property
    def shape(self) -> tuple[int, int]:
        """What a workspace has to have room for: the width of a query, and blocks."""
        return self.snapshot.key_dim, self.blocks

    def find(self, queries: Tensor, sums: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hit [B] bool, the row that hit [B] int64 and with `sums` its S [B] float64."""
        hit, row = self._room(queries, torch.bool), self._room(queries, torch.int64)
        squared = self._room(queries, torch.float64) if sums else None
        if len(queries):
            queries = in_rows(queries)
            lookup, stream = self._lookup()
            where = 0 if squared is None else squared.data_ptr()
            outputs = (hit.data_ptr(), row.data_ptr(), where)
            with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]
                lookup.find(*asked(queries), *outputs, stream)
        return hit, row, squared

    def replace_(
        self,
        output: Tensor,
        queries: Tensor,
        positions: Tensor | None = None,
        mode: Replacement = "replace_prompt",
    ) -> None:
        """Write the hits' values over output [B, T, V] where the mode says; see `semantics`.

        positions: [B], the query's token; None for the last one. Nobody has to wait for the
        decision: which rows are written is known on the device only.
        """
        _, tokens, width = output.shape
        if output.stride(2) != 1 or width != self.snapshot.value_dim:
            raise ValueError(f"output must be [B, T, {self.snapshot.value_dim}], rows side by side")
        if not (len(queries) and tokens):
            return
        queries, where = in_rows(queries), 0
        if positions is not None:
            positions = positions.to(torch.int64).contiguous()
            where = positions.data_ptr()
        lookup, stream = self._lookup()
        written = (output.data_ptr(), DTYPE_NUMBERS[output.dtype], *output.stride()[:2], tokens)
        with torch.cuda.device_of(queries):  # type: ignore[no-untyped-call]
            lookup.replace(*asked(queries), *written, where, MODES[mode], stream)

    def _room(self, queries: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(queries), dtype=dtype, device=self.device)

    def _lookup(self) -> tuple[Any, int]:
        stream = _current_stream(self.device)
        number = 0 if stream is None else stream.cuda_stream
        if graphs.is_capturing(self.snapshot):
            return graphs.retained(self.snapshot, NAME).lookup(number), number
        if number not in self._lookups:
            self._be_read_on(stream)
            workspace = _workspace(self.module, self.device, number, *self.shape)
            self._lookups[number] = self.lookup_in(self.book, workspace)
        return self._lookups[number], number

    def _be_read_on(self, stream: torch.cuda.Stream | None) -> None:
        """Let a stream read this: once it was brought, and without its memory being given away."""
        if stream is None or self._brought is None or stream == self._stream:
            return
        stream.wait_event(self._brought)
        for tensor in (self.book, *self.tensors.values()):
            tensor.record_stream(stream)

    def lookup_in(self, book: Tensor, workspace: Tensor) -> Any:
        """Return what launches look-ups of a description like this table's.

        Few blocks read few rows. Another description than this table's may come to have more.
        """
        growth = 1 if book is self.book else GROWTH
        return self.module.Lookup(
            book=book.data_ptr(),
            workspace=workspace.data_ptr(),
            blocks=self.blocks,
            width=self.snapshot.key_dim,
            dtype=DTYPE_NUMBERS[self.snapshot.dtype],
            value_width=self.snapshot.value_dim,
            indexed=self.indexed,
            expected_rows=growth * self.snapshot.rows,
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
