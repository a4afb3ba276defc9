"""What nvcc makes of the GPU look-up for sm_90a, as a table; no GPU is needed.

    python -m benchmarks.gpu_machine_code     with the repository and its tests on the path

Counts are of instructions in the code, not of those that run. The hottest loop is, of the loops
that hold no other, the one with most of a kernel's work: multiply-adds, or products of code bytes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import sass
from cuda_build import CUDA, ON_HOST, compiled, run

ARCHITECTURE = "90a"
OUT = Path(__file__).parent / "results" / f"gpu-machine-code-sm_{ARCHITECTURE}.md"
DTYPES = {"f": "float", "7Float16": "Float16", "8BFloat16": "BFloat16"}
WORK = {"indexed": r"VABSDIFF4|IDP|IMMA"}  # of a kernel; of the others:
OF_OTHERS = r"FFMA|HFMA2|HMMA|IMMA|HGMMA|IGMMA"
LOADS = ("LDG 128", "LDG 64", "LDG 32", "LDG 16", "LDG 8", "LDS 128", "LDGSTS 128", "UBLKCP")
HEADER = f"""\
# Machine code of the GPU look-up, sm_{ARCHITECTURE}

By `python -m benchmarks.gpu_machine_code`, with {{nvcc}}. Counts of instructions
in the code of each kernel, not of those that run; *shared* is the fixed part of a block's shared
memory in bytes, to which the dense kernel adds queries and keys by their width. The hottest loop is
the innermost one with most multiply-adds, or most products of code bytes: the instructions that
lie in one piece, of these the work, the loads of 16 bytes (global / shared), the copies of 16 bytes
to shared memory, and the shuffles.
"""


def main() -> None:
    """Write the table."""
    used, cubin = compiled(ARCHITECTURE)
    shared = shared_memory(used)
    rows = [("kernel", "registers", "spills", "shared", "instructions", *LOADS, *HOTTEST)]
    for name, kernel in sorted(sass.kernels(cubin).items(), key=lambda each: words(each[0])):
        sizes = (used[name]["registers"], used[name]["spills"], shared[words(name)])
        loads = [kernel.widths[load] or "" for load in LOADS]
        rows.append((words(name), *sizes, len(kernel.code), *loads, *hottest(kernel)))
    (version,) = re.findall(r"release ([\d.]+)", run("nvcc", "--version"))
    text = HEADER.format(nvcc=f"nvcc {version}") + "\n"
    for number, row in enumerate(rows):
        text += f"| {' | '.join(map(str, row))} |\n"
        if number == 0:
            text += "| --- |" + " ---: |" * (len(row) - 1) + "\n"
    OUT.write_text(text)


HOTTEST = ("loop", "work", "LDG / LDS / LDGSTS 128", "shuffles")


def hottest(kernel: sass.Kernel) -> tuple[int | str, ...]:
    """Describe the innermost loop with most work."""
    (kind,) = re.findall(r"\d([a-z]+)_kernel", kernel.name)
    pattern = WORK.get(kind, OF_OTHERS)
    inner = map(sass.stretch, kernel.innermost())
    loops = [loop for loop in inner if kernel.count(pattern, loop)]
    if not loops:
        return "", "", "", ""
    # Of two with as much work, the one that reads shared memory: queries are staged there before.
    loop = max(loops, key=lambda each: [kernel.count(of, each) for of in (pattern, "LDS")])
    wide = [kernel.count(rf"{load}\b.*128", loop) for load in ("LDG", "LDS", "LDGSTS")]
    work, shuffles = kernel.count(pattern, loop), kernel.count("SHFL", loop)
    return len(loop), work, " / ".join(map(str, wide)), shuffles


def words(name: str) -> str:
    """Return a kernel's name as it stands in the source: dense_kernel<BFloat16, 4>."""
    (kernel,) = re.findall(r"\d([a-z]+_kernel)", name)
    dtype = re.findall(r"_kernelI(?:NS0_)?(f|7Float16|8BFloat16)", name)
    of = [DTYPES[each] for each in dtype] + re.findall(r"Li(\d+)E", name)
    return f"{kernel}<{', '.join(of)}>" if of else kernel


def shared_memory(used: dict[str, dict[str, int]]) -> Counter[str]:
    """Return the bytes that kernels always ask for, by a program that prints them."""
    sizes = {"encode_kernel": "EncodeShared"}
    for name in map(words, used):
        if name.startswith("indexed_kernel"):
            sizes[name] = "IndexedShared"
        elif found := re.match(r"dense_kernel<(\w+), (\d+)>", name):
            sizes[name] = f"Dense<{found[1]}, {found[2]}>::Shared"
    prints = [f'std::printf("%zu\\n", sizeof({size}));' for size in sizes.values()]
    source = "\n".join(
        [
            '#include "dense.cuh"\n#include "indexed.cuh"\n#include <cstdio>',
            "using namespace grace_fast::device;\nint main() {",
            *prints,
            "}",
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sizes.cpp").write_text(source)
        made = f"{folder}/sizes"
        run("g++", "-std=c++17", f"-I{ON_HOST}", f"-I{CUDA}", f"{folder}/sizes.cpp", "-o", made)
        printed = subprocess.run([made], capture_output=True, text=True, check=True).stdout
    return Counter(dict(zip(sizes, map(int, printed.split()), strict=True)))


if __name__ == "__main__":
    main()
