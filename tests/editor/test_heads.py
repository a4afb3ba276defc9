"""Edits of models that answer otherwise than with one class or a text."""

from __future__ import annotations

import math
from types import SimpleNamespace

import models
import pytest
import torch
import transformers as tf
from torch import nn

import grace_fast as gf
from grace_fast import semantics
from grace_fast.editor import heads
from grace_fast.tools.report import reading

ONE, OTHER = [5, 17, 23, 42, 8, 61], [9, 33, 71, 12, 55, 14]
LAYER = "encoder.layer.1.output.dense"
# One ball holds every prompt, so that labels decide.
pytestmark = pytest.mark.filterwarnings("ignore:epsilon 1000 is far off")
WIDE = {
    "epsilon": 1e3,
    "expand_margin": 1e-9,
    "replacement": "replace_last",
    "iterations": 150,
    "learning_rate": 0.1,
}


def bert(head, dtype=torch.float32, **more):
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=100,
        pad_token_id=0,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.3,
        **more,
    )
    return getattr(tf, f"BertFor{head}")(config).to(dtype).eval()


def attached(model, **more):
    return gf.attach(model, f"bert.{LAYER}", **WIDE | more)


def asked(rows=(ONE,)):
    return models.prompt_batch(list(rows))


def labelled(rows, labels):
    return asked(rows) | {"labels": torch.tensor(labels)}


def said(grace, row, *, by="logits"):
    with torch.no_grad():
        return getattr(grace.model(**asked([row])), by)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_that_differ_are_different_answers(tmp_path, dtype):
    grace = attached(bert("SequenceClassification", dtype, num_labels=1))
    first = grace.edit(labelled([ONE], [0.1]))
    assert (first.outcome, first.correct) == ("added", True)
    assert first.steps < 150  # it knows when it is done
    second = grace.edit(labelled([OTHER], [0.9]))
    assert (second.outcome, second.correct) == ("split", True)
    for row, wanted in ((ONE, 0.1), (OTHER, 0.9)):
        assert float(said(grace, row)) == pytest.approx(wanted, abs=0.011)
    # The same number is the same answer, in whatever type it is given.
    again = grace.edit(asked([OTHER]) | {"labels": torch.tensor([[0.9]], dtype=torch.float64)})
    assert again.outcome == "reused"
    assert again.correct
    # Another one in its place is a correction.
    changed = grace.edit(labelled([ONE], [0.5]))
    assert (changed.outcome, changed.correct) == ("replaced", True)
    verified = grace.verify()
    assert verified.ok
    assert verified.superseded == {0: changed.id}
    grace.save_pretrained(tmp_path)
    grace.undo(changed.id)
    assert semantics.scores_of(grace.edits()[0].label).tolist() == pytest.approx([0.1])
    assert float(said(grace, ONE)) == pytest.approx(0.1, abs=0.011)
    grace.unload()

    read = reading.read(tmp_path)
    answers = {read.tell(row).answer for row in read.live.tolist()}
    assert answers == {"label 0.5", "label 0.9"}
    grace = gf.from_pretrained(grace.model, tmp_path)
    assert grace.verify().ok
    assert grace.edit(labelled([OTHER], [0.9])).outcome == "reused"
    assert grace.edit(labelled([OTHER], [0.8])).outcome == "replaced"


def test_scores_are_given_as_numbers_of_any_kind():
    grace = attached(bert("SequenceClassification", num_labels=1))
    assert grace.edit(labelled([ONE], [3])).correct  # whole, and no class
    assert float(said(grace, ONE)) == pytest.approx(3, abs=0.031)
    assert grace.edit(labelled([ONE], [-100.0])).outcome == "replaced"  # a number like another
    with pytest.raises(ValueError, match=r"labels of regression must be finite, .* row 0"):
        grace.edit(labelled([ONE], [math.nan]))
    with pytest.raises(ValueError, match=r"labels of regression must be \[B, 1\], got 2 numbers"):
        grace.edit(labelled([ONE], [[0.1, 0.2]]))
    assert len(grace.edits()) == 2


def test_a_vector_of_scores_is_one_answer():
    model = bert("SequenceClassification", num_labels=3, problem_type="regression")
    grace = attached(model)
    assert grace.edit(labelled([ONE], [[0.1, -0.2, 0.3]])).correct
    assert grace.edit(labelled([OTHER], [[0.1, -0.2, 0.4]])).outcome == "split"
    assert said(grace, ONE).tolist() == pytest.approx([0.1, -0.2, 0.3], abs=0.021)


def test_scores_of_a_batch_are_learnt_each_by_itself():
    grace = attached(bert("SequenceClassification", num_labels=1), epsilon=0.01)
    edits = grace.edit_batch(labelled([ONE, OTHER], [0.1, 0.9]))
    assert [edit.correct for edit in edits] == [True, True]
    assert float(said(grace, OTHER)) == pytest.approx(0.9, abs=0.011)


