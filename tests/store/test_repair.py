"""Directories that are damaged or hostile, and what `verify --repair` makes of them."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3

import golden_codebooks as golden
import pytest
import torch
from changes import (
    change_config,
    flip_in_column,
    flip_in_second_block,
    overwrite,
    put,
    put_rows,
    replace_tensor,
)
from damages import DAMAGES, each_damage
from disk import file_of
from typer.testing import CliRunner

import grace_fast as gf
from grace_fast.codebook.mapped import BLOCK_BYTES, HEADER_BYTES
from grace_fast.editor.attach import read_saved
from grace_fast.store import files
from grace_fast.store.large import resident
from grace_fast.store.repair import repair
from grace_fast.tools.cli import app

KEY = bytes(range(32))


def bare_book():
    """Return a codebook of 4 blocks of keys: 1 024 rows of 4 096 numbers each."""
    generator = torch.Generator().manual_seed(0)
    book = gf.Codebook(4096, 2)
    keys = torch.randn(1024, 4096, generator=generator)
    book.append(keys, torch.arange(2048.0).reshape(1024, 2), torch.full((1024,), 3.0))
    return book


@pytest.fixture
def bare(tmp_path):
    bare_book().save(tmp_path / "bare")
    return tmp_path / "bare"


def listed(report, what):
    return [each.number for each in report.dropped if each.what == what]


def content_of(folder):
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.name != "lock"}


def assert_decides_as_before(book, before, gone):
    """The rows that are left answer bit for bit as in a book of before that has no others."""
    with before.writing() as draft:
        for row in gone:
            draft.remove(row)
    for queries in (before.keys, before.keys + 0.01, -before.keys):
        found, wanted = gf.find(queries, book), gf.find(queries, before)
        for name in ("hit", "row", "squared_distance"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        rows = wanted.row[wanted.hit]
        assert torch.equal(book.snapshot().values_of(rows), before.snapshot().values_of(rows))
    assert book.live.tolist() == before.live.tolist()


def assert_sound(folder):
    report = repair(folder)
    assert report.was_sound
    assert not report.dropped
    grace = gf.attach(golden.Model().eval(), golden.LAYER, path=folder, tokenizer=golden.tokens)
    assert grace.verify().ok
    grace.edit("11", 3)
    for edit in list(grace.edits()):
        grace.undo(edit.id)
    assert not grace.edits()
    grace.unload()


def test_a_sound_directory_is_left_as_it_is(edited, journalled, bare):
    for folder in (edited, journalled, bare):
        before = content_of(folder)
        report = repair(folder)
        assert report.was_sound
        assert (report.dropped, report.kept) == ([], None)
        assert content_of(folder) == before
    assert not list(edited.parent.glob("*.damaged-*"))


@each_damage("column", lambda damage: damage.repaired)
def test_rows_that_cannot_be_trusted_go_with_their_edits_and_all_are_listed(damage, edited):
    before = gf.Codebook.open(edited)
    ids = [edit.id for edit in read_saved(edited).codebook()[1].edits.values()]
    damage.do(edited)
    damaged = content_of(edited)
    report = repair(edited, max_radius=damage.max_radius)
    gone = listed(report, "row")
    assert gone
    assert len(gone) < len(before.live)
    assert all(each.why for each in report.dropped)
    assert_decides_as_before(gf.Codebook.open(edited, max_radius=damage.max_radius), before, gone)
    left = read_saved(edited).codebook()[1].edits
    assert not any(edit.row in gone for edit in left.values())
    assert len(left) + len(listed(report, "edit")) == len(ids)
    assert content_of(report.kept) == damaged
    assert_sound(edited)


def test_rows_stay_without_their_edits_where_that_is_asked_for(edited):
    before = gf.Codebook.open(edited)
    DAMAGES["a query that is NaN"].do(edited)
    report = repair(edited, keep_rows=True)
    assert listed(report, "row") == []
    assert listed(report, "edit")
    assert_decides_as_before(gf.Codebook.open(edited), before, [])
    assert_sound(edited)


@pytest.mark.parametrize("keep_rows", [False, True])
def test_a_history_that_is_not_what_was_saved_explains_no_row(keep_rows, edited):
    before = gf.Codebook.open(edited)
    flip_in_column(edited, "edits.query")
    report = repair(edited, keep_rows=keep_rows)
    live = before.live.nonzero()[:, 0].tolist()
    assert listed(report, "row") == ([] if keep_rows else live)
    assert listed(report, "edit") == [None]
    assert_decides_as_before(gf.Codebook.open(edited), before, [] if keep_rows else live)
    assert_sound(edited)


@pytest.mark.parametrize("column", ["keys", "values", "rows.radius"])
def test_where_any_row_may_be_wrong_nothing_is_changed(column, edited):
    config = files.read_config(edited)
    config["tensors"]["sha256"][column] = "0" * 64
    change_config(edited, tensors=config["tensors"])
    damaged = content_of(edited)
    with pytest.raises(gf.CodebookCorrupt, match="nothing tells which rows are meant"):
        repair(edited)
    assert content_of(edited) == damaged
    assert [each.name for each in edited.parent.iterdir()] == ["edited"]


def test_without_a_manifest_or_a_header_there_is_nothing_to_stand_on(edited):
    file = edited / files.read_config(edited)["tensors"]["file"]
    overwrite(file, 9, b"?")
    with pytest.raises(gf.CodebookCorrupt, match="no safetensors file"):
        repair(edited)
    overwrite(edited / files.CONFIG, 5, b"?")
    with pytest.raises(gf.CodebookCorrupt, match="it has no format number"):
        repair(edited)
    (edited / files.CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="is not a codebook"):
        repair(edited)


@each_damage("journal")
def test_the_longest_sound_prefix_of_a_journal_is_kept(damage, journalled):
    last = damage.last_version
    before = gf.Codebook.open(journalled).version
    assert before == 10
    wanted = read_saved(journalled).codebook(version=last)
    journal = next(journalled.glob("journal-*.sqlite"))
    damage.do(journalled)
    report = repair(journalled)
    lost = listed(report, "version")
    assert lost[0] == last + 1
    assert lost in ([last + 1], list(range(last + 1, 11)))
    book, history = read_saved(journalled).codebook()
    assert book.version == last
    assert list(history.edits) == list(wanted[1].edits)
    assert_decides_as_before(book, wanted[0], [])
    assert not journal.exists()
    assert len(list(journalled.glob("journal-*.sqlite"))) == 1
    assert read_saved(journalled).codebook(version=0)[0].version == 0
    assert_sound(journalled)


def test_a_version_that_was_interrupted_is_taken_back_and_the_others_stay(journalled):
    file = sqlite3.connect(next(journalled.glob("journal-*.sqlite")), isolation_level=None)
    file.execute("PRAGMA cache_size=1")
    file.execute("BEGIN IMMEDIATE")
    file.execute("INSERT INTO versions VALUES (11, 0.0, 'edit', ?, ?)", (bytes(1 << 22), b""))
    crashed = shutil.copytree(journalled, journalled.parent / "crashed")
    file.execute("ROLLBACK")
    file.close()
    with pytest.raises(OSError, match="needs a writer"):
        read_saved(crashed).codebook()
    report = repair(crashed)
    assert report.dropped == []
    assert not report.was_sound
    assert read_saved(crashed).codebook()[0].version == 10
    assert_sound(crashed)


def test_a_file_that_cannot_be_read_now_is_neither_sound_nor_repaired(bare, monkeypatch):
    def fail(*_, **__):
        raise OSError("input/output error")

    monkeypatch.setattr(resident, "open", fail)
    with pytest.raises(OSError, match="input/output"):
        repair(bare)


def test_a_base_that_is_not_sound_goes_on_with_its_journal(journalled):
    grace = gf.attach(golden.Model().eval(), golden.LAYER, path=journalled, tokenizer=golden.tokens)
    grace.compact()
    first = grace.edits()[0]
    grace.edit("13", 1)
    grace.edit("14", 2)
    grace.undo(first.id)
    grace.unload()
    before = gf.Codebook.open(journalled)
    replace_tensor(journalled, "tensors", "rows.radius", put(1, math.inf))
    report = repair(journalled)
    assert listed(report, "row") == [1]
    assert listed(report, "version") == []
    book = read_saved(journalled).codebook()[0]
    assert book.version == before.version
    assert_decides_as_before(book, before, [1])
    assert_sound(journalled)


def test_a_block_that_is_not_what_was_saved_costs_its_rows(bare):
    per_block = BLOCK_BYTES // 4096 // 4
    flip_in_second_block(file_of(bare, "keys"))
    gone = list(range(per_block, 2 * per_block))
    assert listed(repair(bare), "row") == gone
    assert repair(bare).was_sound
    assert_decides_as_before(gf.Codebook.open(bare), bare_book(), gone)


def test_a_file_that_was_cut_off_keeps_its_whole_blocks(bare):
    os.truncate(file_of(bare, "keys"), HEADER_BYTES + BLOCK_BYTES + 5)
    per_block = BLOCK_BYTES // 4096 // 4
    assert listed(repair(bare), "row") == list(range(per_block, 1024))
    assert repair(bare).was_sound


def test_a_value_that_is_not_finite_costs_its_row_alone(bare):
    put_rows(bare, "values", 8 * 5, b"\x00\x00\xc0\x7f")
    assert listed(repair(bare), "row") == [5]
    assert repair(bare).was_sound


def test_codes_and_headers_are_made_again_and_nothing_is_lost(tmp_path):
    folder = tmp_path / "coded"
    golden.book(9000).save(folder)
    before = golden.book(9000)
    overwrite(file_of(folder, "codes"), -30, b"\x55")
    overwrite(file_of(folder, "keys"), 20, b"x")
    report = repair(folder)
    assert report.dropped == []
    assert "the codes" in report.made_again
    assert repair(folder).was_sound
    found, wanted = (
        gf.find(golden.questions(), gf.Codebook.open(folder)),
        gf.find(golden.questions(), before),
    )
    assert torch.equal(found.row, wanted.row)
    assert torch.equal(found.hit, wanted.hit)


def test_a_signed_directory_needs_its_key_and_is_signed_anew(tmp_path):
    folder = tmp_path / "signed"
    golden.editor().save_pretrained(folder, hmac_key=KEY)
    flip_in_column(folder, "edits.query", KEY)
    with pytest.raises(ValueError, match="is signed: give its hmac_key"):
        repair(folder)
    with pytest.raises(gf.CodebookCorrupt, match="not signed with this hmac_key"):
        repair(folder, hmac_key=KEY[::-1])
    repair(folder, hmac_key=KEY, keep_rows=True)
    assert len(gf.Codebook.open(folder, hmac_key=KEY)) > 0


def test_who_edits_a_directory_keeps_it_from_being_repaired(journalled):
    grace = gf.attach(golden.Model().eval(), golden.LAYER, path=journalled)
    with pytest.raises(gf.CodebookLocked):
        repair(journalled)
    grace.unload()


def test_a_disk_that_fails_leaves_the_directory_as_it_was(edited, monkeypatch):
    DAMAGES["a key that is NaN"].do(edited)
    damaged = content_of(edited)

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        repair(edited)
    assert content_of(edited) == damaged
    assert [each.name for each in edited.parent.iterdir()] == ["edited"]


def test_the_command_line_lists_what_was_dropped_and_ends_with_3(edited):
    def call(*options):
        return CliRunner().invoke(app, ["verify", str(edited), *options])

    sound = call("--repair", "--json")
    assert sound.exit_code == 0
    assert json.loads(sound.stdout)["was_sound"] is True
    assert "is sound; nothing was changed" in call("--repair").stdout
    DAMAGES["a key that is NaN"].do(edited)
    first = shutil.copytree(edited, edited.parent / "another")
    told = call("--repair")
    assert told.exit_code == 3
    assert "edited.damaged-1" in told.stdout.replace("\n", "")
    assert "row" in told.stdout
    assert call().exit_code == 0
    listed_ = CliRunner().invoke(app, ["verify", str(first), "--repair", "--json"])
    assert listed_.exit_code == 3
    assert {each["what"] for each in json.loads(listed_.stdout)["dropped"]} == {"row", "edit"}
    assert call("--keep-rows").exit_code == 1


def test_a_ball_stays_as_an_edit_that_is_dropped_left_it(edited):
    columns = files.read_tensors(edited, files.read_config(edited))
    owed = [
        (row, maker)
        for row, maker in zip(
            columns["events.row"].tolist(), columns["events.lasts_with"].tolist(), strict=True
        )
        if maker not in (row, -1)
    ]
    assert owed, "the golden editor has an edit that splits a ball"
    split, maker = owed[0]
    wide = columns["rows.radius"][split].item()
    replace_tensor(edited, "tensors", "keys", put(int(columns["rows.key_slot"][maker]), math.nan))
    report = repair(edited)
    assert listed(report, "row") == [maker]
    left = files.read_tensors(edited, files.read_config(edited))
    of_split = left["events.row"] == split
    assert left["events.radius"][of_split][-1].item() == left["rows.radius"][split].item() == wide
    assert not (left["events.lasts_with"] == maker).any()


def test_a_row_that_two_blocks_hold_goes_with_either(tmp_path):
    book, width = gf.Codebook(3000, 2), 3000 * 4
    generator = torch.Generator().manual_seed(1)
    book.append(torch.randn(800, 3000, generator=generator), torch.zeros(800, 2), torch.ones(800))
    book.save(tmp_path / "bare")
    flip_in_second_block(file_of(tmp_path / "bare", "keys"))
    first, last = BLOCK_BYTES // width, 2 * BLOCK_BYTES // width
    assert (first + 1) * width > BLOCK_BYTES > first * width
    assert (last + 1) * width > 2 * BLOCK_BYTES > last * width
    report = repair(tmp_path / "bare")
    assert listed(report, "row") == list(range(first, last + 1))
    assert repair(tmp_path / "bare").was_sound
