"""What is compiled for an eager look-up is what a captured one launches."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from grace_fast.lookup.backends import triton as backend
from grace_fast.lookup.backends.workload import Workload

PROGRAM = Path(__file__).parents[1] / "triton_launches.py"


def test_no_kernel_is_compiled_or_loaded_while_a_graph_is_captured():
    """A launch of a kind that no eager look-up had would be, and the driver refuses that."""
    reason = backend.why_not(Workload("cuda", torch.float32, 1, 1, 1))
    if reason is not None:
        pytest.skip(f"triton: {reason}")
    numpy_version = tuple(int(part) for part in version("numpy").split(".")[:2])
    if version("triton").startswith("3.6.") and numpy_version >= (2, 4):
        pytest.skip("triton 3.6 cannot interpret with numpy 2.4 or later")
    run = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(PROGRAM.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
