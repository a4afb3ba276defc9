"""What a stranger puts beside a journal, by a name that SQLite reads: nothing elsewhere changes.

A journal of ours that a crash left is put right all the same.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct

import golden_codebooks as golden
import pytest

import grace_fast as gf
from grace_fast.editor.attach import read_saved
from grace_fast.store import side_files
from grace_fast.store.repair import repair
from grace_fast.store.saved import Offline

MAGIC = bytes.fromhex("d9d505f920a163d7")
PAGE = 4096


@pytest.fixture
def book(tmp_path):
    """A directory with a journal, and a file of the user's beside it."""
    golden.editor(path=tmp_path / "book").unload()
    (tmp_path / "mine.txt").write_text("mine")
    return tmp_path / "book"


def journal_in(folder):
    return next(folder.glob("journal-*.sqlite"))


def attach(folder):
    return gf.attach(golden.Model().eval(), golden.LAYER, path=folder, tokenizer=golden.tokens)


WAYS = {
    "attach": lambda folder: attach(folder).unload(),
    "open": gf.Codebook.open,
    "read": lambda folder: read_saved(folder).codebook(),
    "offline": lambda folder: Offline(folder).close(),
    "pretrained": lambda folder: gf.from_pretrained(golden.Model().eval(), folder),
    "followed": lambda folder: gf.attach(
        golden.Model().eval(), golden.LAYER, path=folder, read_only=True
    ),
}


def rollback(*records, pages=1, sector=512, page=PAGE, magic=MAGIC, behind=b""):
    """A rollback journal that puts records (number, page) back."""
    head = magic + struct.pack(">IIIII", len(records), 0, pages, sector, page)
    content = head.ljust(sector, b"\0")
    for number, put in records:
        # The checksum of SQLite's: every 200th byte from the end.
        told = sum(put[at] for at in range(page - 200, 0, -200))
        content += struct.pack(">I", number) + put + struct.pack(">I", told)
    return content + behind


