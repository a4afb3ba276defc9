"""What a caller's modes of torch may not do to tensors that outlive the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def lasting() -> Iterator[None]:
    """Make ordinary tensors within a `with` block, whatever mode the caller is in.

    What is made under `torch.inference_mode()` can neither be written to nor trained through
    outside of it, and a codebook is both, long after the call that made it.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    # Leaving inference mode lets gradients in again, which nobody asked for.
    with torch.inference_mode(False), torch.no_grad():
        yield
