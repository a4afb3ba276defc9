"""Checks of what a codebook is given: element types, widths, finite numbers, room for numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_NUMBER = 1 << 62  # of ids and counts: what follows them still fits an int64
MAX_COUNTER = 1 << 53  # of versions and edits: exact in every JSON
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_room(what: str, number: int, limit: int) -> None:
    """Raise ValueError where a number is not below the limit of those that are read again."""
    if number >= limit:
        raise ValueError(
            f"the next {what} would be number {number}, and a saved codebook holds numbers below "
            f"{limit}: it can be read, and not be changed any more"
        )


def checked_rows(name: str, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return keys or values [M, width] in a codebook's element type.

    Raises: TypeError for no tensor, ValueError for another width or element type, or for rows that
    are not finite.
    """
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor [M, {width}], got {type(rows).__name__}")
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{name} must be [M, {width}], got {tuple(rows.shape)}")
    # bf16 and fp16 fit fp32 exactly; anything else would store another key than was given.
    if rows.dtype != dtype and not (
        dtype == torch.float32 and rows.dtype in (torch.bfloat16, torch.float16)
    ):
        raise ValueError(f"{name} must be {dtype} like the codebook, got {rows.dtype}")
    # The extremes are not finite where anything is not; of float16 they are had 20 times as fast as
    # a truth for every element.
    if rows.numel() and not torch.stack(torch.aminmax(rows)).isfinite().all():
        row = int((~rows.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")
    return rows.detach().to(dtype)


def checked_radii(radii: Tensor) -> Tensor:
    """Return radii [M] as float32.

    Raises: ValueError for anything but finite floats [M].
    """
    if not isinstance(radii, Tensor):
        given = radii
        radii = torch.as_tensor(given, device="cpu")
        if radii.is_floating_point() and not isinstance(given, np.ndarray):
            # Else Python's numbers are rounded to whatever the process has for its default type.
            radii = torch.as_tensor(given, dtype=torch.float32, device="cpu")
    if radii.ndim != 1 or not radii.dtype.is_floating_point:
        raise ValueError(f"radii must be floats [M], got {radii.dtype} {tuple(radii.shape)}")
    narrow = radii.detach().to(torch.float32)
    if not narrow.isfinite().all():
        row = int((~narrow.isfinite()).nonzero()[0])
        raise ValueError(f"radii must be finite in float32, got {radii[row]} in row {row}")
    return narrow


def checked_label(label: Tensor | None) -> Tensor | None:
    """Return a label as ids [L] int64 of its own memory.

    Raises: ValueError for anything but whole numbers.
    """
    if label is None:
        return None
    ids = label if isinstance(label, Tensor) else torch.as_tensor(label, device="cpu")
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"labels must be whole numbers, got {ids.dtype}")
    return ids.detach().to("cpu", torch.int64, copy=True).reshape(-1)
