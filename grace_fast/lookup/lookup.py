"""The front door: check a call, describe it, choose a back end, apply the law to its answer.

This is the only place where a back end is chosen. An explicit choice never falls back; `auto` takes
the first back end in `AUTOMATIC` that has no reason against the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import get_args

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.codebook import Codebook, Snapshot
from grace_fast.index import maintained, segments
from grace_fast.lookup.backends import cpu, cuda, faiss, reference, triton
from grace_fast.lookup.backends.faiss_index import FaissIndex
from grace_fast.lookup.backends.workload import Verb, Workload

BACKENDS: dict[str, ModuleType] = {
    module.NAME: module for module in (cpu, cuda, triton, faiss, reference)
}

# What `auto` tries, in this order, by where the keys are; elsewhere there is only the reference.
# Triton takes keys on the host only when interpreted, which is for tests: it has to be named. So
# has `cuda`, until it has been run on a GPU.
AUTOMATIC = {"cpu": (cpu, reference), "cuda": (triton, reference)}


@dataclass(frozen=True)
class Holding:
    """What decides how the keys of a codebook on the host are gone through."""

    rows: int  # N
    key_bytes: int  # of one key
    predicted_bytes: float = (
        math.inf
    )  # that a certified look-up reads; measured when codes are made
    backend: str | FaissIndex = "auto"
    ranks: int = 1  # that the rows are spread over


# How the keys are gone through: the first line that holds. The thresholds were measured, and are
# kept where they are acted on. FAISS has to be named: on real activations its fastest index takes a
# hundred times as long as codes at N = 1e4 (benchmarks/large.py), and may be wrong.
WAYS: tuple[tuple[str, Callable[[Holding], bool]], ...] = (
    ("row shards", lambda held: held.ranks > 1),
    ("faiss", lambda held: held.backend == faiss.NAME or isinstance(held.backend, FaissIndex)),
    ("dense", lambda held: held.rows < maintained.SMALLEST),
    ("dense", lambda held: held.predicted_bytes >= held.rows * held.key_bytes),
    ("certified, linear", lambda held: held.rows < segments.ORDER_ROWS),
    ("certified, in order", lambda held: True),
)


def way(held: Holding) -> str:
    """Return how keys are gone through: a name of `WAYS`."""
    return next(name for name, holds in WAYS if holds(held))


def way_of(codebook: Codebook, backend: str | FaissIndex = "auto") -> str:
    """Return how the keys of a codebook on the host are gone through by now; see `WAYS`."""
    snapshot = codebook.snapshot()
    view = cpu.view_of(snapshot)
    predicted = math.inf if view is None or view.plan is None else view.predicted_bytes
    key_bytes = snapshot.key_dim * snapshot.dtype.itemsize
    return way(Holding(snapshot.rows, key_bytes, predicted, backend))


class BackendUnavailable(RuntimeError):
    """No back end can take the call; the message lists every reason."""


class Match:
    """The answer of `find` for a batch of queries; a field is made when it is read."""

    __slots__ = ("_answers", "_certified", "_fields", "hits")

    def __init__(
        self,
        hits: int | None,
        answers: bytearray | None = None,
        fields: tuple[Tensor, Tensor, Tensor] | None = None,
        certified: Tensor | None = None,
    ) -> None:
        self.hits = hits  # how many hit; None where a device has yet to say
        self._answers = answers
        self._certified = certified
        self._fields: dict[torch.dtype, Tensor] | None = None  # those that were read
        if fields is not None:
            self._fields = dict(zip((torch.bool, torch.int64, torch.float64), fields, strict=True))

    def _field(self, dtype: torch.dtype) -> Tensor:
        if self._fields is None:
            self._fields = {}
        if dtype not in self._fields:
            self._fields[dtype] = cpu.unpack(self._answers, dtype)
        return self._fields[dtype]

    @property
    def hit(self) -> Tensor:
        """[B] bool, the query is in the ball of its nearest key."""
        return self._field(torch.bool)

    @property
    def row(self) -> Tensor:
        """[B] int64, the row that hit, the lowest on a tie; -1 where missed."""
        return self._field(torch.int64)

    @property
    def squared_distance(self) -> Tensor:
        """[B] float64, S of that row in the canonical order; inf where missed."""
        return self._field(torch.float64)

    @property
    def distance(self) -> Tensor:
        """[B] float32, to that row; inf where missed."""
        return self.squared_distance.sqrt().float()

    @property
    def certified(self) -> Tensor:
        """[B] bool, the answer is R64's; False where a FAISS index found it and proved nothing."""
        return torch.ones_like(self.hit) if self._certified is None else self._certified

    @property
    def effort(self) -> tuple[int, int] | None:
        """Misses proved without reading a key, and keys read; None where a back end is silent."""
        return None if self._answers is None else cpu.effort(self._answers)

    def __repr__(self) -> str:
        return f"Match(hit={self.hit}, row={self.row}, distance={self.distance})"


