"""The language head cut to the tokens that have a target: as the model, or not at all."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import grace_fast as gf
from grace_fast.editor import head_cut
from grace_fast.editor.head_cut import HeadCut, asked_of
from tests import models
from tests.models import FAMILIES

QUICK = {"iterations": 40, "learning_rate": 0.3}
CUT = [name for name in FAMILIES if name != "bert"]
LAYER = FAMILIES["llama"].layer
TARGETS = [[10, 20], [30, 35], [40, 50], [70, 60]]


def attached(model, name, cuts=True, is_recorded=False, **more):
    family = FAMILIES[name]
    grace = gf.attach(model, family.layer, **{"epsilon": family.epsilon, **QUICK, **more})
    grace._context.shortcuts.cuts = cuts
    grace._context.shortcuts.records = is_recorded
    return grace


def batch_of(name, rows=4, side="right"):
    return models.edit_batch(FAMILIES[name], models.prompts(rows), TARGETS[:rows], side)


def told(reports):
    return [(one.outcome, one.row, one.correct) for one in reports]


@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("replacement", ["replace_all", "replace_last", "replace_prompt"])
@pytest.mark.parametrize("name", CUT)
def test_edits_with_a_cut_head_end_as_those_without(name, replacement, is_recorded):
    found, values = [], []
    for cuts in (False, True):
        model = models.build(name)
        grace = attached(model, name, cuts, is_recorded, replacement=replacement)
        reports = [*grace.edit_batch(batch_of(name, 1)), *grace.edit_batch(batch_of(name))]
        found.append(told(reports))
        values.append(grace.codebook.snapshot().values.clone())
        taken = grace._context.shortcuts.taken
        assert (taken["cut"] > 0) == cuts
        assert (taken["replay"] > 0) == is_recorded
    assert found[0] == found[1]
    assert values[0].shape == values[1].shape


@pytest.mark.parametrize("name", CUT)
def test_losses_that_are_reported_are_the_model_s(name):
    grace = attached(models.build(name), name)
    batch = batch_of(name, 1)
    (report,) = grace.edit_batch(batch)
    assert grace._context.shortcuts.taken["cut"] > 0
    with torch.no_grad():
        loss = grace.model(**batch).loss
    assert report.loss == pytest.approx(float(loss), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_that_are_padded_on_the_left_are_cut_at_their_tokens(name):
    grace, plain = (attached(models.build(name), name, cuts) for cuts in (True, False))
    reports, other = (each.edit_batch(batch_of(name, side="left")) for each in (grace, plain))
    assert grace._context.shortcuts.taken["cut"] > 0
    assert told(reports) == told(other)


def test_a_classifier_and_the_references_rules_are_not_cut():
    for name, more in (("bert", {}), ("llama", {"semantics": "reference"})):
        grace = attached(models.build(name), name, **more)
        grace.edit_batch(batch_of(name, 1))
        assert grace._context.shortcuts.taken["cut"] == 0


def test_tied_embeddings_are_cut():
    model = models.build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    grace = attached(model, "gpt2")
    grace.edit_batch(batch_of("gpt2", 1))
    assert grace._context.shortcuts.taken["cut"] > 0
    assert not model.lm_head._forward_pre_hooks


def smoothed(model):
    real = type(model).forward

    def forward(self, *args, labels=None, **more):
        answer = real(self, *args, **more)
        if labels is None:
            return answer
        logits, wanted = answer.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        answer.loss = F.cross_entropy(logits, wanted, label_smoothing=0.2)
        return answer

    return forward


def with_penalty(model):
    real = type(model).forward

    def forward(self, *args, **more):
        answer = real(self, *args, **more)
        if answer.loss is not None:
            answer.loss = answer.loss + 0.1 * answer.logits.square().mean()
        return answer

    return forward


@pytest.mark.parametrize("other", [smoothed, with_penalty])
def test_another_loss_is_left_to_the_model(other):
    found = []
    for cuts in (True, False):
        model = models.build("llama")
        model.__class__ = type("Own", (type(model),), {"forward": other(model)})
        grace = attached(model, "llama", cuts)
        reports = grace.edit_batch(batch_of("llama", 1))
        assert grace._context.shortcuts.taken["cut"] == 0
        found.append((reports[0].loss, reports[0].steps, grace.codebook.snapshot().values.clone()))
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])


def test_a_model_without_output_embeddings_is_not_cut():
    model = models.build("llama")
    model.get_output_embeddings = lambda: None
    grace = attached(model, "llama")
    grace.edit_batch(batch_of("llama", 1))
    assert grace._context.shortcuts.taken["cut"] == 0


def test_a_model_with_lora_is_learnt_as_without_a_cut():
    found = []
    for cuts in (True, False):
        model = models.with_lora(models.build("llama"))
        grace = gf.attach(model, f"base_model.model.{LAYER}", 0.1, **QUICK)
        grace._context.shortcuts.cuts = cuts
        found.append(told(grace.edit_batch(batch_of("llama"))))
    assert found[0] == found[1]


def test_rows_that_leave_are_cut_no_more():
    batch = models.edit_batch(FAMILIES["llama"], models.prompts(4), [[10], [30], [40], [70]])
    found = []
    for cuts in (True, False):
        more = {"iterations": 60, "replacement": "replace_all"}
        grace = attached(models.build("llama"), "llama", cuts, **more)
        reports = grace.edit_batch(batch)
        assert len({one.steps for one in reports}) > 1
        assert (grace._context.shortcuts.taken["cut"] > 0) == cuts
        found.append(told(reports))
    assert found[0] == found[1]


class Tokens(nn.Module):
    """A head, and how often it ran."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 7, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, hidden):
        return SimpleNamespace(logits=self.head(hidden))


