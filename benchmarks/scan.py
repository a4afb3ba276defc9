"""The law for keys that do not fit in memory: every key is read, in chunks, by one of two scans.

`filtered` drops in float32 what is surely outside every ball:

    S~ = |q|^2 + |k|^2 - 2 q.k          after centring; |S~ - S| <= slack
    a key in its ball, or nearer than one in its ball, has S <= widest^2: S~ <= widest^2 + slack

and sums the rest in the canonical order. `whole` takes float64 differences of every pair. Neither
shares a line with the back ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.oracle import pair_squared_distances

Chunks = Iterable[tuple[int, Tensor]]  # the first row, and keys [n, D] from there on
_CLOSE = 1e-9  # relative: what float64 sums in another order cannot be off by


class Decided:
    """The nearest row of each query among those seen so far, the lowest on a tie."""

    def __init__(self, batch: int) -> None:
        self.squared = torch.full((batch,), math.inf, dtype=torch.float64)  # S
        self.row = torch.full((batch,), -1)

    def offer(self, queries: Tensor, keys: Tensor, at: Tensor, first: int) -> None:
        """Take in pairs [P, 2] of a query and a key of a chunk whose first row is `first`."""
        if not len(at):
            return
        exact = pair_squared_distances(queries[at[:, 0]], keys[at[:, 1]])
        pairs = zip(at[:, 0].tolist(), (at[:, 1] + first).tolist(), exact.tolist(), strict=True)
        for query, row, squared in pairs:  # rows ascend: a later tie does not take over
            if squared < self.squared[query]:
                self.squared[query], self.row[query] = squared, row

    def hits(self, radius: Tensor) -> Tensor:
        """Return the row that hits, [B], -1 where none does; radius [B], that of all keys."""
        hit = self.squared <= radius.double().square()
        return self.row.masked_fill(~hit, -1)


def filtered(queries: Tensor, chunks: Chunks, widest: Tensor) -> Decided:
    """Return the nearest rows that can matter; queries [B, D], widest [B] >= every radius."""
    most = widest.double().square()[:, None]
    decided = Decided(len(queries))
    centre = moved = squares = None
    for first, keys in chunks:
        wide = keys.float()
        if centre is None:
            centre = wide.mean(dim=0)
            moved = queries.float() - centre
            squares = moved.double().square().sum(dim=1)
        wide -= centre
        key_squares = wide.double().square().sum(dim=1)
        scale = (
            squares[:, None] + key_squares.max() + 2 * (squares * key_squares.max()).sqrt()[:, None]
        )
        # The product errs by (D + 2) roundings of 2|q||k| <= scale / 2, the moves and additions by
        # a few of the whole.
        slack = (queries.shape[1] + 16) * 2.0**-24 * scale
        limit = (most + slack - squares[:, None]).float().nextafter(torch.tensor(math.inf))
        rough = torch.addmm(key_squares.float(), moved, wide.T, alpha=-2)
        decided.offer(queries, keys, (rough <= limit).nonzero(), first)
    return decided


def whole(queries: Tensor, chunks: Chunks) -> Decided:
    """Return the nearest rows by float64 differences of all pairs; queries [B, D]."""
    decided = Decided(len(queries))
    wide = queries.double()
    for first, keys in chunks:
        distance = torch.cdist(wide, keys.double(), compute_mode="donot_use_mm_for_euclid_dist")
        least = torch.minimum(distance.amin(dim=1), decided.squared.sqrt())
        near = distance <= least[:, None] * (1 + _CLOSE)
        decided.offer(queries, keys, near.nonzero(), first)
    return decided