@dataclass(frozen=True, slots=True)
class Nearest:
    """The answer of `nearest` for a batch of queries."""

    row: Tensor  # [B] int64, the lowest row on a tie; -1 where no key is within, or no finite query
    distance: Tensor  # [B] float32; inf where row is -1
    squared_distance: Tensor  # [B] float64, S in the canonical order
    certified: Tensor  # [B] bool; False where a FAISS index found the row and proved nothing


@lru_cache(maxsize=4096)
def choose(workload: Workload, backend: str | FaissIndex = "auto") -> ModuleType:
    """Return the back end that takes a call.

    Raises: ValueError for a name that does not exist, BackendUnavailable with every reason.
    """
    candidates: tuple[ModuleType, ...]
    if backend == "auto":
        candidates = AUTOMATIC.get(workload.device, (reference,))
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


def nearest(
    queries: Tensor,
    codebook: Codebook | Snapshot,
    backend: str | FaissIndex = "auto",
    within: float = math.inf,
) -> Nearest:
    """Return the nearest key of every query, inside its ball or not.

    queries: [B, D]; within: a distance beyond which no key counts. Where it is not much more than
    the radii, the answer costs about as much as that of `find`, and far less than without.

    Raises: as `find`, and ValueError where `within` is negative or NaN.
    """
    if not within >= 0:
        raise ValueError(f"within must be a distance of at least 0, got {within}")
    snapshot = _snapshot(codebook)
    queries = _checked(queries, snapshot)
    module = chosen(snapshot, len(queries), backend, "nearest")
    if module is cpu:
        row, squared = cpu.nearest(queries, snapshot, within)
    elif module is faiss:
        row, squared, proved = faiss.nearest(queries, snapshot, within, _index(backend))
        return Nearest(row, squared.sqrt().float(), squared, proved)
    else:
        row, squared = semantics.not_beyond(within, *module.nearest(queries, snapshot))
    return Nearest(row, squared.sqrt().float(), squared, torch.ones_like(row, dtype=torch.bool))


def find(
    queries: Tensor, codebook: Codebook | Snapshot, backend: str | FaissIndex = "auto"
) -> Match:
    """Return which queries are inside the ball of their nearest key, and of which.

    queries: [B, D] on the codebook's device. A query with a NaN or an infinity is a miss.
    backend: a name, or a `FaissIndex` that may answer without proof: see `Match.certified`.

    Raises: TypeError for no tensor, ValueError for another width, element type or device, or an
    index that FAISS does not know or cannot train, BackendUnavailable.
    """
    snapshot = _snapshot(codebook)
    if backend == "auto" and (answer := cpu.ask(queries, snapshot)) is not None:
        return Match(*answer)
    queries = _checked(queries, snapshot)
    module = chosen(snapshot, len(queries), backend)
    if module is cpu:
        return Match(*cpu.find_packed(queries, snapshot))
    if module is faiss:
        found, proved = faiss.find(queries, snapshot, _index(backend))
        return Match(None, fields=found, certified=proved)
    if hasattr(module, "find"):
        return Match(None, fields=module.find(queries, snapshot))
    row, squared = module.nearest(queries, snapshot)
    hit = semantics.in_ball(squared, snapshot.radii_of(row))
    fields = (hit, row.masked_fill(~hit, -1), squared.masked_fill(~hit, torch.inf))
    return Match(None, fields=fields)


def replace(
    output: Tensor,
    queries: Tensor,
    codebook: Codebook | Snapshot,
    positions: Tensor | None = None,
    mode: semantics.Replacement = "replace_prompt",
    backend: str | FaissIndex = "auto",
) -> Tensor:
    """Return the layer's output with the value written where a query hits.

    output: [B, T, V]; queries: [B, D]; positions: [B] int64, the token of each row that the query
    was taken from (the last by default). It is `output` itself where nothing hits, and never
    written to.

    Raises: as `find`, and ValueError for an output or positions of another shape or an unknown
    mode.
    """
    snapshot = _snapshot(codebook)
    check_replacement(output, queries, snapshot, positions, mode)
    match = find(queries, snapshot, backend)
    if match.hits == 0:
        return output
    mask = semantics.replacement_mask(mode, query_positions(positions, output), output.shape[1])
    return write(output, match, snapshot, mask)


