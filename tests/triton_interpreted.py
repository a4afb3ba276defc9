"""Programs in which Triton's kernels are interpreted.

TRITON_INTERPRET has to be set before triton is imported, and nothing can be compiled afterwards:
each is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_fast.lookup.backends import triton as backend
from grace_fast.lookup.backends.workload import Workload


def skip_unless_importable() -> None:
    reason = backend.why_not(Workload("cuda", torch.float32, 1, 1, 1))
    if reason is not None:
        pytest.skip(f"triton: {reason}")


def skip_unless_interpreted() -> None:
    skip_unless_importable()
    numpy_version = tuple(int(part) for part in version("numpy").split(".")[:2])
    if version("triton").startswith("3.6.") and numpy_version >= (2, 4):
        pytest.skip("triton 3.6 cannot interpret with numpy 2.4 or later")


def skip_where_a_gpu_runs_the_same() -> None:
    if torch.cuda.is_available():
        pytest.skip("the same cases run on the GPU")


def run(program: str | Path, *arguments: str | Path, interprets: bool = True) -> None:
    """Run a program of the tests, and show what it printed if it fails."""
    done = subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1" if interprets else "0",
            "PYTHONPATH": str(Path(__file__).parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Where a module's cases run, as parameters of a fixture.
PLACES = ("interpreted", pytest.param("gpu", marks=pytest.mark.gpu))


def answers_on(place: str, module: Any, folder: Path) -> Any:
    """Return a module's answers on a device, or what it saves of them as a program, interpreted."""
    skip_unless_importable()
    if place == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return module.answers("cuda")
    skip_where_a_gpu_runs_the_same()
    skip_unless_interpreted()
    path = folder / "answers.pt"
    run(module.__file__, path)
    return torch.load(path)