def naming(path):
    """The end of a rollback journal that names another file."""
    name = os.fsencode(path)
    return (
        struct.pack(">I", 0x40000000 // PAGE + 1)
        + name
        + struct.pack(">II", len(name), sum(name))
        + MAGIC
    )


def first_page(database, at, put):
    page = bytearray(database.read_bytes()[:PAGE])
    page[at : at + len(put)] = put
    return bytes(page)


CONTENTS = {
    "names a file of the user's": lambda db, mine: rollback(behind=naming(mine)),
    "names one, and was never begun": lambda db, mine: b"\0" * 512 + naming(mine),
    "names one, and is torn": lambda db, mine: MAGIC[:5] + b"\0" * 600 + naming(mine),
    "is a text": lambda db, mine: b"dear diary\n" * 9,
    "has pages of another size": lambda db, mine: rollback(page=512),
    "has sectors of no bytes": lambda db, mine: rollback(sector=512).replace(
        struct.pack(">II", 512, PAGE), struct.pack(">II", 0, PAGE)
    ),
    "makes the journal longer than the disk": lambda db, mine: rollback(pages=2**32 - 1),
    "makes it empty": lambda db, mine: rollback(pages=0),
    "asks for a log": lambda db, mine: rollback((1, first_page(db, 18, b"\2\2"))),
    "makes it another program's": lambda db, mine: rollback((1, first_page(db, 68, b"else"))),
    "asks for a log in a later part": lambda db, mine: (
        rollback((2, b"\0" * PAGE)).ljust(5120, b"\0") + rollback((1, first_page(db, 18, b"\2\2")))
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("way", ["attach", "offline"])
def test_a_rollback_journal_that_is_none_of_ours_is_not_put_back(name, way, book, tmp_path):
    database, mine = journal_in(book), tmp_path / "mine.txt"
    before = database.read_bytes()
    side = side_files.rollback_of(database)
    side.write_bytes(CONTENTS[name](database, mine))
    content = side.read_bytes()
    with pytest.raises(gf.CodebookCorrupt, match=r"-journal .*take it away"):
        WAYS[way](book)
    assert (mine.read_text(), side.read_bytes(), database.read_bytes()) == ("mine", content, before)


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_opening_removes_what_a_side_file_names(way, book, tmp_path):
    side = side_files.rollback_of(journal_in(book))
    side.write_bytes(rollback(behind=naming(tmp_path / "mine.txt")))
    with pytest.raises(gf.CodebookCorrupt, match="names another file"):
        WAYS[way](book)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("end", ["-journal", "-wal", "-shm"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder", "hard link", "file"])
@pytest.mark.parametrize("way", ["attach", "open"])
def test_what_is_no_file_of_ours_is_neither_read_nor_written(end, kind, way, book, tmp_path):
    mine, database = tmp_path / "mine.txt", journal_in(book)
    side = database.with_name(database.name + end)
    side.unlink(missing_ok=True)
    made = {
        "link": lambda: side.symlink_to(mine),
        "dangling link": lambda: side.symlink_to(tmp_path / "new"),
        "pipe": lambda: os.mkfifo(side),
        "folder": side.mkdir,
        "hard link": lambda: side.hardlink_to(mine),
        "file": lambda: side.write_text("mine too"),
    }
    made[kind]()
    if (end, way) == ("-journal", "open") and kind in ("hard link", "file"):
        mine.write_bytes(b"\0" * 4)  # nothing that SQLite puts back
        side.write_bytes(b"\0" * 4)
        WAYS[way](book)  # a reader writes to neither
        assert mine.read_bytes() == b"\0" * 4
        return
    with pytest.raises(gf.CodebookCorrupt):
        WAYS[way](book)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["link", "hard link"])
@pytest.mark.parametrize("which", ["journal", "lock"])
def test_a_file_with_another_name_elsewhere_is_not_written(kind, which, book, tmp_path):
    file = journal_in(book) if which == "journal" else book / "lock"
    moved = tmp_path / "elsewhere"
    if which == "lock":
        file.write_text("a text of the user's that is longer than a number\n")
    file.rename(moved)
    content = moved.read_bytes()
    file.symlink_to(moved) if kind == "link" else file.hardlink_to(moved)
    with pytest.raises(gf.CodebookCorrupt, match=r"is a link|another name somewhere"):
        attach(book)
    assert moved.read_bytes() == content


@pytest.mark.parametrize("way", ["attach", "open"])
def test_a_journal_that_asks_for_a_log_makes_none(way, book):
    with sqlite3.connect(journal_in(book)) as file:
        file.execute("PRAGMA journal_mode=WAL")
    file.close()
    names = {each.name for each in book.iterdir()}
    with pytest.raises(gf.CodebookCorrupt, match="asks for a write-ahead log"):
        WAYS[way](book)
    assert {each.name for each in book.iterdir()} == names


ADDED = {
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON versions BEGIN DELETE FROM head; END",
    "a view": "CREATE VIEW v AS SELECT * FROM versions",
    "a table": "CREATE TABLE t (a)",
    "an index": "CREATE INDEX i ON versions (time)",
}


@pytest.mark.parametrize("name", ADDED)
def test_a_schema_with_something_more_in_it_is_refused(name, book):
    with sqlite3.connect(journal_in(book)) as file:
        file.execute(ADDED[name])
    file.close()
    for way in ("attach", "open"):
        with pytest.raises(gf.CodebookCorrupt, match="does not hold the tables of a journal"):
            WAYS[way](book)


def test_room_that_is_said_to_be_free_and_is_not_is_refused_before_an_edit(book):
    database = journal_in(book)
    content = bytearray(database.read_bytes())
    content[32:40] = struct.pack(">II", 2, 1)  # the page of the versions, as one free page
    database.write_bytes(content)
    with pytest.raises(gf.CodebookCorrupt, match="is not what was written"):
        attach(book)


def test_rows_that_share_their_bytes_are_no_more_than_the_file(book, monkeypatch):
    journal = read_saved(book).open()[2]
    held = sum(len(entry.content) for entry in journal.entries())
    assert held <= journal.path.stat().st_size
    monkeypatch.setattr(type(journal), "_bytes_there", lambda journal: held - 1)
    with pytest.raises(gf.CodebookCorrupt, match="holds more than it has bytes"):
        list(journal.entries())
    journal.close()


@pytest.mark.parametrize("name", ["a?mode=memory", "a#b", "50%41", "a b", "ü", "'", "&nolock=1"])
def test_no_character_of_a_path_is_a_parameter(name, tmp_path):
    folder = tmp_path / name
    golden.editor(path=folder).unload()
    assert len(gf.Codebook.open(folder)) > 0
    attach(folder).unload()


def test_a_path_that_is_no_text_and_one_of_two_slashes_are_opened(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    golden.editor(path=folder).unload()
    assert len(gf.Codebook.open(f"/{folder}")) > 0


PUT = {
    "a foreign journal": lambda side, mine: side.write_bytes(rollback(behind=naming(mine))),
    "a link": lambda side, mine: (side.unlink(missing_ok=True), side.symlink_to(mine)),
    "another name": lambda side, mine: (side.unlink(missing_ok=True), side.hardlink_to(mine)),
}


@pytest.mark.parametrize("name", PUT)
def test_what_is_put_there_after_opening_is_not_written_through(name, book, tmp_path):
    grace, mine = attach(book), tmp_path / "mine.txt"
    count, side = len(grace.edits()), side_files.rollback_of(journal_in(book))
    PUT[name](side, mine)
    with pytest.raises(gf.CodebookCorrupt):
        grace.edit("15", 3)
    with pytest.raises(gf.CodebookReadOnly):  # until somebody has looked
        grace.edit("14", 3)
    assert len(grace.edits()) == count
    grace.unload()
    assert mine.read_text() == "mine"
    side.unlink()
    assert len(read_saved(book).codebook()[1].edits) == count


def interrupted(book, tmp_path):
    """The same directory as a crash in the middle of a transaction leaves it."""
    database, crashed = journal_in(book), tmp_path / "crashed"
    file = sqlite3.connect(database, isolation_level=None)
    for setting in ("journal_mode=TRUNCATE", "cache_size=1", "synchronous=OFF"):
        file.execute(f"PRAGMA {setting}")
    file.execute("BEGIN IMMEDIATE")
    for version in range(100, 140):
        file.execute(
            "INSERT INTO versions VALUES (?, 0.0, 'edit', ?, x'')", (version, bytes(2 * PAGE))
        )
    file.execute("UPDATE head SET version = 139")
    shutil.copytree(book, crashed)
    file.execute("ROLLBACK")
    file.close()
    assert side_files.rollback_of(journal_in(crashed)).stat().st_size > PAGE
    assert journal_in(crashed).read_bytes() != database.read_bytes()
    return crashed


def test_what_a_crash_of_ours_left_is_put_right(book, tmp_path):
    wanted = read_saved(book).codebook()[0]
    crashed = interrupted(book, tmp_path)
    with pytest.raises(OSError, match="needs a writer"):
        gf.Codebook.open(crashed)
    attach(crashed).unload()
    assert gf.Codebook.open(crashed).version == wanted.version


@pytest.mark.parametrize("of_ours", [True, False])
def test_repair_keeps_every_version_and_reads_no_foreign_side_file(of_ours, book, tmp_path):
    wanted = gf.Codebook.open(book)
    folder = interrupted(book, tmp_path) if of_ours else book
    database, mine = journal_in(folder), tmp_path / "mine.txt"
    if not of_ours:
        side_files.rollback_of(database).write_bytes(rollback(behind=naming(mine)))
        database.with_name(f"{database.name}-wal").symlink_to(mine)
    report = repair(folder)
    assert not report.was_sound
    assert [each.what for each in report.dropped] == ([] if of_ours else ["file"] * 2)
    assert mine.read_text() == "mine"
    assert gf.Codebook.open(folder).version == wanted.version
    attach(folder).unload()
    assert repair(folder).was_sound
    ends = ("-wal", "-shm")
    assert not [each for each in folder.iterdir() if each.name.endswith(ends)]
