"""The law R64 for many queries: a float64 product filters, the canonical order decides.

    S~ = |q|^2 + |k|^2 - 2 q.k          after centring; |S~ - S| <= slack
    a key can be nearest only where S~ <= min S~ + 2 slack

What is left is summed again in the canonical order. This shares no line with the back ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast import semantics

_BLOCK = 1 << 25  # elements of one float64 block: 256 MiB
_ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}


@dataclass(frozen=True)
class Decisions:
    """What the law says of a batch of queries."""

    hit: Tensor  # [B] bool
    row: Tensor  # [B] int64, the row that hit; -1 where missed
    nearest: Tensor  # [B] int64; -1 where there is none
    squared: Tensor  # [B] float64, S of the nearest row
    close: Tensor  # [B] bool, within 1e-3 of the radius, or of a tie with the second nearest

    def part(self, first: int, last: int) -> Decisions:
        """Return the decisions of some of the queries."""
        fields = (self.hit, self.row, self.nearest, self.squared, self.close)
        return Decisions(*(field[first:last] for field in fields))

    def wrong(self, hit: Tensor, row: Tensor) -> int:
        """Return how many answers are not the law's; the row counts only where both hit."""
        return int(((hit != self.hit) | (hit & self.hit & (row != self.row))).sum())


def decide(
    queries: Tensor, keys: Tensor, radii: Tensor, live: Tensor | None = None, fast: bool = False
) -> Decisions:
    """Return the decision of every query.

    queries: [B, D], keys: [N, D], radii: [N], live: [N] bool. `fast` filters in float32 first.
    """
    live = torch.ones(len(keys), dtype=torch.bool) if live is None else live
    if not bool(live.any()):
        row, squared = semantics.no_row(len(queries), queries.device)
        never = torch.zeros(len(queries), dtype=torch.bool)
        return Decisions(never, row, row, squared, never)
    step = max(1, _BLOCK // max(len(keys), queries.shape[1]))
    parts = [_nearest_two(part, keys, live, fast) for part in queries.split(step)]
    row, squared, second = (torch.cat(column) for column in zip(*parts, strict=True))
    radius = radii[row.clamp(min=0)].double()
    hit = semantics.in_ball(squared, radius) & (row >= 0)
    distance = squared.sqrt()
    on_radius = (radius >= 0) & ((distance - radius).abs() <= 1e-3 * radius)
    tied = second.sqrt() - distance <= 1e-3 * distance
    close = (row >= 0) & (on_radius | tied)
    return Decisions(hit, row.masked_fill(~hit, -1), row, squared, close)


def pair_squared_distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Return S of queries [P, D] against keys [P, D], row by row, in the canonical order."""
    total = torch.zeros(len(queries), dtype=torch.float64)
    wide_queries, wide_keys = queries.double().T.contiguous(), keys.double().T.contiguous()
    for query_column, key_column in zip(wide_queries, wide_keys, strict=True):
        difference = query_column - key_column
        total += difference * difference
    return total


def _nearest_two(
    queries: Tensor, keys: Tensor, live: Tensor, fast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest row [B], its S, and the S of another near row (inf where alone)."""
    finite = queries.isfinite().all(dim=1)
    safe = torch.where(finite[:, None], queries, keys[:1].to(queries.dtype))
    dtype = torch.float32 if fast else torch.float64
    rough, slack = _expanded(safe, keys, dtype)
    if fast and not bool(rough.isfinite().all()):
        return _nearest_two(queries, keys, live, fast=False)
    rough.masked_fill_(~live, math.inf)
    two = rough.topk(min(2, len(keys)), dim=1, largest=False)
    candidate = rough <= two.values[:, :1] + 2 * slack[:, None]
    counts = candidate.sum(dim=1)
    if fast and int(counts.max()) > 64:
        return _nearest_two(queries, keys, live, fast=False)
    candidate.scatter_(1, two.indices, True)  # the second, so that ties can be told
    candidate &= live
    query_at, key_at = candidate.nonzero(as_tuple=True)
    exact = torch.cat(
        [
            pair_squared_distances(safe[some_queries], keys[some_keys])
            for some_queries, some_keys in _in_blocks(query_at, key_at, keys.shape[1])
        ]
    )
    exact = torch.where(exact.isfinite(), exact, math.inf)
    best = torch.full((len(queries),), math.inf, dtype=torch.float64)
    best.scatter_reduce_(0, query_at, exact, "amin")
    at_best = exact == best[query_at]
    row = torch.full((len(queries),), len(keys))
    row.scatter_reduce_(0, query_at[at_best], key_at[at_best], "amin")
    second = torch.full((len(queries),), math.inf, dtype=torch.float64)
    others = key_at != row[query_at]
    second.scatter_reduce_(0, query_at[others], exact[others], "amin")
    nowhere = ~finite | best.isinf()
    return row.masked_fill(nowhere, -1), best.masked_fill(nowhere, math.inf), second


def _expanded(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return S~ [B, N] and a bound on its error [B]."""
    width = keys.shape[1]
    centre = keys[:: max(1, len(keys) // 1024)].double().mean(dim=0)
    # Rounding to `dtype` once after the subtraction moves each by a relative 2^-24 (or 2^-53).
    moved = (queries.double() - centre).to(dtype)
    query_squares = moved.double().square().sum(dim=1)
    rough = torch.empty(len(queries), len(keys), dtype=dtype)
    longest = torch.zeros((), dtype=torch.float64)
    step = max(1, _BLOCK // width)
    for start in range(0, len(keys), step):
        here = keys[start : start + step]
        part = (here.double() - centre).to(dtype)
        squares = part.double().square().sum(dim=1)
        longest = torch.maximum(longest, squares.max())
        rough[:, start : start + step] = torch.addmm(squares.to(dtype), moved, part.T, alpha=-2)
    rough += query_squares.to(dtype)[:, None]
    # The product errs by (D + 2) roundings of |q||k|, moves and additions by a few of the whole.
    scale = query_squares + longest + 2 * (query_squares * longest).sqrt()
    return rough, ((width + 16) * _ROUNDING[dtype] * scale).to(dtype)


def _in_blocks(query_at: Tensor, key_at: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    step = max(1, _BLOCK // 4 // width)
    return list(zip(query_at.split(step), key_at.split(step), strict=True))
