"""Trial of values: one forward call of the rows that try them, and what they make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from grace_fast.editor import batches, heads
from grace_fast.editor.batches import Batch
from grace_fast.editor.context import EditContext
from grace_fast.editor.head_cut import HeadCut, asked_of, bare
from grace_fast.editor.heads import Head
from grace_fast.editor.prefix_cache import PrefixCache
from grace_fast.editor.training import Tried
from grace_fast.edits.plans import Training
from grace_fast.hook.training_override import Tokens, TrainingOverride

NEAR = 1000  # times the rounding of their element type: what is the same but for the order of sums
# The most that may be, as shares: so many times the rounding of half precision is anything. Queries
# at the end of 24 layers in bfloat16 were .1 apart, of a model that convolves over padding .6.
MOST_OF_QUERY, MOST_OF_LOSS = 0.25, 0.05


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


class Trial:
    """The rows that some trainings answer, and R values to try on them.

    is_alone: it is one training of one batch, whose loss is the model's own.
    """

    def __init__(
        self,
        context: EditContext,
        rows: Rows,
        prefix: PrefixCache,
        trainings: Sequence[Training],
        is_alone: bool,
    ) -> None:
        self._context, self._rows, self.prefix = context, rows, prefix
        self._is_alone, self._count = is_alone, len(trainings)
        self._picked = [at for one in trainings for at in one.picked]
        part = batches.rows(rows.batch, self._picked)
        self._targets = heads.targets_of(part, rows.head, len(self._picked))
        self._asked = heads.for_loss(part, rows.head, rows.dtype)
        self._where = rows.positions[
            torch.tensor(self._picked, dtype=torch.int64, device=rows.positions.device)
        ]
        owner = [at for at, one in enumerate(trainings) for _ in one.picked]
        listed = [one.tokens for one in trainings if one.tokens is not None]
        self._override = TrainingOverride(
            torch.empty(0, dtype=torch.float32, device="cpu"),
            tuple(one.row for one in trainings),
            torch.tensor(owner, dtype=torch.int64, device="cpu"),
            Tokens.joined(listed) if listed else None,
        )
        self._cut = self._cut_of(context)

    def _cut_of(self, context: EditContext) -> HeadCut | None:
        if context.host.is_wrapper:
            return None
        asked = asked_of(self._targets, context.kind, self._rows.head)
        self._bare = bare(self._asked, context.host.model, context.kind)
        if asked is None or self._bare is None:
            return None
        cut = HeadCut(context.host.model, asked)
        return cut if cut.is_possible else None

    @property
    def can_cut(self) -> bool:
        """Tell whether the model has a head that may be cut."""
        return self._cut is not None

    def telling(self, on_write: Callable[[], None] | None) -> None:
        """Tell before values are written, in the calls that follow."""
        self._override.on_write = on_write

    def by_model(self, values: Tensor, is_checked: bool = True) -> Tried:
        """Try values [R, V] by the model's own call; the margin of one is the least of its rows.

        is_checked: else the rows are compared with how they are alone.

        Raises: StandsAlone; TypeError where there is no loss.
        """
        answer = self._call(values, self._asked)
        loss, logits = getattr(answer, "loss", None), heads.prediction_of(answer, self._rows.head)
        if loss is None or logits is None:
            wanted = ".start_logits and .end_logits" if self._rows.head == "span" else ".logits"
            raise TypeError(
                f"the model must return an object with .loss and {wanted} when it is given "
                f"labels, got {type(answer).__name__}"
            )
        kind, owner = self._context.kind, self._override.owner.to(logits.device)
        right = heads.correct_rows(logits.detach(), self._targets, kind, self._rows.head)
        wrong = right.new_zeros(self._count, dtype=torch.int64).index_add(0, owner, (~right).long())
        margins = None
        if self._context.settings.margin is not None:
            ahead = heads.margins(logits.detach(), self._targets, kind, self._rows.head)
            margins = self._least(ahead, owner)
        if self._is_alone:
            return Tried(loss[None], wrong == 0, margins)
        sums, counts = heads.losses(logits, self._targets, kind, self._rows.head)
        if not is_checked:
            rounding = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
            _check_losses(loss, float(sums.detach().sum() / counts.sum()), rounding)
            self._check_queries()
        none = sums.new_zeros(self._count)
        means = none.index_add(0, owner, sums) / none.index_add(0, owner, counts.to(none))
        return Tried(means, wrong == 0, margins)

    def by_cut(self, values: Tensor) -> Tried | None:
        """Return the same of logits where there is a target alone; None where none are made so."""
        assert self._cut is not None, "can_cut"
        with self._cut.on():
            answer = self._call(values, self._bare)
        logits = self._cut.logits_of(answer)
        if logits is None:
            return None
        row, wanted = self._cut.asked.row.to(logits.device), self._cut.asked.wanted
        owner, wanted = self._override.owner.to(logits.device)[row], wanted.to(logits.device)
        each = F.cross_entropy(logits.float(), wanted, reduction="none")
        none = each.new_zeros(self._count)
        wrong = none.index_add(0, owner, (logits.detach().argmax(-1) != wanted).to(none))
        counts = torch.bincount(owner, minlength=self._count).to(none)
        margins = None
        if self._context.settings.margin is not None:
            margins = self._least(heads.ahead(logits.detach().float(), wanted), owner)
        return Tried(none.index_add(0, owner, each) / counts, wrong == 0, margins)

    def _least(self, ahead: Tensor, owner: Tensor) -> Tensor:
        """Return the least margin of each value, [R]."""
        return ahead.new_full((self._count,), math.inf).scatter_reduce(0, owner, ahead, "amin")

    def _call(self, values: Tensor, batch: Any) -> Any:
        adapter = self._context.adapter
        self._override.values = values
        with (
            adapter.asking_at(self._where),
            adapter.trying(self._override),
            self.prefix.step(),
        ):
            return self._context.call(batch)

    def _check_queries(self) -> None:
        """Compare what the rows ask in this batch with what they asked when they were decided.

        Raises: StandsAlone.
        """
        seen, known = self._override.queries, self._rows.queries[self._picked]
        assert seen is not None, "the layer ran"
        rounding = max(torch.finfo(each.dtype).eps for each in (seen, known))
        known = known.to(seen.device, torch.float32)
        apart, share = (seen.float() - known).norm(dim=1), min(NEAR * rounding, MOST_OF_QUERY)
        if not bool((apart <= share * known.norm(dim=1) + 1e-30).all()):
            raise StandsAlone("the model computes otherwise in a batch")


def _check_losses(loss: Tensor, mean: float, rounding: float) -> None:
    """Compare the mean of the rows' losses with the model's own, where that is a number.

    Raises: StandsAlone.
    """
    own, share = float(loss.detach()), min(NEAR * rounding, MOST_OF_LOSS)
    if math.isfinite(own) and not abs(own - mean) <= share * (1 + abs(own)):
        raise StandsAlone("the model's loss is no mean over its rows")
