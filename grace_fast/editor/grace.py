"""GRACE on a model: edit mistakes away, explain, undo, verify, save.

One edit = run the model once and take its query, decide against the codebook, train one value,
decide again and publish. A stream of edits does the same with many values at once. The model's
weights never change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grace_fast.codebook import scalars
from grace_fast.codebook.codebook import Codebook
from grace_fast.editor import batches, prompts, session, streams
from grace_fast.editor.context import EditContext
from grace_fast.editor.prompts import Prompt, Target
from grace_fast.edits.edit import Edit, Refused
from grace_fast.edits.settings import Settings
from grace_fast.edits.verify import Verification, verify
from grace_fast.hook.counters import Counters
from grace_fast.hook.generation import Generation
from grace_fast.lookup import lookup
from grace_fast.lookup.sharded import ShardedCodebook
from grace_fast.store import atomic
from grace_fast.store.versions import Difference, Logged, difference, go_back


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


class Grace:
    """An editor attached to one layer of a model. `attach` and `from_pretrained` make it."""

    def __init__(self, context: EditContext) -> None:
        self._context, self._adapter = context, context.adapter
        self.model, self.tokenizer = context.model, context.tokenizer
        self.kind = context.kind  # of answer that the model gives: see `editor.heads`
        self.name, self.path = context.adapter.site.name, context.directory.path

    def __repr__(self) -> str:
        book = self._adapter.book
        keys, edits = 0 if book is None else len(book), len(self._context.history.edits)
        return (
            f"Grace({type(self.model).__name__}, layer={self.settings.layer!r}, "
            f"epsilon={self.settings.epsilon:.4g}, {edits} edits, {keys} keys)"
        )

    @property
    def settings(self) -> Settings:
        """What `attach` was asked for."""
        return self._context.settings

    @property
    def codebook(self) -> Codebook:
        """The keys, values and radii of the edits.

        Raises: ValueError before the first edit of a layer that does not declare its widths.
        """
        return self._context.codebook

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
        whole = self._context.batch_of(batch, target, joint)
        count = len(batches.prompts_of(whole))
        if count != 1:
            raise ValueError(f"edit takes one prompt, got a batch of {count}; use edit_batch")
        text = None
        if self.settings.store_text and not isinstance(batch, Mapping):
            text = prompts.as_text(batch, target)
        return session.edit(self._context, whole, text)[0]

    def edit_batch(self, batch: Mapping[str, Any]) -> list[Edit]:
        """Edit every row of a batch, in order, each seeing the ones before; one report a row.

        Each value that was touched is trained once, on all its rows. A row that a later one of the
        same batch supersedes is recorded and not trained on: its loss is NaN.

        Raises: as `edit`.
        """
        return session.edit(self._context, self._context.batch_of(batch))

    def edit_many(
        self,
        edits: Iterable[Any],
        batch_size: int | Literal["auto"] = "auto",
        progress: bool = True,
    ) -> Iterator[Edit | Refused]:
        """Make a stream of edits, many values trained at once; return an iterator of reports.

        Nothing is edited before the iterator is asked. Every edit of the stream gives one report,
        in order, once it is published (and on the disk, where `attach` was given a path). What is
        decided is what `edit` would decide, one after the other: outcomes, rows, radii, labels.

        edits: each a (prompt, target), as `edit` takes them; a record with `prompt` (or `messages`)
            and `target`, and where wanted a `joint` and `paraphrases`, each of which is an edit of
            its own after the prompt; or a batch of tensors of one row, as `edit` takes it. What
            cannot be edited gives a `Refused`, which says why, and the others go on.
        batch_size: how many at most are trained at once; "auto": as many as there is memory for, 64
            at most. Where memory ends it is halved, and nothing is lost.
        progress: show a bar on a terminal, where tqdm is installed.

        Raises: TypeError for no iterable, ValueError for a batch size below 1; OSError where a
        batch cannot be written. What was reported stays then, and stays where you stop.
        """
        return streams.edit_many(self._context, edits, batch_size, progress)

    def undo(self, edit_id: int) -> Edit:
        """Take one edit back, whatever came after it, and return it.

        Its row's radius and key become those of the newest remaining event on it, its value that of
        the newest remaining edit; a row goes with its last edit, and the split it caused with it.

        Raises: KeyError where no remaining edit has the id.
        """
        self._context.directory.require_writable()
        with self._context.noting() as draft:
            return self._context.history.undo(draft, scalars.whole("edit_id", edit_id))

    # Versions, where there is a directory

    def log(self) -> list[Logged]:
        """Return the versions that can be gone back to, oldest first, but for the base itself."""
        entries = self._context.directory.journal().entries()
        return [Logged(each.version, each.time, each.kind, len(each.content)) for each in entries]

    def checkout(self, version: int) -> None:
        """Answer as at an earlier version, in a new version that can itself be taken back.

        Rows and ids that were given since are not given again.

        Raises: ValueError for a version that is not in `log` nor its base.
        """
        self._context.directory.require_writable()
        earlier, history = self._context.directory.at(version)
        go_back(self.codebook, self._context.history, earlier.snapshot(), history)

    def diff(self, old: int, new: int | None = None) -> Difference:
        """Return what a version has otherwise than an earlier one; by default the newest.

        Raises: ValueError as `checkout`.
        """
        versions = (old, self.codebook.version if new is None else new)
        books = [self._context.directory.at(each) for each in versions]
        before, after = [(book.snapshot(), history) for book, history in books]
        return difference(before, after)

    def compact(self) -> None:
        """Make the newest version the base, so that opening it replays nothing; look-ups go on.

        Earlier versions are gone then; every edit stays and can be undone.

        Raises: OSError where it cannot be written; the directory is as before then.
        """
        self._context.directory.require_writable()
        self._context.directory.compact(self.codebook)

    def refresh(self) -> bool:
        """Take up the versions that another process made since; tell whether there were any.

        For an editor that was attached with read_only=True.

        Raises: CodebookCorrupt, OSError where they cannot be read; this stays as it is then.
        """
        return self._context.refresh()

    # Looking

    def edits(self) -> list[Edit]:
        """Return the edits that remain, oldest first."""
        with self._context.held():
            return list(self._context.history.edits.values())

    def explain(
        self, batch: Mapping[str, Any] | Prompt, target: Target | None = None
    ) -> list[Explanation]:
        """Say for every row of a batch (or one text) which edit is nearest and if it fires."""
        queries = self._context.query_of(self._context.batch_of(batch, target))
        if self._adapter.book is None or not len(self.codebook):
            return [Explanation(False, None, -1, math.inf, math.nan) for _ in queries]
        with self.codebook.held() as snapshot:
            near, match = lookup.nearest(queries, snapshot), lookup.find(queries, snapshot)
            lives = map(self._context.history.rows.get, near.row.tolist())
            newest = [life.edits[-1] if life and life.edits else None for life in lives]
        rows, hits, distances = near.row.tolist(), match.hit.tolist(), near.distance.tolist()
        radii = [snapshot.row(row).radius if row >= 0 else math.nan for row in rows]
        return list(map(Explanation, hits, newest, rows, distances, radii))

    def query_of(self, batch: Mapping[str, Any] | Prompt) -> Tensor:
        """Return what a batch asks the codebook, [B, D], as the codebook would store it."""
        return self._context.query_of(self._context.batch_of(batch))

    def verify(self) -> Verification:
        """Look the stored query of every edit up again.

        Each one fires, is superseded by a later edit (named), or is broken; broken is a failure,
        and so is a layer that left the model, for nobody asks then.
        """
        self._adapter.attachment.look_after_layer()
        if self._adapter.book is None:
            return Verification(())
        with self.codebook.held() as snapshot:
            history = self._context.history.copy()
        found = verify(history, snapshot, self.settings.rules(snapshot.dtype))
        is_there = any(module is self._context.host.model for module in self.model.modules())
        return replace(found, is_asked=is_there and not self._adapter.attachment.is_lost)

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
        self._context.unload()
        return self.model

    def save_pretrained(self, path: str | Path, hmac_key: bytes | None = None) -> None:
        """Save codebook, edits and settings to a directory, replacing what is there in one step.

        hmac_key: what the manifest is signed with, as in `attach`; by default that of `attach`.

        Raises: OSError where it cannot be written; what was there stays valid then.
        """
        if isinstance(self.codebook, ShardedCodebook):
            raise self.codebook.unsaved("save_pretrained")
        directory, path = self._context.directory, atomic.absolute(path)
        if directory.is_at(path):
            self.compact()
            return
        with self.codebook.held() as now:
            directory.save(path, now, hmac_key)
