"""A snapshot: the codebook at one version. It never changes, and readers need no lock.

It is a row count and a tuple of pages over slots that are only ever added to. What reads many rows
returns columns; `Snapshot.row` is one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor

from grace_fast.codebook.buffers import bounded
from grace_fast.codebook.caches import Cached
from grace_fast.codebook.labels import Labels
from grace_fast.codebook.mapped import MappedFile
from grace_fast.codebook.once import cached_property
from grace_fast.codebook.pages import PAGE_ROWS, Counts, Page, gathered
from grace_fast.codebook.slots import fetched


class NotCopied:
    """What lies at addresses of its own, and can neither be copied nor pickled."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a codebook, and a model it is attached to, cannot be copied or pickled: its rows lie "
            "at addresses that are reserved for it. Copy the model before `attach`, or save the "
            "codebook (`Codebook.save`, `grace.save_pretrained`) and open it for the copy "
            "(`Codebook.open`, `from_pretrained`)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Snapshot(NotCopied):
    """The codebook at one version. Fields indexed by row hold the removed rows too."""

    version: int
    counts: Counts
    pages: tuple[Page, ...]
    key_slots: Tensor  # [capacity, D]
    value_slots: Tensor  # [capacity, V]
    label_slots: Labels  # later ones of the codebook among them
    id_slots: Tensor  # [capacity, 1] int64, by row
    # What back ends compute, shared by the published versions of a codebook; None for a draft,
    # whose rows may yet be dropped and given to other keys.
    cached: Cached | None = None
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

    def __len__(self) -> int:
        return self.counts.live

    @property
    def rows(self) -> int:
        """The number of rows ever made, removed ones included."""
        return self.counts.rows

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
        return bounded(self.id_slots[: self.rows, 0])

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
        return fetched(self.key_slots, slots.to(self.device), self.key_file)

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

    @cached_property
    def values(self) -> Tensor:
        """[N, V]; a view of the store, or a gather once a value was trained again."""
        if not self.counts.value_moves:
            return bounded(self.value_slots[: self.rows])
        return self.value_slots[self.column("value_slot").to(self.device)]

    @cached_property
    def labels(self) -> list[Tensor | None]:
        """The label of each row, None where it has none."""
        return [self.label_slots[slot] for slot in self.column("label_slot").tolist()]

    def row(self, row: int) -> Row:
        """Return one row.

        Raises: IndexError for a number that no row has.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"row must be in [0, {self.rows}), got {row}")
        return Row(self, self.pages[row // PAGE_ROWS], row % PAGE_ROWS)

    def values_of(self, rows: Tensor) -> Tensor:
        """Return the values of rows [B], as [B, V]; row 0's for -1, to be masked by the caller."""
        slots = rows.clamp(min=0)
        if self.counts.value_moves:
            slots = gathered(self.pages, "value_slot", slots, self.device).to(self.device)
        return fetched(self.value_slots, slots, self.value_file)

    def radii_of(self, rows: Tensor) -> Tensor:
        """Return the radii of rows [B], as [B] float32; -1 for row -1."""
        found = gathered(self.pages, "radius", rows.clamp(min=0), self.device)
        return found.masked_fill(rows.to(found.device) < 0, -1.0)

    def row_of(self, key_id: int) -> int:
        """Return the live row of an id.

        Raises: KeyError where no live row has it.
        """
        row = int(torch.searchsorted(self.ids, key_id)) if self.rows else 0
        if row >= self.rows or int(self.ids[row]) != key_id:
            raise KeyError(f"no key has the id {key_id}")
        if not self.row(row).live:
            raise KeyError(f"the key with the id {key_id} was removed")
        return row


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of a version; a field is read when it is asked for."""

    _of: Snapshot
    _page: Page
    _offset: int

    @property
    def radius(self) -> float:
        """The radius, negative for a dead key."""
        return float(self._page.radius[self._offset])

    @property
    def live(self) -> bool:
        """Whether it was not removed."""
        return bool(self._page.live[self._offset])

    @property
    def key_slot(self) -> int:
        """The slot that holds the key."""
        return int(self._page.key_slot[self._offset])

    @property
    def value_slot(self) -> int:
        """The slot that holds the value."""
        return int(self._page.value_slot[self._offset])

    @property
    def label_slot(self) -> int:
        """The slot that holds the label."""
        return int(self._page.label_slot[self._offset])

    @property
    def key(self) -> Tensor:
        """The key, [D]."""
        return _one(self._of.key_slots, self.key_slot, self._of.key_file)

    @property
    def value(self) -> Tensor:
        """The value, [V]."""
        return _one(self._of.value_slots, self.value_slot, self._of.value_file)

    @property
    def label(self) -> Tensor | None:
        """The label, [L] int64; None where there is none."""
        return self._of.label_slots[self.label_slot]


def _one(store: Tensor, slot: int, file: MappedFile | None) -> Tensor:
    if file is None:
        return bounded(store[slot])
    return fetched(store, torch.tensor([slot], dtype=torch.int64, device="cpu"), file)[0]
