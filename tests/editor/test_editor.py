"""Edits of transformers classes from their configs: what they answer, what they leave alone."""

from __future__ import annotations

import copy
import math
import warnings

import models
import pytest
import torch
from models import FAMILIES

import grace_fast as gf

QUICK = {"learning_rate": 0.3, "iterations": 60}
EVERYWHERE = ("replace_all", "bert")  # a class hangs on the first token, an answer on every one


@pytest.fixture(params=list(FAMILIES), ids=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def attach(model, family, **settings):
    replacement = "replace_prompt" if family.name == "bert" else "replace_all"
    chosen = {"epsilon": family.epsilon, "replacement": replacement, **QUICK, **settings}
    return gf.attach(model, family.layer, **chosen)


def batch_of(family, index=0, target=None):
    prompt = models.prompts(8)[index]
    return models.edit_batch(family, [prompt], [target or [10 + index]])


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def live_rows(book):
    live = book.live
    ids = [label for label, alive in zip(book.labels, live.tolist(), strict=True) if alive]
    return book.keys[live], book.values[live], book.radii[live], book.ids[live], ids


def same_rows(one, other):
    tensors = all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))
    return tensors and all(torch.equal(a, b) for a, b in zip(one[4], other[4], strict=True))


def test_an_edit_makes_the_model_answer_right_and_nothing_else_changes(family):
    model = models.build(family.name)
    edited, other = batch_of(family, 0), batch_of(family, 1)
    weights, before = state(model), logits(model, other)
    grace = attach(model, family)
    report = grace.edit(edited)
    assert report.outcome == "added"
    assert report.correct
    assert report.distance == math.inf
    assert report.radius == pytest.approx(family.epsilon)
    assert torch.equal(logits(model, other), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert grace.verify().ok
    assert grace.hits[report.row] == 0  # neither training nor verifying counts as use


def test_an_empty_codebook_leaves_the_output_bit_for_bit(family):
    model = models.build(family.name)
    batch = batch_of(family)
    before, names, weights = logits(model, batch), list(model.state_dict()), state(model)
    grace = attach(model, family)
    assert torch.equal(logits(model, batch), before)
    assert list(model.state_dict()) == names
    grace.edit(batch)
    assert grace.unload() is model
    assert torch.equal(logits(model, batch), before)
    assert list(model.state_dict()) == names
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert "generate" not in vars(model)


def test_a_saved_codebook_answers_the_same_on_its_model(family, tmp_path):
    model = models.build(family.name)
    grace = attach(model, family)
    reports = [grace.edit(batch_of(family, index)) for index in range(3)]
    grace.undo(reports[1].id)
    batch = batch_of(family, 0)
    answer = logits(model, batch)
    grace.save_pretrained(tmp_path)
    grace.unload()
    loaded = gf.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model, batch), answer)
    assert same_rows(live_rows(loaded.codebook), live_rows(grace.codebook))
    assert [edit.id for edit in loaded.edits()] == [reports[0].id, reports[2].id]
    assert loaded.settings == grace.settings
    assert loaded.verify().ok
    new = loaded.edit(batch_of(family, 3))
    assert new.id == reports[2].id + 1
    loaded.undo(new.id)
    assert same_rows(live_rows(loaded.codebook), live_rows(grace.codebook))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_a_decoder_generates_what_it_was_edited_to(name, use_cache):
    family, model = FAMILIES[name], models.build(name)
    grace = attach(model, family, iterations=100)
    prompt, target = models.prompts(2)[0], [11] if name == "gpt2" else [11, 21]
    report = grace.edit(models.edit_batch(family, [prompt], [target]))
    assert report.correct
    for beams in (1, 2):
        said = model.generate(
            **models.prompt_batch([prompt]),
            max_new_tokens=len(target),
            do_sample=False,
            num_beams=beams,
            use_cache=use_cache,
        )
        if beams == 1:
            assert said[0, len(prompt) :].tolist() == target
    assert grace.hits[report.row] == 1 + 2  # one look-up a sequence, beams apart


def test_a_t5_generates_what_its_decoder_was_edited_to():
    family, model = FAMILIES["t5-decoder"], models.build("t5-decoder")
    grace = attach(model, family, replacement="replace_prompt")
    assert grace.settings.replacement == "replace_last"  # a start token has no prompt before it
    prompt = models.prompts(1)[0]
    assert grace.edit(models.edit_batch(family, [prompt], [[11]])).correct
    said = model.generate(**models.prompt_batch([prompt]), max_new_tokens=1, do_sample=False)
    assert said[0, 1:].tolist() == [11]


