"""The hook on one layer: take each sequence's query, look it up, write the value where it hits.

    query = layer input at the query position;  output = hit ? value : output  at the tokens of the
    mode

The model is not changed: no module is put in the place of another, `state_dict` keeps its names,
and while the codebook is empty the layer's output goes through untouched. What a call needs to know
(which token is the query, how much of the sequence is cached, whether `generate` is running) is
kept for each thread by `_Run`. In a compiled graph the hook is one op (`adapter_op`), which asks
here when it runs.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grace_fast.codebook import forks
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.hook import (
    compile,
    entrances,
    generation,
    ops,
    positions,
    recompute,
    selection,
    tensor_parallel,
    wrappers,
)
from grace_fast.hook.answers import Answer
from grace_fast.hook.counters import LookupWarning, Tally
from grace_fast.hook.generation import Generation, Source
from grace_fast.hook.positions import Call, Query
from grace_fast.hook.seat import Seat
from grace_fast.hook.training_override import TrainingOverride
from grace_fast.hook.virtual_tokens import Virtual
from grace_fast.lookup import lookup
from grace_fast.lookup.backends import graphs
from grace_fast.semantics import Replacement

# A layer takes one adaptor of each name.
_attached: WeakKeyDictionary[nn.Module, set[str | None]] = WeakKeyDictionary()


def has_adapter(layer: nn.Module, name: str | None = None) -> bool:
    """Tell whether an adaptor of this name is on a layer, or another one is in its place."""
    return name in _attached.get(layer, ()) or hasattr(layer, "init_epsilon")


@dataclass
class Observation:
    """What the layer saw: taken while the adaptor watches and writes nothing."""

    hidden: Tensor  # [B, T, D], the layer's input
    output: Tensor  # [B, T, V]
    positions: Tensor  # [B]

    @property
    def queries(self) -> Tensor:
        """[B, D], the input at each row's query position."""
        return _at(self.hidden, self.positions)

    @property
    def outputs(self) -> Tensor:
        """[B, V], the layer's own output at each row's query position."""
        return _at(self.output, self.positions)


class _Frame:
    """A call in progress, of a module that names the layer's tokens."""

    __slots__ = ("before", "call", "depth", "sequences", "source")

    def __init__(
        self, call: Call, source: Source, depth: int = 0, before: _Frame | None = None
    ) -> None:
        self.call, self.source, self.before = call, source, before
        self.depth = depth  # of the module that said so; the model itself is outermost, 0
        self.sequences: Generation | None = None  # that it was found to be of


class _Run(threading.local):
    """The state of this thread's forward call."""

    frame: _Frame | None = None  # None outside a call
    given: Tensor | None = None  # [B], set by the caller, before any rule
    given_length: int | None = None  # T of the tokens that these are counted in
    trial: TrainingOverride | None = None
    observing: list[Observation] | None = None

    def __init__(self) -> None:
        self.held: list[Generation] = []  # sequences in progress, the newest last

    @property
    def call(self) -> Call | None:
        """What the call in progress says of its tokens."""
        return None if self.frame is None else self.frame.call

    def sequences(self) -> Generation | None:
        """Return what is held of the sequences that the call in progress is of."""
        frame = self.frame
        if frame is None:
            return self.held[-1] if self.held else None
        if frame.sequences is None and self.held:
            frame.sequences = generation.of_call(self.held, frame.call, frame.source)
        return frame.sequences


