"""Edits between look-ups by the Triton back end, each look-up compared with the law.

Run as a program under the interpreter; `test_triton_find.py` runs it on a GPU where there is one.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import grace_fast as gf
from grace_fast import semantics
from grace_fast.backends import triton as backend
from grace_fast.codebook import Snapshot


def assert_lawful(queries: Tensor, snapshot: Snapshot, what: str) -> None:
    row, squared = semantics.nearest(queries.cpu(), snapshot.keys.cpu(), snapshot.live.cpu())
    hit = semantics.in_ball(squared, snapshot.radii.cpu()[row])
    got = gf.find(queries, snapshot, backend="triton")
    assert torch.equal(got.hit.cpu(), hit), what
    assert torch.equal(got.row.cpu(), row.masked_fill(~hit, -1)), what
    assert torch.equal(got.squared_distance.cpu(), squared.masked_fill(~hit, torch.inf)), what


def by_codes(book: gf.Codebook) -> bool:
    table = book.derived(backend.NAME, backend._table)
    return table._state is not None and table._certificate.current is table._state


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
    assert book.derived(backend.NAME, backend._table)._reads_codes(len(many))
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
    book.derived(backend.NAME, backend._table)._certificate.settle()
    gf.find(book.keys[:1], book, backend="triton")


if __name__ == "__main__":
    edits(sys.argv[1])
