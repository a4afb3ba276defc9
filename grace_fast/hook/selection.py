"""Which named codebooks answer: chosen for a `with` block, of one thread or task, or row by row."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum

import torch
from torch import Tensor

from grace_fast.errors import SelectionWarning

Names = str | None | Sequence[str | None]


class Unchosen(Enum):
    """That nothing was chosen in a thread or task, not even None."""

    HERE = "here"


in_use: ContextVar[Names | Unchosen] = ContextVar(
    "grace_fast_codebooks_in_use", default=Unchosen.HERE
)
_blocks: dict[object, tuple[int, Names]] = {}  # the `with` blocks in progress: whose, and of what


_asked = threading.local()  # with `without_choice` once this thread has, as it seems by right


@contextmanager
def using(names: Names) -> Iterator[None]:
    """Let a named codebook answer beside the unnamed ones, within a `with` block.

    names: the `name` of `attach`; or a list with one name (or None) for each row of the batch.
    Other threads and tasks are not concerned: a thread that streams what `generate` says is started
    with `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...)`.
    """
    token, block = in_use.set(names), object()
    _blocks[block] = threading.get_ident(), names
    try:
        yield
    finally:
        _blocks.pop(block, None)
        in_use.reset(token)


def is_idle(name: str | None) -> bool:
    """Tell whether a codebook answers no row at all."""
    names = in_use.get()
    if name is None or names == name:
        return False
    if names is Unchosen.HERE:
        _warn_of_other_thread(name)
        return True
    return names is None or isinstance(names, str) or name not in names


def _warn_of_other_thread(name: str) -> None:
    """Warn where a thread that has chosen nothing first asks while another one uses a codebook."""
    if hasattr(_asked, "without_choice"):
        return
    mine = threading.get_ident()
    for whose, names in list(_blocks.values()):
        is_named = names == name if isinstance(names, str) else names is not None and name in names
        if whose != mine and is_named:
            warnings.warn(
                f"this thread asks without the codebook {name!r}, which another thread uses by "
                "gf.using: a thread does not take over what its starter chose. Start it with "
                "target=contextvars.copy_context().run, or choose in it, by using(None) none",
                SelectionWarning,
                stacklevel=2,
            )
            break
    _asked.without_choice = True


def chosen_rows(name: str | None, batch: int) -> Tensor | None:
    """Return which rows a codebook answers, [B] bool; None for all of them.

    Raises: ValueError where the names given row by row are not those of this batch.
    """
    names = in_use.get()
    if name is None or names is None or isinstance(names, str | Unchosen):
        return None
    if not names or batch % len(names):
        raise ValueError(f"using() was given {len(names)} names, and the batch has {batch} rows")
    chosen = torch.tensor([other == name for other in names], dtype=torch.bool, device="cpu")
    return chosen.repeat_interleave(batch // len(names))  # beams of one prompt lie side by side
