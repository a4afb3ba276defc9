"""The hook on one layer: take each row's query, look it up, write the value where it hits.

    query = layer input at the query position;  output = hit ? value : output  at the tokens of the
    mode

The model is not changed: no module is put in the place of another, `state_dict` keeps its names,
and while the codebook is empty the layer's output goes through untouched. What a call needs to know
(which token is the query, how much of the sequence is cached, whether `generate` is running) is
kept for each thread by `_Run`. A sequence is looked up once: within `generate`, cached steps write
what the prompt's own look-up found.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast import lookup, positions, semantics
from grace_fast.codebook import DTYPES, Codebook, Snapshot


@dataclass
class Observation:
    """What the layer saw: taken while the adaptor watches and writes nothing."""

    hidden: Tensor  # [B, T, D], the layer's input
    output: Tensor  # [B, T, V]
    positions: Tensor  # [B]

    @property
    def queries(self) -> Tensor:
        """[B, D], the input at each row's query position."""
        return self.hidden[torch.arange(len(self.hidden)), self.positions]

    @property
    def outputs(self) -> Tensor:
        """[B, V], the layer's own output at each row's query position."""
        return self.output[torch.arange(len(self.output)), self.positions]


@dataclass
class Generation:
    """One `generate` in progress: the sequences' query positions and what their prompts found."""

    positions: Tensor | None = None
    match: lookup.Match | None = None
    snapshot: Snapshot | None = None


class _Run(threading.local):
    """The state of this thread's forward call."""

    positions: Tensor | None = None  # [B], of this call
    given: Tensor | None = None  # [B], set by the caller, before any rule
    cached: int = 0  # tokens of the sequence that are in a cache already
    generation: Generation | None = None
    trial: Tensor | None = None  # [V], a value in training: every row of the call hits it
    observing: list[Observation] | None = None


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
    replacement: semantics.Replacement
    decoder_only: bool
    first_token: bool = False  # a decoder beside an encoder: the query is its start token
    enabled: bool = True
    hits: Counter[int] = field(default_factory=Counter)  # by row; a look-up writes nothing else

    def install(self) -> None:
        """Put the hooks in."""
        self._run = _Run()
        self._parameters = inspect.signature(self.stack.forward).parameters
        self._handles = [
            self.stack.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.stack.register_forward_hook(self._leave, always_call=True),
            self.layer.register_forward_hook(self._at_layer, with_kwargs=True),
        ]
        _listen_to_generate(self.model, self)

    def remove(self) -> None:
        """Take the hooks out; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        _stop_listening(self.model, self)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = dict(zip(self._parameters, args, strict=False)) | kwargs
        cache: Any = call.get("past_key_values")
        self._run.cached = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        if self._run.given is None and not self.first_token:
            self._run.positions = positions.prompt_end(call, self.decoder_only)

    def _leave(self, *_: Any) -> None:
        self._run.positions, self._run.cached = None, 0

    def _at_layer(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        run = self._run
        idle = self.book is None or not len(self.book) or not self.enabled
        if idle and run.trial is None and run.observing is None:
            return None
        hidden = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the edited layer must return one tensor, got {type(output).__name__}; "
                "attach to a linear layer"
            )
        shaped, where = self._shaped(hidden), self._query_positions(hidden)
        written = self._write(shaped, self._shaped(output), where)
        return None if written is None else written.view(output.shape)

    def _write(self, hidden: Tensor, output: Tensor, where: Tensor) -> Tensor | None:
        run = self._run
        if run.observing is not None:
            run.observing.append(Observation(hidden.detach(), output.detach(), where))
            return None
        if run.trial is not None:
            mask = semantics.replacement_mask(self.replacement, where, output.shape[1])
            hit = torch.ones(len(output), dtype=torch.bool, device=output.device)
            return semantics.replace(output, hit, run.trial.expand(len(output), -1), mask)
        found = self._found(hidden, where)
        if found is None:
            return None
        match, snapshot, where = found
        if match.hits == 0:
            return None
        mask = semantics.replacement_mask(self.replacement, where - run.cached, output.shape[1])
        written = lookup.write(output, match, snapshot, mask)
        return None if written is output else written

    def _found(self, hidden: Tensor, where: Tensor) -> tuple[lookup.Match, Snapshot, Tensor] | None:
        """Return the sequences' match, its codebook and query positions; None in a cached step."""
        run, generation = self._run, self._run.generation
        if generation is not None and generation.match is not None:
            assert generation.snapshot is not None
            assert generation.positions is not None
            if len(generation.positions) == len(hidden):
                return generation.match, generation.snapshot, generation.positions
        elif run.cached:
            return None  # the prompt's end was in an earlier call
        assert self.book is not None
        snapshot = self.book.snapshot()
        queries = hidden[torch.arange(len(hidden), device=hidden.device), where]
        match = lookup.find(queries.to(snapshot.dtype), snapshot)
        if match.hits != 0 and snapshot.device.type == "cpu":
            self.hits.update(match.row[match.hit].tolist())
        if generation is not None:
            generation.match, generation.snapshot = match, snapshot
            generation.positions = where + run.cached
        return match, snapshot, where + run.cached

    def _shaped(self, tensor: Tensor) -> Tensor:
        """Return a layer's tensor as [B, T, width], even from a model that flattens B and T."""
        if tensor.ndim == 3:
            return tensor
        known = self._run.given if self._run.given is not None else self._run.positions
        batch = len(tensor) if known is None or len(tensor) % len(known) else len(known)
        return tensor.reshape(batch, -1, tensor.shape[-1])

    def _query_positions(self, hidden: Tensor) -> Tensor:
        run = self._run
        batch, length = self._shaped(hidden).shape[:2]
        last = torch.full((batch,), length - 1, dtype=torch.int64, device=hidden.device)
        known = run.given if run.given is not None else run.positions
        if self.first_token and run.given is None:
            return torch.zeros_like(last)
        if known is None or len(known) != batch:
            return last
        return torch.minimum(known.to(last), last)

    @contextmanager
    def asking_at(self, where: Tensor | None) -> Iterator[None]:
        """Take these positions [B] as the query's in this thread's calls."""
        self._run.given = where
        try:
            yield
        finally:
            self._run.given = None

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
    def trying(self, value: Tensor) -> Iterator[None]:
        """Let every row of this thread's calls hit a value [V] that is being trained."""
        self._run.trial = value
        try:
            yield
        finally:
            self._run.trial = None

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Hold each sequence's look-up until the end of one `generate`."""
        before, self._run.generation = self._run.generation, Generation()
        try:
            yield
        finally:
            self._run.generation = before


