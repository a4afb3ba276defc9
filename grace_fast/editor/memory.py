"""Memory of a batch of edits: how many fit, and whether it has ended."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from grace_fast.editor.batches import Batch, decoder_length, prompts_of

MOST = 64  # edits at once, where there is room for more: later ones wait for their reports
SHARE = 0.5  # of the memory that is free
SAVED = 3  # numbers that autograd and the loss keep for each that a module returns
_FREE = Path("/proc/meminfo")


def has_ended(error: BaseException) -> bool:
    """Tell whether an error says that there is no memory left: of torch on a host by its words."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "allocate memory" in str(error)


def edits_at_once(model: nn.Module, batch: Batch) -> int:
    """Return how many edits like one may be trained at once, from 1 to `MOST`.

    By what modules return for a token: it is kept for the backward call. That of the layers below
    is counted, too, though it is not kept: too few is slower, too many ends the memory.
    """
    free = _free(next(model.parameters()).device)
    if free is None:
        return MOST
    tokens = prompts_of(batch).shape[1] + (decoder_length(batch) or 0)
    widths = sum(max(each.shape) for each in model.parameters() if each.ndim > 1)
    needed = 4 * SAVED * tokens * max(widths, 1)
    return max(1, min(MOST, int(SHARE * free / needed)))


def _free(device: torch.device) -> int | None:
    """Return the bytes of memory that are free, None where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = _FREE.read_text().splitlines()
        told = next(line for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(told.split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
