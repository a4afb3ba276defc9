"""The training of values: an optimiser on one vector each, everything else frozen."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grace_fast.codebook import forks
from grace_fast.editor import optimisers
from grace_fast.edits.settings import Schedule

# Why there is nothing to learn: no change of the value changes the loss, or there is no number.
Stuck = Literal["no gradient", "not finite"]


class Tried(NamedTuple):
    """What a model said with values in place; each row depends on its own value alone."""

    losses: Tensor  # [R]
    correct: Tensor  # [R] bool, whether its own prediction is right
    margins: Tensor | None = None  # [R], see `heads.margins`; None where nobody asks for them
    gradients: Tensor | None = None  # [R, V] of the losses, where autograd is not to be asked

    def detached(self) -> Tried:
        """Return the same without a graph."""
        return Tried._make(None if each is None else each.detach() for each in self)

    def at(self, rows: Tensor) -> Tried:
        """Return the same of some rows."""
        return Tried._make(None if each is None else each[rows.to(each.device)] for each in self)


# With values [R, V] in place, of the rows that are named.
Attempts = Callable[[Tensor, Sequence[int]], Tried]
# The same of one value [V].
Attempt = Callable[[Tensor], tuple[Tensor, bool]]


@dataclass(frozen=True)
class Trained:
    """The value that was kept and what it reached."""

    value: Tensor  # [V], in the codebook's element type
    loss: float
    steps: int  # optimiser steps taken
    correct: bool
    stuck: Stuck | None = None  # why it was given up


class _Kept:
    """The best value of each row so far, or the last."""

    def __init__(self, starts: Tensor, only_best: bool) -> None:
        self._values, self._only_best = starts.detach().clone(), only_best
        self._reached: list[tuple[bool, float] | None] = [None] * len(starts)

    def take(self, at: int, value: Tensor, correct: bool, loss: float, learnt: bool) -> None:
        """Keep a value that is learnt, or better: a right prediction beats a low loss."""
        before = self._reached[at]
        if (
            before is None or learnt or not self._only_best or (correct, -loss) > before
        ):  # False for NaN: what breaks the model goes
            self._reached[at] = (correct, -loss)
            self._values[at] = value

    def result(self, at: int, steps: int, stuck: Stuck | None) -> Trained:
        """Return what one row reached."""
        reached = self._reached[at]
        assert reached is not None, "its value was tried"
        return Trained(self._values[at].clone(), -reached[1], steps, reached[0], stuck)


def train_rows(starts: Tensor, attempt: Attempts, schedule: Schedule) -> list[Trained]:
    """Return the best value that is found from each start [R, V], each as if it were alone.

    A row leaves once it is learnt: it is not asked about again.

    Every loss is that of the value as it will be stored, in the element type of the starts; a right
    prediction beats a low loss.

    Where the first gradient of a row is zero, so is every later one, because the value does not
    move; and where one is no number, nothing of Adam's is one after it. Either ends its training,
    unless the last value is to be kept: then all steps are done.

    Raises: ValueError where the losses have no gradient at all.
    """
    dtype, keeps_best = starts.dtype, schedule.keep_best
    master = starts.detach().to(torch.float32, copy=True)
    optimiser = optimisers.of(schedule, master)
    kept, results = _Kept(starts, keeps_best), dict[int, Trained]()
    stuck: dict[int, Stuck | None] = dict.fromkeys(range(len(starts)))
    rows = list(stuck)
    for step in range(schedule.iterations + 1):  # after the last it is only judged
        is_last = step == schedule.iterations
        leaf = master.detach().requires_grad_()
        with torch.set_grad_enabled(not is_last):
            tried = attempt(leaf.to(dtype), rows)
            whole = tried.losses.sum()
        losses = tried.losses.detach().to(master.device)
        reached, right = losses.tolist(), tried.correct.tolist()
        learnt = _learnt(tried, reached, schedule, step)
        over = [is_last or is_learnt for is_learnt in learnt]
        if not all(over):
            known = tried.gradients
            gradients = _gradient(whole, leaf) if known is None else known.to(master)
            for at, row in enumerate(rows):
                if not over[at] and not (step and optimiser.recovers):
                    stuck[row] = stuck[row] or _stuck(step, right[at], reached[at], gradients[at])
                    over[at] = bool(stuck[row]) and keeps_best
        stored = master.to(dtype)
        for at, row in enumerate(rows):
            if keeps_best or over[at]:
                kept.take(row, stored[at], right[at], reached[at], learnt[at])
            if over[at]:
                results[row] = kept.result(row, step, stuck[row])
        if all(over):
            break
        if any(over):
            going = [at for at, is_over in enumerate(over) if not is_over]
            index = torch.tensor(going, dtype=torch.int64, device=master.device)
            rows = [rows[at] for at in going]
            master, gradients, losses = master[index], gradients[index], losses[index]
            optimiser.keep(index, master)
        optimiser.step(gradients, losses)
    return [results[row] for row in range(len(starts))]


def _learnt(tried: Tried, losses: Sequence[float], schedule: Schedule, step: int) -> Sequence[bool]:
    """Tell of each row whether it is right, and by as much as a schedule asks at this step."""
    stop, margin = schedule.stop_loss, schedule.margin_at(step)
    if stop is None and margin is None:
        return [False] * len(losses)
    right: list[bool] = tried.correct.tolist()
    if stop is not None:
        right = [is_right and loss < stop for is_right, loss in zip(right, losses, strict=True)]
    if margin is not None and tried.margins is not None:
        ahead = tried.margins.tolist()
        right = [is_right and by >= margin for is_right, by in zip(right, ahead, strict=True)]
    return right


def train(start: Tensor, attempt: Attempt, schedule: Schedule) -> Trained:
    """Return the best value that is found from one start [V]; see `train_rows`."""

    def attempts(values: Tensor, _: Sequence[int]) -> Tried:
        loss, correct = attempt(values[0])
        return Tried(loss[None], torch.tensor([correct], dtype=torch.bool, device="cpu"))

    return train_rows(start[None], attempts, schedule)[0]


def descend(value: Tensor, attempt: Callable[[], Tensor], schedule: Schedule, loss: Tensor) -> None:
    """Do every step of a schedule on a value that requires a gradient, in place; keep the last.

    loss: the one before the first step; `attempt` returns that of the value as it is now.

    Raises: as `train_rows`.
    """
    optimiser = optimisers.of(schedule, value.detach())
    for step in range(schedule.iterations):
        now = attempt() if step else loss
        optimiser.step(_gradient(now, value), now.detach())


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
