"""Models that are handed over inside other modules, and layers that cannot be edited."""

from __future__ import annotations

import models
import pytest
import torch
from models import FAMILIES
from torch import nn

import grace_fast as gf

FAMILY = FAMILIES["llama"]
PROMPT = models.prompts(1, shortest=6, longest=6)
SETTINGS = {
    "epsilon": 0.1,
    "replacement": "replace_last",
    "iterations": 60,
    "learning_rate": 0.3,
}


def answer(model, rows=PROMPT):
    with torch.no_grad():
        return int(model(**models.prompt_batch(rows)).logits[0, -1].argmax())


class Around(nn.Module):
    """A module without a config, whose call returns something else than the model's."""

    def __init__(self, inner):
        super().__init__()
        self.lm, self.value = inner, nn.Linear(32, 1)

    def forward(self, ids):
        answer = self.lm(input_ids=ids, output_hidden_states=True)
        return answer.logits, self.value(answer.hidden_states[-1])


class WithConfig(Around):
    """The same that shows its model's config, as value heads do."""

    def __init__(self, inner):
        super().__init__(inner)
        self.config = inner.config


def data_parallel(model):
    return nn.DataParallel(model), "module."


def in_two(model):
    return Around(nn.DataParallel(model)), "lm.module."


def compiled_within(model):
    return Around(torch.compile(model, backend="eager")), "lm._orig_mod."


WRAPPERS = {
    "DataParallel": data_parallel,
    "a value head": lambda model: (Around(model), "lm."),
    "a value head with a config": lambda model: (WithConfig(model), "lm."),
    "two wrappers": in_two,
    "a wrapper of a compiled model": compiled_within,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
def test_the_model_within_a_wrapper_is_edited_as_it_is_bare(wrap, tmp_path):
    inner = models.build("llama")
    whole, before = wrap(inner)
    grace = gf.attach(whole, before + FAMILY.layer, **SETTINGS)
    assert grace.kind == "decoder"
    assert grace.edit(models.edit_batch(FAMILY, PROMPT, [[10]])).correct
    assert answer(inner) == 10
    said = inner.generate(**models.prompt_batch(PROMPT), max_new_tokens=1, do_sample=False)
    assert int(said[0, -1]) == 10
    grace.save_pretrained(tmp_path)
    assert grace.unload() is whole
    assert answer(inner) != 10
    gf.from_pretrained(whole, tmp_path)
    assert answer(inner) == 10


class OwnLoss(nn.Module):
    """A classifier of one's own around a backbone without a head."""

    def __init__(self, backbone, per_token=False):
        super().__init__()
        self.backbone, self.head, self.per_token = backbone, nn.Linear(32, 4), per_token
        nn.init.normal_(self.head.weight, std=0.5)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]
        logits = self.head(hidden if self.per_token else hidden[:, 0])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return type("Answer", (), {"loss": loss, "logits": logits})


class NeedsMask(OwnLoss):
    """The same, which cannot be called without a mask."""

    def forward(self, input_ids, attention_mask, labels=None):
        return super().forward(input_ids, attention_mask, labels)


@pytest.mark.parametrize("made", [OwnLoss, NeedsMask])
def test_a_wrapper_that_makes_its_own_loss_is_edited_through_it(made):
    family = FAMILIES["bert"]
    model = made(models.build("bert").bert).eval()
    layer = family.layer.replace("bert.", "backbone.", 1)
    grace = gf.attach(model, layer, **SETTINGS | {"replacement": "replace_all"})
    batch = models.prompt_batch(PROMPT)
    wanted = (int(model(**batch).logits.argmax()) + 1) % 4
    assert grace.edit({**batch, "labels": torch.tensor([wanted])}).correct
    assert int(model(**batch).logits.argmax()) == wanted
    assert dict(grace.hits) == {0: 1}


def test_labels_of_each_token_are_refused_where_nothing_says_how_they_are_read():
    model = OwnLoss(models.build("llama").model, per_token=True).eval()
    grace = gf.attach(model, FAMILY.layer.replace("model.", "backbone.", 1), **SETTINGS)
    batch = models.edit_batch(FAMILY, PROMPT, [[3]])
    with pytest.raises(ValueError, match=r"OwnLoss makes a loss of its own.*one token"):
        grace.edit(batch)


def test_a_score_for_each_class_is_no_label_of_a_token():
    class Scores(OwnLoss):
        def forward(self, input_ids, attention_mask=None, labels=None):
            said = super().forward(input_ids, attention_mask)
            if labels is not None:
                said.loss = nn.functional.mse_loss(said.logits, labels)
            return said

    model = Scores(models.build("bert").bert).eval()
    layer = FAMILIES["bert"].layer.replace("bert.", "backbone.", 1)
    grace = gf.attach(model, layer, **SETTINGS | {"replacement": "replace_all", "iterations": 200})
    batch = models.prompt_batch(PROMPT)
    wanted = model(**batch).logits.detach() + torch.tensor([[0.1, -0.1, 0.1, 0.0]])
    assert grace.edit({**batch, "labels": wanted}).correct
    assert torch.allclose(model(**batch).logits, wanted, atol=0.02)


def test_a_layer_beside_the_model_in_a_wrapper_is_refused():
    with pytest.raises(ValueError, match=r"value is a layer of Around, which takes no labels"):
        gf.attach(Around(models.build("llama")), "value")


def test_what_is_no_module_is_refused_by_what_it_is():
    class Pipeline:
        model = models.build("bert")

    with pytest.raises(
        TypeError, match=r"must be a torch.nn.Module, got Pipeline; give its .model"
    ):
        gf.attach(Pipeline(), FAMILIES["bert"].layer)
