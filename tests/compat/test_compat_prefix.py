"""What is computed once an edit is what would have been computed at each step."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from compat_cases import STEPS, TASKS, config, editor, stream
from torch import nn

from grace_fast.compat import teaching
from grace_fast.compat.method import steps_of
from grace_fast.compat.reference import GRACEAdapter
from grace_fast.editor.prefix_cache import PrefixCache


class Nothing(PrefixCache):
    """Every step runs the whole model."""

    def step(self):
        return nullcontext()


def calls_of(module):
    """Return a list that grows with each run of a module's own forward."""
    calls, forward = [], type(module).forward

    class Counted(type(module)):
        def forward(self, *given, **more):
            calls.append(1)
            return forward(self, *given, **more)

    module.__class__ = Counted
    return calls


FIRST = {"gpt2": "transformer.h.0", "t5-encoder": "encoder.block.0", "bert": "bert.encoder.layer.0"}
LAST = {"gpt2": "lm_head", "t5-encoder": "lm_head", "bert": "classifier"}


@pytest.mark.parametrize("name", TASKS)
def test_the_layers_before_the_edit_run_once_and_nothing_else_changes(name, monkeypatch):
    edits, ours, whole = stream(name, 10), editor(name), editor(name)
    first, last = (calls_of(ours.model.get_submodule(of[name])) for of in (FIRST, LAST))
    for at in range(len(edits)):
        torch.manual_seed(at)
        ours.edit(ours.config, edits.batch(at), None)
        assert (len(first), len(last)) == (at + 1, (at + 1) * STEPS)
        with monkeypatch.context() as plain:
            plain.setattr(teaching, "PrefixCache", Nothing)
            torch.manual_seed(at)
            whole.edit(whole.config, edits.batch(at), None)
        assert ours.losses == whole.losses
    assert torch.equal(ours.adaptor.keys, whole.adaptor.keys)
    assert torch.equal(ours.adaptor.values, whole.adaptor.values)
    assert not any("forward" in vars(module) for module in ours.model.modules())
    assert not any(module._forward_hooks for module in ours.adaptor.layer.modules())


def test_a_model_that_drops_out_runs_whole_and_trains_the_row_first_chosen():
    edits, ours = stream("bert", 6), editor("bert", eps=20.0)
    first = calls_of(ours.model.get_submodule(FIRST["bert"]))
    for at in range(len(edits)):
        ours.model.eval() if at < 5 else ours.model.train()
        before = ours.adaptor.values.detach().clone() if at == 5 else None
        ours.edit(ours.config, edits.batch(at), None)
    assert len(first) == 5 + STEPS
    changed = (ours.adaptor.values[: len(before)] != before).any(dim=1).sum()
    assert changed + len(ours.adaptor.values) - len(before) == 1


def test_a_model_that_draws_in_its_forward_runs_whole():
    ours, edits = editor("bert"), stream("bert", 2)

    class Noise(nn.Module):
        def forward(self, hidden):
            return hidden + torch.rand(()) * 1e-9

    ours.model.bert.embeddings.dropout = Noise()
    first = calls_of(ours.model.get_submodule(FIRST["bert"]))
    ours.edit(ours.config, edits.batch(0), None)
    assert len(first) == STEPS


class Small(nn.Module):
    """A model that writes to what its first layer returned."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.edited = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, labels):
        hidden = self.first(x).mul_(2)
        return SimpleNamespace(loss=(self.edited(hidden) - labels).square().mean())


def test_an_output_that_its_caller_writes_to_is_computed_again(monkeypatch):
    taught, tokens = [], {"x": torch.ones(1, 2, 4), "labels": torch.tensor([[7]])}
    for kind in (PrefixCache, Nothing):
        monkeypatch.setattr(teaching, "PrefixCache", kind)
        model = Small().eval()
        model.edited = GRACEAdapter(config("edited", "qa", 1.0, "replace_all"), model.edited)
        torch.manual_seed(1)
        losses, _ = teaching.teach(model.edited, model, tokens, steps_of(5, 0.1), False)
        taught.append(losses)
    assert taught[0] == taught[1]
    assert len(set(taught[0])) == 5
