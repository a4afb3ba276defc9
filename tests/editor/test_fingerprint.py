"""A codebook opens on the model it was made for, however that is configured around it."""

from __future__ import annotations

import json
from contextlib import nullcontext as opens

import models
import pytest
import torch
from models import FAMILIES
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import grace_fast as gf
from grace_fast.editor.fingerprint import differences, fingerprint, usual_settings

LAYER = FAMILIES["llama"].layer
refused = pytest.raises


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codebook")
    grace = gf.attach(models.build("llama"), LAYER, epsilon=0.1, replacement="replace_last")
    models.remember(grace, models.prompts(2))
    grace.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changed", "what_becomes_of_it"),
    {
        "special tokens": ({"pad_token_id": 2, "bos_token_id": None}, opens()),
        "several ends": ({"eos_token_id": [2, 3]}, opens()),
        "what is returned": ({"output_hidden_states": True, "return_dict": False}, opens()),
        "how it generates": ({"temperature": 0.2, "max_length": 5, "do_sample": True}, opens()),
        "dropout": ({"attention_dropout": 0.1}, opens()),
        "first weights": ({"initializer_range": 0.01}, opens()),
        "names": ({"name_or_path": "elsewhere", "architectures": ["Other"]}, opens()),
        "classes' names": ({"id2label": {0: "no", 1: "yes", 2: "perhaps"}}, opens()),
        "another release": ({"transformers_version": "9.9"}, opens()),
        "the attention's code": ({"_attn_implementation": "eager"}, opens()),
        "the element type's name": ({"dtype": torch.bfloat16}, opens()),
        "a later release's setting, off": ({"a_new_one": False, "another": None}, opens()),
        "a setting that is on": (
            {"a_new_one": 7},
            refused(gf.CodebookMismatch, match=r"config\.a_new_one must be None, .* has 7"),
        ),
        "a window": (
            {"sliding_window": 4},
            refused(gf.CodebookMismatch, match=r"config\.sliding_window must be None"),
        ),
        "the norm": (
            {"rms_norm_eps": 1e-3},
            refused(gf.CodebookMismatch, match=r"config\.rms_norm_eps must be 1e-06"),
        ),
        "the activation": (
            {"hidden_act": "relu"},
            refused(gf.CodebookMismatch, match=r"config\.hidden_act must be 'silu'"),
        ),
        "rotary positions": (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            refused(gf.CodebookMismatch, match=r"config\.rope_scaling must be None, .*'factor'"),
        ),
    }.values(),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_only_what_a_query_depends_on_refuses_a_codebook(saved, changed, what_becomes_of_it):
    model = models.build("llama")
    for name, value in changed.items():
        setattr(model.config, name, value)
    with what_becomes_of_it:
        gf.from_pretrained(model, saved).unload()


def described(model, layer):
    return json.loads(json.dumps(fingerprint(model, layer)))


def differ(stored, model, layer):
    return differences(stored, fingerprint(model, layer), usual_settings(model))


def test_padding_counts_where_positions_are_counted_from_it():
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    m2m = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    for make, name in (
        (
            lambda **more: RobertaForSequenceClassification(RobertaConfig(**small, **more)),
            "roberta.encoder.layer.0.output.dense",
        ),
        (
            lambda **more: M2M100ForConditionalGeneration(M2M100Config(**m2m, **more)),
            "model.encoder.layers.0.fc2",
        ),
    ):
        model = make(pad_token_id=1)
        stored = described(model, model.get_submodule(name))
        other = make(pad_token_id=4)
        with torch.no_grad():
            other.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
        assert differ(stored, other, other.get_submodule(name)) == [
            "positions must be counted from padding 1, this model's from 4"
        ]
        # What it was built with counts, not what its config says afterwards.
        model.config.pad_token_id = 4
        assert differ(stored, model, model.get_submodule(name)) == []


def mistral(**more):
    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(**small, **heads, **more))


def test_a_setting_that_a_release_adds_is_as_its_class_has_it():
    model, layer = mistral(sliding_window=4096), "model.layers.0.mlp.down_proj"
    stored = described(model, model.get_submodule(layer))
    del stored["config"]["sliding_window"]  # the release that made it knew of none
    assert model.config.sliding_window == MistralConfig().sliding_window
    assert differ(stored, model, model.get_submodule(layer)) == []
    other = mistral(sliding_window=8)
    assert differ(stored, other, other.get_submodule(layer)) == [
        "config.sliding_window must be None, this model has 8"
    ]


def test_what_an_older_release_remembered_is_understood():
    model, layer = mistral(sliding_window=None), "model.layers.0.mlp.down_proj"
    stored = described(model, model.get_submodule(layer))
    del stored["form"]  # it kept numbers, truths and texts, those of training too
    stored["config"] = {
        name: value
        for name, value in stored["config"].items()
        if isinstance(value, bool | int | float | str)
    } | {"attention_dropout": 0.1, "eos_token_id": 7, "rope_theta": 10000.0}
    assert differ(stored, model, model.get_submodule(layer)) == []
    other = mistral(sliding_window=4096)  # what the class has; but there was none
    assert differ(stored, other, other.get_submodule(layer)) == [
        "config.sliding_window must be None, this model has 4096"
    ]
    stored["config"]["rope_theta"] = 5.0
    assert differ(stored, model, model.get_submodule(layer)) == [
        "config.rope_theta must be 5.0, this model has 10000.0"
    ]


def test_settings_within_settings_count_too():
    model, layer = models.build("llama"), LAYER
    model.config.vision_config = {"patches": 4, "dropout": 0.1, "names": ("a", "b")}
    stored = described(model, model.get_submodule(layer))
    model.config.vision_config = {"patches": 4, "dropout": 0.3, "names": ["a", "b"]}
    assert differ(stored, model, model.get_submodule(layer)) == []
    model.config.vision_config = {"patches": 8}
    assert differ(stored, model, model.get_submodule(layer)) == [
        "config.vision_config.names must be ['a', 'b'], this model has None",
        "config.vision_config.patches must be 4, this model has 8",
    ]
