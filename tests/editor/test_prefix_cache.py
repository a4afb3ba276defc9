"""What lies below an edited layer runs as often as it has to, and every value is what it was."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from models import FAMILIES
from torch import nn
from torch.utils.checkpoint import checkpoint

import grace_fast as gf
from grace_fast.editor import prefix_cache, session
from grace_fast.editor.prefix_cache import PrefixCache

QUICK = {"iterations": 8, "learning_rate": 0.1, "stop_loss": 0.0}


class Whole(PrefixCache):
    """Every step runs the whole model."""

    def step(self):
        return nullcontext()


def learnt(monkeypatch, kind, build, run):
    """Return what edits end with, and in how many of their last steps something was cached."""
    kept = []

    class Seen(kind):
        def __exit__(self, *given):
            kept.append(self._kept is not None)
            return super().__exit__(*given)

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    grace = build()
    with monkeypatch.context() as patched:
        patched.setattr(session, "PrefixCache", Seen)
        run(grace)
    edits = [(e.outcome, e.row, e.radius, e.loss, e.steps, e.correct) for e in grace.edits()]
    left = [
        m
        for m in grace.model.modules()
        if isinstance(vars(m).get("forward"), type(prefix_cache._StandIn))
    ]
    assert not left
    return (grace.codebook.snapshot().values.clone(), edits), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_the_same_values_bit_for_bit(name, dtype, monkeypatch):
    family, results = FAMILIES[name], {}
    for kind in (PrefixCache, Whole):

        def run(grace):
            for at, row in enumerate(models.prompts(2, shortest=5)):
                grace.edit(models.edit_batch(family, [row], [[10 + at, 20]]))
            rows = models.prompts(3, seed=5, shortest=5)
            grace.edit_batch(models.edit_batch(family, rows, [[30 + at] for at in range(3)]))

        build = lambda: gf.attach(  # noqa: E731
            models.build(name, dtype),
            family.layer,
            family.epsilon,
            replacement="replace_all",
            **QUICK,
        )
        results[kind], kept = learnt(monkeypatch, kind, build, run)
        assert kept == [kind is PrefixCache] * 3
    (values, edits), (other, its) = results.values()
    assert torch.equal(values, other)
    assert edits == its


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, hidden):
        return hidden + torch.tanh(self.inner(hidden))


class Toy(nn.Module):
    """An embedding, two blocks, the edited layer, and what a test makes of their path."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.one, self.two = nn.Embedding(20, 4), Block(), Block()
        self.edited, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def below(self, input_ids):
        return self.two(self.one(self.embed(input_ids)))

    def above(self, hidden):
        return self.head(torch.tanh(hidden))[:, -1]

    def forward(self, input_ids, labels=None):
        logits = self.above(self.edited(self.below(input_ids)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def of(**parts):
    """Return a kind of Toy with some methods of its own."""
    return type("Toy", (Toy,), parts)


def edit_of(grace):
    grace.edit({"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": torch.tensor([2])})


class Lost:
    """What a model hands from block to block."""

    def __init__(self):
        self.sum = 0


def hooked(register):
    def spoil(toy):
        register(toy)

    return spoil


def noisy(draw):
    """Return what makes the second block noisy."""

    def spoil(toy):
        own = type("Block", (Block,), {"forward": lambda self, hidden: hidden * (1 + draw(self))})
        toy.two.__class__ = own

    return spoil


def counted(toy):
    """Each call is answered otherwise."""

    def forward(self, hidden):
        self.calls = getattr(self, "calls", 0) + 1
        return hidden * (1 + self.calls / 10)

    toy.two.__class__ = type("Block", (Block,), {"forward": forward})


def in_a_buffer(toy):
    toy.two.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden):
        self.calls += 1
        return hidden * (1 + self.calls / 10)

    toy.two.__class__ = type("Block", (Block,), {"forward": forward})


def collected(toy):
    """The loss is of what the blocks leave with the model."""
    toy.left = []

    class Leaving(Block):
        def forward(self, hidden):
            toy.left.append(hidden.square().mean())
            return hidden

    def forward(self, input_ids, labels=None):
        self.left.clear()
        answer = Toy.forward(self, input_ids, labels)
        if answer.loss is not None:
            answer.loss = answer.loss + sum(self.left)
        return answer

    toy.two.__class__, toy.__class__ = Leaving, of(forward=forward)


def handed_on(toy):
    """Each block adds to an object that it is handed."""

    class Adding(Block):
        def forward(self, hidden, lost):
            lost.sum = lost.sum + hidden.mean()
            return hidden

    def below(self, input_ids):
        self.lost = Lost()
        hidden = self.one(self.embed(input_ids))
        return self.two(hidden, self.lost)

    def above(self, hidden):
        return Toy.above(self, hidden) * (1 + self.lost.sum)

    toy.two.__class__, toy.__class__ = Adding, of(below=below, above=above)


def patched(toy):
    forward, calls = toy.two.forward, []
    toy.two.forward = lambda hidden: (calls.append(1), forward(hidden) * (1 + len(calls) / 10))[1]


def stateful_hook():
    calls = []

    def hook(*given):
        calls.append(1)
        return given[-1] * (1 + len(calls) / 10) if isinstance(given[-1], torch.Tensor) else None

    return hook


def stateful_pre_hook():
    calls = []

    def hook(_, given):
        calls.append(1)
        return (given[0] * (1 + len(calls) / 10),)

    return hook


def checkpointed(toy):
    def below(self, input_ids):
        return checkpoint(self.two, self.one(self.embed(input_ids)), use_reentrant=False)

    toy.__class__ = of(below=below)


def dropping(toy):
    toy.two.__class__ = type(
        "Block", (Block,), {"forward": lambda _, hidden: nn.functional.dropout(hidden, 0.5)}
    )


def with_generator(toy):
    toy.two.draws = torch.Generator().manual_seed(3)
    noisy(lambda self: torch.rand((), generator=self.draws))(toy)


def with_hidden_generator(toy):
    draws = torch.Generator().manual_seed(3)
    noisy(lambda _: torch.rand((), generator=draws))(toy)


def noisy_between(toy):
    draws = torch.Generator().manual_seed(3)

    def below(self, ids):
        hidden = self.embed(ids)
        return nn.functional.linear(hidden + torch.rand((), generator=draws), self.one.inner.weight)

    toy.one, toy.two = nn.Identity(), nn.Identity()  # all that is kept is known
    toy.one.inner = nn.Linear(4, 4)
    toy.__class__ = of(below=below)


SPOILT = {
    "a hook on a block": lambda toy: toy.two.register_forward_hook(stateful_hook()),
    "a hook before a block": lambda toy: toy.two.register_forward_pre_hook(stateful_pre_hook()),
    "a hook within a block": lambda toy: toy.one.inner.register_forward_hook(stateful_hook()),
    "a hook before the layer": lambda toy: toy.edited.register_forward_pre_hook(
        stateful_pre_hook()
    ),
    "a hook around": lambda toy: toy.register_forward_pre_hook(lambda *_: None),
    "a patched block": patched,
    "a block that is compiled": lambda toy: toy.two.compile(backend="eager"),
    "a block that drops out for ever": dropping,
    "a draw of torch's": noisy(lambda _: torch.rand(())),
    "a draw of Python's": noisy(lambda _: random.random()),
    "a draw of numpy's": noisy(lambda _: np.random.rand()),  # noqa: NPY002
    "a generator of its own": with_generator,
    "a generator that nobody sees": with_hidden_generator,
    "noise between the blocks": noisy_between,
    "a block that counts": counted,
    "a buffer that counts": in_a_buffer,
    "what blocks leave with the model": collected,
}
# Some modules run at each step, others do not.
MIXED = {
    "nothing": lambda toy: None,
    "an object that is handed on": handed_on,
    "a module that is called twice": lambda toy: setattr(toy, "two", toy.one),
    "a caller that writes": lambda toy: setattr(
        toy, "__class__", of(below=lambda self, ids: self.two(self.one(self.embed(ids)).mul_(2)))
    ),
    "a block that writes to what it is given": lambda toy: setattr(
        toy.two, "__class__", type("B", (Block,), {"forward": lambda _, hidden: hidden.mul_(2)})
    ),
    "a checkpoint": checkpointed,
}


@pytest.mark.parametrize(
    ("spoil", "is_kept"),
    [(one, False) for one in SPOILT.values()] + [(one, None) for one in MIXED.values()],
    ids=[*SPOILT, *MIXED],
)
def test_who_takes_part_below_the_layer_does_so_at_each_step(spoil, is_kept, monkeypatch):
    results = {}
    for kind in (PrefixCache, Whole):

        def build():
            toy = Toy().eval()
            spoil(toy)
            return gf.attach(toy, "edited", 1.0, replacement="replace_all", **QUICK)

        def run(grace):
            for _ in range(2):
                edit_of(grace)

        results[kind], kept = learnt(monkeypatch, kind, build, run)
        if kind is PrefixCache and is_kept is not None:
            assert kept == [is_kept] * 2
    (values, edits), (other, its) = results.values()
    assert torch.equal(values, other)
    assert edits == its


def calls_of(module):
    """Return a list that grows with each run of a module's own forward."""
    calls, forward = [], type(module).forward

    class Counted(type(module)):
        def forward(self, *given, **more):
            calls.append(threading.current_thread())
            return forward(self, *given, **more)

    module.__class__ = Counted
    return calls


def test_what_lies_below_runs_for_the_look_and_the_first_step_alone():
    toy = Toy().eval()
    grace = gf.attach(toy, "edited", 1.0, replacement="replace_all", **QUICK)
    grace._context.shortcuts.give_up()  # of which no step calls what lies above
    below, layer, above = calls_of(toy.one), calls_of(toy.edited), calls_of(toy.head)
    edit_of(grace)
    assert (len(below), len(layer), len(above)) == (2, 2, 2 + QUICK["iterations"])


def test_what_lies_below_in_a_model_of_transformers_runs_for_the_look_alone(monkeypatch):
    model, family, calls = models.build("gpt2"), FAMILIES["gpt2"], []
    block = type(model.transformer.h[0])
    forward = block.forward
    monkeypatch.setattr(
        block, "forward", lambda self, *a, **k: (calls.append(self), forward(self, *a, **k))[1]
    )
    grace = gf.attach(model, family.layer, family.epsilon, replacement="replace_all", **QUICK)
    grace._context.shortcuts.give_up()
    grace.edit(models.edit_batch(family, models.prompts(1), [[10, 20]]))
    below, _, above = [calls.count(one) for one in model.transformer.h]
    assert (below, above) == (1, 2 + QUICK["iterations"])


def test_an_edit_of_several_values_looks_twice_at_all_rows():
    toy = Toy().eval()
    grace = gf.attach(toy, "edited", 0.01, replacement="replace_all", **QUICK)
    below = calls_of(toy.one)
    grace.edit_batch({"input_ids": torch.tensor([[3, 4], [7, 8]]), "labels": torch.tensor([1, 2])})
    assert len(grace.codebook) == 2
    assert len(below) == 2


def test_a_hook_of_every_module_and_a_mode_are_asked_at_each_step():
    toy = Toy().eval()
    grace = gf.attach(toy, "edited", 1.0, replacement="replace_all", **QUICK)
    below = calls_of(toy.one)
    whole = 2 + QUICK["iterations"]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        edit_of(grace)
    finally:
        handle.remove()
    assert len(below) == whole
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        edit_of(grace)
    assert len(below) == 2 * whole


def test_an_editor_below_goes_on_answering_while_a_value_is_trained_above():
    toy = Toy().eval()
    below = gf.attach(toy, "one.inner", 1.0, replacement="replace_all", **QUICK)
    edit_of(below)
    grace = gf.attach(toy, "edited", 1.0, replacement="replace_all", **QUICK)
    before = sum(below.hits.values())
    edit_of(grace)
    assert sum(below.hits.values()) - before == 2 + QUICK["iterations"]


def in_the_midst(toy, do):
    """Call a function in another thread, in the midst of an edit."""
    grace = gf.attach(toy, "edited", 1.0, replacement="replace_all", **QUICK)
    mine, found = threading.current_thread(), []

    def behind(*_):
        if len(calls) == 5 and threading.current_thread() is mine:
            other = threading.Thread(target=lambda: found.append(do()))
            other.start()
            other.join(30)

    calls = calls_of(toy.head)
    toy.head.register_forward_hook(behind)  # above the layer, where others may hang what they like
    edit_of(grace)
    grace.unload()
    return found[0]


def test_other_threads_get_what_their_own_tokens_give():
    toy = Toy().eval()
    ids = torch.tensor([[9, 8, 7]])
    with torch.no_grad():
        wanted = toy.below(ids)
        found = in_the_midst(toy, lambda: toy.below(ids))
    assert torch.equal(found, wanted)
    assert not any("forward" in vars(module) for module in toy.modules())


def pickled(module):
    return pickle.loads(pickle.dumps(module))  # noqa: S301  # what was pickled right here


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_a_copy_that_is_made_meanwhile_is_its_own(again):
    toy = Toy().eval()
    copied = in_the_midst(toy, lambda: again(toy.two))
    with torch.no_grad():
        copied.inner.weight.zero_()
        copied.inner.bias.zero_()
        assert torch.equal(copied(torch.ones(1, 4)), torch.ones(1, 4))
