"""A directory that several processes have: who reads while it changes, and who may edit."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import models
import pytest
import torch
from typer.testing import CliRunner

import grace_fast as gf
from grace_fast.codebook import mapped
from grace_fast.store import durable, files, locks, manifest, versions
from grace_fast.store.journal import JournalFile
from grace_fast.store.repair import repair
from grace_fast.store.saved import Offline, read_newest, read_saved
from grace_fast.tools import cli
from grace_fast.tools.report import reading

FAMILY = models.FAMILIES["gpt2"]


def attach(path=None, **settings):
    chosen = {"epsilon": FAMILY.epsilon, "replacement": "replace_all", "iterations": 2} | settings
    return gf.attach(models.build("gpt2"), FAMILY.layer, path=path, **chosen)


def batch_of(index):
    return models.edit_batch(FAMILY, [models.prompts(12)[index]], [[10 + index]])


def a_book(rows=40):
    torch.manual_seed(0)
    book = gf.Codebook(8, 2)
    book.append(torch.randn(rows, 8), torch.randn(rows, 2), torch.full((rows,), 0.1))
    return book


# Reading while it changes


class Steps:
    """Stops a reading before each file that it opens; at one of them, something happens."""

    def __init__(self, monkeypatch):
        self.count, self.at, self.happens = 0, -1, None
        real_open, real_connect = os.open, durable.JournalFile._opened

        def step():
            self.count += 1
            if self.count - 1 == self.at:
                self.at = -1
                self.happens()

        def open_file(path, *args, **kwargs):
            step()
            return real_open(path, *args, **kwargs)

        def connect(journal, read_only):
            step()
            return real_connect(journal, read_only)

        patched = type("os", (), {"__getattr__": lambda _, name: getattr(os, name)})()
        patched.open = open_file
        monkeypatch.setattr(mapped, "os", patched)
        monkeypatch.setattr(durable.JournalFile, "_opened", connect)

    def each(self, read, happens, before=lambda: None):
        """Read again and again, with something happening at another step each time."""
        self.at = -1
        before()
        self.count = 0
        read()
        steps = self.count
        assert steps > 1
        for at in range(steps):
            before()
            self.count, self.at, self.happens = 0, at, happens
            yield at, read()


def run(*arguments):
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


READINGS = {
    "open": lambda path: len(gf.Codebook.open(path)),
    "a reader's attach": lambda path: len(attach(path, read_only=True).edits()),
    "from_pretrained": lambda path: len(gf.from_pretrained(models.build("gpt2"), path).edits()),
    "the report": lambda path: len(reading.read(path).history.edits),
    "what commands read": lambda path: len(read_newest(path)[2].edits),
    "info": lambda path: run("info", path, "--json").count('"outcome"'),
    "verify": lambda path: run("verify", path, "--json").count('"edit"') or 2,
    "log": lambda path: 2 if run("log", path, "--json") else 0,
}


@pytest.mark.parametrize("name", READINGS)
def test_what_is_compacted_while_it_is_read_is_read_again(name, tmp_path, monkeypatch):
    with attach_and_edit(tmp_path) as grace:

        def compact():
            grace.compact()
            grace.codebook.append(*one_row(grace.codebook, dead=True))

        steps = Steps(monkeypatch)
        for at, _ in steps.each(lambda: READINGS[name](tmp_path), compact):
            assert steps.at == -1, f"step {at} was reached"


class attach_and_edit:
    """An editor of a directory with two edits."""

    def __init__(self, path):
        self.grace = attach(path)

    def __enter__(self):
        for index in range(2):
            self.grace.edit(batch_of(index))
        return self.grace

    def __exit__(self, *_):
        self.grace.unload()


def one_row(book, dead=False):
    radius = torch.full((1,), -1.0 if dead else 1.0)
    return torch.ones(1, book.key_dim), torch.ones(1, book.value_dim), radius


def test_a_follower_takes_up_what_is_compacted_while_it_refreshes(tmp_path, monkeypatch):
    with attach_and_edit(tmp_path) as grace:
        reader = attach(tmp_path, read_only=True)
        steps = Steps(monkeypatch)
        for _ in steps.each(reader.refresh, grace.compact, before=grace.compact):
            assert [edit.id for edit in reader.edits()] == [0, 1]
            assert reader.refresh() in (True, False)
            assert [each.version for each in reader.log()] == []


def test_a_codebook_alone_that_is_saved_anew_while_it_is_opened_is_opened_again(
    tmp_path, monkeypatch
):
    one, other = a_book(), a_book(50)
    one.save(tmp_path)
    for _, rows in Steps(monkeypatch).each(
        lambda: gf.Codebook.open(tmp_path, verify=True).snapshot().rows,
        lambda: other.save(tmp_path),
    ):
        assert rows == 50


def test_what_is_damaged_is_not_read_again(tmp_path, monkeypatch):
    a_book().save(tmp_path)
    next(tmp_path.glob("keys-*")).unlink()
    readings, real = [], manifest.read
    monkeypatch.setattr(manifest, "read", lambda *given: readings.append(1) or real(*given))
    with pytest.raises(gf.CodebookCorrupt, match="is missing"):
        gf.Codebook.open(tmp_path)
    assert len(readings) == 1


def test_who_is_never_left_to_read_is_told_so_in_the_end(tmp_path):
    a_book().save(tmp_path)
    tries = []

    def read():
        tries.append(1)
        a_book().save(tmp_path)
        raise gf.CodebookCorrupt("it does not fit")

    with pytest.raises(gf.CodebookCorrupt, match="it does not fit"):
        files.steadily(tmp_path, read)
    assert len(tries) == files._READINGS + 1


def test_a_version_that_is_taken_off_while_it_is_read_is_no_damage(tmp_path):
    with attach_and_edit(tmp_path) as grace:
        journal = versions.journal_of(tmp_path, read_saved(tmp_path).config)
        writer, real = grace._context.directory.store.journal, journal._chain
        content = list(writer.entries())[-1].content

        def chain(*given):
            writer.drop_last()
            writer.append(2, "rows", content)
            return real(*given)

        journal._chain = chain
        with pytest.raises(files.ChangedMeanwhile):
            list(journal.entries())
        journal._chain = real
        assert [each.kind for each in journal.entries()] == ["edit", "rows"]


def test_repair_is_refused_beside_an_editor(tmp_path):
    with attach_and_edit(tmp_path), pytest.raises(gf.CodebookLocked):
        repair(tmp_path)


def test_two_do_not_save_to_one_directory_at_once(tmp_path, monkeypatch):
    a_book().save(tmp_path)
    lock = locks.Lock(tmp_path)
    with pytest.raises(gf.CodebookLocked, match="is being edited by process"):
        a_book(50).save(tmp_path)
    lock.close()
    a_book(50).save(tmp_path)
    assert len(gf.Codebook.open(tmp_path, verify=True)) == 50


# The lock


def test_an_editor_whose_lock_was_removed_finds_out_before_it_acknowledges_an_edit(tmp_path):
    first = attach(tmp_path)
    first.edit(batch_of(0))
    (tmp_path / "lock").unlink()
    second = attach(tmp_path)
    second.edit(batch_of(1))
    for change in (
        lambda: first.edit(batch_of(2)),
        lambda: first.undo(0),
        first.compact,
        lambda: first.codebook.append(*one_row(first.codebook)),
    ):
        with pytest.raises(gf.CodebookLocked, match="lock was removed or replaced"):
            change()
    assert [edit.id for edit in first.edits()] == [0]
    first.unload()
    second.edit(batch_of(3))
    second.compact()
    assert [edit.id for edit in second.edits()] == [0, 1, 2]
    with pytest.raises(gf.CodebookLocked, match="being edited by process"):
        attach(tmp_path)  # the first one's end has freed nothing
    second.unload()
    assert len(gf.Codebook.open(tmp_path)) == 3


def test_an_edit_during_which_the_lock_is_removed_is_not_acknowledged(tmp_path, monkeypatch):
    grace = attach(tmp_path)
    grace.edit(batch_of(0))
    real = JournalFile.append

    def append(journal, *given):
        real(journal, *given)
        (tmp_path / "lock").unlink()

    monkeypatch.setattr(JournalFile, "append", append)
    with pytest.raises(gf.CodebookLocked, match="removed or replaced"):
        grace.edit(batch_of(1))
    monkeypatch.undo()
    assert [edit.id for edit in grace.edits()] == [0]
    (tmp_path / "lock").touch()
    with pytest.raises(gf.CodebookLocked):
        grace.edit(batch_of(1))
    grace.unload()


@pytest.mark.parametrize("way", ["compacting", "saving", "going back to a version"])
def test_who_loses_the_lock_while_it_writes_replaces_nothing(way, tmp_path, monkeypatch):
    grace = attach(tmp_path / "edited")
    grace.edit(batch_of(0))
    other = attach()
    other.edit(batch_of(1))
    other.save_pretrained(tmp_path / "saved")
    real = manifest.seal

    def seal(*given):
        for lock in tmp_path.glob("*/lock"):
            lock.unlink()
        return real(*given)

    before = {path: path.read_bytes() for path in tmp_path.glob(f"*/{files.CONFIG}")}
    monkeypatch.setattr(manifest, "seal", seal)
    changes = {
        "compacting": grace.compact,
        "saving": lambda: other.save_pretrained(tmp_path / "saved"),
        "going back to a version": lambda: Offline(tmp_path / "saved"),
    }
    with pytest.raises(gf.CodebookLocked, match="removed or replaced"):
        changes[way]()
    monkeypatch.undo()
    assert before == {path: path.read_bytes() for path in before}
    assert (
        len(gf.Codebook.open(tmp_path / "edited")) == len(gf.Codebook.open(tmp_path / "saved")) == 1
    )
    grace.unload()


def test_a_lock_that_is_removed_before_it_is_had_is_taken_anew(tmp_path, monkeypatch):
    real, removed = fcntl.flock, []

    def flock(*given):
        if not removed:
            removed.append((tmp_path / "lock").unlink())
        real(*given)

    monkeypatch.setattr(fcntl, "flock", flock)
    claim = locks.Claim(tmp_path / "lock")
    assert claim.is_in_place()
    with pytest.raises(BlockingIOError):
        locks.Claim(tmp_path / "lock")
    claim.close()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"keeps no locks \(No locks available\); keep"):
        attach(tmp_path)
    assert not locks._claims


# Paths


def test_another_working_directory_is_no_other_codebook(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    grace = attach("book")
    grace.edit(batch_of(0))
    a_book(5000).save("bare")
    reader, bare = attach(Path("book"), read_only=True), gf.Codebook.open("bare")
    offline_at = grace.path
    monkeypatch.chdir(tmp_path / "elsewhere")
    grace.edit(batch_of(1))
    assert reader.refresh()
    grace.compact()
    assert not reader.refresh()  # the same version, of other files
    assert [edit.id for edit in reader.edits()] == [0, 1]
    grace.checkout(grace.codebook.version)
    assert reader.refresh()
    assert [len(each.log()) for each in (grace, reader)] == [1, 1]
    assert gf.find(bare.keys[7:9], bare).row.tolist() == [7, 8]
    grace.save_pretrained(tmp_path / "book")
    grace.unload()
    assert offline_at == tmp_path / "book"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_loaded_codebook_and_one_that_is_edited_offline_stay_where_they_were(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with attach_and_edit("book"):
        pass
    saved, offline = read_saved("book"), Offline("book")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    offline.checkout(1)
    offline.compact()
    offline.close()
    assert saved.path == tmp_path / "book"
    assert len(read_saved(saved.path).codebook()[1].edits) == 1
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_stream_may_change_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    keys = torch.randn(20, 8)

    def blocks(first):
        os.chdir(tmp_path / "elsewhere")
        yield keys[first:], torch.zeros(20 - first, 1), torch.ones(20 - first)

    book = gf.Codebook.build("built", blocks, progress=False)
    assert torch.equal(book.keys, keys)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert torch.equal(gf.Codebook.open(tmp_path / "built").keys, keys)


def test_a_path_may_be_bytes_begin_at_home_and_go_up_from_a_link(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    monkeypatch.chdir(tmp_path)
    for given, place in (
        ("~/one", "one"),
        (b"two", "two"),
        (Path("link/../three"), "real/three"),
    ):
        a_book().save(given)
        assert len(gf.Codebook.open(given)) == len(gf.Codebook.open(tmp_path / place)) == 40
        with attach_and_edit(os.fsencode(given) + b"-edited") as grace:
            assert grace.path.is_absolute()
        assert len(gf.Codebook.open(tmp_path / f"{place}-edited")) == 2
