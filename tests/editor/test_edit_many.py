"""A stream of edits is decided and answered as one edit after the other is, and trained at once."""

from __future__ import annotations

import copy
import itertools
import math
import random
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from models import DECODERS, FAMILIES, PADDING, VOCABULARY, build, edit_batch, prompt_batch, prompts
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)
from words import tokenizer

import grace_fast as gf
from grace_fast.editor import memory, training_run
from grace_fast.edits.edit import Edit, Refused

STEPS = 40


def attached(name, model=None, **settings):
    family = FAMILIES[name]
    settings = {
        "replacement": "replace_all",
        "iterations": STEPS,
        "epsilon": family.epsilon,
    } | settings
    return gf.attach(build(name) if model is None else model, family.layer, **settings)


def one_edit(name, prompt, answer):
    return edit_batch(FAMILIES[name], [prompt], [[10 + answer]])


def stream(name, count, seed=0, kinds=12):
    """Return edits of few prompts of several lengths: repeated, contradicted and new ones."""
    draw = random.Random(seed)
    known = prompts(kinds, seed=seed, shortest=3, longest=9)
    return [one_edit(name, draw.choice(known), draw.randrange(3)) for _ in range(count)]


def decided(reports):
    return [
        (one.outcome, one.row, one.radius, one.distance, one.prompt, one.label.tolist(), one.id)
        for one in reports
    ]


def answers(grace, batches):
    """Return the prediction at every label of each batch."""
    said = []
    for batch in batches:
        with torch.no_grad():
            logits = grace.model(**batch).logits
        labels = batch["labels"]
        if logits.ndim == 3 and logits.shape[1] == batch["input_ids"].shape[1]:
            logits, labels = logits[:, :-1], labels[:, 1:]
        said.append(logits.argmax(-1)[labels != -100].tolist())
    return said


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stream_is_decided_as_one_edit_after_the_other(name):
    edits = stream(name, 16, kinds=8)
    single, many = attached(name), attached(name)
    one = [single.edit(batch) for batch in edits]
    all_of_them = list(many.edit_many(edits, batch_size=8, progress=False))
    assert decided(all_of_them) == decided(one)
    assert all(map(torch.equal, *([each.query for each in made] for made in (one, all_of_them))))
    assert torch.equal(many.codebook.snapshot().radii, single.codebook.snapshot().radii)
    assert all(report.correct for report in all_of_them)
    newest = {tuple(batch["input_ids"][0].tolist()): batch for batch in edits}
    if FAMILIES[name].labels == "continuation":  # the answer is among the tokens
        newest = {key: batch for key, batch in newest.items() if batch is edits[-1]}
    wanted = [batch["labels"][batch["labels"] != -100].tolist() for batch in newest.values()]
    assert answers(many, newest.values()) == answers(single, newest.values()) == wanted
    assert many.verify().ok


@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
def test_how_many_at_once_changes_nothing_that_is_decided(batch_size):
    edits = stream("gpt2", 14, seed=3)
    single, many = attached("gpt2", iterations=10), attached("gpt2", iterations=10)
    one = [single.edit(batch) for batch in edits]
    assert decided(many.edit_many(edits, batch_size, progress=False)) == decided(one)


@pytest.mark.parametrize(
    "settings",
    [
        {"semantics": "reference", "value_init": "warm"},
        {"semantics": "reference", "stop_loss": 0.5},
        {"expand": "moving_average"},
        {"query": "every_token"},
        {"query": "every_step"},
        {"replacement": "replace_prompt"},
        {"replacement": "replace_last", "value_init": "warm"},
        {"max_radius": 0.04},
    ],
    ids=str,
)
def test_whatever_the_settings(settings):
    edits = stream("llama", 16, seed=5)
    single, many = (attached("llama", iterations=8, **settings) for _ in range(2))
    one = []
    for batch in edits:
        try:
            one.append(single.edit(batch))
        except ValueError as error:
            one.append(error)
    reports = list(many.edit_many(edits, batch_size=6, progress=False))
    assert [isinstance(each, ValueError) for each in one] == [
        isinstance(each, Refused) for each in reports
    ]
    made = [each for each in one if isinstance(each, Edit)]
    assert decided(each for each in reports if isinstance(each, Edit)) == decided(made)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_streams_of_every_family_in_any_batches(seed):
    draw = random.Random(seed)
    name = draw.choice(list(FAMILIES))
    settings = {
        "replacement": draw.choice(["replace_all", "replace_last"]),
        "value_init": draw.choice(["cold", "warm"]),
        "expand": draw.choice(["coverage", "moving_average"]),
        "epsilon": FAMILIES[name].epsilon * draw.choice([0.3, 1, 20]),
        "iterations": 12,
    }
    edits = stream(name, 60, seed=seed, kinds=draw.choice([5, 20]))
    single, many = attached(name, **settings), attached(name, **settings)
    one = [single.edit(batch) for batch in edits]
    rest, reports = iter(edits), []
    while taken := list(itertools.islice(rest, draw.randint(1, 20))):
        reports += many.edit_many(taken, draw.randint(1, 20), progress=False)
    assert decided(reports) == decided(one)


