"""FAISS: every kind of index against the law, what it follows, what it refuses."""

from __future__ import annotations

import contextlib
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import CASES, Case, codebooks, drawn, f32
from hypothesis import given

import grace_fast as gf
from grace_fast import semantics
from grace_fast.lookup import dispatch
from grace_fast.lookup import faiss as door
from grace_fast.lookup.backends import faiss, faiss_bounds, faiss_index
from grace_fast.lookup.backends.workload import Workload
from grace_fast.lookup.faiss import FaissIndex, build_index, drop_index, measure_indexes

library = pytest.importorskip("faiss")

# The cells and codes are as few as the small cases can train.
KINDS = {
    "flat": FaissIndex("Flat"),
    "flat Panorama": FaissIndex("FlatL2Panorama1"),
    "random rotation, flat": FaissIndex("RR2,Flat"),
    "IVF": FaissIndex("IVF2,Flat"),
    "IVF, both cells": FaissIndex("IVF2,Flat", nprobe=2),
    "IVF Panorama": FaissIndex("IVF2,FlatPanorama1"),
    "HNSW": FaissIndex("HNSW32", ef_search=16),
    "IVF of codes": FaissIndex("IVF2,PQ1x1"),
    "scalar quantiser": FaissIndex("SQ8"),
}
PROVES_ALL = {"flat", "flat Panorama", "random rotation, flat"}


def assert_certified_is_lawful(case: Case, index: FaissIndex) -> list[bool]:
    """Compare what is certified with the law; return which answers were."""
    expected = case.expected()
    match = gf.find(case.queries, case.book(), backend=index)
    near = gf.nearest(case.queries, case.book(), backend=index)
    assert match.certified.dtype == near.certified.dtype == torch.bool
    for at, proved in enumerate(match.certified.tolist()):
        row, squared = int(match.row[at]), float(match.squared_distance[at])
        if proved:
            assert bool(match.hit[at]) == expected.hit[at]
            assert row == (expected.row[at] if expected.hit[at] else -1)
            assert squared == (expected.squared[at] if expected.hit[at] else math.inf)
        elif bool(match.hit[at]):  # found without a proof, but in a ball for all that
            assert squared <= float(case.radii[row].double()) ** 2
        if near.certified[at]:
            assert int(near.row[at]) == expected.row[at]
            assert float(near.squared_distance[at]) == expected.squared[at]
    return match.certified.tolist()


@pytest.mark.filterwarnings("ignore:numpy")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_index_certifies_is_the_law(kind, case):
    try:
        certified = assert_certified_is_lawful(case, KINDS[kind])
    except ValueError:  # a few keys train no cells
        assert len(case.book()) < 300
        assert kind not in PROVES_ALL
        with pytest.raises(ValueError, match="is not trained"):
            build_index(case.book(), KINDS[kind])
        return
    if kind in PROVES_ALL:
        assert all(certified)


@given(case=codebooks())
def test_drawn_codebooks_are_decided_by_the_law(case):
    assert all(assert_certified_is_lawful(case, KINDS["flat"]))
    assert all(assert_certified_is_lawful(case, KINDS["random rotation, flat"]))
    if len(case.book()) >= 2:
        assert_certified_is_lawful(case, KINDS["IVF"])


@pytest.mark.parametrize("batch", [1, 19, 20, 64], ids=lambda batch: f"{batch} queries")
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("index", ["Flat", "FlatL2Panorama8", "PCA8,Flat", "IVF8,Flat"])
def test_ties_far_from_the_origin_are_decided_by_the_law(index, offset, batch):
    # From 20 queries on FAISS expands the square, and loses digits where norms are large.
    generator = torch.Generator().manual_seed(batch)
    keys = torch.randint(-3, 4, (600, 32), generator=generator) * 0.25 + offset
    keys[300:] *= -1  # another region: a centre in the middle does not help
    keys[50:90] = keys[:40]
    queries = keys[torch.randint(0, 600, (batch,), generator=generator)]
    queries = queries + torch.randint(-1, 2, queries.shape, generator=generator) * 0.125
    case = Case(queries, keys, torch.full((600,), 0.5))
    case.radii[::3] = 0.71
    certified = assert_certified_is_lawful(case, FaissIndex(index))
    assert index == "IVF8,Flat" or all(certified)


