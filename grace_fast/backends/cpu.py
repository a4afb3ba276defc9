"""The compiled host path: the canonical sum, abandoned as soon as it passes the best key so far.

A partial sum of squares never shrinks, rounding included, so a key whose partial sum is above the
best S cannot win: the shortcut is exact. The sum itself is `csrc/cpu/portable.cpp`.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.backends.workload import Workload
from grace_fast.codebook import Snapshot

_cpu: Any = None
try:
    _cpu = importlib.import_module("grace_fast._cpu")
except ImportError as error:
    _missing = f"the extension grace_fast._cpu was not built ({error})"
    logging.getLogger("grace_fast").warning("%s: look-ups on the host run in torch", _missing)

NAME = "cpu"


def why_not(workload: Workload) -> str | None:
    """Return why the compiled host path cannot take a call, or None."""
    if _cpu is None:
        return _missing
    if workload.device != "cpu":
        return f"keys are on {workload.device}, not on the host"
    return None


def nearest(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """Return the nearest live row and its S of queries [B, D]; see `backends`."""
    row, squared = semantics.no_row(len(queries), queries.device)
    if len(snapshot) and len(queries):
        wide = queries.to(torch.float32).contiguous()  # exact: bf16 and fp16 fit fp32
        slots = snapshot.key_slot if snapshot.counts.key_moves else None
        _cpu.nearest(
            queries=wide.data_ptr(),
            keys=snapshot.key_slots.data_ptr(),
            key_slot=slots.data_ptr() if slots is not None else 0,
            live=snapshot.live.data_ptr(),
            row=row.data_ptr(),
            squared=squared.data_ptr(),
            batch=len(queries),
            rows=snapshot.rows,
            width=snapshot.key_dim,
            dtype=str(snapshot.dtype).removeprefix("torch."),
        )
    return row, squared
