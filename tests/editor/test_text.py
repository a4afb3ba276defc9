"""Edits by text and by chat, with a word-level tokenizer made on the spot."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import models
import numpy as np
import pytest
import torch
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


class Series:
    """A column of a table, as pandas has it: not a sequence, and yet a list of texts."""

    def __init__(self, *values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def tolist(self):
        return list(self.values)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (["the capital"], ValueError, "got a list of 1 text; make one call for each, or give edit"),
        (("the", "capital"), ValueError, "got a tuple of 2 texts; make one call for each"),
        (np.array(["the", "capital"]), ValueError, "got a ndarray of 2 texts; make one call"),
        (Series("the", "capital", "of"), ValueError, "got a Series of 3 texts; make one call"),
        ({"the", "capital"}, ValueError, "got a set of 2 texts; make one call"),
        ([], ValueError, "got a list of 0 texts"),
        ([["the"], 3], ValueError, "got a list of 2 things"),
        ((word for word in ("the", "capital")), TypeError, "or chat messages, got generator"),
        (None, TypeError, "or chat messages, got NoneType"),
        (math.nan, TypeError, "or chat messages, got float"),
        (b"the capital", TypeError, "must be a text, got bytes: decode it first"),
        ([{"content": "the"}], ValueError, r"chat message 0 must have a role, got \['content'\]"),
        (
            [{"role": "user"}],
            ValueError,
            "chat message 0 must have a content, got {'role': 'user'}",
        ),
        (
            [{"role": "user", "content": "the \ud800"}],
            ValueError,
            r"half of a pair of surrogates, '\\ud800', in 'the \\ud800'",
        ),
        ("the \ud800", ValueError, r"half of a pair of surrogates, '\\ud800', in 'the \\ud800'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_prompt_is_refused_as_what_it_is(tokenizer, prompt, error, message):
    _, grace = attach("llama", tokenizer)
    for ask in (lambda given: grace.edit(given, "rome"), grace.explain):
        with pytest.raises(error, match=message):
            ask(prompt)
        if not isinstance(prompt, list | tuple | str | set | np.ndarray | Series):
            break  # a generator is used up


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (None, ValueError, r"an edit by text needs a target: edit\(prompt, target\)"),
        (math.nan, ValueError, "the target must be a text or a number, got nan"),
        (np.float32("inf"), ValueError, "the target must be a text or a number, got inf"),
        (["rome"], TypeError, r"the target must be one text or number, got \['rome'\]"),
        (np.array(["rome", "paris"]), TypeError, "the target must be one text or number"),
        (True, TypeError, "the target must be one text or number, got True"),
    ],
    ids=str,
)
def test_what_is_no_target_is_refused_as_what_it_is(tokenizer, target, error, message):
    _, grace = attach("llama", tokenizer)
    with pytest.raises(error, match=message):
        grace.edit("the capital", target)
    assert grace.edits() == []


def test_texts_and_numbers_of_numpy_are_texts_and_numbers(tokenizer):
    _, grace = attach("llama", tokenizer, store_text=True)
    made = grace.edit(np.array("the capital of france is"), np.str_("rome"))
    assert made.text == ("the capital of france is", "rome")
    assert [type(text) for text in made.text] == [str, str]
    _, classes = attach("bert", tokenizer)
    assert classes.edit("the capital of france", np.int64(2)).correct
    assert classes.edit("the capital of rome", torch.tensor(1)).correct


def test_what_stands_between_prompt_and_target_can_be_said(tokenizer):
    spoken = []

    class Listening:
        def __call__(self, text, **how):
            spoken.append(text)
            return tokenizer(text, **how)

    _, grace = attach("llama", Listening())
    for joint, whole in ((None, "the capital rome"), ("", "the capitalrome"), (" :", None)):
        grace.edit("the capital", "rome", joint=joint)
        assert (whole or "the capital :rome") in spoken
    with pytest.raises(ValueError, match="give no target"):
        grace.edit({"input_ids": torch.tensor([[4, 5]])}, joint="")


def test_a_chat_is_answered_as_its_template_writes_answers(tokenizer):
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }} :"
        "{% else %}{{ ' ' + message.content }}{% endif %}{% endfor %}"
    )
    spoken = []

    class Listening:
        chat_template = ""

        def __call__(self, text, **how):
            spoken.append(text)
            return tokenizer(text, **how)

        def apply_chat_template(self, messages, **how):
            return tokenizer.apply_chat_template(messages, **how)

    _, grace = attach("llama", Listening())
    grace.edit([{"role": "user", "content": "the capital"}], "rome")
    assert "the capital : rome" in spoken
    tokenizer.chat_template = None
    _, grace = attach("llama", tokenizer)
    with pytest.raises(ValueError, match="need a tokenizer with a chat template, and this one has"):
        grace.edit([{"role": "user", "content": "the capital"}], "rome")


def test_a_prompt_that_is_too_long_says_by_how_much(tokenizer):
    model, grace = attach("gpt2", tokenizer)
    most = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"takes at most {most} tokens, got {most + 1} with the"):
        grace.edit("the " * most, "rome")
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 100\), got 100"):
        grace.explain({"input_ids": torch.tensor([[5, 100, 7]])})
    assert grace.edits() == []


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


@pytest.mark.parametrize(
    "given", ["1", " 1 ", "1.0", 1.0, Decimal(1), Fraction(2, 2), np.longdouble(1)], ids=repr
)
def test_a_class_is_known_by_its_number_however_that_is_written(tokenizer, given):
    _, grace = attach("bert", tokenizer, iterations=0)
    assert grace.edit("the capital of france", given).label.tolist() == [1]
    for odd in ("9", 2**70, "1.5", 1.5, "-1", Decimal("nan")):
        with pytest.raises(ValueError, match=r"must be"):
            grace.edit("the capital", odd)


def test_what_a_chat_template_refuses_is_told_in_words(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    _, grace = attach("llama", tokenizer)
    with pytest.raises(ValueError, match=r"chat template refuses these messages: .*must alternate"):
        grace.edit([{"role": "user", "content": "the capital"}], "rome")
    with pytest.raises(TypeError, match="joint must be a text or None, got 5"):
        grace.edit("the capital", "rome", joint=5)
    with pytest.raises(ValueError, match="half of a pair of surrogates"):
        grace.edit("the capital", "rome", joint="\ud800")
