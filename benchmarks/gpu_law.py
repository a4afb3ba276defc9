"""What the law says of single queries, with the keys where they are, and how answers compare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.snapshot import Snapshot

_PASS = 1 << 26  # elements of keys that are in float64 at a time


class Decision(NamedTuple):
    """The law's decision of one query."""

    hit: bool
    row: int  # -1 for a miss; the first of the rows that share a key
    squared: float  # inf for a miss


def decision(query: Tensor, snapshot: Snapshot) -> Decision:
    """Return the law's decision of one query [D].

    A float64 pass where the keys are brackets every S; what is within the bracket of the smallest
    is summed in the canonical order on the host.
    """
    wide, keys, width = query.double(), snapshot.keys, snapshot.key_dim
    parts = keys.split(max(1, _PASS // width))
    rough = torch.cat([(wide - part.double()).square_().sum(dim=1) for part in parts])
    rough = rough.masked_fill(~(snapshot.live & rough.isfinite()), math.inf)
    slack = 1 + 4 * (width + 2) * 2.0**-53  # each S is within (D + 2) roundings of the exact sum
    near = (rough <= rough.amin() * slack).logical_and(rough.isfinite()).nonzero()[:, 0]
    if not len(near):
        return Decision(False, -1, math.inf)
    exact = semantics.pair_squared_distances(query.expand(len(near), -1), keys[near])
    squared = exact.min()
    row = near[int((exact == squared).int().argmax())].cpu()
    if not bool(semantics.in_ball(squared, snapshot.radii_of(row[None]).cpu()[0])):
        return Decision(False, -1, math.inf)
    return Decision(True, int(row), float(squared))


@dataclass(frozen=True)
class Expected:
    """The law's decisions of some queries of a batch."""

    at: Tensor  # [n] int64, which queries
    hit: Tensor  # [n] bool
    row: Tensor  # [n] int64
    squared: Tensor  # [n] float64

    def wrong(self, hit: Tensor, row: Tensor, squared: Tensor | None = None) -> int:
        """Return how many of these were decided otherwise: hit [B], row [B], S [B] if it was asked.

        The row and its S count where both hit.
        """
        hit, row = hit[self.at], row[self.at]
        bad = hit != self.hit
        both = hit & self.hit
        bad |= both & (row != self.row)
        if squared is not None:
            bad |= both & (squared[self.at] != self.squared)
        return int(bad.sum())
