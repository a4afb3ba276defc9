"""Optimisers of many values at once: each row as if it were alone, and where they arrive."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grace_fast.editor import optimisers
from grace_fast.editor.optimisers import LBFGS, Adam
from grace_fast.edits.settings import Schedule

MADE = {
    "adam": lambda values: Adam(values, 0.1),
    "lbfgs": lambda values: LBFGS(values, 1.0),
}
made = pytest.mark.parametrize("make", MADE.values(), ids=MADE)


class Bowls:
    """A quadratic a row, with another curvature in each column."""

    def __init__(self, rows, width, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.steep = torch.rand(rows, width, generator=draw) * 3 + 0.05
        self.lowest = torch.randn(rows, width, generator=draw)
        self.start = torch.randn(rows, width, generator=draw)

    def at(self, values, rows):
        away = values - self.lowest[rows]
        losses = [
            (self.steep[row] * one * one).sum() / 2 for row, one in zip(rows, away, strict=True)
        ]
        return torch.stack(losses), self.steep[rows] * away


def run(bowls, make, rows, steps, broken=(), ends=None):
    """Return values by row; broken: rows that are no number from step 2 on; ends: step by row."""
    values = bowls.start[rows].clone()
    optimiser, going, result = make(values), list(rows), {}
    for step in range(steps):
        losses, gradients = bowls.at(values, going)
        for at, row in enumerate(going):
            if row in broken and step >= 2:
                losses[at], gradients[at] = math.nan, math.nan
        kept = [at for at, row in enumerate(going) if ends is None or ends[row] > step]
        for at, row in enumerate(going):
            if at not in kept:
                result[row] = values[at].clone()
        if len(kept) < len(going):
            index = torch.tensor(kept, dtype=torch.int64)
            going = [going[at] for at in kept]
            values, losses, gradients = values[index], losses[index], gradients[index]
            if not going:
                break
            optimiser.keep(index, values)
        optimiser.step(gradients, losses)
    return result | dict(zip(going, values, strict=True))


@made
@given(
    count=st.integers(1, 20),
    width=st.integers(1, 200),
    seed=st.integers(0, 100),
    steps=st.integers(1, 12),
)
def test_a_row_moves_among_others_as_it_does_alone_bit_for_bit(make, count, width, seed, steps):
    bowls = Bowls(count, width, seed)
    together = run(bowls, make, range(count), steps)
    for row in {0, count // 2, count - 1}:
        assert torch.equal(run(bowls, make, [row], steps)[row], together[row])


@made
def test_rows_that_leave_change_nothing_for_those_that_stay(make):
    bowls = Bowls(9, 33)
    ends = {row: 3 + row % 4 * 4 for row in range(9)}
    together = run(bowls, make, range(9), 14, ends=ends)
    for row in range(9):
        assert torch.equal(run(bowls, make, [row], 14, ends=ends)[row], together[row])


@made
def test_a_row_that_is_no_number_harms_no_other(make):
    bowls = Bowls(7, 40)
    whole, harmed = (run(bowls, make, range(7), 15, broken=broken) for broken in ((), (4,)))
    for row in set(range(7)) - {4}:
        assert torch.equal(whole[row], harmed[row])


def test_a_step_of_lbfgs_that_is_no_number_is_taken_back():
    """A wall beyond which there is no loss: half as far, and again, until it is on this side."""
    values = torch.full((1, 4), 2.0)
    optimiser, seen = LBFGS(values), []
    for _ in range(40):
        loss = (values.square().sum() + 0.01) * (math.nan if values[0, 0] < 0.2 else 1)
        seen.append(float(loss))
        optimiser.step(2 * values if math.isfinite(seen[-1]) else values * math.nan, loss[None])
        assert values.isfinite().all()
    finite = [loss for loss in seen if math.isfinite(loss)]
    assert len(finite) < len(seen)
    assert min(finite) < seen[0] / 10


def test_lbfgs_finds_the_lowest_point_of_bowls():
    bowls = Bowls(8, 50)
    found = run(bowls, LBFGS, range(8), 80)
    for row in range(8):
        assert torch.allclose(found[row], bowls.lowest[row], atol=1e-3)


def test_lbfgs_never_goes_on_from_a_higher_loss():
    bowls = Bowls(1, 30)
    values = bowls.start.clone()
    optimiser, best = LBFGS(values), math.inf
    for _ in range(30):
        losses, gradients = bowls.at(values, [0])
        best = min(best, float(losses))
        optimiser.step(gradients, losses)
        assert optimiser._loss == [pytest.approx(best)]


@pytest.mark.parametrize("loss", [1e-9, 0.1, 3.0, 49.9, 50.1, 1e4], ids=str)
def test_the_first_step_goes_where_the_log_odds_are_linear_to_its_aim(loss):
    """By finite differences of the log-odds of exp(-loss) along the loss."""
    odds = lambda one: -one - math.log1p(-math.exp(-one))  # noqa: E731
    slope = (odds(loss * (1 - 1e-6)) - odds(loss)) / (loss * 1e-6)
    wanted = max(4.0 - odds(loss), optimisers.LEAST_RISE) / slope
    assert optimisers._way(loss, 4.0) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("loss", [0.0, math.inf])
def test_a_loss_without_log_odds_still_gives_a_finite_step(loss):
    values = torch.ones(1, 3)
    LBFGS(values).step(torch.ones(1, 3), torch.tensor([loss]))
    assert values.isfinite().all()


def test_without_a_gradient_nothing_moves():
    values = torch.ones(2, 3)
    optimiser = LBFGS(values)
    for _ in range(3):
        optimiser.step(torch.zeros(2, 3), torch.ones(2))
    assert torch.equal(values, torch.ones(2, 3))


@pytest.mark.parametrize(("schedule", "kind"), [(Schedule(), Adam), (Schedule.fast(), LBFGS)])
def test_a_schedule_names_its_optimiser(schedule, kind):
    assert type(optimisers.of(schedule, torch.rand(2, 3))) is kind
