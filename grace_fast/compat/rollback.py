"""The history of an adaptor whose rows are numbered anew when one of them goes.

`History` does the undoing. A row has the number of the edit that made it there, so that rows are in
order, and slots are of what is kept here: of a key where it began, of a value, once another edit
trains it on, the number of the edit that trained it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.apply import Applied, RowState
from grace_fast.edits.edit import Edit
from grace_fast.edits.history import History


class Rollback:
    """What each edit did to rows of keys, values and radii, under the names that callers gave."""

    def __init__(self) -> None:
        self.history = History()
        self._names: list[Any] = []  # by edit
        self._keys: list[Tensor] = []  # by slot
        self._values: dict[int, Tensor] = {}

    @staticmethod
    def of(keys: Tensor, radii: Sequence[float], names: Sequence[Any]) -> Rollback:
        """Return that of rows which were there, each taken for an edit of its own."""
        made = Rollback()
        for at, (radius, name) in enumerate(zip(radii, names, strict=True)):
            state = RowState(radius, at, at, 0)
            made._add(Applied(at, "added", math.inf, radius, None, {}, {at: state}), name, keys)
        return made

    def row_names(self) -> list[Any]:
        """Return the name of the oldest edit that remains on each row."""
        return [self._names[life.edits[0]] for life in self.history.rows.values()]

    def names(self) -> list[Any]:
        """Return the names of the edits that remain."""
        return [self._names[edit] for edit in self.history.edits]

    def add(self, applied: Applied, name: Any, after: Snapshot) -> None:
        """Note an edit that was done to rows, by position, and is to be trained."""
        if applied.row in applied.before:
            newest = self.history.rows[[*self.history.rows][applied.row]].edits[-1]
            self._values[newest] = after.row(applied.row).value.clone()
        self._add(applied, name, after.keys)

    def _add(self, applied: Applied, name: Any, keys: Tensor) -> None:
        edit = self.history.next_id
        rows = [*self.history.rows, edit]  # by position
        before, after = {}, {}
        for position, now in applied.after.items():
            row, was, slot = rows[position], applied.before.get(position), len(self._keys)
            if was is not None:
                held = self.history.rows[row].events[-1].key_slot
                before[row] = was._replace(key_slot=held)
                slot = held if now.key_slot == was.key_slot else slot
            if slot == len(self._keys):
                self._keys.append(keys[position].clone())
            after[row] = now._replace(key_slot=slot)
        row = rows[applied.row]
        self.history.note(replace(applied, row=row, before=before, after=after), edit)
        told = (edit, applied.outcome, row, applied.distance, applied.radius)
        self.history.record(Edit(*told, keys[applied.row], None, None, edit), label_slot=0)
        self._names[edit:] = [name]  # in place of those of edits that failed

    def take_back(self, name: Any, keys: Tensor, values: Tensor, radii: Tensor) -> list[int]:
        """Take every edit of a name back in keys, values and radii; return the rows that stay."""
        history, there = self.history, {row: at for at, row in enumerate(self.history.rows)}
        for number in [edit for edit in history.edits if self._names[edit] == name]:
            newest = history.rows[history.edits[number].row].edits[-1]
            undone, restored = history.take_back(number)
            for row, held in restored.items():
                if held is not None:
                    keys[there[row]], radii[there[row]] = self._keys[held.key_slot], held.radius
                if held is not None and row == undone.row and number == newest:
                    values[there[row]] = self._values.pop(held.value_slot)
        return [there[row] for row in history.rows]

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Put what is kept where a model goes."""
        self._keys = [fn(key) for key in self._keys]
        self._values = {edit: fn(value) for edit, value in self._values.items()}
