"""Codebooks and queries where decisions are hard, and what the law says of them."""

from __future__ import annotations

import torch

import grace_fast as gf
from grace_fast import semantics


def law(queries, snapshot):
    """What semantics.py says, in chunks of queries."""
    hits, rows, sums = [], [], []
    for part in queries.split(64):
        row, squared = semantics.nearest(part, snapshot.keys, snapshot.live)
        hit = semantics.in_ball(squared, snapshot.radii_of(row))
        hits.append(hit)
        rows.append(row.masked_fill(~hit, -1))
        sums.append(squared.masked_fill(~hit, torch.inf))
    return torch.cat(hits), torch.cat(rows), torch.cat(sums)


def book_of(keys, radii, dtype=torch.float32):
    keys = keys.to(dtype)
    book = gf.Codebook(keys.shape[1], 2, dtype=dtype, reserve_rows=4 * len(keys) + 9000)
    book.append(keys, torch.zeros(len(keys), 2, dtype=dtype), radii)
    return book


class Data:
    """Keys, radii and queries where decisions are hard."""

    def __init__(self, seed):
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.random)

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.random)

    def some(self, keys, count):
        return keys[torch.randint(len(keys), (count,), generator=self.random)]

    def ties(self, rows, width):
        """Small integers: many equal distances, and many keys twice."""
        keys = self.normal(rows, width).mul(1.2).round()
        return keys, self.uniform(rows).mul(8).round().mul(0.5) - 0.5

    def clusters(self, rows, width):
        centres = self.normal(max(1, rows // 12), width)
        keys = self.some(centres, rows) + 0.05 * self.normal(rows, width)
        return keys, 0.02 + 0.4 * self.uniform(rows).square() - 0.1 * (self.uniform(rows) < 0.1)

    def lognormal(self, rows, width):
        keys = self.normal(rows, width) * torch.arange(1, width + 1).float() ** -1
        return keys, (0.9 * self.normal(rows)).exp() * 0.15

    def massive(self, rows, width):
        keys = self.normal(rows, width)
        keys[:, 0] *= 1000
        return keys + 40, torch.full((rows,), 0.2 * width**0.5)

    def giant(self, rows, width):
        keys = self.normal(rows, width)
        radii = torch.full((rows,), 0.15 * width**0.5)
        radii[rows // 2] = 5 * width**0.5
        radii[rows // 3] = -1
        return keys, radii

    def shadowed(self, rows, width):
        """A small or dead ball beside a large one that would cover the query."""
        keys, _ = self.clusters(rows, width)
        radii = torch.where(self.uniform(rows) < 0.5, 0.01, 1.0)
        return keys, torch.where(self.uniform(rows) < 0.2, -0.5, radii)

    def queries(self, keys, radii, count):
        """Strangers, keys, neighbours of keys, and points within a rounding of a radius."""
        keys = keys.float()
        pick = torch.randint(len(keys), (count,), generator=self.random)
        direction = torch.nn.functional.normalize(self.normal(count, keys.shape[1]), dim=1)
        near = 1 + 1e-7 * self.normal(count)
        on_radius = keys[pick] + direction * (radii[pick].abs() * near)[:, None]
        between = (keys[pick] + self.some(keys, count)) / 2
        stranger = keys[pick] + 0.3 * self.normal(count, keys.shape[1])
        kind = torch.randint(5, (count, 1), generator=self.random)
        queries = torch.where(kind == 0, keys[pick], on_radius)
        queries = torch.where(kind == 1, between, queries)
        return torch.where(kind == 2, stranger, queries)


KINDS = ["ties", "clusters", "lognormal", "massive", "giant", "shadowed"]
