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

from functools import cache, partial
from typing import TYPE_CHECKING, Literal

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
from grace_fast.lookup.backends import graphs, placed
from grace_fast.lookup.backends.workload import Workload

if TYPE_CHECKING:
    from grace_fast.kernels.code_layout import Codes
    from grace_fast.kernels.exact import Keys
    from grace_fast.kernels.tiles import FilterKeys

NAME = "triton"
Way = Literal["codes", "dense", "tiles"]

# Not measured: how many queries share what is read densely, and from how many on tensor cores pay.
SHARED, TILED = 4, 32


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


def find(
    queries: Tensor, snapshot: Snapshot, sums: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hit [B] bool, the row that hit [B] and with `sums` its S [B]; see `backends`."""
    captured: Captured | None = graphs.listening(snapshot, NAME)
    if graphs.is_capturing(snapshot):
        captured = graphs.retained(snapshot, NAME)
        assert captured is not None
        hit, row, squared = captured.find(_given(queries), sums)
    elif not len(queries) or not (len(snapshot) or captured is not None):
        row, squared = semantics.no_row(len(queries), queries.device)
        hit = row >= 0
    else:
        hit, row, squared = _table_of(snapshot, captured).find(_given(queries), sums)
    return hit, row, squared if sums else None


def _table_of(snapshot: Snapshot, captured: Captured | None) -> Table:
    """Return a version as the kernels read it; like what graphs read, where graphs are kept."""
    table = _tables.of(snapshot, partial(Table, captured=captured))
    if table is None:
        return Table(snapshot, None, captured)
    if captured is not None and table.captured is None:
        table = Table(snapshot, table, captured)
        _tables.put(snapshot, table)
    return table


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
    output: Tensor,
    hit: Tensor,
    row: Tensor,
    snapshot: Snapshot,
    positions: Tensor | None,
    mode: str,
) -> None:
    """Write the hits' values into output [B, T, V] where the mode replaces; in one launch."""
    from grace_fast.kernels import replace as kernel

    if graphs.is_capturing(snapshot):
        slots = graphs.retained(snapshot, NAME).value_slot
    elif snapshot.counts.value_moves or graphs.listening(snapshot, NAME) is not None:
        slots = snapshot.column("value_slot").to(output.device)
    else:
        slots = None
    kernel.replace(output, hit, row, snapshot.value_slots, slots, positions, mode)


def way_of(state: IndexState | None, snapshot: Snapshot, batch: int) -> Way:
    """Return how a batch is looked up, with codes of this state."""
    if state is not None and codes_pay(state, snapshot, batch):
        return "codes"
    return "dense" if batch < TILED else "tiles"


def _look_up(
    way: Way,
    queries: Tensor,
    keys: Keys,
    made: Codes | None,
    multiplied: FilterKeys | None,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hit, row and S of queries by one of the ways, which has what it reads."""
    from grace_fast.kernels import codes, dense, tiles

    if way == "codes":
        assert made is not None
        return codes.find(queries, keys, made, sums)
    if way == "dense":
        return dense.find(queries, keys, sums)
    assert multiplied is not None
    return tiles.find(queries, keys, multiplied, sums)


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
        state.projection,
        parts,
        covered,
        state.min_radius,
        snapshot.device,
        placed=placed.positions_of(snapshot, state),
    )


class Table:
    """One version as the kernels read it; what versions share is taken from another one.

    A kernel is compiled, and its module loaded, for what its arguments are: None or a tensor,
    aligned or not. Neither may happen while a graph is captured. Where graphs are kept of a
    codebook, `captured`, its look-ups outside of a capture therefore go the same way with arguments
    of the same kinds, so that the first of them readies what a capture launches.
    """

    def __init__(
        self, snapshot: Snapshot, other: Table | None, captured: Captured | None = None
    ) -> None:
        from grace_fast.kernels.exact import Keys

        device = snapshot.device
        self._snapshot, self.captured = snapshot, captured
        key_slot = snapshot.device_key_slot
        if key_slot is None and captured is not None:
            key_slot = snapshot.key_slot.to(device)
        self.keys = Keys(
            slots=snapshot.key_slots,
            width=snapshot.key_dim,
            live=snapshot.live,
            radius=snapshot.radii,
            rows=torch.tensor([snapshot.rows], device=device, dtype=torch.int64),
            widest=torch.tensor([snapshot.widest], device=device, dtype=torch.float32),
            key_slot=key_slot,
        )
        self._index = maintained.of(snapshot)
        self._state: IndexState | None = None
        self._codes: Codes | None = other._codes if other is not None else None
        self._parts: tuple[Segment, ...] = other._parts if other is not None else ()
        self._filter: FilterKeys | None = other._filter if other is not None else None
        self._take_codes_in()

    def find(self, queries: Tensor, sums: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Return hit [B] bool, the row that hit [B] int64 and its S [B] float64."""
        if self._index is not None and self._index.current is not self._state:
            self._take_codes_in()
        way = self._way(len(queries))
        if way == "tiles":
            self._filter = _filter_of(self._snapshot, self._filter)
        return _look_up(way, queries, self.keys, self._codes, self._filter, sums)

    def _way(self, batch: int) -> Way:
        captured, snapshot = self.captured, self._snapshot
        if captured is None or captured.version != snapshot.version:
            return way_of(self._state, snapshot, batch)
        way = captured.way(batch)
        return way_of(None, snapshot, batch) if way == "codes" and self._state is None else way

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


def _filter_of(snapshot: Snapshot, known: FilterKeys | None) -> FilterKeys:
    """Return what tensor cores multiply of a version's keys: `known`, with what is new."""
    from grace_fast.kernels import tiles

    used = snapshot.counts.keys
    if known is not None and len(known.norm) >= used:
        return known
    return tiles.filter_keys(snapshot.key_slots[:used], known=known)


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
        self._filter: FilterKeys | None = None
        self._coded: dict[tuple[bool, bool], tuple[FixedArrays, Codes]] = {}  # by shape
        self._codes: Codes | None = None  # of this version
        self._parts: tuple[Segment, ...] = ()
        self._state: IndexState | None = None  # whose codes they are
        self.value_slot: Tensor | None = None

    @property
    def version(self) -> int:
        """The version that was followed last."""
        return -1 if self._snapshot is None else self._snapshot.version

    def way(self, batch: int) -> Way:
        """Return how a batch is looked up."""
        assert self._snapshot is not None
        return way_of(self._state, self._snapshot, batch)

    def find(self, queries: Tensor, sums: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Return hit [B] bool, the row that hit [B] int64 and its S [B] float64."""
        assert self._keys is not None
        way = self.way(len(queries))
        return _look_up(way, queries, self._keys, self._codes, self._filter, sums)

    def on_publish(self, snapshot: Snapshot) -> None:
        """Bring a version to the device.

        Raises: MemoryError where there is no room; what is held stays the version before then.
        """
        from grace_fast.kernels import tiles
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
        before, used = self._snapshot, snapshot.counts.keys
        same_era = before is not None and before.era == snapshot.era
        first = before.counts.keys if before is not None and same_era else 0
        made = tiles.filter_keys(snapshot.key_slots[min(first, used) : used])
        fresh = _filter_fields(made, is_copy=snapshot.dtype == torch.float32)
        for name, part in fresh.items():
            like = torch.empty(used, *part.shape[1:], dtype=part.dtype, device="meta")
            self._arrays.make_room(name, like)
        self._follow_codes(snapshot)  # the last thing that there may be no room for
        known: tuple[Page, ...] = ()
        if before is not None and same_era:
            known = before.pages[: before.rows // PAGE_ROWS]
        for number, page in enumerate(snapshot.pages):
            if number < len(known) and known[number] is page:
                continue  # a page that is not full is filled in place
            for name in _COLUMNS:
                self._arrays.put(name, getattr(page, name), number * PAGE_ROWS)
        for name, scalar in scalars.items():
            self._arrays.put(name, scalar)
        for name, part in fresh.items():
            self._arrays.put(name, part, min(first, used))
        self._filter = self._held_filter(snapshot)
        held = {name: self._arrays.at(name, (snapshot.rows,)) for name in _COLUMNS}
        self.value_slot = held.pop("value_slot")
        held |= {name: self._arrays.at(name, (1,)) for name in scalars}
        self._keys = Keys(slots=snapshot.key_slots, width=snapshot.key_dim, **held)
        self._snapshot = snapshot

    def _held_filter(self, snapshot: Snapshot) -> FilterKeys:
        """Return what tensor cores multiply; keys of 16 bits they multiply as they are."""
        from grace_fast.kernels.tiles import FilterKeys

        used, slots = snapshot.counts.keys, snapshot.key_slots
        if slots.dtype == torch.float32:
            slots = self._arrays.at("filter slots", (used, snapshot.key_dim))
        norm, error = (self._arrays.at(f"filter {name}", (used,)) for name in ("norm", "error"))
        return FilterKeys(slots[:used], norm, error, None)

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


def _filter_fields(made: FilterKeys, is_copy: bool) -> dict[str, Tensor]:
    """Return what takes memory of its own, as the arrays of `Captured` are named."""
    fields = {"filter norm": made.norm, "filter error": made.error}
    return fields | ({"filter slots": made.slots} if is_copy else {})


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
