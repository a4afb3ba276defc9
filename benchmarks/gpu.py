"""Measure the GPU look-ups against their peers: `make gpu-bench`, or `python -m benchmarks.gpu`.

Cells (`gpu_cells`) are taken in their order until the time is over; what fits no more is passed
over for what does. Each is held against the law before and after it is timed, and one line of JSON
is written to `gpu.jsonl` and flushed as soon as it is measured. A run that finds lines goes on
behind them. Where the device is lost, or one cell takes too long, the exit code is 75: the same
command goes on with the next cell.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    gpu_calls,
    gpu_cells,
    gpu_machine,
    gpu_page,
    gpu_peers,
    gpu_prediction,
    machine,
)
from benchmarks.gpu_cells import Cell
from benchmarks.gpu_clock import Clock, Timing
from benchmarks.gpu_problems import Books

LINES, BEGUN = "gpu.jsonl", "gpu.begun"
AGAIN = 75  # exit code: the same command goes on
LAST_S = 6.0  # kept for the page
# Seconds of a cell, of making its codebook and its codes: estimates, for what still fits.
CELL_S, COMPILING_S = 2.0, 15.0
CALLS = 20 * 7 + 10  # of a long one: five replays of twenty, and what comes before
BOOK_S = {100_000: 6.0, gpu_cells.MILLION: 25.0, 10 * gpu_cells.MILLION: 45.0}
LARGEST_S = 150.0


class Run:
    """One run: the lines there are, the time that is left, the codebooks."""

    def __init__(
        self,
        folder: Path,
        budget: float,
        books: Books,
        clock: Any,
        now: Callable[[], float] = time.monotonic,
        watched: Callable[[float], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._folder, self._books, self._clock, self._now = folder, books, clock, now
        self._watched = watched or given_up_after
        self._start = now()
        self._deadline = self._start + budget - LAST_S
        self._compiled: set[tuple[str, str]] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = read_lines(folder)
        self.read_bandwidth = next(
            (line.get("gigabytes_s") for line in self.lines if line.get("path") == "bytes read"),
            None,
        )

    def write(self, line: dict[str, Any]) -> None:
        """Keep a line, on the disk as well."""
        self.lines.append(line)
        with (self._folder / LINES).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def measure(self, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
        """Measure what is left and fits, in its order; yield the line of each."""
        died = self._died()
        done = {line["key"] for line in self.lines if "key" in line}
        for cell in cells:
            if cell.key in done:
                continue
            if cell.key == died:
                self.write(self._failed(cell, "the process ended, or was ended, in this cell"))
                continue
            if self._now() + self.seconds(cell) > self._deadline:
                continue
            (self._folder / BEGUN).write_text(cell.key)
            left = self._deadline - self._now()
            with self._watched(min(30 + 3 * self.seconds(cell), max(5.0, left))):
                line = self.line(cell)
            self.write(line)
            (self._folder / BEGUN).unlink()
            yield line

    def seconds(self, cell: Cell) -> float:
        """Return about how long a cell takes, its codebook with it where that is not there."""
        known = (cell.path, cell.dtype) in self._compiled or cell.path in gpu_cells.MACHINE
        needed = CELL_S if known else CELL_S + COMPILING_S
        needed += CALLS * gpu_prediction.predicted(cell).us / 1e6
        if cell.N and not self._books.has(cell):
            needed += next((s for rows, s in BOOK_S.items() if rows >= cell.N), LARGEST_S)
        return needed

    def line(self, cell: Cell) -> dict[str, Any]:
        """Return the line of a cell; what fails is a result, and not the end of the run."""
        try:
            if cell.path in gpu_cells.MACHINE:
                found = gpu_machine.measured(cell, self._clock)
            else:
                found = self._looked_up(cell)
        except Exception as error:
            said = str(error).splitlines()[0][:200] if str(error) else ""
            return self._failed(cell, f"{type(error).__name__}: {said}")
        self._compiled.add((cell.path, cell.dtype))
        if cell.path == "bytes read":
            self.read_bandwidth = found["gigabytes_s"]
        return self._head(cell) | found

    def _looked_up(self, cell: Cell) -> dict[str, Any]:
        book = self._books.of(cell)
        contestants = gpu_calls if cell.is_ours else gpu_peers
        call = contestants.call_of(cell, book)
        checked, wrong = gpu_calls.wrong(cell, book, call())
        if cell.is_ours and wrong:
            return {"checked": checked, "wrong": wrong, "note": "wrong: no speed is reported"}
        timing, note = self._timed(cell, call)
        after = gpu_calls.wrong(cell, book, timing.answer)[1]
        found = {"checked": checked, "wrong": max(wrong, after), "note": note}
        if cell.is_ours and after:
            return found | {"note": "wrong when replayed: no speed is reported"}
        if cell.path in gpu_peers.CAPTURED or cell.is_ours:
            found |= self._of_read(cell, timing)
        return found | timing.figures

    def _timed(self, cell: Cell, call: gpu_calls.Call) -> tuple[Timing, str]:
        is_swept = cell.caches == gpu_cells.SWEPT
        if cell.path in (gpu_cells.CUVS, gpu_cells.FAISS):
            return self._clock.eager(call, is_swept), "called from Python: it cannot be captured"
        if cell.asks == gpu_cells.BESIDE:
            return gpu_machine.beside_a_layer(cell, call, self._clock)
        times = gpu_cells.ALIASED.get(cell.N)
        note = f"keys aliased: {times} rows share each" if times else ""
        return self._clock.time(call, is_swept), note

    def _of_read(self, cell: Cell, timing: Timing) -> dict[str, Any]:
        """Return the bytes that a path has to read, and their share of the measured bandwidth."""
        size = least_bytes(cell)
        if size is None or self.read_bandwidth is None or cell.asks == gpu_cells.BESIDE:
            return {}
        rate = size / timing.figures["us_p50"] / 1e3
        return {"bytes": size, "gigabytes_s": rate, "of_read": rate / self.read_bandwidth}

    def _died(self) -> str | None:
        path = self._folder / BEGUN
        return path.read_text() if path.exists() else None

    def _head(self, cell: Cell) -> dict[str, Any]:
        return {"key": cell.key, **asdict(cell), "at_s": round(self._now() - self._start, 2)}

    def _failed(self, cell: Cell, note: str) -> dict[str, Any]:
        return self._head(cell) | {"note": f"failed: {note}"}


def least_bytes(cell: Cell) -> int | None:
    """Return the fewest bytes that a path has to read; None where that depends on the keys."""
    if cell.path in gpu_cells.BOXES or cell.path == gpu_cells.AUTO:
        return None
    if cell.path in gpu_cells.LINEAR:
        return 16 * cell.N
    if cell.path == gpu_cells.CODE_TILES:
        return 36 * cell.N  # folded codes and half a norm
    return cell.key_bytes


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a folder; one that was broken off in writing is cut away."""
    path = folder / LINES
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


