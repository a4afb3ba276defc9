"""The front door: checks a call, describes it, chooses a back end, and applies the law to its answer.

This is the only place where a back end is chosen. An explicit choice never falls back; `auto` takes the
first back end, in the order below, that has no reason against the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.backends import cpu, reference
from grace_fast.backends.workload import Workload
from grace_fast.codebook import Codebook, Snapshot

# In the order of choice: the first that can take a call does.
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (cpu, reference)}


class BackendUnavailable(RuntimeError):
    """No back end can take the call; the message lists every reason."""


@dataclass(frozen=True, slots=True)
class Match:
    """The answer of `find` for a batch of queries."""

    hit: Tensor  # [B] bool, the query is in the ball of its nearest key
    row: Tensor  # [B] int64, the row that hit, the lowest on a tie; -1 where missed
    squared_distance: Tensor  # [B] float64, S in the canonical order; inf where missed

    @property
    def distance(self) -> Tensor:
        """[B] float32, to the row that hit; inf where missed."""
        return self.squared_distance.sqrt().float()


@dataclass(frozen=True, slots=True)
class Nearest:
    """The answer of `nearest` for a batch of queries."""

    row: Tensor  # [B] int64, the lowest row on a tie; -1 where there is no key or no finite query
    distance: Tensor  # [B] float32; inf where row is -1
    squared_distance: Tensor  # [B] float64, S in the canonical order


@lru_cache(maxsize=4096)
def choose(workload: Workload, backend: str = "auto") -> ModuleType:
    """Return the back end that takes a call.

    Raises: ValueError for a name that does not exist, BackendUnavailable with every reason.
    """
    if backend == "auto":
        candidates = list(BACKENDS.values())
    elif backend in BACKENDS:
        candidates = [BACKENDS[backend]]
    else:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    reasons = []
    for module in candidates:
        reason = module.why_not(workload)
        if reason is None:
            return module
        reasons.append(f"{module.NAME}: {reason}")
    raise BackendUnavailable(f"no back end takes {workload}: {'; '.join(reasons)}")


def nearest(queries: Tensor, codebook: Codebook | Snapshot, backend: str = "auto") -> Nearest:
    """Return the nearest key of every query, inside its ball or not.

    queries: [B, D]. Raises as `find`.
    """
    snapshot = _snapshot(codebook)
    row, squared = _nearest(_checked(queries, snapshot), snapshot, backend)
    return Nearest(row, squared.sqrt().float(), squared)


def find(queries: Tensor, codebook: Codebook | Snapshot, backend: str = "auto") -> Match:
    """Return which queries are inside the ball of their nearest key, and of which.

    queries: [B, D] on the codebook's device. A query with a NaN or an infinity is a miss.

    Raises: TypeError for no tensor, ValueError for another width, element type or device,
    BackendUnavailable.
    """
    snapshot = _snapshot(codebook)
    queries = _checked(queries, snapshot)
    module = choose(_workload(queries, snapshot), backend)
    if hasattr(module, "find"):
        hit, row, squared = module.find(queries, snapshot)
        return Match(hit, row, squared)
    row, squared = module.nearest(queries, snapshot)
    hit = semantics.in_ball(squared, snapshot.radii_of(row))
    return Match(hit, row.masked_fill(~hit, -1), squared.masked_fill(~hit, torch.inf))


def replace(
    output: Tensor,
    queries: Tensor,
    codebook: Codebook | Snapshot,
    positions: Tensor | None = None,
    mode: semantics.Replacement = "replace_prompt",
    backend: str = "auto",
) -> Tensor:
    """Return the layer's output with the value written where a query hits.

    output: [B, T, V]; queries: [B, D]; positions: [B] int64, the token of each row that the query was
    taken from (the last by default). It is `output` itself where nothing hits, and never written to.

    Raises: as `find`, and ValueError for an output or positions of another shape or an unknown mode.
    """
    snapshot = _snapshot(codebook)
    wanted = (len(queries), snapshot.value_dim)
    if output.ndim != 3 or (output.shape[0], output.shape[2]) != wanted:
        raise ValueError(f"output must be [{wanted[0]}, T, {wanted[1]}], got {tuple(output.shape)}")
    if positions is None:
        positions = torch.full((len(output),), output.shape[1] - 1, device=output.device)
    elif positions.shape != (len(output),):
        raise ValueError(f"positions must be [{len(output)}], got {tuple(positions.shape)}")
    mask = semantics.replacement_mask(mode, positions, output.shape[1])
    return write(output, find(queries, snapshot, backend), snapshot, mask)


def write(output: Tensor, match: Match, snapshot: Snapshot, mask: Tensor) -> Tensor:
    """Return output [B, T, V] with each hit's value where mask [B, T] is set; itself if none hit."""
    if output.device.type == "cpu" and not match.hit.any():
        return output
    return semantics.replace(output, match.hit, snapshot.values_of(match.row), mask)


def _nearest(queries: Tensor, snapshot: Snapshot, backend: str) -> tuple[Tensor, Tensor]:
    module = choose(_workload(queries, snapshot), backend)
    found: tuple[Tensor, Tensor] = module.nearest(queries, snapshot)
    return found


def _workload(queries: Tensor, snapshot: Snapshot) -> Workload:
    return Workload(
        snapshot.device.type, snapshot.dtype, len(queries), snapshot.rows, snapshot.key_dim
    )


def _snapshot(codebook: Codebook | Snapshot) -> Snapshot:
    if isinstance(codebook, Codebook):
        return codebook.snapshot()
    if isinstance(codebook, Snapshot):
        return codebook
    raise TypeError(f"codebook must be a Codebook, got {type(codebook).__name__}")


def _checked(queries: Tensor, snapshot: Snapshot) -> Tensor:
    if not isinstance(queries, Tensor):
        raise TypeError(
            f"queries must be a tensor [B, {snapshot.key_dim}], got {type(queries).__name__}"
        )
    if queries.ndim != 2 or queries.shape[1] != snapshot.key_dim:
        raise ValueError(f"queries must be [B, {snapshot.key_dim}], got {tuple(queries.shape)}")
    if queries.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"queries must be float32, bfloat16 or float16, got {queries.dtype}; "
            "cast them to the codebook's element type"
        )
    if queries.device != snapshot.device:
        raise ValueError(
            f"queries must be on the codebook's device {snapshot.device}, got {queries.device}"
        )
    return queries.detach()
