"""The edit engine: decide one edit by the edit table, and do it but for training its value.

Native, reference and sharded codebooks are all edited by `apply`. What it tells of the rows is what
a `History` keeps, and what undo goes back to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.draft import Draft
from grace_fast.codebook.snapshot import Row, Snapshot
from grace_fast.errors import warn_of_old_name
from grace_fast.lookup import lookup
from grace_fast.lookup.sharded import ShardDraft, ShardedCodebook, ShardedSnapshot, ShardRow
from grace_fast.semantics import Decision, Outcome, Rules

# A key farther than epsilon and the widest radius has no ball within epsilon of the query. A
# distance is rounded where it is compared, by less than this of itself.
ROUNDING = 1e-6


Editable = Draft | ShardDraft  # a next version of a codebook


class Ball(NamedTuple):
    """Where a row hits."""

    radius: float
    key_slot: int


class RowState(NamedTuple):
    """What one row holds."""

    ball: Ball
    value_slot: int
    label_slot: int


@dataclass
class Applied:
    """What one decision did to a draft; its value is trained next."""

    row: int  # the edit lives on it
    outcome: Outcome
    distance: float  # from its query to the nearest key before it; inf where it was added
    radius: float  # of its row, after it
    value_before: int | None  # slot of the row's value before it; None where it made the row
    before: dict[int, RowState]  # of each row that was there, and is edited or split
    after: dict[int, Ball]  # of each row that is made, edited or split


def apply(
    draft: Editable,
    rules: Rules,
    query: Tensor,
    label: Tensor,
    fresh_value: Tensor,
    labels: list[Tensor | None] | None = None,
) -> Applied:
    """Decide one edit against a draft and do it, but for training its value.

    query: [D] and fresh_value: [V], in the codebook's element type; labels: those of all rows,
    where somebody keeps them beside the codebook; the label of a row that is made is added there.

    Raises: ValueError where its ball would be wider than `rules.max_radius`.
    """
    before = draft.snapshot()
    within = (rules.epsilon + before.widest) * (1 + ROUNDING)
    near = lookup.nearest(query[None], before, within=within)
    row, squared = int(near.row[0]), float(near.squared_distance[0])
    radius, same = 0.0, False
    if row >= 0:
        radius, known = before.row(row).radius, _label_compared(rules, before, row, labels)
        same = known is not None and semantics.same_label(rules, label, known)
    decision = semantics.decide(rules, squared, radius, same)
    if decision.radius > rules.max_radius:
        raise ValueError(
            f"the edit's ball must be at most max_radius = {rules.max_radius}, and it would be "
            f"{decision.radius:.6g} ({decision.outcome}); edit a nearer prompt, or attach with "
            "a smaller epsilon or a larger max_radius"
        )
    touched = [] if decision.outcome == "added" else [row]
    states = {each: _state_of(before.row(each)) for each in touched}
    if decision.outcome in ("added", "split"):
        ball = torch.tensor([decision.radius], dtype=torch.float32, device="cpu")
        listed = [label] if labels is None else None
        made = draft.append(query[None], fresh_value[None], ball, listed)[0]
        if labels is not None:
            labels.append(label)
        if decision.nearest_radius is not None:
            draft.set_radius(row, decision.nearest_radius)
        touched = [made, *touched]
    else:
        if decision.moves_key:
            draft.set_key(row, (before.row(row).key.double() + query.double()) / 2)
        if decision.radius != radius:
            draft.set_radius(row, decision.radius)
        if decision.outcome == "replaced":
            draft.set_label(row, label)
    after = draft.snapshot()
    lives_on, is_made = touched[0], touched[0] not in states
    balls = {each: _ball_of(after.row(each)) for each in touched}
    return Applied(
        row=lives_on,
        outcome=decision.outcome,
        distance=math.inf if decision.outcome == "added" else float(near.distance[0]),
        radius=decision.radius if is_made else balls[lives_on].radius,
        value_before=None if is_made else states[lives_on].value_slot,
        before=states,
        after=balls,
    )


def _ball_of(row: Row | ShardRow) -> Ball:
    return Ball(row.radius, row.key_slot)


def _state_of(row: Row | ShardRow) -> RowState:
    return RowState(_ball_of(row), row.value_slot, row.label_slot)


def _label_compared(
    rules: Rules, snapshot: Snapshot | ShardedSnapshot, row: int, labels: list[Tensor | None] | None
) -> Tensor | None:
    """Return the label that an edit near a live row is compared with."""
    if rules.semantics == "easyedit":
        live = snapshot.live.nonzero()[:, 0].tolist()
        row = live[semantics.label_row(rules, live.index(row), len(live))]
    return snapshot.row(row).label if labels is None else labels[row]


def _enact(
    shards: ShardedCodebook, rules: Rules, query: Tensor, label: Tensor, fresh_value: Tensor
) -> tuple[int, Decision]:
    """Do what `apply` does, in a version of its own: the former way to edit row shards."""
    warn_of_old_name("ShardedCodebook.enact", "grace_fast.edits.apply.apply within writing()")
    with shards.writing() as draft:
        done = apply(draft, rules, query, label, fresh_value)
    split = next((ball.radius for row, ball in done.after.items() if row != done.row), None)
    edited = done.before.get(done.row)
    moves_key = edited is not None and edited.ball.key_slot != done.after[done.row].key_slot
    return done.row, Decision(done.outcome, done.radius, split, moves_key)


ShardedCodebook.enact = _enact
