"""Modes nest: each holds until its own block is left, by whatever way, and only in its thread."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import nn

import grace_fast as gf
from grace_fast.hook.generation import Generation
from grace_fast.hook.training_override import TrainingOverride

WIDTH = 4


class Model(nn.Module):
    """One linear layer that may be edited; its last token asks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs_embeds):
        return self.layer(inputs_embeds)


@pytest.fixture
def adapter():
    grace = gf.attach(Model().eval(), "layer", replacement="replace_last")
    yield grace._adapter
    grace.unload()


def run(adapter):
    with torch.no_grad():
        return adapter.model(torch.ones(1, 3, WIDTH))[0]


def at(where):
    return torch.tensor([where])


def asked(adapter):
    """Return at which token a call asks now."""
    with adapter.observing() as seen:
        run(adapter)
    return int(seen[0].positions)


def is_bare(adapter):
    return not adapter._modes.thread.stack and not adapter._modes.disabled


def test_the_inner_block_holds_and_then_the_outer_one_again(adapter):
    with adapter.asking_at(at(0)):
        with adapter.asking_at(at(1)):
            assert asked(adapter) == 1
            with adapter.asking_at(None):
                assert asked(adapter) == 2
        assert asked(adapter) == 0
    assert asked(adapter) == 2
    one, other = (
        TrainingOverride(torch.full((1, WIDTH), value), (0,), torch.zeros(1, dtype=torch.int64))
        for value in (1.0, 2.0)
    )
    with adapter.trying(one):
        with adapter.trying(other):
            assert (run(adapter)[-1] == 2).all()
        assert (run(adapter)[-1] == 1).all()
        with adapter.observing() as outer:  # nothing is written while it is watched
            with adapter.observing() as inner:
                own = run(adapter)
            run(adapter)
        assert (len(inner), len(outer)) == (1, 1)
        assert not (own[-1] == 1).all()
    assert is_bare(adapter)


def every_mode(adapter):
    return (
        adapter.asking_at(at(0)),
        adapter.observing(),
        adapter.trying(
            TrainingOverride(torch.zeros(1, WIDTH), (0,), torch.zeros(1, dtype=torch.int64))
        ),
        adapter.holding(Generation()),
        adapter.disabled(),
    )


def test_a_block_that_raises_leaves_nothing_on(adapter):
    for mode in every_mode(adapter):
        with pytest.raises(KeyboardInterrupt), mode:
            raise KeyboardInterrupt
        assert is_bare(adapter)
    for mode in every_mode(adapter):
        mode.__enter__()  # and its block is given up, with nobody to leave it
    assert not is_bare(adapter)
    del mode
    gc.collect()
    assert is_bare(adapter)


def test_blocks_that_end_in_another_order_take_themselves_off(adapter):
    first, second = adapter.asking_at(at(0)), adapter.asking_at(at(1))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert asked(adapter) == 1
    second.__exit__(None, None, None)
    assert asked(adapter) == 2
    assert is_bare(adapter)


def test_a_generator_that_another_thread_gives_up_ends_its_block(adapter):
    def steps():
        with adapter.holding(Generation()):
            yield

    begun = steps()
    next(begun)
    assert len(adapter._modes.thread.stack) == 1
    thread = threading.Thread(target=begun.close)
    thread.start()
    thread.join()
    del begun
    gc.collect()
    assert is_bare(adapter)


def test_modes_are_of_one_thread_but_for_no_answer(adapter):
    seen = []

    def look():
        seen.append((asked(adapter), bool(adapter._modes.disabled)))

    def in_a_thread():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    with adapter.asking_at(at(0)):
        in_a_thread()
        with adapter.disabled():
            in_a_thread()
            assert asked(adapter) == 0
    assert seen == [(2, False), (2, True)]
