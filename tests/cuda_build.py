"""Building the GPU look-up for a host that has no GPU, and reading what nvcc makes of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
ON_HOST = Path(__file__).parent / "cuda_on_host"
NAME = "_cuda_on_host"


_loaded: list[ModuleType] = []  # once a process: its types are registered by their names


def host_module(folder: Path) -> ModuleType:
    """Return the extension with kernels that run on this host (cuda_on_host/on_host.h)."""
    if _loaded:
        return _loaded[0]
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not there to build the kernels for a host")
    pybind11 = pytest.importorskip("pybind11")
    library = folder / f"{NAME}.so"
    includes = (ON_HOST, CUDA, pybind11.get_include(), sysconfig.get_path("include"))
    run(
        compiler,
        *("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"),
        *("-DGRACE_FAST_ON_HOST", f"-DGRACE_FAST_MODULE={NAME}"),
        *(f"-I{include}" for include in includes),
        *(str(ON_HOST / "launch.cpp"), str(CUDA / "bindings.cpp"), "-o", str(library)),
    )
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _loaded.append(module)
    return module


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("nvcc is not there to compile the kernels")
    return found


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="neither CUDA's cuobjdump nor triton's")
        found = triton.knobs.nvidia.cuobjdump.path
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def compiled(architecture: str, folder: Path) -> tuple[dict[str, dict[str, int]], Path]:
    """Return what each kernel uses on an architecture, and its cubin."""
    cubin = folder / f"{architecture}.cubin"
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    log = run(
        nvcc(),
        *("-std=c++17", "-O3", "-gencode", code, "-Xptxas", "-v", "--cubin"),
        *("-o", str(cubin), str(CUDA / "launch.cu")),
    )
    used: dict[str, dict[str, int]] = {}
    name = ""
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
            used[name] = {"spills": 0, "registers": 0}
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            used[name]["spills"] += int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            used[name]["registers"] = int(found[1])
    return used, cubin


class Instruction(NamedTuple):
    """One of machine code."""

    address: int
    name: str
    to: int | None  # the address that a branch goes to


def listing(cubin: Path) -> dict[str, list[Instruction]]:
    """Return the instructions of each kernel, and of what it calls, in their order."""
    listed: dict[str, list[Instruction]] = defaultdict(list)
    kernel = ""
    pattern = r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);"
    for line in run(cuobjdump(), "-sass", str(cubin)).splitlines():
        if found := re.search(r"Function : (\w+)", line):
            kernel = found[1]
        elif found := re.match(pattern, line):
            target = re.search(r"0x([0-9a-f]+)\s*$", found[3]) if found[2] == "BRA" else None
            to = int(target[1], 16) if target else None
            listed[kernel].append(Instruction(int(found[1], 16), found[2], to))
    return listed


def instructions(listed: dict[str, list[Instruction]]) -> dict[str, Counter[str]]:
    """Return how often each instruction occurs in each kernel."""
    return {kernel: Counter(each.name for each in code) for kernel, code in listed.items()}


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Return the loops that have no other loop inside."""
    at = {each.address: i for i, each in enumerate(code)}
    ends = {i: at[each.to] for i, each in enumerate(code) if each.to in at and at[each.to] <= i}
    inner = [
        (first, last)
        for last, first in ends.items()
        if not any(first <= ends[other] and other < last for other in ends)
    ]
    return [code[first : last + 1] for first, last in inner]