def clusters(rows: int, width: int, seed: int = 0) -> Case:
    """Return keys in 40 groups, queries near some of them, radii a fifth of their spacing."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(40, width, generator=generator)
    keys = centres[torch.arange(rows) % 40] + torch.randn(rows, width, generator=generator)
    near = keys[torch.randint(rows, (100,), generator=generator)]
    near = near + 0.02 * torch.randn(100, width, generator=generator)
    far = centres[torch.arange(100) % 40] + torch.randn(100, width, generator=generator)
    return Case(torch.cat([near, far]), keys, torch.full((rows,), 0.2 * width**0.5))


def test_cells_certify_most_of_what_lies_clear_of_their_walls():
    case = clusters(4000, 32)
    index = FaissIndex("IVF40,Flat", nprobe=4)
    certified = assert_certified_is_lawful(case, index)
    assert sum(certified) > 150
    one = assert_certified_is_lawful(case, FaissIndex("IVF40,Flat", nprobe=1))
    assert sum(one) < sum(certified)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
@pytest.mark.parametrize(
    "index", ["Flat", "FlatL2Panorama4", "PCA4,Flat", "IVF8,Flat", "PCA16,IVF8,Flat"]
)
def test_no_key_that_is_not_returned_is_nearer_than_said(index, offset):
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(800, 16, generator=generator) + offset
    keys[400:] *= -1
    queries = keys[::4] + torch.randn(200, 16, generator=generator)
    book = Case(queries, keys, torch.ones(800)).book()
    kept = faiss.train(book, FaissIndex(index, nprobe=2 if "IVF" in index else None))
    _, vectors, unseen = kept.search(queries.numpy() - kept.centre, 3, book.snapshot())
    distance = semantics.squared_distances(queries, keys).sqrt().numpy()
    np.put_along_axis(distance, vectors, np.inf, axis=1)
    assert (unseen <= distance.min(axis=1)).all()
    assert offset or (unseen > 0).mean() > 0.5  # far out float32 tells little apart


def test_a_wall_is_nearer_by_what_float32_may_have_got_wrong():
    flat = library.IndexFlatL2(1)
    flat.add(np.array([[0], [2]], np.float32))
    cells = faiss_bounds.Cells(library, flat)
    apart, order = np.array([[0.81, 1.21]]), np.array([[0, 1]])  # from 0.9; the wall is at 1
    [exact] = cells.least_distances(apart, order, 1, np.array([0.0]))
    [rounded] = cells.least_distances(apart, order, 1, np.array([0.1]))
    assert exact == pytest.approx(0.1, abs=1e-6)
    assert exact <= 0.1
    assert rounded == pytest.approx(0.05, abs=1e-6)  # a key of the cell may be at 0.95 then
    assert cells.least_distances(apart, order, 1, np.array([1.0])).tolist() == [0]


def test_walls_closer_than_the_ball_are_not_taken_for_a_proof():
    # The nearest key of each query is in the cell that was not read.
    keys = torch.cat([torch.linspace(0, 1, 40), torch.linspace(1.001, 3, 40)])[:, None]
    keys = torch.cat([keys, torch.zeros(80, 1)], dim=1)
    queries = torch.stack([torch.linspace(0.9, 1.1, 50), torch.zeros(50)], dim=1)
    case = Case(queries, keys, torch.full((80,), 0.05))
    for nprobe in (1, 2, 3):
        assert_certified_is_lawful(case, FaissIndex("IVF4,Flat", nprobe=nprobe, candidates=1))


@pytest.mark.parametrize("kind", ["HNSW", "IVF of codes", "scalar quantiser"])
def test_kinds_that_may_lose_keys_certify_nothing_and_say_so(kind):
    match = gf.find(drawn(90, 40, 12).queries, drawn(90, 40, 12).book(), backend=KINDS[kind])
    assert not match.certified.any()
    nowhere = gf.find(torch.full((1, 40), math.nan), drawn(90, 40, 12).book(), backend=KINDS[kind])
    assert nowhere.certified.tolist() == [True]  # no query is a miss by the law


def test_every_other_back_end_certifies_every_answer():
    case = drawn(90, 40, 12)
    for name in ("auto", "reference", "faiss"):
        assert gf.find(case.queries, case.book(), backend=name).certified.tolist() == [True] * 12
        assert gf.nearest(case.queries, case.book(), backend=name).certified.all()


# What an index follows


def edited(book: gf.Codebook, steps: int, seed: int) -> None:
    """Append, remove, move, and change radii, a few rows at a time."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        picked = int(torch.randint(book.snapshot().rows, (1,), generator=generator))
        choice = int(torch.randint(4, (1,), generator=generator))
        key = 3 * torch.randn(1, book.key_dim, generator=generator)
        with book.writing() as draft:
            if choice == 0 or not book.live[picked]:
                book.append(key, torch.zeros(1, 2), torch.full((1,), 1.0))
            elif choice == 1:
                draft.remove(picked)
            elif choice == 2:
                draft.set_key(picked, key[0])
            else:
                draft.set_radius(picked, float(key[0, 0].abs()))


