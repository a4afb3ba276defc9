"""The life of edits on a codebook, without a model: decide, enact, undo, replay.

An id names an edit; several edits may share a row. What an edit did to rows is kept as events, so
that any edit can be taken back: a row's radius and key are those of the newest remaining event on
it, its value and label those of its newest remaining edit. A row goes when its last edit goes, and
with it the split that made room for it.

Every change of a history is a step. A journal keeps them, and `History.follow` makes the same
history of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.ascending import Ascending
from grace_fast.codebook.codebook import MAX_COUNTER, Codebook, Draft, Snapshot, require_room
from grace_fast.codebook.lazy_table import LazyTable
from grace_fast.lookup import lookup
from grace_fast.semantics import Outcome, Rules

NO_EDIT = -1  # the id of what was on a row before its first edit: keys appended by hand
REPLAY_BATCH = 4096  # stored queries looked up at once


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


@dataclass(frozen=True)
class Event:
    """One change of a row's ball: at its start, at a split, an expansion or a move."""

    edit: int  # the edit that caused it
    row: int
    radius: float  # from then on
    key_slot: int
    lasts_with: int  # it lasts as long as this row does, or as its edit does where that is -1


@dataclass(frozen=True)
class Base:
    """What a row held before the first edit on it."""

    value_slot: int
    label_slot: int


@dataclass(frozen=True)
class Replay:
    """What became of one stored query."""

    id: int
    verdict: Literal["fires", "superseded", "broken"]
    by: int | None = None  # the later edit that superseded it


@dataclass(frozen=True)
class Verification:
    """The replay of every stored query; a broken edit is a failure, and a layer that is gone."""

    replays: tuple[Replay, ...]
    is_asked: bool = True  # false where the layer left the model, so that nobody asks

    def _of(self, verdict: str) -> list[Replay]:
        return [replay for replay in self.replays if replay.verdict == verdict]

    @property
    def fires(self) -> list[int]:
        """Ids whose query still gets their row's value."""
        return [replay.id for replay in self._of("fires")]

    @property
    def superseded(self) -> dict[int, int]:
        """Ids whose query a later edit answers now, and which."""
        return {replay.id: replay.by for replay in self._of("superseded") if replay.by is not None}

    @property
    def broken(self) -> list[int]:
        """Ids whose query gets no answer, or one that no later edit explains."""
        return [replay.id for replay in self._of("broken")]

    @property
    def ok(self) -> bool:
        """True where nothing is broken, and the model asks."""
        return self.is_asked and not self.broken

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        return (
            f"Verification(ok={self.ok}, fires={len(self.fires)}, "
            f"superseded={len(self.superseded)}, broken={self.broken}"
            f"{'' if self.is_asked else ', the layer left the model'})"
        )


@dataclass
class Enacted:
    """What one decision did to a draft; its value is trained next."""

    row: int
    outcome: Outcome
    distance: float
    radius: float
    value_before: int | None


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
class Recorded:
    """The step of an edit that was enacted and trained."""

    edit: Edit
    label_slot: int  # where the store keeps its row's label


@dataclass(frozen=True)
class Founded:
    """The step of a row that was there before its first edit."""

    row: int
    base: Base


@dataclass(frozen=True)
class Forgotten:
    """The step of an edit that was taken back."""

    edit: int


@dataclass(frozen=True)
class Emptied:
    """The step before those of another version that was gone back to."""


Step = Recorded | Event | Founded | Forgotten | Emptied


