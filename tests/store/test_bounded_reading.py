"""What foreign bytes may take: memory that a stated limit bounds, numbers with room behind them."""

from __future__ import annotations

import json
import random
import re
import struct
import tracemalloc
import zipfile

import golden_codebooks as golden
import pytest
import torch
from changes import change_config, leave_state, put, replace_tensor
from damages import MANY_BYTES, dense, each_damage
from safetensors.torch import save_file

import grace_fast as gf
from grace_fast.codebook.checks import MAX_COUNTER, MAX_NUMBER
from grace_fast.compat import easyedit
from grace_fast.edits.history import History
from grace_fast.store import archive, files, headers, manifest, strict_json, tensor_files
from grace_fast.store.large import resident
from grace_fast.store.records import redo
from grace_fast.store.saved import read_saved
from grace_fast.tools.evaluate import records, stream


def peak_of(call, error, match):
    """The most memory that a call takes until it refuses, in bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def few_values(monkeypatch):
    """As many values as a text of some megabytes may not have."""
    monkeypatch.setattr(strict_json, "MOST_VALUES", 1 << 16)
    monkeypatch.setattr(strict_json, "_MOST_IN_LINE", 1 << 16)


@each_damage("many values")
def test_a_manifest_of_many_values_is_refused_before_one_is_made(damage, tmp_path, few_values):
    damage.do(tmp_path)
    for ask in (files.read_config, read_saved, gf.Codebook.open):
        used = peak_of(lambda ask=ask: ask(tmp_path), gf.CodebookCorrupt, damage.message)
        assert used < 2.5 * MANY_BYTES


def test_values_in_a_text_are_none(tmp_path):
    text = json.dumps({"a": '[{,"\\' * 50_000, "b\\": ["x", 1]}).encode()
    assert strict_json.outline(text, 10) == b"{[]}"
    assert strict_json.parse(text, 2)["b\\"] == ["x", 1]


@pytest.mark.parametrize("block_bytes", [1, 2, 7, 64])
def test_the_outline_of_a_text_is_its_brackets_wherever_its_blocks_end(block_bytes, monkeypatch):
    monkeypatch.setattr(strict_json, "_BLOCK_BYTES", block_bytes)
    strings = re.compile(r'"(?:[^"\\]|\\.)*"')
    drawn = random.Random(block_bytes)
    for _ in range(300):
        texts = [
            "".join(drawn.choice('a"\\,[{]}é') for _ in range(drawn.randrange(9))) for _ in "abc"
        ]
        text = json.dumps([dict.fromkeys(texts, texts), [], {}], ensure_ascii=False)
        wanted = re.sub(r"[^][{}]", "", strings.sub("", text))
        assert strict_json.outline(text.encode()) == wanted.encode()


def test_what_is_sealed_can_be_read_again(monkeypatch):
    monkeypatch.setattr(strict_json, "MOST_VALUES", 100)
    texts = {str(number): ["a", "b"] for number in range(60)}
    with pytest.raises(ValueError, match="would not be read again: it holds more than 100 values"):
        manifest.seal({"texts": texts})


def test_a_header_of_many_values_is_refused_before_one_is_made(few_values):
    text = b'{"a": ' + dense(b"[[]],") + b"}"
    content = struct.pack("<Q", len(text)) + text
    used = peak_of(lambda: headers.check(content), gf.CodebookCorrupt, "holds more than 65536")
    assert used < 3.5 * MANY_BYTES


def test_a_line_of_many_values_is_refused_before_one_is_made(few_values, tmp_path):
    place = tmp_path / "records.jsonl"
    place.write_bytes(b'{"prompt": "a"}\n' + dense(b"[[]],") + b"\n")

    def ask():
        records.read(place, {"prompt": records.text})

    used = peak_of(ask, ValueError, "line 2 is not JSON: it holds more than 65536")
    assert used < 5 * MANY_BYTES


def test_the_state_of_a_build_is_no_longer_than_a_manifest(tmp_path, monkeypatch):
    leave_state(tmp_path, b'"' + b"x" * 5000 + b'"')
    monkeypatch.setattr(manifest, "MAX_BYTES", 4000)
    with pytest.raises(gf.CodebookCorrupt, match=r"is not the state of a build; remove"):
        gf.Codebook.build(
            tmp_path, [(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1))], progress=False
        )


def test_hparams_of_many_bytes_are_refused_unparsed(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"a: [" + b"[]," * 50_000 + b"]")
    with pytest.raises(ValueError, match="is not YAML: it has more than 65536 bytes"):
        easyedit.GraceHyperParams.from_hparams(tmp_path / "a.yaml")


def test_a_packed_codebook_of_very_many_members_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "packed", "w") as packed:
        for number in range(12_000):
            packed.writestr(f"{number:090}", b"")
    with pytest.raises(gf.CodebookCorrupt, match="lists its members in more than"):
        archive.unpack(tmp_path / "packed", tmp_path / "made")
    assert not (tmp_path / "made").exists()


# Checkpoints of evaluations


def checkpoint(folder):
    stream.Progress("recipe", done=50, codebook="codebook-000050").write(folder)


@each_damage("checkpoint")
def test_a_checkpoint_that_is_none_is_refused_in_words(damage, tmp_path):
    checkpoint(tmp_path)
    damage.do(tmp_path)
    with pytest.raises(ValueError, match=damage.message):
        stream.Progress.read(tmp_path, "recipe")


def test_a_checkpoint_of_many_values_or_bytes_is_refused(tmp_path, few_values, monkeypatch):
    checkpoint(tmp_path)
    (tmp_path / stream.STATE).write_bytes(dense(b"[[]],"))
    with pytest.raises(ValueError, match="holds more than 65536"):
        stream.checkpoint(tmp_path / stream.STATE)
    monkeypatch.setattr(stream, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="has more than 1000 bytes"):
        stream.checkpoint(tmp_path / stream.STATE)


def test_a_checkpoint_is_written_through_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".{stream.STATE}").symlink_to(tmp_path / "mine")
    checkpoint(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
    assert stream.Progress.read(tmp_path, "recipe").done == 50


# Numbers at their ends

LAST = MAX_COUNTER - 1


def attach(folder):
    return gf.attach(golden.Model().eval(), golden.LAYER, path=folder, tokenizer=golden.tokens)


@each_damage("counter")
def test_a_counter_past_its_end_is_refused_at_opening(damage, journalled):
    damage.do(journalled)
    for ask in (attach, gf.Codebook.open, lambda folder: read_saved(folder).codebook()):
        with pytest.raises(gf.CodebookCorrupt, match=damage.message):
            ask(journalled)


def with_the_last(field, folder):
    """A directory one of whose counters is the last there may be."""
    grace = golden.editor(path=folder)
    grace.compact()
    grace.unload()
    if field == "row":
        replace_tensor(folder, "tensors", "rows.id", put(-1, MAX_NUMBER - 1))
    elif field == "version":
        change_journal_base(folder)
    else:
        change_config(folder, next_id=LAST)


def change_journal_base(folder):
    from grace_fast.store.journal import JournalFile

    name = "0" * 16
    path = folder / f"journal-{name}.sqlite"
    JournalFile.create(path, name, LAST).close()
    change_config(folder, version=LAST, journal={"file": path.name, "name": name})


@pytest.mark.parametrize("field", ["next_id", "row", "version"])
def test_no_edit_is_acknowledged_that_could_not_be_read_again(field, tmp_path):
    with_the_last(field, tmp_path)
    grace = attach(tmp_path)
    before = [edit.id for edit in grace.edits()]
    with pytest.raises(ValueError, match="holds numbers below"):
        grace.edit("15", 3)
    assert [edit.id for edit in grace.edits()] == before
    grace.unload()
    again = attach(tmp_path)
    assert [edit.id for edit in again.edits()] == before
    again.unload()


LEAST = -(2**63)


@pytest.mark.parametrize("name", ["edits.id", "rows.id"])
def test_ids_whose_differences_wrap_around_do_not_ascend(name, tmp_path):
    grace = golden.editor(path=tmp_path)
    grace.compact()
    grace.unload()
    replace_tensor(tmp_path, "tensors", name, put(-1, LEAST))
    with pytest.raises(gf.CodebookCorrupt, match=f"{name} must ascend"):
        read_saved(tmp_path).codebook()


def test_rows_of_a_version_whose_differences_wrap_around_do_not_ascend():
    book = gf.Codebook(2, 2)
    book.append(torch.zeros(10, 2), torch.zeros(10, 2), torch.zeros(10))
    content = tensor_files.serialised({"rows": torch.tensor([5, LEAST, -1, 7])})
    with (
        pytest.raises(gf.CodebookCorrupt, match="rows must ascend within the 10"),
        book.writing() as draft,
    ):
        redo(content, draft, History())


def test_hits_stop_at_the_last_number(tmp_path):
    golden.editor(path=tmp_path).unload()
    change_config(tmp_path, hits={"0": MAX_NUMBER - 1})
    grace = attach(tmp_path)
    grace.hits[0] += 5
    grace.unload()
    again = attach(tmp_path)
    assert again.hits[0] == MAX_NUMBER - 1
    again.unload()


def test_an_event_of_an_edit_that_is_yet_to_come_is_refused(tmp_path):
    golden.editor().save_pretrained(tmp_path)
    later = files.read_config(tmp_path)["next_id"]
    edits = files.read_tensors(tmp_path, files.read_config(tmp_path))["events.edit"]

    def change(numbers):
        return torch.where(numbers == int(edits.max()), later, numbers)

    replace_tensor(tmp_path, "tensors", "events.edit", change)
    with pytest.raises(gf.CodebookCorrupt):
        read_saved(tmp_path).codebook()


def test_a_file_that_is_to_be_written_on_has_one_name(tmp_path):
    work = tmp_path / resident.BUILDING
    work.mkdir()
    (tmp_path / "mine").write_text("mine")
    (work / "lock").hardlink_to(tmp_path / "mine")
    save_file({"a": torch.ones(1)}, tmp_path / "rows.safetensors")
    with pytest.raises(gf.CodebookCorrupt, match="has another name somewhere"):
        gf.Codebook.build(
            tmp_path, [(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1))], progress=False
        )
    assert (tmp_path / "mine").read_text() == "mine"
