"""Directories of every format that there ever was: they open for ever, and decide as they did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import golden_codebooks as golden
import pytest

import grace_fast as gf
from grace_fast.store import files, manifest

FOLDER = Path(__file__).parents[1] / "golden_formats"
BOOKS = sorted(path.stem for path in FOLDER.glob("book-*.json"))
EDITS = sorted(path.stem for path in FOLDER.glob("edits-*.json"))


def told(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_there_is_a_directory_of_every_format_that_was_released():
    assert {files.read_config(FOLDER / name)["format"] for name in BOOKS + EDITS} >= {1, 2}


@pytest.mark.parametrize("name", BOOKS)
def test_a_codebook_of_every_format_decides_as_it_did(name):
    book = gf.Codebook.open(FOLDER / name, verify=True)
    assert golden.decisions(book) == told(name)
    assert golden.decisions(golden.book()) == told(name)


@pytest.mark.parametrize("name", EDITS)
def test_the_edits_of_every_format_are_what_they_were(name):
    grace = gf.from_pretrained(golden.Model().eval(), FOLDER / name)
    assert golden.edits(grace) == told(name)
    assert grace.verify()
    assert golden.edits(golden.editor()) == told(name)


@pytest.mark.parametrize("name", BOOKS + EDITS)
def test_what_an_earlier_format_held_is_saved_in_the_one_of_today(name, tmp_path):
    if name in BOOKS:
        gf.Codebook.open(FOLDER / name).save(tmp_path)
        again = golden.decisions(gf.Codebook.open(tmp_path))
    else:
        grace = gf.from_pretrained(golden.Model().eval(), FOLDER / name)
        grace.save_pretrained(tmp_path)
        again = golden.edits(gf.from_pretrained(golden.Model().eval(), tmp_path))
    assert files.read_config(tmp_path)["format"] == manifest.FORMAT
    assert again == told(name)


def test_an_editor_goes_on_in_a_directory_of_the_first_format(tmp_path):
    folder = tmp_path / "edits"
    shutil.copytree(FOLDER / "edits-1", folder)
    grace = gf.attach(golden.Model().eval(), golden.LAYER, path=folder, tokenizer=golden.tokens)
    made = grace.edit("12", 3)
    grace.unload()
    again = gf.from_pretrained(golden.Model().eval(), folder)
    assert [edit.id for edit in again.edits()] == [0, 1, 2, 3, 4, 6, 7, 8, made.id]


@pytest.mark.parametrize("name", BOOKS + EDITS)
def test_a_newer_format_is_refused_by_its_number(name, tmp_path):
    folder = tmp_path / "newer"
    shutil.copytree(FOLDER / name, folder)
    place = folder / files.CONFIG
    newer = {**files.read_config(folder), "format": manifest.FORMAT + 1}
    place.write_text(json.dumps(newer))
    message = rf"has format {manifest.FORMAT + 1}, this version of grace_fast reads up to"
    with pytest.raises(gf.CodebookCorrupt, match=message):
        gf.Codebook.open(folder)
    with pytest.raises(gf.CodebookCorrupt, match=message):
        gf.from_pretrained(golden.Model().eval(), folder)