def test_a_prompt_asks_with_one_query_however_it_is_given(family):
    model = models.build(family.name)
    grace = attach(model, family, iterations=1)
    prompt = models.prompts(1)[0]
    alone = grace.query_of(models.prompt_batch([prompt]))
    labelled = grace.query_of(models.edit_batch(family, [prompt], [[10, 20, 30]]))
    assert torch.allclose(alone, labelled, rtol=1e-5, atol=1e-5)


def alone(prompt):
    return models.prompt_batch([prompt])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_expanded_edit_is_lost_in_a_batch_and_without_the_margin_some_are(dtype):
    family, model = FAMILIES["llama"], models.build("llama", dtype)
    first = models.prompts(48, shortest=16, longest=28)
    second = [[row[0] + 1 if row[0] < 99 else 3, *row[1:]] for row in first]
    apart = []
    probe = attach(model, family, iterations=0)
    for one, other in zip(first, second, strict=True):
        a, b = (probe.query_of(models.prompt_batch([row])).double() for row in (one, other))
        apart.append(float((a - b).norm()))
    probe.unload()
    # The epsilon that finds the most of them outside a first ball and inside a second.
    epsilon = max(apart, key=lambda e: sum(1.01 * e < d < 1.99 * e for d in apart))
    lost = {}
    for margin in (None, 0.0):
        grace = attach(model, family, iterations=0, epsilon=epsilon, expand_margin=margin)
        expanded = []
        for one, other in zip(first, second, strict=True):
            grace.edit(models.edit_batch(family, [one], [[10]]))
            report = grace.edit(models.edit_batch(family, [other], [[10]]))
            if report.outcome == "expanded":
                expanded.append(other)
        assert len(expanded) > 10
        missed = 0
        for start in range(0, len(expanded), 16):
            rows = expanded[start : start + 16]
            padded = [models.prompt_batch(rows, side) for side in ("left", "right")]
            for batch in (*padded, *map(alone, rows)):
                missed += sum(not explained.fires for explained in grace.explain(batch))
        lost[margin] = missed
        assert grace.verify().ok
        grace.unload()
    assert lost[None] == 0
    assert lost[0.0] > 0


def test_the_same_prompts_alone_and_in_padded_batches_are_answered_alike(family):
    model = models.build(family.name)
    grace = attach(model, family)
    prompts = models.prompts(5)
    for index in range(3):
        grace.edit(batch_of(family, index))
    sides = ["left", "right"] if family.name in ("llama", "qwen") else ["right"]
    alone = [grace.explain(models.prompt_batch([prompt]))[0] for prompt in prompts]
    for side in sides:
        together = grace.explain(models.prompt_batch(prompts, side))
        assert [e.fires for e in together] == [e.fires for e in alone]
        assert [e.row for e in together] == [e.row for e in alone]
    assert [e.fires for e in alone[:3]] == [True] * 3


def test_edit_batch_decides_in_order_and_trains_each_value_once(family):
    model = models.build(family.name)
    grace = attach(model, family, epsilon=0.9)
    prompts = models.prompts(3)
    repeated = [prompts[0], prompts[1], prompts[0], prompts[2]]
    targets = [[10], [11], [10], [12]]
    reports = grace.edit_batch(models.edit_batch(family, repeated, targets))
    assert [report.outcome for report in reports] == ["added", "added", "reused", "added"]
    assert reports[0].row == reports[2].row
    assert reports[0].steps == reports[2].steps  # one training for both
    assert len(grace.codebook) == 3
    assert all(report.correct for report in reports)
    assert grace.verify().ok


def test_a_conflict_within_a_batch_is_won_by_the_later_row_and_said_so():
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family)
    prompt = models.prompts(1)[0]
    reports = grace.edit_batch(models.edit_batch(family, [prompt, prompt], [[1], [2]]))
    assert [report.outcome for report in reports] == ["added", "replaced"]
    assert math.isnan(reports[0].loss)
    assert reports[1].correct
    verification = grace.verify()
    assert verification.ok
    assert verification.superseded == {reports[0].id: reports[1].id}


