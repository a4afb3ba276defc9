"""The training of one value: Adam on a single vector, everything else frozen."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grace_fast.codebook import forks
from grace_fast.edits.settings import Schedule

# Why there is nothing to learn: no change of the value changes the loss, or there is no number.
Stuck = Literal["no gradient", "not finite"]

# The loss and whether the model's own prediction is right, with this value [V] in place.
Attempt = Callable[[Tensor], tuple[Tensor, bool]]


@dataclass(frozen=True)
class Trained:
    """The value that was kept and what it reached."""

    value: Tensor  # [V], in the codebook's element type
    loss: float
    steps: int  # optimiser steps taken
    correct: bool
    stuck: Stuck | None = None  # why it was given up


def train(start: Tensor, attempt: Attempt, schedule: Schedule) -> Trained:
    """Return the best value that Adam finds from a start [V].

    Every loss is that of the value as it will be stored, in the codebook's element type; a right
    prediction beats a low loss.

    Where the first gradient is zero, so is every later one, because Adam does not move; and where
    one is no number, nothing is one after it. Either ends the training, unless the last value is
    to be kept: then all steps are done.

    Raises: ValueError where the loss has no gradient at all.
    """
    master = start.detach().float().clone().requires_grad_()
    adam = torch.optim.Adam([master], lr=schedule.learning_rate)
    kept: Trained | None = None
    stuck: Stuck | None = None
    for step in range(schedule.iterations + 1):
        last = step == schedule.iterations
        with torch.set_grad_enabled(not last):
            loss, correct = attempt(master.to(start.dtype))
        seen = Trained(
            master.detach().to(start.dtype, copy=True), float(loss.detach()), step, correct
        )
        if kept is None or not schedule.keep_best or _better(seen, kept):
            kept = seen
        done = schedule.stop_loss is not None and correct and seen.loss < schedule.stop_loss
        if not (last or done):
            master.grad = _gradient(loss, master)
            stuck = stuck or _stuck(step, seen, master.grad)
        if last or done or (stuck and schedule.keep_best):
            return replace(kept, steps=step, stuck=stuck)
        adam.step()
    raise AssertionError("unreachable: the last step returns")


def _gradient(loss: Tensor, value: Tensor) -> Tensor:
    """Return the gradient of a loss by a value, zero where the loss does not depend on it.

    Raises: ValueError where it depends on it by operations that have no gradient, or has no graph.
    """
    found: Tensor | None = None
    if loss.requires_grad:
        (found,) = torch.autograd.grad(loss, [value], allow_unused=True)
        if found is None and not _depends(loss, value):
            found = torch.zeros_like(value)
    if found is None:
        raise ValueError(
            "no gradient of the loss reaches the value, so it cannot be trained: the layers in "
            "between are quantised in a way that has none, run under torch.no_grad, or do not lead "
            "to the loss; edit the model before it is quantised, or attach to a later layer"
        )
    return found


def _depends(loss: Tensor, value: Tensor) -> bool:
    """Tell whether a leaf is in the graph of a loss: quantised operations are, without gradient."""
    ahead, seen = [loss.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is value:
            return True
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
    return False


def _stuck(step: int, seen: Trained, gradient: Tensor) -> Stuck | None:
    if not math.isfinite(seen.loss) and not gradient.isfinite().all():
        return "not finite"
    return "no gradient" if step == 0 and not seen.correct and not gradient.any() else None


def _better(one: Trained, other: Trained) -> bool:
    if one.correct != other.correct:
        return one.correct
    return one.loss < other.loss  # False for NaN: a value that breaks the model is not kept


class _Frozen:
    """What was taken out of a model, and how many want it so."""

    def __init__(self, model: nn.Module) -> None:
        self.wanted: list[int] = []  # by which threads
        # One that was made in inference mode would not take its gradient back outside of it.
        own = [one for one in model.parameters() if not one.is_inference()]
        self.learning = [one for one in own if one.requires_grad]
        self.training = [module for module in model.modules() if module.training]

    def set(self, active: bool) -> None:
        for parameter in self.learning:
            parameter.requires_grad_(active)
        for module in self.training:
            module.training = active


_freezing = threading.Lock()
_frozen: WeakKeyDictionary[nn.Module, _Frozen] = WeakKeyDictionary()


def require_differentiable(model: nn.Module) -> None:
    """Raise ValueError where gradients cannot go through a model."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"a value cannot be trained through {name}, which was made in "
                "torch.inference_mode(); load the model outside of it to edit it"
            )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Take the gradients and the dropout out of a model, and put them back as they were.

    The model is every thread's: the first who wants it frozen freezes it, the last puts it back.
    """
    with _freezing:
        state = _frozen.get(model)
        if state is None:
            state = _frozen[model] = _Frozen(model)
            state.set(False)
        me = threading.get_ident()
        state.wanted.append(me)
    try:
        yield
    finally:
        with _freezing:
            state.wanted.remove(me)
            _thaw_if_unwanted(model, state)


def _thaw_if_unwanted(model: nn.Module, state: _Frozen) -> None:
    if not state.wanted:
        del _frozen[model]
        state.set(True)


def _thaw_in_child(*_: object) -> None:
    """Put back in a forked child what threads froze that it has not."""
    me = threading.get_ident()
    for model, state in list(_frozen.items()):
        state.wanted[:] = [thread for thread in state.wanted if thread == me]
        _thaw_if_unwanted(model, state)


forks.guard(sys.modules[__name__], "_freezing", mend=_thaw_in_child)
