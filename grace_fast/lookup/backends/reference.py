"""The law itself, in torch: on any device, for any shape, slow and the measure of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.lookup.backends.workload import Workload

NAME = "reference"


def why_not(workload: Workload) -> str | None:
    """Return None: the reference takes every call."""
    return None


def nearest(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """Return the nearest live row and its S of queries [B, D]; see `backends`."""
    if not len(snapshot):
        return semantics.no_row(len(queries), queries.device)
    snapshot.test_files()
    keys, live = snapshot.keys, snapshot.live
    found = [semantics.nearest_of_one(query, keys, live) for query in queries.double()]
    if not found:
        return semantics.no_row(0, queries.device)
    return torch.cat([row for row, _ in found]), torch.cat([squared for _, squared in found])