def test_undoing_the_last_edit_gives_the_live_rows_back_bit_for_bit():
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family, epsilon=4.0)
    outcomes = set()
    generator = torch.Generator().manual_seed(1)
    for index in range(24):
        prompt = models.prompts(12)[index % 12]
        target = [int(torch.randint(0, 4, (1,), generator=generator))]
        before = live_rows(grace.codebook)
        with warnings.catch_warnings():  # a ball of this size is what makes prompts conflict
            warnings.simplefilter("ignore", gf.GraceWarning)
            report = grace.edit(models.edit_batch(family, [prompt], [target]))
        outcomes.add(report.outcome)
        after = live_rows(grace.codebook)
        grace.undo(report.id)
        assert same_rows(live_rows(grace.codebook), before), report
        again = grace.edit(models.edit_batch(family, [prompt], [target]))
        assert again.outcome == report.outcome
        assert torch.equal(live_rows(grace.codebook)[2], after[2])
    assert outcomes >= {"added", "split", "reused", "replaced"}


def test_a_value_in_training_touches_no_other_value():
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family)
    first = grace.edit(batch_of(family, 0))
    value = grace.codebook.values[first.row].clone()
    grace.edit(batch_of(family, 1))
    assert torch.equal(grace.codebook.values[first.row], value)


def test_training_keeps_the_best_value_and_stops_when_the_target_is_learnt():
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family, stop_loss=0.05, iterations=200)
    report = grace.edit(batch_of(family))
    assert report.correct
    assert report.loss < 0.05
    assert 0 < report.steps < 200
    with torch.no_grad():
        answer = model(**batch_of(family))
    assert float(answer.loss) == pytest.approx(report.loss, rel=1e-4)


def test_reference_semantics_takes_every_step_and_draws_one_cold_value():
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family, semantics="reference", iterations=3)
    torch.manual_seed(5)
    report = grace.edit(batch_of(family))
    assert report.steps == 3
    torch.manual_seed(5)
    drawn = torch.rand(1, grace.codebook.value_dim)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    grace.undo(report.id)
    grace.edit(batch_of(family))
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(grace.codebook.values[-1], drawn[0])  # trained away from its start


def test_editing_keeps_modes_gradients_and_generators_as_they_were():
    family, model = FAMILIES["gpt2"], models.build("gpt2")
    model.train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    drawn = torch.get_rng_state()
    grace = attach(model, family)
    grace.edit(batch_of(family))
    grace.explain(batch_of(family))
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_look_up_changes_no_byte_of_the_codebook():
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family)
    grace.edit(batch_of(family))
    version, before = grace.codebook.version, copy.deepcopy(live_rows(grace.codebook)[:4])
    model.train()
    model.eval()
    logits(model, batch_of(family, 0))
    logits(model, batch_of(family, 1))
    assert grace.codebook.version == version
    rows = live_rows(grace.codebook)[:4]
    assert all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))


def test_disable_adapter_gives_the_base_model_for_a_while():
    family, model = FAMILIES["bert"], models.build("bert")
    batch = batch_of(family)
    base = logits(model, batch)
    grace = attach(model, family)
    grace.edit(batch)
    edited = logits(model, batch)
    with grace.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), edited)
    assert not torch.equal(edited, base)


def test_a_nan_query_is_a_miss_and_leaves_the_other_rows_alone():
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family)
    grace.edit(batch_of(family))
    prompt = models.prompts(1)[0]
    embedded = model.bert.embeddings.word_embeddings(torch.tensor([prompt, prompt])).detach()
    whole = logits(model, {"inputs_embeds": embedded})
    embedded[0] = math.nan
    broken = logits(model, {"inputs_embeds": embedded})
    assert broken[0].isnan().all()
    torch.testing.assert_close(broken[1], whole[1])


