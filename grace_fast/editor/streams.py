"""Streams of edits: taken one by one, decided in order, trained many at once, published by batch.

Each prompt is asked alone, as serving asks it, so that what is decided is what `edit` would decide.
A batch ends before an edit that would take over another one's answer in it, for that one has to be
trained first; and before a row that cannot stand beside the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from grace_fast.codebook import scalars
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.modes import lasting
from grace_fast.editor import batches, heads, memory, prompts, session
from grace_fast.editor.batches import Batch
from grace_fast.editor.context import EditContext
from grace_fast.editor.heads import Head
from grace_fast.editor.prefix_cache import PrefixCache
from grace_fast.editor.session import Contradicted, Session, Text
from grace_fast.editor.training import frozen, require_differentiable
from grace_fast.editor.trial import Rows
from grace_fast.edits.edit import Edit, Refused
from grace_fast.edits.plans import RowsRefused
from grace_fast.lookup.sharded import ShardedCodebook

Report = Edit | Refused
SHARDED = 16  # edits at once where a codebook is spread over processes
# What is wrong with more than the edit in hand.
_OF_ALL = (ImportError, OSError, MemoryError, Warning)


@dataclass(frozen=True, eq=False)
class _Asked:
    """One edit that was looked at: what it asks, and where it came in the stream."""

    at: int
    batch: Batch
    head: Head
    text: Text | None
    query: Tensor  # [1, D], as it is kept
    position: Tensor  # [1]
    output: Tensor  # [1, V], what the layer gives at the query
    hidden: Tensor  # [1, T, D], what it is given; [1, 0, D] where nobody asks for that
    signature: tuple[Any, ...] | None


def edit_many(
    context: EditContext,
    edits: Iterable[Any],
    batch_size: int | Literal["auto"] = "auto",
    progress: bool = True,
) -> Iterator[Report]:
    """Return the reports of a stream of edits; see `Grace.edit_many`."""
    if isinstance(edits, str | bytes | Mapping) or not isinstance(edits, Iterable):
        kind = type(edits).__name__
        raise TypeError(f"edit_many takes an iterable of edits, got one {kind}; use edit")
    if batch_size != "auto":
        batch_size = scalars.positive("batch_size", batch_size)
    context.require_attached()
    context.directory.require_writable()
    require_differentiable(context.model)
    return _Stream(context, edits, batch_size).reports(progress)


class _Stream:
    """One stream: the edits that wait to be made, and those that cannot be, in their order."""

    def __init__(
        self, context: EditContext, edits: Iterable[Any], batch_size: int | Literal["auto"]
    ) -> None:
        self._context, self._size = context, batch_size
        self._count = len(edits) if isinstance(edits, Sized) else None
        self._source = enumerate(edits)
        self._failed: Exception | None = None  # the source: raised after what it gave is made
        self._wanted = 1  # edits to take in; more once it is known what one needs
        self._waiting: deque[_Asked | Refused] = deque()

    def reports(self, progress: bool) -> Iterator[Report]:
        """Make the edits, and yield a report of each once it is published."""
        done = -1
        with _bar(self._count, progress) as bar:
            while self._fill():
                for report, at in self._made():
                    if bar is not None and at > done:
                        bar.update(at - done)
                        done = at
                    yield report

    def _fill(self) -> bool:
        """Take in edits until a batch is there; tell whether there is any."""
        while len(self._waiting) < self._wanted:
            given = self._taken(self._wanted - len(self._waiting))
            if not given:
                break
            with lasting(), frozen(self._context.model):
                for at, one in given:
                    self._waiting.extend(self._looked_at(at, one))
            self._wanted = self._at_once()
        if not self._waiting and self._failed is not None:
            raise self._failed
        return bool(self._waiting)

    def _taken(self, most: int) -> list[tuple[int, Any]]:
        """Take edits from their source, with their places; fewer where it ends."""
        given = list[tuple[int, Any]]()
        if self._failed is None:
            try:
                given.extend((at, _own(one)) for at, one in islice(self._source, most))
            except Exception as error:
                self._failed = error
        return given

    def _at_once(self) -> int:
        """Return how many edits a batch may have, by the longest of those that wait."""
        most = self._context.at_once
        if self._size == "auto" and isinstance(self._context.adapter.book, ShardedCodebook):
            return min(most, SHARDED)  # by no measurement: every rank has to make the same batches
        if self._size != "auto":
            return min(most, self._size) if most < memory.MOST else self._size
        waiting = [one.batch for one in self._waiting if isinstance(one, _Asked)]
        longest = max(waiting, key=lambda one: batches.prompts_of(one).shape[1], default=None)
        if longest is None:
            return most
        return min(most, memory.edits_at_once(self._context.model, longest))

    def _looked_at(self, at: int, given: Any) -> Iterator[_Asked | Refused]:
        """Yield what one thing of the stream asks for, or why it is refused."""
        try:
            listed = list(_edits_of(given))
        except (ValueError, TypeError) as error:
            yield Refused(at, error)
            return
        for batch, target, joint in listed:
            try:
                yield self._look(at, batch, target, joint)
            except Exception as error:
                self._raise_if_of_all(error)
                yield Refused(at, error)

    def _look(self, at: int, given: Any, target: Any, joint: str | None) -> _Asked:
        """Run the model on one prompt alone."""
        context = self._context
        batch = context.batch_of(given, target, joint)
        count = len(batches.prompts_of(batch))
        if count != 1:
            raise ValueError(f"an edit of a stream is one prompt, got a batch of {count}")
        head = session.check(context, batch)
        is_known = context.tokens_are_checked  # and that the layer runs once
        seen = context.observe(batch, in_training=True, to_layer=is_known)
        query, _ = session.asked(context, batch, seen)
        keeps = context.settings.store_text and not isinstance(given, Mapping)
        text = prompts.as_text(given, target) if keeps else None
        kept = slice(None) if context.settings.query == "every_token" else slice(0)
        hidden, signature = seen.hidden[:, kept], batches.signature(batch)
        return _Asked(at, batch, head, text, query, seen.positions, seen.outputs, hidden, signature)

    def _made(self) -> list[tuple[Report, int]]:
        """Make a batch of the edits that wait first; return its reports, with their places."""
        waiting, book = self._waiting, self._context.adapter.book
        first_of_them = waiting[0]
        if isinstance(first_of_them, Refused):
            waiting.popleft()
            return [(first_of_them, first_of_them.at)]
        taken, size = list[_Asked](), self._at_once()
        for one in waiting:
            if not isinstance(one, _Asked) or len(taken) == size:
                break
            first = taken[0].signature if taken else None
            if taken and (first is None or one.signature != first or one.head != taken[0].head):
                break
            taken.append(one)
        assert book is not None, "the first edit made it"
        made = self._published(book, taken)
        for _ in made:
            waiting.popleft()
        return [(report, one.at) for report, one in zip(made, taken, strict=False)]

    def _published(self, book: Codebook, taken: list[_Asked]) -> list[Report]:
        """Make edits, or as many first ones of them as make a batch; return their reports."""
        refused = dict[int, Refused]()
        while len(refused) < len(taken):
            rest = [at for at in range(len(taken)) if at not in refused]
            try:
                made = iter(self._batch([taken[at] for at in rest], book))
            except RowsRefused as error:
                for at in error.rows:
                    refused[rest[at]] = Refused(taken[rest[at]].at, error)
                continue
            except Exception as error:
                self._raise_if_of_all(error)
                if len(rest) > 1:  # whose it is shows where each is alone
                    return self._published(book, taken[: max(1, len(taken) // 2)])
                refused[rest[0]] = Refused(taken[rest[0]].at, error)
                continue
            reports = list[Report]()
            for at in range(len(taken)):
                report = refused.get(at) or next(made, None)
                if report is None:
                    break
                reports.append(report)
            return reports
        return [refused[at] for at in range(len(taken))]

    def _batch(self, taken: Sequence[_Asked], book: Codebook) -> list[Edit]:
        """Train and publish edits, or as many first ones of them as supersede none of the others.

        Raises: as `Session.publish`.
        """
        context = self._context
        context.require_attached()
        context.directory.require_writable()
        prefix = PrefixCache(context.model, context.adapter.layer)
        with lasting(), frozen(context.model), prefix:
            try:
                return self._session(taken, prefix).publish(book)
            except Contradicted:  # by now, where others edit meanwhile
                least, most = 1, len(taken)  # that many supersede none; so many do
                while most - least > 1:
                    middle = (least + most) // 2
                    if self._session(taken[:middle], prefix).sketch(book).superseded:
                        most = middle
                    else:
                        least = middle
        return self._batch(taken[:least], book)

    def _session(self, taken: Sequence[_Asked], prefix: PrefixCache) -> Session:
        config = getattr(self._context.host.model, "config", None)
        padding = getattr(config, "pad_token_id", None)
        padding = padding if isinstance(padding, int) and padding >= 0 else 0
        batch = batches.together([one.batch for one in taken], padding)
        queries, outputs, where = (
            torch.cat(parts)
            for parts in zip(*((one.query, one.output, one.position) for one in taken), strict=True)
        )
        hidden = batches.joined([one.hidden for one in taken], 0)
        rows = Rows(batch, taken[0].head, queries, where, outputs.dtype)
        targets = (heads.targets_of(one.batch, one.head, 1)[0] for one in taken)
        proposal = session.propose(self._context, rows, targets, outputs, hidden)
        texts = [one.text for one in taken]
        return Session(self._context, rows, proposal, prefix, texts, trains_all=True)

    def _raise_if_of_all(self, error: Exception) -> None:
        """Raise what is wrong with more than one edit: no memory, no disk, no layer any more."""
        if isinstance(error, _OF_ALL) or memory.has_ended(error):
            raise error
        self._context.require_attached()


def _own(given: Any) -> Any:
    """Return an edit that stays as it is, whatever its iterator writes into what it gave."""
    if not isinstance(given, Mapping):
        return given
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()
    }


def _edits_of(given: Any) -> Iterator[tuple[Any, Any, str | None]]:
    """Yield the prompt, target and joint of one thing of a stream, and of its paraphrases.

    Raises: ValueError or TypeError for what is no edit.
    """
    if isinstance(given, Mapping):
        if "target" not in given:
            yield dict(given), None, None
            return
        named = [name for name in ("prompt", "messages") if given.get(name) not in (None, "", [])]
        if len(named) != 1:
            raise ValueError(
                f"a record must have a prompt or messages beside its target, got {sorted(given)}"
            )
        target, joint = given["target"], given.get("joint")
        yield given[named[0]], target, joint
        for paraphrase in _paraphrases_of(given.get("paraphrases")):
            yield paraphrase, target, joint
        return
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or len(given) != 2:
        raise TypeError(
            "an edit of a stream must be (prompt, target), a record with prompt and target, or a "
            f"batch of tensors of one row, got {type(given).__name__}"
        )
    yield given[0], given[1], None


def _paraphrases_of(given: Any) -> list[Any]:
    """Return the other prompts of a record: one text is one of them, and no list of letters.

    Raises: TypeError for anything else.
    """
    if isinstance(given, str):
        return [given]
    if hasattr(given, "tolist"):  # an array, as tables hold lists
        given = given.tolist()
    if given is None:
        return []
    if isinstance(given, bytes | Mapping) or not isinstance(given, Iterable):
        raise TypeError(f"paraphrases must be a list of prompts, got {type(given).__name__}")
    return list(given)


def _bar(total: int | None, progress: bool) -> Any:
    """Return a progress bar by tqdm on a terminal, where that is installed."""
    if not progress or find_spec("tqdm") is None:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=total, desc="edits", unit=" edits", disable=None)
