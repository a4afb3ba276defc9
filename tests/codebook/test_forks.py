"""A child of a warmed-up process looks up, prepares, edits, saves and ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path

import golden_codebooks as golden
import models
import pytest
import torch

import grace_fast as gf
from grace_fast import _native
from grace_fast.codebook import forks
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.editor import training
from grace_fast.hook import compile
from grace_fast.index import maintained
from grace_fast.lookup.backends import faiss
from grace_fast.lookup.faiss import FaissIndex
from grace_fast.store import atomic, journal, sqlite_file

needs_extension = pytest.mark.skipif(_native.cpu is None, reason=_native.missing)
FAMILY = models.FAMILIES["gpt2"]
PATIENCE = 40  # seconds; a child that waits for ever is ended by then
ROWS, WIDTH = 2500, 16


def forked(work, leave=os._exit):
    """Do some work in a forked child; return how it ended: 0 where the work returned."""
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE)
        try:
            work()
        except BaseException as error:
            print(f"in the child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        leave(0)
    return os.waitpid(child, 0)[1]


def a_book(rows=ROWS):
    torch.manual_seed(0)
    book = gf.Codebook(WIDTH, 2)
    keys = torch.randn(rows, WIDTH)
    book.append(keys, torch.randn(rows, 2), torch.full((rows,), 0.1))
    return book, keys


@contextmanager
def another_thread(within):
    """Let another thread be within a `with` block meanwhile."""
    inside, may_leave = threading.Event(), threading.Event()

    def run():
        with within:
            inside.set()
            may_leave.wait(PATIENCE)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert inside.wait(PATIENCE)
    try:
        yield
    finally:
        may_leave.set()
        thread.join()


@pytest.fixture
def short_wait(monkeypatch):
    """Do not wait long for a lock that is not given back."""
    monkeypatch.setattr(forks, "WAIT_S", 0.05)


@pytest.fixture
def stuck_build(monkeypatch):
    """Have this process's next build never come to its end; those of its children do."""
    here, begun, may_end = os.getpid(), threading.Event(), threading.Event()
    real = maintained.in_a_thread

    def stuck(steps):
        yield next(steps)
        if os.getpid() == here:
            begun.set()
            may_end.wait(PATIENCE)
        yield from steps

    monkeypatch.setattr(maintained, "background", lambda steps: real(stuck(steps)))
    yield begun
    may_end.set()


# Codes


@needs_extension
@pytest.mark.parametrize("asked_before", ["find", "nearest", "prepared"])
def test_a_child_makes_the_codes_itself_that_were_in_the_making(
    asked_before, stuck_build, tmp_path
):
    book, keys = a_book()
    prepared = gf.prepare(book, build_index=False)
    {"find": gf.find, "nearest": gf.nearest, "prepared": lambda q, _: prepared(q)}[asked_before](
        keys[:3], book
    )
    assert stuck_build.wait(PATIENCE)

    def work():
        assert gf.find(keys[5:9], book).row.tolist() == [5, 6, 7, 8]
        known = maintained.of(book.snapshot())
        known.settle()
        assert known.current is not None, "the first look-up begins a build in the child"
        assert gf.find(keys[:2], book).effort is not None
        assert gf.prepare(book)(keys[9:11]).row.tolist() == [9, 10]
        book.save(tmp_path / "saved")

    assert forked(work) == 0
    assert gf.Codebook.open(tmp_path / "saved", verify=True).snapshot().rows == ROWS


@needs_extension
def test_a_child_builds_nothing_before_it_asks(stuck_build):
    book, keys = a_book()
    gf.find(keys[:3], book)
    assert stuck_build.wait(PATIENCE)

    def work():
        assert threading.active_count() == 1
        maintained._stop_building()  # as at exit

    assert forked(work) == 0


@needs_extension
def test_codes_that_may_be_half_taken_in_are_made_anew(short_wait):
    book, keys = a_book()
    gf.prepare(book)
    known = maintained.of(book.snapshot())

    def work():
        assert known.current is None
        assert gf.find(keys[5:9], book).row.tolist() == [5, 6, 7, 8]
        known.settle()
        assert known.current is not None

    with another_thread(known._lock):
        assert forked(work) == 0
    assert known.current is not None


# Locks that other threads hold


def test_a_fork_waits_for_a_lock_that_is_given_back_soon(monkeypatch):
    monkeypatch.setattr(forks, "WAIT_S", PATIENCE)
    book, _ = a_book(8)
    held, forking = threading.Event(), threading.Event()
    monkeypatch.setattr(forks, "_take", _telling(forks._take, forking))

    def edit():
        with book.writing() as draft:
            held.set()
            assert forking.wait(PATIENCE)
            draft.remove(0)

    thread = threading.Thread(target=edit)
    thread.start()
    assert held.wait(PATIENCE)

    def work():
        assert len(book) == 7
        assert not book.was_forked_in_writing

    assert forked(work) == 0
    thread.join()


