"""Micro-benchmarks by pytest-benchmark: `python -m pytest benchmarks/test_micro.py`.

They watch the cost of a call for regressions; figures to quote come from `benchmarks.run`.
"""

from __future__ import annotations

import pytest
import torch

import grace_fast as gf
from benchmarks.oracle import decide
from benchmarks.peers import settle

WIDTH, ROWS = 768, 1_000


@pytest.fixture(scope="module")
def asked() -> tuple[gf.Codebook, torch.Tensor, torch.Tensor]:
    """A codebook, a query that misses and one that hits."""
    generator = torch.Generator().manual_seed(0)
    deviation = torch.arange(1, WIDTH + 1).float().rsqrt()
    keys = torch.randn(ROWS + 1, WIDTH, generator=generator) * deviation
    book = gf.Codebook(WIDTH, 64)
    book.append(keys[:ROWS], torch.zeros(ROWS, 64), torch.full((ROWS,), 0.1))
    settle(book)
    missing, hitting = keys[ROWS:], keys[:1] + 0.05 / WIDTH**0.5
    both = torch.cat([missing, hitting])
    assert decide(both, book.keys, book.radii).hit.tolist() == [False, True]
    assert gf.find(both, book).hit.tolist() == [False, True]
    return book, missing, hitting


@pytest.mark.parametrize("which", [1, 2], ids=["miss", "hit"])
def test_find(benchmark, asked, which):
    assert bool(benchmark(gf.find, asked[which], asked[0]).hit) == (which == 2)


@pytest.mark.skipif(not hasattr(gf, "prepare"), reason="no prepared call")
@pytest.mark.parametrize("which", [1, 2], ids=["miss", "hit"])
def test_prepared_find(benchmark, asked, which):
    assert bool(benchmark(gf.prepare(asked[0]), asked[which]).hit) == (which == 2)


def test_nearest(benchmark, asked):
    assert int(benchmark(gf.nearest, asked[2], asked[0]).row) == 0


def test_replace(benchmark, asked):
    output = torch.zeros(1, 16, 64)
    assert benchmark(gf.replace, output, asked[1], asked[0]) is output


def test_append_one_key(benchmark):
    key, value, radius = torch.zeros(1, WIDTH), torch.zeros(1, 64), torch.ones(1)
    book = gf.Codebook(WIDTH, 64)
    benchmark.pedantic(book.append, (key, value, radius), rounds=200, warmup_rounds=5)
    assert len(book) == 205