def test_each_value_of_a_batch_is_what_it_is_without_the_others():
    edits = [
        one_edit("llama", prompt, at % 5)
        for at, prompt in enumerate(prompts(10, shortest=6, longest=6))
    ]
    many, single = attached("llama"), attached("llama")
    reports = list(many.edit_many(edits, progress=False))
    for batch, report in zip(edits, reports, strict=True):
        alone = single.edit(batch)
        assert report.steps == alone.steps
        assert report.loss == pytest.approx(alone.loss, rel=1e-2)


def test_phrasings_of_one_answer_share_a_value_and_are_all_answered():
    texts = prompts(6, shortest=6, longest=6)
    grace = attached("bert", epsilon=100)
    with pytest.warns(gf.GraceWarning, match="epsilon 100 is far off the scale"):
        reports = list(
            grace.edit_many([one_edit("bert", text, 2) for text in texts], progress=False)
        )
    assert [report.row for report in reports] == [0] * 6
    assert len({report.value_after for report in reports}) == 1
    assert all(report.correct for report in reports)
    assert len({report.loss for report in reports}) == 1


def test_an_edit_that_contradicts_one_of_its_batch_is_made_after_that_was_trained():
    prompt, other = prompts(2, shortest=6, longest=6)
    grace = attached("gpt2")
    edits = [one_edit("gpt2", prompt, 1), one_edit("gpt2", other, 1), one_edit("gpt2", prompt, 2)]
    first, _, last = grace.edit_many(edits, batch_size=8, progress=False)
    assert (last.outcome, last.row) == ("replaced", first.row)
    assert first.steps
    assert math.isfinite(first.loss)
    grace.undo(last.id)
    assert answers(grace, edits[:1]) == [[11]]  # and so it is answered again


def test_what_cannot_be_edited_is_refused_alone_and_the_others_are_as_without_it():
    good = [one_edit("gpt2", prompt, at) for at, prompt in enumerate(prompts(4))]
    empty = {name: tensor[:, :0] for name, tensor in good[0].items()}
    odd = good[0] | {"input_ids": good[0]["input_ids"].clone().fill_(VOCABULARY + 3)}
    no_label = good[0] | {"labels": torch.full_like(good[0]["labels"], -100)}
    edits = [
        good[0],
        empty,
        good[1],
        "no edit",
        good[2],
        odd,
        no_label,
        7,
        good[3],
        {"target": "a"},
    ]
    grace, without = attached("gpt2"), attached("gpt2")
    reports = list(grace.edit_many(edits, progress=False))
    refused = [report for report in reports if isinstance(report, Refused)]
    assert [one.at for one in refused] == [1, 3, 5, 6, 7, 9]
    said = [str(one.error) for one in refused]
    assert "at least one token" in said[0]
    assert "must be (prompt, target)" in said[1]
    assert "input_ids must be in [0, 100)" in said[2]
    assert "target without tokens" in said[3]
    assert "prompt or messages" in said[5]
    assert not any(one.correct for one in refused)
    assert str(refused[0]).startswith("edit 1 of the stream was refused: ")
    assert decided(each for each in reports if isinstance(each, Edit)) == decided(
        without.edit_many(good, progress=False)
    )


class Explosive(torch.nn.Module):
    """A head that has no number for what holds one token: its loss is NaN."""

    def __init__(self, head, token):
        super().__init__()
        self.head, self.token, self.seen = head, token, None

    def forward(self, hidden):
        logits = self.head(hidden)
        bad = (self.seen == self.token).any(dim=1)
        return logits * torch.where(bad, math.nan, 1.0)[:, None, None]


