"""A call in a few words: what the choice of a back end goes by, testable without the hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Verb = Literal["find", "nearest"]


@dataclass(frozen=True)
class Workload:
    """What `choose` knows of a call."""

    device: str  # "cpu" or "cuda"
    dtype: torch.dtype  # of the keys
    batch: int  # B
    rows: int  # N
    key_dim: int  # D
    verb: Verb = "find"
    index: int | None = None  # of the device, where there are several; None: the current one
