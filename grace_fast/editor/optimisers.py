"""Optimisers of many values at once, [R, V]: each row moves as if it were alone, to the last bit.

Adam, as torch has it. L-BFGS (Liu and Nocedal 1989) with a memory a row, for one call of the model
a step: its first step, for which nothing is known but a loss and its gradient, goes as far as the
log-odds of the target have to rise along the gradient; later ones go by the curvature that was seen
on the way. A step after which the loss is higher is taken back, and a shorter one tried in its
place, with what it told of the curvature.

Sums over a row are made by halves: those of torch add in an order that depends on how many rows
there are.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from grace_fast.edits.settings import Schedule

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam

MEMORY = 5  # pairs of L-BFGS: 1 takes a fifth more steps on the facts of the evaluation, 8 the same
# Log-odds of the mean probability of a target's tokens that the first step aims at: .98. Where they
# are less than REACH times the size of the start away, it goes on to FAR: a label or a word is
# learnt in one step then, and by a wide margin. Farther off that leads astray.
AIM, FAR, REACH = 4.0, 20.0, 2.0
LEAST_RISE = 0.3  # log-odds that a step aims at, however near they are
BEYOND = 2.0  # times the way along the gradient, which a later step does not exceed
GROW, SHRINK = 2.0, 0.5  # of the longest step that is allowed, after one that was good or was not
LEAST_COSINE = 1e-8  # between a step and the change of the gradient: else it tells no curvature
MOST_LOSS = 50.0  # from where on exp(loss) - 1 is exp(loss)


class Optimiser(Protocol):
    """What `train_rows` drives."""

    recovers: bool  # from a loss that is no number, by a shorter step

    def step(self, gradients: Tensor, losses: Tensor) -> None:
        """Move the values in place, given the gradients [R, V] and losses [R] at them."""

    def keep(self, rows: Tensor, values: Tensor) -> None:
        """Go on with these rows alone, whose values are those of another tensor."""


def of(schedule: Schedule, values: Tensor) -> Optimiser:
    """Return the optimiser of a schedule for values [R, V], which it moves in place."""
    if schedule.optimiser == "lbfgs":
        return LBFGS(values, schedule.learning_rate)
    return Adam(values, schedule.learning_rate)


class Adam:
    """Adam on one tensor, with the defaults of torch's and its numbers, without its overhead."""

    recovers = False

    def __init__(self, value: Tensor, learning_rate: float) -> None:
        self._value, self._rate, self._steps = value, learning_rate, 0
        self._mean, self._square = torch.zeros_like(value), torch.zeros_like(value)

    @torch.no_grad()
    def step(self, gradient: Tensor, losses: Tensor | None = None) -> None:
        """Move the value, in place."""
        self._steps += 1
        self._mean.lerp_(gradient, 1 - BETAS[0])
        self._square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        rate = self._rate / (1 - BETAS[0] ** self._steps)
        root = (1 - BETAS[1] ** self._steps) ** 0.5
        self._value.addcdiv_(self._mean, (self._square.sqrt() / root).add_(EPSILON), value=-rate)

    def keep(self, rows: Tensor, value: Tensor) -> None:
        """Go on with these rows alone, whose values are those of another tensor."""
        self._value, self._mean, self._square = value, self._mean[rows], self._square[rows]


