"""Inference mode, left for tensors that outlive the call which makes them."""

from __future__ import annotations

from contextlib import ContextDecorator, ExitStack
from typing import Self

import torch


class lasting(ContextDecorator):
    """Make ordinary tensors within a `with` block or a function, whatever mode the caller is in.

    What is made under `torch.inference_mode()` can neither be written to nor trained through
    outside of it, and a codebook is both, long after the call that made it. Nothing is done, and
    nearly no time taken, for other callers.
    """

    _left: ExitStack | None = None

    def _recreate_cm(self) -> Self:
        return type(self)()  # each call of a function has its own

    def __enter__(self) -> None:
        if torch.is_inference_mode_enabled():
            self._left = ExitStack()
            self._left.enter_context(torch.inference_mode(False))
            # Leaving inference mode lets gradients in again, which nobody asked for.
            self._left.enter_context(torch.no_grad())

    def __exit__(self, *_: object) -> None:
        if self._left is not None:
            self._left.close()