@pytest.mark.parametrize(
    "kind", ["flat", "random rotation, flat", "IVF", "IVF, both cells", "HNSW"]
)
def test_an_index_follows_every_edit(kind):
    case = clusters(300, 16)
    book = case.book()
    index = KINDS[kind]
    for seed in range(12):
        edited(book, 10, seed)
        queries = torch.cat([case.queries[::8], book.keys[-20:] + 0.01])
        law = gf.find(queries, book, backend="reference")
        found = gf.find(queries, book, backend=index)
        proved = found.certified
        assert torch.equal(found.row[proved], law.row[proved])
        assert torch.equal(found.squared_distance[proved], law.squared_distance[proved])
        if kind != "IVF":
            assert proved.all() or kind == "HNSW"
            # So few keys lose nothing, if what was removed or moved is left out.
            assert torch.equal(found.row, law.row)


@pytest.mark.parametrize("index", ["Flat", "IVF2,Flat", "IVF8,PQ8x4", "HNSW32", "RR8,IVF2,Flat"])
@pytest.mark.parametrize("how", ["removed", "moved"])
def test_keys_that_are_gone_hide_no_key_that_is_there(index, how):
    asked = FaissIndex(index)
    case = clusters(300, 16)
    case.keys[100:200] = case.keys[0] + 0.001 * case.keys[100:200]  # nearer than row 99
    case.keys[99] = case.keys[0] + 0.01 * case.keys[99]
    gone = [0, *range(100, 200)]
    if how == "removed":
        case.removed = gone
    else:
        case.moved = {row: case.keys[row] + 50 for row in gone}
    book = gf.Codebook(16, 2)
    book.append(case.keys, torch.zeros(300, 2), case.radii)
    build_index(book, asked)
    with book.writing() as draft:
        for row in case.removed:
            draft.remove(row)
        for row, key in case.moved.items():
            draft.set_key(row, key)
    match = gf.find(case.keys[:1], book, backend=asked)
    assert match.row.tolist() == [99]


def test_an_index_answers_for_older_versions_and_drafts_too():
    case = clusters(200, 16)
    book = case.book()
    before = book.snapshot()
    for seed in range(6):
        edited(book, 20, seed)
    later = gf.find(case.queries, book, backend="faiss")
    assert torch.equal(later.row, gf.find(case.queries, book, backend="reference").row)
    old = gf.find(case.queries, before, backend="faiss")
    assert torch.equal(old.row, gf.find(case.queries, before, backend="reference").row)
    with contextlib.suppress(InterruptedError), book.writing() as draft:
        draft.append(case.queries[:3], torch.zeros(3, 2), torch.ones(3), None)
        draft.remove(int(later.row[later.hit][0]))
        drafted = draft.snapshot()
        found = gf.find(case.queries, drafted, backend="faiss")
        assert torch.equal(found.row, gf.find(case.queries, drafted, backend="reference").row)
        assert found.row[:3].tolist() == [drafted.rows - 3, drafted.rows - 2, drafted.rows - 1]
        raise InterruptedError  # the draft is dropped
    again = gf.find(case.queries, book, backend="faiss")
    assert torch.equal(again.row, later.row)


def test_an_index_is_built_anew_once_most_of_it_was_removed_or_it_has_grown(monkeypatch):
    monkeypatch.setattr(faiss_index, "SLACK_ROWS", 10)
    case = clusters(200, 16)
    book = case.book()
    before = book.snapshot()
    index = FaissIndex("IVF2,Flat", nprobe=2)
    kept = faiss.train(book, index)
    assert kept.count == 200
    for key_id in range(150):
        book.remove(key_id)
    gf.find(case.queries, book, backend=index)
    assert kept.count == 50
    law = gf.find(case.queries, before, backend="reference")
    old = gf.find(case.queries, before, backend=index)  # its slots are taken in again
    assert torch.equal(old.row, law.row)
    assert kept.count == 200
    built_for = kept._version
    book.append(clusters(900, 16, 1).keys, torch.zeros(900, 2), torch.ones(900))
    found = gf.find(case.queries, book, backend=index)
    assert torch.equal(found.row, gf.find(case.queries, book, backend="reference").row)
    assert kept._version > built_for


