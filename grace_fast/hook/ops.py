"""The ops of compiled graphs: `grace_fast::enter` tells of a call, `grace_fast::adapt` is the hook.

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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grace_fast.hook import calls, generation, positions
from grace_fast.hook.calls import Entered, Frame
from grace_fast.hook.positions import Call
from grace_fast.hook.reading import Reader


class _Told(Entered):
    """A call that a graph tells of; where that is broken off it may outlive its adaptor."""


_responders: weakref.WeakValueDictionary[int, GraphCalls] = weakref.WeakValueDictionary()
_forgotten: set[int] = set()


def _responder(number: int) -> GraphCalls | None:
    if number in _forgotten:
        return None
    found = _responders.get(number)
    if found is None:
        raise RuntimeError(
            "the adaptor that this graph was made for is not in this process; attach it, then "
            "compile or export again"
        )
    return found


class GraphCalls:
    """The graphs that ask one adaptor: of the whole model, or of a module within it."""

    def __init__(self, reader: Reader) -> None:
        self.adaptor, self._reader = reader.adaptor, reader
        # Of the ops in the graph that is being made, once the call that is compiled has been told.
        self.order: Tensor | None = None
        # By depth, as the ops name them. Drawn from the system, so that a graph exported by another
        # process finds no other's.
        self.numbers = [secrets.randbits(62) for _ in range(2)]
        _responders.update(dict.fromkeys(self.numbers, self))

    def forget(self) -> None:
        """Let graphs leave the output as it is."""
        _forgotten.update(self.numbers)

    def enter(self, call: Call | None, number: int) -> None:
        """Take a forward call that a graph tells of as this thread's, until it tells of none."""
        depth, stack = self.numbers.index(number), calls.in_progress.stack
        # A graph that was broken off has not told of none; one around this goes on.
        while stack and isinstance(stack[-1], _Told):
            known = stack[-1].depths
            if known and known.get(self.adaptor, -1) < depth:
                break
            stack.pop()
            if call is None:
                return
        if call is None:
            return
        outer, source = self._reader.frame() if depth else None, generation.UNTOLD
        if outer is None:
            self.adaptor.attachment.look_after_layer()
        else:
            call, source = positions.within(outer.call, call), outer.source
        told = _Told()
        told.depths, told.frames = weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary()
        told.depths[self.adaptor], told.arguments = depth, {}
        told.frames[self.adaptor] = Frame(call, source, depth, None)
        stack.append(told)

    def trace(self, arguments: Mapping[str, Any], depth: int) -> None:
        """Tell of a call by the op, whose result `adapted` takes for its order."""
        call, number = self._reader.read(arguments), self.numbers[min(depth, 1)]
        length = call.cached if isinstance(call.cached, Tensor) else None
        count = 0 if isinstance(call.cached, Tensor) else call.cached
        tokens = None if call.tokens is None else call.tokens.detach()
        tensors = (tokens, call.mask, call.labels, call.position_ids, call.bounds, length)
        self.order = torch.ops.grace_fast.enter(*tensors, count, call.is_packable, number)

    def adapted(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output with values, by the op."""
        number = self.numbers[0]
        written: Tensor = torch.ops.grace_fast.adapt(output, hidden, self.order, number)[0]
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
        call = Call(tokens, kept[0], kept[1], kept[2], kept[3], length, is_packable)
        responder.enter(call, adapter)
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
    answer = None if responder is None else responder.adaptor.respond(hidden, output)
    if responder is not None and order is not None:
        responder.enter(None, adapter)
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
