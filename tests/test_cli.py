"""The command line, from a model on the disk to a verified codebook, and its refusals."""

from __future__ import annotations

import json

import models
import pytest
import words
from models import FAMILIES
from typer.testing import CliRunner

from grace_fast.cli import app


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