def test_logits_are_those_of_the_tokens_that_are_asked():
    model, hidden = Tokens(), torch.randn(2, 5, 4)
    targets = torch.tensor([[-100, -100, 3, 4], [-100, 1, -100, 2]])
    for kind, shift in (("decoder", 1), ("seq2seq", 0)):
        asked = asked_of(targets, kind, "tokens")
        cut = HeadCut(model, asked)
        with cut.on():
            logits = cut.logits_of(model(hidden))
        rows, tokens = (targets != -100).nonzero(as_tuple=True)
        whole = model(hidden).logits[:, -4:][rows, tokens - shift]
        assert torch.allclose(logits, whole, atol=1e-6)
        assert torch.equal(asked.wanted, targets[rows, tokens])


def test_few_rows_are_made_some_more_and_no_more_are_returned():
    model = Tokens()
    asked = asked_of(torch.tensor([[-100, 5, 6]]), "decoder", "tokens")
    cut = HeadCut(model, asked)
    seen = []
    model.head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    with cut.on():
        logits = cut.logits_of(model(torch.randn(1, 3, 4)))
    assert seen == [(1, head_cut.LEAST, 4)]
    assert logits.shape == (2, 7)


def test_other_threads_get_all_logits():
    model, hidden = Tokens(), torch.randn(1, 3, 4)
    cut = HeadCut(model, asked_of(torch.tensor([[-100, -100, 6]]), "decoder", "tokens"))
    seen = []
    with cut.on():
        thread = threading.Thread(target=lambda: seen.append(model(hidden).logits.shape))
        thread.start()
        thread.join()
    assert seen == [(1, 3, 7)]
    assert cut.logits_of(model(hidden)) is None
    assert not model.head._forward_pre_hooks


def test_what_is_not_asked_a_token_is_not_cut():
    assert asked_of(torch.tensor([1, 2]), "classifier", "classes") is None
    assert asked_of(torch.tensor([[0.5]]), "classifier", "scores") is None


def test_a_model_may_be_compiled_in_another_thread_while_its_head_is_cut():
    model, said = models.build("llama"), []
    ids = torch.tensor([[5, 6, 7, 8]])
    targets = torch.tensor([[-100, -100, -100, 9]])
    cut = head_cut.HeadCut(model, head_cut.asked_of(targets, "decoder", "tokens"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def serve():
        with torch.no_grad():
            said.append(compiled(input_ids=ids).logits)

    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    with cut.on():
        other = threading.Thread(target=serve)
        other.start()
        other.join()
    assert len(said) == 1
    assert torch.equal(said[0], wanted)
