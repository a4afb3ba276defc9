"""Kernels compiled ahead of time, without a GPU, and what their machine code holds."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

NVIDIA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
TARGETS = [*NVIDIA, "gfx942"]
ALIGNED = [["tt.divisibility", 16]]


def target_of(name: str):
    from triton.backends.compiler import GPUTarget

    if name == "gfx942":
        return GPUTarget("hip", "gfx942", 64)
    return GPUTarget("cuda", NVIDIA[name], 32)


def compiled(function, target, types: dict[str, str], constants: dict[str, object], **options):
    """Return a kernel compiled ahead of time; pointers and what says so are multiples of 16."""
    import triton

    names = function.arg_names
    signature = {name: types.get(name, "constexpr").removesuffix(" aligned") for name in names}
    aligned = [name for name in names if types.get(name, "").startswith("*")]
    aligned += [name for name in names if types.get(name, "").endswith(" aligned")]
    source = triton.compiler.ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): ALIGNED for name in aligned},
    )
    return triton.compile(source, target=target, options=options)


def dumped(binary: bytes, what: str, folder: Path) -> str:
    """Return what cuobjdump, which comes with triton, says of a cubin."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    command = [triton.knobs.nvidia.cuobjdump.path, what, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(binary: bytes, folder: Path) -> dict[str, int]:
    usage = dumped(binary, "-res-usage", folder)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


def instructions(text: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, text))