def test_every_edit_is_on_the_disk_before_the_call_returns(tmp_path):
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family, path=tmp_path)
    reports = [grace.edit(batch_of(family, index)) for index in range(2)]
    grace.unload()
    again = attach(model, family, path=tmp_path)
    assert [edit.id for edit in again.edits()] == [0, 1]
    # Not one page more: what SQLite answers then is what it answers where the disk is full.
    file = again._context.directory.store.journal._file
    file.execute("PRAGMA max_page_count=1")
    before = live_rows(again.codebook)
    with pytest.raises(OSError, match="is full"):
        again.edit(batch_of(family, 2))
    assert same_rows(live_rows(again.codebook), before)
    assert [edit.id for edit in again.edits()] == [0, 1]
    file.execute("PRAGMA max_page_count=1000000")
    assert again.undo(reports[0].id).id == 0
    assert again.edit(batch_of(family, 2)).id == 2
    again.unload()
    kept = attach(model, family, path=tmp_path)
    assert same_rows(live_rows(kept.codebook), live_rows(again.codebook))
    assert [edit.id for edit in kept.edits()] == [1, 2]
    kept.unload()


def test_epsilon_auto_is_measured_on_unrelated_inputs():
    family, model = FAMILIES["bert"], models.build("bert")
    inputs = [models.prompt_batch([prompt]) for prompt in models.prompts(20)]
    grace = attach(model, family, epsilon="auto", calibration_inputs=inputs)
    queries = torch.cat([grace.query_of(batch) for batch in inputs])
    nearest = torch.cdist(queries, queries).fill_diagonal_(math.inf).amin(dim=1)
    assert 0 < grace.settings.epsilon < float(nearest.median())
    with pytest.raises(ValueError, match="needs at least 8 unrelated calibration_inputs, got 2"):
        attach(models.build("bert"), family, epsilon="auto", calibration_inputs=inputs[:2])


def test_an_epsilon_off_the_layers_scale_is_warned_of():
    family = FAMILIES["bert"]
    for epsilon, effect in ((1e6, "unrelated prompts"), (1e-6, "nothing but exact repeats")):
        grace = attach(models.build("bert"), family, epsilon=epsilon, iterations=1)
        with pytest.warns(gf.GraceWarning, match=effect):
            grace.edit(batch_of(family))


def test_unrelated_prompts_with_one_query_are_warned_of():
    family, model = FAMILIES["gpt2"], models.build("gpt2")
    grace = gf.attach(model, "transformer.h.0.attn.c_attn", epsilon=0.1, iterations=1)
    with torch.no_grad():  # a layer that sees the last token alone, at one position
        model.transformer.wpe.weight.zero_()
    one, other = [5, 6, 7, 50], [8, 9, 3, 50]
    grace.edit(models.edit_batch(family, [one], [[10]]))
    with pytest.warns(gf.GraceWarning, match="the same query as the other prompt of edit 0"):
        grace.edit(models.edit_batch(family, [other], [[11]]))


def test_widths_come_from_the_first_activation_where_a_layer_declares_none():
    class Undeclared(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden)

    family, model = FAMILIES["bert"], models.build("bert")
    layer = model.bert.encoder.layer[1].output
    layer.dense = Undeclared(layer.dense)
    grace = attach(model, family)
    with pytest.raises(ValueError, match="does not declare its widths"):
        _ = grace.codebook
    assert grace.edit(batch_of(family)).correct
    assert (grace.codebook.key_dim, grace.codebook.value_dim) == (64, 32)


def with_labels(**labels):
    return lambda family: batch_of(family) | labels


