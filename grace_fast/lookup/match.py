"""Answers: what `find` and `nearest` return for a batch of queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast.lookup.backends import cpu


class Match:
    """The answer of `find` for a batch of queries; a field is made when it is read.

    On a GPU the distance is computed when it is first read, from the same version of the codebook;
    the queries have to be what they were: copy the answer's distance before you write over them.
    """

    __slots__ = ("_certified", "_fields", "_sums", "answers", "hits")

    def __init__(
        self,
        hits: int | None,
        answers: bytearray | None = None,
        fields: tuple[Tensor, Tensor, Tensor | None] | None = None,
        certified: Tensor | None = None,
        sums: Callable[[], Tensor] | None = None,
    ) -> None:
        self.hits = hits  # how many hit; None where a device has yet to say
        self.answers = answers  # as the compiled back end packs them; None of other back ends
        self._certified = certified
        self._sums = sums  # computes S, where no field has it
        self._fields: dict[torch.dtype, Tensor] | None = None  # those that were read
        if fields is not None:
            hit, row, squared = fields
            self._fields = {torch.bool: hit, torch.int64: row}
            if squared is not None:
                self._fields[torch.float64] = squared

    def _field(self, dtype: torch.dtype) -> Tensor:
        if self._fields is None:
            self._fields = {}
        if dtype not in self._fields:
            made = cpu.unpack(self.answers, dtype) if self._sums is None else self._sums()
            self._fields[dtype] = made
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
        """[B] float64, S of that row in the canonical order; inf where missed.

        Raises: RuntimeError on a GPU where it can no longer be computed: the queries were written
        to, or the look-up was captured into a CUDA graph and the capture has ended.
        """
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
        return None if self.answers is None else cpu.effort(self.answers)

    def __repr__(self) -> str:
        return f"Match(hit={self.hit}, row={self.row}, distance={self.distance})"


@dataclass(frozen=True, slots=True)
class Nearest:
    """The answer of `nearest` for a batch of queries."""

    row: Tensor  # [B] int64, the lowest row on a tie; -1 where no key is within, or no finite query
    distance: Tensor  # [B] float32; inf where row is -1
    squared_distance: Tensor  # [B] float64, S in the canonical order
    certified: Tensor  # [B] bool; False where a FAISS index found the row and proved nothing


class Distributed:
    """A codebook, or a version of one, that answers look-ups itself: its rows are on many ranks."""

    def find(self, queries: Tensor) -> Match:
        """Return what `find` does."""
        raise NotImplementedError

    def nearest(self, queries: Tensor, within: float) -> Nearest:
        """Return what `nearest` does."""
        raise NotImplementedError

    def without(self, backend: object) -> Distributed:
        """Return this; raise ValueError where a back end is asked for."""
        if backend != "auto":
            raise ValueError(f"row shards take no backend, got {backend!r}")
        return self
