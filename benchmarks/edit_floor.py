"""The floor of a training: the layers above the edit alone, and their matrix products bare.

What is bare are the products of the same shapes with the same weights, forward and by the
activations only, and nothing around them: the FLOPs that have to run, at the rate that this machine
gives such shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.edit_models import Item, Studied
from benchmarks.edit_suffix import Suffix
from grace_fast.editor import batches
from grace_fast.editor.training import frozen

Clock = Callable[[], float]  # in seconds


@dataclass(frozen=True)
class Products:
    """The matrix products of one step and how fast the machine makes them, bare."""

    forward_flop: float
    backward_flop: float
    forward_us: float
    backward_us: float

    @property
    def gflop_per_s(self) -> float:
        """The rate of the products of one step."""
        work, took = self.forward_flop + self.backward_flop, self.forward_us + self.backward_us
        return work / took / 1e3


class Floor:
    """What the steps of trainings cost at least, by how many edits are trained at once.

    The matrix products bare, and the suffix; measured for some sizes, between them in proportion.
    """

    def __init__(
        self,
        studied: Studied,
        items: Sequence[Item],
        sizes: Sequence[int],
        calls: int,
        clock: Clock = time.process_time,
    ) -> None:
        self.gflop_per_s: dict[int, float] = {}
        self._sizes, self._products, self._suffix = [0], [(0.0, 0.0)], [(0.0, 0.0)]
        with frozen(studied.model):
            for size in sizes:
                suffix = Suffix(studied, batches.together(items[:size], studied.pad_token))
                bare, start = products(suffix, calls, clock), suffix.start()
                forward = median_us(lambda suffix=suffix, v=start: suffix.forward(v), calls, clock)
                step = median_us(lambda suffix=suffix, v=start: suffix.step(v), calls, clock)
                self.gflop_per_s[size] = bare.gflop_per_s
                self._sizes.append(size)
                self._products.append((bare.forward_us, bare.backward_us))
                self._suffix.append((forward, max(0.0, step - forward)))

    def of_steps(self, steps: int) -> tuple[float, float]:
        """Return the floors of one edit of so many steps, in microseconds: products, suffix."""
        return self._sum([1] * steps, [1] * steps)

    def of_edits(self, steps: Sequence[int], size: int) -> tuple[float, float]:
        """Return the floors of edits that took so many steps each, so many at once.

        An edit of k steps goes forward k + 1 times, for its answer has to be seen, and k times
        back; one that is learnt leaves its batch.
        """
        totals = np.zeros(2)
        for at in range(0, len(steps), size):
            part = np.array(steps[at : at + size])
            every = range(int(part.max()) + 1)
            forward = [int((part >= step).sum()) for step in every]
            backward = [int((part > step).sum()) for step in every]
            totals += self._sum(forward, backward)
        return float(totals[0]), float(totals[1])

    def _sum(self, forward: Sequence[int], backward: Sequence[int]) -> tuple[float, float]:
        found = []
        for times in (self._products, self._suffix):
            there, back = zip(*times, strict=True)
            took = np.interp(forward, self._sizes, there).sum()
            found.append(float(took + np.interp(backward, self._sizes, back).sum()))
        return found[0], found[1]


def products(suffix: Suffix, calls: int, clock: Clock = time.process_time) -> Products:
    """Time the matrix products of one step of a suffix without anything around them."""
    shapes: list[tuple[Tensor, int]] = []
    with ExitStack() as hooked:
        for module in suffix.model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and not _looks_up(module):
                handle = module.register_forward_hook(_noting(shapes))
                hooked.callback(handle.remove)
        suffix.loss(suffix.start().requires_grad_())
    forward, backward = [], []
    for weight, rows in shapes:  # weight: [V, D]
        given, gradient = torch.randn(rows, weight.shape[1]), torch.randn(rows, len(weight))
        forward.append((given, weight.T))
        backward.append((gradient, weight))
    flop = sum(2.0 * weight.numel() * rows for weight, rows in shapes)
    times = [
        median_us(lambda pairs=pairs: _all(pairs), calls, clock) for pairs in (forward, backward)
    ]
    return Products(flop, flop, *times)


def median_us(call: Callable[[], Any], calls: int, clock: Clock = time.process_time) -> float:
    """Return the median of what a call takes, by default of the processor, in microseconds."""
    call()
    taken = []
    for _ in range(calls):
        start = clock()
        call()
        taken.append(clock() - start)
    return float(np.median(taken)) * 1e6


def _all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for one, other in pairs:
        torch.mm(one, other)


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _noting(shapes: list[tuple[Tensor, int]]) -> Callable[..., None]:
    def note(module: nn.Module, given: tuple[Tensor, ...], _: Any) -> None:
        weight: Any = module.weight
        weight = weight.T if type(module).__name__ == "Conv1D" else weight
        if given[0].requires_grad:  # else it does not depend on the values, and runs once
            shapes.append((weight, given[0].numel() // given[0].shape[-1]))

    return note
