"""The Triton kernels on the codebook's GPU: by codes, or with every key read.

`find` looks up by the codebook's index (`kernels.codes`) where it is predicted to read less
than all keys, counting what queries share; those are read in float32 with an exact band
(`kernels.dense`) or, for many queries, multiplied by tensor cores with a bounded error
(`kernels.tiles`). `nearest` reads every key in the canonical order (`kernels.nearest`). Nothing
waits for the host.

Triton is imported at the first call that may use it, so that neither a missing triton nor the time
to load it is anyone else's concern. With TRITON_INTERPRET set before that import the kernels are
interpreted, take host tensors, and can be tested without a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.buffers import FixedArrays
from grace_fast.codebook.caches import Cache
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.pages import PAGE_ROWS, Page
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import maintained
from grace_fast.index.native_view import IndexState
from grace_fast.index.segments import Segment
from grace_fast.lookup.backends import graphs
from grace_fast.lookup.backends.workload import Workload

if TYPE_CHECKING:
    from grace_fast.kernels.code_layout import Codes
    from grace_fast.kernels.exact import Keys
    from grace_fast.kernels.tiles import FilterKeys

NAME = "triton"

# Not measured: how many queries share what is read densely, and from how many on tensor cores pay.
SHARED, TILED = 4, 32
DELTA_ROOM = 20480  # positions of codes: the delta buffer is sorted before it is longer


def why_not(workload: Workload) -> str | None:
    """Return why the Triton kernel cannot take a call, or None."""
    if workload.device not in ("cpu", "cuda"):
        return f"keys are on {workload.device}, not on a GPU"
    missing = _missing()
    if missing is not None:
        return missing
    if workload.device == "cpu" and not _interpreted():
        return "keys are on cpu, and TRITON_INTERPRET=1 was not set before triton was imported"
    if workload.device == "cuda" and _interpreted():
        return "TRITON_INTERPRET is set, and interpreted kernels take keys on cpu only"
    return _too_old(workload.index)


@cache
def _too_old(index: int | None) -> str | None:
    """Return why a GPU cannot run the kernels; None also where there is none to ask."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major >= 8:
        return None
    return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0"


