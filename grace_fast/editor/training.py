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

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam

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


class Adam:
    """Adam on one tensor, with the defaults of torch's and its numbers, without its overhead."""

    def __init__(self, value: Tensor, learning_rate: float) -> None:
        self._value, self._rate, self._steps = value, learning_rate, 0
        self._mean, self._square = torch.zeros_like(value), torch.zeros_like(value)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Move the value, in place."""
        self._steps += 1
        self._mean.lerp_(gradient, 1 - BETAS[0])
        self._square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        rate = self._rate / (1 - BETAS[0] ** self._steps)
        root = (1 - BETAS[1] ** self._steps) ** 0.5
        self._value.addcdiv_(self._mean, (self._square.sqrt() / root).add_(EPSILON), value=-rate)


def train(
    start: Tensor, attempt: Attempt, schedule: Schedule, first: tuple[Tensor, bool] | None = None
) -> Trained:
    """Return the best value that Adam finds from a start, [V] or several [R, V].

    start: one that requires a gradient is trained in place; first: what the attempt with the start
    said, where it was made already.

    Every loss is that of the value as it will be stored, in the codebook's element type; a right
    prediction beats a low loss.

    Where the first gradient is zero, so is every later one, because Adam does not move; and where
    one is no number, nothing is one after it. Either ends the training, unless the last value is
    to be kept: then all steps are done.

    Raises: ValueError where the loss has no gradient at all.
    """
    master = start if start.requires_grad else start.detach().float().clone().requires_grad_()
    adam = Adam(master.detach(), schedule.learning_rate)
    kept: Trained | None = None
    stuck: Stuck | None = None
    for step in range(schedule.iterations + schedule.judges_last):
        last = step == schedule.iterations
        with torch.set_grad_enabled(not last):
            loss, correct = attempt(master.to(start.dtype)) if step or first is None else first
        reached = float(loss.detach())
        done = schedule.stop_loss is not None and correct and reached < schedule.stop_loss
        if not (last or done):
            gradient = _gradient(loss, master)
            stuck = stuck or _stuck(step, correct, reached, gradient)
        is_over = last or done or bool(stuck and schedule.keep_best)
        is_best = is_over
        if schedule.keep_best:  # False for NaN: a value that breaks the model is not kept
            is_best = kept is None or (correct, -reached) > (kept.correct, -kept.loss)
        if is_best:
            kept = Trained(master.detach().to(start.dtype, copy=True), reached, step, correct)
        if is_over:
            assert kept is not None
            return replace(kept, steps=step, stuck=stuck)
        adam.step(gradient)
    return Trained(master.detach(), reached, schedule.iterations, correct, stuck)


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


def _stuck(step: int, correct: bool, loss: float, gradient: Tensor) -> Stuck | None:
    if not math.isfinite(loss) and not gradient.isfinite().all():
        return "not finite"
    return "no gradient" if step == 0 and not correct and not gradient.any() else None


class _Frozen:
    """What was taken out of a model, and how many want it so."""

    def __init__(self, model: nn.Module, with_modes: bool) -> None:
        self.wanted: list[int] = []  # by which threads
        # One that was made in inference mode would not take its gradient back outside of it.
        own = [one for one in model.parameters() if not one.is_inference()]
        self.learning = [one for one in own if one.requires_grad]
        self.training = [each for each in model.modules() if each.training] if with_modes else []

    def set(self, active: bool) -> None:
        for parameter in self.learning:
            parameter.requires_grad_(active)
        for module in self.training:
            module.training = active


_freezing = threading.Lock()
# By whether the modes of the modules are taken out, too.
_frozen: dict[bool, WeakKeyDictionary[nn.Module, _Frozen]] = {
    with_modes: WeakKeyDictionary() for with_modes in (True, False)
}


def require_differentiable(model: nn.Module) -> None:
    """Raise ValueError where gradients cannot go through a model."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"a value cannot be trained through {name}, which was made in "
                "torch.inference_mode(); load the model outside of it to edit it"
            )


@contextmanager
def frozen(model: nn.Module, with_modes: bool = True) -> Iterator[None]:
    """Take the gradients and the dropout out of a model, and put them back as they were.

    with_modes: else dropout and whatever else a module does in training stays.

    The model is every thread's: the first who wants it frozen freezes it, the last puts it back.
    """
    known = _frozen[with_modes]
    with _freezing:
        state = known.get(model)
        if state is None:
            state = known[model] = _Frozen(model, with_modes)
            state.set(False)
        me = threading.get_ident()
        state.wanted.append(me)
    try:
        yield
    finally:
        with _freezing:
            state.wanted.remove(me)
            if not state.wanted:
                del known[model]
                state.set(True)


def _thaw_in_child(*_: object) -> None:
    """Put back in a forked child what threads froze that it has not."""
    me = threading.get_ident()
    for known in _frozen.values():
        for model, state in list(known.items()):
            state.wanted[:] = [thread for thread in state.wanted if thread == me]
            if not state.wanted:
                del known[model]
                state.set(True)


forks.guard(sys.modules[__name__], "_freezing", mend=_thaw_in_child)
