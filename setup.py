"""The compiled parts of grace_fast; everything else about the package is in pyproject.toml.

A machine without a C++ compiler still gets a package that is right: the extension is optional, and
`grace_fast.backends.cpu` says once that it is missing.
"""

import os
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# The law forbids fused multiply-adds: -ffp-contract=off must stay. OpenMP is torch's own libgomp at
# run time, so torch's thread setting and ours meet in one pool.
FLAGS = ["-O3", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]

# GRACE_FAST_EMULATE_AVX512=1, for tests on a processor without AVX-512: its kernels through SIMDe.
if os.environ.get("GRACE_FAST_EMULATE_AVX512") == "1":
    FLAGS.append("-DGRACE_FAST_EMULATE_AVX512")

# GRACE_FAST_SANITIZE=1, for `make sanitize`: stop at the first invalid access or undefined step.
SANITIZED = os.environ.get("GRACE_FAST_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
if SANITIZED:
    FLAGS += [*SANITIZERS, "-O1", "-g", "-fno-omit-frame-pointer"]

setup(
    ext_modules=[
        Pybind11Extension(
            "grace_fast._cpu",
            ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            depends=["csrc/lookup.h", *sorted(glob("csrc/cpu/*.h")), *glob("csrc/cpu/*.inl")],
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp", *(SANITIZERS if SANITIZED else [])],
            optional=not SANITIZED,
        )
    ]
)