def replace_(
    output: Tensor,
    queries: Tensor,
    codebook: Codebook | Snapshot,
    positions: Tensor | None = None,
    mode: semantics.Replacement = "replace_prompt",
    backend: str | FaissIndex = "auto",
) -> Tensor:
    """Do what `replace` does in place, and return output: only what is replaced is written.

    On a GPU nobody waits for the decision.

    Raises: as `replace`, and ValueError for an output that autograd needs as it is.
    """
    snapshot = _snapshot(codebook)
    check_replacement(output, queries, snapshot, positions, mode)
    positions = query_positions(positions, output)
    if output.requires_grad and torch.is_grad_enabled():
        raise ValueError("output needs gradients and cannot be written in place; use replace")
    mask = semantics.replacement_mask(mode, positions, output.shape[1])
    rows_lie_side_by_side = output.stride(2) == 1
    if output.is_cuda and rows_lie_side_by_side and chosen(snapshot, len(queries), backend) is cuda:
        cuda.replace_(output, _checked(queries, snapshot), snapshot, mask)
        return output
    match = find(queries, snapshot, backend)
    if output.is_cuda and rows_lie_side_by_side and triton.writes():
        triton.write_(output, match.hit, match.row, snapshot, positions, mode)
    elif output.is_cuda:
        output.copy_(write(output, match, snapshot, mask))
    elif match.hits != 0 and len(hits := match.hit.nonzero()[:, 0]):
        values = snapshot.values_of(match.row[hits])
        output[hits] = semantics.replace(output[hits], match.hit[hits], values, mask[hits])
    return output


def check_replacement(
    output: Tensor,
    queries: Tensor,
    snapshot: Snapshot,
    positions: Tensor | None,
    mode: semantics.Replacement,
) -> None:
    """Raise ValueError as `replace` does for an output, positions or a mode it cannot take."""
    modes = get_args(semantics.Replacement)
    if mode not in modes:
        raise ValueError(f"replacement must be one of {modes}, got {mode!r}")
    wanted = (len(queries), snapshot.value_dim)
    if output.ndim != 3 or (output.shape[0], output.shape[2]) != wanted:
        raise ValueError(f"output must be [{wanted[0]}, T, {wanted[1]}], got {tuple(output.shape)}")
    if output.device != snapshot.device:
        raise ValueError(
            f"output must be on the codebook's device {snapshot.device}, got {output.device}"
        )
    if positions is not None and positions.shape != (len(output),):
        raise ValueError(f"positions must be [{len(output)}], got {tuple(positions.shape)}")


def query_positions(positions: Tensor | None, output: Tensor) -> Tensor:
    """Return each row's query position [B]: the last token where none is given."""
    if positions is not None:
        return positions
    return torch.full((len(output),), output.shape[1] - 1, device=output.device, dtype=torch.int64)


def write(output: Tensor, match: Match, snapshot: Snapshot, mask: Tensor) -> Tensor:
    """Return output [B, T, V] with the hits' values where mask [B, T] is set; itself if none."""
    if match.hits == 0 or (output.device.type == "cpu" and not match.hit.any()):
        return output
    return semantics.replace(output, match.hit, snapshot.values_of(match.row), mask)


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


def build_index(codebook: Codebook, index: FaissIndex) -> None:
    """Train and fill a FAISS index of a codebook now, so that no look-up waits for it.

    Raises: BackendUnavailable, ValueError for an index that FAISS does not know or cannot train.
    """
    chosen(codebook.snapshot(), backend=index)
    faiss.train(codebook, index)


def drop_index(codebook: Codebook, index: FaissIndex) -> None:
    """Forget a FAISS index of a codebook and give its memory back."""
    faiss.drop(codebook, index)


def _index(backend: str | FaissIndex) -> FaissIndex:
    """Return the FAISS index that a back end stands for: flat by its name alone."""
    return backend if isinstance(backend, FaissIndex) else faiss.FLAT


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
    # A negative view (of z.conj().imag, say) has the sign of its memory's opposite.
    return queries.detach().resolve_neg()
