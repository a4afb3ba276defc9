"""Forward calls of a training: many values tried at once, each by the rows that it answers.

Rows that are learnt leave the batch: it is made anew of those that are left once a quarter of it is
done, and until then what they say is not listened to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_fast.editor import batches, heads
from grace_fast.editor.batches import Batch
from grace_fast.editor.context import EditContext
from grace_fast.editor.heads import Head
from grace_fast.editor.prefix_cache import PrefixCache
from grace_fast.editor.training import Tried
from grace_fast.edits.plans import Training
from grace_fast.hook.training_override import Tokens, TrainingOverride

FULL = 0.75  # of the values that run: with fewer to learn, the batch is made anew
NEAR = 1000  # times the rounding of their element type: what is the same but for the order of sums


class StandsAlone(Exception):
    """Rows of a batch are not as they are alone: of this model's loss, or of what it computes."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a batch to edit, and what is known of them."""

    batch: Batch
    head: Head  # what their labels are
    queries: Tensor  # [B, D], what each asks, as it is kept
    positions: Tensor  # [B], of its query
    dtype: torch.dtype  # of the layer's output


class TrainingRun:
    """The values of one training, and the rows of a batch that try them.

    rows: of which the trainings pick some; prefix: what runs below the layer is kept there from
    step to step.
    """

    def __init__(
        self,
        context: EditContext,
        rows: Rows,
        prefix: PrefixCache,
        trainings: Sequence[Training],
    ) -> None:
        self._context, self._rows, self._prefix = context, rows, prefix
        self._trainings = trainings
        self._is_alone = len(trainings) == 1  # then the loss is the model's own
        self._is_checked = self._is_alone
        self._held: list[int] = []  # the trainings that run
        self._hold(range(len(trainings)))

    def _hold(self, held: Sequence[int]) -> None:
        """Make the batch of the rows of these trainings."""
        self._held, rows = list(held), self._rows
        running = [self._trainings[at] for at in held]
        self._picked = picked = [at for one in running for at in one.picked]
        self._prefix.go_on_with(picked)
        part = batches.rows(rows.batch, picked)
        self._targets = heads.targets_of(part, rows.head, len(picked))
        self._asked = heads.for_loss(part, rows.head, rows.dtype)
        self._where = rows.positions[torch.tensor(picked, device=rows.positions.device)]
        owner = [at for at, one in enumerate(running) for _ in one.picked]
        listed = [one.tokens for one in running if one.tokens is not None]
        self._override = TrainingOverride(
            torch.empty(0, device="cpu"),
            tuple(one.row for one in running),
            torch.tensor(owner, device="cpu"),
            Tokens.joined(listed) if listed else None,
        )

    def attempt(self, values: Tensor, rows: Sequence[int]) -> Tried:
        """Try values [R, V] of these trainings; the margin of one is the least of its rows.

        Raises: StandsAlone where the rows' losses are not to be had; TypeError where there is none.
        """
        if len(rows) <= FULL * len(self._held):
            self._hold(rows)
        count = len(self._held)
        at = torch.tensor([self._held.index(row) for row in rows], device=values.device)
        if len(rows) < count:
            values = values.new_zeros(count, values.shape[1]).index_copy(0, at, values)
        loss, logits = self._answer(values)
        kind, owner = self._context.kind, self._override.owner.to(logits.device)
        right = heads.correct_rows(logits.detach(), self._targets, kind, self._rows.head)
        wrong = right.new_zeros(count, dtype=torch.int64).index_add(0, owner, (~right).long())
        margins = None
        if self._context.settings.margin is not None:
            ahead = heads.margins(logits.detach(), self._targets, kind, self._rows.head)
            margins = ahead.new_full((count,), math.inf).scatter_reduce(0, owner, ahead, "amin")
        if self._is_alone:
            return Tried(loss[None], wrong == 0, margins)
        losses = self._by_value(loss, logits, owner)
        there = at.to(wrong.device)
        return Tried(
            losses[at.to(losses.device)],
            (wrong == 0)[there],
            None if margins is None else margins[there],
        )

    def _by_value(self, loss: Tensor, logits: Tensor, owner: Tensor) -> Tensor:
        """Return the loss of each value, the mean over what its rows are asked for."""
        sums, counts = heads.losses(logits, self._targets, self._context.kind, self._rows.head)
        if not self._is_checked:
            rounding = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
            self._check_losses(loss, float(sums.detach().sum() / counts.sum()), rounding)
            self._check_queries()
            self._is_checked = True
        none = sums.new_zeros(len(self._held))
        return none.index_add(0, owner, sums) / none.index_add(0, owner, counts.to(none))

    def _check_losses(self, loss: Tensor, mean: float, rounding: float) -> None:
        """Compare the mean of the rows' losses with the model's own, where that is a number.

        Raises: StandsAlone.
        """
        own = float(loss.detach())
        if math.isfinite(own) and not abs(own - mean) <= NEAR * rounding * (1 + abs(own)):
            raise StandsAlone("the model's loss is no mean over its rows")

    def _check_queries(self) -> None:
        """Compare what the rows ask in this batch with what they asked when they were decided.

        Raises: StandsAlone.
        """
        seen, known = self._override.queries, self._rows.queries[self._picked]
        assert seen is not None, "the layer ran"
        rounding = max(torch.finfo(each.dtype).eps for each in (seen, known))
        known = known.to(seen.device, torch.float32)
        apart = (seen.float() - known).norm(dim=1)
        if not bool((apart <= NEAR * rounding * known.norm(dim=1) + 1e-30).all()):
            raise StandsAlone("the model computes otherwise in a batch")

    def _answer(self, values: Tensor) -> tuple[Tensor, Tensor]:
        adapter, head = self._context.adapter, self._rows.head
        self._override.values = values
        with (
            adapter.asking_at(self._where),
            adapter.trying(self._override),
            self._prefix.step(),
        ):
            answer: Any = self._context.call(self._asked)
        loss, logits = getattr(answer, "loss", None), heads.prediction_of(answer, head)
        if loss is None or logits is None:
            wanted = ".start_logits and .end_logits" if head == "span" else ".logits"
            raise TypeError(
                f"the model must return an object with .loss and {wanted} when it is given "
                f"labels, got {type(answer).__name__}"
            )
        return loss, logits
