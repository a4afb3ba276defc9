"""The compiled host extension, where it was built."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch

cpu: Any = None  # grace_fast._cpu, or None
missing = ""  # then why
try:
    cpu = importlib.import_module("grace_fast._cpu")
    cpu.use_tensors(torch.Tensor)
    cpu.instruction_set()  # chosen now: nothing of it is in the making when a process is forked
except ImportError as error:
    missing = f"the extension grace_fast._cpu was not built ({error})"
    logging.getLogger("grace_fast").warning("%s: look-ups on the host run in torch", missing)