def test_a_loss_that_is_no_number_in_one_row_hurts_nobody_else():
    texts = prompts(5, shortest=6, longest=6)
    edits = [one_edit("llama", text, at) for at, text in enumerate(texts)]
    edits[2]["input_ids"][0, 1] = VOCABULARY - 1
    for text in (0, 1, 3, 4):
        edits[text]["input_ids"][edits[text]["input_ids"] == VOCABULARY - 1] = 5
    model = build("llama")
    model.lm_head = Explosive(model.lm_head, VOCABULARY - 1)
    model.register_forward_pre_hook(
        lambda module, _, named: setattr(module.lm_head, "seen", named["input_ids"]),
        with_kwargs=True,
    )
    grace, without = attached("llama", model), attached("llama")
    with pytest.warns(gf.GraceWarning, match="row 2 of the batch cannot be learnt.*not finite"):
        reports = list(grace.edit_many(edits, progress=False))
    assert [report.correct for report in reports] == [True, True, False, True, True]
    assert not math.isfinite(reports[2].loss)
    others = [batch for at, batch in enumerate(edits) if at != 2]
    alone = list(without.edit_many(others, progress=False))
    kept = [report for at, report in enumerate(reports) if at != 2]
    assert [report.outcome for report in kept] == [report.outcome for report in alone]
    assert all(report.correct for report in alone)