class LBFGS:
    """L-BFGS with a memory a row; loss values say how long a step is.

    values: [R, V] float32; learning_rate: how much of the way to its aim the first step goes.
    """

    recovers = True

    def __init__(self, values: Tensor, learning_rate: float = 1.0) -> None:
        self._values, self._rate, self._is_first = values, learning_rate, True
        self._best, self._gradient = values.clone(), torch.zeros_like(values)
        self._loss = [math.inf] * len(values)
        self._longest = [math.inf] * len(values)  # step of each row
        self._reach = [REACH * size for size in _norms(values)]
        shape = (MEMORY, *values.shape)
        self._steps, self._changes = values.new_zeros(shape), values.new_zeros(shape)
        self._told = 0  # pairs at most that any row has
        self._inverse = values.new_zeros(MEMORY, len(values))  # 1 / (step . change); 0: no pair

    @torch.no_grad()
    def step(self, gradients: Tensor, losses: Tensor) -> None:
        """Move the values in place, given the gradients [R, V] and losses [R] at them."""
        reached = losses.detach().double().tolist()
        moved = self._values - self._best
        if self._is_first:
            is_better = [True] * len(reached)
        else:
            self._remember(moved, gradients - self._gradient)
            is_better = [new <= old for new, old in zip(reached, self._loss, strict=True)]
            self._judge(_norms(moved), is_better)
        self._is_first = False
        better = torch.tensor(is_better, dtype=torch.bool, device=self._values.device)[:, None]
        self._best = torch.where(better, self._values, self._best)
        self._gradient = torch.where(better, gradients, self._gradient)
        self._loss = [
            new if good else old
            for new, old, good in zip(reached, self._loss, is_better, strict=True)
        ]
        direction = self._direction()
        lengths = direction.new_tensor(self._lengths(direction))
        self._values.copy_(self._best - direction * lengths[:, None])

    def keep(self, rows: Tensor, values: Tensor) -> None:
        """Go on with these rows alone, whose values are those of another tensor."""
        self._values = values
        self._best, self._gradient = self._best[rows], self._gradient[rows]
        self._steps, self._changes = self._steps[:, rows], self._changes[:, rows]
        self._inverse = self._inverse[:, rows]
        for name in ("_loss", "_longest", "_reach"):
            held = getattr(self, name)
            setattr(self, name, [held[at] for at in rows.tolist()])

    def _remember(self, moved: Tensor, change: Tensor) -> None:
        """Take in a step and the change of the gradient, both [R, V], where it tells curvature."""
        pairs = torch.stack([moved, moved, change]), torch.stack([change, moved, change])
        product, moved_square, change_square = _dots(*pairs)
        sizes = moved_square.sqrt() * change_square.sqrt()
        self._told = min(self._told + 1, MEMORY)
        told = (product > LEAST_COSINE * sizes) & product.isfinite() & (1 / product).isfinite()
        wide = told[None, :, None]
        self._steps = torch.where(wide, torch.cat([self._steps[1:], moved[None]]), self._steps)
        self._changes = torch.where(
            wide, torch.cat([self._changes[1:], change[None]]), self._changes
        )
        newest = torch.cat([self._inverse[1:], product.reciprocal()[None]])
        self._inverse = torch.where(told[None], newest, self._inverse)

    def _judge(self, lengths: list[float], is_better: list[bool]) -> None:
        """Say how long the next step of each row may be, by how the last one went."""
        for at, (length, good) in enumerate(zip(lengths, is_better, strict=True)):
            if not good:
                length = length if math.isfinite(length) else self._longest[at]
                self._longest[at] = SHRINK * length
            elif length > 0:
                before = self._longest[at]
                self._longest[at] = max(0.0 if math.isinf(before) else before, GROW * length)

    def _direction(self) -> Tensor:
        """Return the inverse of the curvature times the gradient, [R, V], by two loops."""
        found, factors = self._gradient, []
        slots = range(MEMORY - self._told, MEMORY)  # the others are empty in every row
        for at in reversed(slots):
            factor = self._inverse[at] * _dots(self._steps[at], found)
            found = found - factor[:, None] * self._changes[at]
            factors.append(factor)
        newest = self._inverse[-1] * _dots(self._changes[-1], self._changes[-1])
        scale = torch.where(newest > 0, newest.reciprocal(), torch.ones_like(newest))
        found = found * scale[:, None]
        for at, factor in zip(slots, reversed(factors), strict=True):
            back = factor - self._inverse[at] * _dots(self._changes[at], found)
            found = found + back[:, None] * self._steps[at]
        return found

    def _lengths(self, direction: Tensor) -> list[float]:
        """Return what each direction [R, V] is multiplied by."""
        slopes = _dots(direction, self._gradient).double().tolist()
        knows = (self._inverse[-1] > 0).tolist()
        found = []
        for at, (norm, slope) in enumerate(zip(_norms(direction), slopes, strict=True)):
            if not (slope > 0 and norm > 0 and math.isfinite(norm)):
                found.append(0.0)
                continue
            way = self._rate * _way(self._loss[at], AIM) / slope
            within = self._reach[at] / norm
            if knows[at]:
                length = min(1.0, BEYOND * way)
            elif math.isfinite(way):
                far = self._rate * _way(self._loss[at], FAR) / slope
                length = max(way, min(far, within))
            else:
                length = within
            found.append(min(length, self._longest[at] / norm))
        return found


def _way(loss: float, aim: float) -> float:
    """Return by how much a loss would have to fall, if it fell on as it does, for log-odds `aim`.

    The log-odds of a probability exp(-loss) are -log(exp(loss) - 1); where the loss falls by 1,
    they rise by 1 / (1 - exp(-loss)).
    """
    if loss > MOST_LOSS:
        return aim + loss
    rest = math.expm1(max(loss, 1e-12))
    return max(aim + math.log(rest), LEAST_RISE) * rest / (1 + rest)


def _dots(one: Tensor, other: Tensor) -> Tensor:
    """Return the scalar products of rows, [..., V] each, alike for a row among any others."""
    product = one * other
    width = 1 << max(product.shape[-1] - 1, 0).bit_length()
    product = pad(product, (0, width - product.shape[-1]))
    while width > 1:
        width //= 2
        product = product[..., :width] + product[..., width:]
    return product[..., 0]


def _norms(rows: Tensor) -> list[float]:
    return [math.sqrt(square) for square in _dots(rows, rows).double().tolist()]
