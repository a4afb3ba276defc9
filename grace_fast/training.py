"""The training of one value: Adam on a single vector, everything else frozen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# The loss and whether the model's own prediction is right, with this value [V] in place.
Attempt = Callable[[Tensor], tuple[Tensor, bool]]


@dataclass(frozen=True)
class Schedule:
    """How long a value is trained and which one is kept."""

    iterations: int = 100
    learning_rate: float = 1.0
    stop_loss: float | None = 0.1  # stop below it once the prediction is right; None: never
    keep_best: bool = True  # else the last, as the reference does


@dataclass(frozen=True)
class Trained:
    """The value that was kept and what it reached."""

    value: Tensor  # [V], in the codebook's element type
    loss: float
    steps: int  # optimiser steps taken
    correct: bool


def train(start: Tensor, attempt: Attempt, schedule: Schedule) -> Trained:
    """Return the best value that Adam finds from a start [V].

    Every loss is that of the value as it will be stored, in the codebook's element type; a right
    prediction beats a low loss.
    """
    master = start.detach().float().clone().requires_grad_()
    adam = torch.optim.Adam([master], lr=schedule.learning_rate)
    kept: Trained | None = None
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
        if last or done:
            return Trained(kept.value, kept.loss, step, kept.correct)
        (master.grad,) = torch.autograd.grad(loss, [master])
        adam.step()
    raise AssertionError("unreachable: the last step returns")


def _better(one: Trained, other: Trained) -> bool:
    if one.correct != other.correct:
        return one.correct
    return one.loss < other.loss  # False for NaN: a value that breaks the model is not kept


class _Frozen:
    """What was taken out of a model, and how many want it so."""

    def __init__(self, model: nn.Module) -> None:
        self.wanted = 0
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
        state.wanted += 1
    try:
        yield
    finally:
        with _freezing:
            state.wanted -= 1
            if not state.wanted:
                del _frozen[model]
                state.set(True)