def test_an_index_whose_codebook_shrank_below_its_cells_serves_on(monkeypatch):
    monkeypatch.setattr(faiss_index, "SLACK_ROWS", 10)
    case = clusters(200, 16)
    book = case.book()
    index = FaissIndex("IVF16,Flat", nprobe=16)
    build_index(book, index)
    for key_id in range(190):
        book.remove(key_id)
    for queries in (case.queries, book.keys):
        law = gf.find(queries, book, backend="reference")
        found = gf.find(queries, book, backend=index)
        assert torch.equal(found.row, law.row)
        assert found.certified.all()


def test_one_index_serves_many_threads_beside_an_editor():
    case = clusters(400, 16)
    book = case.book()
    index = FaissIndex("IVF4,Flat", nprobe=4)
    faiss.train(book, index)
    wrong: list[int] = []

    def look_up() -> None:
        for _ in range(30):
            snapshot = book.snapshot()
            found = gf.find(case.queries[::10], snapshot, backend=index)
            law = gf.find(case.queries[::10], snapshot, backend="reference")
            wrong.append(int((found.row != law.row).sum()))

    readers = [threading.Thread(target=look_up) for _ in range(2)]
    for reader in readers:
        reader.start()
    for seed in range(30):
        edited(book, 3, seed)
    for reader in readers:
        reader.join()
    assert wrong == [0] * 60


def test_a_look_up_in_an_index_writes_nothing_and_draws_nothing():
    case = CASES["two hundred expanded keys"]
    book = case.book()
    snapshot, asked = book.snapshot(), case.queries.clone()
    before = [book.keys.clone(), book.radii.clone(), book.live.clone()]
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    for index in KINDS.values():
        gf.replace(torch.ones(200, 2, 2), case.queries, book, backend=index)
    assert book.snapshot() is snapshot
    assert torch.equal(asked, case.queries)
    for was, now in zip(before, (book.keys, book.radii, book.live), strict=True):
        assert torch.equal(was, now)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


# Refusals


REFUSED = {
    "an unknown index": (
        FaissIndex("IVFsome,Flat"),
        "FAISS does not know the index 'IVFsome,Flat': could not parse index string IVFsome,Flat",
    ),
    "a width it cannot divide": (
        FaissIndex("IVF2,PQ7x1"),
        "FAISS does not know the index 'IVF2,PQ7x1': ",
    ),
    "cells where there are none": (
        FaissIndex("Flat", nprobe=4),
        "the index 'Flat' takes no nprobe: ParameterSpace::set_index_parameter:could not set "
        "parameter nprobe",
    ),
    "more cells than keys": (
        FaissIndex("IVF91,Flat"),
        "the index 'IVF91,Flat' is not trained: its 91 cells need at least as many keys, and the "
        "codebook has 90",
    ),
    "more codes than keys": (
        FaissIndex("PQ4x8"),
        "the index 'PQ4x8' is not trained: FAISS cannot train it on 90 keys: Error: 'nx >= "
        "static_cast<idx_t>(k)' failed: Number of training points (90) should be at least as "
        "large as number of clusters (256)",
    ),
    "an index that takes no keys": (
        FaissIndex("NSG32,Flat"),
        "FAISS cannot add keys to the index 'NSG32,Flat': ",
    ),
}


