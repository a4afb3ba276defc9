"""Other ways to ask the same: keys resident, norms computed before, the radius test at the end.

None of them is exact near a radius; a row says how many of its decisions were wrong.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_kernels
from benchmarks.gpu_calls import Answer, Call
from benchmarks.gpu_cells import CUVS, FAISS, FUSED, PRODUCT, Cell
from benchmarks.gpu_problems import Book

CAPTURED = (PRODUCT, FUSED)  # the others launch and wait for themselves


def call_of(cell: Cell, book: Book) -> Call:
    """Return the call of a peer for a cell.

    Raises: ImportError where it is not installed.
    """
    queries = book.queries(cell.B, cell.asks)
    ask = _PEERS[cell.path](book)

    def asked() -> Answer:
        return Answer(*ask(queries))

    return asked


def _keys_of(book: Book) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys [N, D], their squared norms [N] float32 and radius^2 [N] float32, < 0 if dead."""
    if "peers" not in book.kept:
        snapshot = book.snapshot
        keys = snapshot.key_slots[: snapshot.rows]
        norms = torch.cat([part.float().square().sum(dim=1) for part in keys.split(1 << 14)])
        radii = snapshot.radii
        book.kept["peers"] = keys, norms, radii.square() * radii.sign()
    return book.kept["peers"]  # type: ignore[no-any-return]


def product_and_min(
    queries: Tensor, keys: Tensor, norms: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor]:
    """Return hit [B] and row [B]: a product in the keys' type, then the least of each query."""
    squared = norms - 2 * (queries @ keys.T).float()
    least, row = squared.min(dim=1)
    hit = least + queries.float().square().sum(dim=1) <= limits[row]
    return hit, torch.where(hit, row, -1)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the product compiled once, for any shape."""
    return torch.compile(product_and_min, dynamic=True)


def _product(book: Book) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    keys, norms, limits = _keys_of(book)
    return lambda queries: _compiled()(queries, keys, norms, limits)


def _fused(book: Book) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    keys, norms, limits = _keys_of(book)
    return lambda queries: gpu_kernels.fused_argmin(queries, keys, norms, limits)


def _cuvs(book: Book) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return cuVS's exact search, of float32 keys."""
    search = importlib.import_module("cuvs.neighbors.brute_force")
    keys, _, limits = _keys_of(book)
    index = search.build(keys.float(), metric="sqeuclidean")

    def ask(queries: Tensor) -> tuple[Tensor, Tensor]:
        found = search.search(index, queries.float(), 1)
        squared, row = (torch.as_tensor(part, device=keys.device)[:, 0] for part in found)
        return _within(squared, row.long(), limits)

    return ask


def _faiss(book: Book) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return FAISS's flat index of float32 keys on the GPU."""
    faiss = importlib.import_module("faiss")
    if not hasattr(faiss, "GpuIndexFlatL2"):
        raise ImportError("this faiss was built for the host")
    importlib.import_module("faiss.contrib.torch_utils")  # so that it takes tensors
    keys, _, limits = _keys_of(book)
    index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), keys.shape[1])
    for part in keys.split(1 << 14):
        index.add(part.float())

    def ask(queries: Tensor) -> tuple[Tensor, Tensor]:
        squared, row = index.search(queries.float(), 1)
        return _within(squared[:, 0], row[:, 0], limits)

    return ask


def _within(squared: Tensor, row: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    hit = squared <= limits[row]
    return hit, torch.where(hit, row, -1)


_PEERS: dict[str, Callable[[Book], Any]] = {
    PRODUCT: _product,
    FUSED: _fused,
    CUVS: lambda book: _once(book, CUVS, _cuvs),
    FAISS: lambda book: _once(book, FAISS, _faiss),
}


def _once(book: Book, name: str, make: Callable[[Book], Any]) -> Any:
    if name not in book.kept:
        book.kept[name] = make(book)
    return book.kept[name]
