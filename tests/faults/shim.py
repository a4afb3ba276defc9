"""The shim that stands between a process and its disk: built once, preloaded, told what to do.

In the process under test, `watch`, `log_to`, `fail`, `mark` and `calls` reach the shim it was
started with; in the process that tests, `environment` says how to start one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "io_shim.c"
LIBRARY = "GRACE_FAST_IO_SHIM"  # in the environment of a process that has it

# As io_shim.c numbers them.
OPEN, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MAKE, MARK, SYNC_REFUSED, LOOK = range(1, 11)
NO_FAULT, FAIL, SHORTEN, EXIT, TEAR = range(5)
EVERY_KIND = 0xFFFFFFFF
GROWING = 1 << OPEN | 1 << WRITE | 1 << MAKE | 1 << RENAME  # what a full disk refuses
SYNCHRONISING = 1 << SYNC
WRITING = 1 << WRITE
EXIT_STATUS = 9  # of a process that ended at a call


def library() -> Path:
    """Return the shim, compiled for this machine; skip the test where nothing compiles it."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler is there to build the shim of file calls")
    source = SOURCE.read_bytes()
    built = Path(tempfile.gettempdir()) / (
        f"grace-fast-io-{os.getuid()}-{hashlib.sha256(source).hexdigest()[:16]}.so"
    )
    if not built.exists():
        partial = built.with_suffix(f".{os.getpid()}")
        flags = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
        subprocess.run([compiler, *flags, "-o", partial, SOURCE, "-ldl", "-lpthread"], check=True)
        partial.replace(built)
    return built


def environment() -> dict[str, str]:
    """Return the environment of a process whose file calls are to be watched."""
    shim = str(library())
    here = {"LD_PRELOAD": shim, LIBRARY: shim, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return os.environ | here | {"PYTHONPATH": str(SOURCE.parent.parent)}


def _doors() -> ctypes.CDLL:
    doors = ctypes.CDLL(os.environ[LIBRARY])
    doors.io_calls.restype = ctypes.c_int64
    doors.io_mark.argtypes = (ctypes.c_int64,)
    doors.io_fail.argtypes = (
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_uint32,
    )
    return doors


def watch(folder: Path | str) -> None:
    """Watch what lies below a folder, from now on, in this process."""
    _doors().io_watch(os.fsencode(os.path.realpath(folder)))


def log_to(path: Path | str | None) -> None:
    """Write every call to a log from now on; to none for None."""
    if _doors().io_log(None if path is None else os.fsencode(path)):
        raise OSError(f"{path} could not be opened for the log")


def fail(how: int, at: int, code: int = 0, after: bool = False, kinds: int = EVERY_KIND) -> None:
    """Let the at-th call of these kinds from now on fail, with those after it where `after`."""
    _doors().io_fail(how, at, code, int(after), kinds)


def calls() -> int:
    """Return how many calls of the kinds of the last `fail` there were since."""
    return int(_doors().io_calls())


def mark(number: int) -> None:
    """Put a mark into the log: what was promised up to here."""
    _doors().io_mark(number)