@pytest.mark.parametrize(("index", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_an_index_is_refused_in_faiss_own_words(index, text):
    case = drawn(90, 40, 12)
    book = case.book()
    for _ in range(2):
        with pytest.raises(ValueError, match="index") as refusal:
            gf.find(case.queries, book, backend=index)
        assert text in str(refusal.value)
    assert ".cpp" not in str(refusal.value)
    with pytest.raises(ValueError, match="index"):
        build_index(book, index)


def test_an_index_that_is_no_description_is_refused():
    with pytest.raises(ValueError, match="description must be a string as"):
        FaissIndex(32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nprobe must be a whole number >= 1, got 0"):
        FaissIndex("IVF2,Flat", nprobe=0)
    with pytest.raises(ValueError, match="candidates must be a whole number >= 1, got None"):
        FaissIndex("IVF2,Flat", candidates=None)  # type: ignore[arg-type]


def workload(device: str = "cpu", rows: int = 100) -> Workload:
    return Workload(device, torch.float32, 1, rows, 16)


UNAVAILABLE = {
    "not installed": (
        None,
        workload(),
        r"faiss: faiss is not installed \(pip install 'grace_fast\[faiss\]'\)",
    ),
    "keys on a GPU": (
        SimpleNamespace(),
        workload("cuda"),
        r"this faiss has no GPU part \(pip install 'grace_fast\[faiss-gpu\]'\)",
    ),
    "keys elsewhere": (
        SimpleNamespace(),
        workload("mps"),
        "keys are on mps, neither on the host nor on a GPU",
    ),
    "rows past int32": (
        SimpleNamespace(),
        workload(rows=1 << 31),
        "2147483648 rows are more than FAISS counts in 32 bits; use row shards",
    ),
}


@pytest.mark.parametrize(("module", "asked", "text"), UNAVAILABLE.values(), ids=UNAVAILABLE.keys())
def test_faiss_says_why_it_cannot_take_a_call(monkeypatch, module, asked, text):
    monkeypatch.setattr(faiss_index, "library", lambda: module)
    for backend in ("faiss", FaissIndex("HNSW32")):
        with pytest.raises(gf.BackendUnavailable, match=text):
            dispatch.choose.__wrapped__(asked, backend)
    if module is None:
        with pytest.raises(gf.BackendUnavailable, match=text):
            build_index(drawn(9, 4, 1).book(), FaissIndex("HNSW8"))


def test_faiss_is_chosen_by_name_only():
    for rows in (10, 10**5, 10**9):
        asked = workload(rows=rows)
        assert dispatch.choose.__wrapped__(asked, "auto") is not faiss
        assert dispatch.choose.__wrapped__(asked, "faiss") is faiss
        assert dispatch.choose.__wrapped__(asked, FaissIndex("HNSW32")) is faiss
    assert all(faiss not in modules for modules in dispatch.AUTOMATIC.values())


# What is measured of an index


def test_an_index_is_measured_against_the_law():
    case = clusters(2000, 24)
    case.queries[:100] += 0.17 * torch.randn(100, 24, generator=torch.Generator().manual_seed(1))
    book = case.book()
    asked = [FaissIndex("IVF40,Flat", nprobe=1), FaissIndex("IVF40,Flat", nprobe=40), "Flat"]
    few, all_, flat = measure_indexes(case.queries, book, asked)
    law = gf.find(case.queries, book)
    found = gf.find(case.queries, book, backend=FaissIndex("IVF40,Flat", nprobe=1))
    assert few.index == "IVF40,Flat nprobe=1"
    assert (few.asked, few.hits) == (200, int(law.hit.sum()))
    assert few.wrong == int((found.row != law.row).sum()) > 0
    assert few.rate == few.wrong / 200
    assert few.lost == int((law.hit & ~found.hit).sum())
    assert few.certified == int(found.certified.sum()) < 200
    assert few.wrong_certified == 0
    for exact in (all_, flat):
        assert (exact.wrong, exact.certified) == (0, 200)
    assert min(few.us, all_.us, flat.us) > 0
    head, _, first, *_ = door.as_table([few, all_, flat]).splitlines()
    assert head.startswith("| index | one query | wrong decisions |")
    assert f"| {few.wrong} / 200 ({few.rate:.2%}) | {few.lost} / {few.hits} |" in first
    assert first.startswith("| IVF40,Flat nprobe=1 | ")


def test_one_index_is_searched_in_several_ways():
    case = clusters(2000, 24)
    case.queries[:100] += 0.17 * torch.randn(100, 24, generator=torch.Generator().manual_seed(1))
    book = case.book()
    certified = []
    for nprobe in (1, 40, None, 2):
        index = FaissIndex("IVF40,Flat", nprobe=nprobe)
        certified.append(int(gf.find(case.queries, book, backend=index).certified.sum()))
    assert certified[0] == certified[2] < certified[3] <= certified[1] == 200
    kept = faiss.train(book, FaissIndex("IVF40,Flat"))
    assert kept is faiss.train(book, FaissIndex("IVF40,Flat", nprobe=7))
    for _ in range(2):
        with pytest.raises(ValueError, match="the index 'IVF40,Flat' takes no efSearch"):
            gf.find(case.queries, book, backend=FaissIndex("IVF40,Flat", ef_search=7))
    with book.writing() as draft:
        draft.remove(0)  # what is left out is told together with how to search
    every = gf.find(case.queries, book, backend=FaissIndex("IVF40,Flat", nprobe=40))
    assert every.certified.all()


def test_an_index_that_was_dropped_is_built_again():
    case = clusters(300, 16)
    book, index = case.book(), FaissIndex("IVF4,Flat", nprobe=4)
    kept = faiss.train(book, index)
    assert kept.nbytes > 300 * 16 * 4
    assert faiss.train(book, index) is kept
    drop_index(book, index)
    drop_index(book, index)
    assert gf.find(case.queries, book, backend=index).certified.all()
    assert faiss.train(book, index) is not kept


# Calls that count past int32, and a GPU, both by stand-ins


@pytest.mark.parametrize("description", ["Flat", "IVF4,Flat"])
def test_no_call_of_faiss_counts_past_its_limit(monkeypatch, description):
    case = clusters(300, 16)
    limit = 16 * 25  # of queries times what is larger: the width, the cells, the answers
    asked = FaissIndex(description, candidates=20)
    book = case.book()
    law = gf.find(case.queries, book, backend="reference")
    monkeypatch.setattr(faiss_index, "INT32", limit)
    calls: list[int] = []
    search = faiss_index.Filled._search

    def watched(self, moved, lengths, k, snapshot):
        calls.append(len(moved) * max(k, moved.shape[1]))
        return search(self, moved, lengths, k, snapshot)

    monkeypatch.setattr(faiss_index.Filled, "_search", watched)
    monkeypatch.setattr(faiss, "INT32", 1 << 40)
    found = gf.find(case.queries, book, backend=asked)
    assert torch.equal(found.row[found.certified], law.row[found.certified])
    assert len(calls) > 8
    assert max(calls) <= limit


def test_an_index_is_moved_to_a_gpu_where_faiss_has_one(monkeypatch):
    """A stand-in takes the GPU's place: it only tells that the index was moved there."""
    moved: list[tuple[int, str]] = []

    def to_gpu(resources, device, index):
        assert resources == "resources"
        moved.append((device, type(index).__name__))
        if isinstance(index, library.IndexHNSW):
            raise RuntimeError("Error in x at y.cpp:7: this index type is not implemented")
        return index

    case = clusters(300, 16)
    book = case.book()
    snapshot = book.snapshot()
    pretended = SimpleNamespace(type="cuda", index=3)
    monkeypatch.setattr(library, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(library, "index_cpu_to_gpu", to_gpu, raising=False)
    assert faiss.why_not(workload("cuda")) is None
    for description in ("Flat", "IVF4,Flat", "HNSW32"):
        kept = faiss_index.Filled(FaissIndex(description))
        monkeypatch.setattr(faiss_index, "placed_on", lambda snapshot: pretended)
        if description == "HNSW32":
            with pytest.raises(ValueError, match="cannot move the index 'HNSW32' to a GPU: this"):
                kept.take_in(snapshot)
            continue
        kept.take_in(snapshot)
        queries = case.queries.numpy() - kept.centre
        rough, _, unseen = kept.search(queries, 1, snapshot)
        if description == "Flat":
            exact = gf.nearest(case.queries, book).squared_distance.sqrt().numpy()
            assert (unseen <= exact).all()
            assert (unseen > 0).any()
        else:
            assert not unseen.any()  # which cells a GPU read is not known
        lengths = faiss_bounds.norms(queries)
        band = kept.bounds.band(lengths, kept.bounds.longest)
        assert (band > 8 * 2.0**-11 * lengths**2).all()  # a GPU may round factors to TF32
        assert rough.shape == (200, 1)
    assert moved == [(3, "IndexFlat"), (3, "IndexIVFFlat"), (3, "IndexHNSWFlat")]


def test_pairs_are_summed_in_the_canonical_order():
    case = CASES["permuted coordinates tie only in canonical order"]
    every = case.queries.expand(64, -1)
    law = semantics.squared_distances(case.queries, case.keys)[0]
    assert torch.equal(semantics.pair_squared_distances(every, case.keys), law)
    for rows in (1, 2, 63):  # numpy adds one row in another order than many, unless told
        few = semantics.pair_squared_distances(every[:rows], case.keys[:rows])
        assert torch.equal(few, law[:rows])
    assert semantics.pair_squared_distances(f32()[:, None], f32()[:, None]).tolist() == []
