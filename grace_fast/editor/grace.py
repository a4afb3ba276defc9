"""GRACE on a model: attach to one layer, edit mistakes away, explain, undo, verify, save.

One edit = run the model once and take its query, decide against the codebook, train one value,
decide again and publish. The model's weights never change. Until the last step nothing is
published, so an edit that fails leaves model and codebook as they were. A value is trained without
the writer's lock: other threads edit meanwhile, and where that changed the decision it is trained
anew.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast.codebook import forks, scalars
from grace_fast.codebook.checks import DTYPES
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.draft import Draft
from grace_fast.codebook.modes import lasting
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.editor import batches, calibrate, edit_warnings, heads, prompts, unfit
from grace_fast.editor.batches import Batch, Prompt, Target
from grace_fast.editor.fingerprint import fingerprint
from grace_fast.editor.heads import Head
from grace_fast.editor.training import Attempt, Trained, frozen, require_differentiable, train
from grace_fast.edits import plans
from grace_fast.edits.edit import Edit
from grace_fast.edits.history import History
from grace_fast.edits.plans import Plan, Proposal
from grace_fast.edits.settings import Settings
from grace_fast.edits.verify import Verification, verify
from grace_fast.errors import CodebookReadOnly
from grace_fast.hook import compile, positions
from grace_fast.hook.adapter import Adapter, Observation
from grace_fast.hook.counters import Counters
from grace_fast.hook.generation import Generation
from grace_fast.hook.training_override import TrainingOverride
from grace_fast.hook.virtual_tokens import Virtual
from grace_fast.hook.wrappers import declared_codebook, finds_padding, host_of, stack_of, uncompiled
from grace_fast.lookup import lookup
from grace_fast.lookup.sharded import ShardedCodebook
from grace_fast.semantics import Rules
from grace_fast.store import atomic, files, manifest
from grace_fast.store.durable import EditableDirectory
from grace_fast.store.journal import JournalFile
from grace_fast.store.locks import Lock
from grace_fast.store.saved import read_saved, write
from grace_fast.store.versions import Difference, Logged, difference, go_back, replay

TRAININGS = 3  # without the lock; an edit that others come between so often is trained within it


class _Superseded(Exception):
    """Another edit came between, and changed what this one has to do."""


@dataclass(frozen=True)
class Explanation:
    """Why one prompt is answered as it is."""

    fires: bool  # the nearest key's ball holds the query
    edit: int | None  # the newest edit on the nearest row; None where no edit made it, or none is
    row: int  # the nearest row, -1 for an empty codebook
    distance: float  # to it, inf for an empty codebook
    radius: float  # of it, NaN for an empty codebook

    @property
    def margin(self) -> float:
        """How far inside the ball the query is; negative outside."""
        return self.radius - self.distance


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


class Grace:
    """An editor attached to one layer of a model. `attach` and `from_pretrained` make it."""

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        settings: Settings,
        tokenizer: Any = None,
        path: str | Path | None = None,
        name: str | None = None,
        hmac_key: bytes | None = None,
        lock: Lock | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.path = None if path is None else atomic.absolute(path)
        self._hmac_key = hmac_key
        self._store: EditableDirectory | None = None  # where every edit goes before anybody sees it
        self._reads: JournalFile | None = None  # what `refresh` takes up, of a reader
        self._is_reader = False
        self._host = host_of(model, settings.layer)
        base = self._host.model
        self.kind = heads.kind_of(base)
        unfit.refuse(self._host, layer, settings.query, self.kind)
        stack, in_decoder = stack_of(base, layer)
        before_it_is_nothing = in_decoder and settings.replacement == "replace_prompt"
        if before_it_is_nothing or settings.query == "every_token":
            settings = Settings(**{**asdict(settings), "replacement": "replace_last"})
        self.settings = settings
        self._history = History()
        self._making = threading.Lock()
        self._scale_is_checked = self._tokens_are_checked = False
        self._adapter = Adapter(
            model=base,
            layer=layer,
            stack=stack,
            book=declared_codebook(layer),
            replacement=settings.replacement,
            query=settings.query,
            decoder_only=self.kind == "decoder",
            first_token=in_decoder,
            finds_padding=self.kind == "classifier" and finds_padding(base),
            name=name,
            layer_name=settings.layer,
            seat_name=self._host.layer,
            virtual=Virtual.of(self._host.called, base),
        )
        if self.path is not None and lock is not None:
            self._store = EditableDirectory(self.path, lock, lambda: self._history, hmac_key)
        compile.forget_compiled_code()
        self._adapter.install()
        self._is_attached = True
        forks.guard(self, "_making", forks.Order.MAKING, Grace._take_back_in_child)

    def __repr__(self) -> str:
        book = self._adapter.book
        keys = 0 if book is None else len(book)
        return (
            f"Grace({type(self.model).__name__}, layer={self.settings.layer!r}, "
            f"epsilon={self.settings.epsilon:.4g}, {len(self._history.edits)} edits, {keys} keys)"
        )

    @property
    def _layer(self) -> nn.Module:
        return self._adapter.layer

    @property
    def codebook(self) -> Codebook:
        """The keys, values and radii of the edits.

        Raises: ValueError before the first edit of a layer that does not declare its widths.
        """
        if self._adapter.book is None:
            raise ValueError(
                f"{self.settings.layer} does not declare its widths; "
                "its codebook is made at the first edit"
            )
        return self._adapter.book

    @property
    def hits(self) -> dict[int, int]:
        """How often each row has fired, by row; counted beside the codebook, not in it."""
        return self._adapter.hits

    @property
    def counters(self) -> Counters:
        """What look-ups did until now, from any thread; see `grace_fast.hook.counters`."""
        book = self._adapter.book
        now = None if book is None else book.snapshot()
        return self._adapter.tally.read(
            versions=0 if now is None else now.version, keys=0 if now is None else len(now)
        )

    # Editing

    def edit(
        self,
        batch: Mapping[str, Any] | Prompt,
        target: Target | None = None,
        *,
        joint: str | None = None,
    ) -> Edit:
        """Make the model answer one prompt with its target, from now on.

        batch: `input_ids` [1, T], `labels` and the model's other inputs; or a prompt's text, or
        chat messages, with the target's text (for a classifier its class, for a regression a
        number) and the tokenizer of `attach`. Labels are what the model's own loss takes: whole
        numbers; of a regression numbers [1] or [1, C], which are right within 1 % (of 1 at least);
        several labels at once as [1, C] in [0, 1]; `start_positions` and `end_positions` [1] of a
        span.
        joint: what is written between a prompt's text and its target, "" or " " say; by default as
            people write them: a space, but none in Chinese, after "$" or "(" and the like.

        Raises: ValueError for more than one row, an empty prompt, a target without tokens, a label
        outside the classes or a query that is not finite; TypeError for a prompt or a target that
        is neither text nor number. Nothing has changed then.
        """
        if target is None and not isinstance(batch, Mapping):
            raise ValueError("an edit by text needs a target: edit(prompt, target)")
        whole = self._batch(batch, target, joint)
        count = batches.size(whole)
        if count != 1:
            raise ValueError(f"edit takes one prompt, got a batch of {count}; use edit_batch")
        return self._edit(whole, self._text(batch, target))[0]

    def edit_batch(self, batch: Mapping[str, Any]) -> list[Edit]:
        """Edit every row of a batch, in order, each seeing the ones before; one report a row.

        Each value that was touched is trained once, on all its rows. A row that a later one of the
        same batch supersedes is recorded and not trained on: its loss is NaN.

        Raises: as `edit`.
        """
        return self._edit(self._batch(batch, None), None)

    def undo(self, edit_id: int) -> Edit:
        """Take one edit back, whatever came after it, and return it.

        Its row's radius and key become those of the newest remaining event on it, its value that of
        the newest remaining edit; a row goes with its last edit, and the split it caused with it.

        Raises: KeyError where no remaining edit has the id.
        """
        self._require_editable()
        with self._noting(self.codebook) as draft:
            return self._history.undo(draft, scalars.whole("edit_id", edit_id))

    # Versions, where there is a directory

    def log(self) -> list[Logged]:
        """Return the versions that can be gone back to, oldest first, but for the base itself."""
        entries = self._journal().entries()
        return [Logged(each.version, each.time, each.kind, len(each.content)) for each in entries]

    def checkout(self, version: int) -> None:
        """Answer as at an earlier version, in a new version that can itself be taken back.

        Rows and ids that were given since are not given again.

        Raises: ValueError for a version that is not in `log` nor its base.
        """
        self._require_editable()
        earlier, history = self._at(version)
        go_back(self.codebook, self._history, earlier.snapshot(), history)

    def diff(self, old: int, new: int | None = None) -> Difference:
        """Return what a version has otherwise than an earlier one; by default the newest.

        Raises: ValueError as `checkout`.
        """
        before, history = self._at(old)
        after = self._at(self.codebook.version if new is None else new)
        return difference((before.snapshot(), history), (after[0].snapshot(), after[1]))

    def compact(self) -> None:
        """Make the newest version the base, so that opening it replays nothing; look-ups go on.

        Earlier versions are gone then; every edit stays and can be undone.

        Raises: OSError where it cannot be written; the directory is as before then.
        """
        self._require_editable()
        self._journal()
        assert self._store is not None, "who edits a journal has a store"
        self._store.begin(self.codebook, self._writer_of(self.codebook))

    def refresh(self) -> bool:
        """Take up the versions that another process made since; tell whether there were any.

        For an editor that was attached with read_only=True.

        Raises: CodebookCorrupt, OSError where they cannot be read; this stays as it is then.
        """
        if self._reads is None or self.path is None:
            raise ValueError("only an editor that was attached with read_only=True can refresh()")
        return self._take_up()

    def _take_up(self) -> bool:
        assert self.path is not None, "checked by refresh"
        return files.steadily(self.path, self._taken_up)

    def _taken_up(self) -> bool:
        assert self.path is not None, "checked by refresh"
        assert self._reads is not None, "checked by refresh"
        book, config = self.codebook, files.read_config(self.path, self._hmac_key)
        told = config.get("journal")
        if told is None or told.get("file") != self._reads.path.name:  # compacted, saved anew
            saved = read_saved(self.path, self._hmac_key, self.settings.max_radius)
            fresh, history, journal = saved.open(book.device)
            self._reads.close()
            self.read(fresh, history, journal)
            return fresh.version != book.version
        if self._reads.newest() == book.version:
            return False
        with book.held(), self._history.attempting():
            replay(self._reads, book, self._history)
        return True

    def _at(self, version: int) -> tuple[Codebook, History]:
        self._journal()
        assert self.path is not None, "a journal lies in a directory"
        path, version = self.path, scalars.whole("version", version)

        def read() -> tuple[Codebook, History]:
            return read_saved(path, self._hmac_key).codebook(version=version)

        return files.steadily(path, read)

    def _journal(self) -> JournalFile:
        journal = self._reads if self._store is None else self._store.journal
        if journal is None:
            raise ValueError("there are no versions without a directory; attach(..., path=DIR)")
        return journal

    # Looking

    def edits(self) -> list[Edit]:
        """Return the edits that remain, oldest first."""
        with self._held():
            return list(self._history.edits.values())

    def explain(
        self, batch: Mapping[str, Any] | Prompt, target: Target | None = None
    ) -> list[Explanation]:
        """Say for every row of a batch (or one text) which edit is nearest and if it fires."""
        queries = self.query_of(self._batch(batch, target))
        if self._adapter.book is None or not len(self.codebook):
            return [Explanation(False, None, -1, math.inf, math.nan) for _ in queries]
        with self.codebook.held() as snapshot:
            near, match = lookup.nearest(queries, snapshot), lookup.find(queries, snapshot)
            lives = [self._history.rows.get(row) for row in near.row.tolist()]
            newest = [life.edits[-1] if life and life.edits else None for life in lives]
        explained = []
        for at, row in enumerate(near.row.tolist()):
            radius = snapshot.row(row).radius if row >= 0 else math.nan
            explained.append(
                Explanation(
                    fires=bool(match.hit[at]),
                    edit=newest[at],
                    row=row,
                    distance=float(near.distance[at]),
                    radius=radius,
                )
            )
        return explained

    def query_of(self, batch: Mapping[str, Any] | Prompt) -> Tensor:
        """Return what a batch asks the codebook, [B, D], as the codebook would store it."""
        seen = self._observe(self._batch(batch, None))
        return seen.queries.to(self._book_for(seen).dtype)

    def verify(self) -> Verification:
        """Look the stored query of every edit up again.

        Each one fires, is superseded by a later edit (named), or is broken; broken is a failure,
        and so is a layer that left the model, for nobody asks then.
        """
        self._adapter.look_after_layer()
        if self._adapter.book is None:
            return Verification(())
        with self.codebook.held() as snapshot:
            history = self._history.copy()
        found = verify(history, snapshot, self.settings.rules(snapshot.dtype))
        is_there = any(module is self._host.model for module in self.model.modules())
        return replace(found, is_asked=is_there and not self._adapter.is_lost)

    # For a while

    @contextmanager
    def prompt(self, positions: Tensor | Sequence[int] | None = None) -> Iterator[None]:
        """Take the calls of a `with` block as one prompt and its continuation, as in `generate`.

        For decoding loops of your own: the prompts' ends are looked up in the call that computes
        them, and what is found is held until the block ends.

        positions: [B], the last token of each row's prompt, counted from the first token of the
            row, padding and cached tokens included; by default where the first call's prompts end.
        """
        ends = None
        if positions is not None:
            home = positions.device if isinstance(positions, Tensor) else "cpu"
            ends = torch.as_tensor(positions, dtype=torch.int64, device=home)
        if ends is not None and (ends.ndim != 1 or bool((ends < 0).any())):
            raise ValueError(f"positions must be [B] and at least 0, got {ends.tolist()}")
        with self._adapter.holding(Generation(ends)):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let the model answer as it did before any edit, within a `with` block.

        It does so in every thread, until the last block is left.
        """
        with self._adapter.disabled():
            yield

    def unload(self) -> nn.Module:
        """Take the adaptor off and return the model, bit for bit as it was before `attach`."""
        if self._store is not None:
            self._store.close(dict(self.hits))
        if self._is_attached:
            self._adapter.remove()
            self._is_attached = False
        return self.model

    def save_pretrained(self, path: str | Path, hmac_key: bytes | None = None) -> None:
        """Save codebook, edits and settings to a directory, replacing what is there in one step.

        hmac_key: what the manifest is signed with, as in `attach`; by default that of `attach`.

        Raises: OSError where it cannot be written; what was there stays valid then.
        """
        if isinstance(self.codebook, ShardedCodebook):
            raise self.codebook.unsaved("save_pretrained")
        key = self._hmac_key if hmac_key is None else hmac_key
        path = atomic.absolute(path)
        if self._store is not None and self.path is not None and _is_same(self.path, path):
            self.compact()
            return
        lock = Lock(path)
        try:
            with self.codebook.held() as now:
                self._save(path, now, key, {})
        finally:
            lock.close()

    # The steps of an edit

    def _edit(self, batch: Batch, text: tuple[str, str] | None) -> list[Edit]:
        self._require_attached()
        self._require_editable()
        model, kind = self._host.model, self.kind
        reads_labels = self._host.called if self._host.is_wrapper else model
        head = heads.head_of(reads_labels, kind, batch.get("labels"))
        batches.check(batch, kind, head, heads.classes_of(model, kind))
        self._refuse_unknown_labels(batch, head)
        require_differentiable(self.model)
        with lasting(), frozen(self.model):
            seen = self._observe(batch)
            self._check_tokens(batch, seen)
            queries = seen.queries.to(self._book_for(seen).dtype)
            self._check_query(queries, seen)
            book, proposal = self._own_book(seen), self._proposal(batch, head, queries, seen)
            for _ in range(TRAININGS):
                try:
                    return self._train_and_publish(book, batch, head, proposal, seen, text)
                except _Superseded:
                    continue
            with self._noting(book):  # nobody comes between any more
                return self._train_and_publish(book, batch, head, proposal, seen, text)

    def _proposal(self, batch: Batch, head: Head, queries: Tensor, seen: Observation) -> Proposal:
        padding = getattr(getattr(self._host.model, "config", None), "pad_token_id", None)
        padding = None if self.kind == "classifier" else padding
        whole, count = self.settings.semantics != "paper", len(queries)
        targets = heads.targets_of(batch, head, count)
        labels = [heads.label_of(row, head, padding, whole) for row in targets]
        first_id = self._history.next_id
        fresh = [self._fresh_value(seen, at, first_id + at, queries.dtype) for at in range(count)]
        if self.settings.query != "every_token":
            return Proposal(queries, labels, fresh)
        return Proposal(queries, labels, fresh, seen.hidden, seen.positions)

    def _train_and_publish(
        self,
        book: Codebook,
        batch: Batch,
        head: Head,
        proposal: Proposal,
        seen: Observation,
        text: tuple[str, str] | None,
    ) -> list[Edit]:
        """Decide, train while other threads may write, and publish where that changed nothing.

        Raises: _Superseded where it did.
        """
        rules = self.settings.rules(book.dtype)
        with book.sketching() as draft, self._history.attempting(keep=False):
            plan = plans.make(proposal, draft, self._history, rules, self._history.next_id)
        results = [self._train(one, batch, head, seen) for one in plan.trainings]
        with self._noting(book) as draft:
            now = plans.make(proposal, draft, self._history, rules, self._history.next_id)
            if not now.agrees(plan):
                raise _Superseded
            self._warn_of_shared_queries(batch, now, rules)
            self._warn_of_nothing_learnt(now, results)
            for one, result in zip(now.trainings, results, strict=True):
                if result.steps or self.settings.iterations == 0:
                    draft.set_value(one.row, result.value)
            return self._record(draft.snapshot(), batch, proposal, now, results, text)

    @contextmanager
    def _noting(self, book: Codebook) -> Iterator[Draft]:
        """Open a draft; where it is not published, the history is as it was before."""
        # Nobody gets an id of a draft's before it is published or forgotten.
        with book.held(), self._history.attempting(), book.writing() as draft:
            yield draft

    def _train(
        self, override: TrainingOverride, batch: Batch, head: Head, seen: Observation
    ) -> Trained:
        """Train one value on the rows of the batch that it answers."""
        picked, start = list(override.picked), override.value
        index = torch.tensor(picked, dtype=torch.int64, device=seen.positions.device)
        where = seen.positions[index]
        part = batches.rows(batch, picked)
        targets = heads.targets_of(part, head, len(picked))
        asked = heads.for_loss(part, head, seen.output.dtype)
        attempt = self._attempts(override, asked, targets, head, where)
        return train(start, attempt, self.settings.schedule())

    def _attempts(
        self, override: TrainingOverride, batch: Batch, targets: Tensor, head: Head, where: Tensor
    ) -> Attempt:
        """Return what runs a batch with a value in place of a row's, asked at where [B]."""
        wanted = ".start_logits and .end_logits" if head == "span" else ".logits"

        def attempt(value: Tensor) -> tuple[Tensor, bool]:
            override.value = value
            with self._adapter.asking_at(where), self._adapter.trying(override):
                answer = self._call(batch)
            loss, logits = getattr(answer, "loss", None), heads.prediction_of(answer, head)
            if loss is None or logits is None:
                raise TypeError(
                    f"the model must return an object with .loss and {wanted} when it is given "
                    f"labels, got {type(answer).__name__}"
                )
            return loss, heads.is_correct(logits.detach(), targets, self.kind, head)

        return attempt

    def _record(
        self,
        after: Snapshot,
        batch: Batch,
        proposal: Proposal,
        plan: Plan,
        results: Sequence[Trained],
        text: tuple[str, str] | None,
    ) -> list[Edit]:
        """Note the edits of a batch in the history, as a draft holds them in the end."""
        reached = {
            at: result
            for one, result in zip(plan.trainings, results, strict=True)
            for at in one.picked
        }
        edits = []
        for at, done in enumerate(plan.applied):
            result = reached.get(at)
            edit = Edit(
                id=self._history.next_id,
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
                prompt=batches.prompt_checksum(batch, at, self.kind),
                text=text,
            )
            self._history.record(edit, after.row(done.row).label_slot)
            edits.append(edit)
        return edits

    def _fresh_value(self, seen: Observation, at: int, edit_id: int, dtype: torch.dtype) -> Tensor:
        if self.settings.value_init == "warm":
            return seen.outputs[at].to(dtype)
        width = seen.output.shape[-1]
        if self.settings.semantics != "paper":
            drawn = torch.rand(1, width, dtype=torch.float32, device="cpu")[0]
        else:  # the same edit always starts the same
            own = torch.Generator(device="cpu").manual_seed(edit_id)
            drawn = torch.rand(width, generator=own, dtype=torch.float32, device="cpu")
        return drawn.to(seen.output.device, dtype)

    def _observe(self, batch: Batch) -> Observation:
        """Run the model once and return what the layer sees; nothing is replaced."""
        self._require_attached()
        where = length = None
        if not self._adapter.first_token and self._adapter.stack is self._adapter.model:
            call = self._adapter.read(batch)
            self._adapter.refuse_hidden_padding(call)
            where = positions.prompt_end(call)
            length = None if call.tokens is None else call.tokens.shape[1]
        asked = batches.runnable(batch, self.kind, self._host.model)
        if self.kind != "seq2seq":  # no loss is wanted, and labels may be outside the classes
            asked = {name: value for name, value in asked.items() if name not in heads.TARGETS}
        adapter, still = self._adapter, (torch.no_grad(), frozen(self.model))
        with still[0], still[1], adapter.asking_at(where, length), adapter.observing() as seen:
            try:
                self._call(asked)
            except IndexError as error:
                raise ValueError(batches.out_of_range(asked, self._host.model, error)) from error
        if len(seen) != 1:
            raise ValueError(
                f"{self.settings.layer} must run once in a forward call to be edited, "
                f"it ran {len(seen)} times"
            )
        return seen[0]

    def _call(self, batch: Batch) -> Any:
        reads = self._host.called if self._host.is_wrapper else self._host.model
        accepted = inspect.signature(reads.forward).parameters
        cacheless = {} if "use_cache" not in accepted else {"use_cache": False}
        with compile.stood_aside():
            return self._host.called(**{**cacheless, **batch})

    # Small print

    def _batch(
        self,
        batch: Mapping[str, Any] | Prompt,
        target: Target | None,
        joint: str | None = None,
    ) -> Batch:
        if isinstance(batch, Mapping):
            if target is not None or joint is not None:
                raise ValueError("a batch of tensors holds its target in labels; give no target")
            return dict(batch)
        return batches.from_text(batch, target, self.tokenizer, self._host.model, self.kind, joint)

    def _text(
        self, batch: Mapping[str, Any] | Prompt, target: Target | None
    ) -> tuple[str, str] | None:
        if isinstance(batch, Mapping) or not self.settings.store_text:
            return None
        asked = prompts.one_prompt(batch)
        said = asked if isinstance(asked, str) else str(asked[-1].get("content", ""))
        return said, str(prompts.one_target(target))

    def _refuse_unknown_labels(self, batch: Batch, head: Head) -> None:
        """Refuse a label a token where a wrapper reads them, which may be one token ahead or not.

        Raises: ValueError.
        """
        host = self._host
        if not host.is_wrapper or head != "classes" or batch["labels"].ndim < 2:
            return
        raise ValueError(
            f"{type(host.called).__name__} makes a loss of its own around another model, and "
            "nothing says whether it predicts the label of each token in place or one token "
            "ahead; attach to a model that makes its own loss"
        )

    def _check_tokens(self, batch: Batch, seen: Observation) -> None:
        """Refuse a layer that does not see the tokens, or as many vectors by chance alone.

        One for each prompt are as many as there are tokens where a prompt has one; the encoder's
        states may be as many as the decoder's tokens. A first edit looks again with other lengths.

        Raises: ValueError.
        """
        if self._tokens_are_checked:
            return
        length, decoded = batches.token_count(batch), batches.decoder_length(batch)
        if not self._adapter.first_token:
            if length == 1:
                self._observe(batches.with_more_tokens(batch))
        elif decoded is not None:
            given = seen.hidden.shape[1]
            if given == decoded and length in (None, decoded):
                decoded += 1 if decoded == 1 else -1  # a model may take no more
                start = batches.start_of(self._host.model)
                other = batches.with_decoder_of(batch, decoded, start)
                given = self._observe(other).hidden.shape[1]
            if given != decoded:
                raise ValueError(
                    f"{self.settings.layer} must see one vector for each of the decoder's "
                    f"{decoded} tokens, it was given {given}{unfit.ELSEWHERE}"
                )
        self._tokens_are_checked = True

    def _check_query(self, queries: Tensor, seen: Observation) -> None:
        if not queries.isfinite().all():
            row = int((~queries.isfinite().all(dim=1)).nonzero()[0])
            raise ValueError(
                f"the query of row {row} must be finite, got NaN or infinity at "
                f"{self.settings.layer}"
            )
        if self.settings.replacement == "replace_prompt" and bool((seen.positions == 0).any()):
            raise ValueError(
                "replace_prompt replaces the tokens before the query, and there are none in a "
                "prompt of one token; attach with replacement='replace_last' or 'replace_all'"
            )
        if not self._scale_is_checked:
            self._scale_is_checked = True
            edit_warnings.warn_of_scale(self.settings.layer, self.settings.epsilon, seen)

    def _warn_of_shared_queries(self, batch: Batch, plan: Plan, rules: Rules) -> None:
        """Warn where the edits of the nearest key all came from other prompts."""
        for at, done in enumerate(plan.applied):
            if done.distance > rules.repeat_distance:
                continue
            near = self._history.rows[done.row]
            if not near.edits and near.neighbour >= 0:
                near = self._history.rows[near.neighbour]
            stored = [self._history.edits[edit] for edit in near.edits]
            prompt = batches.prompt_checksum(batch, at, self.kind)
            if stored and all(edit.prompt != prompt for edit in stored):
                edit_warnings.warn_of_shared_query(self.settings.layer, stored[0], done.distance)

    def _warn_of_nothing_learnt(self, plan: Plan, results: Sequence[Trained]) -> None:
        """Warn of values whose training was given up.

        Raises: ValueError for a value that is not finite, which no codebook may hold.
        """
        for one, result in zip(plan.trainings, results, strict=True):
            at, layer = one.picked[0], self.settings.layer
            if not result.value.isfinite().all():
                raise ValueError(
                    f"the value of row {at} of the batch must be finite, and its training at "
                    f"{layer} ended in NaN or infinity; attach with a lower learning_rate"
                )
            if result.stuck is not None:
                how = (self.settings.replacement, result.stuck, result.loss, result.steps)
                edit_warnings.warn_of_nothing_learnt(layer, at, *how)

    def _book_for(self, seen: Observation) -> Codebook:
        if self._adapter.book is not None:
            return self._adapter.book
        dtype = seen.hidden.dtype if seen.hidden.dtype in DTYPES else torch.float32
        return Codebook(seen.hidden.shape[-1], seen.output.shape[-1], dtype, seen.hidden.device)

    def _own_book(self, seen: Observation) -> Codebook:
        """Return the codebook that edits go to, made by the first of them."""
        with self._making:
            if self._adapter.book is None:
                book = self._book_for(seen)
                if self._store is not None:
                    self._store.begin(book, self._writer_of(book))
                self._adapter.book = book
            return self._adapter.book

    def begin(self, journal: JournalFile | None = None) -> None:
        """Keep the codebook in its directory from now on, if it has one: go on with a journal."""
        book = self._adapter.book
        if self._store is None or book is None:  # what is not there is made by the first edit
            return
        if journal is not None:
            self._store.resume(journal, book)
        else:
            self._store.begin(book, self._writer_of(book))

    def read(self, book: Codebook, history: History, journal: JournalFile | None) -> None:
        """Answer from a codebook that others edit."""
        self.take(book, history)
        self._reads, self._is_reader = journal, True

    def take(self, book: Codebook, history: History) -> None:
        """Use a codebook and the edits that made it."""
        self._adapter.book, self._history = book, history

    def calibrate(self, inputs: Iterable[Mapping[str, Any] | str]) -> None:
        """Set epsilon from how far apart unrelated inputs are; see `calibrate.epsilon_from`.

        Raises: ValueError for fewer than 8 inputs, or where the layer cannot tell them apart.
        """
        given = [inputs] if isinstance(inputs, str | Mapping) else inputs
        with frozen(self.model):
            queries = [self.query_of(batch) for batch in given]
        if not queries:
            raise ValueError("calibration_inputs must hold at least 8 unrelated inputs, got none")
        epsilon = calibrate.epsilon_from(torch.cat(queries))
        self.settings = Settings(**{**asdict(self.settings), "epsilon": epsilon})

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold other threads' edits off: the history is noted before its version is published."""
        if self._adapter.book is None:
            yield
            return
        with self._adapter.book.held():
            yield

    def _take_back_in_child(self, _: bool) -> None:
        """Forget in a forked child the edit that another thread was in the middle of."""
        book = self._adapter.book
        if book is not None and book.was_forked_in_writing:
            self._history.take_back_attempts()

    def _require_editable(self) -> None:
        if self._is_reader:
            raise CodebookReadOnly(
                f"{self.path} was attached with read_only=True; attach it without to edit"
            )
        if self._store is not None:
            self._store.require_writable()

    def _require_attached(self) -> None:
        if not self._is_attached:
            raise RuntimeError("this editor was unloaded; attach() again")
        self._adapter.look_after_layer()
        if self._adapter.is_lost:
            raise RuntimeError(
                f"{self.settings.layer} left the model: unload() this editor, and attach its "
                "codebook to another layer"
            )

    def _writer_of(self, book: Codebook) -> Callable[[Mapping[str, Any]], None]:
        """Return what writes a codebook as the base of a journal that the manifest is told of."""
        assert self.path is not None, "a store has a directory"
        path = self.path
        return lambda told: self._save(path, book.snapshot(), self._hmac_key, told)

    def _save(
        self,
        path: Path,
        snapshot: Snapshot,
        hmac_key: bytes | None,
        told: Mapping[str, Any],
    ) -> None:
        described = {
            "settings": asdict(self.settings),
            "fingerprint": fingerprint(uncompiled(self._host.called), self._layer),
            "hits": manifest.counted(dict(self.hits)),
            **told,
        }
        write(path, described, snapshot, self._history, hmac_key)
