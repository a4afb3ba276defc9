"""`grace-fast edit` as a stream that lasts: interrupted, gone on with, begun anew, refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import models
import pytest
import words
from models import FAMILIES
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

import grace_fast as gf
from grace_fast.store.journal import JournalFile
from grace_fast.store.saved import read_newest
from grace_fast.tools import terminal
from grace_fast.tools.cli import app

FAMILY = FAMILIES["gpt2"]
HOW = ("--replacement", "replace_all", "--learning-rate", 0.3, "--iterations", 3)
AT_ONCE = 16  # edits of a process that is killed
BEGUN = ("--layer", FAMILY.layer, "--epsilon", FAMILY.epsilon, *HOW)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def save_model(folder, seed=0):
    models.build("gpt2", seed=seed).save_pretrained(folder)
    words.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def some_edits(count, seed=0):
    """Edits of drawn prompts; some say again what an earlier one said, some something else."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        prompt = " ".join(draw.choices(words.SENTENCE, k=draw.randint(4, 9)))
        again = draw.choice(found)["prompt"] if found and draw.random() < 0.2 else prompt
        found.append({"prompt": again, "target": draw.choice(words.SENTENCE)})
        if draw.random() < 0.1:
            found.append(dict(draw.choice(found)))
    return found[:count]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def edit(model, file, out, *more, begun=BEGUN):
    ran = call("edit", model, *begun, "--edits", file, "--out", out, *more, "--json")
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


def figures(ran):
    return json.loads(ran.stdout)


def decisions(out):
    """What every edit of a directory was decided to be, and every row of it as it is."""
    _, book, history = read_newest(out)
    edits = [
        (one.id, one.outcome, one.row, one.radius, one.label.tolist(), one.prompt)
        for one in history.edits.values()
    ]
    now = book.snapshot()
    rows = [now.row(at) for at in range(len(now))]
    return edits, [(row.live, row.radius, row.key.tolist(), row.label.tolist()) for row in rows]


@pytest.fixture
def after_append(monkeypatch):
    """Has something done after every version that is put on the disk, before it is seen."""
    done = []
    append = JournalFile.append

    def appended(self, *given, **named):
        append(self, *given, **named)
        for each in done:
            each(self)

    monkeypatch.setattr(JournalFile, "append", appended)
    return done.append


@pytest.mark.parametrize("at_once", [1, 5])
def test_what_a_kill_leaves_is_gone_on_with_to_the_same_decisions(
    model_folder, tmp_path, after_append, at_once
):
    """A copy of the directory, in the middle of an edit, is what a killed process leaves there."""
    file, out = write(tmp_path / "edits.jsonl", some_edits(24)), tmp_path / "out"
    left = []

    def copied(journal):
        if journal.version - journal.base in (1, 4, 24) and journal.path.parent == out:
            left.append(shutil.copytree(out, tmp_path / f"left-{len(left)}"))

    after_append(copied)
    edit(model_folder, file, out, "--batch-size", at_once)
    wanted = decisions(out)
    assert len(wanted[0]) == 24
    assert {one[1] for one in wanted[0]} >= {"added", "replaced", "reused"}
    assert len(left) >= 2
    for folder in left:
        there = len(decisions(folder)[0])
        again = figures(edit(model_folder, file, folder, "--batch-size", at_once))
        assert (again["edits"], again["made"], again["others"]) == (24, 24 - there, 0)
        assert decisions(folder) == wanted
        assert call("verify", folder).exit_code == 0
    assert figures(edit(model_folder, file, out))["made"] == 0
    assert decisions(out) == wanted


def program(model, file, out):
    told = ["edit", model, *BEGUN, "--edits", file, "--out", out, "--batch-size", AT_ONCE]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "grace_fast.tools.cli", *map(str, told), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(process, out, count):
    """Wait until a directory has a number of versions, or its process has ended."""
    while process.poll() is None:
        for file in out.glob("journal-*.sqlite"):
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as journal:
                try:
                    (found,) = journal.execute("SELECT count(*) FROM versions").fetchone()
                except sqlite3.OperationalError:  # it is being made
                    continue
            if found >= count:
                return
        time.sleep(0.1)