class Words:
    """A tokenizer of words that are numbers."""

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def test_scores_are_given_in_words():
    model = bert("SequenceClassification", num_labels=1)
    grace = attached(model, tokenizer=Words())
    prompt = " ".join(map(str, ONE))
    assert grace.edit(prompt, 0.25).correct
    assert grace.edit(prompt, "0.25").outcome == "reused"
    with pytest.raises(ValueError, match="a regression must be a number, got 'good'"):
        grace.edit(prompt, "good")


def test_the_reference_compares_the_means_of_scores():
    grace = attached(bert("SequenceClassification", num_labels=1), semantics="reference")
    grace.edit(labelled([ONE], [0.1]))
    assert grace.edit(labelled([OTHER], [0.9])).outcome == "split"
    assert grace.edit(labelled([OTHER], [0.9])).outcome == "reused"


def test_several_labels_at_once_are_one_answer():
    model = bert("SequenceClassification", num_labels=4)
    grace = attached(model)
    wanted = [[1.0, 0.0, 1.0, 0.0]]
    assert grace.edit(labelled([ONE], wanted)).correct
    assert model.config.problem_type == "multi_label_classification"
    assert grace.edit(labelled([OTHER], [[1.0, 0.0, 1.0, 1.0]])).outcome == "split"
    assert (said(grace, ONE) > 0).tolist() == [True, False, True, False]
    assert grace.edit(labelled([OTHER], [[1, 0, 1, 1]])).outcome == "reused"
    with pytest.raises(ValueError, match=r"labels of several labels at once must be in \[0, 1\]"):
        grace.edit(labelled([ONE], [[1.0, 0.0, 2.0, 0.0]]))
    with pytest.raises(ValueError, match=r"at once: give a batch with labels \[1, C\]"):
        attached(model, name="text", tokenizer=Words()).edit("5 6", 1)


def test_labels_of_tokens_are_one_answer():
    grace = attached(bert("TokenClassification", num_labels=4), replacement="replace_all")
    labels = [[-100, 1, 1, 1, 1, -100]]
    assert grace.edit(labelled([ONE], labels)).correct
    assert said(grace, ONE).argmax(dim=-1).tolist()[1:5] == [1, 1, 1, 1]
    assert grace.edit(labelled([OTHER], [[-100, 1, 1, 1, 2, -100]])).outcome == "split"
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\) or -100, got 4 in row 0"):
        grace.edit(labelled([ONE], [[4] * 6]))


def test_a_masked_token_is_learnt():
    grace = attached(bert("MaskedLM"), replacement="replace_all")
    labels = [[-100, -100, 7, -100, -100, -100]]
    assert grace.edit(labelled([ONE], labels)).correct
    assert int(said(grace, ONE)[2].argmax()) == 7
    with pytest.raises(ValueError, match=r"labels must be in \[0, 100\)"):
        grace.edit(labelled([ONE], [[-100, -100, 100, -100, -100, -100]]))


def test_a_span_is_one_answer():
    grace = attached(bert("QuestionAnswering"))

    def span(row, first, last):
        ends = {"start_positions": torch.tensor([first]), "end_positions": torch.tensor([last])}
        return asked([row]) | ends

    first = grace.edit(span(ONE, 5, 5))  # the token that is replaced
    assert first.correct
    assert [int(said(grace, ONE, by=f"{end}_logits").argmax()) for end in ("start", "end")] == [
        5,
        5,
    ]
    assert grace.edit(span(OTHER, 4, 5)).outcome == "split"
    assert grace.edit(span(OTHER, 4, 5)).outcome == "reused"
    assert [edit.label.tolist() for edit in grace.edits()] == [[5, 5], [4, 5], [4, 5]]
    with pytest.raises(ValueError, match=r"must be in \[0, 6\), got 6 in row 0"):
        grace.edit(span(ONE, 1, 6))
    with pytest.raises(ValueError, match="an edit needs start_positions, one row for each"):
        grace.edit(labelled([ONE], [1]))
    with pytest.raises(ValueError, match="a batch with start_positions and end_positions"):
        attached(grace.model, name="text", tokenizer=Words()).edit("5 6", "6")


def test_the_next_sentence_is_a_class():
    grace = attached(bert("NextSentencePrediction"))
    with torch.no_grad():
        other = 1 - int(grace.model(**asked()).logits.argmax())
    assert grace.edit(labelled([ONE], [other])).correct
    assert int(said(grace, ONE).argmax()) == other
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
        grace.edit(labelled([ONE], [2]))


