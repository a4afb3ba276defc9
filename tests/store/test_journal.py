"""Edits that outlive their process: reopened bit for bit, gone back to, compacted, followed."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import zipfile

import models
import pytest
import torch
from models import FAMILIES
from typer.testing import CliRunner

import grace_fast as gf
from grace_fast.codebook.pages import COLUMNS, PAGE_ROWS
from grace_fast.store import atomic, files
from grace_fast.store.saved import read_saved
from grace_fast.tools.cli import app

FAMILY = FAMILIES["bert"]
# Prompt by prompt: the second label of a prompt replaces or splits what the first one made.
ASKED = [(0, 0), (1, 1), (0, 2), (2, 0), (3, 3), (1, 1), (0, 0), (4, 2)]


@pytest.fixture
def model():
    return models.build("bert")


def attach(model, path, **settings):
    settings = {"epsilon": 0.5, "iterations": 3, "replacement": "replace_all"} | settings
    return gf.attach(model, FAMILY.layer, path=path, **settings)


def batch(prompt, label):
    asked = models.prompt_batch([models.prompts(8)[prompt]])
    return asked | {"labels": torch.tensor([label])}


def state(grace):
    """Everything that a codebook and its history hold, as plain values."""
    book, history = grace.codebook.snapshot(), grace._context.history
    edits = [
        tuple(
            value.tolist() if isinstance(value, torch.Tensor) else repr(value)
            for value in vars(edit).values()
        )
        for edit in history.edits.values()
    ]
    return {
        "version": book.version,
        "live": len(book),
        "slots": [
            book.key_slots[: book.counts.keys].tolist(),
            book.value_slots[: book.counts.values].tolist(),
        ],
        "columns": [book.column(name).tolist() for name in COLUMNS],
        "ids": book.ids.tolist(),
        "labels": [
            None if each is None else each.tolist()
            for each in book.label_slots.between(0, book.counts.labels)
        ],
        "edits": edits,
        "rows": {row: vars(life) for row, life in sorted(history.rows.items())},
        "next_id": history.next_id,
    }


def assert_reopens(model, path, wanted):
    again = attach(model, path)
    assert state(again) == wanted
    again.unload()


def stream(grace):
    """Edit and undo; return the state after every version, by version."""
    states = {grace.codebook.version: state(grace)}
    for prompt, label in ASKED:
        grace.edit(batch(prompt, label))
        states[grace.codebook.version] = state(grace)
    for edit in (2, 0):
        grace.undo(edit)
        states[grace.codebook.version] = state(grace)
    return states


def test_what_was_edited_is_there_again_bit_for_bit_after_every_version(model, tmp_path):
    grace = attach(model, tmp_path)
    states = stream(grace)
    grace.unload()
    again = attach(model, tmp_path)
    assert state(again) == states[len(ASKED) + 2]
    assert [each.kind for each in again.log()] == ["edit"] * len(ASKED) + ["undo"] * 2
    again.unload()
    saved = read_saved(tmp_path)
    for version, wanted in states.items():
        book, history = saved.codebook(version=version)
        assert len(book) == wanted["live"]
        assert [book.snapshot().column(name).tolist() for name in COLUMNS] == wanted["columns"]
        assert list(history.edits) == [int(edit[0]) for edit in wanted["edits"]]
    assert gf.Codebook.open(tmp_path).version == len(ASKED) + 2


def test_hits_are_kept_when_the_directory_is_given_back(model, tmp_path):
    grace = attach(model, tmp_path)
    grace.edit(batch(0, 0))
    asked = {name: each for name, each in batch(0, 0).items() if name != "labels"}
    for _ in range(3):
        model(**asked)
    counted = dict(grace.hits)
    assert sum(counted.values()) >= 3
    grace.unload()
    again = attach(model, tmp_path)
    assert dict(again.hits) == counted
    again.unload()


def test_rows_that_no_edit_made_are_kept_too(model, tmp_path):
    grace = attach(model, tmp_path)
    grace.edit(batch(0, 0))
    book = grace.codebook
    ids = book.append(torch.ones(2, book.key_dim), torch.ones(2, book.value_dim), torch.ones(2))
    book.remove(int(ids[0]))
    wanted = state(grace)
    grace.unload()
    again = attach(model, tmp_path)
    assert state(again) == wanted
    assert [each.kind for each in again.log()] == ["edit", "rows", "rows"]
    again.unload()


def test_a_version_that_changes_rows_of_many_pages_is_there_again(model, tmp_path):
    grace = attach(model, tmp_path)
    grace.edit(batch(0, 0))
    book, count = grace.codebook, 3 * PAGE_ROWS
    generator = torch.Generator().manual_seed(0)
    keys = 100 + torch.randn(count, book.key_dim, generator=generator)
    ids = book.append(keys, torch.ones(count, book.value_dim), torch.ones(count)).tolist()
    with book.writing() as draft:
        for at in (5, PAGE_ROWS + 5, 2 * PAGE_ROWS + 5):
            book.remove(ids[at])
            draft.set_radius(at + 10, 2.0)
    wanted = state(grace)
    assert len(book) == int(book.live.sum()) == count - 2
    grace.checkout(1)
    assert len(book) == int(book.live.sum()) == 1
    grace.checkout(3)
    assert len(book) == int(book.live.sum()) == count - 2
    grace.unload()
    again = attach(model, tmp_path)
    assert len(again.codebook) == int(again.codebook.live.sum()) == count - 2
    assert state(again)["columns"] == wanted["columns"]
    again.unload()


def test_going_back_decides_as_then_and_can_itself_be_taken_back(model, tmp_path):
    grace = attach(model, tmp_path)
    states = stream(grace)
    grace.checkout(4)
    then, now = states[4], state(grace)
    assert now["edits"] == then["edits"]
    assert now["rows"] == then["rows"]
    rows = len(then["ids"])
    assert [column[:rows] for column in now["columns"]] == then["columns"]
    assert not any(now["columns"][1][rows:])
    assert grace.edit(batch(5, 1)).id == len(ASKED)  # no id twice
    grace.checkout(len(ASKED))
    assert state(grace)["edits"] == states[len(ASKED)]["edits"]
    wanted = state(grace)
    grace.unload()
    again = attach(model, tmp_path)
    assert state(again) == wanted
    with pytest.raises(ValueError, match=r"holds the versions 0 to 13, wanted 99"):
        again.checkout(99)
    again.unload()


def test_a_difference_names_rows_and_edits(model, tmp_path):
    grace = attach(model, tmp_path)
    grace.edit(batch(0, 0))
    grace.edit(batch(1, 1))
    grace.undo(0)
    found = grace.diff(1)
    assert (found.made, found.undone) == ([1], [0])
    assert found.removed == [0]
    grace.unload()


def test_a_compacted_directory_holds_the_same_and_replays_nothing(model, tmp_path):
    grace = attach(model, tmp_path)
    stream(grace)
    grace.compact()
    assert grace.log() == []
    assert len(list(tmp_path.glob("journal-*.sqlite"))) == 1
    grace.edit(batch(6, 2))
    wanted = state(grace)
    grace.unload()
    again = attach(model, tmp_path)
    assert state(again) == wanted
    assert [each.version for each in again.log()] == [len(ASKED) + 3]
    again.save_pretrained(tmp_path)
    assert again.log() == []
    again.unload()


def test_a_crash_at_any_step_of_a_compaction_leaves_the_codebook(model, tmp_path):
    folder, copies = tmp_path / "book", []
    grace = attach(model, folder)
    stream(grace)
    watching = [True]

    def copy_before(event, arguments):
        """Keep what a crash would leave: the directory before a file of it is touched."""
        touches = event in ("open", "os.rename", "os.remove", "sqlite3.connect")
        if touches and watching[0] and str(folder) in repr(arguments):
            watching[0] = False
            copies.append(shutil.copytree(folder, tmp_path / f"crash-{len(copies)}"))
            watching[0] = True

    sys.addaudithook(copy_before)
    grace.compact()
    watching[0] = False
    wanted = state(grace)
    grace.unload()
    assert len(copies) >= 8
    for copy in copies:
        again = attach(model, copy)
        assert state(again) == wanted
        assert len(list(copy.glob("journal-*.sqlite"))) <= 2
        again.compact()
        assert len(list(copy.glob("*.sqlite"))) == 1
        again.unload()


@pytest.mark.parametrize("step", ["before the manifest", "after the manifest"])
def test_what_is_edited_after_a_compaction_that_failed_is_not_lost(
    step, model, tmp_path, monkeypatch
):
    grace = attach(model, tmp_path)
    grace.edit(batch(0, 0))
    real = atomic.synchronise

    def fail(path):
        if path == tmp_path and (tmp_path / files.CONFIG).read_bytes() != before:
            raise OSError("input/output error")
        real(path)

    def fail_at_once(path, content):
        raise OSError("input/output error")

    before = (tmp_path / files.CONFIG).read_bytes()
    if step == "before the manifest":
        monkeypatch.setattr(files, "replace", fail_at_once)
    else:
        monkeypatch.setattr(atomic, "synchronise", fail)
    with pytest.raises(OSError, match="input/output"):
        grace.compact()
    monkeypatch.undo()
    acknowledged = [0]
    if step == "before the manifest":
        acknowledged.append(grace.edit(batch(1, 1)).id)
    else:
        with pytest.raises(gf.CodebookReadOnly, match="mend the disk and attach"):
            grace.edit(batch(1, 1))
    grace.unload()
    again = attach(model, tmp_path)
    assert [edit.id for edit in again.edits()] == acknowledged
    again.unload()


def test_the_lock_of_a_process_that_died_is_no_lock(model, tmp_path):
    attach(model, tmp_path).unload()
    program = f"""if True:
        import time
        from pathlib import Path
        from grace_fast.store.locks import Lock
        lock = Lock(Path({str(tmp_path)!r}))
        print("locked", flush=True)
        time.sleep(600)
    """
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(gf.CodebookLocked, match=f"edited by process {holder.pid}; attach"):
            attach(model, tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    grace = attach(model, tmp_path)
    grace.edit(batch(0, 0))
    grace.unload()


def test_a_fork_of_an_editing_process_edits_nothing(model, tmp_path, monkeypatch):
    grace = attach(model, tmp_path)
    grace.edit(batch(0, 0))
    before = state(grace)
    monkeypatch.setattr(grace._context.directory.store, "_process", os.getpid() + 1)
    with pytest.raises(gf.CodebookReadOnly, match="of which this is a fork"):
        grace.edit(batch(1, 1))
    assert state(grace) == before
    monkeypatch.undo()
    grace.unload()


def test_a_second_editor_is_refused_until_the_first_is_unloaded(model, tmp_path):
    grace = attach(model, tmp_path)
    with pytest.raises(gf.CodebookLocked, match=f"edited by process {os.getpid()}; attach with"):
        attach(models.build("bert"), tmp_path)
    grace.edit(batch(0, 0))
    other = attach(models.build("bert"), None)
    other.edit(batch(0, 0))
    with pytest.raises(gf.CodebookLocked):
        other.save_pretrained(tmp_path)
    grace.unload()
    with pytest.raises(gf.CodebookReadOnly, match="given back by unload"):
        grace.codebook.append(*rows_of(grace.codebook))
    attach(models.build("bert"), tmp_path).unload()


def rows_of(book):
    return torch.ones(1, book.key_dim), torch.ones(1, book.value_dim), torch.ones(1)


def test_a_reader_follows_who_edits_and_edits_nothing(model, tmp_path):
    grace = attach(model, tmp_path)
    grace.edit(batch(0, 0))
    other = models.build("bert")
    reader = attach(other, tmp_path, read_only=True)
    assert state(reader) == state(grace)
    assert not reader.refresh()
    grace.edit(batch(1, 1))
    grace.undo(0)
    assert reader.refresh()
    assert state(reader) == state(grace)
    grace.compact()
    reader.refresh()
    grace.edit(batch(2, 0))
    assert reader.refresh()
    assert state(reader) == state(grace)
    asked = {name: each for name, each in batch(2, 0).items() if name != "labels"}
    assert torch.equal(other(**asked).logits, model(**asked).logits)
    with pytest.raises(gf.CodebookReadOnly, match="read_only=True; attach it without to edit"):
        reader.edit(batch(3, 3))
    with pytest.raises(gf.CodebookReadOnly):
        reader.undo(1)
    with pytest.raises(ValueError, match="only an editor that was attached with read_only=True"):
        grace.refresh()
    grace.unload()


def test_a_row_of_the_journal_that_was_changed_or_lost_is_seen(model, tmp_path):
    grace = attach(model, tmp_path)
    for prompt in range(3):
        grace.edit(batch(prompt, 0))
    grace.unload()
    journal = next(tmp_path.glob("journal-*.sqlite"))
    whole = journal.read_bytes()
    for change in (
        "UPDATE versions SET kind = 'undo' WHERE version = 2",
        "UPDATE versions SET time = time + 1 WHERE version = 2",
        "DELETE FROM versions WHERE version = 2",
        "DELETE FROM versions WHERE version = 3",
        "UPDATE head SET version = 2",
        "DELETE FROM head",
        "CREATE VIEW other AS SELECT * FROM versions",
        "PRAGMA user_version=2",
    ):
        file = sqlite3.connect(journal, isolation_level=None)
        file.execute(change)
        file.close()
        with pytest.raises(gf.CodebookCorrupt):
            read_saved(tmp_path).codebook()
        journal.write_bytes(whole)
    assert len(read_saved(tmp_path).codebook()[1].edits) == 3


def test_a_journal_is_signed_with_the_directorys_key(model, tmp_path):
    key = b"sixteen bytes or more"
    grace = attach(model, tmp_path, hmac_key=key)
    grace.edit(batch(0, 0))
    wanted = state(grace)
    grace.unload()
    again = attach(model, tmp_path, hmac_key=key)
    assert state(again) == wanted
    again.unload()
    with pytest.raises(gf.CodebookCorrupt):
        read_saved(tmp_path).codebook()


def test_a_version_that_somebody_else_refuses_is_not_in_the_journal(model, tmp_path):
    grace = attach(model, tmp_path)
    grace.edit(batch(0, 0))
    refused = []

    def refuse(snapshot):
        if snapshot.version == 2 and not refused:
            refused.append(snapshot)
            raise MemoryError("no room on the device")

    grace.codebook.subscribe("device", refuse)
    before = state(grace)
    with pytest.raises(MemoryError):
        grace.edit(batch(1, 1))
    assert state(grace) == before
    assert [each.version for each in grace.log()] == [1]
    grace.edit(batch(2, 1))
    wanted = state(grace)
    grace.unload()
    assert_reopens(model, tmp_path, wanted)


def test_what_earlier_versions_saved_becomes_a_journal_once_it_is_edited(model, tmp_path):
    grace = attach(model, None)
    grace.edit(batch(0, 0))
    grace.save_pretrained(tmp_path)
    grace.unload()
    assert not list(tmp_path.glob("journal-*"))
    again = attach(model, tmp_path)
    again.edit(batch(1, 1))
    wanted = state(again)
    again.unload()
    assert_reopens(model, tmp_path, wanted)


def test_a_failing_disk_makes_the_store_read_only_and_nothing_is_published(
    model, tmp_path, monkeypatch
):
    grace = attach(model, tmp_path)
    grace.edit(batch(0, 0))
    before = state(grace)

    def fail(*statements):
        raise OSError("input/output error")

    monkeypatch.setattr(grace._context.directory.store.journal, "_write", fail)
    with pytest.raises(OSError, match="input/output"):
        grace.edit(batch(1, 1))
    monkeypatch.undo()
    assert state(grace) == before
    with pytest.raises(gf.CodebookReadOnly, match="since an edit could not be kept"):
        grace.edit(batch(1, 1))
    grace.unload()
    assert_reopens(model, tmp_path, before)


def call(*arguments):
    ran = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return ran.exit_code, (json.loads(ran.stdout) if ran.exit_code == 0 else ran.output)


def test_versions_are_listed_compared_and_gone_back_to_on_the_command_line(model, tmp_path):
    grace = attach(model, tmp_path, store_text=True)
    stream(grace)
    code, told = call("checkout", tmp_path, 2)
    assert code == 1
    assert "is being edited by process" in told
    grace.unload()
    code, told = call("log", tmp_path)
    assert told["base"] == 0
    assert [each["kind"] for each in told["versions"]] == ["edit"] * len(ASKED) + ["undo"] * 2
    code, told = call("diff", tmp_path, 1, 2)
    assert told["made"] == [1]
    code, told = call("checkout", tmp_path, 2)
    assert (code, told["version"]) == (0, len(ASKED) + 3)
    assert len(read_saved(tmp_path).codebook()[1].edits) == 2
    code, told = call("compact", tmp_path)
    assert (code, told["keys"]) == (0, 2)
    assert call("log", tmp_path)[1] == {"base": len(ASKED) + 3, "versions": []}
    assert call("verify", tmp_path)[0] == 0
    code, told = call("checkout", tmp_path, 2)
    assert code == 1
    assert "holds the versions 11 to 11, wanted 2" in " ".join(told.split())
    for command in (("log",), ("compact",), ("diff", 1), ("checkout", 1)):
        code, told = call(command[0], tmp_path / "nowhere", *command[1:])
        assert code == 1
        assert "is not a codebook" in " ".join(told.split())
    assert not (tmp_path / "nowhere").exists()
    again = attach(model, tmp_path)
    again.edit(batch(7, 1))
    again.unload()


def test_a_codebook_travels_in_one_file_and_is_tested_before_it_arrives(model, tmp_path):
    grace = attach(model, tmp_path / "book")
    stream(grace)
    wanted = state(grace)
    grace.unload()
    file = tmp_path / "book.zip"
    assert call("export", tmp_path / "book", file) == (0, {"edits": 6, "out": str(file)})
    assert "is there already" in " ".join(call("export", tmp_path / "book", file)[1].split())
    assert call("import", file, tmp_path / "there")[0] == 0
    assert_reopens(model, tmp_path / "there", wanted)
    assert "is not empty" in call("import", file, tmp_path / "there")[1]
    whole, silent = file.read_bytes(), 0
    for at in range(0, len(whole), 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        code, told = call("import", file, tmp_path / "other")
        if code:
            assert "error: " in told
            assert not list(tmp_path.glob("other*"))
            continue
        arrived = read_saved(tmp_path / "other").codebook()  # a date, a flag of the zip's own
        assert arrived[0].snapshot().radii.tolist() == wanted["columns"][0]
        silent += list(arrived[1].edits) != [int(edit[0]) for edit in wanted["edits"]]
        shutil.rmtree(tmp_path / "other")
    assert silent == 0
    for name in ("../out", "/out", "a/b"):
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr(name, b"{}")
        assert "is not the name of a file" in " ".join(
            call("import", file, tmp_path / "x")[1].split()
        )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("grace_config.json", b" " * 1000000)
    assert "more than it has bytes" in " ".join(call("import", file, tmp_path / "x")[1].split())


def test_there_are_no_versions_without_a_directory(model):
    grace = attach(model, None)
    with pytest.raises(ValueError, match=r"attach\(\.\.\., path=DIR\)"):
        grace.log()
    with pytest.raises(ValueError, match="read_only=True needs the path"):
        gf.attach(models.build("bert"), FAMILY.layer, read_only=True)
