"""Training one value: what it ends with, and edits that cannot be learnt where they are."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import models
import pytest
import torch
from models import FAMILIES
from torch import nn

import grace_fast as gf
from grace_fast.editor.optimisers import Adam
from grace_fast.editor.training import Schedule, train

BOTH = {"kept best": True, "kept last": False}


@pytest.mark.parametrize("keep_best", BOTH.values(), ids=BOTH)
def test_a_loss_that_the_value_does_not_change_is_given_up_at_once(keep_best):
    constant = torch.ones(1, requires_grad=True)
    for name, loss in {
        "not connected": lambda _: constant.sum(),
        "multiplied by zero": lambda value: 1 + (value * 0).sum(),
    }.items():
        seen = []
        attempt = lambda value, loss=loss, seen=seen: (seen.append(1), (loss(value), False))[1]  # noqa: E731
        done = train(torch.rand(3), attempt, Schedule(iterations=7, keep_best=keep_best))
        assert done.stuck == "no gradient", name
        # The reference does all of its steps; they change nothing.
        assert (done.steps, len(seen)) == ((0, 1) if keep_best else (7, 8)), name


def test_a_loss_without_a_graph_cannot_be_trained():
    with pytest.raises(ValueError, match="no gradient of the loss reaches the value"):
        train(torch.rand(3), lambda _: (torch.ones(()), False), Schedule(iterations=7))


def test_a_loss_that_stops_being_a_number_ends_the_training_with_the_best_value():
    def attempt(value):
        loss = (value - 1).square().sum()
        return (loss if float(loss.detach()) > 2 else loss * math.nan), False

    done = train(torch.zeros(3), attempt, Schedule(iterations=50, learning_rate=0.1))
    assert done.stuck == "not finite"
    assert 0 < done.steps < 50
    assert done.value.isfinite().all()
    assert 2 < done.loss < 3


def test_an_infinite_loss_with_a_gradient_is_trained_on():
    def attempt(value):
        loss = (value - 1).square().sum()
        now = float(loss.detach())
        return loss + (math.inf if now > 2.5 else 0), now < 0.5

    done = train(torch.zeros(3), attempt, Schedule(learning_rate=0.1, stop_loss=0.5))
    assert done.stuck is None
    assert done.correct


def test_what_is_right_already_is_not_called_stuck():
    right = lambda value: (1 + (value * 0).sum(), True)  # noqa: E731
    done = train(torch.rand(3), right, Schedule(iterations=4))
    assert done.correct
    assert done.stuck is None


def batch_of(family, count=1):
    rows = models.prompts(count, shortest=5)
    return models.edit_batch(family, rows, [[10 + at] for at in range(count)])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_last_block_says_that_replace_prompt_teaches_it_nothing(name):
    family = FAMILIES[name]
    layer = family.layer.replace(".1.", ".2.")
    grace = gf.attach(models.build(name), layer, epsilon=family.epsilon)
    with pytest.warns(gf.GraceWarning, match=rf"{layer}: its value has no effect.*replace_last"):
        edit = grace.edit(batch_of(family))
    assert (edit.steps, edit.correct) == (0, False)
    grace.unload()
    grace = gf.attach(grace.model, layer, epsilon=family.epsilon, replacement="replace_last")
    edit = grace.edit(batch_of(family))
    assert edit.steps > 0
    assert edit.correct


def test_each_edit_of_a_batch_that_cannot_be_learnt_is_named():
    family = FAMILIES["llama"]
    grace = gf.attach(models.build("llama"), "model.layers.2.mlp.down_proj", epsilon=0.05)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        grace.edit_batch(batch_of(family, 2))
    rows = [str(one.message)[:33] for one in told if "no effect" in str(one.message)]
    assert rows == ["the edit of row 0 of the batch ca", "the edit of row 1 of the batch ca"]


def test_where_warnings_are_errors_an_edit_that_cannot_be_learnt_changes_nothing():
    grace = gf.attach(models.build("llama"), "model.layers.2.mlp.down_proj", epsilon=0.05)
    with pytest.raises(gf.GraceWarning, match="cannot be learnt"):  # as pytest has them
        grace.edit(batch_of(FAMILIES["llama"]))
    assert len(grace.codebook) == 0
    assert grace.edits() == []


class Toy(nn.Module):
    """Two layers, of which the second is read as a path of the test says."""

    def __init__(self, path):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.one, self.two = nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        nn.init.constant_(self.two.bias[2:], -50.0)  # class 2 is never said
        self.path = path

    def forward(self, input_ids, labels=None, attention_mask=None):
        hidden = self.embed(input_ids)
        logits = self.path(self, self.one(hidden), hidden)[:, -1]
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


PATHS = {
    "normed to nothing": (
        lambda toy, given, _: toy.two(nn.functional.layer_norm(given, (4,), torch.zeros(4))),
        "no effect on the loss",
    ),
    "not a number": (lambda toy, given, _: toy.two(given) * math.nan, "not finite from the start"),
}


@pytest.mark.parametrize(("path", "message"), PATHS.values(), ids=PATHS)
def test_a_path_that_no_value_gets_through_is_said(path, message):
    toy = Toy(path)
    grace = gf.attach(toy, "one", epsilon=1.0, replacement="replace_last")
    batch = {"input_ids": torch.tensor([[3, 4, 5]])}
    label = {"labels": torch.tensor([2])}
    with pytest.warns(gf.GraceWarning, match=message):
        edit = grace.edit(batch | label)
    assert (edit.steps, edit.correct) == (0, False)


CUT = {
    "detached": lambda toy, given, _: toy.two(given.detach()),
    "not used": lambda toy, _, hidden: toy.two(hidden),
}


@pytest.mark.parametrize("path", CUT.values(), ids=CUT)
def test_a_path_that_leads_nowhere_is_refused(path):
    grace = gf.attach(Toy(path), "one", epsilon=1.0, replacement="replace_last")
    with pytest.raises(ValueError, match="no gradient of the loss reaches the value"):
        grace.edit({"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([2])})
    assert grace.edits() == []


def test_a_value_that_is_no_number_is_never_stored():
    toy = Toy(lambda toy, given, _: toy.two(given) * math.nan)
    grace = gf.attach(
        toy, "one", 1.0, replacement="replace_last", semantics="reference", iterations=3
    )
    with pytest.raises(ValueError, match=r"row 0 of the batch must be finite.*lower learning_rate"):
        grace.edit({"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([1])})
    assert len(grace.codebook) == 0
    assert grace.edits() == []


@pytest.mark.parametrize("correct", [True, False])
def test_a_value_that_breaks_the_model_never_replaces_one_that_does_not(correct):
    losses = iter([3.0, math.nan, 2.0, math.nan])

    def attempt(value):
        return (value * 0).sum() + value.sum() * 1e-3 + next(losses), correct

    done = train(torch.zeros(3), attempt, Schedule(iterations=3, stop_loss=None))
    assert done.loss == pytest.approx(2.0, abs=0.1)
    assert done.value.isfinite().all()


@pytest.mark.parametrize("shape", [(7,), (3, 129)], ids=str)
@pytest.mark.parametrize("rate", [1.0, 0.013])
def test_adam_steps_as_that_of_torch_does_bit_for_bit(shape, rate):
    draw = torch.Generator().manual_seed(0)
    ours = torch.rand(shape, generator=draw)
    theirs = ours.clone().requires_grad_()
    adam, other = Adam(ours, rate), torch.optim.Adam([theirs], rate)
    for step in range(60):
        gradient = torch.randn(shape, generator=draw) * 10.0 ** (step % 9 - 6)
        if step % 7 == 3:
            gradient.zero_()
        theirs.grad = gradient.clone()
        adam.step(gradient)
        other.step()
        assert torch.equal(ours, theirs.detach())
