"""Columns of edits and events: one schema for the base of a directory and for its journal.

In a base each column is a tensor of its own, `edits.id`. A version of a journal has few edits: all
its whole numbers are in one tensor, `edits` [E, 9], and its fractions in `edits.number` [E, 3]. A
new field of `Edit` or `Event` needs a line here and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grace_fast.edits.edit import Edit, EditRecorded, Event
from grace_fast.semantics import Outcome
from grace_fast.store.checks import column, column_or_empty

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
NONE = -1  # the number of a field that is None
Columns = dict[str, NDArray[Any]]  # by the field's name, [n] each


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Field:
    """A field of an edit or an event as a column of numbers."""

    name: str
    dtype: torch.dtype  # in a base
    place: int  # in a journal: among the whole numbers, or among the fractions
    number: Callable[[Any], Any] = _same  # of a value of the field
    value: Callable[[Any], Any] = _same  # of a number
    attribute: str = ""  # of the edit or event, where it has another name on the disk


OR_NONE = (
    lambda value: NONE if value is None else value,
    lambda number: None if number == NONE else number,
)
_INTEGER, _FRACTION, _TRUTH = torch.int64, torch.float64, torch.bool


@dataclass(frozen=True)
class Schema:
    """The fields of what a history is of, and the tensors that hold them."""

    name: str  # of the whole numbers in a journal, and before the names in a base
    fractions: str  # in a journal; [n] where there is one, else [n, fractions]
    fields: tuple[Field, ...]

    def numbers(self, items: Sequence[Mapping[str, Any]]) -> Columns:
        """Return items, each by the names of its fields, as columns."""
        return {
            field.name: np.asarray(
                [field.number(item[field.attribute or field.name]) for item in items],
                dtype=_NUMPY[field.dtype],
            )
            for field in self.fields
        }

    def values(self, columns: Columns, at: int) -> dict[str, Any]:
        """Return the fields of one item."""
        return {
            each.attribute or each.name: each.value(columns[each.name].item(at))
            for each in self.fields
        }

    def to_base(self, columns: Columns) -> dict[str, Tensor]:
        """Return columns as the tensors of a base."""
        return {f"{self.name}.{name}": torch.from_numpy(each) for name, each in columns.items()}

    def from_base(self, tensors: Mapping[str, Tensor]) -> Columns:
        """Return the columns of a base.

        Raises: CodebookCorrupt naming the column that is missing, or is another one.
        """
        first = self.fields[0]
        count = len(column(tensors, f"{self.name}.{first.name}", first.dtype))
        return {
            each.name: column(tensors, f"{self.name}.{each.name}", each.dtype, count).numpy()
            for each in self.fields
        }

    def to_record(self, columns: Columns) -> dict[str, Tensor]:
        """Return columns as the tensors of a version."""
        made = {}
        for name, fields, dtype in self._tensors():
            parts = [torch.from_numpy(columns[field.name]).to(dtype) for field in fields]
            made[name] = (
                parts[0] if name != self.name and len(parts) == 1 else torch.stack(parts, 1)
            )
        return made

    def from_record(self, tensors: Mapping[str, Tensor]) -> Columns:
        """Return the columns of a version; a tensor without items is left out of one.

        Raises: CodebookCorrupt naming the tensor that is another one.
        """
        columns, count = {}, None
        for name, fields, dtype in self._tensors():
            widths = () if name != self.name and len(fields) == 1 else (len(fields),)
            found = column_or_empty(tensors, name, dtype, *widths, count=count)
            count = len(found)
            parts = found.reshape(count, len(fields)).unbind(1)
            for field, part in zip(fields, parts, strict=True):
                columns[field.name] = part.to(field.dtype).numpy()
        return {field.name: columns[field.name] for field in self.fields}

    def _tensors(self) -> list[tuple[str, list[Field], torch.dtype]]:
        """Return the tensors of a version: their names, fields and element types."""
        ordered = sorted(self.fields, key=lambda field: field.place)
        whole = [field for field in ordered if field.dtype != _FRACTION]
        fractions = [field for field in ordered if field.dtype == _FRACTION]
        return [(self.name, whole, _INTEGER), (self.fractions, fractions, _FRACTION)]


EDITS = Schema(
    "edits",
    "edits.number",
    (
        Field("id", _INTEGER, 0),
        Field("row", _INTEGER, 2),
        Field("distance", _FRACTION, 0),
        Field("radius", _FRACTION, 1),
        Field("value_after", _INTEGER, 4),
        Field("loss", _FRACTION, 2),
        Field("steps", _INTEGER, 6),
        Field("correct", _TRUTH, 7),
        Field("prompt", _INTEGER, 8),
        Field("value_before", _INTEGER, 3, *OR_NONE),
        Field("label_slot", _INTEGER, 5),  # of `EditRecorded`
        Field("outcome", _INTEGER, 1, OUTCOMES.index, OUTCOMES.__getitem__),
    ),
)
EVENTS = Schema(
    "events",
    "events.radius",
    (
        Field("edit", _INTEGER, 0),
        Field("row", _INTEGER, 1),
        Field("radius", _FRACTION, 0),
        Field("key_slot", _INTEGER, 2),
        Field("lasts_with", _INTEGER, 3, *OR_NONE, attribute="owner_row"),
    ),
)
BASES = ("row", "value_slot", "label_slot")  # the columns of `bases` [n, 3], in both
_NUMPY = {
    dtype: torch.zeros(0, dtype=dtype, device="cpu").numpy().dtype
    for dtype in (_INTEGER, _FRACTION, _TRUTH)
}


def edit_columns(edits: Sequence[tuple[Edit, int]]) -> Columns:
    """Return edits, each with the slot of its label, as columns."""
    return EDITS.numbers([vars(edit) | {"label_slot": slot} for edit, slot in edits])


def recorded(
    columns: Columns, at: int, query: Tensor, labels: Any, texts: Mapping[str, Any]
) -> EditRecorded:
    """Return one edit of columns.

    query: [D], its own; labels: by slot; texts: prompt and target by id.
    """
    fields = EDITS.values(columns, at)
    slot, text = fields.pop("label_slot"), texts.get(str(fields["id"]))
    edit = Edit(
        **fields,
        query=query,
        label=labels[slot],
        text=None if text is None else (str(text[0]), str(text[1])),
    )
    return EditRecorded(edit, slot)


def event(columns: Columns, at: int) -> Event:
    """Return one event of columns."""
    return Event(**EVENTS.values(columns, at))
