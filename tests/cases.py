"""Named look-ups as a table, the oracle they are held against, and drawn codebooks.

A case with `hits` says by hand which row answers each query (-1: a miss); every case is also held
against `oracle`, the law written a second time, in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import grace_fast as gf

INF = math.inf
PAGE = 4096  # rows; written out, so that a change of the page size is seen here


@dataclass
class Case:
    """A codebook, how it came to be, and queries for it."""

    queries: Tensor  # [B, D]
    keys: Tensor  # [N, D]
    radii: Tensor  # [N] float32
    hits: Sequence[int] | None = None  # by query: the row that answers, -1 for a miss
    nearest: Sequence[int] | None = None  # by query: the nearest row
    removed: Sequence[int] = ()
    moved: dict[int, Tensor] = field(default_factory=dict)  # row -> the key it gets later

    def book(self, device: str = "cpu") -> gf.Codebook:
        """Return the codebook; the value of row i is (i, -i)."""
        number = torch.arange(len(self.keys), dtype=torch.float32)
        values = torch.stack((number, -number), dim=1).to(self.keys.dtype)
        book = gf.Codebook(self.keys.shape[1], 2, self.keys.dtype, device)
        ids = book.append(self.keys, values, self.radii)
        with book.writing() as draft:
            for row, key in self.moved.items():
                draft.set_key(row, key.to(device))
        for row in self.removed:
            book.remove(int(ids[row]))
        return book

    def expected(self) -> Oracle:
        """Return what the law says, computed here and not by the package."""
        keys, live = self.keys.clone(), [True] * len(self.keys)
        for row, key in self.moved.items():
            keys[row] = key
        for row in self.removed:
            live[row] = False
        return oracle(self.queries, keys, self.radii, live)


@dataclass
class Oracle:
    """The law's answer."""

    row: list[int]  # of the nearest live key; -1 where there is none
    squared: list[float]  # S, in float64
    hit: list[bool]


def oracle(queries: Tensor, keys: Tensor, radii: Tensor, live: Sequence[bool]) -> Oracle:
    """Decide by the law in numpy: one column after the other, every product rounded on its own."""
    wide_queries, wide_keys = queries.double().numpy(), keys.double().numpy()
    wide_radii = radii.to(torch.float32).double().numpy()
    answer = Oracle([], [], [])
    for query in wide_queries:
        total = np.zeros(len(wide_keys))
        with np.errstate(invalid="ignore", over="ignore"):
            for j in range(wide_keys.shape[1]):
                difference = query[j] - wide_keys[:, j]
                product = difference * difference
                total = total + product
        best, best_row = INF, -1
        for row, squared in enumerate(total.tolist()):
            if live[row] and squared < best:  # a later equal S does not take over; NaN never does
                best, best_row = squared, row
        radius = wide_radii[best_row] if best_row >= 0 else -1.0
        answer.row.append(best_row)
        answer.squared.append(best)
        answer.hit.append(bool(radius >= 0 and best <= radius * radius))
    return answer