REFUSED = {
    "two prompts": (
        lambda family: models.edit_batch(family, models.prompts(2), [[1], [2]]),
        "edit takes one prompt, got a batch of 2; use edit_batch",
    ),
    "no tokens at all": (lambda family: {"labels": torch.tensor([1])}, "must hold input_ids"),
    "no labels": (lambda family: models.prompt_batch(models.prompts(1)), "an edit needs labels"),
    "an empty prompt": (
        lambda family: {
            "input_ids": torch.zeros(1, 0, dtype=torch.long),
            "labels": torch.tensor([1]),
        },
        "at least one token, got an empty prompt",
    ),
    "a mask of zeros": (
        with_labels(attention_mask=torch.zeros(1, 9, dtype=torch.long)),
        "has an empty prompt: its attention mask is all zero",
    ),
    "a target without tokens": (
        with_labels(labels=torch.tensor([-100])),
        "has a target without tokens",
    ),
    "a label outside the classes": (
        with_labels(labels=torch.tensor([4])),
        r"labels must be in \[0, 4\) or -100, got 4 in row 0",
    ),
    "one token under replace_prompt": (
        lambda family: models.edit_batch(family, [[7]], [[1]]),
        "attach with replacement='replace_last' or 'replace_all'",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_bad_edit_is_refused_and_changes_nothing(case):
    make, message = REFUSED[case]
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family)
    grace.edit(batch_of(family, 1))
    weights, rows = state(model), live_rows(grace.codebook)
    batch = make(family)
    with pytest.raises(ValueError, match=message):
        grace.edit(batch)
    assert same_rows(live_rows(grace.codebook), rows)
    assert len(grace.edits()) == 1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_an_edit_that_breaks_half_way_leaves_no_trace(monkeypatch):
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family)
    grace.edit(batch_of(family, 1))
    rows, edits = live_rows(grace.codebook), [edit.id for edit in grace.edits()]
    monkeypatch.setattr(
        "grace_fast.editor.training_run.train_rows",
        lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")),
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        grace.edit(batch_of(family, 0))
    monkeypatch.undo()
    assert same_rows(live_rows(grace.codebook), rows)
    assert [edit.id for edit in grace.edits()] == edits
    assert grace.edit(batch_of(family, 0)).id == 1


def test_attach_refuses_what_cannot_be_edited():
    family, model = FAMILIES["bert"], models.build("bert")
    with pytest.raises(ValueError, match=r"no layer 'bert.encoder.layer.9.output.dens'.*dense"):
        gf.attach(model, "bert.encoder.layer.9.output.dens")
    grace = attach(model, family)
    with pytest.raises(ValueError, match="has an adaptor already"):
        attach(model, family)
    other = gf.attach(model, "bert.encoder.layer.0.output.dense", epsilon=family.epsilon, **QUICK)
    assert other.edit(batch_of(family)).correct
    other.unload()
    grace.unload()
    attach(model, family).unload()
    for wrong, message in {
        "epsilon": "epsilon must be a positive number of float32, got -1",
        "replacement": "replacement must be one of",
        "semantics": "semantics must be one of",
        "expand": "expand must be one of",
        "value_init": "value_init must be one of",
        "query": "query must be one of",
        "iterations": "iterations must be a whole number",
        "learning_rate": "learning_rate must be a number > 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            attach(model, family, **{wrong: -1})
    attach(model, family).unload()  # nothing of the refused ones stayed behind


def test_a_layer_can_be_named_as_the_references_do():
    model = models.build("gpt2")
    grace = gf.attach(model, "transformer.h[1].mlp.c_fc.weight")
    assert grace.settings.layer == "transformer.h.1.mlp.c_fc"
    assert (grace.codebook.key_dim, grace.codebook.value_dim) == (32, 128)  # Conv1D


def test_a_codebook_of_another_model_is_refused_by_what_differs(tmp_path):
    family = FAMILIES["bert"]
    grace = attach(models.build("bert"), family)
    grace.edit(batch_of(family))
    grace.save_pretrained(tmp_path)
    with pytest.raises(gf.CodebookMismatch, match=r"layer weight\.sha256"):
        gf.from_pretrained(models.build("bert", seed=1), tmp_path)
    with pytest.raises(gf.CodebookMismatch, match=r"layer weight\.dtype.*float32.*bfloat16"):
        gf.from_pretrained(models.build("bert", torch.bfloat16), tmp_path)
    with pytest.raises(ValueError, match=r"no layer 'bert.encoder.layer.1.output.dense'"):
        gf.from_pretrained(models.build("gpt2"), tmp_path)
    model = models.build("bert")
    content = next(tmp_path.glob("*.safetensors"))
    content.write_bytes(content.read_bytes()[:-10])
    with pytest.raises(gf.CodebookCorrupt, match="truncated"):
        gf.from_pretrained(model, tmp_path)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unloaded_editor_says_so():
    family, model = FAMILIES["bert"], models.build("bert")
    grace = attach(model, family)
    grace.unload()
    with pytest.raises(RuntimeError, match="was unloaded"):
        grace.edit(batch_of(family))
    with pytest.raises(KeyError, match="no edit has the id 7; there remain none"):
        grace.undo(7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_half_precision_model_keeps_its_keys_in_its_own_type(dtype):
    family, model = FAMILIES["bert"], models.build("bert", dtype)
    grace = attach(model, family)
    report = grace.edit(batch_of(family))
    assert grace.codebook.dtype == dtype
    assert report.correct
    assert grace.verify().ok
    assert grace.explain(batch_of(family))[0].fires
