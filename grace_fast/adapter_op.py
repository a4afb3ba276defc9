"""The hook on a layer as an op of compiled graphs: `grace_fast::adapt`.

The op takes the adaptor as an integer and everything else as tensors. What a call has to ask is
looked at when it runs, so edits, growth, `generate` and the names that are in use change neither
the graph nor its guards. It returns a new output; the gradient flows to the layer's own output
where nothing was replaced, and nowhere else.
"""

from __future__ import annotations

import secrets
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from grace_fast.positions import Call


class Responder(Protocol):
    """What the op asks at run time."""

    def respond(
        self, hidden: Tensor, output: Tensor, call: Call | None
    ) -> tuple[Tensor, Tensor] | None:
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


def adapted(hidden: Tensor, output: Tensor, call: Call | None, number: int) -> Tensor:
    """Return the layer's output with values, by the op."""
    named = call is not None
    call = call or Call()
    length = call.cached if isinstance(call.cached, Tensor) else None
    count = 0 if isinstance(call.cached, Tensor) else call.cached
    tensors = (call.tokens, call.mask, call.labels, call.position_ids, call.bounds, length)
    op = torch.ops.grace_fast.adapt
    written: Tensor = op(output, hidden, *tensors, count, named, call.is_packable, number)[0]
    return written


@torch.library.custom_op("grace_fast::adapt", mutates_args=())
def adapt(
    output: Tensor,
    hidden: Tensor,
    tokens: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor | None,
    bounds: Tensor | None,
    cached_length: Tensor | None,
    cached: int,
    named: bool,
    is_packable: bool,
    adapter: int,
) -> tuple[Tensor, Tensor]:
    """Return the layer's output [..., V] with values, and which tokens [...] were replaced.

    named: whether the tensors are those of a call; else the thread's own call is meant.
    """
    responder = _responder(adapter)
    call = None
    if named:
        length = cached if cached_length is None else cached_length
        call = Call(tokens, mask, labels, position_ids, bounds, length, is_packable)
    answer = None if responder is None else responder.respond(hidden, output, call)
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
    return gradient.masked_fill(replaced[..., None], 0), *[None] * 11


adapt.register_autograd(_backward, setup_context=_keep)
