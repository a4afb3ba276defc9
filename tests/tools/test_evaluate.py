from __future__ import annotations

import copy
import functools
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

import grace_fast as gf
from grace_fast.editor import calibrate
from grace_fast.editor.calibrate import CalibrationEdit, Labelled, Trial
from grace_fast.semantics import Rules
from grace_fast.tools import cli
from grace_fast.tools.evaluate import (
    answering,
    cache,
    calibration,
    fabrications,
    facts,
    given,
    labels,
    metrics,
    paper,
    records,
    report,
    running,
    stream,
    words,
)
from grace_fast.tools.evaluate.editors import FineTuned, GraceEditor, Retrained
from grace_fast.tools.evaluate.reference_rule import ReferenceRule
from grace_fast.tools.evaluate.task import Case, Sample, Task

LAYER = "decoder.block.0.layer.2.DenseReluDense.wo"
NAMES = [f"place{at}" for at in range(24)]
MONEY = [f"coin{at}" for at in range(6)]


def t5(vocabulary: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=32,
        d_ff=64,
        d_kv=16,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config).eval()


def cases(names: list[str], shift: int, forms: tuple[str, ...] = ("money of {}",)) -> list[Case]:
    return [
        Case(form.format(name), MONEY[(at + shift) % len(MONEY)], name)
        for at, name in enumerate(names)
        for form in forms
    ]


FORMS = ("money of {}", "what does {} pay with", "{} pays with")


@functools.cache
def _trained() -> tuple[Any, Any]:
    """Return a T5 that knows the money of every place, and its tokenizer."""
    tokenizer = words.tokenizer([*NAMES, *MONEY, *(form.format("") for form in FORMS)], ends=True)
    model = t5(len(tokenizer)).train()
    known = cases(NAMES, 0, FORMS)
    holder = SimpleNamespace(model=model, tokenizer=tokenizer)
    batch = answering.training_batch(holder, known)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        adam.zero_grad()
        model(**batch).loss.backward()
        adam.step()
    return model.eval(), tokenizer


def small_task(**changes: Any) -> Task:
    forms = FORMS
    model, tokenizer = copy.deepcopy(_trained())
    task = Task(
        name="small",
        model=model,
        tokenizer=tokenizer,
        layer=LAYER,
        layers=[LAYER, "decoder.block.1.layer.2.DenseReluDense.wo"],
        settings={
            "replacement": "replace_all",
            "value_init": "warm",
            "learning_rate": 0.3,
            "iterations": 40,
        },
        edits=cases(NAMES[:4], 1, forms[:2]) + cases(NAMES[:1], 2, forms[:2]),
        held_out=cases(NAMES[:4], 0, forms[2:]),
        unrelated=[],
        calibration=Sample(
            cases(NAMES[6:14], 1, forms[:2]),
            cases(NAMES[6:14], 1, forms[2:]),
            [Case(f"money of {name}", "", name) for name in NAMES[14:]],
        ),
        longest=4,
    )
    said = answering.answers(task, cases(NAMES[14:], 0))
    unrelated = [
        Case(case.prompt, answer, case.about)
        for case, answer in zip(cases(NAMES[14:], 0), said, strict=True)
    ]
    return replace(task, unrelated=unrelated, rehearsal=unrelated, **changes)


def run(task: Task, folder: Path, **wanted: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gf.GraceWarning)
        options = running.Options(every=4, progress=False, as_json=True, **wanted)
        return running.evaluate(task, folder, options, 0.0)