def _telling(call, event):
    def tell(*args):
        event.set()
        return call(*args)

    return tell


class Owner:
    """Something with a lock, as other threads make it while a process forks."""

    def __init__(self):
        self.lock = threading.Lock()


def test_what_is_made_while_a_process_forks_is_waited_for_too(monkeypatch):
    monkeypatch.setattr(forks, "WAIT_S", PATIENCE)
    real, made, given_back = forks._take, [], threading.Event()

    def give_back(owner):
        given_back.set()
        owner.lock.release()

    def take(lock, until):
        if not made:
            made.append(Owner())
            made[0].lock.acquire()
            held, forks._taken.locks = forks._taken.locks, []
            forks.guard(made[0], "lock")
            forks._taken.locks = held
            threading.Timer(0.1, give_back, made).start()
        real(lock, until)

    monkeypatch.setattr(forks, "_take", take)

    def work():
        assert given_back.is_set()

    assert forked(work) == 0


def test_nothing_with_a_lock_is_made_between_the_last_lock_and_the_fork(monkeypatch):
    owner, guarded, threads = Owner(), threading.Event(), []

    def guard():
        forks.guard(owner, "lock")
        guarded.set()

    def rest():
        threads.append(threading.Thread(target=guard))
        threads[0].start()
        guarded.wait(0.1)

    monkeypatch.setattr(forks, "rest_openmp", rest)

    def work():
        assert not guarded.is_set()
        forks.guard(Owner(), "lock")

    assert forked(work) == 0
    assert guarded.wait(PATIENCE)
    threads[0].join()


@pytest.mark.parametrize(("module", "call"), [(sqlite_file, "connected"), (journal, "_chained")])
def test_no_process_is_forked_while_a_journal_is_opened_or_read(
    module, call, tmp_path, monkeypatch
):
    golden.editor(path=tmp_path).unload()
    monkeypatch.setattr(forks, "WAIT_S", PATIENCE)
    inside, forking, name = threading.Event(), threading.Event(), "reader"
    real_take, real_call, states = forks._take, getattr(module, call), []

    def wait(*given):
        if threading.current_thread().name == name and not inside.is_set():
            inside.set()
            forking.wait(0.3)  # in the midst of rows nothing of SQLite's is going on
            made = real_call(*given)
            states.append("over")
            return made
        return real_call(*given)

    def take(*given):
        forking.set()
        real_take(*given)

    monkeypatch.setattr(forks, "_take", take)
    monkeypatch.setattr(module, call, wait)
    thread = threading.Thread(target=gf.Codebook.open, args=(tmp_path,), name=name)
    thread.start()
    assert inside.wait(PATIENCE)

    def work():
        assert states == ["over"] or call == "_chained"
        assert len(gf.Codebook.open(tmp_path)) > 0

    assert forked(work) == 0
    thread.join()


def test_a_child_computes_what_a_thread_was_computing_that_it_has_not(monkeypatch):
    (one, _), (other, _) = a_book(8), a_book(8)
    real, inside, may_end = Snapshot.column, threading.Event(), threading.Event()

    def column(snapshot, name):
        if threading.current_thread() is thread:
            inside.set()
            may_end.wait(PATIENCE)
        return real(snapshot, name)

    monkeypatch.setattr(Snapshot, "column", column)
    thread = threading.Thread(target=lambda: one.snapshot().radii)
    thread.start()
    assert inside.wait(PATIENCE)

    def work():
        assert len(other.snapshot().radii) == 8
        assert len(one.snapshot().radii) == 8

    assert forked(work) == 0
    may_end.set()
    thread.join()


def test_a_lock_of_an_adaptor_that_looks_for_its_layer_is_free_in_the_child():
    attachment = golden.editor()._adapter.attachment
    with another_thread(attachment._settling):

        def work():
            with attachment._settling:
                pass

        assert forked(work) == 0


def test_every_lock_of_the_package_is_known_to_forks():
    package = Path(gf.__file__).parent
    for file in package.rglob("*.py"):
        text = file.read_text()
        for name in re.findall(r"(\w+) = threading\.R?Lock\(\)", text):
            guarded = re.search(rf'guard\([^()]*"{name}"', text)
            assert guarded or file.name == "forks.py", f"{file}: {name}"
        if file.name != "once.py":
            assert "functools.cached_property" not in text, file
            assert not re.search("from functools import .*cached_property", text), file


