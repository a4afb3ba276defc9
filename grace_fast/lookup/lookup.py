"""The front door: check a call, ask the back end that takes it, apply the law to its answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import get_args

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index.native_view import DTYPE_NUMBERS
from grace_fast.lookup.backends import cpu, cuda, faiss, graphs, triton
from grace_fast.lookup.backends.faiss_index import FaissIndex
from grace_fast.lookup.dispatch import chosen
from grace_fast.lookup.match import Distributed, Match, Nearest


def nearest(
    queries: Tensor,
    codebook: Codebook | Snapshot | Distributed,
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
    if isinstance(codebook, Distributed):
        return codebook.without(backend).nearest(queries, within)
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
    queries: Tensor,
    codebook: Codebook | Snapshot | Distributed,
    backend: str | FaissIndex = "auto",
) -> Match:
    """Return which queries are inside the ball of their nearest key, and of which.

    queries: [B, D] on the codebook's device. A query with a NaN or an infinity is a miss.
    backend: a name, or a `FaissIndex` that may answer without proof: see `Match.certified`.

    Raises: TypeError for no tensor, ValueError for another width, element type or device, or an
    index that FAISS does not know or cannot train, BackendUnavailable.
    """
    if isinstance(codebook, Distributed):
        return codebook.without(backend).find(queries)
    return found(queries, _snapshot(codebook), backend, sums=False)


def found(
    queries: Tensor, snapshot: Snapshot, backend: str | FaissIndex = "auto", sums: bool = True
) -> Match:
    """Do what `find` does for a version; without `sums`, S may be left until it is read."""
    if backend == "auto" and (answer := cpu.ask(queries, snapshot)) is not None:
        return Match(*answer)
    queries = _checked(queries, snapshot)
    module = chosen(snapshot, len(queries), backend)
    if module is cpu:
        return Match(*cpu.find_packed(queries, snapshot))
    if module is faiss:
        fields, proved = faiss.find(queries, snapshot, _index(backend))
        return Match(None, fields=fields, certified=proved)
    if hasattr(module, "find"):
        later = None if sums else _sums_later(queries, snapshot, module)
        return Match(None, fields=module.find(queries, snapshot, sums), sums=later)
    row, squared = module.nearest(queries, snapshot)
    hit = semantics.in_ball(squared, snapshot.radii_of(row))
    fields = (hit, row.masked_fill(~hit, -1), squared.masked_fill(~hit, torch.inf))
    return Match(None, fields=fields)


def _sums_later(queries: Tensor, snapshot: Snapshot, module: ModuleType) -> Callable[[], Tensor]:
    """Return what computes S of the hits, by asking the same version once more."""
    captured, written = graphs.is_capturing(snapshot), _writes(queries)

    def ask() -> Tensor:
        if graphs.is_capturing(snapshot) != captured:
            raise RuntimeError(
                "squared_distance and distance are computed when they are read: read them "
                + ("inside the capture that the look-up is in" if captured else "before a capture")
            )
        if _writes(queries) != written:
            raise RuntimeError(
                "the queries were written to since they were looked up, and squared_distance and "
                "distance are computed when they are read: read them first, or give find a copy"
            )
        squared: Tensor = module.find(queries, snapshot, True)[2]
        return squared

    return ask


def _writes(queries: Tensor) -> int:
    """Return how often torch wrote to queries in place; always 0 of what inference mode made."""
    return 0 if queries.is_inference() else queries._version


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
    if output.requires_grad and torch.is_grad_enabled():
        raise ValueError("output needs gradients and cannot be written in place; use replace")
    in_kernel = _has_kernels_order(output)
    if in_kernel and chosen(snapshot, len(queries), backend) is cuda:
        cuda.replace_(output, _checked(queries, snapshot), snapshot, positions, mode)
        return output
    match = found(queries, snapshot, backend, sums=False)
    if in_kernel and triton.writes():
        triton.write_(output, match.hit, match.row, snapshot, positions, mode)
        return output
    mask = semantics.replacement_mask(mode, query_positions(positions, output), output.shape[1])
    if output.is_cuda:
        output.copy_(write(output, match, snapshot, mask))
    elif match.hits != 0 and len(hits := match.hit.nonzero()[:, 0]):
        values = snapshot.values_of(match.row[hits])
        output[hits] = semantics.replace(output[hits], match.hit[hits], values, mask[hits])
    return output


def _has_kernels_order(output: Tensor) -> bool:
    """Tell whether the kernels can write an output [B, T, V]: on a GPU, rows side by side."""
    return output.is_cuda and output.stride(2) == 1 and output.dtype in DTYPE_NUMBERS


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
    if positions is None:
        return
    if positions.shape != (len(output),):
        raise ValueError(f"positions must be [{len(output)}], got {tuple(positions.shape)}")
    if positions.device != output.device:
        raise ValueError(
            f"positions must be on the output's device {output.device}, got {positions.device}"
        )


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


def _index(backend: str | FaissIndex) -> FaissIndex:
    """Return the FAISS index that a back end stands for: flat by its name alone."""
    return backend if isinstance(backend, FaissIndex) else faiss.FLAT


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
