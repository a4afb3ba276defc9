"""Edits between look-ups by the Triton back end, each look-up compared with the law.

Run as a program under the interpreter; `test_triton_find.py` runs it on a GPU where there is one.
"""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

import grace_fast as gf
from grace_fast import semantics
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import maintained
from grace_fast.lookup.backends import graphs
from grace_fast.lookup.backends import triton as backend


def assert_lawful(queries: Tensor, snapshot: Snapshot, what: str) -> None:
    row, squared = semantics.nearest(queries.cpu(), snapshot.keys.cpu(), snapshot.live.cpu())
    hit = semantics.in_ball(squared, snapshot.radii.cpu()[row])
    got = gf.find(queries, snapshot, backend="triton")
    assert torch.equal(got.hit.cpu(), hit), what
    assert torch.equal(got.row.cpu(), row.masked_fill(~hit, -1)), what
    assert torch.equal(got.squared_distance.cpu(), squared.masked_fill(~hit, torch.inf)), what


def by_codes(book: gf.Codebook) -> bool:
    table = backend._tables.of(book.snapshot(), backend.Table)
    return table._state is not None and table._index.current is table._state


def edits(device: str) -> None:
    """Append, remove, widen, shrink, move, refit and draft; look up after each."""
    from grace_fast.kernels import code_tiles

    torch.manual_seed(0)
    if device == "cpu":
        code_tiles.TILE.update(BLOCK_B=16)
    keys = torch.randn(300, 24, device=device) * torch.arange(1, 25, device=device).float() ** -1

    def append(rows: Tensor, radius: float) -> None:
        book.append(rows, torch.zeros(len(rows), 2), torch.full((len(rows),), radius))

    book = gf.Codebook(24, 2, device=device)
    append(keys, 0.1)
    queries = torch.cat([keys[:3] + 0.01, torch.randn(2, 24, device=device)])
    assert_lawful(queries, book.snapshot(), "before there are codes")
    gf.prepare(book)
    assert_lawful(queries, book.snapshot(), "by codes")
    assert by_codes(book)
    append(queries[3:4], 1.0)
    assert_lawful(queries, book.snapshot(), "after an append")
    book.remove(int(book.ids[0]))
    with book.writing() as draft:
        draft.set_radius(1, 1e-4)
        draft.set_radius(2, 0.5)
    assert_lawful(queries, book.snapshot(), "after other radii")
    with book.writing() as draft:
        draft.set_key(5, queries[4])
        assert_lawful(queries, draft.snapshot(), "in a draft")
    assert_lawful(queries, book.snapshot(), "after a key moved")
    old = book.snapshot()
    append(torch.randn(600, 24, device=device), 0.1)
    assert_lawful(queries, book.snapshot(), "while the codes are made anew")
    settle(book)
    assert_lawful(queries, book.snapshot(), "by new codes")
    assert by_codes(book)
    assert_lawful(queries, old, "of an earlier version")
    usual, code_tiles.TILED = code_tiles.TILED, 4
    many = torch.cat([queries, book.keys[:13] + 0.01])
    assert_lawful(many, book.snapshot(), "by code tiles")
    append(queries[:2] * 1.001, 0.2)
    assert_lawful(many, book.snapshot(), "by code tiles, after an append")
    assert by_codes(book)
    state = backend._tables.of(book.snapshot(), backend.Table)._state
    assert backend.codes_pay(state, book.snapshot(), len(many))
    code_tiles.TILED = usual
    usual, backend.TILED = backend.TILED, 4
    backend.SHARED *= 1 << 20  # reading all keys together is the cheaper one, then
    assert_lawful(queries, book.snapshot(), "by tiles")
    append(torch.randn(3, 24, device=device), 0.1)
    assert_lawful(queries, book.snapshot(), "by tiles that have grown")
    backend.TILED = usual


def settle(book: gf.Codebook) -> None:
    """Wait for the codes of the keys that are there."""
    gf.find(book.keys[:1], book, backend="triton")
    backend._tables.of(book.snapshot(), backend.Table)._index.settle()
    gf.find(book.keys[:1], book, backend="triton")


@contextmanager
def recorded():
    """Collect launches as a graph does: kernels with the very memory that they were given."""
    launches = []
    run = InterpretedFunction.run

    def record(kernel, *arguments, grid, warmup, **options):
        launches.append(partial(run, kernel, *arguments, grid=grid, warmup=warmup, **options))

    capturing = graphs.is_capturing
    InterpretedFunction.run, graphs.is_capturing = record, lambda snapshot: True
    try:
        yield launches
    finally:
        InterpretedFunction.run, graphs.is_capturing = run, capturing