class _Listeners(list[Adapter]):
    """The adaptors that are told when a model generates."""


def _listen_to_generate(model: nn.Module, adapter: Adapter) -> None:
    generate: Callable[..., Any] | None = getattr(model, "generate", None)
    if generate is None:
        return
    listeners: _Listeners | None = getattr(generate, "grace_listeners", None)
    if listeners is None:
        listeners = _Listeners()
        model.__dict__["generate"] = _announcing(generate, listeners)
    listeners.append(adapter)


def _announcing(generate: Callable[..., Any], listeners: _Listeners) -> Callable[..., Any]:
    @functools.wraps(generate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as holds:
            for adapter in listeners:
                holds.enter_context(adapter.generating())
            return generate(*args, **kwargs)

    wrapper.grace_listeners = listeners  # type: ignore[attr-defined]
    return wrapper


def _stop_listening(model: nn.Module, adapter: Adapter) -> None:
    wrapper = model.__dict__.get("generate")
    listeners: _Listeners | None = getattr(wrapper, "grace_listeners", None)
    if listeners is None:
        return
    listeners[:] = [other for other in listeners if other is not adapter]
    if not listeners:
        del model.__dict__["generate"]


def stack_of(model: nn.Module, layer: nn.Module) -> tuple[nn.Module, bool]:
    """Return the module whose call names the layer's tokens, and if that is a second decoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model, False
    find_encoder: Any = getattr(model, "get_encoder", None)
    encoder = None if find_encoder is None else find_encoder()
    if isinstance(encoder, nn.Module) and any(module is layer for module in encoder.modules()):
        return encoder, False
    return model, True


def place(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return where a layer computes and in which element type."""
    for parameter in layer.parameters():
        if parameter.dtype in DTYPES:
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def declared_codebook(layer: nn.Module) -> Codebook | None:
    """Return an empty codebook of the widths a layer declares, or None where it declares none."""
    key_dim = getattr(layer, "in_features", getattr(layer, "nx", None))
    value_dim = getattr(layer, "out_features", getattr(layer, "nf", None))
    if not isinstance(key_dim, int) or not isinstance(value_dim, int):
        return None
    device, dtype = place(layer)
    return Codebook(key_dim, value_dim, dtype, device)
