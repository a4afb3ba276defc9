"""The history of an adaptor whose rows are numbered anew when one of them goes.

`History` does the undoing. Its rows keep their numbers here, and its slots are of what was kept: a
key where it began, a value once another edit trains it on (the slot is the edit's own number).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grace_fast.codebook.codebook import Snapshot
from grace_fast.edits.apply import Applied, RowState
from grace_fast.edits.edit import Edit
from grace_fast.edits.history import History


class Rollback:
    """What each edit did to rows of keys, values and radii, under the names that callers gave.

    keys: [N, D], radii: [N] and names of the rows there are, each taken for an edit of its own.
    """

    def __init__(self, keys: Tensor, radii: Sequence[float], names: Sequence[Any]) -> None:
        self.history = History()
        self.rows: list[int] = []  # by position, their numbers in the history
        self._names: list[Any] = []  # by edit
        self._keys: list[Tensor] = []  # by slot
        self._values: dict[int, Tensor] = {}
        self._made = 0  # rows, ever
        for at, (radius, name) in enumerate(zip(radii, names, strict=True)):
            state = RowState(radius, at, at, 0)
            self._add(Applied(at, "added", math.inf, radius, None, {}, {at: state}), name, keys)

    def row_names(self) -> list[Any]:
        """Return the name of the oldest edit that remains on each row."""
        return [self._names[self.history.rows[row].edits[0]] for row in self.rows]

    def names(self) -> list[Any]:
        """Return the names of the edits that remain."""
        return [self._names[edit] for edit in self.history.edits]

    def add(self, applied: Applied, name: Any, after: Snapshot) -> None:
        """Note an edit that was done to rows, by position, and is to be trained."""
        if applied.row in applied.before:
            newest = self.history.rows[self.rows[applied.row]].edits[-1]
            self._values[newest] = after.value_of(applied.row).clone()
        self._add(applied, name, after.keys)

    def _add(self, applied: Applied, name: Any, keys: Tensor) -> None:
        edit, made = self.history.next_id, applied.row not in applied.before
        if made:
            self.rows.append(self._made)
            self._made += 1
        before, after = {}, {}
        for position, now in applied.after.items():
            row, was = self.rows[position], applied.before.get(position)
            if was is not None:
                newest = self.history.rows[row].events[-1]
                before[row] = was._replace(key_slot=newest.key_slot)
            if was is None or now.key_slot != was.key_slot:
                after[row] = now._replace(key_slot=len(self._keys))
                self._keys.append(keys[position].clone())
            else:
                after[row] = now._replace(key_slot=before[row].key_slot)
        row = self.rows[applied.row]
        self.history.note(replace(applied, row=row, before=before, after=after), edit)
        fields = (edit, applied.outcome, row, applied.distance, applied.radius)
        self.history.record(Edit(*fields, keys[applied.row], None, None, edit), label_slot=0)
        del self._names[edit:]  # of edits that failed
        self._names.append(name)

    def take_back(self, name: Any, keys: Tensor, values: Tensor, radii: Tensor) -> list[int]:
        """Take every edit of a name back in keys, values and radii; return the rows that stay."""
        edits, there = self.history.edits, list(self.rows)
        for number in [edit for edit in edits if self._names[edit] == name]:
            newest = self.history.rows[edits[number].row].edits[-1]
            undone, restored = self.history.take_back(number)
            for row, held in restored.items():
                if held is None:
                    continue
                at = there.index(row)
                keys[at], radii[at] = self._keys[held.key_slot], held.radius
                if row == undone.row and number == newest:
                    values[at] = self._values.pop(held.value_slot)
        staying = [at for at, row in enumerate(there) if row in self.history.rows]
        self.rows = [there[at] for at in staying]
        return staying

    def truncate(self, rows: int) -> None:
        """Forget the rows that an edit made which failed."""
        self._made -= len(self.rows) - rows
        del self.rows[rows:]

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Put what is kept where a model goes."""
        self._keys = [fn(key) for key in self._keys]
        self._values = {edit: fn(value) for edit, value in self._values.items()}


def nothing() -> Rollback:
    """Return the history of no rows."""
    return Rollback(torch.empty(0, 0, dtype=torch.float32, device="cpu"), [], [])
