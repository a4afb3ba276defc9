"""Plans of edits: what a batch would do to a codebook, and whether that holds once it is trained.

It is decided on a draft that is dropped, so that others may write while the value is trained, and
decided again on the draft that is published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.draft import Draft
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.apply import Applied
from grace_fast.edits.history import History
from grace_fast.hook.training_override import Tokens
from grace_fast.lookup import lookup
from grace_fast.semantics import Rules


class RowsRefused(ValueError):
    """Some edits of a batch cannot be made; the others could without them."""

    def __init__(self, rows: Sequence[int], why: str) -> None:
        super().__init__(why)
        self.rows = tuple(rows)


@dataclass(frozen=True, eq=False)
class Proposal:
    """A batch of edits before anything is decided."""

    queries: Tensor  # [B, D], in the codebook's element type
    labels: Sequence[Tensor]
    fresh: Sequence[Tensor]  # B values [V], to start from where a row is made
    hidden: Tensor | None = None  # [B, T, D], where each token asks for itself
    ends: Tensor | None = None  # [B], there: where the prompts end


@dataclass(frozen=True, eq=False)
class Training:
    """One value to train, on the rows of a batch that it answers."""

    row: int
    start: Tensor  # [V]
    picked: tuple[int, ...]  # rows of the batch
    tokens: Tokens | None  # of these, where each token asks for itself


@dataclass(frozen=True, eq=False)
class Plan:
    """What was decided for each row of a batch, and what has to be trained for it."""

    applied: list[Applied]
    trainings: list[Training]
    rows: int  # of the codebook before; later ones are this plan's own
    values: int  # likewise, the slots of values

    def agrees(self, other: Plan) -> bool:
        """Tell whether values that were trained for another plan are what this one asks for."""
        return self._decisions() == other._decisions() and all(
            map(torch.equal, self._token_bytes(), other._token_bytes())
        )

    @property
    def superseded(self) -> bool:
        """Tell whether an edit is answered by a later one of the batch, and not trained."""
        return sum(len(one.picked) for one in self.trainings) < len(self.applied)

    def _decisions(self) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
        decided: list[tuple[object, ...]] = [
            (
                done.outcome,
                _since(self.rows, done.row),
                None if done.value_before is None else _since(self.values, done.value_before),
            )
            for done in self.applied
        ]
        return decided, [(_since(self.rows, one.row), one.picked) for one in self.trainings]

    def _token_bytes(self) -> list[Tensor]:
        """Return what the prompts' tokens hit and get, but for the value that is trained."""
        listed = []
        for one in self.trainings:
            if one.tokens is not None:
                hit = one.tokens.hit
                others = hit & (one.tokens.row != one.row)
                # As bytes: a value may hold NaN, which is not equal to itself.
                listed += [hit, others, one.tokens.stored[others].view(torch.uint8)]
        return listed


def _since(count: int, number: int) -> int:
    """Return a number that others know, or one below zero for what is a plan's own."""
    return number if number < count else count - 1 - number


def make(proposal: Proposal, draft: Draft, history: History, rules: Rules, first_id: int) -> Plan:
    """Decide a batch of edits in order, each seeing the ones before.

    Draft and history are changed; the values of rows that are made are the fresh ones.

    Raises: RowsRefused for an edit whose ball would be too wide.
    """
    before, applied = draft.counts, list[Applied]()
    proposed = zip(proposal.queries, proposal.labels, proposal.fresh, strict=True)
    for at, (query, wanted, fresh) in enumerate(proposed):
        try:
            applied.append(history.apply(draft, rules, query, wanted, fresh, first_id + at))
        except ValueError as error:
            raise RowsRefused([at], str(error)) from None
    decided = draft.snapshot()
    answered_by = lookup.nearest(proposal.queries, decided).row.tolist()
    members: dict[int, list[int]] = {}
    for at, done in enumerate(applied):
        label = decided.row(done.row).label
        alike = label is not None and semantics.same_label(rules, proposal.labels[at], label)
        alike |= rules.semantics == "easyedit"  # which compares with another row's label
        if alike and (answered_by[at] == done.row or len(applied) == 1):
            members.setdefault(done.row, []).append(at)
    trainings = [
        Training(
            row,
            decided.row(row).value.clone(),
            tuple(picked),
            _tokens(proposal, row, picked, decided),
        )
        for row, picked in members.items()
    ]
    return Plan(applied, trainings, before.rows, before.values)


def _tokens(
    proposal: Proposal, row: int, picked: Sequence[int], decided: Snapshot
) -> Tokens | None:
    if proposal.hidden is None or proposal.ends is None:
        return None
    part = torch.as_tensor(picked, device=proposal.hidden.device, dtype=torch.int64)
    return Tokens.of(proposal.hidden[part], proposal.ends[part], row, decided)
