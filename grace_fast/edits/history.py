"""The history of a codebook's edits: what was recorded, what it did to rows, and undo.

A row's radius and key are those of the newest remaining event on it, its value and label those of
its newest remaining edit. A row goes when its last edit goes, and with it the split that made room
for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from grace_fast.codebook.checks import MAX_COUNTER, require_room
from grace_fast.codebook.lazy_table import LazyTable
from grace_fast.edits import apply as engine
from grace_fast.edits.apply import Applied, Ball, Editable, RowState
from grace_fast.edits.edit import (
    NO_EDIT,
    Base,
    BaseRecorded,
    Edit,
    EditRecorded,
    Event,
    Reset,
    RowLife,
    Step,
    Undone,
)
from grace_fast.semantics import Rules


class History:
    """The edits that remain, in order, and what they did to each row.

    edits, rows, label_slots: what came in columns; `store.history_columns` makes them of a file.
    """

    def __init__(
        self,
        edits: LazyTable[Edit] | None = None,
        rows: LazyTable[RowLife] | None = None,
        label_slots: LazyTable[int] | None = None,
        next_id: int = 0,
    ) -> None:
        self.edits = LazyTable[Edit]() if edits is None else edits
        self.rows = LazyTable[RowLife]() if rows is None else rows
        # By edit: where the store keeps its row's label.
        self.label_slots = LazyTable[int]() if label_slots is None else label_slots
        self.next_id = next_id
        self.keeps_steps = False  # somebody asks for them
        self._steps: list[Step] = []
        self._attempts: list[tuple[tuple[LazyTable[Any], ...], list[int], int, int]] = []

    def take_steps(self) -> list[Step]:
        """Return the steps since this was last asked for."""
        taken, self._steps = self._steps, []
        return taken

    def steps(self) -> Iterator[Step]:
        """Yield steps that make this history of an empty one."""
        for row, life in self.rows.items():
            if life.base is not None:
                yield BaseRecorded(row, life.base)
            yield from life.events
        for number, edit in self.edits.items():
            yield EditRecorded(edit, self.label_slots[number])

    def follow(self, step: Step) -> None:
        """Do what a step did to the history that it was taken from.

        Raises: KeyError or ValueError for the step of another history.
        """
        if isinstance(step, EditRecorded):
            self.record(step.edit, step.label_slot)
        elif isinstance(step, Event):
            self.add_event(step)
        elif isinstance(step, BaseRecorded):
            self.set_base(step.row, step.base)
        elif isinstance(step, Undone):
            self._forget(step.edit)
        else:
            self.empty()

    @contextmanager
    def attempting(self, keep: bool = True) -> Iterator[None]:
        """Take back what is done within where it raises; in any case where it is not to be kept.

        Where anybody else can see the history, its codebook's writers are held off meanwhile.
        """
        parts: tuple[LazyTable[Any], ...] = (self.edits, self.rows, self.label_slots)
        marks = [part.mark() for part in parts]
        self._attempts.append((parts, marks, self.next_id, len(self._steps)))
        kept = False
        try:
            yield
            kept = keep
        finally:
            self._end_attempt(kept)

    def _end_attempt(self, kept: bool) -> None:
        parts, marks, next_id, noted = self._attempts.pop()
        if not kept:
            self.edits, self.rows, self.label_slots = parts
            for part, mark in zip(parts, marks, strict=True):
                part.take_back(mark)
            self.next_id = next_id
            del self._steps[noted:]
        for part in parts:
            part.let_go()

    def take_back_attempts(self) -> None:
        """Take back what is done within every `attempting`: for a child that lacks its thread."""
        while self._attempts:
            self._end_attempt(kept=False)

    def copy(self) -> History:
        """Return a history that further edits and undos of this one do not change."""
        parts = (self.edits.copy(), self.rows.copy(), self.label_slots.copy())
        return History(*parts, self.next_id)

    def empty(self) -> None:
        """Forget every edit, and give none of their ids again."""
        self.edits, self.rows, self.label_slots = LazyTable(), LazyTable(), LazyTable()
        self._add_step(Reset())

    def go_back(self, earlier: History) -> None:
        """Hold what an earlier history of this codebook holds; ids that were given stay so."""
        self.empty()
        twin = earlier.copy()
        self.edits, self.rows, self.label_slots = twin.edits, twin.rows, twin.label_slots
        for step in earlier.steps() if self.keeps_steps else ():
            self._add_step(step)

    def _add_step(self, step: Step) -> None:
        if self.keeps_steps:
            self._steps.append(step)

    def record(self, edit: Edit, label_slot: int) -> None:
        """Keep an applied edit with what its training reached.

        Raises: ValueError where there is an edit of its id, or a later one on its row, or where no
        id is left for the one after it.
        """
        require_room("edit", edit.id + 1, MAX_COUNTER)
        life = self._life(edit.row)
        if edit.id in self.edits or (life.edits and life.edits[-1] >= edit.id):
            raise ValueError(f"an edit must come after those of row {edit.row}, got {edit.id}")
        self.edits[edit.id] = edit
        self.label_slots[edit.id] = label_slot
        self.rows[edit.row] = replace(life, edits=life.edits.adding(edit.id, edit.id))
        self.next_id = max(self.next_id, edit.id + 1)
        self._add_step(EditRecorded(edit, label_slot))

    def _life(self, row: int) -> RowLife:
        return self.rows.get(row, _UNTOUCHED)

    def add_event(self, event: Event) -> None:
        """Note a change of a row's ball.

        Raises: ValueError where it is owed to no later edit than the one before it on the row.
        """
        life = self._life(event.row)
        self.rows[event.row] = replace(life, events=life.events.adding(event.edit, event))
        if event.owner_row not in (event.row, None):
            made = self._life(event.owner_row)
            self.rows[event.owner_row] = replace(made, neighbour=event.row)
        self._add_step(event)

    def set_base(self, row: int, base: Base) -> None:
        """Note what a row held before any edit."""
        self.rows[row] = replace(self._life(row), base=base)
        self._add_step(BaseRecorded(row, base))

    def apply(
        self,
        draft: Editable,
        rules: Rules,
        query: Tensor,
        label: Tensor,
        fresh_value: Tensor,
        edit: int,
    ) -> Applied:
        """Do what `edits.apply` does, and note what it did to rows; edit: the id it will have."""
        applied = engine.apply(draft, rules, query, label, fresh_value)
        self.note(applied, edit)
        return applied

    def note(self, applied: Applied, edit: int) -> None:
        """Note what an edit did to rows."""
        for row, was in applied.before.items():
            if not self._life(row).events:  # no edit made it
                self.set_base(row, Base(was.value_slot, was.label_slot))
                self.add_event(Event(NO_EDIT, row, *was.ball, owner_row=row))
        owner = None if applied.row in applied.before else applied.row
        for row, now in applied.after.items():
            if owner is not None or now != applied.before[row].ball:
                self.add_event(Event(edit, row, *now, owner_row=owner))

    def undo(self, draft: Editable, edit_id: int) -> Edit:
        """Take one edit back in a draft and in the history; return it.

        Raises: KeyError where no remaining edit has the id.
        """
        edit, restored = self.take_back(edit_id)
        before = draft.snapshot()
        for row, held in restored.items():
            now = before.row(row)
            if held is None:
                if now.live:  # else it was removed by its key's id
                    draft.remove(row)
                continue
            if now.radius != held.ball.radius:
                draft.set_radius(row, held.ball.radius)
            if now.key_slot != held.ball.key_slot:
                draft.point_key(row, held.ball.key_slot)
            if row == edit.row and now.value_slot != held.value_slot:
                draft.point_value(row, held.value_slot)
            if row == edit.row and now.label_slot != held.label_slot:
                draft.point_label(row, held.label_slot)
        return edit

    def take_back(self, edit_id: int) -> tuple[Edit, dict[int, RowState | None]]:
        """Take one edit out of the history; return it and what rows hold now, None where one goes.

        Of a row beside its own it is the ball that is restored.

        Raises: KeyError where no remaining edit has the id.
        """
        if edit_id not in self.edits:
            known = f"the ids {min(self.edits)} to {max(self.edits)}" if self.edits else "none"
            raise KeyError(f"no edit has the id {edit_id}; there remain {known}")
        neighbour = self.rows[self.edits[edit_id].row].neighbour
        edit = self._forget(edit_id)
        if edit.row in self.rows:
            return edit, {edit.row: self._held(edit.row)}
        if neighbour in self.rows:
            return edit, {edit.row: None, neighbour: self._held(neighbour)}
        return edit, {edit.row: None}

    def _held(self, row: int) -> RowState:
        """Return what a row holds by its newest remaining event and edit."""
        life = self.rows[row]
        ball = Ball(life.events[-1].radius, life.events[-1].key_slot)
        if life.edits:
            newest = life.edits[-1]
            return RowState(ball, self.edits[newest].value_after, self.label_slots[newest])
        assert life.base is not None, "a row has edits, or was there before them"
        return RowState(ball, life.base.value_slot, life.base.label_slot)

    def _forget(self, edit_id: int) -> Edit:
        """Take one edit out, its row too where it was the last one there, and what it caused."""
        edit = self.edits.pop(edit_id)
        del self.label_slots[edit_id]
        self._add_step(Undone(edit_id))
        life = self.rows[edit.row]
        edits = life.edits.without(edit_id)
        if edits or life.base is not None:
            events, caused = life.events, life.events.get(edit_id)
            if caused is not None and caused.owner_row is None:
                events = events.without(edit_id)
            self.rows[edit.row] = replace(life, edits=edits, events=events)
            return edit
        del self.rows[edit.row]
        if life.neighbour in self.rows:
            split, maker = self.rows[life.neighbour], life.events[0].edit
            caused = split.events.get(maker)
            if caused is not None and caused.owner_row == edit.row:
                self.rows[life.neighbour] = replace(split, events=split.events.without(maker))
        return edit


_UNTOUCHED = RowLife()