class History:
    """The edits that remain, in order, and what they did to each row.

    edits, rows, label_slots: what came in columns; `store.past` makes them of a file.
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
                yield Founded(row, life.base)
            yield from life.events
        for number, edit in self.edits.items():
            yield Recorded(edit, self.label_slots[number])

    def follow(self, step: Step) -> None:
        """Do what a step did to the history that it was taken from.

        Raises: KeyError or ValueError for the step of another history.
        """
        if isinstance(step, Recorded):
            self.record(step.edit, step.label_slot)
        elif isinstance(step, Event):
            self.add_event(step)
        elif isinstance(step, Founded):
            self.set_base(step.row, step.base)
        elif isinstance(step, Forgotten):
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
        self._note(Emptied())

    def go_back(self, earlier: History) -> None:
        """Hold what an earlier history of this codebook holds; ids that were given stay so."""
        self.empty()
        twin = earlier.copy()
        self.edits, self.rows, self.label_slots = twin.edits, twin.rows, twin.label_slots
        for step in earlier.steps() if self.keeps_steps else ():
            self._note(step)

    def _note(self, step: Step) -> None:
        if self.keeps_steps:
            self._steps.append(step)

    def record(self, edit: Edit, label_slot: int) -> None:
        """Keep an enacted edit with what its training reached.

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
        self._note(Recorded(edit, label_slot))

    def _life(self, row: int) -> RowLife:
        return self.rows.get(row, _UNTOUCHED)

    def add_event(self, event: Event) -> None:
        """Note a change of a row's ball.

        Raises: ValueError where it is owed to no later edit than the one before it on the row.
        """
        life = self._life(event.row)
        self.rows[event.row] = replace(life, events=life.events.adding(event.edit, event))
        if event.lasts_with not in (event.row, -1):
            made = self._life(event.lasts_with)
            self.rows[event.lasts_with] = replace(made, neighbour=event.row)
        self._note(event)

    def set_base(self, row: int, base: Base) -> None:
        """Note what a row held before any edit."""
        self.rows[row] = replace(self._life(row), base=base)
        self._note(Founded(row, base))

    def enact(
        self,
        draft: Draft,
        rules: Rules,
        query: Tensor,
        label: Tensor,
        fresh_value: Tensor,
        edit: int,
    ) -> Enacted:
        """Decide one edit against the draft and do it, but for training its value.

        query: [D] and fresh_value: [V], in the codebook's element type; edit: the id it will have.
        """
        before = draft.snapshot()
        # A key farther than this has no ball within epsilon of the query: the edit is added.
        within = (rules.epsilon + before.widest) * (1 + 1e-6)
        near = lookup.nearest(query[None], before, within=within)
        row, squared = int(near.row[0]), float(near.squared_distance[0])
        radius, same = 0.0, False
        if row >= 0:
            radius, known = before.radius_of(row), _label_compared(rules, before, row)
            same = known is not None and semantics.same_label(rules, label, known)
        decision = semantics.decide(rules, squared, radius, same)
        if decision.radius > rules.max_radius:
            raise ValueError(
                f"the edit's ball must be at most max_radius = {rules.max_radius}, and it would be "
                f"{decision.radius:.6g} ({decision.outcome}); edit a nearer prompt, or attach with "
                "a smaller epsilon or a larger max_radius"
            )
        distance = math.inf if decision.outcome == "added" else float(near.distance[0])
        if decision.outcome in ("added", "split"):
            made = self._add(draft, decision, row, query, label, fresh_value, edit)
            return Enacted(made, decision.outcome, distance, decision.radius, None)
        slot = before.value_slot_of(row)
        self._touch(draft, decision, row, query, label, edit)
        return Enacted(row, decision.outcome, distance, draft.snapshot().radius_of(row), slot)

    def _add(
        self,
        draft: Draft,
        decision: semantics.Decision,
        neighbour: int,
        query: Tensor,
        label: Tensor,
        value: Tensor,
        edit: int,
    ) -> int:
        radius = torch.tensor([decision.radius], dtype=torch.float32, device="cpu")
        row = draft.append(query[None], value[None], radius, [label])[0]
        if decision.nearest_radius is not None:
            self._keep_base(draft.snapshot(), neighbour)
            draft.set_radius(neighbour, decision.nearest_radius)
        after = draft.snapshot()
        for changed in (row,) if decision.nearest_radius is None else (row, neighbour):
            ball = (after.radius_of(changed), after.key_slot_of(changed))
            self.add_event(Event(edit, changed, *ball, lasts_with=row))
        return row

    def _touch(
        self,
        draft: Draft,
        decision: semantics.Decision,
        row: int,
        query: Tensor,
        label: Tensor,
        edit: int,
    ) -> None:
        before = draft.snapshot()
        self._keep_base(before, row)
        if decision.moves_key:
            draft.set_key(row, (before.key_of(row).double() + query.double()) / 2)
        if decision.radius != before.radius_of(row):
            draft.set_radius(row, decision.radius)
        if decision.outcome == "replaced":
            draft.set_label(row, label)
        after = draft.snapshot()
        ball = (after.radius_of(row), after.key_slot_of(row))
        if ball != (before.radius_of(row), before.key_slot_of(row)):
            self.add_event(Event(edit, row, *ball, lasts_with=-1))

    def _keep_base(self, snapshot: Snapshot, row: int) -> None:
        """Keep what a row held before its first edit, where no edit made it."""
        if not self._life(row).events:
            self.set_base(row, Base(snapshot.value_slot_of(row), snapshot.label_slot_of(row)))
            ball = (snapshot.radius_of(row), snapshot.key_slot_of(row))
            self.add_event(Event(NO_EDIT, row, *ball, lasts_with=row))

    def undo(self, draft: Draft, edit_id: int) -> Edit:
        """Take one edit back in a draft and in the history; return it.

        Raises: KeyError where no remaining edit has the id.
        """
        if edit_id not in self.edits:
            known = f"the ids {min(self.edits)} to {max(self.edits)}" if self.edits else "none"
            raise KeyError(f"no edit has the id {edit_id}; there remain {known}")
        neighbour = self.rows[self.edits[edit_id].row].neighbour
        edit = self._forget(edit_id)
        if edit.row in self.rows:
            self._restore_ball(draft, edit.row)
            self._restore_value(draft, edit.row)
            return edit
        if bool(draft.snapshot().live[edit.row]):  # else it was removed by its key's id
            draft.remove(edit.row)
        if neighbour in self.rows:
            self._restore_ball(draft, neighbour)
        return edit

    def _forget(self, edit_id: int) -> Edit:
        """Take one edit out, its row too where it was the last one there, and what it caused."""
        edit = self.edits.pop(edit_id)
        del self.label_slots[edit_id]
        self._note(Forgotten(edit_id))
        life = self.rows[edit.row]
        edits = life.edits.without(edit_id)
        if edits or life.base is not None:
            events, caused = life.events, life.events.get(edit_id)
            if caused is not None and caused.lasts_with < 0:
                events = events.without(edit_id)
            self.rows[edit.row] = replace(life, edits=edits, events=events)
            return edit
        del self.rows[edit.row]
        if life.neighbour in self.rows:
            split, maker = self.rows[life.neighbour], life.events[0].edit
            caused = split.events.get(maker)
            if caused is not None and caused.lasts_with == edit.row:
                self.rows[life.neighbour] = replace(split, events=split.events.without(maker))
        return edit

    def _restore_ball(self, draft: Draft, row: int) -> None:
        now, newest = draft.snapshot(), self.rows[row].events[-1]
        if now.radius_of(row) != newest.radius:
            draft.set_radius(row, newest.radius)
        if now.key_slot_of(row) != newest.key_slot:
            draft.point_key(row, newest.key_slot)

    def _restore_value(self, draft: Draft, row: int) -> None:
        life = self.rows[row]
        if life.edits:
            value, label = self.edits[life.edits[-1]].value_after, self.label_slots[life.edits[-1]]
        else:
            assert life.base is not None
            value, label = life.base.value_slot, life.base.label_slot
        now = draft.snapshot()
        if now.value_slot_of(row) != value:
            draft.point_value(row, value)
        if now.label_slot_of(row) != label:
            draft.point_label(row, label)

    def verify(self, book: Codebook | Snapshot, rules: Rules) -> Verification:
        """Look every stored query up again and say what became of it."""
        snapshot = book.snapshot() if isinstance(book, Codebook) else book
        edits, live = list(self.edits.values()), snapshot.live.tolist()
        replays: list[Replay] = []
        changed: dict[int, int] = {}
        for start in range(0, len(edits), REPLAY_BATCH):
            part = edits[start : start + REPLAY_BATCH]
            queries = torch.stack([edit.query for edit in part])
            near, match = lookup.nearest(queries, snapshot), lookup.find(queries, snapshot)
            for edit, row, hit in zip(part, near.row.tolist(), match.hit.tolist(), strict=True):
                if live[edit.row]:
                    replays.append(self._replay(edit, row, hit, rules, changed))
                else:  # removed, but not by an undo
                    replays.append(Replay(edit.id, "broken"))
        return Verification(tuple(replays))

    def _replay(
        self, edit: Edit, row: int, hit: bool, rules: Rules, changed: dict[int, int]
    ) -> Replay:
        """Return what became of an edit whose query is nearest to a row.

        changed: by row, what is known of `_last_to_change`.
        """
        if row == edit.row and hit:
            newest = self.edits[self.rows[row].edits[-1]]
            if newest.id == edit.id or _answers_alike(rules, edit, newest):
                return Replay(edit.id, "fires")
            return Replay(edit.id, "superseded", newest.id)
        # A later key is nearer; or its own ball was shrunk or moved away.
        by = NO_EDIT
        for each in (row, edit.row):
            if by <= edit.id:
                if each not in changed:
                    changed[each] = self._last_to_change(each)
                by = changed[each]
        if by <= edit.id:
            return Replay(edit.id, "broken")
        return Replay(edit.id, "superseded", by)

    def _last_to_change(self, row: int) -> int:
        """Return the newest remaining edit that a row's ball is owed to."""
        by = NO_EDIT
        for event in self._life(row).events:
            if event.edit in self.edits:
                by = max(by, event.edit)
            elif event.edit != NO_EDIT:  # undone, and kept up by later edits on the row it made
                by = max(by, self.rows[event.lasts_with].edits[-1])
        return by


_UNTOUCHED = RowLife()


def _label_compared(rules: Rules, snapshot: Snapshot, row: int) -> Tensor | None:
    """Return the label that an edit near a live row is compared with."""
    if rules.semantics != "easyedit":
        return snapshot.label_of(row)
    live = snapshot.live.nonzero()[:, 0].tolist()
    return snapshot.label_of(live[semantics.label_row(rules, live.index(row), len(live))])


def _answers_alike(rules: Rules, edit: Edit, newest: Edit) -> bool:
    if edit.label is None or newest.label is None:
        return False
    return semantics.same_label(rules, edit.label, newest.label)