def timeless(figures: dict[str, Any]) -> list[dict[str, Any]]:
    clocks = ("edit_seconds", "lookups_per_second")
    return [
        {name: value for name, value in point.items() if name not in clocks}
        for point in figures["points"]
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("whole")
    return run(small_task(), folder, epsilon=0.05), folder


def test_an_evaluation_reports_every_measure_and_draws_it(whole):
    figures, folder = whole
    assert figures["edits"] == 10
    assert figures["ES"] == 1 - len(figures["not_learnt"]) / 10 >= 0.8
    assert [point["edits"] for point in figures["points"]] == [4, 8, 10]
    assert figures["superseded"] == 2  # one place changed again, in two phrasings
    assert 0 < figures["keys"] <= 10
    assert figures["before"]["TRR"] == 1.0
    assert figures["ARR"] is None
    assert json.loads((folder / "small.json").read_text()) == figures
    assert (folder / "small.png").stat().st_size > 1000
    assert (folder / "small-tradeoff.png").stat().st_size > 1000


def test_the_same_seed_decides_the_same_to_the_bit(whole, tmp_path):
    again = run(small_task(), tmp_path, epsilon=0.05)
    assert again["decisions"] == whole[0]["decisions"]
    assert timeless(again) == timeless(whole[0])


def test_an_interrupted_evaluation_goes_on_to_the_same_table(whole, tmp_path, monkeypatch):
    edit, made = GraceEditor.edit, []

    def interrupted(self: GraceEditor, case: Case) -> bool:
        made.append(case)
        if len(made) == 7:
            raise KeyboardInterrupt
        return edit(self, case)

    monkeypatch.setattr(GraceEditor, "edit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(small_task(), tmp_path / "broken", epsilon=0.05)
    monkeypatch.undo()
    resumed = run(small_task(), tmp_path / "broken", epsilon=0.05)
    assert resumed["resumed"]
    assert resumed["decisions"] == whole[0]["decisions"]
    assert timeless(resumed) == timeless(whole[0])


def test_an_interrupted_sweep_goes_on_to_the_same_rows(tmp_path, monkeypatch):
    edit, tried = GraceEditor.edit, []

    def interrupted(self: GraceEditor, case: Case) -> bool:
        if not tried or tried[-1] != self.grace.settings.epsilon:
            tried.append(self.grace.settings.epsilon)
        if len(tried) == 4:  # the stream of the evaluation itself is the first
            raise KeyboardInterrupt
        return edit(self, case)

    wanted: dict[str, Any] = {"epsilon": 0.05, "sweep": 3}
    task = small_task(edits=cases(NAMES[:2], 1))
    through = run(task, tmp_path / "whole", **wanted)["sweep"]
    monkeypatch.setattr(GraceEditor, "edit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path / "broken", **wanted)
    assert len(tried) == 4
    monkeypatch.undo()
    done = json.loads((tmp_path / "broken" / "sweep.json").read_text())["rows"]
    resumed = run(task, tmp_path / "broken", **wanted)["sweep"]
    assert len(done) == 2
    assert resumed["rows"][:2] == done  # to the clock: they were not run again
    clocks = ("seconds", "process_cpu_seconds")
    rows = [
        [{name: row[name] for name in row if name not in clocks} for row in one["rows"]]
        for one in (resumed, through)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


def test_a_state_of_another_recipe_is_not_taken(whole):
    state = json.loads((whole[1] / stream.STATE).read_text())
    assert stream.Progress.read(whole[1], state["recipe"]) is not None
    assert stream.Progress.read(whole[1], "another") is None
    task = small_task()
    changed = [
        replace(task, tuning_rate=1.0),
        replace(task, retraining_rate=1.0),
        replace(task, rehearsal=[]),
        replace(task, edits=[replace(task.edits[0], also=("x",)), *task.edits[1:]]),
    ]
    recipes = {running.recipe_of(one, 0.05, 4, seed=0) for one in changed}
    assert running.recipe_of(task, 0.05, 4, seed=0) == state["recipe"]
    assert len(recipes | {state["recipe"]}) == 5


def test_edits_that_are_not_learnt_are_counted_and_named(tmp_path):
    settings = {"replacement": "replace_all", "iterations": 1, "learning_rate": 1e-6}
    figures = run(small_task(settings=settings), tmp_path, epsilon=0.05)
    assert len(figures["not_learnt"]) == 10
    first = {"edit": 0, "prompt": "money of place0", "answer": "coin1"}
    assert figures["not_learnt"][0] == first


def test_baselines_run_on_the_same_stream_and_leave_the_model_as_it_was(tmp_path):
    task = small_task()
    before = stream.weights_checksum(task.model)
    figures = run(task, tmp_path, epsilon=0.05, baselines=True)
    assert list(figures["baselines"]) == ["fine-tuning", "retraining", "reference rule"]
    for points in figures["baselines"].values():
        assert [point["edits"] for point in points] == [4, 8, 10]
    assert stream.weights_checksum(task.model) == before


def test_fine_tuning_learns_an_edit():
    task = small_task(tuning_rate=1e-3)
    editor = FineTuned(task)
    editor.edit(task.edits[0])
    assert answering.scores(editor.task, task.edits[:1]) == [1.0]


def test_retraining_starts_from_the_first_weights_at_every_twentieth_edit():
    task = small_task()
    editor = Retrained(task, seed=0)
    for at in range(20):
        editor.edit(task.unrelated[at % 4])  # answered already: only the retraining trains
    moved = (
        editor.task.model.state_dict()["shared.weight"] - task.model.state_dict()["shared.weight"]
    )
    assert 0 < float(moved.abs().max()) < 0.1  # a few steps from the first weights, not hundreds


def test_the_reference_rule_forgets_expanded_edits_once_it_has_more_than_25_keys():
    task = small_task()
    rule = ReferenceRule(task, epsilon=1.0)
    torch.manual_seed(0)
    width, origin = 64, 300.0  # far from the origin, where the matrix product cancels
    expanded = []
    for _ in range(25):
        key = torch.full((width,), origin) + 8 * torch.randn(width)
        rule._decide(key, torch.zeros(32), torch.tensor([len(rule._keys)]))
        near = key + 1.4 * torch.nn.functional.normalize(torch.randn(width), dim=0)
        rule._decide(near, torch.zeros(32), torch.tensor([len(rule._keys) - 1]))
        assert rule._radii[-1] > rule.rules.epsilon  # expanded
        expanded.append(near)
    assert not any(_missed(rule, query) for query in expanded)
    rule._decide(torch.zeros(width), torch.zeros(32), torch.tensor([99]))  # the 26th key
    lost = [_missed(rule, query) for query in expanded]
    rule.close()
    assert any(lost)


def test_the_reference_rule_starts_its_values_alike_whatever_ran_before():
    task = small_task(settings={"replacement": "replace_all", "iterations": 0})  # cold, untrained
    started = []
    for seed in range(2):
        torch.manual_seed(seed)
        rule = ReferenceRule(task, epsilon=0.05)
        rule.edit(task.edits[0])
        started.append(rule._values[0])
        rule.close()
    assert torch.equal(*started)


def _missed(rule: ReferenceRule, query: torch.Tensor) -> bool:
    distance, row = torch.cdist(query[None], torch.stack(rule._keys)).min(1)
    return bool(distance > torch.tensor(rule._radii)[row])


def labelled(points: list[float], labels: list[Any]) -> Labelled:
    about = [label or point for label, point in zip(labels, points, strict=True)]
    return Labelled(torch.tensor([[point, 0.0] for point in points]), labels, about)


def test_a_trial_decides_as_the_codebook_does():
    family = models.FAMILIES["bert"]
    prompts = models.prompts(30)
    model = models.build("bert")
    batch = models.edit_batch(family, prompts, [[at] for at in range(30)])
    settings = {"iterations": 1, "replacement": "replace_all"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gf.GraceWarning)
        grace = gf.attach(model, family.layer, 0.5, **settings)
        queries = grace.query_of(models.prompt_batch(prompts))
        labels = batch["labels"].tolist()
        asked = Labelled(queries, labels, list(range(30)))
        for epsilon in (0.05, 0.2, 0.5, 1.0):
            book = gf.attach(models.build("bert"), family.layer, epsilon, **settings)
            for query, label in zip(prompts, labels, strict=True):
                one = models.prompt_batch([query]) | {"labels": torch.tensor([label])}
                book.edit(one)
            measured = calibrate.measure(family.layer, asked, asked, asked)
            trial = calibrate.attempt(measured, Rules(epsilon, margin=1e-5))
            match = gf.find(queries, book.codebook)
            rows = [edit.label for edit in book.edits()]
            right = [
                bool(hit) and int(book.codebook.labels[row][0]) == label
                for hit, row, label in zip(match.hit, match.row.tolist(), labels, strict=True)
            ]
            assert trial.keys == len(book.codebook)
            assert trial.retained.tolist() == right
            assert len(rows) == 30


def test_the_recommendation_generalises_most_without_giving_up_edits_or_locality():
    edits = labelled([0.0, 10.0, 20.0], ["a", "b", "c"])
    paraphrases = labelled([1.0, 11.0, 21.0], ["a", "b", "c"])
    unrelated = labelled([5.0, 15.0, 25.0], [None] * 3)
    measured = calibrate.measure("here", edits, paraphrases, unrelated)
    epsilons = [0.5, 0.9, 1.1, 2.0, 3.0, 4.9, 5.5]
    found = calibrate.recommend([measured], Rules(1.0), epsilons)
    assert found.epsilon == 2.0  # the middle of 1.1 .. 4.9
    assert (found.err, found.generality, found.trr) == (1.0, 1.0, 1.0)
    more = calibrate.recommend([measured], Rules(1.0), epsilons, expected=10)  # thrice as many is 9
    assert more.epsilon == 1.1
    assert calibrate.recommend([measured], Rules(1.0), epsilons, expected=9).epsilon == 2.0
    assert found.within_budget
    assert found.near_best == 1.0
    assert found.intervals["generality"] == (1.0, 1.0)


def _two_layers() -> list[calibrate.Distances]:
    """Return a layer that tells everything apart, and one where unrelated inputs are close."""
    edits, others = labelled([0.0, 10.0], ["a", "b"]), labelled([5.0, 15.0], [None] * 2)
    close = labelled([0.4, 15.0], [None] * 2)
    paraphrases = labelled([1.0, 11.0], ["a", "b"])
    return [
        calibrate.measure("apart", edits, paraphrases, others),
        calibrate.measure("crowded", edits, paraphrases, close),
    ]


def test_a_layer_at_which_edits_are_not_learnt_is_left_out():
    epsilons, measured = [0.1, 2.0], _two_layers()
    assert calibrate.recommend(measured, Rules(1.0), epsilons).layer == "apart"
    learnt = {"apart": 0.5, "crowded": 0.75}
    found = calibrate.recommend(measured, Rules(1.0), epsilons, learnt=learnt)
    assert (found.layer, found.epsilon, found.learnable) == ("crowded", 0.1, True)
    assert found.near_best == 1.0  # of the layers that are left
    assert [trial.layer for trial in found.trials] == ["apart"] * 2 + ["crowded"] * 2
    assert found.learnt == learnt


def test_where_edits_are_learnt_at_no_layer_the_recommendation_says_so():
    learnt = {"apart": 0.0, "crowded": 0.25}
    found = calibrate.recommend(_two_layers(), Rules(1.0), [0.1, 2.0], learnt=learnt)
    assert (found.layer, found.learnable) == ("apart", False)
    assert "at any of the layers" in report.recommendation(found)


def test_calibration_tries_edits_at_every_layer_and_leaves_the_model_as_it_was():
    task = small_task()
    before = stream.weights_checksum(task.model)
    shut = replace(task, settings={**task.settings, "iterations": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gf.GraceWarning)
        found, none = calibration.run(task, tries=4), calibration.run(shut, tries=4)
    assert list(found.learnt) == task.layers
    assert found.learnt[LAYER] >= 0.75
    assert found.recommended.learnable
    assert none.learnt == dict.fromkeys(task.layers, 0.0)
    assert (
        found.recommended.epsilon
        == calibration.at_layer(found, replace(task, layer=found.recommended.layer)).epsilon
    )
    assert stream.weights_checksum(task.model) == before


def test_an_edit_in_two_phrasings_has_one_value_that_answers_both():
    task = small_task()
    case = Case("money of place0", "coin3", "place0", also=("what does place0 pay with",))
    editor = GraceEditor(task, epsilon=50.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gf.GraceWarning)
        assert editor.edit(case)
    assert editor.keys == 1
    assert [outcome for outcome, *_ in editor.decisions()] == ["added", "reused"]
    assert answering.answers(task, case.phrasings) == ["coin3", "coin3"]
    editor.close()
    rule = ReferenceRule(task, epsilon=50.0)
    assert rule.edit(case)
    assert rule.keys == 1
    assert answering.answers(task, case.phrasings) == ["coin3", "coin3"]
    rule.close()


def test_an_epsilon_that_no_budget_allows_is_said_to_be_over_it():
    edits, unrelated = labelled([0.0, 8.0], ["a", "b"]), labelled([0.1, 8.1], [None] * 2)
    measured = calibrate.measure("here", edits, labelled([], []), unrelated)
    found = calibrate.recommend([measured], Rules(1.0), [1.0, 2.0], budget=0.0)
    assert not found.within_budget
    assert math.isnan(found.generality)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibrate.recommend([], Rules(1.0)), "needs at least one layer, got none"),
        (
            lambda: calibrate.measure("here", *[labelled([], [])] * 3),
            "needs at least one edit in its sample",
        ),
        (
            lambda: Labelled(torch.zeros(2, 3), ["a"], ["a", "b"]),
            "every query needs a label and what it is about, got 2, 1 and 2",
        ),
        (
            lambda: calibrate.grid(
                calibrate.measure("here", labelled([1.0], ["a"]), *[labelled([], [])] * 2)
            ),
            "asks here with one query only",
        ),
    ],
)
def test_calibration_says_what_it_lacks(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_trial_knows_its_shares():
    yes, no = [True, True], [False, True]
    trial = Trial("here", 1.0, 1, *(torch.tensor(part).numpy() for part in (yes, no, yes)))
    assert (trial.err, trial.generality, trial.trr) == (1.0, 0.5, 1.0)


@pytest.mark.parametrize("name", sorted(models.FAMILIES))
def test_one_pass_sees_the_queries_that_a_codebook_is_asked(name, monkeypatch):
    family, batch = models.FAMILIES[name], models.prompt_batch(models.prompts(3), "left")
    if family.labels != "continuation":
        batch = models.prompt_batch(models.prompts(3))
    model = models.build(name.partition("-")[0])
    monkeypatch.setattr(answering, "_batches", lambda task, prompts: [([2, 0, 1], batch)])
    holder: Any = SimpleNamespace(model=model)
    asked = answering.queries_by_layer(holder, [family.layer], [Case("", "", "")] * 3)
    grace = gf.attach(model, family.layer, family.epsilon)
    assert torch.equal(asked[family.layer][[2, 0, 1]], grace.query_of(batch))


def test_attach_calibrates_on_a_sample_of_edits():
    task = small_task()
    sample = [
        CalibrationEdit(case.prompt, str(case.answer), [f"{case.about} pays with"])
        for case in cases(NAMES[:8], 0)
    ]
    unrelated = [f"money of {name}" for name in NAMES[12:]]
    settings = {"tokenizer": task.tokenizer, "calibration_inputs": unrelated}
    grace = gf.attach(task.model, LAYER, "auto", calibration_edits=sample, **settings)
    assert 0 < grace.settings.epsilon < 100
    for case in cases(NAMES[:8], 0):
        grace.edit(case.prompt, str(case.answer))
    assert sum(one.fires for text in unrelated for one in grace.explain(text)) == 0
    grace.unload()
    settings["calibration_inputs"] = unrelated[:3]
    with pytest.raises(ValueError, match="at least 8 unrelated calibration_inputs, got 3"):
        gf.attach(task.model, LAYER, "auto", calibration_edits=sample, **settings)


def test_scores_are_exact_or_by_words():
    assert metrics.exact(" a b ", "a b") == 1.0
    assert metrics.exact(3, 4) == 0.0
    assert metrics.token_f1("The Cat, sat", "cat sat down") == pytest.approx(4 / 5)
    assert metrics.token_f1("", "dog") == 0.0


def test_a_word_level_tokenizer_gives_a_sentence_back():
    tokenizer = words.tokenizer(["b a ( c )"], ends=True)
    ids = tokenizer("a b ( c )")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b ( c )"


def test_facts_are_those_of_the_cldr():
    data = facts.read()
    assert data.before["germany"] == "german mark"
    assert [change.currency for change in data.changes if change.territory == "croatia"] == [
        "croatian dinar",
        "croatian kuna",
        "euro",
    ]
    assert 75 <= len(data.changes) <= 100
    assert [change.day for change in data.changes] == sorted(change.day for change in data.changes)
    phrasings = [*facts.EDITED, *facts.HELD_OUT, *facts.VALIDATION]
    assert len(set(phrasings)) == 24


def test_fabricated_lines_are_true_of_something_else():
    data = fabrications.read(0)
    assert len(data.edited) == fabrications.EDITED
    assert all(line.text != told for line, told in (*data.edited, *data.calibration))
    about = [line.about for line in data.learnt]
    assert len(set(about)) == len(about)
    assert fabrications.read(0) == data


def test_a_head_gives_no_weight_to_features_that_hardly_vary():
    torch.manual_seed(0)
    classes = torch.arange(60) % 3
    features = torch.randn(60, 5) + torch.nn.functional.one_hot(classes, 5) * 4
    features[:, 4] = 1e-30 * torch.randn(60)  # as MiniLM's three
    head = torch.nn.Linear(5, 3)
    labels.fit_alive(head, features, classes)
    assert head.weight[:, 4].tolist() == [0.0] * 3
    assert head.weight.abs().max() < 100
    assert (head(features).argmax(dim=1) == classes).float().mean() > 0.9


def test_a_trained_model_is_trained_once(tmp_path):
    calls = []

    class Saved:
        def save_pretrained(self, place: Path) -> None:
            (place / "weights").write_text("1")

    def train() -> Saved:
        calls.append(1)
        return Saved()

    for _ in range(2):
        loaded = cache.trained(tmp_path, "x", [1], lambda at: (at / "weights").read_text(), train)
        assert loaded == "1"
    assert calls == [1]
    assert [place.name for place in tmp_path.iterdir()] == [f"x-{cache.checksum([1])}"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}, {"text": "b"}], "line 2: the field 'label' is missing"),
        ([{"text": " ", "label": 1}], "line 1: 'text' must be a text that is not empty, got ' '"),
        ([{"text": "a", "label": -1}], "line 1: 'label' must be a class, a whole number from 0"),
        ([], "holds no records"),
    ],
)
def test_a_data_file_that_is_wrong_is_refused_by_line(tmp_path, rows, message):
    write(tmp_path / "x.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        records.read(tmp_path / "x.jsonl", {"text": records.text, "label": records.label})


def test_a_csv_is_read_and_its_lines_are_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text,label\nhello,1\n,2\n")
    with pytest.raises(
        ValueError, match=r"line 3: 'text' must be a text that is not empty, got ''"
    ):
        records.read(path, {"text": records.text, "label": records.label})


def test_every_wrong_line_is_told_of_or_left_out(tmp_path):
    path, fields = tmp_path / "x.jsonl", {"prompt": records.text, "target": records.answers}
    path.write_text('{"prompt": "a", "target": "b"}\n{\n{"prompt": "a", "target": ""}\n[]\n')
    with pytest.raises(ValueError, match=r"line 2 is not JSON.*also wrong: line 3, line 4"):
        records.read(path, fields)
    refused: list[str] = []
    assert records.read(path, fields, refused) == [{"prompt": "a", "target": "b"}]
    assert [why.partition(", ")[2][:6] for why in refused] == ["line 2", "line 3", "line 4"]


def test_a_sample_to_calibrate_on_takes_the_first_of_several_answers(tmp_path):
    edits, others = tmp_path / "edits.csv", tmp_path / "others.json"
    edits.write_text("prompt,target,paraphrases\na,b,c\nd,e,\n", encoding="utf-8-sig")
    others.write_text('[{"prompt": "x"}, {"prompt": null}]')
    refused: list[str] = []
    sample = given.sample(edits, others, refused)
    assert [(case.prompt, case.answer) for case in sample.edits] == [("a", "b"), ("d", "e")]
    assert [case.prompt for case in sample.paraphrases] == ["c"]
    assert [case.prompt for case in sample.unrelated] == ["x"]
    assert "record 2 (line 1): 'prompt' must be a text that is not empty, got None" in refused[0]
    write(tmp_path / "several.jsonl", [{"prompt": "a", "target": ["b", "c"]}])
    assert given.sample(tmp_path / "several.jsonl", others, refused).edits[0].answer == "b"


def zsre_files(folder: Path) -> None:
    forms = [f"form{at}" for at in range(20)]
    write(
        folder / "zsre.jsonl",
        [
            {
                "input": f"form0 {name}",
                "output": [{"answer": MONEY[at % 6]}],
                "filtered_rephrases": [f"{form} {name}" for form in forms],
            }
            for at, name in enumerate(NAMES[:4])
        ],
    )
    nq = [{"question": f"form0 {name}", "answer": [MONEY[0]]} for name in NAMES[10:19]]
    write(folder / "nq.jsonl", nq)
    tokenizer = words.tokenizer([*NAMES, *MONEY, *forms], ends=True)
    t5(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def scotus_files(folder: Path) -> None:
    write(folder / "train.jsonl", [{"text": name, "label": 1} for name in NAMES[:9]])
    write(folder / "test.jsonl", [{"text": name, "label": at % 4} for at, name in enumerate(NAMES)])
    tokenizer = words.tokenizer(NAMES, ends=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_labels=4,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def hallucination_files(folder: Path) -> None:
    passages = [
        {
            "concept": name,
            "gpt3_sentences": ["coin1 .", "coin2 .", "coin3 ."],
            "annotation": ["accurate", "major_inaccurate", "minor_inaccurate"],
            "wiki_bio_text": f"coin1 {name} . coin4 {name} . coin5 {name} .",
        }
        for name in NAMES[:3]
    ]
    write(folder / "passages.jsonl", passages)
    texts = [{"text": f"{name} coin1 coin2 {name}"} for name in NAMES[5:11]]
    write(folder / "openwebtext.jsonl", texts)
    header = paper.HEADER.format("")
    tokenizer = words.tokenizer([*NAMES, *MONEY, ".", header], ends=False)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=3, eos_token_id=1, **sizes)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


MAKE = {"zsre": zsre_files, "scotus": scotus_files, "hallucination": hallucination_files}


@pytest.mark.parametrize("name", MAKE)
def test_a_task_of_the_paper_runs_on_files_of_its_schema(tmp_path, name):
    MAKE[name](tmp_path)
    task = paper.load(name, tmp_path)
    task = replace(task, edits=task.edits[:6], settings={"iterations": 30})
    untouched = metrics.mean(answering.scores(task, task.edits))
    figures = run(task, tmp_path / "out")
    assert figures["edits"] == min(6, len(task.edits)) > 1
    assert figures["epsilon"] > 0
    if name == "hallucination":
        assert figures["metric"] == "perplexity"
        assert figures["ARR"] > 1
        assert figures["ES"] < untouched
    elif name == "scotus":
        assert untouched == 0.0
        assert figures["ES"] > 0.5
    else:
        assert figures["ES"] > untouched or len(figures["not_learnt"]) == 6


def test_a_missing_file_is_named_with_its_place_and_its_fields(tmp_path):
    with pytest.raises(FileNotFoundError) as refused:
        paper.load("scotus", tmp_path)
    said = str(refused.value)
    assert f"{tmp_path / 'train.jsonl'} is not there" in said
    assert "train.jsonl with text, label; test.jsonl with text, label" in said
    assert f"tomh/scotus-bert comes from the hub, or from the folder {tmp_path / 'model'}" in said


def test_without_a_hub_it_says_where_the_model_goes(tmp_path, monkeypatch):
    scotus_files(tmp_path)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    unreachable = replace(paper.SOURCES["scotus"], model="no-such-folder")
    monkeypatch.setitem(paper.SOURCES, "scotus", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="scotus cannot start: no hub, and no model in"):
        paper.load("scotus", tmp_path)


def test_the_command_calibrates_a_model_on_files(tmp_path):
    zsre_files(tmp_path)
    sample = [
        {"prompt": f"form0 {name}", "target": MONEY[at % 6], "paraphrases": [f"form1 {name}"]}
        for at, name in enumerate(NAMES[:6])
    ]
    write(tmp_path / "edits.jsonl", sample)
    write(tmp_path / "others.jsonl", [{"prompt": f"form0 {name}"} for name in NAMES[10:]])
    files = [
        "--edits",
        str(tmp_path / "edits.jsonl"),
        "--unrelated",
        str(tmp_path / "others.jsonl"),
    ]
    layers = ["--layer", "decoder.block.{}.layer.2.DenseReluDense.wo"]
    plot = tmp_path / "trade.png"
    command = ["calibrate", str(tmp_path / "model"), *layers, *files, "--plot", str(plot), "--json"]
    result = CliRunner().invoke(cli.app, [*command, "--tries", "0"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["layer"].startswith("decoder.block.")
    assert len({trial["layer"] for trial in found["trials"]}) == 2
    assert found["err"] > 0
    assert found["learnt"] == {}
    assert plot.exists()
    tried = CliRunner().invoke(cli.app, [*command, "--tries", "1"])  # an untrained model learns not
    assert tried.exit_code == 1, tried.output
    found = json.loads(tried.stdout)
    assert not found["learnable"]
    assert found["learnt"] == {f"decoder.block.{at}.layer.2.DenseReluDense.wo": 0 for at in (0, 1)}


def test_the_command_says_what_it_does_not_know(tmp_path):
    result = CliRunner().invoke(cli.app, ["evaluate", "nothing", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "must be one of ('facts', 'labels', 'fabrications', 'zsre'" in result.output
