"""One edit, what it did to rows, and the steps that a history is made of.

An id names an edit; several edits may share a row. What an edit did to rows is kept as events, so
that any edit can be taken back. Every change of a history is a step: a journal keeps them, and
`History.follow` makes the same history of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from grace_fast.codebook.ascending import Ascending
from grace_fast.semantics import Outcome

NO_EDIT = -1  # the id of what was on a row before its first edit: keys appended by hand


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit: what was asked, what was decided and what its training reached."""

    id: int
    outcome: Outcome
    row: int  # the codebook row it lives on
    distance: float  # from its query to the nearest key before it; inf where it was added
    radius: float  # of its row, after it
    query: Tensor  # [D], as the layer saw it
    label: Tensor | None  # the label of its row, after it, as ids: see `labels`
    value_before: int | None  # slot of the row's value before it; None where it made the row
    value_after: int  # slot of the value it trained
    loss: float = float("nan")  # of the kept value; NaN where nothing was trained
    steps: int = 0  # optimiser steps taken
    correct: bool = False  # the model's own prediction was the target, with the kept value
    prompt: int = 0  # checksum of the prompt's tokens, to tell a repeat from another prompt
    text: tuple[str, str] | None = None  # prompt and target, where storing text was asked for


@dataclass(frozen=True, eq=False)
class Refused:
    """What stands for an edit of a stream that could not be made; nothing has changed for it."""

    at: int  # its place in the stream, from 0
    error: Exception  # why
    outcome: Literal["refused"] = "refused"
    correct: bool = False

    def __str__(self) -> str:
        return f"edit {self.at} of the stream was refused: {self.error}"


@dataclass(frozen=True)
class Event:
    """One change of a row's ball: at its start, at a split, an expansion or a move."""

    edit: int  # the edit that caused it
    row: int
    radius: float  # from then on
    key_slot: int
    owner_row: int | None  # it lasts as long as this row does; as its edit does where it is None


@dataclass(frozen=True)
class Base:
    """What a row held before the first edit on it."""

    value_slot: int
    label_slot: int


_NO_EDITS: Ascending[int] = Ascending()
_NO_EVENTS: Ascending[Event] = Ascending()


@dataclass(frozen=True)
class RowLife:
    """What happened on one row and still holds, oldest first."""

    edits: Ascending[int] = _NO_EDITS
    events: Ascending[Event] = _NO_EVENTS  # by the edit that caused each
    base: Base | None = None  # where the row was there before any edit
    neighbour: int = -1  # the row that was split to make room for this one


@dataclass(frozen=True)
class EditRecorded:
    """The step of an edit that was applied and trained."""

    edit: Edit
    label_slot: int  # where the store keeps its row's label


@dataclass(frozen=True)
class BaseRecorded:
    """The step of a row that was there before its first edit."""

    row: int
    base: Base


@dataclass(frozen=True)
class Undone:
    """The step of an edit that was taken back."""

    edit: int


@dataclass(frozen=True)
class Reset:
    """The step before those of another version that was gone back to."""


Step = EditRecorded | Event | BaseRecorded | Undone | Reset
