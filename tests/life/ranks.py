"""Row shards whose ranks are threads of this process: every rank makes every call, one at a time.

What `torch.distributed` does between processes, minima, sums and gathering, is done here between
threads that wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

import grace_fast as gf
from grace_fast.lookup import sharded
from grace_fast.lookup.sharded import ShardedCodebook
from life import asking
from life.law import Answers
from life.operations import Change, to_draft

if TYPE_CHECKING:
    from life.living import Life

_LONGEST = 60.0  # seconds that a rank waits for the others


class Ranks:
    """Shards of one codebook on some ranks, that follow its changes."""

    def __init__(self, count: int, book: gf.Codebook) -> None:
        self._pool = ThreadPoolExecutor(count)
        self._rank = threading.local()
        self._barrier = threading.Barrier(count)
        self._given: list[Any] = [None] * count
        self.count = count
        self.shards: list[ShardedCodebook] = []
        self.begin_anew(book)

    def begin_anew(self, book: gf.Codebook) -> None:
        """Have every rank split the codebook as it is."""
        self.shards = self._on_all(lambda _: ShardedCodebook.split(book))

    def write(self, changes: list[Change], dtype: torch.dtype) -> None:
        """Make changes in one version."""

        def change(rank: int) -> None:
            with self.shards[rank].writing() as draft:
                for one in changes:
                    to_draft(draft, one, dtype)

        self._on_all(change)

    def ask(self, question: Callable[[ShardedCodebook], Any]) -> list[Any]:
        """Return what each rank is told."""
        return self._on_all(lambda rank: question(self.shards[rank]))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _on_all(self, work: Callable[[int], Any]) -> list[Any]:
        def on(rank: int) -> Any:
            self._rank.number = rank
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with self._distributed():
            return list(self._pool.map(on, range(self.count)))

    @contextmanager
    def _distributed(self) -> Iterator[None]:
        usual = sharded.dist
        sharded.dist = SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: True,
            get_rank=lambda group: self._rank.number,
            get_world_size=lambda group: self.count,
            ReduceOp=usual.ReduceOp,
            all_gather=self._all_gather,
            all_reduce=self._all_reduce,
        )
        try:
            yield
        finally:
            sharded.dist = usual

    def _exchanged(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._given[self._rank.number] = tensor.clone()
        self._barrier.wait(_LONGEST)
        given = list(self._given)
        self._barrier.wait(_LONGEST)
        return given

    def _all_gather(self, into: list[torch.Tensor], mine: torch.Tensor, *_: Any, **__: Any) -> Any:
        for place, given in zip(into, self._exchanged(mine), strict=True):
            place.copy_(given)
        return SimpleNamespace(wait=lambda timeout: None)

    def _all_reduce(self, tensor: torch.Tensor, operation: Any, *_: Any, **__: Any) -> Any:
        stacked = torch.stack(self._exchanged(tensor))
        if operation == torch.distributed.ReduceOp.MIN:
            tensor.copy_(stacked.amin(dim=0))
        else:
            tensor.copy_(stacked.sum(dim=0, dtype=tensor.dtype))
        return SimpleNamespace(wait=lambda timeout: None)


@asking.way("shards", 0.05)
def _shards(life: Life, queries: torch.Tensor, told: Answers) -> None:
    """Row shards that follow the codebook's changes from the first time that they are asked."""
    queries, told = queries[:40], told.some(slice(0, 40))
    if life.ranks is None:
        life.ranks = Ranks(int(life.rng.integers(1, 4)), life.book)
    answers = life.ranks.ask(lambda one: one.find(queries))
    for match in answers:
        wrong = asking.wrong_finds(told, *asking.fields(match))
        life.check("shards", queries, told, wrong)
    within = asking.some_distance(life, told)
    for near in life.ranks.ask(lambda one: one.nearest(queries, within)):
        life.check("shards", queries, told, asking.wrong_nearest(told, within, near))
    output = torch.full((len(queries), 1, life.value_width), 7.5, dtype=life.dtype)
    wanted = output[:, 0].clone()
    hits = torch.from_numpy(told.hit)
    wanted[hits] = torch.from_numpy(life.model.values[told.nearest[told.hit]]).to(life.dtype)
    for found in life.ranks.ask(lambda one: one.replace(output, queries, mode="replace_all")):
        other = (found[:, 0] != wanted).any(dim=1).numpy()
        life.check("shards", queries, told, other)