def replays(codes_pay: bool, tiled: bool = False) -> None:
    """Capture a look-up and the writing of values once; replay both after every kind of edit."""
    usual_tiled, backend.TILED = backend.TILED, 4 if tiled else backend.TILED
    torch.manual_seed(0)
    keys = torch.randn(300, 24) * torch.arange(1, 25).float() ** -1
    book = gf.Codebook(24, 4)

    def append(rows: Tensor, radius: float) -> None:
        book.append(rows, torch.randn(len(rows), 4), torch.full((len(rows),), radius))

    append(keys, 0.1)
    queries = torch.cat([keys[:3] + 0.01, torch.randn(2, 24)])
    output, positions = torch.randn(5, 3, 4), torch.full((5,), 2)
    with recorded() as refused, pytest.raises(RuntimeError, match="would not see later edits"):
        gf.find(queries, book, backend="triton")
    assert not refused
    usual = maintained.SMALLEST
    if codes_pay:
        settle(book)
    else:  # no codes before the capture
        maintained.SMALLEST = 1 << 40
    backend.keep_for_graphs(book)
    backend.SHARED = 1
    written = output.clone()
    with recorded() as launches:
        found = gf.find(queries, book, backend="triton")
        backend.write_(written, found.hit, found.row, book.snapshot(), positions, "replace_all")
    names = {launch.args[0].__name__ for launch in launches}
    assert ("collect" in names) == codes_pay
    assert ("filter_tiles" in names) == tiled
    assert "write_values" in names
    maintained.SMALLEST, backend.TILED = usual, usual_tiled

    def assert_replayed(what: str) -> None:
        written.copy_(output)
        for launch in launches:
            launch()
        snapshot = book.snapshot()
        row, squared = semantics.nearest(queries, snapshot.keys, snapshot.live)
        hit = semantics.in_ball(squared, snapshot.radii[row])
        assert torch.equal(found.hit, hit), what
        assert torch.equal(found.row, row.masked_fill(~hit, -1)), what
        everywhere = torch.ones(5, 3, dtype=torch.bool)
        wanted = semantics.replace(output, hit, snapshot.values_of(row), everywhere)
        assert torch.equal(written, wanted), what

    assert_replayed("as captured")
    append(queries[3:4], 1.0)
    assert_replayed("after an append")
    book.remove(int(book.ids[0]))
    with book.writing() as draft:
        draft.set_radius(1, 1e-4)
        draft.set_radius(2, 0.5)
        draft.set_value(2, torch.ones(4))
    assert_replayed("after other radii and another value")
    with book.writing() as draft:
        draft.set_key(5, queries[4])
    assert_replayed("after a key moved")
    append(torch.randn(400, 24), 0.1)
    assert_replayed("while the codes are made anew")
    settle(book)
    append(queries[:1] + 0.02, 0.05)
    assert_replayed("by new codes")
    known = maintained.of(book.snapshot())
    known._state, known._build_if_needed = None, lambda: None
    append(queries[1:2] + 0.02, 0.05)
    assert_replayed("after the codes were given up")
    append(torch.randn(3500, 24), 0.1)
    assert_replayed("across pages")
    assert set(book._listeners) == {backend.NAME}


def replays_beside_a_writer() -> None:
    """Replay while another thread splits a ball and joins it: some row always has the query."""
    keys = torch.eye(20, 24)
    book, query = gf.Codebook(24, 4), keys[:1] + 0.2 / 24**0.5
    book.append(keys, torch.zeros(20, 4), torch.full((20,), 0.5))
    backend.keep_for_graphs(book)
    with recorded() as launches:
        found = gf.find(query, book, backend="triton")
    stop, seen, splits = threading.Event(), set(), 0

    def split() -> None:
        nonlocal splits
        while not stop.is_set():
            with book.writing() as draft:
                made = book.append(query, torch.zeros(1, 4), torch.full((1,), 0.1))
                draft.set_radius(0, 0.1)
            with book.writing() as draft:
                book.remove(int(made[0]))
                draft.set_radius(0, 0.5)
            splits += 1

    writer = threading.Thread(target=split)
    writer.start()
    while splits < 3 or len(seen) < 10:
        assert writer.is_alive()
        with book.held() as snapshot:
            for launch in launches:
                launch()
            row = int(found.row[0])
        assert row >= 0, "half a split was seen"
        assert bool(snapshot.live[row])
        seen.add(snapshot.version)
    stop.set()
    writer.join()


if __name__ == "__main__":
    edits(sys.argv[1])
    if sys.argv[1] == "cpu":
        replays(codes_pay=False)
        replays(codes_pay=False, tiled=True)
        replays(codes_pay=True)
        replays_beside_a_writer()
