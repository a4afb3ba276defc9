"""One edit in progress: observe, decide on a draft, train, decide again, publish.

A value is trained without the writer's lock: other threads edit meanwhile, and where that changed
the decision it is trained anew. Until the last step nothing is published, so an edit that fails
leaves model and codebook as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.modes import lasting
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.editor import batches, checks, heads
from grace_fast.editor.batches import Batch
from grace_fast.editor.context import EditContext
from grace_fast.editor.heads import Head
from grace_fast.editor.prefix_cache import PrefixCache
from grace_fast.editor.training import Trained, frozen, require_differentiable, train
from grace_fast.edits import plans
from grace_fast.edits.edit import Edit
from grace_fast.edits.plans import Plan, Proposal
from grace_fast.hook.modes import Observation
from grace_fast.hook.training_override import TrainingOverride

TRAININGS = 3  # without the lock; an edit that others come between so often is trained within it


class _Superseded(Exception):
    """Another edit came between, and changed what this one has to do."""


def edit(context: EditContext, batch: Batch, text: tuple[str, str] | None = None) -> list[Edit]:
    """Edit every row of a batch, in order; one report a row.

    text: prompt and target, where they are to be kept.

    Raises: as `Grace.edit`.
    """
    context.require_attached()
    context.directory.require_writable()
    host, kind = context.host, context.kind
    head = heads.head_of(host.called if host.is_wrapper else host.model, kind, batch.get("labels"))
    batches.check(batch, kind, head, heads.classes_of(host.model, kind))
    checks.refuse_unknown_labels(host, batch, head)
    require_differentiable(context.model)
    prefix = PrefixCache(context.model, context.adapter.layer)
    with lasting(), frozen(context.model), prefix:
        with prefix.step():
            seen = context.observe(batch, in_training=True)
        checks.check_tokens(context, batch, seen)
        queries = seen.queries.to(context.book_for(seen).dtype)
        checks.check_query(context, queries, seen)
        book = context.own_book(seen)
        proposal = _proposal(context, batch, head, queries, seen)
        session = _Session(context, batch, head, seen, proposal, prefix, text)
        for _ in range(TRAININGS):
            try:
                return session.train_and_publish(book)
            except _Superseded:
                continue
        with context.noting():  # nobody comes between any more
            return session.train_and_publish(book)


@dataclass(frozen=True, eq=False)
class _Session:
    context: EditContext
    batch: Batch
    head: Head
    seen: Observation
    proposal: Proposal
    prefix: PrefixCache
    text: tuple[str, str] | None

    def train_and_publish(self, book: Codebook) -> list[Edit]:
        """Decide, train while other threads may write, and publish where that changed nothing.

        Raises: _Superseded where it did.
        """
        context, history = self.context, self.context.history
        rules = context.settings.rules(book.dtype)
        with book.sketching() as draft, history.attempting(keep=False):
            plan = plans.make(self.proposal, draft, history, rules, history.next_id)
        results = [self._train(one) for one in plan.trainings]
        with context.noting() as draft:
            now = plans.make(self.proposal, draft, history, rules, history.next_id)
            if not now.agrees(plan):
                raise _Superseded
            checks.warn_of_shared_queries(context, self.batch, now, rules)
            checks.warn_of_nothing_learnt(context.settings, now, results)
            for one, result in zip(now.trainings, results, strict=True):
                if result.steps or context.settings.iterations == 0:
                    draft.set_value(one.row, result.value)
            return self._record(draft.snapshot(), now, results)

    def _train(self, override: TrainingOverride) -> Trained:
        """Train one value on the rows of the batch that it answers."""
        context, head, picked = self.context, self.head, list(override.picked)
        adapter, kind, start = context.adapter, context.kind, override.value
        index = torch.tensor(picked, dtype=torch.int64, device=self.seen.positions.device)
        where = self.seen.positions[index]
        if len(picked) < len(self.proposal.queries):
            self.prefix.restart()
        part = batches.rows(self.batch, picked)
        targets = heads.targets_of(part, head, len(picked))
        asked = heads.for_loss(part, head, self.seen.output.dtype)
        wanted = ".start_logits and .end_logits" if head == "span" else ".logits"

        def attempt(value: Tensor) -> tuple[Tensor, bool]:
            override.value = value
            with adapter.asking_at(where), adapter.trying(override), self.prefix.step():
                answer = context.call(asked)
            loss, logits = getattr(answer, "loss", None), heads.prediction_of(answer, head)
            if loss is None or logits is None:
                raise TypeError(
                    f"the model must return an object with .loss and {wanted} when it is given "
                    f"labels, got {type(answer).__name__}"
                )
            return loss, heads.is_correct(logits.detach(), targets, kind, head)

        return train(start, attempt, context.settings.schedule())

    def _record(self, after: Snapshot, plan: Plan, results: Sequence[Trained]) -> list[Edit]:
        """Note the edits of a batch in the history, as a draft holds them in the end."""
        history, proposal = self.context.history, self.proposal
        reached = {
            at: result
            for one, result in zip(plan.trainings, results, strict=True)
            for at in one.picked
        }
        edits = []
        for at, done in enumerate(plan.applied):
            result = reached.get(at)
            edit = Edit(
                id=history.next_id,
                outcome=done.outcome,
                row=done.row,
                distance=done.distance,
                radius=done.radius,
                query=proposal.queries[at].clone(),
                label=proposal.labels[at],
                value_before=done.value_before,
                value_after=after.row(done.row).value_slot,
                loss=math.nan if result is None else result.loss,
                steps=0 if result is None else result.steps,
                correct=result is not None and result.correct,
                prompt=batches.prompt_checksum(self.batch, at, self.context.kind),
                text=self.text,
            )
            history.record(edit, after.row(done.row).label_slot)
            edits.append(edit)
        return edits


def _proposal(
    context: EditContext, batch: Batch, head: Head, queries: Tensor, seen: Observation
) -> Proposal:
    settings, count = context.settings, len(queries)
    padding = getattr(getattr(context.host.model, "config", None), "pad_token_id", None)
    padding = None if context.kind == "classifier" else padding
    targets = heads.targets_of(batch, head, count)
    labels = [heads.label_of(row, head, padding, settings.semantics != "paper") for row in targets]
    first_id = context.history.next_id
    fresh = [
        seen.outputs[at].to(queries.dtype)
        if settings.value_init == "warm"
        else _cold_value(settings.semantics == "paper", seen.output, first_id + at, queries.dtype)
        for at in range(count)
    ]
    if settings.query != "every_token":
        return Proposal(queries, labels, fresh)
    return Proposal(queries, labels, fresh, seen.hidden, seen.positions)


def _cold_value(is_own: bool, output: Tensor, edit_id: int, dtype: torch.dtype) -> Tensor:
    """Draw a value [V] to start from: of an edit always the same, or from the global generator."""
    width = output.shape[-1]
    if is_own:
        own = torch.Generator(device="cpu").manual_seed(edit_id)
        drawn = torch.rand(width, generator=own, dtype=torch.float32, device="cpu")
    else:  # as the reference draws it
        drawn = torch.rand(1, width, dtype=torch.float32, device="cpu")[0]
    return drawn.to(output.device, dtype)
