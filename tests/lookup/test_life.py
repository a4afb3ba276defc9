"""Codebooks that live decide as the law does, whatever is done to them and however they are asked.

A short run of what `make gate-life` does for long; each family of operations and each way to ask
has lives of its own, so that what is wrong names itself. A life is lived again from its seed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_build import host_module
from life import asking, drawing, mutants, operations, tables
from life.dropin import DropIn
from life.edited import Edited
from life.law import Model
from life.living import Life, Plan

import grace_fast as gf
from grace_fast import _native
from grace_fast.index import maintained
from grace_fast.lookup.backends import faiss_index
from grace_fast.lookup.faiss import FaissIndex

pytestmark = [
    pytest.mark.skipif(_native.cpu is None, reason="grace_fast._cpu was not built"),
    pytest.mark.filterwarnings("ignore::grace_fast.GraceWarning"),
]
BESIDE = ("append", "append wider", "widen")  # so that there is something to be wrong about
COMPILED = [name for name in asking.WAYS if name not in ("cuda", "triton", "shards", "faiss")]
LEAST = 2_000  # decisions of a test


def lived(seeds, decisions=LEAST, **plan):
    """Live through some seeds; return how many decisions were compared."""
    plan.setdefault("most_rows", 300)
    lives = [Life(seed, Plan(**plan)).live() for seed in seeds]
    assert sum(sum(one.counts.values()) for one in lives) > decisions
    return lives


@pytest.mark.parametrize("family", operations.FAMILIES)
def test_what_changes_a_codebook_leaves_nothing_stale(family):
    chosen = (*BESIDE, *operations.FAMILIES[family])
    lived(range(100, 103), operations=chosen, ways=COMPILED, mode="stepped", steps=30)


@pytest.mark.parametrize("mode", ["threads", "parked", "none", "at once"])
def test_builds_that_are_anywhere_leave_nothing_stale(mode):
    lived(range(200, 203), ways=COMPILED, mode=mode, steps=30)


@pytest.mark.parametrize("kind", drawing.KINDS)
def test_keys_of_every_kind_are_found(kind):
    lived(range(300, 302), kind=kind, ways=COMPILED, steps=30)


@pytest.mark.parametrize("way", [name for name in COMPILED if name != "reference"])
def test_every_way_to_ask_alone_remembers_nothing_stale(way):
    """What one call takes in is not there when another never asks."""
    lived(range(400, 402), ways=[way], steps=30, decisions=10)


def test_row_shards_remember_nothing_stale():
    lived(range(500, 502), ways=["find", "shards"], steps=40)


def test_faiss_proves_nothing_that_is_stale():
    if faiss_index.library() is None:
        pytest.skip("faiss is not installed")
    lived(range(600, 602), ways=["faiss"] * 6, steps=30, decisions=100)


def test_cuda_tables_on_this_host_remember_nothing_stale():
    tables.use(host_module())
    try:
        ways = ["prepared before", *["cuda"] * 12]  # each with its own chance
        lived(range(700, 702), ways=ways, steps=12, most_rows=60, decisions=40)
    finally:
        tables.use(None)


def test_triton_s_tables_remember_nothing_stale():
    pytest.importorskip("triton")
    script = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch; torch.set_num_threads(1)\n"
        "from life.living import Life, Plan\n"
        "lives = [Life(seed, Plan(ways=['prepared before', 'triton'], steps=25, most_rows=60,\n"
        "    dtype=torch.float32)) for seed in (800, 801)]\n"
        "print(sum(one.live().counts['triton'] for one in lives))"
    )
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 10


@pytest.mark.parametrize("seed", range(4))
def test_an_editor_and_the_reader_of_its_directory_remember_nothing_stale(seed):
    assert sum(Edited(seed).live(25).counts.values()) > 500


@pytest.mark.parametrize("seed", range(4))
def test_the_drop_in_remembers_nothing_stale(seed):
    assert sum(DropIn(seed).live(30).counts.values()) > 200


# The law itself, and lives


def test_the_law_is_the_same_in_numpy_and_compiled():
    rng = np.random.default_rng(0)
    for width, rows, batch in ((1, 9, 3), (7, 100, 5), (33, 700, 30), (2000, 9, 2)):
        model = Model(width, 1)
        keys = rng.integers(-2, 3, (rows, width)) + rng.integers(0, 2) * rng.random((rows, width))
        model.append(keys.astype(np.float32), np.zeros((rows, 1)), rng.random(rows) * 3)
        model.live[rng.integers(rows, size=2)] = 0
        queries = rng.standard_normal((batch, width))
        queries[0] = model.key(0)
        for one, other in zip(
            model._nearest(queries), model._nearest_in_numpy(queries), strict=True
        ):
            assert np.array_equal(one, other)


def test_the_law_by_hand():
    model = Model(1, 1)
    model.append(np.array([[0.0], [4.0], [9.0]]), np.zeros((3, 1)), np.array([2.0, 9.0, -1.0]))
    told = model.ask(np.array([[2.0], [3.0], [9.0], [np.nan], [60.0]]))
    assert told.row.tolist() == [0, 1, -1, -1, -1]
    assert told.nearest.tolist() == [0, 1, 2, -1, 2]
    assert told.within(1.0)[0].tolist() == [-1, 1, 2, -1, -1]
    model.live[0] = 0
    assert model.ask(np.array([[2.0]])).row.tolist() == [1]


def test_a_life_is_lived_again_from_its_seed():
    first, again = (Life(31, Plan(mode="stepped", steps=20)).live() for _ in "ab")
    assert first.counts == again.counts
    assert first.background.done == again.background.done
    assert np.array_equal(first.model.columns, again.model.columns)


QUICK_MUTANTS = [mutant for mutant in mutants.MUTANTS if mutant.quick]


def test_every_mutant_is_one_of_the_code_as_it_is():
    for mutant in mutants.MUTANTS:
        with mutants.put_in(mutant):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("mutant", QUICK_MUTANTS, ids=[each.name for each in QUICK_MUTANTS])
def test_a_fault_of_memory_is_found_soon(mutant):
    assert mutants.found_after(mutant, 30.0) is not None


# What lives have found


def ball(book, place, radius):
    key = torch.full((1, book.key_dim), float(place))
    book.append(key, torch.zeros(1, book.value_dim), torch.tensor([radius]))


def test_a_ball_wider_than_every_one_before_is_seen_by_who_asked_before():
    for rows in (1, 70):
        book = gf.Codebook(4, 1)
        for row in range(rows):
            ball(book, -row, 0.1)
        prepared = gf.prepare(book)
        query = torch.full((1, 4), 10.0)
        assert not prepared(query).hit.any()
        ball(book, 11, 5.0)
        assert prepared(query).row.tolist() == [rows]
        assert gf.find(query, book).row.tolist() == [rows]


def test_moved_keys_alone_do_not_have_runs_made_for_ever(monkeypatch):
    """More positions in the tail than it takes, of rows that are in runs already."""
    monkeypatch.setattr(maintained, "DELTA_ROWS", 30)
    generator = torch.Generator().manual_seed(0)
    book = gf.Codebook(16, 1)
    keys = torch.randn(60, 16, generator=generator)
    book.append(keys, torch.zeros(60, 1), torch.full((60,), 0.1))
    gf.prepare(book)
    begun = []
    usual = maintained.background

    def counting(steps):
        begun.append(steps)
        return usual(steps) if len(begun) < 20 else lambda: None

    monkeypatch.setattr(maintained, "background", counting)
    for row in range(40):
        with book.writing() as draft:
            draft.set_key(row, torch.randn(16, generator=generator))
        gf.find(keys[:1], book)
    known = maintained.of(book.snapshot())
    for _ in range(30):
        if known._wait is None or len(begun) >= 20:
            break
        known._wait()
    assert len(begun) < 5
    assert all(run.first < run.last for run in known.current.segments)


def test_faiss_does_not_end_the_process_for_keys_whose_distances_overflow():
    """Its training of cells would."""
    if faiss_index.library() is None:
        pytest.skip("faiss is not installed")
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(300, 4, generator=generator).clamp(-3, 3) * 1e38
    book = gf.Codebook(4, 1)
    book.append(keys, torch.zeros(300, 1), torch.ones(300))
    with pytest.raises(ValueError, match="overflow float32; use the index 'Flat'"):
        gf.find(keys[:2], book, backend=FaissIndex("IVF4,Flat"))
    assert gf.find(keys[:3].clone(), book, backend="faiss").row.tolist() == [0, 1, 2]
