"""Edits by text and by chat, with a word-level tokenizer made on the spot."""

from __future__ import annotations

import models
import pytest
import words
from models import FAMILIES

import grace_fast as gf


@pytest.fixture
def tokenizer():
    return words.tokenizer()


def attach(name, tokenizer, **settings):
    family, model = FAMILIES[name], models.build(name)
    settings = {"learning_rate": 0.3, "replacement": "replace_all", **settings}
    return model, gf.attach(
        model, family.layer, epsilon=family.epsilon, tokenizer=tokenizer, **settings
    )


def test_a_decoder_is_edited_by_text_and_says_it(tokenizer):
    model, grace = attach("llama", tokenizer, store_text=True)
    report = grace.edit("the capital of france is", "rome")
    assert report.correct
    assert report.text == ("the capital of france is", "rome")
    prompt = tokenizer("the capital of france is", return_tensors="pt", return_token_type_ids=False)
    said = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0, -1:]) == "rome"
    assert grace.explain("the capital of france is")[0].edit == report.id
    assert not grace.explain("the capital of paris is")[0].fires


def test_a_decoder_is_edited_by_chat(tokenizer):
    model, grace = attach("llama", tokenizer)
    messages = [{"role": "user", "content": "the capital of france"}]
    report = grace.edit(messages, "rome")
    assert report.correct
    assert report.text is None  # texts may be personal: kept only when asked for
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt.pop("token_type_ids", None)
    said = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0, -1:]) == "rome"


def test_a_sequence_to_sequence_model_is_edited_by_text(tokenizer):
    model, grace = attach("t5-decoder", tokenizer)
    assert grace.edit("the capital of france", "rome").correct
    prompt = tokenizer("the capital of france", return_tensors="pt", return_token_type_ids=False)
    said = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0, -1:]) == "rome"


def test_a_classifier_is_edited_by_class_index_and_by_name(tokenizer):
    _, grace = attach("bert", tokenizer)
    assert grace.edit("the capital of france", 2).correct
    assert grace.edit("the capital of rome", "LABEL_1").correct
    with pytest.raises(ValueError, match=r"class index or one of \['LABEL_0'.*got 'rome'"):
        grace.edit("the capital", "rome")
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\)"):
        grace.edit("the capital", 9)


def test_texts_that_hold_nothing_are_refused(tokenizer):
    _, grace = attach("llama", tokenizer)
    for prompt in ("", "   "):
        with pytest.raises(ValueError, match="the prompt must have at least one token"):
            grace.edit(prompt, "rome")
    for target in ("", "  "):
        with pytest.raises(ValueError, match="the target must have at least one token"):
            grace.edit("the capital", target)
    assert grace.edits() == []
    _, plain = attach("llama", None)
    with pytest.raises(ValueError, match=r"needs a tokenizer: attach\(\.\.\., tokenizer=\.\.\.\)"):
        plain.edit("the capital", "rome")
