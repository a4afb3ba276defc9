"""The law R64 for many queries: a product of matrices filters, the canonical order decides.

    S~ = |q|^2 + |k|^2 - 2 q.k          after centring; |S~ - S| <= slack
    a key can be nearest only where S~ <= min S~ + 2 slack

What is left is summed again in the canonical order. This shares no line with the back ends. The
product is in float32 where asked for; what its slack leaves too many of, float64 filters again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grace_fast import semantics

_BLOCK = 1 << 25  # elements of one block of keys, or of keys against queries: 256 MiB in float64
_IN_CACHE = 1 << 18  # elements of keys against queries that are quick to go over again
_KEPT = 1 << 26  # elements of centred keys kept from one batch to the next: 512 MiB in float64
_FEW = 64  # candidates of a query that are quicker summed than filtered again
_COLUMNS = 256  # of pairs, taken at a time
_TIE = 1e-3
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


class Law:
    """The law for one set of keys, asked batch by batch.

    keys: [N, D], not to be changed meanwhile; live: [N] bool. `fast` filters in float32 first.
    """

    def __init__(self, keys: Tensor, live: Tensor | None = None, fast: bool = False) -> None:
        self._keys = keys
        live = torch.ones(len(keys), dtype=torch.bool) if live is None else live
        self._any_live = bool(live.any())
        dtypes = (torch.float32, torch.float64) if fast else (torch.float64,)
        self._filters = [_Filter(keys, live, dtype) for dtype in dtypes]

    def decide(self, queries: Tensor, radii: Tensor) -> Decisions:
        """Return the decision of every query; queries: [B, D], radii: [N]."""
        if not self._any_live:
            row, squared = semantics.no_row(len(queries), queries.device)
            never = torch.zeros(len(queries), dtype=torch.bool)
            return Decisions(never, row, row, squared, never)
        # A block of few queries is in cache, one of many reads large keys less often.
        rows = len(self._keys)
        step = max(1, min(max(128, _IN_CACHE // rows), _BLOCK // max(rows, queries.shape[1])))
        parts = [self._nearest_two(part) for part in queries.split(step)]
        row, squared, second = (torch.cat(column) for column in zip(*parts, strict=True))
        radius = radii[row.clamp(min=0)].double()
        hit = semantics.in_ball(squared, radius) & (row >= 0)
        distance = squared.sqrt()
        on_radius = (radius >= 0) & ((distance - radius).abs() <= 1e-3 * radius)
        tied = second.sqrt() - distance <= _TIE * distance
        close = (row >= 0) & (on_radius | tied)
        return Decisions(hit, row.masked_fill(~hit, -1), row, squared, close)

    def _nearest_two(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest row [B], its S, and the S of another that ties with it, or inf."""
        finite = queries.isfinite().all(dim=1)
        safe = torch.where(finite[:, None], queries, self._keys[:1].to(queries.dtype))
        query_at, key_at = self._candidates(safe)
        exact = torch.cat(
            [
                pair_squared_distances(safe[some_queries], self._keys[some_keys])
                for some_queries, some_keys in _in_blocks(query_at, key_at, queries.shape[1])
            ]
        )
        exact = torch.where(exact.isfinite(), exact, math.inf)
        best = torch.full((len(queries),), math.inf, dtype=torch.float64)
        best.scatter_reduce_(0, query_at, exact, "amin")
        at_best = exact == best[query_at]
        row = torch.full((len(queries),), len(self._keys))
        row.scatter_reduce_(0, query_at[at_best], key_at[at_best], "amin")
        second = torch.full((len(queries),), math.inf, dtype=torch.float64)
        others = key_at != row[query_at]
        second.scatter_reduce_(0, query_at[others], exact[others], "amin")
        nowhere = ~finite | best.isinf()
        return row.masked_fill(nowhere, -1), best.masked_fill(nowhere, math.inf), second

    def _candidates(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return pairs of query and key [P]: every key that can be nearest or tie with it."""
        for rough_filter in self._filters:
            found = rough_filter(queries)
            last = rough_filter is self._filters[-1]
            if found and (last or int(found[0].bincount().max()) <= _FEW):
                break
        if not found:
            raise OverflowError("squared distances of these keys and queries overflow float64")
        return found


def decide(queries: Tensor, keys: Tensor, radii: Tensor, live: Tensor | None = None) -> Decisions:
    """Return the decision of every query, asked once; see `Law`."""
    return Law(keys, live).decide(queries, radii)


def pair_squared_distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Return S of queries [P, D] against keys [P, D], row by row, in the canonical order."""
    total = np.zeros(len(queries))
    for some_queries, some_keys in zip(
        queries.split(_COLUMNS, dim=1), keys.split(_COLUMNS, dim=1), strict=True
    ):
        difference = (some_queries.double() - some_keys.double()).T.contiguous().numpy()
        for square in difference * difference:  # one addition to every pair for each column
            total += square
    return torch.from_numpy(total)


class _Filter:
    """Leave out keys by S~ in one floating-point type."""

    def __init__(self, keys: Tensor, live: Tensor, dtype: torch.dtype) -> None:
        self._keys, self._live, self._dtype = keys, live, dtype
        self._centre = keys[:: max(1, len(keys) // 1024)].double().mean(dim=0)
        self._kept: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def __call__(self, queries: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the pairs left; None where `dtype` overflows.

        S~ is without |q|^2 here, which moves no key before another. A key that ties with the
        nearest to a relative 1e-3 has S <= 1.001^2 min S, and is left too.
        """
        width = self._keys.shape[1]
        # Rounding to `dtype` once after the subtraction moves each by a relative 2^-24 (or 2^-53).
        moved = (queries.double() - self._centre).to(self._dtype)
        query_squares = moved.double().square().sum(dim=1)
        rough = torch.empty(len(queries), len(self._keys), dtype=self._dtype)
        longest, start = torch.zeros((), dtype=torch.float64), 0
        for keys, squares, here in self._parts():
            longest = torch.maximum(longest, here)
            torch.addmm(squares, moved, keys.T, alpha=-2, out=rough[:, start : start + len(keys)])
            start += len(keys)
        scale = query_squares + longest + 2 * (query_squares * longest).sqrt()
        if not bool((scale < torch.finfo(self._dtype).max / 4).all()):
            return None
        # The product errs by (D + 2) roundings of 2|q||k| <= scale / 2, moves and additions by a
        # few of the whole, and the canonical sum itself by D + 2 roundings in float64 of S.
        slack = (width + 16) * (_ROUNDING[self._dtype] + _ROUNDING[torch.float64]) * scale
        least = rough.amin(dim=1).double() + query_squares + slack  # >= min S
        limit = (1 + _TIE) ** 2 * least + slack - query_squares
        left = rough <= limit.to(self._dtype)[:, None]
        at = torch.from_numpy(np.flatnonzero(left.numpy()))
        return at // len(self._keys), at % len(self._keys)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield centred keys, their squares (inf where not live) and the largest, by blocks."""
        if self._kept is None and self._keys.numel() <= _KEPT:
            self._kept = list(self._made())
        return iter(self._kept) if self._kept is not None else self._made()

    def _made(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        step = max(1, _BLOCK // self._keys.shape[1])
        for keys, live in zip(self._keys.split(step), self._live.split(step), strict=True):
            moved = (keys.double() - self._centre).to(self._dtype)
            squares = moved.double().square().sum(dim=1)
            yield moved, squares.to(self._dtype).masked_fill(~live, math.inf), squares.max()


def _in_blocks(query_at: Tensor, key_at: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    step = max(1, _BLOCK // 4 // width)
    return list(zip(query_at.split(step), key_at.split(step), strict=True))