def test_a_draft_of_another_thread_is_dropped_in_the_child(short_wait):
    book, keys = a_book(8)

    def work():
        assert len(book) == 8
        assert book.append(keys[:1], torch.ones(1, 2), torch.ones(1)).tolist() == [8]
        with book.held() as now:
            assert now.rows == 9

    inside, may_go_on = threading.Event(), threading.Event()

    def edit():
        with book.writing() as draft:
            book.append(keys[:3], torch.zeros(3, 2), torch.ones(3), [torch.ones(1).long()] * 3)
            draft.remove(0)
            inside.set()
            may_go_on.wait(PATIENCE)

    thread = threading.Thread(target=edit)
    thread.start()
    assert inside.wait(PATIENCE)
    assert forked(work) == 0
    may_go_on.set()
    thread.join()
    assert len(book) == 10


def attach(path=None, model=None, **settings):
    chosen = {"epsilon": FAMILY.epsilon, "replacement": "replace_all", "iterations": 2} | settings
    return gf.attach(model or models.build("gpt2"), FAMILY.layer, path=path, **chosen)


def batch_of(index):
    return models.edit_batch(FAMILY, [models.prompts(12)[index]], [[10 + index]])


def test_an_edit_that_another_thread_is_in_the_middle_of_is_none_in_the_child(short_wait):
    grace = attach()
    grace.edit(batch_of(0))
    before = grace.edits()

    @contextmanager
    def undoing():
        with grace._context.noting() as draft:
            grace._context.history.undo(draft, 0)
            yield

    def work():
        assert grace.edits() == before
        assert grace.verify().ok
        assert grace.explain(batch_of(0))[0].edit == 0
        assert grace.edit(batch_of(1)).id == 1

    with another_thread(undoing()):
        assert forked(work) == 0
    assert grace.edits() == []


def test_what_other_threads_took_out_of_a_model_is_back_in_the_child(short_wait):
    grace = attach()
    grace.edit(batch_of(0))
    model = grace.model.train()

    def work():
        assert model.training
        assert all(one.requires_grad for one in model.parameters())
        assert not grace._adapter._modes.disabled
        assert not compile._wanted
        grace.edit(batch_of(1))

    import torch._dynamo  # noqa: F401

    with (
        another_thread(training.frozen(model)),
        another_thread(grace.disable_adapter()),
        another_thread(compile.stood_aside()),
    ):
        assert not model.training
        assert forked(work) == 0
        with training.frozen(model), grace.disable_adapter():  # what is its own stays so
            assert (
                forked(lambda: _require(not model.training and grace._adapter._modes.disabled)) == 0
            )
        assert not model.training


def _require(truth):
    assert truth


def test_counters_are_read_and_kept_in_the_child(short_wait):
    grace = attach()
    grace.edit(batch_of(0))

    def work():
        calls = grace.counters.calls
        with torch.no_grad():
            grace.model(**batch_of(0))
        assert grace.counters.calls == calls + 1
        grace._adapter.tally._failing.acquire(timeout=1)

    with another_thread(grace._adapter.tally._failing):
        assert forked(work) == 0


def test_mapped_rows_are_tested_and_read_in_the_child(short_wait, tmp_path):
    book, keys = a_book()
    book.save(tmp_path)
    book = gf.Codebook.open(tmp_path)

    def work():
        assert gf.find(keys[5:9], book).row.tolist() == [5, 6, 7, 8]

    with another_thread(book.snapshot().key_file._testing):
        assert forked(work) == 0


def test_an_index_that_another_thread_changes_is_built_anew_in_the_child(short_wait):
    pytest.importorskip("faiss", exc_type=ImportError)
    book, keys = a_book()
    index = FaissIndex("Flat")
    assert gf.find(keys[:2], book, backend=index).row.tolist() == [0, 1]
    kept = faiss.train(book, index)

    def work():
        assert gf.find(keys[:2], book, backend=index).row.tolist() == [0, 1]

    with another_thread(kept.lock):
        assert forked(work) == 0


def test_a_fork_of_a_fork_is_right_too(stuck_build):
    book, keys = a_book()
    gf.find(keys[:3], book)

    def work():
        gf.find(keys[:3], book)
        assert forked(lambda: gf.prepare(book)(keys[:3])) == 0

    assert forked(work) == 0


def test_a_process_that_was_forked_without_python_knowing_is_mended_by_what_it_calls_then():
    book, keys = a_book()  # servers in C fork by themselves, and say so in the child only
    with another_thread(book.held()):

        def work():
            forks._taken.locks.clear()
            forks._in_child()
            book.append(keys[:1], torch.ones(1, 2), torch.ones(1))

        assert forked(work) == 0


