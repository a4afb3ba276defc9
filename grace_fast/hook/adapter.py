"""The forward hook of one layer: locate the queries, look them up, count, write what hits.

    query = layer input at the query position;  output = hit ? value : output  at the tokens of the
    mode

The model is not changed: no module is put in the place of another, `state_dict` keeps its names,
and while the codebook is empty the layer's output goes through untouched. What a call needs to know
(which token is the query, how much of the sequence is cached, whether `generate` is running) is
kept for each thread, by `calls` and `modes`. In a compiled graph the hook is one op (`ops`), which
asks here when it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.hook import calls, compile, generation, plain, positions, selection, tensor_parallel
from grace_fast.hook.answers import LookupAnswer
from grace_fast.hook.attachment import Attachment, Site
from grace_fast.hook.counters import Tally
from grace_fast.hook.generation import Generation
from grace_fast.hook.locate import Locator, Queries
from grace_fast.hook.modes import Asked, LayerSeen, Modes, Observation, Observations
from grace_fast.hook.ops import GraphCalls
from grace_fast.hook.positions import Call
from grace_fast.hook.reading import Reader
from grace_fast.hook.recompute import RecomputeCache
from grace_fast.hook.training_override import TrainingOverride
from grace_fast.lookup import lookup
from grace_fast.lookup.backends import graphs
from grace_fast.lookup.match import Match
from grace_fast.lookup.prepared import Prepared


class _Answers(NamedTuple):
    """What answers: a codebook of one process or of several, and its ways to be asked."""

    book: Any
    find: Any  # queries [B, D] to a `Match`
    now: Callable[[], Any]  # the version that `find` asks now, which has the values of its rows


class Adapter:
    """GRACE on one layer of one model; `install` puts its hooks in and `remove` takes them out.

    book: None until the layer's widths are known.
    """

    plain: Any = None  # the hook for plain calls, where there is one

    def __init__(self, site: Site, book: Codebook | None = None) -> None:
        self.book = book  # first: who copies a module with our hooks is told that this cannot be
        self._with_keys: Any = None  # a version that was seen to have some
        self.site, self.model, self.stack = site, site.model, site.stack
        self.first_token = site.first_token
        self.hits: Counter[int] = Counter()  # by row; with `tally`, all that is written
        self.tally = Tally()
        self._modes, self._recomputed = Modes(), RecomputeCache()
        self.attachment = Attachment(site, self, self._at_layer)
        self._reader = Reader(self, site, self._modes)
        self._locator = Locator(self._reader, self._recomputed)
        self.plain = plain.layer_hook(site, self._modes, self._reader.padding, self.tally.plain)
        self._respond_plainly = None if self.plain is None else self.plain.respond
        self.graphs = GraphCalls(self._reader)
        self.read = self._reader.read
        self.refuse_hidden_padding = self._reader.refuse_hidden_padding

    @property
    def layer(self) -> nn.Module:
        """The layer, where it is now."""
        return self.site.layer

    @property
    def book(self) -> Codebook | None:
        """The codebook that answers: anything that finds queries, and values of rows."""
        book: Codebook | None = self._answers.book
        return book

    @book.setter
    def book(self, book: Any) -> None:
        if self.plain is not None:
            self.plain.forget()
        if book is None:
            self._answers = _Answers(None, None, lambda: None)
        else:
            find = Prepared(book) if isinstance(book, Codebook) else book.find
            self._answers = _Answers(book, find, book.snapshot)
        if self.plain is not None:
            self.plain.forget()  # again: a call may have come between

    def sit_on(self, layer: nn.Module) -> None:
        """Answer the plain calls of this layer."""
        if self.plain is not None:
            self.plain.sit_on(layer)

    def install(self) -> None:
        """Put the hooks in."""
        self.attachment.install()

    def remove(self) -> None:
        """Take the hooks out; the model is as it was."""
        self.attachment.remove()
        self.graphs.forget()

    # In the forward call

    def _at_layer(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
        if not is_dynamo_compiling() and self._respond_plainly is not None:
            plainly: Tensor | None = self._respond_plainly(self, module, args, rest)
            if plainly is not NotImplemented:
                return plainly
        # Who copies hooks to another module may forget that this one takes keyword arguments.
        kwargs, output = rest if len(rest) == 2 else ({}, *rest)
        if not isinstance(output, Tensor):
            if not compile.is_in_progress() and self._is_idle():
                return None
            raise TypeError(
                f"the edited layer must return one tensor, got {type(output).__name__}; "
                "attach to a linear layer"
            )
        hidden = args[0] if args else next(iter(kwargs.values()))
        if (torch.compiler.is_compiling() and compile.is_in_progress()) or (
            compile.modes_here() > 0 and calls.is_recorded()
        ):
            return self.graphs.adapted(hidden, output)
        if torch._C._is_tracing() and not self._modes.disabled:
            raise RuntimeError(
                "torch.jit.trace records what is decided for one prompt as if it were so for all "
                f"that come, and grace edits {self.site.layer_name}; use torch.compile or "
                "torch.export, or trace within disable_adapter(), without edits"
            )
        if torch._C._functorch.peek_interpreter_stack() is not None and not self._is_idle():
            raise RuntimeError(
                "torch.func's transforms (grad, vmap, ...) show no numbers to look up, and grace "
                f"edits {self.site.layer_name}; use autograd, or transform within "
                "disable_adapter()"
            )
        answer = self.respond(hidden, output)
        return None if answer is None else answer[0]

    def _is_idle(self) -> bool:
        """Tell whether no row of this thread's calls is answered, nor looked at for an edit."""
        if self._modes.newest(TrainingOverride, Observations) is not None:
            return False
        if self._modes.disabled or not self._has_keys(self._answers.now()):
            return True
        return selection.is_idle(self.site.name)

    def _has_keys(self, now: Any) -> bool:
        if now is None or not len(now):
            return False
        self._with_keys = now  # a version stays as it is
        return True

    def respond(self, hidden: Tensor, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the layer's output with values and which tokens were replaced, or None.

        hidden: [B, T, D] or, from a model that flattens them, [B*T, D]; output: the same with V.

        An error of the look-up itself leaves the output as it is: it is counted, and told once.

        Raises: ValueError where the prompts' ends are not told, or were computed already.
        """
        modes, (book, find, version) = self._modes, self._answers
        now = version()
        if (
            modes.thread.stack
            and (watching := modes.newest(TrainingOverride, Observations)) is not None
        ):
            return self._show_edit(watching, hidden, output)
        if (modes.disabled or self.site.name is not None) and self._is_idle():
            return None
        if now is None or (now is not self._with_keys and not self._has_keys(now)):
            return None
        if not hidden.numel():
            return None  # a batch without rows, or rows without tokens
        queries = self._locator.locate(hidden, output)
        if queries is None:
            return None
        if queries.known is not None:
            return self._write(queries.known, hidden, output, queries.cached)
        asked, match, answer = queries.rows, None, None
        answered: int | None = 0
        if asked.shape[1] != book.key_dim:
            asked = tensor_parallel.whole(asked, self.layer, book.key_dim)
        began = perf_counter()
        try:
            if asked.dtype is not book.dtype or asked.device != book.device:
                asked = asked.to(book.device, book.dtype)
            match = find(asked)
            if match.hits != 0 and version() is not now:  # another version than `now` answered
                match = lookup.find(asked, now)
        except Exception as error:  # no caller's: types and widths are those of the codebook
            match = None
            self._fail_open(error, now, queries.rows.shape[1])
        seconds = perf_counter() - began
        if match is not None:
            if match.hits != 0:
                answer, answered = self._chosen(queries, match, now)
            self.tally.add(match, len(asked), answered, seconds)
        if queries.holder is not None or self.site.layer.training:
            self._remember(queries, answer, now)
        return None if answer is None else self._write(answer, hidden, output, queries.cached)

    def _chosen(self, queries: Queries, match: Match, now: Any) -> tuple[LookupAnswer, int | None]:
        """Return what hit among the rows that this codebook answers, and how many, if known."""
        hit, row, where = match.hit, match.row, queries.position
        batch = len(queries.rows) if queries.batch is None else queries.batch
        chosen = selection.chosen_rows(self.site.name, batch)
        if chosen is not None:
            if (owner := queries.owner) is not None:
                chosen = chosen.repeat_interleave(len(owner) // len(chosen))
                chosen = chosen[where.to(chosen.device)]
            hit = hit & chosen.to(hit.device)
        if queries.counts is not None:
            hit = hit & queries.counts.to(hit.device)
        answered = None
        if hit.device.type == "cpu":  # else only the device knows
            rows = row[hit].tolist()
            self.hits.update(rows)
            answered = len(rows)
        return LookupAnswer(where, now, hit, row, queries.owner), answered

    def _remember(self, queries: Queries, answer: LookupAnswer | None, now: Any) -> None:
        """Keep what was found for the calls that go on with it, or run the layer again."""
        answer = answer or LookupAnswer(queries.position, now, None, None, queries.owner)
        if self.site.layer.training and self.site.query != "every_token":
            here = queries.position if queries.here is None else queries.here
            self._recomputed.keep(queries.rows, here, answer)
        if queries.holder is not None:
            queries.holder.answer, queries.holder.positions = answer, queries.position

    def _write(
        self, answer: LookupAnswer, hidden: Tensor, output: Tensor, cached: int | Tensor
    ) -> tuple[Tensor, Tensor] | None:
        try:
            values = answer.values()
        except Exception as error:
            self._fail_open(error, answer.snapshot, hidden.shape[-1])
            return None
        if values is None:
            return None
        # Not guarded: autograd's hooks may end a checkpoint's second run by an exception from here.
        shaped = self._locator.shaped(output)
        written = answer.write(shaped, values, self.site.replacement, cached)
        return self._locator.unshaped(written, output)

    def _fail_open(self, error: Exception, now: Any, width: int) -> None:
        """Count a look-up that failed; the caller goes on with the layer's own output.

        Raises: the error where that would be worse: a captured graph would go on unedited for ever,
        and the processes of a layer that is split (width is not D then) or of a codebook that is,
        with different outputs.
        """
        is_shared = not isinstance(now, Snapshot) or width != now.key_dim
        if is_shared or graphs.is_capturing(now):
            raise error
        self.tally.fail(self.site.layer_name, error)

    # What an edit sees and tries

    def _show_edit(
        self, watching: TrainingOverride | Observations, hidden: Tensor, output: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Let an edit see the layer's input and output, or write the value that it tries."""
        if not hidden.numel():
            return None
        locator = self._locator
        hidden, shaped = locator.shaped(hidden.detach()), locator.shaped(output)
        if isinstance(watching, Observations) or self.site.query != "every_token":
            locator.refuse_other_tokens(hidden)
        ends = locator.prompt_ends(hidden)
        if isinstance(watching, TrainingOverride):
            watching.queries = positions.vectors_at(hidden, ends)
            return locator.unshaped(watching.write(shaped, ends, self.site.replacement), output)
        whole = tensor_parallel.whole(hidden, self.layer)
        watching.append(Observation(whole, shaped.detach(), ends))
        if watching.ends_call:
            raise LayerSeen
        return None

    # For a while

    def disabled(self) -> AbstractContextManager[None]:
        """Answer nothing, in any thread's calls; those who want it so may come and go at will."""
        return self._modes.disable()

    def asking_at(
        self, where: Tensor | None, length: int | None = None
    ) -> AbstractContextManager[Asked]:
        """Take these positions [B] as the query's in this thread's calls.

        length: the tokens in which they are counted, where others may stand before these.
        """
        return self._modes.on(Asked(where, length))

    def observing(self, ends_call: bool = False) -> AbstractContextManager[list[Observation]]:
        """Collect what the layer sees in this thread's calls, and write nothing.

        ends_call: raise LayerSeen as soon as it has run.
        """
        mode = Observations()
        mode.ends_call = ends_call
        return self._modes.on(mode)

    def trying(self, trial: TrainingOverride) -> AbstractContextManager[TrainingOverride]:
        """Let every row of this thread's calls hit a value that is being trained."""
        return self._modes.on(trial)

    def holding(self, sequences: Generation) -> AbstractContextManager[Generation]:
        """Hold what the sequences of this thread's calls find."""
        # A draft by layers of the model itself is of the sequences that it is generating already.
        if sequences.is_draft and self._modes.newest(Generation) is not None:
            return nullcontext(sequences)
        return self._modes.on(sequences)

    def generating(self, call: Call, is_draft: bool = False) -> AbstractContextManager[Generation]:
        """Hold each sequence's look-up until the end of one `generate`.

        Raises: ValueError for prompts of a decoder that are padded on the right without a mask.
        """
        ends = prompt = None
        if self.site.decoder_only and not is_draft:
            if self.site.query != "every_token" and self.book is not None and len(self.book):
                self.refuse_hidden_padding(call)
            ends, prompt = generation.prompt_end(call), call.tokens
            if ends is not None and self.site.virtual is not None:
                ends = ends + self.site.virtual.in_call()
        return self.holding(Generation(ends, is_draft=is_draft, prompt=prompt))
