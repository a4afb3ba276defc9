"""Numbers at the ends of their range: as queries, as distances, as offsets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import DTYPES, Case, above, below, drawn, oracle
from torch import nn

import grace_fast as gf
from grace_fast.lookup import dispatch
from grace_fast.lookup.backends.workload import Workload

INF = math.inf
HOST = [
    name
    for name, backend in dispatch.BACKENDS.items()
    if backend.why_not(Workload("cpu", torch.float32, 1, 1, 1)) is None
]


def largest(dtype):
    return float(torch.finfo(dtype).max)


# Every number alone in a query that is otherwise zero, and in all places of one.
ODD = {
    "NaN": lambda dtype: math.nan,
    "infinity": lambda dtype: INF,
    "minus infinity": lambda dtype: -INF,
    "1e38 or the largest": lambda dtype: min(1e38, largest(dtype)),
    "minus that": lambda dtype: -min(1e38, largest(dtype)),
    "the largest number": largest,
    "a denormal": lambda dtype: float(torch.finfo(dtype).smallest_normal) / 4,
    "zero": lambda dtype: 0.0,
    "minus zero": lambda dtype: -0.0,
    "a norm whose square is past fp16": lambda dtype: 300.0,
}


def odd_query(name, width, dtype, everywhere):
    query = torch.zeros(1, width, dtype=dtype)
    query[:, slice(None) if everywhere else 3] = ODD[name](dtype)
    return query


@pytest.mark.parametrize("everywhere", [False, True], ids=["in one place", "in all places"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(ODD))
@pytest.mark.parametrize("backend", HOST)
def test_an_odd_query_is_decided_by_the_law_and_changes_no_other(backend, name, dtype, everywhere):
    case = drawn(200, 12, 8, dtype)
    odd = odd_query(name, 12, dtype, everywhere)
    alone = gf.find(case.queries, case.book(), backend=backend)
    case.queries = torch.cat([case.queries[:4], odd, case.queries[4:]])
    expected, book = case.expected(), case.book()
    others = [at for at in range(9) if at != 4]
    for ask in (lambda: gf.find(case.queries, book, backend=backend), lambda: gf.prepare(book)(case.queries)):  # noqa: E501  # fmt: skip
        match = ask()
        assert match.hit.tolist() == expected.hit
        assert torch.equal(match.row[others], alone.row)
        assert torch.equal(match.squared_distance[others], alone.squared_distance)
    assert not match.hit[4] or bool(odd.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_with_such_numbers_is_found_by_its_own_query(dtype):
    finite = [name for name in ODD if math.isfinite(ODD[name](dtype))]
    keys = torch.cat([odd_query(name, 12, dtype, True) for name in finite if name != "minus zero"])
    keys = torch.cat([keys, drawn(100, 12, 1, dtype).keys + 9])
    case = Case(keys[: len(finite) - 1].clone(), keys, torch.zeros(len(keys)))
    match = gf.find(case.queries, case.book())
    assert match.row.tolist() == case.expected().row
    assert torch.equal(keys[match.row], case.queries)  # the largest fp16 is there twice


class Tower(nn.Module):
    """A layer between two others, as a model has it; it takes and gives tensors."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.edited, self.last = nn.Linear(12, 6), nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, hidden):
        return self.last(self.edited(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in ODD if "zero" not in name])
@pytest.mark.parametrize("query", ["prompt_end", "every_token"])
def test_in_a_model_an_odd_row_misses_bit_for_bit_and_the_others_hit(query, name, dtype):
    model = Tower(dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 4, 12, generator=generator).to(dtype)
    with torch.no_grad():
        clean = model(hidden)
    grace = gf.attach(model, "edited", epsilon=1.0, replacement="replace_last", query=query)
    keys = hidden[[0, 2], -1]
    grace.codebook.append(keys, torch.ones(2, 6).to(dtype), torch.full((2,), 0.01))
    with torch.no_grad():
        edited = model(hidden)
        odd = hidden.clone()
        odd[1, -1] = odd_query(name, 12, dtype, True)[0]
        found = model(odd)
        with grace.disable_adapter():
            base = model(odd)

    def bits(tensor):
        return tensor.contiguous().view(torch.uint8).tolist()

    assert bits(found[1]) == bits(base[1])
    assert bits(found[[0, 2]]) == bits(edited[[0, 2]])
    assert not torch.equal(edited[[0, 2], -1], clean[[0, 2], -1])


NORMS = (1e3, 1e4, 1e5, 1e6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rows", [30, 3000], ids=["all read", "by codes"])
def test_keys_that_differ_by_their_last_bits_far_from_the_origin(rows, norm, dtype):
    """Duplicates, distances equal to a radius or next to it, and ties, at norm 1e3 to 1e6."""
    if norm > largest(dtype):
        pytest.skip(f"{dtype} ends at {largest(dtype)}")
    width, generator = 9, torch.Generator().manual_seed(int(norm))
    ulp = float(torch.finfo(dtype).eps) * norm
    origin = torch.full((width,), norm / width**0.5).to(dtype)
    steps = torch.randint(-2, 3, (rows, width), generator=generator) * ulp
    keys = (origin.double() + steps).to(dtype)
    keys[5] = keys[2]  # and chance gives more
    queries = (origin.double() + torch.randint(-2, 3, (40, width), generator=generator) * ulp).to(dtype)  # noqa: E501  # fmt: skip
    first = oracle(queries, keys, torch.zeros(rows), [True] * rows)
    radii = torch.zeros(rows)
    for at, (row, squared) in enumerate(zip(first.row, first.squared, strict=True)):
        distance = float(np.float32(math.sqrt(squared)))
        radii[row] = (distance, below(distance), above(distance))[at % 3]
    case = Case(queries, keys, radii)
    expected, book = case.expected(), case.book()
    assert len(set(expected.squared)) < 40
    gf.prepare(book)
    for backend in HOST:
        match = gf.find(queries, book, backend=backend)
        assert match.hit.tolist() == expected.hit
        rows_hit = [r if h else -1 for r, h in zip(expected.row, expected.hit, strict=True)]
        assert match.row.tolist() == rows_hit
    assert 0 < sum(expected.hit) < 40


@pytest.mark.slow
def test_the_last_row_of_more_than_2_31_elements_is_found():
    """524 289 fp16 keys of width 4096: 2^31 elements are passed within the last row; 4.3 GB."""
    rows, width = 524_289, 4096
    book = gf.Codebook(width, 1, torch.float16, reserve_rows=rows)
    zeros = torch.zeros(1, width, dtype=torch.float16)
    for first in range(0, rows - 1, 65536):
        count = min(65536, rows - 1 - first)
        book.append(zeros.expand(count, -1), torch.zeros(count, 1).half(), torch.zeros(count))
    last = torch.full((1, width), 2.0, dtype=torch.float16)
    book.append(last, torch.ones(1, 1).half(), torch.ones(1))
    queries = torch.cat([last, last + 0.5, zeros])
    assert gf.nearest(queries, book).row.tolist() == [rows - 1, rows - 1, 0]
    assert gf.find(queries, book).row.tolist() == [rows - 1, -1, 0]
