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


def compiled(function, target, arguments: dict[str, object], **options):
    """Return a kernel compiled ahead of time from what its arguments are, by name.

    A string is a type, what says " aligned" and every pointer is a multiple of 16, a NamedTuple
    holds arguments, and anything else is a constant.
    """
    import triton

    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def type_of(argument, path: tuple[int, ...]):
        if isinstance(argument, tuple):
            return type(argument)(*(type_of(one, (*path, i)) for i, one in enumerate(argument)))
        if not isinstance(argument, str):
            constants[path] = argument
            return "constexpr"
        if argument.startswith("*") or argument.endswith(" aligned"):
            attributes[path] = ALIGNED
        return argument.removesuffix(" aligned")

    names = enumerate(function.arg_names)
    signature = {name: type_of(arguments[name], (i,)) for i, name in names}
    source = triton.compiler.ASTSource(function, signature, constants, attributes)
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