# Threads of OpenMP

TWO_THREADS = """
import os, signal, sys, torch
torch.set_num_threads(2)
import grace_fast as gf
try:
    import faiss
    from grace_fast.lookup.faiss import FaissIndex
    backends = ["auto", FaissIndex("Flat")]
except ImportError:
    backends = ["auto"]
square = torch.randn(300, 300)
book = gf.Codebook(32, 1)
keys = torch.randn(4000, 32)
book.append(keys, torch.zeros(4000, 1), torch.full((4000,), 0.1))
wanted = list(range(500))
def ask():
    square @ square
    for backend in backends:
        assert gf.find(keys[:500], book, backend=backend).row.tolist() == wanted
    assert gf.nearest(keys[:500], book).row.tolist() == wanted
    assert torch.get_num_threads() == 2
ask()
children = []
for _ in range(2):
    child = os.fork()
    if not child:
        signal.alarm(60)
        ask()
        sys.exit(0)
    children.append(child)
ask()
statuses = [os.waitpid(child, 0)[1] for child in children]
print("children", statuses)
"""


def test_children_of_a_process_with_several_threads_compute_on_several_and_end():
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", TWO_THREADS],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.stdout == "children [0, 0]\n", done.stderr


# Directories


def test_a_child_of_an_editor_reads_and_does_not_edit(tmp_path):
    grace = attach(tmp_path)
    grace.edit(batch_of(0))
    trained = grace.counters.calls

    def work():
        assert [each.version for each in grace.log()] == [1]
        assert grace.verify().ok
        assert grace.explain(batch_of(0))[0].fires
        for change in (
            lambda: grace.edit(batch_of(1)),
            lambda: grace.undo(0),
            grace.compact,
            lambda: grace.checkout(1),
            lambda: grace.save_pretrained(tmp_path),
        ):
            with pytest.raises(gf.CodebookReadOnly, match="of which this is a fork"):
                change()
        assert grace.counters.calls == trained, "refused before anything is computed"
        with pytest.raises(gf.CodebookLocked):
            attach(tmp_path)
        grace.unload()

    assert forked(work) == 0
    grace.edit(batch_of(1))
    assert grace.verify().ok
    grace.unload()


def test_the_lock_of_an_editor_ends_with_it_though_a_child_lives_on(tmp_path):
    grace = attach(tmp_path)
    grace.edit(batch_of(0))
    may_end, end = os.pipe()
    child = os.fork()
    if not child:
        os.close(end)
        os.read(may_end, 1)
        os._exit(0)
    grace.unload()
    again = attach(tmp_path)
    again.edit(batch_of(1))
    again.unload()
    os.close(end)
    os.close(may_end)
    assert os.waitpid(child, 0)[1] == 0


def test_a_child_follows_with_a_connection_of_its_own(tmp_path):
    grace = attach(tmp_path)
    grace.edit(batch_of(0))
    reader = attach(tmp_path, read_only=True)
    theirs = reader._context.directory.followed._connection
    grace.edit(batch_of(1))

    def work():
        assert reader.refresh()
        assert len(reader.edits()) == 2
        assert reader._context.directory.followed._connection is not theirs
        reader.unload()

    assert forked(work) == 0
    grace.compact()
    assert forked(lambda: _require(reader.refresh() and len(reader.edits()) == 2)) == 0
    assert reader.refresh()
    grace.unload()


def test_a_worker_that_ends_within_a_stream_leaves_its_build_alone(tmp_path):
    keys, values = torch.randn(900, 8), torch.randn(900, 2)
    ended = []

    def blocks(first):
        for at in range(first, 900, 300):
            if at == 600:
                child = os.fork()
                if not child:
                    raise SystemExit(0)
                ended.append(os.waitpid(child, 0)[1])
            here = slice(at, at + 300)
            yield keys[here], values[here], torch.ones(300)

    try:
        book = gf.Codebook.build(tmp_path / "built", blocks, progress=False)
    except SystemExit:
        os._exit(0)  # in the child
    assert ended == [0]
    assert torch.equal(book.keys, keys)
    assert torch.equal(gf.Codebook.open(tmp_path / "built", verify=True).keys, keys)


def test_a_child_that_ends_removes_no_folder_that_its_parent_works_in(tmp_path):
    with atomic.temporary_folder(tmp_path) as folder:
        (folder / "half").touch()
        assert forked(weakref.finalize._exitfunc) == 0  # as at exit
        assert (folder / "half").exists()
    assert not folder.exists()