def f32(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def below(radius: float) -> float:
    """Return the next float32 towards zero."""
    return float(np.nextafter(np.float32(radius), np.float32(0)))


def above(radius: float) -> float:
    """Return the next float32 up."""
    return float(np.nextafter(np.float32(radius), np.float32(INF)))


def drawn(rows: int, width: int, batch: int, dtype: torch.dtype = torch.float32) -> Case:
    """Return normal keys, and queries of which every second one is close to a key."""
    generator = torch.Generator().manual_seed(1000 * rows + width)
    keys = torch.randn(rows, width, generator=generator)
    queries = torch.randn(batch, width, generator=generator)
    picked = torch.randint(0, rows, (len(queries[::2]),), generator=generator)
    queries[::2] = keys[picked] + queries[::2] * 0.05
    radii = torch.rand(rows, generator=generator) * 0.1 * width**0.5
    return Case(queries.to(dtype), keys.to(dtype), radii)


def far_from_the_origin() -> Case:
    """Keys a step apart at norm 4e6: torch.cdist's matmul form sees nothing but rounding there."""
    case = drawn(40, 16, 6)
    case.keys = (case.keys * 4).round() + 1e6
    case.queries = case.keys[[3, 7, 11, 15, 19, 39]] + 0.25
    case.radii = torch.ones(40)  # d = 1 exactly
    case.hits = (3, 7, 11, 15, 19, 39)
    return case


def permuted_coordinates() -> Case:
    """Keys that hold the same differences in another order: only the order of the sum differs."""
    differences = np.exp(np.linspace(-2, 3, 48)).astype(np.float32)
    rng = np.random.default_rng(3)
    keys = np.stack([rng.permutation(differences) for _ in range(64)])
    return Case(torch.zeros(1, 48), torch.from_numpy(keys), torch.full((64,), 100.0))


def decided_by_the_last_coordinate() -> Case:
    """Two hundred coordinates are shared: a sum that is given up early must not lose the winner."""
    keys = torch.ones(9, 201)
    keys[:, -1] = f32(5, 4, 3, 2, 1, 0.5, 1, 2, 3)
    return Case(torch.zeros(1, 201), keys, torch.full((9,), 14.2), hits=(5,))


def expanded_keys() -> Case:
    """Two hundred keys whose radius is exactly the distance of a query."""
    case = drawn(200, 24, 200)
    case.queries = case.keys + torch.randn(200, 24, generator=torch.Generator().manual_seed(1)) / 9
    distances = np.sqrt(
        np.asarray(oracle(case.queries, case.keys, case.radii, [True] * 200).squared)
    )
    rounded = distances.astype(np.float32)
    short = rounded.astype(np.float64) ** 2 < np.asarray(
        oracle(case.queries, case.keys, case.radii, [True] * 200).squared
    )
    rounded[short] = np.nextafter(rounded[short], np.float32(INF))
    case.radii = torch.from_numpy(rounded)
    case.hits = tuple(range(200))
    return case


def across_pages() -> Case:
    """Rows on both sides of a page's end, with ties across it."""
    generator = torch.Generator().manual_seed(4)
    keys = torch.randint(-40, 40, (PAGE + 300, 2), generator=generator).float()
    keys[[PAGE - 1, PAGE, PAGE + 299]] = f32(100, 100)
    keys[[PAGE + 5, PAGE + 6]] = f32(200, 200)
    queries = torch.stack((f32(100, 101), f32(200, 200), f32(0.5, 0.5), f32(-39.5, 12.5)))
    radii = torch.full((PAGE + 300,), 0.25)
    radii[PAGE - 1] = 1.0
    return Case(queries, keys, radii, removed=(PAGE + 5,))


def moved(dtype: torch.dtype = torch.float32) -> Case:
    """Row 0 leaves the query's place and row 4 takes it; rows keep their numbers."""
    case = drawn(30, 20, 3, dtype)
    case.queries[0] = case.keys[0]
    case.radii = torch.full((30,), 0.5)
    case.moved = {0: case.keys[0] + 50, 4: case.keys[0].clone()}
    return case


def ends_of_fp16() -> Case:
    keys = torch.tensor([[65504.0, 6e-8], [-65504.0, 6e-8], [0.0, 6.1e-5]], dtype=torch.float16)
    return Case(keys.clone(), keys, torch.zeros(3), hits=(0, 1, 2))


_LINE = torch.tensor([[0.0], [4.0]])

CASES: dict[str, Case] = {
    "on the radius is a hit": Case(f32(3, 4)[None], torch.zeros(1, 2), f32(5), hits=(0,)),
    "one float32 outside the radius is a miss": Case(
        f32(3, 4)[None], torch.zeros(1, 2), f32(below(5)), hits=(-1,)
    ),
    "a radius rounded up to a distance is a hit": Case(
        f32(1, 1)[None], torch.zeros(1, 2), f32(above(2**0.5)), hits=(0,)
    ),
    "a radius rounded down from a distance is a miss": Case(
        f32(1, 2)[None], torch.zeros(1, 2), f32(below(5**0.5)), hits=(-1,)
    ),
    "nearest wins, not widest": Case(f32(3)[None], _LINE, f32(10, 0.5), hits=(-1,), nearest=(1,)),
    "the nearest of two balls that hold it": Case(f32(3)[None], _LINE, f32(10, 10), hits=(1,)),
    "ties go to the lowest row": Case(f32(2)[None], _LINE, f32(2, 9), hits=(0,)),
    "a tie is lost with the lowest row's radius": Case(
        f32(2)[None], _LINE, f32(1, 9), hits=(-1,), nearest=(0,)
    ),
    "duplicates: the lowest row": Case(
        torch.ones(2, 3), torch.ones(9, 3), torch.arange(9.0), hits=(0, 0)
    ),
    "a radius of zero holds its own key": Case(_LINE, _LINE, f32(0, 0), hits=(0, 1)),
    "a radius of minus zero holds its own key": Case(_LINE, _LINE, f32(-0.0, 0), hits=(0, 1)),
    "a dead key still wins": Case(f32(1)[None], _LINE, f32(-1, 99), hits=(-1,), nearest=(0,)),
    "a dead key is dead at distance zero": Case(_LINE, _LINE, f32(-1e-5, 0), hits=(-1, 1)),
    "a negative radius is not squared": Case(f32(1)[None], _LINE, f32(-9, 1), hits=(-1,)),
    "a removed row never wins": Case(f32(1)[None], _LINE, f32(9, 9), hits=(1,), removed=(0,)),
    "a removed row does not win a tie": Case(f32(2)[None], _LINE, f32(9, 9), (1,), removed=(0,)),
    "every row removed": Case(_LINE, _LINE, f32(9, 9), hits=(-1, -1), removed=(1, 0)),
    "NaN and infinity are misses and leave the others alone": Case(
        f32(0, math.nan, INF, -INF, 4)[:, None], _LINE, f32(9, 9), hits=(0, -1, -1, -1, 1)
    ),
    "one NaN among finite coordinates": Case(
        torch.tensor([[0, math.nan, 0], [0, 0, INF], [0, 0, 0]]),
        torch.zeros(3, 3),
        torch.ones(3),
        hits=(-1, -1, 0),
    ),
    "an empty codebook": Case(torch.ones(2, 3), torch.zeros(0, 3), f32(), hits=(-1, -1)),
    "no queries": Case(torch.zeros(0, 1), _LINE, f32(1, 1), hits=()),
    "one key": drawn(1, 16, 4),
    "width 1": drawn(70, 1, 8),
    "width 7": drawn(33, 7, 8),
    "width 129": drawn(33, 129, 8),
    "fp32": drawn(90, 40, 12),
    "bf16": drawn(90, 40, 12, torch.bfloat16),
    "fp16": drawn(90, 40, 12, torch.float16),
    "bf16, odd width": drawn(21, 33, 6, torch.bfloat16),
    "the ends of fp16": ends_of_fp16(),
    "fp32 queries and bf16 keys": Case(
        f32(1.001, 1)[None], torch.ones(1, 2, dtype=torch.bfloat16), f32(0.001), hits=(-1,)
    ),
    "bf16 queries and fp32 keys": Case(
        torch.ones(1, 2, dtype=torch.bfloat16), f32(1.001, 1)[None], f32(1.001) - 1, hits=(0,)
    ),
    "far from the origin": far_from_the_origin(),
    "permuted coordinates tie only in canonical order": permuted_coordinates(),
    "decided by the last coordinate": decided_by_the_last_coordinate(),
    "two hundred expanded keys": expanded_keys(),
    "squares beyond fp32": Case(
        f32(1e38)[None], f32(-1e38, 2e38)[:, None], f32(1e38, 1.1e38), (1,)
    ),
    "fp32 denormals": Case(f32(3e-45)[None], f32(0, 1e-44)[:, None], f32(3e-45, 1), hits=(0,)),
    "across pages": across_pages(),
    "moved keys": moved(),
    "moved keys in bf16": moved(torch.bfloat16),
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def codebooks(draw: st.DrawFn) -> Case:
    """Draw small codebooks on a coarse grid: ties, duplicates, radii equal to a distance."""
    dtype = draw(st.sampled_from(DTYPES))
    width, rows, batch = (draw(st.integers(1, top)) for top in (6, 12, 5))
    # bf16 keeps 8 bits and fp16 11: far from the origin many keys round to the same one.
    origin = draw(st.sampled_from((0.0, 0.1, 1000.0, 30000.0)))
    step = draw(st.sampled_from((1.0, 0.25, 0.1)))
    grid = st.lists(st.integers(-3, 3), min_size=width, max_size=width)
    keys, queries = (
        (torch.tensor(draw(st.lists(grid, min_size=n, max_size=n))) * step + origin).to(dtype)
        for n in (rows, batch)
    )
    removed = draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=rows))
    squared = ((queries.double()[:, None] - keys.double()[None]) ** 2).sum(dim=2)
    radii = []
    for row in range(rows):
        distance = float(squared[draw(st.integers(0, batch - 1)), row].sqrt())
        near = float(np.float32(distance))
        radii.append(
            draw(st.sampled_from((near, below(near), above(near), 0.0, -0.0, -near, -1.0, 1.5)))
        )
    case = Case(queries, keys, f32(*radii), removed=removed)
    for row in draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=2)):
        case.moved[row] = queries[draw(st.integers(0, batch - 1))].clone()
    return case
