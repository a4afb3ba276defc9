"""Sequences that are computed over several forward calls: `generate`, and loops of one's own.

The prompt's end is looked up once, in the call that computes it, and what was found is held until
the sequence ends. `generate` is wrapped on the model instance, so that it names the prompt's end
before the first call: chunks of a prompt and the drafts of assisted decoding are then told from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grace_fast.answers import Answer
from grace_fast.positions import Call, last_unmasked


@dataclass
class Generation:
    """Sequences in progress: where their prompts end, and what was decided there."""

    positions: Tensor | None = None  # [B], counted from the first token of the row
    answer: Answer | None = None
    is_draft: bool = False  # an assistant's, whose calls continue those of an earlier `generate`

    def positions_for(self, batch: int) -> Tensor | None:
        """Return the prompts' ends for a batch; its rows may be several for each prompt."""
        known = self.positions
        if known is None or not len(known) or batch % len(known):
            return None
        return known.repeat_interleave(batch // len(known))


class Listener(Protocol):
    """An adaptor that is told when its model generates."""

    def generating(self, call: Call, is_draft: bool) -> AbstractContextManager[None]:
        """Hold what the prompts find until the end of one `generate`."""


class _Listeners(list[Listener]):
    """The adaptors of a model."""


def listen(model: nn.Module, listener: Listener) -> None:
    """Tell an adaptor when a model generates."""
    generate: Callable[..., Any] | None = getattr(model, "generate", None)
    if generate is None:
        return
    listeners: _Listeners | None = getattr(generate, "grace_listeners", None)
    if listeners is None:
        listeners = _Listeners()
        model.__dict__["generate"] = _announcing(model, generate, listeners)
    listeners.append(listener)


def stop_listening(model: nn.Module, listener: Listener) -> None:
    """Take an adaptor off; with the last one `generate` is the model's own again."""
    wrapper = model.__dict__.get("generate")
    listeners: _Listeners | None = getattr(wrapper, "grace_listeners", None)
    if listeners is None:
        return
    listeners[:] = [other for other in listeners if other is not listener]
    if not listeners:
        del model.__dict__["generate"]


def _announcing(
    model: nn.Module, generate: Callable[..., Any], listeners: _Listeners
) -> Callable[..., Any]:
    @functools.wraps(generate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
        is_draft = bool(getattr(config, "is_assistant", False))
        call = _prompt_of(args, kwargs)
        with ExitStack() as holds:
            for listener in listeners:
                holds.enter_context(listener.generating(call, is_draft))
            return generate(*args, **kwargs)

    wrapper.grace_listeners = listeners  # type: ignore[attr-defined]
    return wrapper


def _prompt_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    given = args[0] if args else kwargs.get("inputs")
    tokens = next(
        (
            tokens
            for tokens in (given, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            if isinstance(tokens, Tensor) and tokens.ndim >= 2
        ),
        None,
    )
    mask = kwargs.get("attention_mask")
    return Call(tokens, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)


def prompt_end(call: Call) -> Tensor | None:
    """Return where the prompts given to `generate` end, [B], cached tokens counted."""
    tokens, mask = call.tokens, call.mask
    if tokens is None or not tokens.shape[1]:
        return None
    length = tokens.shape[1]
    if mask is None or len(mask) != len(tokens) or mask.shape[1] < length:
        return torch.full((len(tokens),), length - 1, dtype=torch.int64, device=tokens.device)
    # A mask that is longer than the tokens covers what is in the cache.
    return last_unmasked(mask, len(tokens), mask.shape[1], tokens.device)
