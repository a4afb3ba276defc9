"""What a look-up remembers is true of every later version, and of earlier ones asked again."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from stepped import builder

import grace_fast as gf
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import maintained, segments
from grace_fast.index.builder import Build
from grace_fast.lookup.backends import cpu

pytestmark = pytest.mark.skipif(cpu._cpu is None, reason="grace_fast._cpu was not built")
STEPS = ("fit", "encode", "sort", "look around", "predict", "publish", None)
WIDTH = 20


def decides(queries, book):
    """Compare `find` and a prepared call with float64 sums in order; say what hit."""
    snapshot = book.snapshot() if isinstance(book, gf.Codebook) else book
    keys, asked = snapshot.keys.double().numpy(), queries.double().numpy()
    live, radii = snapshot.live.numpy(), snapshot.radii.double().numpy()
    rows = []
    for query in asked:
        squared = np.zeros(len(keys))
        for j in range(keys.shape[1]):
            squared += (query[j] - keys[:, j]) ** 2
        squared[~live] = np.inf
        row = int(np.argmin(squared))
        hit = radii[row] >= 0 and squared[row] <= radii[row] ** 2
        rows.append(row if hit else -1)
    assert gf.find(queries, snapshot).row.tolist() == rows
    for query, row in zip(queries, rows, strict=True):
        assert gf.find(query[None], snapshot).row.tolist() == [row]
    if isinstance(book, gf.Codebook):
        assert gf.prepare(book, build_index=False)(queries).row.tolist() == rows
    return rows


def keys_and_radii(count, radius=0.01, seed=0):
    keys = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    return keys, torch.zeros(count, 2), torch.full((count,), radius)


def book_with(count, radius=0.01, seed=0):
    book = gf.Codebook(WIDTH, 2)
    book.append(*keys_and_radii(count, radius, seed))
    return book


def beside(key, distance):
    query = key.clone()
    query[0] += distance
    return query[None]


def add_a_wide_ball(book):
    key = torch.full((1, WIDTH), 10.0)
    book.append(key, torch.zeros(1, 2), torch.tensor([5.0]))
    return torch.cat([key, beside(key[0], 2.0)])


def one_key(tmp_path):
    return book_with(1)


def dead_keys(tmp_path):
    return book_with(3, -1.0)


def coded_keys(tmp_path):
    book = book_with(300)
    gf.prepare(book)
    return book


def an_opened_codebook(tmp_path):
    book_with(300).save(tmp_path)
    return gf.Codebook.open(tmp_path)


def keys_without_a_map(tmp_path):
    book = gf.Codebook(WIDTH, 2)
    keys, values, radii = keys_and_radii(100)
    book.append(keys * 1e-20, values, radii * 1e-18)
    gf.prepare(book)
    return book


@pytest.mark.parametrize(
    "made", [one_key, dead_keys, coded_keys, an_opened_codebook, keys_without_a_map]
)
def test_a_ball_wider_than_all_before_it_is_found_after_a_look_up(made, tmp_path):
    book = made(tmp_path)
    rows = book.snapshot().rows
    decides(book.keys[:2], book)
    assert decides(add_a_wide_ball(book), book) == [rows, rows]


@pytest.mark.parametrize("step", STEPS)
def test_a_ball_wider_than_all_before_it_is_found_while_codes_are_made(step, monkeypatch):
    steps, book = builder(monkeypatch), book_with(300)
    decides(book.keys[:2], book)
    if step is not None:
        steps.until(step)
        assert steps.next_step == step
    else:
        steps.finish()
    asked = add_a_wide_ball(book)
    assert decides(asked, book) == [300, 300]
    steps.finish()
    assert decides(asked, book) == [300, 300]


def shrunk_and_grown(book):
    with book.writing() as draft:
        draft.set_radius(61, 4.0)
    return 61


def key_put_back(book):
    with book.writing() as draft:
        draft.point_key(60, 60)
    return 60


@pytest.mark.parametrize("change", [shrunk_and_grown, key_put_back])
def test_an_old_version_that_is_asked_again_says_nothing_of_rows_it_does_not_have(change):
    book = book_with(60)
    old = book.snapshot()
    # In the page of the old version, behind its rows: a wide ball.
    book.append(*keys_and_radii(5, 5.0, seed=1))
    moved = book.keys[60].clone()
    with book.writing() as draft:  # in a page of its own
        for row in range(60, 65):
            draft.set_radius(row, 0.01)
        draft.set_key(60, moved + 50)
    gf.prepare(book)
    asked = torch.cat([moved[None], beside(book.keys[61], 2.0)])
    decides(asked, book)
    decides(asked, old)
    assert decides(asked, book) == [-1, -1]
    row = change(book)
    assert row in decides(asked, book)


def test_what_a_dropped_draft_left_in_a_page_hides_no_change(monkeypatch):
    steps, book = builder(monkeypatch), book_with(60)
    with suppress(RuntimeError), book.writing() as draft:
        draft.append(*keys_and_radii(3, 9.0, seed=1), None)
        raise RuntimeError
    old = book.snapshot()
    with book.writing() as draft:
        draft.set_radius(0, 0.02)
    book.append(*keys_and_radii(3, 0.01, seed=2))
    decides(book.keys[:3], book)
    steps.finish()
    decides(book.keys[:3], old)
    with book.writing() as draft:
        draft.set_radius(60, 3.0)
    assert decides(beside(book.keys[60], 2.0), book) == [60]


def test_an_old_version_of_fewer_pages_hides_no_change_in_the_others():
    book = book_with(4000)
    old = book.snapshot()
    book.append(*keys_and_radii(1000, seed=1))
    gf.prepare(book)
    decides(book.keys[:2], old)
    with book.writing() as draft:
        draft.set_radius(4500, 3.0)
    assert decides(beside(book.keys[4500], 2.0), book) == [4500]


def test_codes_that_were_saved_are_of_the_version_they_were_saved_of(tmp_path):
    book_with(300).save(tmp_path)
    book = gf.Codebook.open(tmp_path)
    moved = torch.full((WIDTH,), 7.0)
    with book.writing() as draft:  # before anybody asked
        draft.set_radius(5, 3.0)
        draft.set_key(6, moved)
    assert decides(torch.cat([beside(book.keys[5], 2.0), moved[None]]), book) == [5, 6]


@pytest.mark.parametrize("step", STEPS)
def test_what_is_edited_between_two_steps_of_a_merge_is_found(step, monkeypatch):
    monkeypatch.setattr(maintained, "DELTA_ROWS", 8)
    monkeypatch.setattr(segments, "ORDER_ROWS", 64)
    steps, book = builder(monkeypatch), book_with(300)
    decides(book.keys[:2], book)
    steps.finish()
    book.append(*keys_and_radii(20, seed=1))
    decides(book.keys[-2:], book)  # the tail is longer than it may be: a merge begins
    steps.until(step) if step is not None else steps.finish()
    moved = torch.full((WIDTH,), 7.0)
    book.append(*keys_and_radii(30, seed=2))
    with book.writing() as draft:
        draft.set_key(310, moved)
        draft.set_radius(311, 3.0)
        draft.set_radius(4, 3.0)
        draft.set_key(5, -moved)
    asked = [moved[None], -moved[None], beside(book.keys[311], 2.0), beside(book.keys[4], 2.0)]
    asked = torch.cat([*asked, book.keys[::7]])
    for _ in range(2):
        assert decides(asked, book)[:4] == [310, 5, 311, 4]
        steps.finish()
    # A build may also begin, and be left, at every one of these moments.
    with book.writing() as draft:
        draft.set_key(312, moved + 1)
    assert decides(torch.cat([asked, moved[None] + 1]), book)[-1] == 312


@pytest.mark.parametrize("moves", ["of many keys", "of one key"])
def test_a_tail_of_keys_that_moved_is_merged_with_the_runs_of_their_rows(moves, monkeypatch):
    monkeypatch.setattr(maintained, "DELTA_ROWS", 30)
    steps, book = builder(monkeypatch), book_with(100)
    decides(book.keys[:2], book)
    steps.finish()
    for move in range(50):
        with book.writing() as draft:
            draft.set_key(move if moves == "of many keys" else 7, torch.full((WIDTH,), move / 9))
        decides(book.keys[:2], book)
    steps.finish()  # it would go on and on
    state = maintained.of(book.snapshot()).current
    assert [part.last - part.first for part in state.segments] == [100]
    assert state.delta.count < 30
    decides(torch.cat([book.keys, keys_and_radii(100)[0][:50]]), book)


def test_a_version_that_could_not_be_taken_in_is_taken_in_at_the_next_look_up(monkeypatch):
    book = book_with(300)
    gf.prepare(book)
    moved = torch.full((WIDTH,), 7.0)
    with book.writing() as draft:
        draft.set_key(5, moved)
    usual = Snapshot.keys_at

    def fails(self, rows):
        raise MemoryError("no memory for keys")

    monkeypatch.setattr(Snapshot, "keys_at", fails)
    with pytest.raises(MemoryError):
        gf.find(moved[None], book)
    monkeypatch.setattr(Snapshot, "keys_at", usual)
    assert decides(moved[None], book) == [5]


def test_who_prepares_is_told_that_the_index_failed_and_look_ups_go_on(monkeypatch, caplog):
    book = book_with(300)

    def fails(self, segment):
        raise ValueError("a fault of the package")

    monkeypatch.setattr(Build, "_predict", fails)
    with pytest.raises(
        RuntimeError, match=r"index of 300 keys was not built: ValueError\('a fault"
    ):
        gf.prepare(book)
    assert decides(book.keys[:2], book) == [0, 1]
    logged = [record for record in caplog.records if "index was not built" in record.message]
    assert len(logged) == 1  # and not at every look-up
    assert logged[0].exc_info is not None


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_without_memory_for_an_index_look_ups_read_all_keys(monkeypatch, caplog, error):
    book = book_with(300)

    def fails(self, segment):
        raise error

    monkeypatch.setattr(Build, "_predict", fails)
    gf.prepare(book)
    assert decides(book.keys[:2], book) == [0, 1]
    logged = [record for record in caplog.records if "index was not built" in record.message]
    assert len(logged) == 1
    assert logged[0].exc_info is None


def test_what_followers_saw_of_a_version_that_was_refused_is_forgotten():
    book = book_with(300)
    gf.prepare(book)
    seen = []

    def follow(snapshot):
        seen.append(gf.find(torch.zeros(1, WIDTH), snapshot))
        if snapshot.rows == 301 and len(seen) == 2:
            raise RuntimeError("refused")

    book.subscribe("a follower", follow)
    refused, key = beside(book.keys[0], 1.0), beside(book.keys[0], -1.0)
    with pytest.raises(RuntimeError, match="refused"):
        book.append(refused, torch.zeros(1, 2), torch.tensor([0.01]))
    book.append(key, torch.zeros(1, 2), torch.tensor([0.01]))  # where the refused key was
    assert decides(torch.cat([key, refused]), book) == [300, -1]


@pytest.mark.parametrize("backend", ["auto", "reference", "faiss"])
def test_a_radius_that_float32_rounds_up_reaches_as_far_as_it_is_stored(backend):
    if backend == "faiss":
        pytest.importorskip("faiss")
    book = gf.Codebook(1, 2)
    book.append(torch.zeros(1, 1), torch.zeros(1, 2), torch.tensor([-1.0]))
    with book.writing() as draft:
        draft.set_radius(0, 0.8e-45)  # stored as 2^-149
    query = torch.full((1, 1), 2.0**-149)
    assert gf.find(query, book, backend=backend).row.tolist() == [0]
