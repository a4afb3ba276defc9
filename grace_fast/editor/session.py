"""One edit in progress: observe, decide on a draft, train, decide again, publish.

A value is trained without the writer's lock: other threads edit meanwhile, and where that changed
the decision it is trained anew. Until the last step nothing is published, so an edit that fails
leaves model and codebook as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.modes import lasting
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.editor import batches, checks, heads, memory
from grace_fast.editor.batches import Batch
from grace_fast.editor.context import EditContext
from grace_fast.editor.heads import Head
from grace_fast.editor.prefix_cache import PrefixCache
from grace_fast.editor.training import Trained, frozen, require_differentiable
from grace_fast.editor.training_run import TrainingRun
from grace_fast.editor.trial import Rows, StandsAlone
from grace_fast.edits import plans
from grace_fast.edits.edit import Edit
from grace_fast.edits.plans import Plan, Proposal, Training
from grace_fast.hook.modes import Observation
from grace_fast.lookup.sharded import ShardedCodebook

Text = tuple[str, str]  # prompt and target
TRAININGS = 3  # without the lock; an edit that others come between so often is trained within it


class _Superseded(Exception):
    """Another edit came between, and changed what this one has to do."""


def edit(context: EditContext, batch: Batch, text: Text | None = None) -> list[Edit]:
    """Edit every row of a batch, in order; one report a row.

    text: prompt and target, where they are to be kept.

    Raises: as `Grace.edit`.
    """
    context.require_attached()
    context.directory.require_writable()
    head = check(context, batch)
    require_differentiable(context.model)
    prefix = PrefixCache(context.model, context.adapter.layer)
    with lasting(), frozen(context.model), prefix:
        prefix.go_on_with(range(len(batches.prompts_of(batch))))
        with prefix.step():
            seen = context.observe(batch, in_training=True)
        queries, book = asked(context, batch, seen)
        rows = Rows(batch, head, queries, seen.positions, seen.output.dtype)
        targets = heads.targets_of(batch, head, len(queries))
        proposal = propose(context, rows, targets, seen.outputs, seen.hidden)
        return Session(context, rows, proposal, prefix, [text] * len(queries)).publish(book)


def check(context: EditContext, batch: Batch) -> Head:
    """Check that a batch can be edited as far as it shows, and return what its labels are.

    Raises: as `Grace.edit`.
    """
    host, kind = context.host, context.kind
    head = heads.head_of(host.called if host.is_wrapper else host.model, kind, batch.get("labels"))
    batches.check(batch, kind, head, heads.classes_of(host.model, kind))
    checks.refuse_unknown_labels(host, batch, head)
    return head


def asked(context: EditContext, batch: Batch, seen: Observation) -> tuple[Tensor, Codebook]:
    """Return what a batch asks, [B, D] as it is kept, and the codebook that is asked.

    Raises: ValueError for what no codebook may hold, or a layer that does not see the tokens.
    """
    checks.check_tokens(context, batch, seen)
    queries = seen.queries.to(context.book_for(seen).dtype)
    checks.check_query(context, queries, seen)
    return queries, context.own_book(seen)


class Contradicted(Exception):
    """An edit of a batch supersedes another one of it, which is to be trained before."""


@dataclass(frozen=True, eq=False)
class Session:
    """One batch of edits from what was observed to what is published.

    prefix: of these rows; trains_all: publish none that is superseded within the batch, untrained.
    """

    context: EditContext
    rows: Rows
    proposal: Proposal
    prefix: PrefixCache
    texts: Sequence[Text | None]  # by row, where they are to be kept
    trains_all: bool = False

    def publish(self, book: Codebook) -> list[Edit]:
        """Decide, train and publish; one report a row.

        Raises: as `Grace.edit`; RowsRefused where the other rows could be edited; Contradicted.
        """
        for _ in range(TRAININGS):
            try:
                return self.train_and_publish(book)
            except _Superseded:
                continue
        with self.context.noting():  # nobody comes between any more
            return self.train_and_publish(book)

    def sketch(self, book: Codebook) -> Plan:
        """Decide without a trace.

        Raises: RowsRefused.
        """
        history, rules = self.context.history, self.context.settings.rules(book.dtype)
        with book.sketching() as draft, history.attempting(keep=False):
            return plans.make(self.proposal, draft, history, rules, history.next_id)

    def train_and_publish(self, book: Codebook) -> list[Edit]:
        """Decide, train while other threads may write, and publish where that changed nothing.

        Raises: _Superseded where it did; as `publish`.
        """
        context, history = self.context, self.context.history
        rules = context.settings.rules(book.dtype)
        plan = self.sketch(book)
        if self.trains_all and plan.superseded and len(plan.applied) > 1:
            raise Contradicted
        results = self._train(plan.trainings)
        with context.noting() as draft:
            now = plans.make(self.proposal, draft, history, rules, history.next_id)
            if not now.agrees(plan):
                raise _Superseded
            checks.warn_of_shared_queries(context, self.rows.batch, now, rules)
            checks.warn_of_nothing_learnt(context.settings, now, results)
            for one, result in zip(now.trainings, results, strict=True):
                if result.steps or context.settings.iterations == 0:
                    draft.set_value(one.row, result.value)
            return self._record(draft.snapshot(), now, results)

    def _train(self, trainings: Sequence[Training]) -> list[Trained]:
        """Train values on the rows of the batch that they answer, all at once where that can be.

        Where memory ends it is done with half of them, and then with the others.
        """
        if len(trainings) > 1 and self.context.rows_are_apart:
            try:
                return self._together(trainings)
            except StandsAlone:
                self.context.rows_are_apart = False
            except (MemoryError, RuntimeError) as error:
                is_shared = isinstance(self.context.adapter.book, ShardedCodebook)
                if is_shared or not memory.has_ended(error):  # its ranks go on alike, or not at all
                    raise
                half = len(trainings) // 2
                self.context.at_once = min(self.context.at_once, half)
                return self._train(trainings[:half]) + self._train(trainings[half:])
        return [self._together([one])[0] for one in trainings]

    def _together(self, trainings: Sequence[Training]) -> list[Trained]:
        run = TrainingRun(self.context, self.rows, self.prefix, trainings)
        return run.train(self.context.settings.schedule())

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
                prompt=batches.prompt_checksum(self.rows.batch, at, self.context.kind),
                text=self.texts[at],
            )
            history.record(edit, after.row(done.row).label_slot)
            edits.append(edit)
        return edits


def propose(
    context: EditContext, rows: Rows, targets: Iterable[Tensor], outputs: Tensor, hidden: Tensor
) -> Proposal:
    """Return what is asked for: queries [B, D], labels, and values to start from.

    targets: what each row wants; outputs: [B, V], what the layer gives at the queries; hidden:
    [B, T, D], what it is given.
    """
    settings, queries = context.settings, rows.queries
    model, semantics = context.host.model, settings.semantics
    labels = heads.labels_of(targets, rows.head, context.kind, model, semantics)
    first_id = context.history.next_id
    fresh = [
        output.to(queries.dtype)
        if settings.value_init == "warm"
        else _cold_value(semantics == "paper", output, first_id + at, queries.dtype)
        for at, output in enumerate(outputs)
    ]
    if settings.query != "every_token":
        return Proposal(queries, labels, fresh)
    return Proposal(queries, labels, fresh, hidden, rows.positions)


def _cold_value(is_own: bool, output: Tensor, edit_id: int, dtype: torch.dtype) -> Tensor:
    """Draw a value [V] to start from: of an edit always the same, or from the global generator."""
    width = output.shape[-1]
    if is_own:
        own = torch.Generator(device="cpu").manual_seed(edit_id)
        drawn = torch.rand(width, generator=own, dtype=torch.float32, device="cpu")
    else:  # as the reference draws it
        drawn = torch.rand(1, width, dtype=torch.float32, device="cpu")[0]
    return drawn.to(output.device, dtype)
