"""docs/format.md: a reader that follows it, without grace_fast, finds what grace_fast finds."""

from __future__ import annotations

import ast
import math
import sys
import zipfile
from pathlib import Path

import format_reader
import golden_codebooks as golden
import pytest
from format_reader import Directory

import grace_fast as gf
from grace_fast.store import archive
from grace_fast.store.saved import read_saved

GOLDEN = Path(__file__).parents[1] / "golden_formats"
PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def rows_of(book):
    return [
        {"id": number, "radius": radius, "live": live, "key": key, "value": value, "label": label}
        for number, radius, live, key, value, label in zip(
            book.ids.tolist(),
            book.radii.tolist(),
            book.live.tolist(),
            book.keys.tolist(),
            book.values.tolist(),
            [None if label is None else label.tolist() for label in book.labels],
            strict=True,
        )
    ]


def edits_of(history):
    return {
        number: {
            **{name: each for name, each in vars(edit).items() if name != "label"},
            "query": edit.query.tolist(),
            "text": None if edit.text is None else list(edit.text),
            "label_slot": history.label_slots[number],
        }
        for number, edit in history.edits.items()
    }


def on_disk(event):
    fields = dict(vars(event))
    owner = fields.pop("owner_row")
    return fields | {"lasts_with": -1 if owner is None else owner}


def events_of(history):
    events = [on_disk(event) for life in history.rows.values() for event in life.events]
    return sorted(events, key=lambda event: (event["row"], event["edit"]))


def without_nan(edits):
    return {
        number: {name: None if each != each else each for name, each in edit.items()}
        for number, edit in edits.items()
    }


def assert_same_edits(folder, key=None):
    found = Directory(folder, key or b"")
    book, history = read_saved(folder, key).codebook()
    assert found.rows == rows_of(book)
    assert without_nan(found.edits) == without_nan(edits_of(history))
    ours = sorted(found.events, key=lambda event: (event["row"], event["edit"]))
    assert ours == events_of(history)
    bases = {row: [*vars(life.base).values()] for row, life in history.rows.items() if life.base}
    assert found.bases == bases
    assert found.version == book.version
    return found


def test_the_reader_uses_nothing_of_grace_fast():
    tree = ast.parse(Path(format_reader.__file__).read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"numpy"}


def test_edits_of_the_first_format_are_read_by_the_page():
    found = assert_same_edits(GOLDEN / "edits-1")
    assert [edit["id"] for edit in found.edits.values()] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert found.manifest["format"] == 1


def test_a_codebook_of_the_second_format_is_read_by_the_page():
    found = Directory(GOLDEN / "book-2")
    assert found.manifest["format"] == 2
    assert found.rows == rows_of(golden.book())


def test_a_journal_is_read_by_the_page(tmp_path):
    grace = golden.editor(path=tmp_path)
    grace.codebook.append(
        *(golden.book().keys[:2] + 9, golden.book().values[:2, :4] + 1, golden.book().radii[:2])
    )
    grace.undo(3)
    grace.edit("3", 2)
    grace.checkout(4)
    grace.edit("5", 1)
    grace.unload()
    found = assert_same_edits(tmp_path)
    assert found.manifest["format"] == 3
    assert {*found.kinds} == {"edit", "undo", "checkout", "rows"}
    grace = gf.attach(golden.Model().eval(), golden.LAYER, path=tmp_path, tokenizer=golden.tokens)
    grace.compact()
    grace.edit("6", 2)
    grace.unload()
    assert assert_same_edits(tmp_path).kinds == ["edit"]


def test_a_signed_journal_is_read_by_the_page(tmp_path):
    golden.editor(path=tmp_path, hmac_key=bytes(range(32))).unload()
    assert assert_same_edits(tmp_path, bytes(range(32))).version == 10


@pytest.mark.parametrize("rows", [64, 9000])
def test_a_large_codebook_is_read_by_the_page(rows, tmp_path):
    golden.book(rows).save(tmp_path)
    found = Directory(tmp_path)
    assert found.manifest["format"] == 3
    assert found.rows == rows_of(golden.book(rows))
    codes = format_reader.listed(tmp_path, found.manifest["codes"])
    leaves = math.ceil(len(codes["run0.rows"]) / 64)
    assert codes["run0.near"].shape == (leaves * 4, 4, 16, 4)
    assert codes["run0.far"].shape == (leaves * 64, 48)
    assert codes["run0.isolated"].shape == (leaves * 8,)
    assert codes["map.rows"].shape == (64, golden.WIDTH)
    described = {"map", "state", "run0", "tail"}
    assert {name.split(".")[0] for name in codes} == described


def test_a_packed_codebook_is_read_by_the_page(tmp_path):
    golden.editor(path=tmp_path / "edited").unload()
    archive.pack(tmp_path / "edited", tmp_path / "packed.zip")
    with zipfile.ZipFile(tmp_path / "packed.zip") as packed:
        assert {each.compress_type for each in packed.infolist()} == {zipfile.ZIP_STORED}
        packed.extractall(tmp_path / "taken-out")
    assert assert_same_edits(tmp_path / "taken-out").version == 10


@pytest.mark.parametrize("name", ["edited", "large"])
def test_the_page_names_every_field_and_tensor_that_is_written(name, tmp_path):
    if name == "edited":
        golden.editor(path=tmp_path).unload()
    else:
        golden.book(9000).save(tmp_path)
    manifest = format_reader.manifest_of(tmp_path)
    described = [manifest["tensors"], manifest.get("codes") or {"sha256": {}}]
    tensors = {each.replace("run0", "runI") for one in described for each in one["sha256"]}
    assert {each for each in (*manifest, *tensors) if f"`{each}`" not in PAGE} == set()
