"""Other libraries put modules in each other's places while an editor is attached."""

from __future__ import annotations

import copy
import warnings

import models
import pytest
import torch
from models import FAMILIES, with_lora
from torch import nn

import grace_fast as gf
from grace_fast.errors import LookupWarning

FAMILY = FAMILIES["llama"]
PROMPTS = models.prompts(3, shortest=6, longest=6)
SETTINGS = {"epsilon": 0.1, "replacement": "replace_all", "iterations": 0}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")


def asked(model, rows=PROMPTS):
    with torch.no_grad():
        return model(input_ids=torch.tensor(rows), use_cache=False).logits


def edited(model, layer=FAMILY.layer, **more):
    grace = gf.attach(model, layer, **SETTINGS | more)
    models.remember(grace, PROMPTS[:1])
    return grace


def is_bare(model):
    return not any(len(getattr(module, hooks)) for module in model.modules() for hooks in HOOKS)


def twin(linear):
    new = nn.Linear(linear.in_features, linear.out_features, bias=False)
    new.weight = nn.Parameter(linear.weight.detach().clone())
    return new


def set_the_layer(model):
    mlp = model.model.layers[1].mlp
    mlp.down_proj = twin(mlp.down_proj)


def set_the_block(model):
    block = copy.deepcopy(models.build("llama").model.layers[1])
    model.model.layers[1] = block


def set_the_inner_model(model):
    model.model = models.build("llama").model


def quantise(model):
    with warnings.catch_warnings():  # of torch's own
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(
            model, {"model.layers.1.mlp.down_proj"}, dtype=torch.qint8, inplace=True
        )


TAKEN = [set_the_layer, set_the_block, set_the_inner_model, quantise]


@pytest.mark.parametrize("replace", TAKEN)
def test_edits_go_on_at_what_took_the_layers_place(replace):
    model = models.build("llama")
    grace, other = edited(model), edited(model, name="tenant")
    before = asked(model)
    grace.hits.clear()
    replace(model)
    with pytest.warns(LookupWarning, match="with a .*Linear in its place: its edits go on"):
        after = asked(model)
    assert dict(grace.hits) == {0: 1}
    torch.testing.assert_close(after[:1], before[:1], rtol=0.02, atol=0.2)
    assert grace.verify().ok
    with gf.using("tenant"):
        asked(model)
    assert dict(other.hits) == {0: 1}
    grace.unload()
    other.unload()
    assert is_bare(model)
    gf.attach(model, FAMILY.layer, **SETTINGS).unload()


def test_edits_at_a_lora_layer_answer_when_it_is_merged():
    model = with_lora(models.build("llama"))
    layer = f"base_model.model.{FAMILY.layer}"
    grace = gf.attach(model, layer, **SETTINGS | {"iterations": 60, "learning_rate": 0.3})
    assert grace.edit(models.edit_batch(FAMILY, PROMPTS[:1], [[10]])).correct
    merged = model.merge_and_unload()
    with pytest.warns(
        LookupWarning, match=r"with a torch.*Linear in its place: .* made at a peft.*Linear"
    ):
        assert int(asked(merged)[0, -1].argmax()) == 10
    assert grace.edit(models.edit_batch(FAMILY, PROMPTS[1:2], [[11]])).correct
    assert int(asked(merged)[1, -1].argmax()) == 11
    grace.unload()
    assert is_bare(merged)


def test_a_layer_that_only_moved_is_followed_without_a_word():
    model = models.build("llama")
    grace = gf.attach(model, FAMILY.layer, **SETTINGS)
    lora = with_lora(model)
    models.remember(grace, PROMPTS[:1])
    asked(lora)
    merged = lora.merge_and_unload()
    asked(merged)
    assert dict(grace.hits) == {0: 2}
    assert grace.verify().ok
    grace.unload()
    assert is_bare(merged)


def put_nothing(model):
    model.model.layers = model.model.layers[:1]


def put_another_width(model):
    model.model.layers[1].mlp.down_proj = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 32))


def cut_the_block(model):
    del model.model.layers[1]


@pytest.mark.parametrize("replace", [put_nothing, put_another_width, cut_the_block])
def test_edits_that_nobody_asks_are_told_and_not_verified(replace):
    model = models.build("llama")
    grace = edited(model)
    layer = model.get_submodule(FAMILY.layer)
    replace(model)
    with pytest.warns(LookupWarning, match="in its place: its edits answer no more"):
        asked(model)
    asked(model)  # told once
    found = grace.verify()
    assert not found.ok
    assert "the layer left the model" in repr(found)
    with pytest.raises(RuntimeError, match="left the model: unload"):
        grace.edit(models.edit_batch(FAMILY, PROMPTS[:1], [[10]]))
    grace.unload()
    assert is_bare(model)
    assert not layer._forward_hooks


def test_verify_finds_out_by_itself():
    model = models.build("llama")
    grace = edited(model)
    put_nothing(model)
    with pytest.warns(LookupWarning, match="with nothing in its place"):
        assert not grace.verify().ok


def test_verify_fails_where_a_wrapper_has_another_model_now():
    whole = nn.DataParallel(models.build("llama"))
    grace = edited(whole, f"module.{FAMILY.layer}")
    assert grace.verify().ok
    whole.module = models.build("llama")
    assert not grace.verify().ok


def test_a_block_that_is_compiled_in_place_answers_on():
    model = models.build("llama")
    grace = edited(model)
    before = asked(model)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    grace.hits.clear()
    assert torch.equal(asked(model), before)
    assert dict(grace.hits) == {0: 1}
    assert grace.verify().ok
    grace.unload()
    assert is_bare(model)


def test_edits_answer_again_when_the_layer_comes_back():
    model = models.build("llama")
    grace = edited(model)
    layers = model.model.layers
    put_nothing(model)
    with pytest.warns(LookupWarning, match="answer no more"):
        asked(model)
    model.model.layers = layers
    asked(model)
    assert dict(grace.hits) == {0: 1}
    assert grace.verify().ok


def test_a_compiled_model_answers_at_what_took_the_layers_place():
    model = models.build("llama")
    grace = edited(model)
    compiled = torch.compile(model, backend="eager")
    asked(compiled)
    set_the_layer(model)
    with pytest.warns(LookupWarning, match="its edits go on"):
        asked(compiled)
    grace.hits.clear()
    asked(compiled)
    assert dict(grace.hits) == {0: 1}


def test_an_editor_that_was_unloaded_follows_no_layer():
    model = models.build("llama")
    grace = edited(model)
    grace.unload()
    set_the_layer(model)
    grace.verify()
    assert is_bare(model)


def test_a_part_of_the_model_with_the_layer_in_it_is_not_copied():
    model = models.build("llama")
    edited(model)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*save_pretrained"):
        copy.deepcopy(model.model.layers[1])
