"""The compiled parts of grace_fast; everything else about the package is in pyproject.toml.

A machine without a C++ compiler still gets a package that is right: the extensions are optional,
and the back ends say that theirs is missing (`grace_fast.lookup.backends.cpu` once, in the log).
"""

import os
import re
import shutil
import subprocess
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CompileError

# The law forbids fused multiply-adds: -ffp-contract=off must stay. OpenMP is torch's own libgomp at
# run time, so torch's thread setting and ours meet in one pool.
FLAGS = ["-O3", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]

# GRACE_FAST_EMULATE_AVX512=1, for tests on a processor without AVX-512: its kernels through SIMDe.
if os.environ.get("GRACE_FAST_EMULATE_AVX512") == "1":
    FLAGS += ["-DGRACE_FAST_EMULATE_AVX512", "-Itests"]

# GRACE_FAST_SANITIZE=1, for `make sanitize`: stop at the first invalid access or undefined step.
SANITIZED = os.environ.get("GRACE_FAST_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
if SANITIZED:
    FLAGS += [*SANITIZERS, "-O1", "-g", "-fno-omit-frame-pointer"]

# GRACE_FAST_CUDA: `auto` builds the GPU look-up where nvcc is found, `1` insists, `0` does not.
CUDA_WANTED = os.environ.get("GRACE_FAST_CUDA", "auto")
CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
ARCHITECTURES = ("80", "89", "90a", "100", "120")
KERNELS = "csrc/cuda/launch.cu"
NEWEST = "120"  # whose PTX later GPUs compile for themselves


def find_nvcc() -> str | None:
    """Return the CUDA compiler to build with, if one is wanted and there."""
    if CUDA_WANTED not in ("auto", "1", "0"):
        raise SystemExit(f"GRACE_FAST_CUDA must be auto, 1 or 0, got {CUDA_WANTED!r}")
    if CUDA_WANTED == "0":
        return None
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin")
    if found is None and CUDA_WANTED == "1":
        raise SystemExit(f"GRACE_FAST_CUDA=1, but nvcc is neither on PATH nor in {CUDA_HOME}/bin")
    return found


def toolkit_libraries(nvcc: str) -> list[str]:
    """Return the folders with CUDA's libraries; nvcc, which may be a script, says where it is."""
    asked = subprocess.run([nvcc, "--dryrun", KERNELS], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", asked.stderr, re.MULTILINE)
    home = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    folders = [home / "lib64", home / "lib", *home.glob("targets/x86_64-linux/lib")]
    return [str(folder) for folder in folders if folder.is_dir()]


class BuildWithCuda(build_ext):
    """Compiles .cu files with nvcc first, and links what it makes with CUDA's static runtime."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension; see the class."""
        kernels = [source for source in ext.sources if source.endswith(".cu")]
        if kernels:
            ext.sources = [source for source in ext.sources if source not in kernels]
            ext.extra_objects = [*ext.extra_objects, *map(self._compiled, kernels)]
        super().build_extension(ext)

    def _compiled(self, source: str) -> str:
        made = Path(self.build_temp, source).with_suffix(".o")
        made.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        codes.append(f"-gencode=arch=compute_{NEWEST},code=compute_{NEWEST}")
        options = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command = [NVCC, *options, *codes, "-c", source, "-o", str(made)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"nvcc could not compile {source}") from error
        return str(made)


NVCC = find_nvcc()
extensions = [
    Pybind11Extension(
        "grace_fast._cpu",
        ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=[*glob("csrc/*.h"), *sorted(glob("csrc/cpu/*.h")), *glob("csrc/cpu/*.inl")],
        cxx_std=17,
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp", *(SANITIZERS if SANITIZED else [])],
        optional=not SANITIZED,
    )
]
if NVCC is not None:
    extensions.append(
        Pybind11Extension(
            "grace_fast._cuda",
            ["csrc/cuda/bindings.cpp", KERNELS],
            depends=["csrc/python.h", *glob("csrc/cuda/*.h"), *sorted(glob("csrc/cuda/*.cuh"))],
            cxx_std=17,
            extra_compile_args=["-O2", "-fvisibility=hidden", "-Wall", "-Wextra"],
            library_dirs=toolkit_libraries(NVCC),
            # Static: no CUDA library is needed to import it, and a missing driver is an error code.
            libraries=["cudart_static", "dl", "rt", "pthread"],
            optional=CUDA_WANTED != "1",
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildWithCuda})
