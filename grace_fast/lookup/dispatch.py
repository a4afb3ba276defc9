"""The choice of a back end: an explicit one never falls back, `auto` takes the first that can.

A pure cached function of `Workload`, so that the whole table can be tested without the hardware.
How the compiled host path goes through keys, by codes or all of them, is decided where it is acted
on (`index.native_view`, `index.maintained`).
"""

from __future__ import annotations

import sys
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.errors import BackendUnavailable
from grace_fast.lookup.backends import cpu, cuda, faiss, reference, triton
from grace_fast.lookup.backends.faiss_index import FaissIndex
from grace_fast.lookup.backends.workload import Verb, Workload

BACKENDS: dict[str, ModuleType] = {
    module.NAME: module for module in (cpu, cuda, triton, faiss, reference)
}

# What `auto` tries, in this order, by where the keys are; elsewhere there is only the reference.
# Triton takes keys on the host only when interpreted, which is for tests: it has to be named. FAISS
# has to be, too: on real activations its fastest index takes a hundred times as long as codes at
# N = 1e4 (benchmarks/large.py), and may be wrong.
AUTOMATIC: dict[str, tuple[ModuleType, ...]] = {
    "cpu": (cpu, reference),
    "cuda": (cuda, triton, reference),
}


class Turn(NamedTuple):
    """Which of the engines for a GPU is asked first, for some batches."""

    batch: int  # queries, at most
    first: ModuleType
    measured: str  # where the choice comes from


# docs/lookups.md says what the estimates rest on. An engine that was not built, or cannot take the
# call, is passed over.
ON_A_GPU = (
    # One launch or two, and 8 queries share a read of the keys; Triton takes three, and 4 do.
    Turn(triton.TILED - 1, cuda, measured="estimated"),
    # All queries share a read, by tensor cores; the other engine would read the keys four times.
    Turn(sys.maxsize, triton, measured="estimated"),
)


def automatic(workload: Workload) -> tuple[ModuleType, ...]:
    """Return what `auto` tries for a call, in this order."""
    known = AUTOMATIC.get(workload.device, (reference,))
    if workload.device != "cuda":
        return known
    first = next(turn.first for turn in ON_A_GPU if workload.batch <= turn.batch)
    return (first, *(module for module in known if module is not first))


@lru_cache(maxsize=4096)
def choose(workload: Workload, backend: str | FaissIndex = "auto") -> ModuleType:
    """Return the back end that takes a call.

    Raises: ValueError for a name that does not exist, BackendUnavailable with every reason.
    """
    candidates: tuple[ModuleType, ...]
    if backend == "auto":
        candidates = automatic(workload)
    elif isinstance(backend, FaissIndex):
        candidates = (faiss,)
    elif backend in BACKENDS:
        candidates = (BACKENDS[backend],)
    else:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    reasons = []
    for module in candidates:
        reason = module.why_not(workload)
        if reason is None:
            return module
        reasons.append(f"{module.NAME}: {reason}")
    raise BackendUnavailable(f"no back end takes {workload}: {'; '.join(reasons)}")


def chosen(
    snapshot: Snapshot,
    batch: int = 1,
    backend: str | FaissIndex = "auto",
    verb: Verb = "find",
) -> ModuleType:
    """Return the back end that takes a batch of queries for a version."""
    keys = snapshot.key_slots
    return _choose(keys.device, keys.dtype, batch, snapshot.rows, keys.shape[1], verb, backend)


@lru_cache(maxsize=4096)
def _choose(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    rows: int,
    key_dim: int,
    verb: Verb,
    backend: str | FaissIndex,
) -> ModuleType:
    # A Workload takes longer to make than to choose for.
    workload = Workload(device.type, dtype, batch, rows, key_dim, verb, device.index)
    return choose(workload, backend)


def keep_for_graphs(codebook: Codebook) -> None:
    """Keep a codebook at fixed addresses, so that captured CUDA graphs see its edits.

    Every GPU back end that takes the codebook does so; each edit is on the device when the call
    that made it returns, on that thread's current stream.

    Raises: BackendUnavailable with every reason where none does, MemoryError where there is no
    room.
    """
    keys = codebook.snapshot().key_slots
    device, width = keys.device, codebook.key_dim
    workload = Workload(device.type, keys.dtype, 1, len(codebook), width, index=device.index)
    reasons = {module: module.why_not(workload) for module in (cuda, triton)}
    takers = [module for module, reason in reasons.items() if reason is None]
    if not takers:
        said = "; ".join(f"{module.NAME}: {reason}" for module, reason in reasons.items())
        raise BackendUnavailable(f"no back end keeps {codebook} for graphs: {said}")
    for module in takers:
        module.keep_for_graphs(codebook)
