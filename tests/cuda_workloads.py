"""Look-ups on which a fault of synchronisation shows: each takes a seed and is held to the law."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from certified_cases import Data, book_of, law

import grace_fast as gf
from grace_fast.index import maintained
from grace_fast.lookup.backends import cpu, cuda


def workloads(module: ModuleType) -> dict[str, Callable[[int], None]]:
    """Return them by name; what they look up in is made once."""
    data = Data(1)
    keys, radii = data.clusters(150, 33)
    books = {
        "a dense look-up": (book_of(keys, radii), data.queries(keys, radii, 9), False),
        "a dense look-up of near ties": (*near_ties(60), False),
        "few codes": (book_of(keys, radii), data.queries(keys, radii, 7), True),
        "near ties by codes": (*near_ties(60), True),
        "boxes": (*boxes(data), True),
        "a full list": (*crowd(data), True),
    }
    found = {}
    for name, (book, queries, certified) in books.items():
        found[name] = of_find(module, book, queries, certified)
    found["one token written"] = of_replace(module, 1)
    found["many tokens written"] = of_replace(module, 50)
    return found


def of_find(module, book, queries, certified):
    table = table_of(module, book, certified)
    wanted = law(queries, table.snapshot)

    def work(seed):
        module.set_order(seed, (32, 64, 160)[seed % 3])
        for got, expected in zip(table.find(queries), wanted, strict=True):
            assert torch.equal(got, expected)

    return work


def of_replace(module, tokens):
    data = Data(4)
    keys, radii = data.clusters(80, 20)
    book = gf.Codebook(20, 5)
    book.append(keys, data.normal(80, 5), radii.abs())
    table = table_of(module, book, certified=True)
    queries = data.queries(keys, radii, 6)
    hit, row, _ = law(queries, table.snapshot)
    before = data.normal(6, tokens, 5)
    values = table.snapshot.values_of(row)[:, None, :]
    wanted = torch.where(hit[:, None, None], values, before)

    def work(seed):
        module.set_order(seed, (32, 64, 160)[seed % 3])
        output = before.clone()
        table.replace_(output, queries, mode="replace_all")
        assert torch.equal(output, wanted)

    return work


def table_of(module, book, certified):
    snapshot, state = book.snapshot(), None
    if certified:
        cpu.view_of(snapshot)
        maintained.of(snapshot).settle()
        state = cpu.view_of(snapshot).made_from
    return cuda.Table(module, snapshot, state, snapshot.widest, blocks=3)


def near_ties(rows):
    """Keys at distance 1 + something that float32 sums do not see, the nearest at the end."""
    keys = torch.zeros(rows, 20)
    keys[:, 0] = 1
    keys[:, 1] = 3e-5 * torch.arange(rows, 0, -1) / rows
    return book_of(keys, torch.full((rows,), 2.0)), torch.zeros(2, 20)


def boxes(data):
    """More level-2 nodes than warps: a block comes back to its list of leaves."""
    keys, radii = data.clusters(17000, 10)
    return book_of(keys, radii), data.queries(keys, radii, 6)


def crowd(data):
    """More candidates than a list holds."""
    keys = data.normal(1, 12).repeat(1400, 1) + 1e-4 * data.normal(1400, 12)
    return book_of(keys, torch.full((1400,), 0.5)), keys[[3, 1399]] + 1e-5