@contextmanager
def given_up_after(seconds: float) -> Iterator[None]:
    """End the process with AGAIN unless it comes back: a kernel that hangs cannot be stopped."""
    timer = threading.Timer(seconds, partial(os._exit, AGAIN))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_lost() -> bool:
    """Tell whether the device answers no more, as after an access to memory that is not there."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, the page included")
    parser.add_argument("--out", type=Path, required=True, help="folder of the lines and the page")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA device: nothing was measured")
        return 2
    run = Run(given.out, given.budget, Books(), Clock())
    if not run.lines:
        run.write(head(arguments))
    lost = False
    measuring = run.measure([cell for cell in gpu_cells.cells() if given.only in cell.key])
    for line in measuring:
        print(gpu_page.in_a_line(line), flush=True)
        lost = "failed" in line.get("note", "") and is_lost()
        if lost:
            break
    gpu_page.write(given.out, run.lines)
    if lost:
        return AGAIN
    return int(any(line.get("wrong") for line in run.lines if line.get("path") in gpu_cells.OURS))


def head(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Return the first line: device, versions, command and day."""
    found = machine.heading(machine.describe(torch.get_num_threads()), "benchmarks.gpu", arguments)
    properties = torch.cuda.get_device_properties(0)
    found["machine"] |= {
        "device": torch.cuda.get_device_name(),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "packages": {name: version(name) for name in ("torch", "triton", "numpy")},
    }
    return found


if __name__ == "__main__":
    sys.exit(main())
