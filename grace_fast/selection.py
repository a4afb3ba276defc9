"""Which named codebooks answer: chosen for a `with` block, of one thread or task, or row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Names = str | None | Sequence[str | None]

_in_use: ContextVar[Names] = ContextVar("grace_fast_codebooks_in_use", default=None)


@contextmanager
def using(names: Names) -> Iterator[None]:
    """Let a named codebook answer beside the unnamed ones, within a `with` block.

    names: the `name` of `attach`; or a list with one name (or None) for each row of the batch.
    Other threads and tasks are not concerned.
    """
    token = _in_use.set(names)
    try:
        yield
    finally:
        _in_use.reset(token)


def is_idle(name: str | None) -> bool:
    """Tell whether a codebook answers no row at all."""
    names = _in_use.get()
    if name is None or names == name:
        return False
    return names is None or isinstance(names, str) or name not in names


def chosen_rows(name: str | None, batch: int) -> Tensor | None:
    """Return which rows a codebook answers, [B] bool; None for all of them.

    Raises: ValueError where the names given row by row are not those of this batch.
    """
    names = _in_use.get()
    if name is None or names is None or isinstance(names, str):
        return None
    if not names or batch % len(names):
        raise ValueError(f"using() was given {len(names)} names, and the batch has {batch} rows")
    chosen = torch.tensor([other == name for other in names], dtype=torch.bool, device="cpu")
    return chosen.repeat_interleave(batch // len(names))  # beams of one prompt lie side by side
