"""A draft: a writer's next version, of which nothing is seen until it is published.

It adds to the slots behind what any version has, and copies a page before it writes to rows that
one has. A draft that is dropped leaves no trace.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grace_fast.codebook.checks import MAX_COUNTER, MAX_NUMBER, require_room
from grace_fast.codebook.pages import COLUMNS, PAGE_ROWS, Page
from grace_fast.codebook.slots import Slots, add
from grace_fast.codebook.snapshot import Snapshot


class Draft:
    """A writer's next version. Only `Codebook.writing` makes one."""

    def __init__(self, slots: Slots, base: Snapshot) -> None:
        self._slots = slots
        self._base = base
        self._pages = list(base.pages)
        self._mine: set[int] = set()  # pages that no snapshot shares
        self.counts = self._first = base.counts
        self.version = base.version + 1  # that it will be published as
        require_room("version", self.version, MAX_COUNTER)
        slots.labels.cut(base.counts.labels)  # what a dropped draft left behind

    def continued(self) -> Draft:
        """Return a draft of its own that starts from this one."""
        draft = copy(self)
        self._mine.clear()  # the two share the pages now
        draft._pages, draft._mine, draft._first = list(self._pages), set(), self.counts
        return draft

    def drop_labels(self) -> None:
        """Take back what this has added to the labels, which others add to next."""
        self._slots.labels.cut(self._first.labels)

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
        added, before, next_id = len(keys), self.counts, self._slots.next_id
        require_room("key", next_id + added - 1, MAX_NUMBER)
        ids = torch.arange(next_id, next_id + added, device="cpu")
        self.extend(keys, values, [None] * added if labels is None else labels, ids)
        first = before.rows
        for start in range(first - first % PAGE_ROWS, first + added, PAGE_ROWS):
            # Rows past the count of every snapshot: written in place, no reader looks there.
            page, begin = self._pages[start // PAGE_ROWS], max(first, start)
            end = min(first + added, start + PAGE_ROWS)
            rows = slice(begin - start, end - start)
            page.radius[rows] = radii[begin - first : end - first]
            page.live[rows] = True
            for name, slot in (
                ("key_slot", before.keys),
                ("value_slot", before.values),
                ("label_slot", before.labels),
            ):
                slots = torch.arange(slot + begin - first, slot + end - first, device="cpu")
                getattr(page, name)[rows] = slots
        self._set(
            live=self.counts.live + added,
            widest=max(self.counts.widest, float(radii.max()) if added else -1.0),
            # A slot that is not its row's number makes `keys` a gather.
            key_moves=self.counts.key_moves or int(before.keys != first),
            value_moves=self.counts.value_moves or int(before.values != first),
        )
        return range(first, first + added)

    def extend(
        self, keys: Tensor, values: Tensor, labels: Sequence[Tensor | None], ids: Tensor
    ) -> None:
        """Put checked slots and ids behind those there are; `set_columns` makes rows of them."""
        slots, counts = self._slots, self.counts
        rows = counts.rows + len(ids)
        add(slots.ids, counts.rows, ids[:, None])
        add(slots.keys, counts.keys, keys)
        add(slots.values, counts.values, values)
        slots.labels.extend(labels)
        while len(self._pages) * PAGE_ROWS < rows:
            self._pages.append(Page.empty(slots.device))
            self._mine.add(len(self._pages) - 1)
        if len(ids):
            slots.next_id = int(ids[-1]) + 1
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
        add(self._slots.keys, slot, key[None])
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
            add(self._slots.values, own, value[None])
            return
        slot = self.counts.values
        add(self._slots.values, slot, value[None])
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
        self._slots.labels.extend([label])
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
        slots = self._slots
        return replace(
            self._base,
            version=self.version,
            counts=self.counts,
            pages=tuple(self._pages),
            key_slots=slots.keys.tensor,
            value_slots=slots.values.tensor,
            label_slots=slots.labels,
            id_slots=slots.ids.tensor,
            cached=None,
            base=self._base,
        )
