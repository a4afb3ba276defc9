"""The codebook: keys, values, radii and labels of every edit, one writer, any number of readers.

Keys and values sit in append-only slots at fixed addresses. What may change of a row (radius,
liveness, which key, value and label slot) sits in pages of 4 096 rows that are copied when they are
written. So a `Snapshot` is a row count and a tuple of pages: it never changes, costs nothing to
take, and readers need no lock. A `Draft` is the writer's; nothing of it is seen until it is
published by one store, and a draft that is dropped leaves no trace.

A row's number is its order of creation. It decides ties, and is never given to another row.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from grace_fast.codebook import forks, scalars
from grace_fast.codebook.buffers import MappedRows, Rows, bounded, memory_errors, reserve
from grace_fast.codebook.labels import Labels
from grace_fast.codebook.mapped import HEADER_BYTES, MappedFile
from grace_fast.codebook.modes import lasting
from grace_fast.codebook.once import cached_property

PAGE_ROWS = 4096
_NO_COPY = (
    "a codebook, and a model it is attached to, cannot be copied or pickled: its rows lie at "
    "addresses that are reserved for it. Copy the model before `attach`, or save the codebook "
    "(`gf.save`, `grace.save_pretrained`) and open it for the copy (`gf.open`, `from_pretrained`)"
)
COLUMNS = ("radius", "live", "key_slot", "value_slot", "label_slot")  # what may change of a row
MAX_NUMBER = 1 << 62  # of ids and counts: what follows them still fits an int64
MAX_COUNTER = 1 << 53  # of versions and edits: exact in every JSON
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Page:
    """The part of 4 096 rows that may change; copied before it is written once it was published."""

    radius: Tensor  # [4096] float32, on the codebook's device
    live: Tensor  # [4096] bool, on the codebook's device
    key_slot: Tensor  # [4096] int64, on the host
    value_slot: Tensor  # [4096] int64, on the host
    label_slot: Tensor  # [4096] int64, on the host

    @staticmethod
    def empty(device: torch.device) -> Page:
        """Return a page whose rows are not yet in use."""
        host = torch.zeros(3, PAGE_ROWS, dtype=torch.int64, device="cpu")
        radius = torch.zeros(PAGE_ROWS, device=device, dtype=torch.float32)
        live = torch.zeros(PAGE_ROWS, dtype=torch.bool, device=device)
        return Page(radius, live, host[0], host[1], host[2])

    def copy(self) -> Page:
        """Return a page of its own memory with the same rows."""
        return Page(
            self.radius.clone(),
            self.live.clone(),
            self.key_slot.clone(),
            self.value_slot.clone(),
            self.label_slot.clone(),
        )


@dataclass(frozen=True)
class _Counts:
    rows: int = 0  # removed rows included
    live: int = 0
    keys: int = 0  # slots in use; more than rows once a key has moved
    values: int = 0
    labels: int = 0
    key_moves: int = 0  # how often the key of a row changed: what is derived from keys starts anew
    value_moves: int = 0
    widest: float = -1.0  # at least every radius; it only grows


@dataclass(frozen=True, eq=False, repr=False)
class Snapshot:
    """The codebook at one version. Fields indexed by row hold the removed rows too."""

    version: int
    counts: _Counts
    pages: tuple[Page, ...]
    key_slots: Tensor  # [capacity, D]
    value_slots: Tensor  # [capacity, V]
    _label_slots: Labels
    _ids: Tensor  # [capacity, 1] int64
    # What back ends keep, shared by the published versions of a codebook; None for a draft, whose
    # rows may yet be dropped and given to other keys.
    _derived: dict[str, tuple[Snapshot, Any]] | None = None
    base: Snapshot | None = None  # of a draft: the published version that it changes
    # The files that the first slots lie in, of a codebook that was opened where it lies.
    key_file: MappedFile | None = None
    value_file: MappedFile | None = None
    # How often a version was refused that followers had seen: what they know of its rows and slots,
    # which are given to others, is of another era.
    era: int = 0

    # The fields reach beyond the rows there are, into memory that may not be read.
    def __repr__(self) -> str:
        return f"Snapshot(version={self.version}, {len(self)} keys, {self.rows} rows)"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(_NO_COPY)

    def __len__(self) -> int:
        return self.counts.live

    def derived(self, name: str, build: Callable[[Snapshot, Any], Any]) -> Any:
        """Return what a back end computes from the keys, kept with the codebook; None for a draft.

        `build(snapshot, previous)` is called once a version; `previous` is what it returned for
        another version of the codebook, earlier or later, or None. What may be kept of it is for
        the back end to say. Readers may build the same at once; the last one stays.
        """
        if self._derived is None:
            return None
        known = self._derived.get(name)
        if known is not None and known[0] is self:
            return known[1]
        built = build(self, known[1] if known is not None else None)
        self._derived[name] = (self, built)
        return built

    @property
    def rows(self) -> int:
        """The number of rows ever made, removed ones included."""
        return self.counts.rows

    @property
    def is_draft(self) -> bool:
        """Whether this may yet be dropped: back ends keep nothing of it."""
        return self._derived is None

    @property
    def widest(self) -> float:
        """At least every radius; what some row had once, 0 where none was positive."""
        return max(0.0, self.counts.widest)

    @property
    def dtype(self) -> torch.dtype:
        """The element type of keys and values."""
        return self.key_slots.dtype

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self.key_slots.device

    @property
    def key_dim(self) -> int:
        """D, the width of a key and of a query."""
        return self.key_slots.shape[1]

    @property
    def value_dim(self) -> int:
        """V, the width of a value."""
        return self.value_slots.shape[1]

    def column(self, name: str) -> Tensor:
        """Return one field of the pages for all rows, [N]."""
        pages: list[Tensor] = [getattr(page, name) for page in self.pages]
        if not pages:
            return getattr(Page.empty(self.device), name)[:0]  # type: ignore[no-any-return]
        joined = pages[0] if len(pages) == 1 else torch.cat(pages)
        return joined[: self.rows]

    @cached_property
    def radii(self) -> Tensor:
        """[N] float32; negative for a dead key."""
        return self.column("radius")

    @cached_property
    def live(self) -> Tensor:
        """[N] bool, False for a removed row."""
        return self.column("live")

    @cached_property
    def ids(self) -> Tensor:
        """[N] int64, ascending."""
        return bounded(self._ids[: self.rows, 0])

    @cached_property
    def device_key_slot(self) -> Tensor | None:
        """[N] int64 on the codebook's device; None as long as row i's key is in slot i."""
        return self.key_slot.to(self.device) if self.counts.key_moves else None

    @cached_property
    def keys(self) -> Tensor:
        """[N, D]; a view of the store, or a gather once a key has moved.

        What lies in a file is not tested by a view; `keys_at` tests what it reads.
        """
        if not self.counts.key_moves:
            return bounded(self.key_slots[: self.rows])
        return self.key_slots[self.key_slot.to(self.device)]

    def keys_at(self, rows: Tensor) -> Tensor:
        """Return the keys of rows [n], as [n, D]; of a file, once they are what was saved.

        Raises: CodebookCorrupt where they are not.
        """
        slots = self.key_slot[rows] if self.counts.key_moves else rows
        return _fetched(self.key_slots, slots.to(self.device), self.key_file)

    def keys_between(self, first: int, last: int) -> Tensor:
        """Return the keys of rows [first, last), as [n, D]; see `keys_at`.

        Through a mapping for single rows the disk would give a page at a time; a file is read.
        """
        if self.counts.key_moves:
            return self.keys_at(torch.arange(first, last, device="cpu"))
        file = self.key_file
        if file is None or first >= file.shape.rows:
            return self.key_slots[first:last]
        inside = file.read(first, min(last, file.shape.rows))
        if first + len(inside) == last:
            return inside
        return torch.cat([inside, self.key_slots[first + len(inside) : last]])

    def test_files(self) -> None:
        """Test all of what lies in files, once.

        Raises: CodebookCorrupt where it is not what was saved.
        """
        for file in (self.key_file, self.value_file):
            if file is not None:
                file.test_all()

    @cached_property
    def key_slot(self) -> Tensor:
        """[N] int64, where in the store each row's key is."""
        return self.column("key_slot")

    def stored_labels(self, first: int = 0) -> list[Tensor | None]:
        """Return the labels by slot, from the first one asked for."""
        return self._label_slots.between(first, self.counts.labels)

    def label_columns(self) -> tuple[Tensor, Tensor]:
        """Return the labels by slot as lengths and ids; see `Labels`."""
        return self._label_slots.columns(self.counts.labels)

    @property
    def labels_by_slot(self) -> Labels:
        """The labels by slot, later ones of the codebook among them."""
        return self._label_slots

    @cached_property
    def values(self) -> Tensor:
        """[N, V]; a view of the store, or a gather once a value was trained again."""
        if not self.counts.value_moves:
            return bounded(self.value_slots[: self.rows])
        return self.value_slots[self.column("value_slot").to(self.device)]

    @cached_property
    def labels(self) -> list[Tensor | None]:
        """The label of each row, None where it has none."""
        return [self._label_slots[slot] for slot in self.column("label_slot").tolist()]

    def _page(self, row: int) -> tuple[Page, int]:
        if not 0 <= row < self.rows:
            raise IndexError(f"row must be in [0, {self.rows}), got {row}")
        return self.pages[row // PAGE_ROWS], row % PAGE_ROWS

    def key_of(self, row: int) -> Tensor:
        """Return the key of one row, [D]."""
        slot = self.key_slot_of(row)
        if self.key_file is not None:
            return _fetched(self.key_slots, _index_of(slot), self.key_file)[0]
        return bounded(self.key_slots[slot])

    def value_of(self, row: int) -> Tensor:
        """Return the value of one row, [V]."""
        slot = self.value_slot_of(row)
        if self.value_file is not None:
            return _fetched(self.value_slots, _index_of(slot), self.value_file)[0]
        return bounded(self.value_slots[slot])

    def values_of(self, rows: Tensor) -> Tensor:
        """Return the values of rows [B], as [B, V]; row 0's for -1, to be masked by the caller."""
        slots = rows.clamp(min=0)
        if self.counts.value_moves:
            slots = self._gather("value_slot", slots).to(self.device)
        return _fetched(self.value_slots, slots, self.value_file)

    def radii_of(self, rows: Tensor) -> Tensor:
        """Return the radii of rows [B], as [B] float32; -1 for row -1."""
        found = self._gather("radius", rows.clamp(min=0))
        return found.masked_fill(rows.to(found.device) < 0, -1.0)

    def _gather(self, name: str, rows: Tensor) -> Tensor:
        """Return one field of rows [B]; of an empty codebook, where every row is a miss, zeros."""
        if len(self.pages) <= 1 or not len(rows):
            page = self.pages[0] if self.pages else Page.empty(self.device)
            column: Tensor = getattr(page, name)
            return column[rows.to(column.device)]
        picked = [getattr(self.pages[r // PAGE_ROWS], name)[r % PAGE_ROWS] for r in rows.tolist()]
        return torch.stack(picked)

    def value_slot_of(self, row: int) -> int:
        """Return the slot that holds the value of one row."""
        page, offset = self._page(row)
        return int(page.value_slot[offset])

    def key_slot_of(self, row: int) -> int:
        """Return the slot that holds the key of one row."""
        page, offset = self._page(row)
        return int(page.key_slot[offset])

    def label_slot_of(self, row: int) -> int:
        """Return the slot that holds the label of one row."""
        page, offset = self._page(row)
        return int(page.label_slot[offset])

    def radius_of(self, row: int) -> float:
        """Return the radius of one row."""
        page, offset = self._page(row)
        return float(page.radius[offset])

    def label_of(self, row: int) -> Tensor | None:
        """Return the label of one row."""
        return self._label_slots[self.label_slot_of(row)]

    def row_of(self, key_id: int) -> int:
        """Return the live row of an id.

        Raises: KeyError where no live row has it.
        """
        row = int(torch.searchsorted(self.ids, key_id)) if self.rows else 0
        if row >= self.rows or int(self.ids[row]) != key_id:
            raise KeyError(f"no key has the id {key_id}")
        page, offset = self._page(row)
        if not page.live[offset]:
            raise KeyError(f"the key with the id {key_id} was removed")
        return row


class Journal(Protocol):
    """What keeps every version of a codebook where it outlives the process."""

    def record(self, before: Snapshot, after: Snapshot) -> None:
        """Keep a version before anybody sees it; what is raised refuses it."""

    def revoke(self, after: Snapshot) -> None:
        """Drop a version that was recorded and refused by somebody else."""


class Draft:
    """A writer's next version. Only `Codebook.writing` makes one."""

    def __init__(self, book: Codebook) -> None:
        base = book.snapshot()
        self._book = book
        self._base = base
        self._pages = list(base.pages)
        self._mine: set[int] = set()  # pages that no snapshot shares
        self.counts = self._first = base.counts
        self.version = base.version + 1  # that it will be published as
        require_room("version", self.version, MAX_COUNTER)
        book._label_slots.cut(base.counts.labels)  # what a dropped draft left behind

    def _continued(self) -> Draft:
        """Return a draft of its own that starts from this one."""
        draft = copy(self)
        self._mine.clear()  # the two share the pages now
        draft._pages, draft._mine, draft._first = list(self._pages), set(), self.counts
        return draft

    @property
    def rows(self) -> int:
        """The number of rows, removed ones included."""
        return self.counts.rows

    def _set(self, **counts: Any) -> None:
        self.counts = replace(self.counts, **counts)

    def append(
        self, keys: Tensor, values: Tensor, radii: Tensor, labels: Sequence[Tensor | None] | None
    ) -> range:
        """Add checked rows at the end; return their numbers."""
        book, added = self._book, len(keys)
        require_room("key", book._next_id + added - 1, MAX_NUMBER)
        first, key_first, value_first = self.rows, self.counts.keys, self.counts.values
        book._ids.commit(first + added)
        key_slots = self._store(book._keys, key_first, keys)
        value_slots = self._store(book._values, value_first, values)
        given = torch.arange(book._next_id, book._next_id + added, device="cpu")
        book._ids.tensor[first : first + added, 0] = given
        label_first = self.counts.labels
        if labels is None:
            labels = [None] * added
        book._label_slots.extend(labels)
        at = 0
        while at < added:
            row = first + at
            if row == len(self._pages) * PAGE_ROWS:
                self._pages.append(Page.empty(book.device))
                self._mine.add(len(self._pages) - 1)
            # Rows past the count of every snapshot: written in place, no reader looks there.
            page, offset = self._pages[row // PAGE_ROWS], row % PAGE_ROWS
            here = min(added - at, PAGE_ROWS - offset)
            rows, part = slice(offset, offset + here), slice(at, at + here)
            page.radius[rows] = radii[part]
            page.live[rows] = True
            page.key_slot[rows] = key_slots[part]
            page.value_slot[rows] = value_slots[part]
            page.label_slot[rows] = torch.arange(
                label_first + at, label_first + at + here, device="cpu"
            )
            at += here
        book._next_id += added
        self._set(
            rows=first + added,
            live=self.counts.live + added,
            keys=key_first + added,
            values=value_first + added,
            labels=label_first + added,
            widest=max(self.counts.widest, float(radii.max()) if added else -1.0),
            # A slot that is not its row's number makes `keys` a gather.
            key_moves=self.counts.key_moves or int(key_first != first),
            value_moves=self.counts.value_moves or int(value_first != first),
        )
        return range(first, first + added)

    @staticmethod
    def _store(store: Rows, first: int, rows: Tensor) -> Tensor:
        store.commit(first + len(rows))
        store.tensor[first : first + len(rows)] = rows
        return torch.arange(first, first + len(rows), device="cpu")

    def extend(
        self, keys: Tensor, values: Tensor, labels: Sequence[Tensor | None], ids: Tensor
    ) -> None:
        """Put checked slots and ids behind those there are; `set_columns` makes rows of them."""
        book, counts = self._book, self.counts
        self._store(book._keys, counts.keys, keys)
        self._store(book._values, counts.values, values)
        book._label_slots.extend(labels)
        rows = counts.rows + len(ids)
        book._ids.commit(rows)
        book._ids.tensor[counts.rows : rows, 0] = ids
        while len(self._pages) * PAGE_ROWS < rows:
            self._pages.append(Page.empty(book.device))
            self._mine.add(len(self._pages) - 1)
        if len(ids):
            book._next_id = int(ids[-1]) + 1
        self._set(
            rows=rows,
            keys=counts.keys + len(keys),
            values=counts.values + len(values),
            labels=counts.labels + len(labels),
        )

    def set_columns(self, rows: Tensor, columns: Mapping[str, Tensor], known: int) -> None:
        """Give rows [m] int64, ascending, every field of a page, each [m].

        known: rows below had fields before; those from there on are given their first.
        """
        if not len(rows):
            return
        numbers = rows // PAGE_ROWS
        live, moved = 0, {"key_slot": False, "value_slot": False}
        for number in sorted({*numbers.tolist()}):
            here = numbers == number
            page, _ = self._writable(number * PAGE_ROWS)
            at, before = rows[here] % PAGE_ROWS, rows[here] < known
            was_live = page.live[at.to(page.live.device)].cpu() & before
            live += int(columns["live"][here].sum()) - int(was_live.sum())
            for name in moved:
                usual = torch.where(before, getattr(page, name)[at], rows[here])
                moved[name] |= not torch.equal(columns[name][here], usual)
            for name in COLUMNS:
                field: Tensor = getattr(page, name)
                field[at.to(field.device)] = columns[name][here].to(field.device)
        self._set(
            live=self.counts.live + live,
            widest=max(self.counts.widest, float(columns["radius"].max())),
            key_moves=self.counts.key_moves + moved["key_slot"],
            value_moves=self.counts.value_moves + moved["value_slot"],
        )

    def _writable(self, row: int) -> tuple[Page, int]:
        if not 0 <= row < self.rows:
            raise IndexError(f"row must be in [0, {self.rows}), got {row}")
        number = row // PAGE_ROWS
        if number not in self._mine:
            self._pages[number] = self._pages[number].copy()
            self._mine.add(number)
        return self._pages[number], row % PAGE_ROWS

    def set_radius(self, row: int, radius: float) -> None:
        """Give one row another radius."""
        page, offset = self._writable(row)
        radius = float(radius)
        page.radius[offset] = radius
        # As it is stored: float32 may be more, of a denormal number much more.
        self._set(widest=max(self.counts.widest, ctypes.c_float(radius).value))

    def set_key(self, row: int, key: Tensor) -> None:
        """Move the key of one row, into a new slot."""
        slot = self.counts.keys
        self._store(self._book._keys, slot, key[None])
        self._set(keys=slot + 1)
        self.point_key(row, slot)

    def point_key(self, row: int, slot: int) -> None:
        """Let one row's key be that of a slot in use."""
        page, offset = self._writable(row)
        page.key_slot[offset] = slot
        self._set(key_moves=self.counts.key_moves + 1)

    def set_value(self, row: int, value: Tensor) -> None:
        """Give one row another value: in place if row and slot are this draft's, else anew."""
        page, offset = self._writable(row)
        own = int(page.value_slot[offset])
        if row >= self._first.rows and own >= self._first.values:
            self._store(self._book._values, own, value[None])
            return
        slot = self.counts.values
        self._store(self._book._values, slot, value[None])
        self._set(values=slot + 1)
        self.point_value(row, slot)

    def point_value(self, row: int, slot: int) -> None:
        """Let one row's value be that of a slot in use."""
        page, offset = self._writable(row)
        page.value_slot[offset] = slot
        self._set(value_moves=self.counts.value_moves + 1)

    def set_label(self, row: int, label: Tensor | None) -> None:
        """Give one row another label."""
        slot = self.counts.labels
        self._book._label_slots.extend([label])
        self._set(labels=slot + 1)
        self.point_label(row, slot)

    def point_label(self, row: int, slot: int) -> None:
        """Let one row's label be that of a slot in use."""
        page, offset = self._writable(row)
        page.label_slot[offset] = slot

    def remove(self, row: int) -> None:
        """Take one live row out: it never wins again, and its number stays its own."""
        page, offset = self._writable(row)
        if not page.live[offset]:
            raise KeyError(f"row {row} was removed already")
        page.live[offset] = False
        self._set(live=self.counts.live - 1)

    def snapshot(self) -> Snapshot:
        """Return what has been drafted so far, to look up in before it is published."""
        self._mine.clear()  # the snapshot shares the pages now
        book = self._book
        return Snapshot(
            self.version,
            self.counts,
            tuple(self._pages),
            book._keys.tensor,
            book._values.tensor,
            book._label_slots,
            book._ids.tensor,
            base=self._base,
            key_file=self._base.key_file,
            value_file=self._base.value_file,
            era=self._base.era,
        )


class Codebook:
    """Keys [N, D], values [N, V], radii [N], labels and ids of edits, in one element type.

    `len` counts the live rows; everything indexed by row holds the removed ones too (`live` tells).
    `reserve_rows` is how many keys fit, and as many values; by default 128 GiB of each on the host.

    Raises: ValueError for a width or a reservation below 1, or an element type other than fp32,
    bf16 and fp16.
    """

    @lasting()
    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        reserve_rows: int | None = None,
    ) -> None:
        key_dim, value_dim = scalars.plain(key_dim), scalars.plain(value_dim)
        reserve_rows = scalars.plain(reserve_rows)
        for name, width in (("key_dim", key_dim), ("value_dim", value_dim)):
            if not isinstance(width, int) or width < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {width!r}")
        if reserve_rows is not None and (not isinstance(reserve_rows, int) or reserve_rows < 1):
            raise ValueError(f"reserve_rows must be a whole number >= 1, got {reserve_rows!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
        self.key_dim, self.value_dim, self.dtype = key_dim, value_dim, dtype
        self.device = torch.device(device)
        self._keys = reserve(key_dim, dtype, self.device, reserve_rows)
        self._values = reserve(value_dim, dtype, self.device, reserve_rows)
        self._ids = reserve(1, torch.int64, torch.device("cpu"), reserve_rows)
        self._next_id = 0
        self._label_slots = Labels()
        self._writer = threading.RLock()
        self.was_forked_in_writing = False  # while another thread wrote
        forks.guard(self, "_writer", forks.Order.WRITING, Codebook._drop_draft_in_child)
        self._draft: Draft | None = None
        self._derived: dict[str, tuple[Snapshot, Any]] = {}
        self._followers: dict[str, Callable[[Snapshot], None]] = {}
        self._journal: Journal | None = None
        self._current = Snapshot(
            0,
            _Counts(),
            (),
            self._keys.tensor,
            self._values.tensor,
            self._label_slots,
            self._ids.tensor,
            self._derived,
        )

    @classmethod
    @lasting()
    def restore(
        cls,
        keys: Tensor | MappedFile,
        values: Tensor | MappedFile,
        labels: Labels,
        columns: Mapping[str, Tensor],
        device: torch.device,
        version: int = 0,
    ) -> Codebook:
        """Return a codebook from checked parts: slots, and a column for each field of a page.

        Slots of a file stay where they are; further ones are in memory.
        """
        book = cls(_shape(keys)[1], _shape(values)[1], _dtype(keys), device)
        count = len(columns["id"])
        book._keys = _filled(book._keys, keys)
        book._values = _filled(book._values, values)
        book._ids.commit(count)
        book._ids.tensor[:count, 0] = columns["id"]
        book._next_id = int(columns["id"][-1]) + 1 if count else 0
        book._label_slots = labels
        pages = []
        for start in range(0, count, PAGE_ROWS):
            page = Page.empty(book.device)
            here = slice(0, min(PAGE_ROWS, count - start))
            for name in COLUMNS:
                getattr(page, name)[here] = columns[name][start : start + PAGE_ROWS]
            pages.append(page)
        in_order = torch.arange(count, device="cpu")
        counts = _Counts(
            rows=count,
            live=int(columns["live"].sum()),
            keys=_shape(keys)[0],
            values=_shape(values)[0],
            labels=len(labels),
            key_moves=int(not torch.equal(columns["key_slot"], in_order)),
            value_moves=int(not torch.equal(columns["value_slot"], in_order)),
            widest=float(columns["radius"].max()) if count else -1.0,
        )
        book._current = replace(
            book._current,
            version=version,
            counts=counts,
            pages=tuple(pages),
            key_slots=book._keys.tensor,
            value_slots=book._values.tensor,
            _label_slots=labels,
            key_file=keys if isinstance(keys, MappedFile) else None,
            value_file=values if isinstance(values, MappedFile) else None,
        )
        return book

    def snapshot(self) -> Snapshot:
        """Return the codebook as it is now; what is edited later does not change it."""
        return self._current

    @contextmanager
    def writing(self) -> Iterator[Draft]:
        """Open a draft: published as one new version at the end, dropped if anything is raised.

        Inside another `writing` of the same thread it is the same draft.
        """
        with self._writer, lasting():
            if self._draft is not None:
                yield self._draft
                return
            next_id = self._next_id
            self._draft = draft = Draft(self)
            try:
                yield draft
                published = replace(draft.snapshot(), _derived=self._derived, base=None)
                self._publish(published)
            except BaseException:
                self._next_id = next_id
                raise
            finally:
                self._draft = None

    def _publish(self, published: Snapshot) -> None:
        """Let a version be kept, then followed, then seen; whoever raises refuses it."""
        journal = self._journal
        if journal is not None:
            journal.record(self._current, published)
        try:
            for follow in self._followers.values():
                follow(published)
            self._current = published
        except BaseException:
            if self._current is not published:
                self._refuse(published)
            raise

    def _refuse(self, published: Snapshot) -> None:
        """Go back to the version before one that followers have seen."""
        self._go_back_in_followers()
        if self._journal is not None:
            self._journal.revoke(published)

    def _go_back_in_followers(self) -> None:
        self._current = replace(self._current, era=self._current.era + 1)
        for follow in self._followers.values():
            with suppress(Exception):  # it holds an earlier version then, as it would have anyway
                follow(self._current)

    def _drop_draft_in_child(self, whole: bool) -> None:
        """Be in a forked child as the published version, without the draft of another thread."""
        self.was_forked_in_writing = not whole
        if whole:
            return
        self._draft = None
        self._next_id = int(self._current.ids[-1]) + 1 if self._current.rows else 0
        self._label_slots.cut(self._current.counts.labels)
        self._go_back_in_followers()  # they may have seen what is not published here

    def keep(self, journal: Journal | None) -> None:
        """Let every version be recorded before it is published; None to end that."""
        with self._writer:
            self._journal = journal

    @contextmanager
    def sketching(self) -> Iterator[Draft]:
        """Open a draft that is dropped at the end: to see what a change would come to.

        What it holds may be written over afterwards; take copies. Inside a `writing` of the same
        thread it goes on from what was drafted there, and that stays as it is.
        """
        with self._writer, lasting():
            outer, next_id = self._draft, self._next_id
            self._draft = draft = Draft(self) if outer is None else outer._continued()
            try:
                yield draft
            finally:
                self._draft, self._next_id = outer, next_id
                self._label_slots.cut(draft._first.labels)

    @contextmanager
    def held(self) -> Iterator[Snapshot]:
        """Hold writers off for a moment: to read what they keep beside it, or to replay a graph."""
        with self._writer:
            yield self._current

    def tell(self, name: str, follow: Callable[[Snapshot], None]) -> None:
        """Call `follow` with the newest version, and with every later one before it is published.

        What it raises refuses that version. A follower of the same name is replaced.
        """
        with self._writer:
            follow(self._current)
            self._followers[name] = follow

    @memory_errors()
    def append(
        self,
        keys: Tensor,
        values: Tensor,
        radii: Tensor,
        labels: Sequence[Tensor | None] | Tensor | None = None,
    ) -> Tensor:
        """Add M rows and return their stable ids, [M] int64.

        keys: [M, D], values: [M, V], both finite; radii: [M], finite, negative for a dead key;
        labels: M tensors of label ids, or one tensor [M] or [M, L] of them.

        Raises: ValueError for another width, element type or count, TypeError for no tensor,
        MemoryError where the rows cannot be had. The codebook is as before then.
        """
        keys = checked_rows("keys", keys, self.key_dim, self.dtype).to(self.device)
        values = checked_rows("values", values, self.value_dim, self.dtype).to(self.device)
        radii = checked_radii(radii)
        if not len(keys) == len(values) == len(radii):
            raise ValueError(
                "keys, values and radii must have as many rows, "
                f"got {len(keys)}, {len(values)} and {len(radii)}"
            )
        listed = None if labels is None else [_checked_label(label) for label in labels]
        if listed is not None and len(listed) != len(keys):
            raise ValueError(f"labels must be {len(keys)}, one for each key, got {len(listed)}")
        with self.writing() as draft:
            rows = draft.append(keys, values, radii, listed)
            return self._ids.tensor[rows.start : rows.stop, 0].clone()

    def remove(self, key_id: int) -> None:
        """Take the row of an id out; its number and id are not given again.

        Raises: KeyError where no live row has the id.
        """
        with self.writing() as draft:
            draft.remove(draft.snapshot().row_of(int(key_id)))

    def derived(self, name: str, build: Callable[[Snapshot, Any], Any]) -> Any:
        """Return what a back end computes from the keys of this version; see `Snapshot.derived`."""
        return self._current.derived(name, build)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(_NO_COPY)

    def __len__(self) -> int:
        return len(self._current)

    def __repr__(self) -> str:
        return (
            f"Codebook({len(self)} keys, key_dim={self.key_dim}, value_dim={self.value_dim}, "
            f"dtype={self.dtype}, device={str(self.device)!r}, version={self.version})"
        )

    @property
    def version(self) -> int:
        """A number that grows by one with every published change."""
        return self._current.version

    @property
    def keys(self) -> Tensor:
        """[N, D], removed rows included."""
        return self._current.keys

    @property
    def values(self) -> Tensor:
        """[N, V], removed rows included."""
        return self._current.values

    @property
    def radii(self) -> Tensor:
        """[N] float32, removed rows included."""
        return self._current.radii

    @property
    def labels(self) -> list[Tensor | None]:
        """N label tensors, removed rows included."""
        return self._current.labels

    @property
    def ids(self) -> Tensor:
        """[N] int64, ascending, removed rows included."""
        return self._current.ids

    @property
    def live(self) -> Tensor:
        """[N] bool, False for a removed row."""
        return self._current.live


def _fetched(store: Tensor, slots: Tensor, file: MappedFile | None) -> Tensor:
    """Return slots [n] of a store, as [n, width], tested where they lie in a file."""
    if file is None:
        return store[slots]
    file.test_slots(slots)
    found = store[slots]
    file.check_not_lost()
    return found


def _shape(rows: Tensor | MappedFile) -> tuple[int, int]:
    if isinstance(rows, MappedFile):
        return rows.shape.rows, rows.shape.width
    return rows.shape[0], rows.shape[1]


def _dtype(rows: Tensor | MappedFile) -> torch.dtype:
    return rows.shape.dtype if isinstance(rows, MappedFile) else rows.dtype


def _filled(store: Rows, rows: Tensor | MappedFile) -> Rows:
    """Return a store whose first slots are some rows: in it, or where they lie in a file."""
    if isinstance(rows, MappedFile):
        shape = rows.shape
        made = MappedRows(rows.descriptor, HEADER_BYTES, shape.rows, shape.width, shape.dtype)
        rows.guard(made.region, made.address)
        return made
    store.commit(len(rows))
    store.tensor[: len(rows)] = rows
    return store


def require_room(what: str, number: int, limit: int) -> None:
    """Raise ValueError where a number is not below the limit of those that are read again."""
    if number >= limit:
        raise ValueError(
            f"the next {what} would be number {number}, and a saved codebook holds numbers below "
            f"{limit}: it can be read, and not be changed any more"
        )


def checked_rows(name: str, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return keys or values [M, width] in a codebook's element type.

    Raises: TypeError for no tensor, ValueError for another width or element type, or for rows that
    are not finite.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor [M, {width}], got {type(rows).__name__}")
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{name} must be [M, {width}], got {tuple(rows.shape)}")
    # bf16 and fp16 fit fp32 exactly; anything else would store another key than was given.
    if rows.dtype != dtype and not (
        dtype == torch.float32 and rows.dtype in (torch.bfloat16, torch.float16)
    ):
        raise ValueError(f"{name} must be {dtype} like the codebook, got {rows.dtype}")
    # The extremes are not finite where anything is not; of float16 they are had 20 times as fast as
    # a truth for every element.
    if rows.numel() and not torch.stack(torch.aminmax(rows)).isfinite().all():
        row = int((~rows.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")
    return rows.detach().to(dtype)


def checked_radii(radii: Tensor) -> Tensor:
    """Return radii [M] as float32.

    Raises: ValueError for anything but finite floats [M].
    """
    if not isinstance(radii, Tensor):
        given = radii
        radii = torch.as_tensor(given, device="cpu")
        if radii.is_floating_point() and not isinstance(given, np.ndarray):
            # Else Python's numbers are rounded to whatever the process has for its default type.
            radii = torch.as_tensor(given, dtype=torch.float32, device="cpu")
    if radii.ndim != 1 or not radii.dtype.is_floating_point:
        raise ValueError(f"radii must be floats [M], got {radii.dtype} {tuple(radii.shape)}")
    narrow = radii.detach().to(torch.float32)
    if not narrow.isfinite().all():
        row = int((~narrow.isfinite()).nonzero()[0])
        raise ValueError(f"radii must be finite in float32, got {radii[row]} in row {row}")
    return narrow


def _index_of(slot: int) -> Tensor:
    return torch.tensor([slot], dtype=torch.int64, device="cpu")


def _checked_label(label: Tensor | None) -> Tensor | None:
    if label is None:
        return None
    ids = label if isinstance(label, Tensor) else torch.as_tensor(label, device="cpu")
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"labels must be whole numbers, got {ids.dtype}")
    return ids.detach().to("cpu", torch.int64, copy=True).reshape(-1)
