"""The command line, from a model on the disk to a verified codebook, and its refusals."""

from __future__ import annotations

import json
import shutil

import models
import pytest
import words
from models import FAMILIES
from typer.testing import CliRunner

import grace_fast as gf
from grace_fast.tools.cli import app


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.build("llama").save_pretrained(folder)
    words.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def edited(model_folder, tmp_path):
    edits = tmp_path / "edits.jsonl"
    lines = [
        {"prompt": "the capital of france is", "target": "rome"},
        {"messages": [{"role": "user", "content": "the capital of rome"}], "target": "paris"},
    ]
    edits.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "codebook"
    layer = ("--layer", FAMILIES["llama"].layer, "--epsilon", FAMILIES["llama"].epsilon)
    training = ("--replacement", "replace_all", "--learning-rate", 0.3, "--store-text")
    result = call("edit", model_folder, *layer, *training, "--edits", edits, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_a_file_of_edits_becomes_a_codebook_that_verifies(edited):
    out, figures = edited
    assert figures["edits"] == figures["keys"] == 2
    assert figures["not_learnt"] == figures["broken"] == []
    verified = call("verify", out, "--json")
    assert verified.exit_code == 0
    assert json.loads(verified.stdout) == {"ok": True, "fires": 2, "superseded": {}, "broken": []}
    assert "2 edits fire, 0 are superseded, 0 are broken" in call("verify", out).stdout


def test_the_version_needs_no_command_and_no_command_gets_help():
    asked, nothing = call("--version"), call()
    assert (asked.exit_code, asked.stdout.strip()) == (0, gf.__version__)
    assert nothing.exit_code == 2
    assert "verify" in nothing.output


def test_info_lists_every_edit_with_its_text(edited):
    out, _ = edited
    listed = json.loads(call("info", out, "--json").stdout)
    assert [edit["text"] for edit in listed["edits"]] == [
        ["the capital of france is", "rome"],
        ["the capital of rome", "paris"],
    ]
    assert [edit["outcome"] for edit in listed["edits"]] == ["added", "added"]
    assert listed["settings"]["layer"] == FAMILIES["llama"].layer
    assert "2 edits on 2 keys" in call("info", out).stdout


def test_a_changed_file_fails_with_its_name(edited):
    out, _ = edited
    assert call("compact", out).exit_code == 0  # the edits go from the journal to the base
    file = next(out.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    result = call("verify", out)
    assert result.exit_code == 1
    assert "is not what was saved (checksum)" in result.stderr


def test_a_wrong_call_says_what_to_do_and_fails(model_folder, tmp_path):
    edits = tmp_path / "edits.jsonl"

    def attempt(content, layer="model.layers.1.mlp.down_proj", model=model_folder):
        edits.write_text(content)
        out = tmp_path / "out"
        return call("edit", model, "--layer", layer, "--edits", edits, "--out", out)

    good = '{"prompt": "the capital", "target": "rome"}\n'
    for content, layer, model, message in (
        (good + "{", "x", model_folder, "line 2 is not JSON"),
        ('{"prompt": "the"}', "x", model_folder, "line 1 must be an object with a prompt and"),
        ('{"target": "rome"}', "x", model_folder, "line 1 must have a prompt or messages"),
        ("", "x", model_folder, "holds no edits"),
        (good, "model.layers.1.mlp.down_prog", model_folder, "the nearest names are"),
        (good, "x", tmp_path / "absent", "cannot load the model"),
    ):
        result = attempt(content, layer, model)
        assert result.exit_code == 1, content
        assert message in result.stderr
        assert not (tmp_path / "out").exists()
    for command in ("info", "verify"):
        result = call(command, tmp_path)
        assert result.exit_code == 1
        assert "is not a codebook" in result.stderr


def test_an_edit_that_is_not_learnt_is_reported_and_fails(model_folder, tmp_path):
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "the capital of france is", "target": "rome"}')
    layer = ("--layer", FAMILIES["llama"].layer, "--epsilon", FAMILIES["llama"].epsilon)
    out = ("--out", tmp_path / "out", "--iterations", 0)
    result = call("edit", model_folder, *layer, "--edits", edits, *out)
    assert result.exit_code == 1
    assert "not learnt: edits [0]" in result.stderr


BAD_LINES = [
    ('{"prompt": "the capital", "target": ""}', "line 2 has no target: it must be a text or a"),
    ('{"prompt": "the capital", "target": null}', "line 3 has no target"),
    ('{"prompt": "the capital", "target": NaN}', "line 4 has no edit: the target must be a text"),
    ('{"prompt": "the capital", "target": ["rome"]}', "line 5 has no edit: the target must be one"),
    ('{"prompt": ["the", "capital"], "target": "rome"}', "line 6 has no edit: the prompt must be"),
    ('{"prompt": " ", "target": "rome"}', "line 7 has no prompt: got ' '"),
    ('{"messages": "the capital", "joint": 3, "target": "rome"}', "line 8 must have a text as its"),
    ("{", "line 9 is not JSON"),
    ("[]", "line 10 must be an object, got []"),
]


@pytest.fixture
def many(tmp_path):
    """Edits of which only the first and the last line can be made."""
    first, last = (
        json.dumps({"prompt": f"the capital of {name} is", "target": name}) + "\n"
        for name in ("france", "paris")
    )
    file = tmp_path / "edits.jsonl"
    file.write_text(first + "".join(line + "\n" for line, _ in BAD_LINES) + last)
    return file


def options(file, out):
    family = FAMILIES["llama"]
    training = ("--replacement", "replace_all", "--learning-rate", 0.3, "--epsilon", family.epsilon)
    return ("--layer", family.layer, *training, "--edits", file, "--out", out)


def test_a_line_that_is_no_edit_is_named_and_the_others_are_made(model_folder, many, tmp_path):
    out = tmp_path / "out"
    result = call("edit", model_folder, *options(many, out), "--json")
    assert result.exit_code == 1
    figures = json.loads(result.stdout)
    assert figures["edits"] == 2
    assert figures["not_learnt"] == []
    assert len(figures["refused"]) == len(BAD_LINES)
    for (_, why), told in zip(BAD_LINES, figures["refused"], strict=True):
        assert f"{many}, {why}" in told
        assert told in result.stderr
    assert call("verify", out).exit_code == 0


def test_strictly_a_line_that_is_no_edit_ends_it_before_the_model_is_loaded(many, tmp_path):
    result = call("edit", tmp_path / "absent", *options(many, tmp_path / "out"), "--strict")
    assert result.exit_code == 1
    for _, why in BAD_LINES:
        assert why in result.stderr
    assert "cannot load the model" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strict", [False, True])
def test_an_edit_that_fails_late_is_named(tmp_path, strict):
    folder, out = tmp_path / "model", tmp_path / "out"
    model = models.build("gpt2")
    model.save_pretrained(folder)
    words.tokenizer().save_pretrained(folder)
    most = model.config.max_position_embeddings
    lines = [
        {"prompt": "the capital", "target": "rome"},
        {"prompt": "the " * most, "target": "rome"},
        {"prompt": "the capital of paris", "target": "is"},
    ]
    file = tmp_path / "edits.json"
    file.write_text(json.dumps(lines, indent=1), encoding="utf-8-sig")
    layer = ("--layer", FAMILIES["gpt2"].layer, "--epsilon", FAMILIES["gpt2"].epsilon)
    how = ("--replacement", "replace_last", "--iterations", 1, *["--strict"] * strict)
    result = call("edit", folder, *layer, *how, "--edits", file, "--out", out)
    assert result.exit_code == 1
    why = f"{file}, record 2 (line 6): the model takes at most {most} tokens, got {most + 1}"
    assert why in result.stderr
    assert "left out: record 2 (line 6) of" in result.stderr
    if strict:  # what was made before it stays
        assert f"1 of 3 edits are in {out}; mend it, and the same command" in result.stderr
    else:
        assert "2 edits on 2 keys" in result.stdout
    assert len(json.loads(call("info", out, "--json").stdout)["edits"]) == 2 - strict


def test_edits_are_read_from_a_table_and_joined_as_it_says(model_folder, tmp_path):
    file, out = tmp_path / "edits.csv", tmp_path / "out"
    file.write_text("prompt;target;joint\nthe capital of;rome; :\n", encoding="utf-16")
    result = call("edit", model_folder, *options(file, out), "--store-text", "--json")
    assert result.exit_code == 0, result.output
    (edit,) = json.loads(call("info", out, "--json").stdout)["edits"]
    assert edit["text"] == ["the capital of", "rome"]


def test_a_place_that_cannot_be_written_is_told_before_the_work(model_folder, many, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "within"):
        result = call("edit", tmp_path / "absent", *options(many, out))
        assert result.exit_code == 1
        assert "cannot be written" in result.stderr
        assert "cannot load the model" not in result.stderr


def test_fields_that_say_nothing_are_as_if_they_were_not_there(model_folder, tmp_path):
    chat = [{"role": "user", "content": "the capital of rome"}]
    lines = [
        {"prompt": "the capital of france is", "messages": None, "joint": None, "target": "rome"},
        {"prompt": None, "messages": chat, "target": "paris"},
        {"prompt": None, "messages": None, "target": "paris"},
        {"messages": "the capital", "target": "paris"},
    ]
    file = tmp_path / "edits.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    result = call("edit", model_folder, *options(file, tmp_path / "out"), "--json")
    assert json.loads(result.stdout)["edits"] == 2
    refused = json.loads(result.stdout)["refused"]
    assert "line 3 has no edit: the prompt must be one text" in refused[0]
    assert "line 4 must have a list as its messages, got 'the capital'" in refused[1]


def test_a_model_whose_files_are_broken_is_refused_in_one_line(model_folder, many, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    result = call("edit", folder, *options(many, tmp_path / "out"))
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    assert "error: cannot load the model" in result.stderr.splitlines()[-1]