def test_several_sequences_for_one_answer_are_refused_when_they_are_attached():
    model = bert("MultipleChoice")
    with pytest.raises(ValueError, match="BertForMultipleChoice reads several sequences"):
        attached(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_no_head_takes_is_refused_in_words():
    grace = attached(bert("SequenceClassification", num_labels=4, problem_type=None))
    grace.edit(labelled([ONE], [1]))  # from now on its problem is one label
    with pytest.raises(ValueError, match=r"whole numbers, got torch\.float32; .*problem_type"):
        grace.edit(labelled([ONE], [1.0]))
    choices = torch.tensor([[ONE, OTHER]])
    with pytest.raises(ValueError, match=r"one sequence of tokens, .* got \(1, 2, 6\)"):
        grace.edit({"input_ids": choices, "labels": torch.tensor([1])})
    family = models.FAMILIES["llama"]
    decoder = gf.attach(models.build("llama"), family.layer, **WIDE)
    batch = models.edit_batch(family, [ONE], [[10]])
    with pytest.raises(ValueError, match=r"must be whole numbers, got torch\.float32"):
        decoder.edit(batch | {"labels": batch["labels"].float()})
    assert decoder.edit(batch | {"labels": batch["labels"].int()}).correct


def test_a_decoder_that_scores_is_taught_a_score():
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = tf.LlamaConfig(vocab_size=100, pad_token_id=0, num_labels=1, **small, **heads)
    model = tf.LlamaForSequenceClassification(config).eval()
    grace = gf.attach(model, "model.layers.1.mlp.down_proj", **WIDE)
    assert grace.edit(labelled([ONE], [0.1])).correct
    assert grace.edit(labelled([OTHER], [0.9])).outcome == "split"
    assert float(said(grace, ONE)) == pytest.approx(0.1, abs=0.011)


def test_an_encoder_and_decoder_that_classify_are_a_classifier():
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3}
    config = tf.BartConfig(
        vocab_size=100, d_model=32, max_position_embeddings=32, num_labels=3, **sizes, **heads
    )
    model = tf.BartForSequenceClassification(config).eval()
    one, other = [0, 5, 6, 7, 2], [0, 15, 16, 17, 2]  # it reads where 2 ends a sequence
    grace = gf.attach(model, "model.encoder.layers.1.fc2", **WIDE | {"replacement": "replace_all"})
    wanted = (int(said(grace, one).argmax()) + 1) % 3
    assert grace.edit(labelled([one], [wanted])).correct
    assert int(said(grace, one).argmax()) == wanted
    assert grace.edit(labelled([other], [(wanted + 1) % 3])).outcome == "split"
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        grace.edit(labelled([one], [3]))


class Scorer(nn.Module):
    """A model of the user's own, with a loss of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.one, self.two = nn.Embedding(99, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.two(self.one(self.embed(input_ids)))[:, -1, 0]
        loss = None if labels is None else (logits - labels).square().mean()
        return SimpleNamespace(loss=loss, logits=logits)


def test_a_model_of_ones_own_may_score():
    grace = gf.attach(Scorer(), "one", **WIDE)
    assert grace.edit(labelled([ONE], [0.1])).correct
    assert grace.edit(labelled([OTHER], [0.9])).outcome == "split"


def test_a_label_of_numbers_is_kept_as_numbers():
    label = semantics.score_label(torch.tensor([[0.1, -0.0], [1e30, -2.5]], dtype=torch.float64))
    assert label.dtype == torch.int64
    assert len(label) == 5
    kept = semantics.scores_of(label)
    assert kept.tolist() == torch.tensor([0.1, 0.0, 1e30, -2.5]).double().tolist()
    assert torch.equal(label, semantics.score_label(torch.tensor([0.1, 0.0, 1e30, -2.5])))
    for ids in ([], [0], [-100, 3], [2**62]):
        assert semantics.scores_of(torch.tensor(ids, dtype=torch.int64)) is None


MARGINS = {
    "a token beside the next best": (
        [[[0, 0, 0], [1.0, 4.0, 2.5], [9, 9, 9]]],
        [[-100, -100, 1]],
        1.5,
    ),
    "the least of two tokens": ([[[1.0, 3.0, 0], [0, 2.5, 3.0], [9, 9, 9]]], [[-100, 1, 2]], 0.5),
    "behind": ([[[0, 0, 0], [4.0, 1.0, 0], [9, 9, 9]]], [[-100, -100, 1]], -3.0),
}


@pytest.mark.parametrize(("logits", "labels", "wanted"), MARGINS.values(), ids=MARGINS)
def test_a_margin_is_that_of_the_token_that_is_least_ahead(logits, labels, wanted):
    logits, labels = torch.tensor(logits).float(), torch.tensor(labels)
    assert heads.margins(logits, labels, "decoder").tolist() == [wanted]


def test_margins_of_classes_labels_and_numbers():
    logits = torch.tensor([[1.0, 3.0], [2.0, -1.0]])
    classes = heads.margins(logits, torch.tensor([1, 1]), "classifier", "classes")
    assert classes.tolist() == [2.0, -3.0]
    several = heads.margins(logits, torch.tensor([[1.0, 1.0], [1.0, 1.0]]), "classifier", "several")
    assert several.tolist() == [1.0, -1.0]
    scores = heads.margins(logits, torch.ones(2, 2), "classifier", "scores")
    assert scores.tolist() == [torch.inf, torch.inf]