def nearest(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """Return the nearest live row and its S of queries [B, D]; see `backends`."""
    if not (len(snapshot) and len(queries)):
        return semantics.no_row(len(queries), queries.device)
    from grace_fast.kernels import nearest as kernel

    found: tuple[Tensor, Tensor] = kernel.nearest(
        queries=_given(queries.to(torch.float32)),  # exact: bf16 and fp16 fit fp32
        keys=snapshot.key_slots,
        key_slot=snapshot.device_key_slot,
        live=snapshot.live,
    )
    return found


def find(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor, Tensor]:
    """Return hit [B] bool, the row that hit [B] and its S [B]; see `backends`."""
    if graphs.is_capturing(snapshot):
        captured: Captured = graphs.retained(snapshot, NAME)
        return captured.find(_given(queries))
    if not (len(snapshot) and len(queries)):
        row, squared = semantics.no_row(len(queries), queries.device)
        return row >= 0, row, squared
    table = _tables.of(snapshot, Table) or Table(snapshot, None)
    return table.find(_given(queries))


def _given(queries: Tensor) -> Tensor:
    """Return queries as kernels take them.

    The interpreter takes tensors that begin at one address for parts of one: a codebook that is
    asked for its own keys has them copied.
    """
    if _interpreted():
        return queries.clone(memory_format=torch.contiguous_format)
    return queries.contiguous()


def keep_for_graphs(codebook: Codebook) -> None:
    """Hold the codebook at fixed addresses from now on; see `graphs`.

    Raises: MemoryError where the device cannot.
    """
    graphs.retain(codebook, NAME, Captured(codebook.device))


def writes() -> bool:
    """Tell whether `write_` can be called."""
    return _missing() is None and not _interpreted()


def write_(
    output: Tensor, hit: Tensor, row: Tensor, snapshot: Snapshot, positions: Tensor, mode: str
) -> None:
    """Write the hits' values into output [B, T, V] where the mode replaces; in one launch."""
    from grace_fast.kernels import replace as kernel

    if graphs.is_capturing(snapshot):
        slots = graphs.retained(snapshot, NAME).value_slot
    else:
        slots = snapshot.column("value_slot") if snapshot.counts.value_moves else None
        slots = None if slots is None else slots.to(output.device)
    kernel.replace(output, hit, row, snapshot.value_slots, slots, positions, mode)


def codes_pay(state: IndexState, snapshot: Snapshot, batch: int) -> bool:
    """Tell whether codes are predicted to read less for a query than all keys would.

    Queries of one tile share what it reads, but not its candidates. Not measured.
    """
    from grace_fast.kernels import code_layout, code_tiles, tiles

    shared = min(batch, SHARED if batch < TILED else tiles.TILE["BLOCK_B"])
    dense_bytes = snapshot.rows * snapshot.key_dim * snapshot.dtype.itemsize / shared
    if batch < code_tiles.TILED:
        return state.predicted_bytes < dense_bytes
    candidates = max(0.0, state.predicted_bytes - code_layout.NEAR * state.fitted_rows)
    scanned = snapshot.rows * code_tiles.POSITION_BYTES / min(batch, code_tiles.TILE["BLOCK_B"])
    return scanned + candidates < dense_bytes


def _up_to_date(known: Codes | None, state: IndexState, snapshot: Snapshot) -> Codes:
    """Return the codes of a state on the device: `known`, of the same runs, if it has the room."""
    from grace_fast.kernels import code_layout

    parts, covered = [*state.segments, state.delta], min(state.covered, snapshot.rows)
    if known is not None and code_layout.refresh(known, parts, covered):
        return known
    return code_layout.device_codes(
        state.projection, parts, covered, state.min_radius, snapshot.device, room=DELTA_ROOM
    )


class Table:
    """One version as the kernels read it; what versions share is taken from another one."""

    def __init__(self, snapshot: Snapshot, other: Table | None) -> None:
        from grace_fast.kernels.exact import Keys

        device = snapshot.device
        self._snapshot = snapshot
        self.keys = Keys(
            slots=snapshot.key_slots,
            width=snapshot.key_dim,
            live=snapshot.live,
            radius=snapshot.radii,
            rows=torch.tensor([snapshot.rows], device=device, dtype=torch.int64),
            widest=torch.tensor([snapshot.widest], device=device, dtype=torch.float32),
            key_slot=snapshot.device_key_slot,
        )
        self._index = maintained.of(snapshot)
        self._state: IndexState | None = None
        self._codes: Codes | None = other._codes if other is not None else None
        self._parts: tuple[Segment, ...] = other._parts if other is not None else ()
        self._filter: FilterKeys | None = other._filter if other is not None else None
        self._take_codes_in()

    def find(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hit [B] bool, the row that hit [B] int64 and its S [B] float64."""
        from grace_fast.kernels import codes, dense, tiles

        if self._index is not None and self._index.current is not self._state:
            self._take_codes_in()
        snapshot = self._snapshot
        if self._state is not None and codes_pay(self._state, snapshot, len(queries)):
            assert self._codes is not None
            return codes.find(queries, self.keys, self._codes)
        if len(queries) < TILED:
            return dense.find(queries, self.keys)
        used = snapshot.counts.keys
        if self._filter is None or len(self._filter.norm) < used:
            self._filter = tiles.filter_keys(snapshot.key_slots[:used], known=self._filter)
        return tiles.find(queries, self.keys, self._filter)

    def _take_codes_in(self) -> None:
        """Bring what the index knows of this version by now to the device."""
        self._state = None
        if self._index is None:
            return
        with self._index.held(self._snapshot) as state:
            if state is None:
                return
            known = self._codes if self._parts == state.segments else None
            self._codes = _up_to_date(known, state, self._snapshot)
            self._parts, self._state = state.segments, state


class Captured:
    """The newest version at addresses that do not change: what captured graphs read.

    It is written by whoever publishes an edit, before the edit is seen, on that thread's stream, in
    several copies: a replay that another thread puts between them would see half an edit, and is
    kept out by `Codebook.held`. Another stream has to wait for that one, and that one for what is
    replayed there. Which of reading codes or keys was captured stays. Codes of another shape than
    the captured ones are not for the graphs that have those: they find no codes there, and read all
    keys.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrays = FixedArrays(device)
        self._snapshot: Snapshot | None = None  # that was followed last
        self._keys: Keys | None = None
        self._coded: dict[tuple[bool, bool], tuple[FixedArrays, Codes]] = {}  # by shape
        self._codes: Codes | None = None  # of this version
        self._parts: tuple[Segment, ...] = ()
        self._state: IndexState | None = None  # whose codes they are
        self.value_slot: Tensor | None = None

    @property
    def version(self) -> int:
        """The version that was followed last."""
        return -1 if self._snapshot is None else self._snapshot.version

    def find(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return hit [B] bool, the row that hit [B] int64 and its S [B] float64."""
        from grace_fast.kernels import codes, dense

        assert self._keys is not None
        assert self._snapshot is not None
        state = self._state
        if state is not None and codes_pay(state, self._snapshot, len(queries)):
            assert self._codes is not None
            return codes.find(queries, self._keys, self._codes)
        return dense.find(queries, self._keys)

    def on_publish(self, snapshot: Snapshot) -> None:
        """Bring a version to the device.

        Raises: MemoryError where there is no room; what is held stays the version before then.
        """
        from grace_fast.kernels.exact import Keys

        scalars = {
            "rows": torch.tensor([snapshot.rows], device=self._device, dtype=torch.int64),
            "widest": torch.tensor([snapshot.widest], device=self._device, dtype=torch.float32),
        }
        room = max(1, len(snapshot.pages)) * PAGE_ROWS
        for name, dtype in _COLUMNS.items():
            self._arrays.make_room(name, torch.empty(room, dtype=dtype, device="meta"))
        for name, scalar in scalars.items():
            self._arrays.make_room(name, scalar)
        self._follow_codes(snapshot)  # the last thing that there may be no room for
        before = self._snapshot
        known: tuple[Page, ...] = ()
        if before is not None and before.era == snapshot.era:
            known = before.pages[: before.rows // PAGE_ROWS]
        for number, page in enumerate(snapshot.pages):
            if number < len(known) and known[number] is page:
                continue  # a page that is not full is filled in place
            for name in _COLUMNS:
                self._arrays.put(name, getattr(page, name), number * PAGE_ROWS)
        for name, scalar in scalars.items():
            self._arrays.put(name, scalar)
        held = {name: self._arrays.at(name, (snapshot.rows,)) for name in _COLUMNS}
        self.value_slot = held.pop("value_slot")
        held |= {name: self._arrays.at(name, (1,)) for name in scalars}
        self._keys = Keys(slots=snapshot.key_slots, width=snapshot.key_dim, **held)
        self._snapshot = snapshot

    def _follow_codes(self, snapshot: Snapshot) -> None:
        known = maintained.of(snapshot)
        if known is None:
            return
        with known.held(snapshot) as state:
            if state is None:
                self._take_codes(None, ())
                self._state = None
                return
            known_codes = self._codes if self._parts == state.segments else None
            made = _up_to_date(known_codes, state, snapshot)
            if made is not known_codes:
                self._take_codes(made, state.segments)
            self._state = state

    def _take_codes(self, made: Codes | None, parts: tuple[Segment, ...]) -> None:
        """Put codes where those of their shape are, and leave graphs of another shape none."""
        placed = None
        if made is not None:
            shape, tensors = (bool(made.norm_slot), bool(made.has_far)), made.tensors()
            arrays = self._coded[shape][0] if shape in self._coded else FixedArrays(self._device)
            for name, tensor in tensors.items():
                arrays.make_room(name, tensor)
            for name, tensor in tensors.items():
                arrays.put(name, tensor)
            fields = {name: arrays.at(name, tuple(field.shape)) for name, field in tensors.items()}
            placed = made._replace(**fields)
            self._coded[shape] = (arrays, placed)
        for _, held in self._coded.values():
            if held is not placed:
                held.counts.zero_()  # no row has a code: all keys are read
        self._codes, self._parts = placed, parts


_tables: Cache[Table] = Cache(NAME)
_COLUMNS = {
    "live": torch.bool,
    "radius": torch.float32,
    "key_slot": torch.int64,
    "value_slot": torch.int64,
}


@cache
def _missing() -> str | None:
    try:
        import grace_fast.kernels.nearest  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install 'grace_fast[triton]'"
    return None


@cache
def _interpreted() -> bool:
    import triton

    from grace_fast.kernels import nearest as kernel

    return not isinstance(kernel.nearest_in_share, triton.JITFunction)
