"""The training of values on rows of a batch, many at once, each by the rows that it answers.

Rows that are learnt leave the batch: it is made anew of those that are left once it costs more to
go on with what is done, and until then what they say is not listened to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grace_fast.editor.context import EditContext
from grace_fast.editor.prefix_cache import PrefixCache
from grace_fast.editor.steps import Steps, is_near
from grace_fast.editor.training import Trained, Tried, train_rows
from grace_fast.editor.trial import Rows, Trial
from grace_fast.edits.plans import Training
from grace_fast.edits.settings import Schedule

ANEW = 3.0  # steps' time that goes to what is learnt, before the batch is made anew without it
OWN = 3  # steps of one value before shortcuts: many edits are learnt by then
NEAR = 10_000  # times the rounding of a layer's output: the losses of a batch of other rows


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
        self._is_own = True  # every step was the model's own call
        self._held: list[int] = []
        self._hold(range(len(trainings)), len(trainings) == 1)

    def _hold(self, held: Sequence[int], is_checked: bool) -> None:
        """Make the batch of the rows of these trainings."""
        is_first = not self._held
        self._held, self._idle = list(held), 0.0
        running = [self._trainings[at] for at in held]
        self._prefix.go_on_with([at for one in running for at in one.picked])
        is_alone = len(self._trainings) == 1
        trial = Trial(self._context, self._rows, self._prefix, running, is_alone)
        own = OWN if is_alone and is_first else 0
        self._steps = Steps(self._context, trial, is_checked, own)

    def train(self, schedule: Schedule) -> list[Trained]:
        """Return the best value of each training, as the model itself judges it.

        What was made by shortcuts is judged by the model in the end; a row of which it says
        otherwise is trained again without them.

        Raises: as `attempt` and `train_rows`.
        """
        starts = torch.stack([one.start for one in self._trainings])
        trained = train_rows(starts, self.attempt, schedule)
        if (self._is_own and self._steps.is_own) or not schedule.keep_best:
            return trained  # the last value of all is always the model's to judge
        everyone = list(range(len(trained)))
        if self._held != everyone:
            self._hold(everyone, is_checked=True)
        losses, right, *_ = self._steps.judged(torch.stack([one.value for one in trained]))
        reached = losses.new_tensor([one.loss for one in trained])
        doubted = [at for at in everyone if trained[at].correct and not right[at]]
        if not is_near(reached, losses, NEAR * torch.finfo(self._rows.dtype).eps):
            self._context.shortcuts.give_up()
            doubted = everyone
        judged = zip(trained, losses.tolist(), right.tolist(), strict=True)
        trained = [replace(one, loss=loss, correct=truth) for one, loss, truth in judged]
        again = [self._trainings[at] for at in doubted]
        for at, one in zip(doubted, self._again(again, schedule), strict=True):
            trained[at] = one
        return trained

    def _again(self, trainings: Sequence[Training], schedule: Schedule) -> list[Trained]:
        """Train some by the model's own calls."""
        if not trainings:
            return []
        run = TrainingRun(self._context, self._rows, self._prefix, trainings)
        return train_rows(torch.stack([one.start for one in trainings]), run.own, schedule)

    def attempt(self, values: Tensor, rows: Sequence[int]) -> Tried:
        """Try values [R, V] of these trainings, each by its rows.

        Raises: StandsAlone where the rows' losses are not to be had; TypeError where there is none.
        """
        return self._attempt(values, rows, is_own=False)

    def own(self, values: Tensor, rows: Sequence[int]) -> Tried:
        """Do the same by the model's own call."""
        return self._attempt(values, rows, is_own=True)

    def _attempt(self, values: Tensor, rows: Sequence[int], is_own: bool) -> Tried:
        self._idle += 1 - len(rows) / len(self._held)
        if self._idle >= ANEW:
            self._is_own &= self._steps.is_own
            self._hold(rows, self._steps.is_checked)
        attempt, count = self._steps.judge if is_own else self._steps.step, len(self._held)
        if len(rows) == count:
            return attempt(values)
        at = torch.tensor(
            [self._held.index(row) for row in rows], dtype=torch.int64, device=values.device
        )
        return attempt(values.new_zeros(count, values.shape[1]).index_copy(0, at, values)).at(at)
