"""Our look-ups, each path forced: the one place that knows how.

A call takes no arguments and returns an `Answer`; it may be captured, and nothing in it waits for
the device. That codes were read is said by what the call was made from: a path by codes is given
its codes, and raises where there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grace_fast as gf
from benchmarks.gpu_cells import (
    AUTO,
    BOXES,
    CODE_TILES,
    CUDA_DENSE,
    LINEAR,
    SUMS,
    TILES,
    TRITON_DENSE,
    WRITTEN,
    Cell,
)
from benchmarks.gpu_law import Expected
from benchmarks.gpu_problems import Book, value_of
from grace_fast.lookup import lookup
from grace_fast.lookup.backends import cuda, triton
from grace_fast.lookup.backends.workload import Workload

TOKENS = 1  # T of what hits are written to: a step of decoding
MODE = "replace_last"


class Answer(NamedTuple):
    """What a look-up says of queries [B]."""

    hit: Tensor | None  # [B] bool; None where only the output tells
    row: Tensor | None  # [B] int64
    squared: Tensor | None = None  # [B] float64, where S was asked for
    output: Tensor | None = None  # [B, T, V], where hits are written


Call = Callable[[], Answer]


def why_not(cell: Cell, book: Book) -> str | None:
    """Return why a path cannot take a cell, or None."""
    module = cuda if cell.path.startswith("cuda") else triton
    device = book.snapshot.device
    work = Workload(device.type, book.snapshot.dtype, cell.B, cell.N, cell.D, index=device.index)
    return module.why_not(work)


def call_of(cell: Cell, book: Book) -> Call:
    """Return the call of one of our paths for a cell.

    Raises: RuntimeError in words where the path cannot take it.
    """
    reason = why_not(cell, book)
    if reason is not None:
        raise RuntimeError(reason)
    queries = book.queries(cell.B, cell.asks)
    if cell.path == AUTO:
        return _public(cell, book, queries)
    if cell.path.startswith("cuda"):
        return _cuda_call(cell, book, queries)
    return _triton_call(cell, book, queries)


def _room(book: Book, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return an output [B, T, V] and the query's token in each of its sequences."""
    snapshot = book.snapshot
    output = torch.zeros(
        len(queries), TOKENS, snapshot.value_dim, dtype=snapshot.dtype, device=queries.device
    )
    return output, torch.full((len(queries),), TOKENS - 1, device=queries.device)


def _public(cell: Cell, book: Book, queries: Tensor) -> Call:
    """Return what a model calls: the package chooses, and later edits are seen."""
    codebook = book.codebook
    on_gpu = queries.is_cuda
    book.kept.setdefault(AUTO, gf.prepare(codebook, cuda_graphs=on_gpu))
    output, positions = _room(book, queries)

    def written() -> Answer:
        lookup.replace_(output, queries, codebook, positions, MODE)
        return Answer(None, None, None, output)

    def found() -> Answer:
        match = gf.find(queries, codebook)
        return Answer(match.hit, match.row)

    return written if cell.asks == WRITTEN else found


def _cuda_call(cell: Cell, book: Book, queries: Tensor) -> Call:
    table = _kept(book, cell.path, partial(_cuda_table, cell.path, book))
    if cell.asks == WRITTEN:
        output, positions = _room(book, queries)

        def written() -> Answer:
            table.replace_(output, queries, positions, MODE)
            return Answer(None, None, None, output)

        return written
    return lambda: Answer(*table.find(queries, sums=cell.asks == SUMS))


def _cuda_table(path: str, book: Book) -> Any:
    snapshot, state = book.snapshot, None
    if path != CUDA_DENSE:
        state = book.linear if path in LINEAR else book.ordered
    table = cuda.Table(cuda._cuda, snapshot, state, snapshot.widest)
    table.indexed = state is not None  # whatever is predicted to read less
    return table


def _triton_call(cell: Cell, book: Book, queries: Tensor) -> Call:
    from grace_fast.kernels import replace as kernel

    find = _triton_find(cell, book)
    output, positions = _room(book, queries)
    snapshot = book.snapshot
    slots = None
    if snapshot.counts.value_moves:
        slots = snapshot.column("value_slot").to(queries.device)

    def found() -> Answer:
        told = find(queries, sums=cell.asks == SUMS)
        return Answer(told.hit, told.row, told.squared if cell.asks == SUMS else None)

    def written() -> Answer:
        hit, row, _ = find(queries, sums=False)
        kernel.replace(output, hit, row, snapshot.value_slots, slots, positions, MODE)
        return Answer(hit, row, None, output)

    return written if cell.asks == WRITTEN else found


def _triton_find(cell: Cell, book: Book) -> Callable[..., Any]:
    """Return the look-up of a path, of queries and whether S is wanted."""
    from grace_fast.kernels import codes, dense, tiles

    keys = _kept(book, "triton keys", partial(_triton_keys, book))
    if cell.path == TRITON_DENSE:
        return partial(dense.find, keys=keys)
    if cell.path == TILES:
        used = book.snapshot.key_slots[: book.snapshot.counts.keys]
        multiplied = _kept(book, TILES, partial(tiles.filter_keys, used))
        return partial(tiles.find, keys=keys, multiplied=multiplied)
    if cell.path not in (*BOXES, *LINEAR, CODE_TILES):
        raise ValueError(f"no path of ours is called {cell.path!r}")
    is_linear = cell.path in LINEAR
    made = _kept(book, f"triton codes, {is_linear}", partial(_triton_codes, book, is_linear))
    return partial(codes.find, keys=keys, codes=made, tiled=cell.path == CODE_TILES)


def _triton_keys(book: Book) -> Any:
    from grace_fast.kernels.exact import Keys

    snapshot = book.snapshot
    device = snapshot.device
    return Keys(
        slots=snapshot.key_slots,
        width=snapshot.key_dim,
        live=snapshot.live,
        radius=snapshot.radii,
        rows=torch.tensor([snapshot.rows], device=device),
        widest=torch.tensor([snapshot.widest], device=device),
        key_slot=snapshot.device_key_slot,
    )


def _triton_codes(book: Book, is_linear: bool) -> Any:
    from grace_fast.kernels import code_layout

    state = book.linear if is_linear else book.ordered
    parts = [*state.segments, state.delta]
    return code_layout.device_codes(
        state.projection, parts, state.covered, state.min_radius, book.snapshot.device
    )


def _kept(book: Book, name: str, make: Callable[[], Any]) -> Any:
    if name not in book.kept:
        book.kept[name] = make()
    return book.kept[name]


def wrong(cell: Cell, book: Book, answer: tuple[Tensor | None, ...]) -> tuple[int, int]:
    """Return how many queries of an answer are held against the law, and how many are wrong."""
    expected, told = book.expected(cell.B, cell.asks), Answer(*answer)
    bad = 0
    if told.hit is not None and told.row is not None:
        bad = expected.wrong(told.hit, told.row, told.squared)
    if told.output is not None:
        bad = max(bad, _wrongly_written(expected, told.output))
    return len(expected.at), bad


def _wrongly_written(expected: Expected, output: Tensor) -> int:
    """Return how many outputs do not hold their row's value, or 0 everywhere for a miss."""
    value = torch.where(expected.hit, value_of(expected.row), 0.0)
    here = output[expected.at].float()
    return int((here != value[:, None, None]).flatten(1).any(dim=1).sum())
