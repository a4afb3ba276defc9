"""Building the GPU look-up for a host that has no GPU, and reading what nvcc makes of it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
ON_HOST = Path(__file__).parent / "cuda_on_host"
NAME = "_cuda_on_host"


FLAGS = (
    *(
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-fPIC",
        "-fvisibility=hidden",
        "-U_FORTIFY_SOURCE",
    ),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DGRACE_FAST_ON_HOST", f"-DGRACE_FAST_MODULE={NAME}"),
)


@cache  # once a process: its types are registered by their names
def host_module() -> ModuleType:
    """Return the extension with kernels that run on this host (cuda_on_host/on_host.h)."""
    return loaded(host_library())


def loaded(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def host_library(*kernels: Path) -> Path:
    """Build it, with the files of these folders in the place of those of csrc/cuda."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not there to build the kernels for a host")
    pybind11 = pytest.importorskip("pybind11")
    folders = (*kernels, ON_HOST, CUDA, pybind11.get_include(), sysconfig.get_path("include"))
    command = (compiler, *FLAGS, *(f"-I{folder}" for folder in folders))
    read = [path for folder in (*kernels, ON_HOST, CUDA) for path in sorted(folder.iterdir())]
    headers = [path for path in read if path.suffix == ".h"]

    def make(folder: Path) -> None:
        sources = [
            CUDA / "bindings.cpp",
            *(p for p in read if p.suffix == ".cpp" and p.parent != CUDA),
        ]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(object_of, sources))
        run(compiler, "-shared", *map(str, objects), "-o", str(folder / f"{NAME}.so"))

    def object_of(source: Path) -> Path:
        # The bindings know nothing of the kernels.
        needed = [source, *(headers if source.parent == CUDA else read)]
        made = kept(
            command, needed, lambda to: run(*command, "-c", str(source), "-o", f"{to}/it.o")
        )
        return made / "it.o"

    return kept(command, read, make) / f"{NAME}.so"


def kept(command: tuple[str, ...], sources: Iterable[Path], make: Callable[[Path], object]) -> Path:
    """Return the folder that `make` fills; again in a later run if nothing has changed."""
    digest = hashlib.sha256(repr(command).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = ROOT / "build" / "cuda_tests" / digest.hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            made = Path(unfinished) / "made"
            made.mkdir()
            make(made)
            with suppress(OSError):  # another process was as quick
                made.rename(folder)
    return folder


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("nvcc is not there to compile the kernels")
    return found


def tool(name: str) -> str:
    """Return where cuobjdump or nvdisasm is."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton", reason=f"neither CUDA's {name} nor triton's")
        found = getattr(triton.knobs.nvidia, name).path
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@cache
def compiled(architecture: str) -> tuple[dict[str, dict[str, int]], Path]:
    """Return what each kernel uses on an architecture, and its cubin, with lines of the source."""
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = (nvcc(), *("-std=c++17", "-O3", "-lineinfo", "-gencode", code, "-Xptxas", "-v"))

    def make(folder: Path) -> None:
        source, cubin = str(CUDA / "launch.cu"), str(folder / "it.cubin")
        (folder / "log").write_text(run(*command, "--cubin", "-o", cubin, source))

    sources = [path for path in sorted(CUDA.iterdir()) if path.suffix in (".h", ".cuh", ".cu")]
    made = kept(command, sources, make)
    used: dict[str, dict[str, int]] = {}
    name = ""
    for line in (made / "log").read_text().splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
            used[name] = {"spills": 0, "registers": 0}
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            used[name]["spills"] += int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            used[name]["registers"] = int(found[1])
    return used, made / "it.cubin"


def disassembled(cubin: Path) -> str:
    """Return the machine code with labels, and before an instruction the lines that it is of."""
    return run(tool("nvdisasm"), "-gi", "-c", str(cubin))


@cache
def instructions(cubin: Path) -> dict[str, Counter[str]]:
    """Return how often each instruction occurs in each kernel."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    name = ""
    for line in run(tool("cuobjdump"), "-sass", str(cubin)).splitlines():
        if found := re.search(r"Function : (\w+)", line):
            name = found[1]
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            counted[name][found[1]] += 1
    return counted
