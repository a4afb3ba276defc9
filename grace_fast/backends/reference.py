"""The law itself, in torch: on any device, for any shape, slow and the measure of the others.

A float64 pass in any order brackets every S; only keys inside that bracket of the smallest are
summed again in the canonical order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.backends.workload import Workload
from grace_fast.codebook import Snapshot

NAME = "reference"
_CHUNK_ELEMENTS = 1 << 22  # of a [B, N, D] block of differences in float64: 32 MiB


def why_not(workload: Workload) -> str | None:
    """Return None: the reference takes every call."""
    return None


def nearest(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """Return the nearest live row and its S of queries [B, D]; see `backends`."""
    if not len(snapshot):
        return semantics.no_row(len(queries), queries.device)
    snapshot.test_files()
    found = [_nearest_of_one(query, snapshot) for query in queries.double()]
    if not found:
        return semantics.no_row(0, queries.device)
    return torch.cat([row for row, _ in found]), torch.cat([squared for _, squared in found])


def _nearest_of_one(query: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    keys, width = snapshot.keys, snapshot.key_dim
    step = max(1, _CHUNK_ELEMENTS // width)
    rough = torch.cat(
        [(query - part.double()).square().sum(dim=1) for part in torch.split(keys, step)]
    )
    rough = rough.masked_fill(~(snapshot.live & rough.isfinite()), math.inf)
    # Each S, in either order, is within (D + 2) roundings of the exact sum.
    slack = 1 + 4 * (width + 2) * 2.0**-53
    candidates = (rough <= rough.amin() * slack).logical_and(rough.isfinite()).nonzero()[:, 0]
    if not len(candidates):
        return semantics.no_row(1, query.device)
    live = torch.ones_like(candidates, dtype=torch.bool)
    place, squared = semantics.nearest(query[None], keys[candidates], live)
    return candidates[place], squared
