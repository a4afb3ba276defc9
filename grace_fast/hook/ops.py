"""The hooks of an adaptor as ops of compiled graphs: `grace_fast::enter` and `grace_fast::adapt`.

The ops take the adaptor as an integer and everything else as tensors. What a call has to ask is
looked at when it runs, so edits, growth, `generate` and the names that are in use change neither
the graph nor its guards. `enter` tells the adaptor of the call, for the thread that runs the graph,
and returns an empty tensor that `adapt` takes, so that they run in this order. `adapt` returns a
new output; the gradient flows to the layer's own output where nothing was replaced, and nowhere
else.
"""

from __future__ import annotations

import secrets
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from grace_fast.hook.positions import Call


class Responder(Protocol):
    """What the ops ask at run time."""

    def enter(self, call: Call | None) -> None:
        """Take a forward call as this thread's, until there is another or none."""

    def respond(self, hidden: Tensor, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the layer's output with values and what was replaced, or None."""


_responders: weakref.WeakValueDictionary[int, Responder] = weakref.WeakValueDictionary()
_forgotten: set[int] = set()


def register(responder: Responder) -> int:
    """Return the number by which graphs name an adaptor.

    It is drawn from the system, so that a graph exported by another process finds no other's.
    """
    number = secrets.randbits(62)
    _responders[number] = responder
    return number


def forget(number: int) -> None:
    """Let graphs that name an adaptor leave the output as it is."""
    _forgotten.add(number)


def _responder(number: int) -> Responder | None:
    if number in _forgotten:
        return None
    found = _responders.get(number)
    if found is None:
        raise RuntimeError(
            "the adaptor that this graph was made for is not in this process; attach it, then "
            "compile or export again"
        )
    return found


def entered(call: Call, number: int) -> Tensor:
    """Tell the adaptor of a forward call, by the op; return what `adapted` takes for its order."""
    length = call.cached if isinstance(call.cached, Tensor) else None
    count = 0 if isinstance(call.cached, Tensor) else call.cached
    tokens = None if call.tokens is None else call.tokens.detach()
    tensors = (tokens, call.mask, call.labels, call.position_ids, call.bounds, length)
    order: Tensor = torch.ops.grace_fast.enter(*tensors, count, call.is_packable, number)
    return order


def adapted(hidden: Tensor, output: Tensor, order: Tensor | None, number: int) -> Tensor:
    """Return the layer's output with values, by the op."""
    written: Tensor = torch.ops.grace_fast.adapt(output, hidden, order, number)[0]
    return written


# What the ops decide is decided anew at each run: a CUDA graph would repeat the first.
@torch.library.custom_op("grace_fast::enter", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def enter(
    tokens: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor | None,
    bounds: Tensor | None,
    cached_length: Tensor | None,
    cached: int,
    is_packable: bool,
    adapter: int,
) -> Tensor:
    """Take a call as this thread's; its tensors are copied, for the graph may reuse their memory.

    Of embeddings only the shape is kept.
    """
    responder = _responder(adapter)
    if responder is not None:
        if tokens is not None:
            tokens = tokens[..., :1].clone() if tokens.is_floating_point() else tokens.clone()
        others = (mask, labels, position_ids, bounds, cached_length)
        kept = [None if one is None else one.clone() for one in others]
        length = cached if kept[4] is None else kept[4]
        responder.enter(Call(tokens, kept[0], kept[1], kept[2], kept[3], length, is_packable))
    return torch.empty(0, dtype=torch.int64, device="cpu")


@enter.register_fake
def _(*_: Any) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


@torch.library.custom_op("grace_fast::adapt", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def adapt(
    output: Tensor, hidden: Tensor, order: Tensor | None, adapter: int
) -> tuple[Tensor, Tensor]:
    """Return the layer's output [..., V] with values, and which tokens [...] were replaced.

    order: what `enter` returned; None where the call is known from elsewhere, or not at all.
    """
    responder = _responder(adapter)
    answer = None if responder is None else responder.respond(hidden, output)
    if responder is not None and order is not None:
        responder.enter(None)
    if answer is None:
        untouched = torch.zeros(output.shape[:-1], dtype=torch.bool, device=output.device)
        return output.clone(memory_format=torch.contiguous_format), untouched
    written, replaced = answer
    return written.contiguous(), replaced.contiguous()


@adapt.register_fake
def _(output: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return output.new_empty(output.shape), output.new_empty(output.shape[:-1], dtype=torch.bool)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (replaced,) = ctx.saved_tensors
    return gradient.masked_fill(replaced[..., None], 0), None, None, None


adapt.register_autograd(_backward, setup_context=_keep)
