"""Modes of an adaptor: what holds within a `with` block, for one thread or for all of them.

The modes of a thread are one stack: they nest, the newest of a kind holds, and each is taken off
as it was put on, however its block ends. A generator that is given up may end its block after
others have begun, in another thread even, so that a mode takes itself off and not the topmost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from grace_fast.codebook import forks
from grace_fast.hook.positions import vectors_at

Mode = TypeVar("Mode")
Other = TypeVar("Other")


@dataclass(frozen=True, eq=False)
class Asked:
    """That the caller names where the queries are, before any rule."""

    where: Tensor | None  # [B]
    length: int | None = None  # T of the tokens that these are counted in


@dataclass
class Observation:
    """What the layer saw: taken while the adaptor watches and writes nothing."""

    hidden: Tensor  # [B, T, D], the layer's input
    output: Tensor  # [B, T, V]
    positions: Tensor  # [B]

    @property
    def queries(self) -> Tensor:
        """[B, D], the input at each row's query position."""
        return vectors_at(self.hidden, self.positions)

    @property
    def outputs(self) -> Tensor:
        """[B, V], the layer's own output at each row's query position."""
        return vectors_at(self.output, self.positions)


class LayerSeen(Exception):
    """The layer was seen, and nothing else of the call is wanted."""


class Observations(list[Observation]):
    """That the layer is watched, and nothing written; what it saw."""

    ends_call = False  # at the layer, by `LayerSeen`


class _Thread(threading.local):
    def __init__(self) -> None:
        self.stack: list[tuple[object, Any]] = []  # modes, each with what is equal to no other


class Modes:
    """The modes of one adaptor."""

    def __init__(self) -> None:
        self.thread = _Thread()  # its `stack` is empty where this thread has none on
        self.count_plain: Callable[[int], None] = lambda _: None  # told how many more are on
        self.disabled: set[tuple[int, object]] = set()  # who want no answer, each with its thread
        forks.guard(self, None, mend=Modes._enable_in_child)

    @contextmanager
    def on(self, mode: Mode) -> Iterator[Mode]:
        """Put a mode on for this thread's calls, within a `with` block."""
        stack, entry = self.thread.stack, (object(), mode)
        self.count_plain(1)
        stack.append(entry)
        try:
            yield mode
        finally:
            stack.remove(entry)  # at once: another thread may collect the generator that holds it
            self.count_plain(-1)

    def newest(self, kind: type[Mode], or_kind: type[Other] | None = None) -> Mode | Other | None:
        """Return this thread's newest mode of a kind, or of either of two."""
        kinds = (kind,) if or_kind is None else (kind, or_kind)
        for _, mode in reversed(self.thread.stack):
            if isinstance(mode, kinds):
                return mode
        return None

    def all(self, kind: type[Mode]) -> list[Mode]:
        """Return this thread's modes of a kind, the newest last."""
        return [mode for _, mode in self.thread.stack if isinstance(mode, kind)]

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Answer nothing, in any thread's calls; those who want it so may come and go at will."""
        mine = (threading.get_ident(), object())
        self.count_plain(1)
        self.disabled.add(mine)
        try:
            yield
        finally:
            self.disabled.discard(mine)
            self.count_plain(-1)

    def _enable_in_child(self, _: bool) -> None:
        """Answer in a forked child where only threads that it has not want no answer."""
        me = threading.get_ident()
        self.disabled = {each for each in self.disabled if each[0] == me}