class _Within:
    """What a graph of a module within the model asks: its call is of a call around it."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def enter(self, call: Call | None) -> None:
        """Take a forward call as this thread's, within the one there is."""
        run = self._adapter._run
        outer = run.frame
        if call is None or outer is None:
            self._adapter.enter(call)
        else:
            run.frame = _Frame(positions.within(outer.call, call), outer.source, 1, outer)

    def respond(self, hidden: Tensor, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the layer's output with values and what was replaced, or None."""
        return self._adapter.respond(hidden, output)


@dataclass(eq=False)
class Adapter:
    """GRACE on one layer of one model; `install` puts its hooks in and `remove` takes them out.

    `stack` is the module whose forward call names the layer's tokens: the encoder for an encoder
    layer of an encoder-decoder, else the model itself.
    """

    model: nn.Module
    layer: nn.Module
    stack: nn.Module
    book: Codebook | None  # None until the layer's widths are known
    replacement: Replacement
    query: Query
    decoder_only: bool
    first_token: bool = False  # a decoder beside an encoder: the query is its start token
    finds_padding: bool = False  # a classifier whose head finds the last token by the padding's id
    name: str | None = None
    layer_name: str = "the edited layer"
    seat_name: str = ""  # the layer's in `model`
    virtual: Virtual | None = None
    hits: Counter[int] = field(default_factory=Counter)  # by row; with `tally`, all that is written
    tally: Tally = field(default_factory=Tally)

    def install(self) -> None:
        """Put the hooks in."""
        self._run = _Run()
        self._disabled: set[tuple[int, object]] = set()  # who want no answer, each with its thread
        self._order: Tensor | None = None  # of the ops in a compiled graph
        self._rows_second = False  # the layer's tensors are [T, B, width]
        self._memory = recompute.Memory()
        self._further = _Within(self)
        self._number = ops.register(self)
        config = getattr(self.model, "config", None)
        self._padding = positions.Padding.of(config)
        self._lengthens = positions.lengthens(config)
        self._number_within = ops.register(self._further)
        self._stacks: list[nn.Module] = []
        self._continues = self.decoder_only or self.first_token or self.finds_padding
        self._seat = Seat(self.model, self.seat_name)
        self._settling = threading.Lock()
        forks.guard(self, "_settling", mend=Adapter._enable_in_child)
        self.is_lost = False  # the layer left the model, and nothing like it is in its place
        self._is_installed = True
        generation.listen(self.model, self)
        self._hang_on(self.layer)

    def remove(self) -> None:
        """Take the hooks out; the model is as it was."""
        self._is_installed = False
        for module in (self.layer, *self.model.modules()):  # a quantiser copies hooks
            self._take_off(module)
        _attached[self.layer].discard(self.name)
        self._listen_to([])
        generation.stop_listening(self.model, self)
        ops.forget(self._number)
        ops.forget(self._number_within)

    def _hang_on(self, layer: nn.Module) -> None:
        self.layer = layer
        layer.register_forward_hook(self._at_layer, with_kwargs=True)
        _attached.setdefault(layer, set()).add(self.name)
        self._listen_to(wrappers.stacks_of(self.stack, layer))

    def _listen_to(self, stacks: list[nn.Module]) -> None:
        """Be told of the calls of these modules, outermost first, and of no others any more."""
        before, self._stacks = self._stacks, stacks
        self._knows_tokens = any(map(wrappers.names_tokens, stacks))
        for stack in before:
            if all(stack is not other for other in stacks):
                entrances.stop_listening(stack, self)
                if stack is not self.model:
                    generation.stop_listening(stack, self)
        for depth, stack in enumerate(stacks):
            if all(stack is not other for other in before):
                entrances.listen(stack, self, depth)
                if stack is not self.model:
                    generation.listen(stack, self)

    def _take_off(self, module: nn.Module) -> None:
        for key, hook in list(module._forward_hooks.items()):
            if hook == self._at_layer:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)

    def look_after_layer(self) -> None:
        """Follow the layer where other libraries moved it or put another module in its place."""
        if self._is_installed and not self._seat.is_as_before():
            self._settle()

    def _settle(self) -> None:
        """Find the layer; where it left the model, go to the module that was put in its place.

        A hit replaces the output at that place, whoever computes it.
        """
        with self._settling:
            before, there = self.layer, self._seat.find(self.layer)
            self.is_lost = there is not before and not self._can_go_to(there)
            if there is before:
                return
            if there is not None and not self.is_lost:
                for module in (before, there):  # a quantiser may have copied the hook
                    self._take_off(module)
                _attached[before].discard(self.name)
                self._hang_on(there)
                compile.forget_compiled_code()
        found = "nothing" if there is None else f"a {_type_name(there)}"
        effect = (
            "edits answer no more; unload() the editor and attach its codebook to another layer"
            if self.is_lost
            else f"edits go on there; they were made at a {_type_name(before)}"
        )
        warnings.warn(
            f"{self.layer_name} left the model, with {found} in its place: its {effect}",
            LookupWarning,
            stacklevel=2,
        )

    def _can_go_to(self, module: nn.Module | None) -> bool:
        if module is None or has_adapter(module, self.name) or self._seat.was_elsewhere(module):
            return False
        widths = tensor_parallel.declared_widths
        return widths(module) == widths(self.layer)

    # In the forward call

    def read(self, arguments: Mapping[str, Any]) -> Call:
        """Return what the arguments of a forward call say of its tokens."""
        call = positions.read(arguments, self.decoder_only)
        if self.virtual is not None:
            call = self.virtual.without(call, bool(self._run.held))
        return self._padding.shown(call) if self.finds_padding else call

    def is_traced(self) -> bool:
        """Tell whether the call that is being compiled has been told already."""
        return self._order is not None

    def trace(self, arguments: Mapping[str, Any], depth: int) -> None:
        """Tell the ops of a compiled graph of a call."""
        number = self._number_within if depth else self._number
        self._order = ops.entered(self.read(arguments), number)

    def end_trace(self) -> None:
        """Let what is compiled next be another call."""
        self._order = None

    def enter(self, call: Call | None) -> None:
        """Take a forward call that a graph tells of as this thread's, until it tells of none."""
        self.look_after_layer()
        run = self._run
        if call is not None:
            run.frame = _Frame(call, generation.UNTOLD)
        elif run.frame is not None:
            run.frame = run.frame.before

    def begin_call(self, arguments: Mapping[str, Any], depth: int) -> _Frame | None:
        """Take a forward call as this thread's; return the one that it is within."""
        compile.see_hooks()
        run = self._run
        outer = run.frame
        if outer is None:
            self.look_after_layer()
        if outer is None or outer.depth >= depth:  # the model may run itself, in a hook
            source = Source.of(arguments, self._continues)
            run.frame = _Frame(self.read(arguments), source, depth)
        else:
            run.frame = self._further_in(outer, arguments, depth)
        return outer

    def end_call(self, before: _Frame | None, result: Any) -> None:
        """Take the call around the one that is over as this thread's again."""
        run = self._run
        frame, run.frame = run.frame, before
        if frame is not None and frame.sequences is not None:
            frame.sequences.add(generation.cache_of(result))
            if frame.before is None and frame is not before and frame.call.tokens is not None:
                frame.sequences.seen += frame.call.tokens.shape[1]

    def _further_in(self, outer: _Frame, arguments: Mapping[str, Any], depth: int) -> _Frame:
        """Return what a call within another one says; mostly that one has said it all."""
        said, source = outer.call, outer.source
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if (
            said.tokens is not None
            and isinstance(tokens, Tensor)
            and tokens.shape[:2] == said.tokens.shape[:2]
            and arguments.get("attention_mask") is said.mask
            and arguments.get("past_key_values") is source.cache
        ):
            return outer
        call = self.read(arguments)
        if not self.first_token:
            call = positions.within(said, call)
        elif call.tokens is None:
            call = said
        if source.cache is None:
            source = Source.of(arguments, self._continues)
        return _Frame(call, source, depth, outer)

    def _at_layer(self, _: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
        # Who copies hooks to another module may forget that this one takes keyword arguments.
        kwargs, output = rest if len(rest) == 2 else ({}, *rest)
        if not isinstance(output, Tensor):
            if not torch.compiler.is_compiling() and self._is_idle():
                return None
            raise TypeError(
                f"the edited layer must return one tensor, got {type(output).__name__}; "
                "attach to a linear layer"
            )
        hidden = args[0] if args else next(iter(kwargs.values()))
        if entrances.is_recorded():
            return ops.adapted(hidden, output, self._order, self._number)
        if torch._C._is_tracing() and not self._disabled:
            raise RuntimeError(
                "torch.jit.trace records what is decided for one prompt as if it were so for all "
                f"that come, and grace edits {self.layer_name}; use torch.compile or torch.export, "
                "or trace within disable_adapter(), without edits"
            )
        if torch._C._functorch.peek_interpreter_stack() is not None and not self._is_idle():
            raise RuntimeError(
                "torch.func's transforms (grad, vmap, ...) show no numbers to look up, and grace "
                f"edits {self.layer_name}; use autograd, or transform within disable_adapter()"
            )
        answer = self.respond(hidden, output)
        return None if answer is None else answer[0]

    def respond(self, hidden: Tensor, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the layer's output with values and which tokens were replaced, or None.

        hidden: [B, T, D] or, from a model that flattens them, [B*T, D]; output: the same with V.

        An error of the look-up itself leaves the output as it is: it is counted, and told once.

        Raises: ValueError where the prompts' ends are not told, or were computed already.
        """
        run = self._run
        if self._is_idle():
            return None
        if not hidden.numel():
            return None  # a batch without rows, or rows without tokens
        call = run.call
        # Nothing is learnt through a query: a decision has no gradient.
        hidden, shaped = self._shaped(hidden.detach(), call), self._shaped(output, call)
        rows_second = self._rows_second and output.ndim == 3
        if run.observing is not None or self.query != "every_token":
            self._refuse_other_tokens(hidden, call)
        if run.observing is not None:
            whole = tensor_parallel.whole(hidden, self.layer)
            ends = self._prompt_ends(hidden, call)
            run.observing.append(Observation(whole, shaped.detach(), ends))
            return None
        answer = (
            self._try(run.trial, hidden, shaped, call)
            if run.trial is not None
            else self._look_up(hidden, shaped, call)
        )
        if answer is None:
            return None
        if rows_second:
            return answer[0].transpose(0, 1), answer[1].transpose(0, 1)
        return answer[0].view(output.shape), answer[1].view(output.shape[:-1])

    def _is_idle(self) -> bool:
        """Tell whether no row of this thread's calls is answered, nor looked at for an edit."""
        run, book = self._run, self.book
        if run.trial is not None or run.observing is not None:
            return False
        if book is None or not len(book) or self._disabled:
            return True
        return selection.is_idle(self.name)

    def _look_up(
        self, hidden: Tensor, output: Tensor, call: Call | None
    ) -> tuple[Tensor, Tensor] | None:
        cached = self._before(call)
        answer: Answer | None
        if self.query == "every_token":
            answer, cached = self._of_tokens(hidden), 0
        elif call is None and recompute.is_in_backward():
            answer = self._memory.recall(hidden)
        elif call is None and self._knows_tokens and not self._is_told(hidden):
            self._refuse_untold(hidden)
            return None
        elif self.query == "every_step":
            answer, cached = self._of_newest(hidden, call), 0
        else:
            answer = self._of_prompts(hidden, call, cached)
        if answer is None:
            return None
        try:
            values = answer.values()
        except Exception as error:
            self._fail_open(error, answer.snapshot, hidden.shape[-1])
            return None
        # Not guarded: autograd's hooks may end a checkpoint's second run by an exception from here.
        return None if values is None else answer.write(output, values, self.replacement, cached)

    def _before(self, call: Call | None) -> int | Tensor:
        """Return how many tokens of the sequences come before those of a call."""
        if call is None:
            return 0
        if isinstance(call.cached, Tensor) or call.cached != positions.UNCOUNTED:
            return call.cached
        held = self._run.sequences()
        # Where nothing is held, any number tells a step from a prompt.
        return 1 if held is None else held.before()

    def _refuse_untold(self, hidden: Tensor) -> None:
        assert self.book is not None
        tensor_parallel.whole(hidden, self.layer, self.book.key_dim)  # what is wrong first, if so
        raise ValueError(
            f"{self.layer_name} ran outside a call that is given input_ids or inputs_embeds, so "
            f"where the prompts end is unknown: call {type(self.model).__name__}, or the module "
            "within it that takes them; or name the ends, within grace.prompt(positions); or "
            "attach with query='every_token'"
        )

    def _is_told(self, hidden: Tensor) -> bool:
        """Tell whether the caller has named where prompts end in a layer's input [B, T, D]."""
        held = self._run.sequences()
        known = self._run.given if held is None else held.positions_for(len(hidden))
        return self.first_token or (known is not None and int(known.max()) < hidden.shape[1])

    def _of_tokens(self, hidden: Tensor) -> Answer:
        """Decide for each token [B*T] as a query of its own."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        token = torch.arange(len(rows), device=rows.device)
        return self._decide(rows, token, owner=token, batch=len(hidden))

    def _of_newest(self, hidden: Tensor, call: Call | None) -> Answer:
        if call is not None and hidden.shape[1] > 1:
            self.refuse_hidden_padding(call)
        named = None if call is None or self.first_token else positions.prompt_end(call)
        where = self._within(named, hidden)
        return self._decide(_at(hidden, where), where)

    def _of_prompts(self, hidden: Tensor, call: Call | None, cached: int | Tensor) -> Answer | None:
        """Decide for the prompts' ends, once a sequence; None where they are not in this call."""
        run, held, batch = self._run, self._run.sequences(), len(hidden)
        if held is not None and held.answer is not None:
            answer = held.answer.for_batch(batch)
            if answer is not None:
                return answer
        cached, length = int(cached), hidden.shape[1]
        known = None if held is None else held.positions_for(batch)
        if known is None and cached and (length == 1 or self.first_token or _is_draft(held)):
            return None  # a decoding step: the prompt's end was in an earlier call
        if known is None and run.given is None and call is not None and not self.first_token:
            if not cached:
                self.refuse_hidden_padding(call)
            if (rows := positions.packed(call)) is not None:
                flat = hidden.reshape(-1, hidden.shape[-1])[rows.position]
                return self._decide(flat, rows.position, owner=rows.owner, batch=batch)
        if known is None and not cached:
            ends = self._prompt_ends(hidden, call)
            answer, inside = self._decide(_at(hidden, ends), ends), None
        else:
            ends = self._prompt_ends(hidden, call) + cached
            ends = ends if known is None else known.to(hidden.device)
            inside = self._inside(ends - cached, cached, length, _is_draft(held))
            if inside is not None and not inside.any():
                return None
            here = (ends - cached).clamp(0, length - 1)
            answer = self._decide(_at(hidden, here), ends, here, inside)
        if held is not None and inside is None:
            held.answer, held.positions = answer, ends
        return answer

    def _inside(self, where: Tensor, cached: int, length: int, is_draft: bool) -> Tensor | None:
        """Tell which prompts end in this call, [B] bool; None for all of them.

        Raises: ValueError where a prompt goes on, or went before, and that matters to the mode.
        """
        before, beyond = where < 0, where >= length
        inside = ~(before | beyond)
        in_parts = bool(beyond.any()) or (bool(cached) and bool(inside.any()))
        if in_parts and self.replacement != "replace_last" and not is_draft:
            raise ValueError(
                f"{self.replacement} writes tokens before the prompt's end, and here they are "
                "computed in an earlier call (chunked prefill or a cached prefix); attach with "
                "replacement='replace_last' or query='every_token'"
            )
        return None if bool(inside.all()) else inside

    def _decide(
        self,
        queries: Tensor,
        position: Tensor,
        here: Tensor | None = None,
        asked: Tensor | None = None,
        owner: Tensor | None = None,
        batch: int | None = None,
    ) -> Answer:
        """Look queries [Q, D] up.

        here: their positions in this call, where that is not all of the sequence; asked: which of
        them count, [Q] bool; owner, batch: where a row holds several queries.
        """
        assert self.book is not None
        snapshot = self.book.snapshot()
        whole = tensor_parallel.whole(queries, self.layer, snapshot.key_dim)
        match, began = None, perf_counter()
        try:
            match = lookup.find(whole.to(snapshot.device, snapshot.dtype), snapshot)
        except Exception as error:  # no caller's: types and widths are those of the codebook
            self._fail_open(error, snapshot, queries.shape[-1])
        seconds = perf_counter() - began
        answered: int | None = 0
        if match is None or match.hits == 0:
            answer = Answer(position, snapshot, None, None, owner)
        else:
            hit, row = match.hit, match.row
            chosen = selection.chosen_rows(self.name, len(queries) if batch is None else batch)
            if chosen is not None:
                if owner is not None:
                    tokens = chosen.repeat_interleave(len(owner) // len(chosen))
                    chosen = tokens[position.to(tokens.device)]
                hit = hit & chosen.to(hit.device)
            if asked is not None:
                hit = hit & asked.to(hit.device)
            answered = None
            if snapshot.device.type == "cpu":
                rows = row[hit].tolist()
                self.hits.update(rows)
                answered = len(rows)
            answer = Answer(position, snapshot, hit, row, owner)
        if match is not None:
            self.tally.add(match, len(queries), answered, seconds)
        if self.layer.training and self.query != "every_token":
            self._memory.keep(queries, position if here is None else here, answer)
        return answer

    def _fail_open(self, error: Exception, snapshot: Snapshot, width: int) -> None:
        """Count a look-up that failed; the caller goes on with the layer's own output.

        Raises: the error where that would be worse: a captured graph would go on unedited for ever,
        and the processes of a layer that is split (width is not D then) or of row shards with
        different outputs.
        """
        is_shared = width != snapshot.key_dim or isinstance(snapshot, lookup.Distributed)
        if is_shared or graphs.is_capturing(snapshot):
            raise error
        self.tally.fail(self.layer_name, error)

    def _try(
        self, trial: TrainingOverride, hidden: Tensor, output: Tensor, call: Call | None
    ) -> tuple[Tensor, Tensor]:
        return trial.write(output, self._prompt_ends(hidden, call), self.replacement)

    # Where the queries are

    def _shaped(self, tensor: Tensor, call: Call | None) -> Tensor:
        """Return a layer's tensor as [B, T, width]; a model may have it as [B*T] or [T, B], too."""
        if tensor.ndim == 3:
            self._look_at_rows(tensor, call)
            return tensor.transpose(0, 1) if self._rows_second else tensor
        known = self._run.given
        if call is not None and call.tokens is not None:
            known = call.tokens
        batch = len(tensor) if known is None or len(tensor) % len(known) else len(known)
        return tensor.reshape(batch, -1, tensor.shape[-1])

    def _refuse_other_tokens(self, hidden: Tensor, call: Call | None) -> None:
        """Refuse a layer's input that is not one vector for each token of the call.

        Raises: ValueError.
        """
        if call is None or call.tokens is None or not isinstance(call.cached, int) or call.cached:
            return  # what goes on from a cache may be given all tokens, and compute the newest
        given, wanted = hidden.shape[:2], call.tokens.shape[:2]
        # How many tokens a second decoder has is not among what the call says.
        fits = given[0] == wanted[0] and (self.first_token or given[1] == wanted[1])
        if fits or (self._lengthens and given[0] == wanted[0] and given[1] > wanted[1]):
            return
        raise ValueError(
            f"{self.layer_name} must see one vector for each of the call's {list(wanted)} tokens "
            f"to be edited, it was given {list(given)}; attach to a linear layer in a block of the "
            "language model, as the last of its MLP"
        )

    def _look_at_rows(self, tensor: Tensor, call: Call | None) -> None:
        """Notice a model that computes [T, B, width], by a call in which T is not B.

        An edit is such a call: it has one row.
        """
        if call is None or call.tokens is None:
            return
        rows, (first, second) = len(call.tokens), tensor.shape[:2]
        if first != second and rows in (first, second):
            self._rows_second = rows == second

    def refuse_hidden_padding(self, call: Call) -> None:
        """Refuse prompts of a decoder that end in padding which no mask shows.

        Raises: ValueError.
        """
        if self.decoder_only:
            positions.refuse_hidden_padding(call, self._padding)

    def _prompt_ends(self, hidden: Tensor, call: Call | None) -> Tensor:
        """Return the position of each row's query in this call, [B]."""
        if self._run.given is not None:
            where = self._within(self._run.given, hidden) + self._before_given(call)
            return where.clamp(max=hidden.shape[1] - 1)
        if self.first_token:
            return torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return self._within(None if call is None else positions.prompt_end(call), hidden)

    def _before_given(self, call: Call | None) -> int:
        """Return how many tokens stand before those that a caller's positions are counted in."""
        length = self._run.given_length
        if length is None or call is None or call.tokens is None:
            return 0
        return max(call.tokens.shape[1] - length, 0)

    @staticmethod
    def _within(known: Tensor | None, hidden: Tensor) -> Tensor:
        """Return positions [B] where the input is; the last ones where none are known."""
        batch, length = hidden.shape[:2]
        if known is None or len(known) != batch:
            return torch.full((batch,), length - 1, dtype=torch.int64, device=hidden.device)
        return known.to(hidden.device, torch.int64)

    # For a while

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Answer nothing, in any thread's calls; those who want it so may come and go at will."""
        mine = (threading.get_ident(), object())
        self._disabled.add(mine)
        try:
            yield
        finally:
            self._disabled.discard(mine)

    def _enable_in_child(self, _: bool) -> None:
        """Answer in a forked child where only threads that it has not want no answer."""
        me = threading.get_ident()
        self._disabled = {each for each in self._disabled if each[0] == me}

    @contextmanager
    def asking_at(self, where: Tensor | None, length: int | None = None) -> Iterator[None]:
        """Take these positions [B] as the query's in this thread's calls.

        length: the tokens in which they are counted, where others may stand before these.
        """
        self._run.given, self._run.given_length = where, length
        try:
            yield
        finally:
            self._run.given = self._run.given_length = None

    @contextmanager
    def observing(self) -> Iterator[list[Observation]]:
        """Collect what the layer sees in this thread's calls, and write nothing."""
        seen: list[Observation] = []
        self._run.observing = seen
        try:
            yield seen
        finally:
            self._run.observing = None

    @contextmanager
    def trying(self, trial: TrainingOverride) -> Iterator[None]:
        """Let every row of this thread's calls hit a value that is being trained."""
        self._run.trial = trial
        try:
            yield
        finally:
            self._run.trial = None

    @contextmanager
    def generating(self, call: Call, is_draft: bool = False) -> Iterator[None]:
        """Hold each sequence's look-up until the end of one `generate`.

        Raises: ValueError for prompts of a decoder that are padded on the right without a mask.
        """
        ends = prompt = None
        if self.decoder_only and not is_draft:
            if self.query != "every_token" and self.book is not None and len(self.book):
                self.refuse_hidden_padding(call)
            ends, prompt = generation.prompt_end(call), call.tokens
            if ends is not None and self.virtual is not None:
                ends = ends + self.virtual.in_call()
        with self.holding(Generation(ends, is_draft=is_draft, prompt=prompt)):
            yield

    @contextmanager
    def holding(self, sequences: Generation) -> Iterator[None]:
        """Hold what the sequences of this thread's calls find."""
        held = self._run.held  # of this thread, wherever a generator that is given up ends
        # A draft by layers of the model itself is of the sequences that it is generating already.
        if sequences.is_draft and held:
            yield
            return
        held.append(sequences)
        try:
            yield
        finally:
            held.remove(sequences)


def _at(tensor: Tensor, where: Tensor) -> Tensor:
    """Return the tokens of a tensor [B, T, width] at one position a row, [B, width]."""
    return tensor[torch.arange(len(tensor), device=tensor.device), where.to(tensor.device)]


def _type_name(module: nn.Module) -> str:
    """Return a class with its package: several have a Linear."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_draft(held: Generation | None) -> bool:
    return held is not None and held.is_draft
