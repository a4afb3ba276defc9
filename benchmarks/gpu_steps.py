"""What `make gpu-test`, `gpu-sanitize` and `gpu-bench` run on a GPU machine, step by step.

Each step has a limit, and all of a target end well inside nine minutes, the build with them. What a
target prints goes to the terminal and to OUT/<target>.log as it comes, in few files, and how each
step ended to OUT/steps.txt; a step that fails does not keep the next from being run. Nothing is
installed and nothing is fetched: the Python that runs this runs all of it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

LONGEST_S = 520.0  # of a target, since `make` began: a step that comes late has less time
AGAIN = 75  # what `benchmarks.gpu` returns where it wants to be called again
# Tests that need a GPU, by room and name.
ON_A_GPU = (
    "codebook/test_device_memory",
    "lookup/test_gpu",
    "lookup/test_triton_find",
    "lookup/test_triton_kernels",
    "lookup/test_triton_tiles",
)
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
KERNELS = "dense|indexed|encode|write|scan_keys|decide|collect|filter|round_queries|nearest"
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis")


@dataclass(frozen=True)
class Step:
    """A command with a limit."""

    name: str
    limit_s: float
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def test_steps(out: Path) -> list[Step]:
    """Return the tests: CUDA's, which compile nothing, then Triton's, many at a time."""
    tests = [f"tests/{path}.py" for path in ON_A_GPU]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    many = ["-n", str(min(8, os.cpu_count() or 1))]
    return [
        Step("facts", 20, ["nvidia-smi"]),
        Step("cuda-tests", 150, [*pytest, "-m", "gpu", "-k", "cuda or memory", *tests[:2]]),
        Step("triton-tests", 240, [*pytest, *many, "-m", "gpu", "-k", "not cuda", *tests]),
        Step("look-up-tests", 80, [*pytest, *many, "tests/lookup/test_lookup.py"]),
    ]


def sanitize_steps(out: Path) -> list[Step]:
    """Return the sanitizers and the profiler, over the probe program."""
    probe = [sys.executable, "-m", "benchmarks.gpu_probe"]
    steps = []
    for paths, limit in (("cuda", 60.0), ("triton", 50.0)):
        for tool in TOOLS:
            name = f"{tool}-{paths}"
            checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            # So that every tensor is an allocation of its own.
            own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            steps.append(Step(name, limit, [*checked, *probe, "--paths", paths], own))
    sections = [word for section in SECTIONS for word in ("--section", section)]
    profiled = ["ncu", "--clock-control", "none", "--csv", "--page", "details", *sections]
    profiled += ["--kernel-name", f"regex:{KERNELS}", "--launch-count", "60"]
    profiled += ["--log-file", str(out / "ncu.csv")]
    few = ["--few", "--rows", "20000"]
    # First, since it says most; the sanitizers of CUDA's paths, then those of Triton's.
    return [steps[0], Step("ncu", 75, [*profiled, *probe, *few]), *steps[1:]]


def run(steps: Sequence[Step], out: Path, target: str, until: float) -> dict[str, str]:
    """Run steps of a target one after the other until a moment of `time.time`.

    Return how each ended: "ok", or in words.
    """
    out.mkdir(parents=True, exist_ok=True)
    ended: dict[str, str] = {}
    for step in steps:
        start = time.monotonic()
        with (out / f"{target}.log").open("ab") as log:
            ended[step.name] = _ended(step, log, min(step.limit_s, until - time.time()))
            said = f"{step.name}: {ended[step.name]}, {time.monotonic() - start:.0f} s"
            _tell(f"== {said}\n".encode(), log)
        with (out / "steps.txt").open("a") as file:
            file.write(f"{said}\n")
    return ended


def _tell(line: bytes, log: IO[bytes]) -> None:
    """Write a line to the log and the terminal."""
    log.write(line)
    log.flush()
    sys.stdout.write(line.decode(errors="replace"))
    sys.stdout.flush()


def _ended(step: Step, log: IO[bytes], limit_s: float) -> str:
    if limit_s < 5:
        return "not run: the time is over"
    if shutil.which(step.command[0]) is None:
        return f"{step.command[0]} is not on this machine"
    _tell(f"== {step.name}: {' '.join(step.command)}\n".encode(), log)
    code = limited(step.command, limit_s, log, os.environ | step.environment)
    if code is None:
        return f"stopped after {limit_s:.0f} s"
    return "ok" if code == 0 else f"exit code {code}"


def limited(
    command: Sequence[str], limit_s: float, log: IO[bytes], environment: dict[str, str]
) -> int | None:
    """Run a command in a session of its own, its output here and in a log; None: out of time."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    is_late = threading.Event()

    def stop() -> None:
        is_late.set()
        for number, patience in ((signal.SIGINT, 5.0), (signal.SIGKILL, 0.0)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                _wait(process, patience)

    timer = threading.Timer(limit_s, stop)
    timer.start()
    try:
        assert process.stdout is not None
        with process.stdout as printed:
            for line in printed:
                _tell(line, log)
        code = process.wait()
    finally:
        timer.cancel()
    return None if is_late.is_set() else code


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds or None)
    except subprocess.TimeoutExpired:
        return


def bench(out: Path, until: float, only: str = "") -> int:
    """Run the benchmark until a moment of `time.time`, again where it asks for it or crashed.

    It goes on behind the cell that it ended in. What was measured has its page, also where it was
    stopped.
    """
    while (left := until - time.time()) > 10:
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out)]
        command += ["--budget", f"{left:.0f}", "--only", only]
        ended = run([Step("bench", left + 5, command)], out, "bench", until + 5)["bench"]
        if ended != f"exit code {AGAIN}" and not ended.startswith("exit code -"):
            break
    else:
        ended = "out of time"
    page = [sys.executable, "-m", "benchmarks.gpu_page", str(out)]
    written = run([Step("page", 15, page)], out, "bench", until + 20)["page"]
    return int(ended != "ok" or written != "ok")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 1 where a step failed."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("test", "sanitize", "bench"))
    parser.add_argument("--out", type=Path, required=True, help="folder of logs, lines and pages")
    parser.add_argument("--seconds", type=float, default=540.0, help="of the benchmark in all")
    parser.add_argument("--began", type=float, default=None, help="since when, of `date +%%s`")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    given = parser.parse_args(arguments)
    began = time.time() if given.began is None else given.began
    if given.what == "bench":
        return bench(given.out, began + given.seconds - 25, given.only)
    steps = {"test": test_steps, "sanitize": sanitize_steps}[given.what](given.out)
    ended = run(steps, given.out, given.what, began + LONGEST_S)
    for name, how in ended.items():
        print(f"{name}: {how}")
    return int(any(how != "ok" for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