@pytest.mark.slow
def test_a_thousand_edits_killed_at_any_moment_are_made_once_each(model_folder, tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(1000)), tmp_path / "out"
    calm = tmp_path / "calm"
    assert figures(edit(model_folder, file, calm))["made"] == 1000
    draw, killed = random.Random(1), []
    for least in sorted(draw.sample(range(1, 900 // AT_ONCE), 4)):
        process = program(model_folder, file, out)
        wait_for(process, out, least)
        time.sleep(draw.random() / 20)
        process.kill()
        process.communicate()
        killed.append(len(decisions(out)[0]))
        assert process.returncode == -signal.SIGKILL
    assert killed == sorted(killed)
    assert killed[0] > 0
    assert killed[-1] < 1000
    last = figures(edit(model_folder, file, out))
    assert (last["edits"], last["made"]) == (1000, 1000 - killed[-1])
    assert decisions(out) == decisions(calm)
    assert call("verify", out).exit_code == 0


@pytest.mark.slow
def test_control_c_ends_a_process_with_what_is_done(model_folder, tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(1000)), tmp_path / "out"
    process = program(model_folder, file, out)
    wait_for(process, out, 3)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130
    told, there = json.loads(printed), len(decisions(out)[0])
    assert told["interrupted"]
    assert told["edits"] == there < 1000
    assert f"interrupted: {there:,} of 1,000 edits are in {out}; the same command goes on" in said


def interrupt(after_append, count):
    def interrupted(journal):
        if journal.version - journal.base == count:
            raise KeyboardInterrupt

    after_append(interrupted)


@pytest.mark.parametrize("restart", [False, True])
def test_an_interruption_is_told_in_words_and_as_json(
    model_folder, tmp_path, after_append, monkeypatch, restart
):
    file, out = write(tmp_path / "edits.jsonl", some_edits(12)), tmp_path / "out"
    interrupt(after_append, 8)
    ran = edit(model_folder, file, out, "--batch-size", 1, *["--restart"] * restart)
    assert ran.exit_code == 130
    there = len(decisions(out)[0])
    told = figures(ran)
    assert told["interrupted"]
    assert (told["edits"], told["wanted"], told["out"]) == (there, 12, str(out))
    assert there == 8  # though nobody was told of the last one
    how = " without --restart" if restart else ""
    goes_on = f"interrupted: {there} of 12 edits are in {out}; the same command{how} goes on"
    assert goes_on in ran.stderr
    monkeypatch.undo()
    again = edit(model_folder, file, out)
    assert (figures(again)["made"], figures(again)["interrupted"]) == (12 - there, False)


def test_an_interruption_before_the_first_edit_is_told(model_folder, tmp_path, monkeypatch):
    from grace_fast.tools.cli import editing

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(editing, "load_model", interrupted)
    file, out = write(tmp_path / "edits.jsonl", some_edits(3)), tmp_path / "out"
    ran = edit(model_folder, file, out)
    assert ran.exit_code == 130
    assert "interrupted: no edit was made" in ran.stderr
    assert not out.exists()
    assert figures(ran)["edits"] is None


def test_a_full_disk_ends_it_with_what_is_done(model_folder, tmp_path, monkeypatch):
    file, out = write(tmp_path / "edits.jsonl", some_edits(60)), tmp_path / "out"
    opened = JournalFile._opened

    def small(self, read_only):
        found = opened(self, read_only)
        found.execute("PRAGMA max_page_count = 16")
        return found

    monkeypatch.setattr(JournalFile, "_opened", small)
    ran = edit(model_folder, file, out)
    assert ran.exit_code == 1
    there = len(decisions(out)[0])
    assert 0 < there < 60
    assert "full" in figures(ran)["stopped"]
    assert figures(ran)["edits"] == there
    assert figures(ran)["refused"] == []
    assert f"{there} of 60 edits are in {out}; the same command goes on" in ran.stderr
    monkeypatch.undo()
    assert figures(edit(model_folder, file, out))["made"] == 60 - there


def test_no_memory_ends_it_with_what_is_done(model_folder, tmp_path, monkeypatch):
    file, out = write(tmp_path / "edits.jsonl", some_edits(6)), tmp_path / "out"
    edit_many = gf.Grace.edit_many

    def ended(self, edits, *given, **named):
        yield from edit_many(self, edits[:2], *given, **named)
        raise MemoryError("no room for one edit")

    monkeypatch.setattr(gf.Grace, "edit_many", ended)
    ran = edit(model_folder, file, out)
    assert ran.exit_code == 1
    assert (figures(ran)["made"], figures(ran)["stopped"]) == (2, "no room for one edit")
    assert f"2 of 6 edits are in {out}; the same command goes on" in ran.stderr


def test_lines_that_changed_between_runs_are_made_and_the_others_stay(model_folder, tmp_path):
    lines = [{"prompt": f"the capital of {name}", "target": name} for name in words.SENTENCE[3:7]]
    file, out = write(tmp_path / "edits.jsonl", lines), tmp_path / "out"
    edit(model_folder, file, out)
    changed = [lines[2], {**lines[0], "target": "user"}, {"prompt": "rome is", "target": "rome"}]
    ran = figures(edit(model_folder, write(file, [*changed, lines[3]]), out))
    assert (ran["edits"], ran["made"], ran["others"]) == (4, 2, 2)
    assert len(decisions(out)[0]) == 6


def test_every_duplicate_is_an_edit_of_its_own_and_is_made_once(
    model_folder, tmp_path, after_append, monkeypatch
):
    one = {"prompt": "the capital of france is", "target": "rome"}
    other = {**one, "target": "paris"}
    lines = [one, one, other, one, {**one, "joint": ""}]
    file, out = write(tmp_path / "edits.jsonl", lines), tmp_path / "out"
    interrupt(after_append, 3)
    edit(model_folder, file, out, "--batch-size", 1)
    monkeypatch.undo()
    there = len(decisions(out)[0])
    assert figures(edit(model_folder, file, out))["made"] == 5 - there
    assert len(decisions(out)[0]) == 5
    assert figures(edit(model_folder, file, out))["made"] == 0


def test_an_edit_that_was_undone_is_made_again(model_folder, tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(4)), tmp_path / "out"
    edit(model_folder, file, out)
    grace = gf.attach(models.build("gpt2"), FAMILY.layer, path=out)
    undone = grace.undo(1)
    grace.unload()
    again = figures(edit(model_folder, file, out))
    assert (again["edits"], again["made"]) == (4, 1)
    assert decisions(out)[0][-1][4:] == (undone.label.tolist(), undone.prompt)


def test_a_compacted_directory_and_one_that_was_saved_are_gone_on_with(model_folder, tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(6)), tmp_path / "out"
    edit(model_folder, write(tmp_path / "fewer.jsonl", some_edits(6)[:4]), out)
    assert call("compact", out).exit_code == 0
    model = models.build("gpt2")
    grace = gf.from_pretrained(model, out)
    grace.save_pretrained(tmp_path / "saved")
    for folder in (out, tmp_path / "saved"):
        again = figures(edit(model_folder, file, folder))
        assert (again["edits"], again["made"]) == (6, 2)


def test_what_was_there_before_is_told(model_folder, tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(3)), tmp_path / "out"
    told = ["edit", model_folder, *BEGUN, "--edits", file, "--out", out]
    assert "3 edits on" in call(*told).stdout
    again = call(*told).stdout
    assert again.endswith(f" keys are in {out}, 3 of them from before\n")
    assert len(again.splitlines()) == 1
    write(file, some_edits(3)[:2])
    fewer = call(*told).stdout
    assert f"2 of them from before; edits there that {file} does not ask for: 1" in fewer


KINDS = {
    "bert": ("bert.encoder.layer.1.output.dense", {"target": [0, "1", 2.0, "LABEL_3"]}),
    "score": ("bert.encoder.layer.1.output.dense", {"target": [0.5, -1, "2.25", 0.0]}),
    "llama": ("model.layers.1.mlp.down_proj", {}),
    "t5-encoder": ("encoder.block.1.layer.1.DenseReluDense.wo", {}),
    "t5-decoder": ("decoder.block.1.layer.2.DenseReluDense.wo", {}),
}


def model_of(kind):
    if kind != "score":
        return models.build(kind)
    config = models.build("bert").config
    config.num_labels, config.problem_type = 1, "regression"
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_of_every_kind_of_model_are_found_again(tmp_path, kind):
    """Prompts and targets of several lengths stand in one batch, with padding."""
    layer, given = KINDS[kind]
    model_of(kind).save_pretrained(tmp_path / "model")
    words.tokenizer().save_pretrained(tmp_path / "model")
    lines = [
        {"prompt": " ".join(words.SENTENCE[: at + 3]), "target": " ".join(words.SENTENCE[at:7])}
        for at in range(4)
    ]
    for line, target in zip(lines, given.get("target", []), strict=False):
        line["target"] = target
    # Where a decoder asks there is no token before, and this becomes replace_last.
    begun = ("--layer", layer, "--epsilon", 0.02, "--replacement", "replace_prompt", *HOW[2:])
    file, out = write(tmp_path / "edits.jsonl", lines), tmp_path / "out"
    first = figures(edit(tmp_path / "model", file, out, begun=begun))
    assert first["refused"] == []
    assert first["made"] == 4
    again = figures(edit(tmp_path / "model", file, out, begun=begun))
    assert (again["made"], again["edits"], again["others"]) == (0, 4, 0)


def csv(lines):
    return "prompt,target\n" + "".join(f"{each['prompt']},{each['target']}\n" for each in lines)


def chat(lines):
    asked = [[{"role": "user", "content": each["prompt"]}] for each in lines]
    return json.dumps(
        [{"messages": one, "target": of["target"]} for one, of in zip(asked, lines, strict=True)]
    )


@pytest.mark.parametrize(
    ("name", "written"),
    [("edits.csv", csv), ("edits.json", lambda lines: json.dumps(lines, indent=1)), ("c", chat)],
)
def test_any_file_of_edits_is_gone_on_with(model_folder, tmp_path, name, written):
    lines, out = some_edits(6), tmp_path / "out"
    file = tmp_path / name
    file.write_text(written(lines[:4]))
    assert figures(edit(model_folder, file, out))["made"] == 4
    file.write_text(written(lines))
    again = figures(edit(model_folder, file, out))
    assert (again["edits"], again["made"], again["others"]) == (6, 2, 0)


def test_paraphrases_are_edits_of_their_own(model_folder, tmp_path):
    lines = [
        {"prompt": "the capital of france", "target": "rome", "paraphrases": ["france", "capital"]},
        {"prompt": "capital of", "target": "rome", "paraphrases": None},
        {"prompt": "is", "target": "rome", "paraphrases": 3},
        {"prompt": "rome is", "target": "paris", "paraphrases": ["the " * 2000]},
    ]
    file, out = write(tmp_path / "edits.jsonl", lines), tmp_path / "out"
    ran = edit(model_folder, file, out, "--store-text")
    assert ran.exit_code == 1
    assert [one["text"] for one in json.loads(call("info", out, "--json").stdout)["edits"]] == [
        ["the capital of france", "rome"],
        ["france", "rome"],
        ["capital", "rome"],
        ["capital of", "rome"],
        ["rome is", "paris"],
    ]
    assert "line 3 must have a list of texts as its paraphrases, got 3" in ran.stderr
    assert f"{file}, line 4, paraphrase 1: the model takes at most" in ran.stderr
    assert figures(edit(model_folder, file, out))["made"] == 0


BAD = [
    ("{", "line 2 is not JSON"),
    ('{"prompt": "the"}', "line 3 must be an object with a prompt and a target"),
    ('{"prompt": "the", "target": ""}', "line 4 has no target"),
    ('{"prompt": "\\ud800", "target": "rome"}', "line 5: prompt and target must be Unicode"),
    ('{"messages": [{"role": 3, "content": {}}], "target": "a"}', "line 6: "),
    (json.dumps({"prompt": "the " * 2000, "target": "rome"}), "line 7: the model takes at most"),
]


@pytest.fixture
def mixed(tmp_path):
    """Edits of which only the first and the last line can be made."""
    good = [json.dumps({"prompt": f"the capital of {name}", "target": name}) for name in "ab"]
    file = tmp_path / "edits.jsonl"
    file.write_text("\n".join([good[0], *(line for line, _ in BAD), good[1]]) + "\n")
    return file


def test_bad_lines_are_named_at_every_run_and_the_others_are_made_once(
    model_folder, tmp_path, mixed
):
    model = tmp_path / "strict-template"
    shutil.copytree(model_folder, model)
    tokenizer = words.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles are texts') }}"
    tokenizer.save_pretrained(model)
    out = tmp_path / "out"
    for made in (2, 0):
        ran = edit(model, mixed, out)
        assert ran.exit_code == 1
        told = figures(ran)
        assert (told["made"], told["edits"], len(told["refused"])) == (made, 2, len(BAD))
        for _, why in BAD:
            assert f"error: {mixed}, {why}" in ran.stderr
        every = ", ".join(f"line {at}" for at in range(2, 8))
        assert f"left out: {every} of {mixed}" in ran.stderr
    assert call("verify", out).exit_code == 0


def test_strictly_what_the_tokens_tell_ends_it_before_the_first_edit(model_folder, tmp_path):
    lines = [{"prompt": "the", "target": "rome"}, {"prompt": "\ud800", "target": "rome"}]
    file, out = write(tmp_path / "edits.jsonl", lines), tmp_path / "out"
    ran = edit(model_folder, file, out, "--strict")
    assert ran.exit_code == 1
    assert f"{file}, line 2: prompt and target must be Unicode" in ran.stderr
    assert "error: nothing was edited" in ran.stderr
    assert not out.exists()


def test_what_is_not_learnt_is_named_by_its_line_at_every_run(model_folder, tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(3)), tmp_path / "out"
    begun = ("--layer", FAMILY.layer, "--iterations", 0)
    for made in (3, 0):
        ran = edit(model_folder, file, out, begun=begun)
        assert ran.exit_code == 1
        assert figures(ran)["made"] == made
        assert figures(ran)["not_learnt"] == [0, 1, 2]
        assert figures(ran)["not_learnt_at"] == ["line 1", "line 2", "line 3"]
        assert f"not learnt: {file}, line 2: edit 1, loss " in ran.stderr


def test_restart_forgets_what_is_there_and_nothing_of_anybody_else(model_folder, tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(5)), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    edit(model_folder, write(tmp_path / "first.jsonl", some_edits(7, seed=1)), out)
    other = save_model(tmp_path / "other", seed=3)
    refused = edit(other, file, out)
    assert refused.exit_code == 1
    assert f"{out} is of another model: " in refused.stderr
    assert len(decisions(out)[0]) == 7
    again = ("--layer", FAMILY.layer, "--epsilon", 0.01, "--iterations", 2)
    told = figures(edit(other, file, out, "--restart", begun=again))
    assert (told["edits"], told["made"], told["others"], told["epsilon"]) == (5, 5, 0, 0.01)
    assert len(decisions(out)[0]) == 5
    assert (out / "notes.txt").read_text() == "mine"
    assert figures(edit(other, file, out, begun=again))["made"] == 0


def test_restart_refuses_what_is_no_codebook_of_edits(model_folder, tmp_path):
    file = write(tmp_path / "edits.jsonl", some_edits(2))
    foreign, alone = tmp_path / "foreign", tmp_path / "alone"
    foreign.mkdir()
    (foreign / "grace_config.json").write_text("{}")
    gf.Codebook(4, 4).save(alone)
    signed = tmp_path / "signed"
    grace = gf.attach(models.build("gpt2"), FAMILY.layer)
    grace.save_pretrained(signed, hmac_key=b"0123456789abcdef")
    for folder in (foreign, alone, signed):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for more in ([], ["--restart"]):
            assert edit(model_folder, file, folder, *more).exit_code == 1
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
        assert after == {name: held for name, held in before.items() if name != "lock"}


def test_a_layer_without_declared_widths_begins_anew_at_its_first_edit(model_folder, tmp_path):
    begun = ("--layer", "transformer.h.1.mlp", "--epsilon", 0.05, *HOW)
    file, out = write(tmp_path / "edits.jsonl", some_edits(4)), tmp_path / "out"
    assert figures(edit(model_folder, file, out, begun=begun))["made"] == 4
    assert figures(edit(model_folder, file, out, begun=begun))["made"] == 0
    told = figures(edit(model_folder, file, out, "--restart", begun=begun))
    assert (told["made"], told["others"]) == (4, 0)
    assert len(decisions(out)[0]) == 4


def test_a_directory_that_somebody_edits_is_refused_and_stays(model_folder, tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(2)), tmp_path / "out"
    holder = gf.attach(models.build("gpt2"), FAMILY.layer, FAMILY.epsilon, path=out)
    for more in ([], ["--restart"]):
        ran = call(
            "edit", model_folder, "--layer", FAMILY.layer, "--edits", file, "--out", out, *more
        )
        assert ran.exit_code == 1
        assert f"{out} is being edited by process {os.getpid()}" in ran.stderr
    holder.unload()


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--epsilon", 0.5, f"epsilon = {FAMILY.epsilon}, and --epsilon now says 0.5"),
        ("--iterations", 4, "iterations = 3, and --iterations now says 4"),
        ("--learning-rate", 1, "learning_rate = 0.3, and --learning-rate now says 1.0"),
        ("--replacement", "replace_last", "'replace_all', and --replacement now says 'replace_l"),
        ("--value-init", "warm", "value_init = 'cold', and --value-init now says 'warm'"),
        ("--schedule", "paper", "iterations = 3, and --schedule paper now says 100"),
    ],
)
def test_settings_of_the_directory_hold_and_others_are_refused(
    model_folder, tmp_path, option, value, told
):
    file, out = write(tmp_path / "edits.jsonl", some_edits(2)), tmp_path / "out"
    edit(model_folder, write(tmp_path / "first.jsonl", some_edits(2)[:1]), out)
    ran = edit(model_folder, file, out, option, value, begun=("--layer", FAMILY.layer))
    assert ran.exit_code == 1
    assert told in ran.stderr
    assert "--restart" in ran.stderr
    assert len(decisions(out)[0]) == 1
    left_out = figures(edit(model_folder, file, out, begun=("--layer", FAMILY.layer)))
    assert (left_out["made"], left_out["epsilon"]) == (1, FAMILY.epsilon)


def test_a_fast_schedule_holds_and_another_is_refused(model_folder, tmp_path):
    file = write(tmp_path / "edits.jsonl", some_edits(6))
    begun = ("--layer", FAMILY.layer, "--epsilon", FAMILY.epsilon, "--replacement", "replace_all")
    for name, other in (("fast", "paper"), ("paper", "fast")):
        out = tmp_path / name
        assert figures(edit(model_folder, file, out, "--schedule", name, begun=begun))["made"] == 6
        for again in (["--schedule", name], []):
            assert figures(edit(model_folder, file, out, *again, begun=begun))["made"] == 0
        refused = edit(model_folder, file, out, "--schedule", other, begun=begun)
        assert refused.exit_code == 1
        assert f"and --schedule {other} now says" in refused.stderr


def test_another_layer_is_refused_and_the_same_in_other_words_is_not(model_folder, tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(2)), tmp_path / "out"
    edit(model_folder, file, out)
    other = edit(model_folder, file, out, begun=("--layer", "transformer.h.2.mlp.c_proj"))
    assert other.exit_code == 1
    assert f"--layer {FAMILY.layer} to go on there" in other.stderr
    alike = FAMILY.layer.replace("h.1", "h[1]") + ".weight"
    assert figures(edit(model_folder, file, out, begun=("--layer", alike)))["made"] == 0


def test_epsilon_is_measured_once_and_holds(model_folder, tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(3)), tmp_path / "out"
    texts = [one["prompt"] for one in some_edits(12, seed=5)]
    lines, records = tmp_path / "unrelated.txt", tmp_path / "unrelated.jsonl"
    lines.write_text("\n\n".join(texts) + "\n")
    write(records, [{"prompt": text} for text in texts])
    auto = ("--layer", FAMILY.layer, "--iterations", 2, "--epsilon", "auto", "--unrelated")
    first = figures(edit(model_folder, file, out, begun=(*auto, lines)))
    assert first["made"] == 3
    grace = gf.attach(
        models.build("gpt2"),
        FAMILY.layer,
        "auto",
        words.tokenizer(),
        calibration_inputs=texts,
    )
    assert first["epsilon"] == pytest.approx(grace.settings.epsilon)
    anew = figures(edit(model_folder, file, tmp_path / "anew", begun=(*auto, records)))
    assert anew["epsilon"] == first["epsilon"]
    lines.unlink()
    again = figures(edit(model_folder, file, out, begun=(*auto, lines)))
    assert (again["made"], again["epsilon"]) == (0, first["epsilon"])


def test_wrong_calls_are_told_before_the_model_is_loaded(tmp_path):
    file, out = write(tmp_path / "edits.jsonl", some_edits(3)), tmp_path / "out"
    few = tmp_path / "few.txt"
    few.write_text("the capital\nof france\n")
    odd = write(tmp_path / "odd.jsonl", [{"prompt": "the"}, {"prompt": 3}, {"prompt": ""}])
    layer = ("--layer", "x")
    for more, code, told in (
        (["--epsilon", "auto"], 2, "--epsilon auto needs --unrelated FILE"),
        (["--unrelated", few], 2, "--unrelated is what --epsilon auto is measured on"),
        (
            ["--epsilon", "auto", "--unrelated", few],
            1,
            f"at least 8 unrelated texts, {few} holds 2",
        ),
        (["--epsilon", "auto", "--unrelated", odd], 1, f"{odd}, line 2 must have a text as its"),
        (["--epsilon", "auto", "--unrelated", out], 1, "cannot read the unrelated texts"),
        (["--epsilon", "one"], 2, "--epsilon must be a number or auto, got 'one'"),
        (["--schedule", "slow"], 2, "--schedule must be one of paper, fast, got 'slow'"),
        (["--batch-size", "0"], 2, "--batch-size must be a whole number from 1, or auto, got '0'"),
        (["--batch-size", "x"], 2, "--batch-size must be a whole number from 1, or auto, got 'x'"),
    ):
        ran = edit(tmp_path / "absent", file, out, *more, begun=layer)
        assert ran.exit_code == code, more
        assert told in ran.stderr
        assert "cannot load the model" not in ran.stderr
        assert not out.exists()


def test_the_bar_shows_edits_a_second_and_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with terminal.rate_bar("edits", 1000, 412, "edits") as ticks:
        ticks.start_t -= 10  # seconds
        for _ in range(64):  # a batch, all at once
            ticks.update()
    last = capsys.readouterr().err.split("\r")[-1]
    assert "476/1000" in last
    assert "edits/s" in last
    rate = float(last.rpartition(",")[2].split("edits/s")[0])
    assert rate == pytest.approx(6.4, rel=0.05)  # what was done before is not of this run
    assert "00:10<01:2" in last