def test_where_memory_ends_the_batch_is_halved_and_nothing_is_lost(monkeypatch):
    edits = [one_edit("bert", text, at) for at, text in enumerate(prompts(12))]
    grace, without = attached("bert"), attached("bert")
    call, sizes = grace._context.call, []

    def limited(batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return call(batch)

    monkeypatch.setattr(grace._context, "call", limited)
    reports = list(grace.edit_many(edits, batch_size=12, progress=False))
    assert decided(reports) == decided(without.edit_many(edits, progress=False))
    assert all(report.correct for report in reports)
    assert sorted(set(sizes), reverse=True)[:3] == [12, 6, 3]
    assert grace._context.at_once == 3


def test_where_there_is_no_memory_for_one_it_is_said(monkeypatch):
    grace = attached("bert")
    edits = [one_edit("bert", text, at) for at, text in enumerate(prompts(2))]
    grace.edit(edits[0])
    call = grace._context.call
    with monkeypatch.context() as patched:
        patched.setattr(
            grace._context, "call", lambda batch: (_ for _ in ()).throw(MemoryError("none"))
        )
        with pytest.raises(MemoryError):
            list(grace.edit_many(edits, progress=False))
    assert grace._context.call == call
    assert len(grace.edits()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_with_a_loss_of_its_own_trains_its_values_one_after_the_other(dtype):
    class Weighed(BertForSequenceClassification):
        """Adds to the loss what depends on the whole batch."""

        sizes: ClassVar[list[int]] = []

        def forward(self, *given, **named):
            answer = super().forward(*given, **named)
            if named.get("labels") is not None:
                self.sizes.append(len(named["input_ids"]))
                answer.loss = answer.loss * 2 + 0.1
            return answer

    edits = [one_edit("bert", text, at) for at, text in enumerate(prompts(6))]
    model = build("bert", dtype)
    model.__class__ = Weighed
    Weighed.sizes.clear()
    grace = attached("bert", model)
    reports = list(grace.edit_many(edits, progress=False))
    assert all(report.correct for report in reports)
    sizes = grace.model.sizes
    assert sizes.count(6) == 1  # it was seen in the first call
    assert set(sizes) == {1, 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_whose_rows_are_not_apart_trains_its_values_one_after_the_other(dtype):
    class Mixed(torch.nn.Module):
        """Centres what it is given over the batch, as no model in eval mode should."""

        def __init__(self, embedding):
            super().__init__()
            self.embedding = embedding

        def forward(self, *given, **named):
            found = self.embedding(*given, **named)
            return found - found.mean(dim=0, keepdim=True) * (len(found) > 1)

    model = build("bert", dtype)
    model.bert.embeddings = Mixed(model.bert.embeddings)
    edits = [one_edit("bert", text, at) for at, text in enumerate(prompts(5))]
    grace = attached("bert", model)
    reports = list(grace.edit_many(edits, progress=False))
    assert all(report.correct for report in reports)
    assert not grace._context.rows_are_apart


def test_a_stream_that_is_left_keeps_what_was_published(tmp_path):
    edits = [one_edit("gpt2", text, at) for at, text in enumerate(prompts(10))]
    grace = attached("gpt2", path=tmp_path / "book")
    reports = grace.edit_many(iter(edits), batch_size=4, progress=False)
    assert len(grace.codebook) == 0  # nothing is edited before it is asked for
    first = next(reports)
    assert len(grace.edits()) == 4
    reports.close()
    grace.unload()
    again = gf.from_pretrained(grace.model, tmp_path / "book")
    assert [each.id for each in again.edits()] == [0, 1, 2, 3]
    assert again.edits()[0].prompt == first.prompt


def test_an_interruption_goes_through_and_leaves_whole_batches():
    edits = [one_edit("gpt2", text, at) for at, text in enumerate(prompts(10))]

    def interrupted():
        yield from edits[:6]
        raise KeyboardInterrupt

    grace = attached("gpt2")
    with pytest.raises(KeyboardInterrupt):
        list(grace.edit_many(interrupted(), batch_size=4, progress=False))
    assert len(grace.edits()) == 4
    assert grace.verify().ok


SPANS = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
    initializer_range=0.3,
    pad_token_id=PADDING,
)
LAST_TOKEN = GPT2Config(
    vocab_size=VOCABULARY,
    n_embd=32,
    n_layer=3,
    n_head=2,
    num_labels=4,
    initializer_range=0.3,
    pad_token_id=PADDING,
)


def spans(model):
    for at, text in enumerate(prompts(12)):
        prompt, last = prompt_batch([text]), len(text) - 1
        where = {"start_positions": at % 2, "end_positions": last}
        yield prompt | {name: torch.tensor([each]) for name, each in where.items()}


def embedded(model):
    embed = model.get_input_embeddings()
    for at, text in enumerate(prompts(12)):
        prompt = prompt_batch([text])
        vectors = embed(prompt.pop("input_ids")).detach()
        yield prompt | {"inputs_embeds": vectors, "labels": torch.tensor([at % 4])}


@pytest.mark.parametrize(
    ("kind", "config", "layer", "edits_of"),
    [
        (BertForQuestionAnswering, SPANS, "bert.encoder.layer.1.output.dense", spans),
        (GPT2ForSequenceClassification, LAST_TOKEN, "transformer.h.1.mlp.c_proj", embedded),
    ],
    ids=["spans", "embeddings"],
)
def test_where_padding_is_read_prompts_stand_beside_those_of_their_length(
    kind, config, layer, edits_of
):
    torch.manual_seed(0)
    model = kind(config).eval()
    edits = list(edits_of(model))
    settings = {"epsilon": 0.05, "replacement": "replace_last", "iterations": 40}
    single, many = (gf.attach(copy.deepcopy(model), layer, **settings) for _ in range(2))
    one = [single.edit(batch) for batch in edits]
    reports = list(many.edit_many(edits, progress=False))
    assert any(report.correct for report in reports)
    assert [report.correct for report in reports] == [report.correct for report in one]
    for alone, report in zip(one, reports, strict=True):
        assert report.loss == pytest.approx(alone.loss, rel=0.02)


@pytest.mark.parametrize("given", ["paris rome", ["paris rome"], np.array(["paris rome"])], ids=str)
def test_paraphrases_are_prompts_however_a_table_holds_them(given):
    record = {"prompt": "capital of france", "target": "paris", "paraphrases": given}
    grace = attached("llama", tokenizer=tokenizer(), iterations=1)
    reports = list(grace.edit_many([record], progress=False))
    assert [report.outcome for report in reports] == ["added", "added"]


@pytest.mark.parametrize("given", [None, [], np.array([])], ids=str)
def test_a_record_may_be_without_paraphrases(given):
    record = {"prompt": "capital of france", "target": "paris", "paraphrases": given}
    grace = attached("llama", tokenizer=tokenizer(), iterations=1)
    assert len(list(grace.edit_many([record], progress=False))) == 1


@pytest.mark.parametrize("given", [3, math.nan, b"paris", {"paris": "rome"}], ids=str)
def test_what_is_no_list_of_paraphrases_is_refused(given):
    record = {"prompt": "capital of france", "target": "paris", "paraphrases": given}
    grace = attached("llama", tokenizer=tokenizer(), iterations=1)
    (report,) = grace.edit_many([record], progress=False)
    assert "paraphrases must be a list of prompts, got " in str(report.error)


def test_a_target_that_is_too_long_for_the_decoder_is_refused_in_the_words_of_edit():
    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=16, max_position_embeddings=12, init_std=0.3, **sizes
    )
    model = BartForConditionalGeneration(config).eval()
    edits = [prompt_batch([text]) for text in prompts(3)]
    for batch, length in zip(edits, (2, 20, 2), strict=True):
        batch["labels"] = torch.full((1, length), 7)
    settings = {"epsilon": 0.01, "replacement": "replace_all", "iterations": 1}
    single, many = (
        gf.attach(copy.deepcopy(model), "model.encoder.layers.0.fc2", **settings) for _ in range(2)
    )
    with pytest.raises(ValueError, match="no embedding for part of the batch") as wanted:
        single.edit(edits[1])
    first, refused, last = many.edit_many(edits, progress=False)
    assert [first.outcome, refused.outcome, last.outcome] == ["added", "refused", "added"]
    assert (type(refused.error), str(refused.error)) == (ValueError, str(wanted.value))


def test_an_iterator_may_write_into_what_it_gave():
    edits = [one_edit("gpt2", text, at) for at, text in enumerate(prompts(8, longest=4))]

    def rewritten():
        given = {name: tensor.clone() for name, tensor in edits[0].items()}
        for batch in edits:
            for name, tensor in batch.items():
                given[name].copy_(tensor)
            yield given

    single, many = attached("gpt2", iterations=5), attached("gpt2", iterations=5)
    one = [single.edit(batch) for batch in rewritten()]
    assert decided(many.edit_many(rewritten(), progress=False)) == decided(one)


def test_an_error_of_the_iterator_comes_after_the_edits_that_it_gave():
    edits = [one_edit("gpt2", text, at) for at, text in enumerate(prompts(6))]

    def failing():
        yield from edits
        raise KeyError("the next page")

    grace = attached("gpt2")
    reports = grace.edit_many(failing(), batch_size=4, progress=False)
    made = list(itertools.islice(reports, 6))
    assert [report.id for report in made] == list(range(6))
    with pytest.raises(KeyError, match="the next page"):
        next(reports)
    assert len(grace.edits()) == 6


def test_edits_by_other_threads_between_two_batches_are_seen():
    edits = [one_edit("gpt2", text, 1) for text in prompts(8)]
    grace, single = attached("gpt2"), attached("gpt2")
    reports = grace.edit_many(edits, batch_size=4, progress=False)
    made = [next(reports)]
    other = one_edit("gpt2", prompts(9)[8], 2)
    grace.edit(other)
    made += reports
    order = [*edits[:4], other, *edits[4:]]
    expected = [single.edit(batch) for batch in order]
    assert decided(made) == decided(expected[:4] + expected[5:])


@pytest.mark.parametrize("name", DECODERS)
def test_prompts_without_masks_stand_beside_those_of_their_length_only(name, monkeypatch):
    texts = [*prompts(3, shortest=5, longest=5), *prompts(2, shortest=7, longest=7)]
    edits = [one_edit(name, text, at) for at, text in enumerate(texts)]
    for batch in edits:
        del batch["attention_mask"]
    seen = []
    real = training_run.TrainingRun.attempt
    monkeypatch.setattr(
        training_run.TrainingRun,
        "attempt",
        lambda self, values, rows: (seen.append(len(rows)), real(self, values, rows))[1],
    )
    grace = attached(name, iterations=3)
    assert len(list(grace.edit_many(edits, progress=False))) == 5
    assert max(seen) == 3


def test_bad_arguments_are_told():
    grace = attached("gpt2")
    edit = one_edit("gpt2", prompts(1)[0], 1)
    with pytest.raises(TypeError, match="an iterable of edits, got one dict; use edit"):
        grace.edit_many(edit)
    with pytest.raises(ValueError, match="batch_size"):
        grace.edit_many([edit], batch_size=0)
    grace.unload()
    with pytest.raises(RuntimeError, match="was unloaded"):
        grace.edit_many([edit])


def test_memory_sets_how_many_are_tried_at_once(monkeypatch):
    grace = attached("gpt2")
    batch = one_edit("gpt2", prompts(1)[0], 1)
    for free, wanted in ((0, 1), (None, memory.MOST), (1 << 40, memory.MOST)):
        monkeypatch.setattr(memory, "_free", lambda _, free=free: free)
        assert memory.edits_at_once(grace.model, batch) == wanted
    monkeypatch.undo()
    assert memory.edits_at_once(grace.model, batch) >= 1
    assert memory._free(torch.device("cpu")) > 1 << 20


def test_a_batch_given_at_once_trains_its_values_at_once(monkeypatch):
    texts = prompts(6, shortest=6, longest=6)
    batch = edit_batch(FAMILIES["llama"], texts, [[10 + at] for at in range(6)])
    seen = []
    real = training_run.TrainingRun.attempt
    monkeypatch.setattr(
        training_run.TrainingRun,
        "attempt",
        lambda self, values, rows: (seen.append(len(rows)), real(self, values, rows))[1],
    )
    reports = attached("llama").edit_batch(batch)
    assert seen[0] == 6
    assert all(report.correct for report in reports)


def test_no_warning_comes_of_a_stream_that_is_learnt():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(attached("llama").edit_many(stream("llama", 6), progress=True))
    assert PADDING == 0
