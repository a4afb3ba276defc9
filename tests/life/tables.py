"""The GPU back ends' tables, followed on a host: CUDA's kernels by fibers, Triton interpreted.

CUDA's are asked where the module was built (`use`), Triton's where TRITON_INTERPRET was set before
triton was imported: in a process of its own, for nothing can be compiled afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

import grace_fast as gf
from grace_fast.lookup.backends import cuda, graphs
from life import asking
from life.law import Answers

if TYPE_CHECKING:
    from life.living import Life

_on_host: ModuleType | None = None
MOST_ROWS = 200  # that Triton's interpreter reads in little time
MOST_ELEMENTS = 8_000  # of keys that fibers read in little time


def use(module: ModuleType | None) -> None:
    """Ask CUDA's kernels, built for this host, from now on."""
    global _on_host
    _on_host = module


@contextmanager
def installed() -> Iterator[None]:
    """Let the back end have the kernels of this host, where they were built."""
    usual, cuda._cuda = cuda._cuda, _on_host or cuda._cuda
    try:
        yield
    finally:
        cuda._cuda = usual


def _announced(table: Any) -> Any:
    """Let the kernels check their loads against the memory of a table."""
    assert _on_host is not None
    _on_host.forget()
    for tensor in (table.book, *table.tensors.values()):
        _on_host.announce(tensor.data_ptr(), tensor.untyped_storage().nbytes())
    return table


@asking.way("cuda", 0.03)
def _cuda(life: Life, queries: torch.Tensor, told: Answers) -> None:
    """The table that follows the versions, by keys or by codes, and an old version's."""
    if _on_host is None or life.model.rows * life.model.width > MOST_ELEMENTS:
        return
    queries, told = queries[:4], told.some(slice(0, 4))
    _on_host.set_order(life.seed + life.step, 64)
    table = _announced(cuda.table_of(life.book.snapshot()))
    hit, row, squared = table.find(queries)
    wrong = asking.wrong_finds(told, row.numpy(), squared.numpy(), hit.numpy())
    life.check("cuda", queries, told, wrong)
    _cuda_values(life, table, queries, told)
    _captured(life, queries, told)
    if life.kept and life.rng.random() < 0.3:
        _, snapshot, model = life.kept[int(life.rng.integers(len(life.kept)))]
        if snapshot.key_slots.data_ptr() == life.book.snapshot().key_slots.data_ptr():
            before = model.ask(queries.double().numpy())
            hit, row, squared = _announced(cuda.table_of(snapshot)).find(queries)
            wrong = asking.wrong_finds(before, row.numpy(), squared.numpy(), hit.numpy())
            life.check("cuda, old version", queries, before, wrong)


def _cuda_values(life: Life, table: Any, queries: torch.Tensor, told: Answers) -> None:
    """The values that are written by the same launch."""
    output = torch.full((len(queries), 2, life.value_width), 7.5, dtype=life.dtype)
    wanted = output.clone()
    hits = torch.from_numpy(told.hit)
    values = torch.from_numpy(life.model.values[told.nearest[told.hit]]).to(life.dtype)
    wanted[hits] = values[:, None]
    table.replace_(output, queries, mode="replace_all")
    life.check("cuda", queries, told, (output != wanted).flatten(1).any(dim=1).numpy())


def _captured(life: Life, queries: torch.Tensor, told: Answers) -> None:
    """What a captured graph holds: one address, at which every later version is described."""
    if life.captured is None:
        if life.rng.random() < 0.5:
            return
        cuda.keep_for_graphs(life.book)
        listener = graphs.listening(life.book.snapshot(), cuda.NAME)
        life.captured = (listener.lookup(0), listener)
    _announced(life.captured[1].table)
    batch = len(queries)
    hit, row = torch.zeros(batch, dtype=torch.bool), torch.zeros(batch, dtype=torch.int64)
    squared = torch.zeros(batch, dtype=torch.float64)
    life.captured[0].find(
        *cuda.asked(queries), hit.data_ptr(), row.data_ptr(), squared.data_ptr(), 0
    )
    wrong = asking.wrong_finds(told, row.numpy(), squared.numpy(), hit.numpy())
    life.check("cuda, captured", queries, told, wrong)


@asking.way("triton", 0.5)
def _triton(life: Life, queries: torch.Tensor, told: Answers) -> None:
    """Triton's tables, in its interpreter: a tenth of a second for a question."""
    if not os.environ.get("TRITON_INTERPRET") or life.model.rows > MOST_ROWS:
        return
    queries, told = queries[:3], told.some(slice(0, 3))
    found = gf.find(queries, life.book, backend="triton")
    life.check("triton", queries, told, asking.wrong_finds(told, *asking.fields(found)))
    if life.rng.random() < 0.2:
        near = gf.nearest(queries, life.book, backend="triton")
        life.check("triton", queries, told, asking.wrong_nearest(told, float("inf"), near))
