"""Threads on one editor: what is trained while others edit, and what those who only ask get."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import models
import pytest
import torch
from models import FAMILIES

import grace_fast as gf
from grace_fast.editor import session as editor
from grace_fast.editor import training_run
from grace_fast.hook.training_override import TrainingOverride

FAMILY = FAMILIES["gpt2"]
PATIENCE = 60  # seconds after which a test gives up on a thread


def attach(model=None, **settings):
    chosen = {"epsilon": FAMILY.epsilon, "replacement": "replace_all", "iterations": 6} | settings
    return gf.attach(model or models.build("gpt2"), FAMILY.layer, **chosen)


def batch_of(index, target=None):
    return models.edit_batch(FAMILY, [models.prompts(12)[index]], [[target or 10 + index]])


def logits(grace, batch):
    with torch.no_grad():
        return grace.model(**batch).logits


@contextmanager
def thread(work):
    """Do some work in a thread within a `with` block; what it raises is raised at the end."""
    raised = []

    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    started = threading.Thread(target=run, daemon=True)
    started.start()
    yield started
    started.join(PATIENCE)
    assert not started.is_alive(), "the thread waits for something that does not come"
    if raised:
        raise raised[0]


class Trainings:
    """Stops the trainings of one thread before their first step, until they may go on."""

    def __init__(self, monkeypatch):
        self.real, self.count = training_run.train_rows, 0
        self.concerned = None
        self.begun, self.may_go_on = threading.Semaphore(0), threading.Semaphore(0)
        monkeypatch.setattr(training_run, "train_rows", self)

    def __call__(self, *args):
        if threading.current_thread() is self.concerned:
            self.count += 1
            self.begun.release()
            assert self.may_go_on.acquire(timeout=PATIENCE)
        return self.real(*args)

    @contextmanager
    def of(self, work):
        """Run an edit in a thread whose trainings are stopped; go on when its first has begun."""
        go = threading.Event()
        with thread(lambda: go.wait() and work()) as self.concerned:
            go.set()
            self.await_one()
            yield
            self.may_go_on.release(1000)

    def await_one(self):
        assert self.begun.acquire(timeout=PATIENCE)


@pytest.fixture
def trainings(monkeypatch):
    return Trainings(monkeypatch)


def rows_of(grace):
    book = grace.codebook
    return [t.clone() for t in (book.keys, book.values, book.radii, book.live)] + book.labels


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_while_a_value_is_trained_others_edit_undo_append_and_remove(trainings):
    grace = attach()
    first = grace.edit(batch_of(0))
    mine = []
    with trainings.of(lambda: mine.append(grace.edit(batch_of(1)))):
        key, value = torch.full((1, grace.codebook.key_dim), 9.0), torch.zeros(1, 32)
        added = grace.codebook.append(key, value, torch.ones(1))
        grace.codebook.remove(int(added[0]))
        theirs = grace.edit(batch_of(2))
        grace.undo(first.id)
        assert not mine
    assert trainings.count == 1
    assert (theirs.id, mine[0].id) == (1, 2)  # in order of commit
    assert [edit.id for edit in grace.edits()] == [1, 2]
    assert grace.verify().ok
    assert [one.edit for one in grace.explain(batch_of(1))] == [2]


def test_who_asks_while_a_value_is_trained_gets_what_is_published_and_never_that_value():
    grace = attach()
    grace.edit(batch_of(0))
    asked = [batch_of(index) for index in (0, 1, 2)]
    before = [logits(grace, batch) for batch in asked]
    in_training, asked_enough = threading.Event(), threading.Event()

    def stop_in_the_midst(module, args, output):
        is_trying = grace._adapter._modes.newest(TrainingOverride) is not None
        if threading.current_thread() is trainer and is_trying:
            in_training.set()
            assert asked_enough.wait(PATIENCE)

    # Behind the edited layer: the value in training is written already.
    handle = grace._adapter.layer.register_forward_hook(stop_in_the_midst)
    go = threading.Event()
    with thread(lambda: go.wait() and grace.edit(batch_of(1))) as trainer:
        go.set()
        assert in_training.wait(PATIENCE)
        for _ in range(3):
            assert same([logits(grace, batch) for batch in asked], before)
            assert not grace.explain(batch_of(1))[0].fires
        asked_enough.set()
    handle.remove()
    after = [logits(grace, batch) for batch in asked]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])


CONFLICTS = {
    "another target for the same prompt": (None, 55, 56),
    "the same target for the same prompt": (None, 55, 55),
    "the row's value was trained again": (55, 55, 55),
    "the row was given another target": (55, 56, 55),
}


@pytest.mark.parametrize(("before", "theirs", "mine"), CONFLICTS.values(), ids=list(CONFLICTS))
def test_an_edit_that_another_changes_is_decided_and_trained_anew(trainings, before, theirs, mine):
    together, in_turn = attach(stop_loss=0.0), attach(stop_loss=0.0)
    for grace in (together, in_turn):
        if before is not None:
            grace.edit(batch_of(0, before))
    with trainings.of(lambda: together.edit(batch_of(0, mine))):
        together.edit(batch_of(0, theirs))
    for target in (theirs, mine):
        in_turn.edit(batch_of(0, target))
    assert trainings.count == 2
    assert same(rows_of(together), rows_of(in_turn))
    pairs = zip(together.edits(), in_turn.edits(), strict=True)
    assert all(
        (a.id, a.outcome, a.row, a.loss, a.steps) == (b.id, b.outcome, b.row, b.loss, b.steps)
        for a, b in pairs
    )


def test_an_edit_that_others_come_between_again_and_again_is_trained_within_the_lock(trainings):
    grace = attach(stop_loss=0.0)
    with trainings.of(lambda: grace.edit(batch_of(0, 55))):
        for time in range(editor.TRAININGS):
            if time:
                trainings.await_one()
            grace.edit(batch_of(0, 60 + time))
            trainings.may_go_on.release()
        trainings.await_one()
        waits = threading.Thread(target=lambda: grace.edit(batch_of(1)), daemon=True)
        waits.start()
        waits.join(0.2)
        assert waits.is_alive()  # nobody comes between any more
        trainings.may_go_on.release()
        waits.join(PATIENCE)
    assert trainings.count == editor.TRAININGS + 1
    newest = grace.edits()[-2:]
    assert [edit.label.tolist() for edit in newest] == [[55], [11]]
    assert [edit.id for edit in grace.edits()] == list(range(editor.TRAININGS + 2))
    assert grace.verify().ok


@pytest.mark.parametrize("query", ["prompt_end", "every_token"])
def test_four_threads_edit_one_codebook(query):
    grace = attach(query=query, iterations=40, learning_rate=0.3)
    barrier = threading.Barrier(4)

    def edit(first):
        barrier.wait(PATIENCE)
        for index in range(first, 12, 4):
            grace.edit(batch_of(index))

    with thread(lambda: edit(0)), thread(lambda: edit(1)), thread(lambda: edit(2)):
        edit(3)
    edits = grace.edits()
    assert [edit.id for edit in edits] == list(range(12))
    assert sorted(edit.label.item() for edit in edits) == [10 + index for index in range(12)]
    assert grace.verify().fires == list(range(12))
    for edit in edits:
        index = edit.label.item() - 10
        assert [one.edit for one in grace.explain(batch_of(index))] == [edit.id]


def test_in_every_token_mode_another_edit_on_a_token_of_the_prompt_has_it_trained_anew(trainings):
    """The other tokens of a prompt hit rows of their own, and the value is trained beside them."""
    together, in_turn = (attach(query="every_token", stop_loss=0.0) for _ in range(2))
    prompt = models.prompts(12)[0]
    long = models.edit_batch(FAMILY, [prompt], [[50]])
    short = models.edit_batch(FAMILY, [prompt[:-1]], [[51]])  # ends where `long` has a token
    with trainings.of(lambda: together.edit(long)):
        together.edit(short)
    in_turn.edit(short)
    in_turn.edit(long)
    assert trainings.count == 2
    assert same([together.codebook.keys, together.codebook.radii],
                [in_turn.codebook.keys, in_turn.codebook.radii])  # fmt: skip
    assert together.verify().ok


def test_a_training_that_fails_leaves_what_others_did_meanwhile(trainings):
    grace = attach()

    def fail():
        with pytest.raises(RuntimeError, match="out of memory"):
            grace.edit(batch_of(1))

    with trainings.of(fail):
        real, trainings.real = trainings.real, _fails
        trainings.may_go_on.release()
        trainings.concerned.join(PATIENCE)
        trainings.real = real
        theirs = grace.edit(batch_of(2))
    assert [edit.id for edit in grace.edits()] == [theirs.id] == [0]
    assert len(grace.codebook) == 1
    assert grace.verify().ok


@pytest.mark.parametrize("trainings_before", [editor.TRAININGS, 0], ids=["without", "within"])
def test_a_version_that_is_refused_leaves_no_edit_behind(monkeypatch, trainings_before):
    grace = attach()
    grace.edit(batch_of(0))
    monkeypatch.setattr(editor, "TRAININGS", trainings_before)  # then within the lock
    refusing = []

    def follow(snapshot):
        if refusing:
            raise OSError("disk full")

    grace.codebook.subscribe("a disk", follow)
    refusing.append(True)
    with pytest.raises(OSError, match="disk full"):
        grace.edit(batch_of(1))
    assert [edit.id for edit in grace.edits()] == [0]
    refusing.clear()
    assert grace.edit(batch_of(1)).id == 1
    assert grace.verify().ok


def _fails(*_):
    raise RuntimeError("out of memory")


def test_an_undo_that_fails_loses_no_edit_of_another_thread():
    grace = attach()
    first = grace.edit(batch_of(0))
    refused, other = threading.Event(), threading.Event()

    class FullDisk:
        def record(self, before, after):
            if threading.current_thread() is undoing:
                refused.set()
                other.wait(0.2)  # the other edit has to wait for the end of this
                raise OSError("disk full")

    def undo():
        with pytest.raises(OSError, match="disk full"):
            grace.undo(first.id)

    grace.codebook.retain(FullDisk())
    go = threading.Event()
    with thread(lambda: go.wait() and undo()) as undoing:
        go.set()
        assert refused.wait(PATIENCE)
        grace.edit(batch_of(1))
        other.set()
    assert [edit.id for edit in grace.edits()] == [0, 1]
    assert grace.verify().fires == [0, 1]


def test_modes_and_gradients_come_back_when_the_last_of_two_edits_ends(trainings):
    grace = attach()
    grace.model.train()
    with trainings.of(lambda: grace.edit(batch_of(0))):
        grace.edit(batch_of(1))
        assert not grace.model.training  # the other one is still in training
        assert not any(one.requires_grad for one in grace.model.parameters())
    assert all(module.training for module in grace.model.modules())
    assert all(one.requires_grad for one in grace.model.parameters())


def test_the_adaptor_is_on_again_when_the_last_of_two_overlapping_blocks_is_left():
    grace = attach()
    before = logits(grace, batch_of(0))
    grace.edit(batch_of(0))
    edited = logits(grace, batch_of(0))
    one, other = grace.disable_adapter(), grace.disable_adapter()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(logits(grace, batch_of(0)), before)
    other.__exit__(None, None, None)
    assert torch.equal(logits(grace, batch_of(0)), edited)


def test_an_edit_within_a_draft_goes_on_from_it():
    apart, within = attach(), attach()
    key = within.query_of(batch_of(3))
    for grace in (apart, within):
        grace.edit(batch_of(0))
    row = (key, torch.ones(1, 32), torch.full((1,), 0.01))
    apart.codebook.append(*row)
    apart.edit(batch_of(1))
    version = within.codebook.version
    with within.codebook.writing():
        within.codebook.append(*row)
        within.edit(batch_of(1))
    assert within.codebook.version == version + 1
    assert same(rows_of(within)[:4], rows_of(apart)[:4])


def test_what_was_sketched_leaves_no_trace():
    book = gf.Codebook(2, 2)
    book.append(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2), [torch.tensor([1])] * 2)
    before = book.snapshot()
    with book.writing() as draft:
        book.append(torch.full((1, 2), 5.0), torch.full((1, 2), 5.0), torch.ones(1))
        drafted = draft.snapshot()
        with book.sketching() as sketch:
            sketch.set_radius(0, 7.0)
            sketch.set_value(2, torch.full((2,), 8.0))
            sketch.set_label(1, torch.tensor([9]))
            book.append(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1))
            assert sketch.rows == 4
            assert sketch.snapshot().row(0).radius == 7.0
        after = draft.snapshot()
        assert (after.rows, after.counts) == (drafted.rows, drafted.counts)
        assert after.row(2).value.tolist() == [5.0, 5.0]
        book.append(torch.full((1, 2), 6.0), torch.full((1, 2), 6.0), torch.ones(1))
    assert book.radii.tolist() == [1.0] * 4
    assert book.values[:, 0].tolist() == [1.0, 1.0, 5.0, 6.0]
    assert book.ids.tolist() == [0, 1, 2, 3]
    assert [None if one is None else one.tolist() for one in book.labels] == [[1], [1], None, None]
    with book.sketching():
        book.append(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1))
    assert (len(book), book.version, len(before)) == (4, 2, 2)
