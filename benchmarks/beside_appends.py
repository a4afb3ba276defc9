"""Look-ups beside a writer: `python -m benchmarks.beside_appends`.

Two threads look up without a pause while a third appends rows one by one: to their codebook, or to
a private one of the same keys. Both cost the interpreter's lock the same, so the ratio of the two
is what it costs to follow the edits. They take turns; each look-up is held against what it may say:
row i is found where it was there before the call, and is not where it came after it.
"""

from __future__ import annotations

import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grace_fast as gf
from benchmarks import runner
from benchmarks.timing import at_once, shares
from benchmarks.workloads import SYNTHETIC

VALUE_DIM = 16
EPSILON_RATIO = 0.2  # of the distance to the nearest of a few other keys
READERS = 2


@dataclass
class Reader:
    """One thread's look-ups."""

    taken_us: list[float] = field(default_factory=list)
    wrong: int = 0


@dataclass
class Book:
    """A codebook that is appended to, row by row, from a list of keys."""

    book: gf.Codebook
    keys: Tensor
    epsilon: float

    def append(self, count: int) -> None:
        """Append the next rows one by one."""
        first = self.book.snapshot().rows
        value = torch.zeros(1, VALUE_DIM)
        radius = torch.full((1,), self.epsilon)
        for row in range(first, first + count):
            self.book.append(self.keys[row : row + 1], value, radius)


def make(keys: Tensor, rows: int, epsilon: float) -> Book:
    """Return a codebook of the first rows, ready to be asked."""
    book = gf.Codebook(keys.shape[1], VALUE_DIM)
    book.append(keys[:rows], torch.zeros(rows, VALUE_DIM), torch.full((rows,), epsilon))
    gf.prepare(book)
    return Book(book, keys, epsilon)


def look_up(
    book: gf.Codebook, keys: Tensor, stop: threading.Event, reader: Reader, seed: int
) -> None:
    """Ask for rows there are and rows there may be, until told to stop."""
    find = gf.prepare(book)
    generator = np.random.default_rng(seed)
    singles = keys.split(1)
    while not stop.is_set():
        before = book.snapshot().rows
        # Half of the questions are for rows of the moment, the others for any.
        near = generator.integers(max(0, before - 50), min(len(keys), before + 50))
        row = int(near if generator.integers(2) else generator.integers(len(keys)))
        start = time.perf_counter_ns()
        match = find(singles[row])
        reader.taken_us.append((time.perf_counter_ns() - start) / 1e3)
        after = book.snapshot().rows
        found = int(match.row[0])
        right = found == row if row < before else found in (row, -1) if row < after else found == -1
        reader.wrong += not right


def turn(shared: Book, written: Book, appends: int, readers: list[Reader], seed: int) -> float:
    """Look up in one codebook while another, or the same, is appended to; return the seconds."""
    stop = threading.Event()
    calls = [
        partial(look_up, shared.book, shared.keys, stop, each, seed + number)
        for number, each in enumerate(readers)
    ]
    with at_once(*calls):
        start = time.perf_counter()
        try:
            written.append(appends)
        finally:
            stop.set()
    return time.perf_counter() - start


def run(rows: int, width: int, appends: int, turns: int) -> dict[str, Any]:
    """Return the look-ups' times beside both writers, and how many were wrong."""
    torch.set_num_threads(1)
    made = SYNTHETIC["power-1"](rows + appends, width, torch.Generator().manual_seed(0))
    apart = torch.cdist(made[:256], made[256:4096]).amin(dim=1)
    epsilon = EPSILON_RATIO * float(apart.median())
    shared, private = (make(made, rows, epsilon) for _ in range(2))
    readers = {name: [Reader() for _ in range(READERS)] for name in ("shared", "private")}
    seconds = dict.fromkeys(readers, 0.0)
    for number in range(turns):
        for name, written in (("private", private), ("shared", shared)):
            seconds[name] += turn(shared, written, appends // turns, readers[name], 100 * number)
    figures: dict[str, Any] = {"rows": rows, "width": width, "appends": appends}
    for name, each in readers.items():
        taken = np.concatenate([reader.taken_us for reader in each])
        figures[name] = {
            "look_ups": len(taken),
            "appends_per_s": appends / seconds[name],
            "wrong": sum(reader.wrong for reader in each),
            **shares(taken, 50, 99, 99.9),
            "us_most": float(taken.max()),
        }
    figures["ratio_p99.9"] = figures["shared"]["us_p99.9"] / figures["private"]["us_p99.9"]
    return figures


def markdown(found: runner.Found) -> str:
    """Return the figures as a page."""
    figures = found["figures"]
    heads = ("the writer's codebook", "look-ups", "p50", "p99", "p99.9", "longest")
    rows = []
    for name in ("private", "shared"):
        each = figures[name]
        times = (f"{each[f'us_{key}']:,.0f} us" for key in ("p50", "p99", "p99.9", "most"))
        counts = (f"{each['appends_per_s']:,.0f}", str(each["wrong"]))
        rows.append([name, f"{each['look_ups']:,}", *times, *counts])
    return (
        f"# Look-ups beside appends\n\n{runner.where(found)}. {READERS} threads look up one query "
        f"after the other in {figures['rows']:,} keys (synthetic, variance 1/j, "
        f"D = {figures['width']}, fp32) while a third appends {figures['appends']:,} rows one by "
        f"one.\n\n{runner.table((*heads, 'appends a second', 'wrong'), rows)}\n\n"
        f"p99.9 is {figures['ratio_p99.9']:.2f} times that beside a writer whose codebook nobody "
        "reads.\n"
    )


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=20_000, help="that are there before")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--appends", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=10)


def _measure(given: Namespace) -> Iterator[runner.Found]:
    yield {"figures": run(given.rows, given.width, given.appends, given.turns)}


def verdict(found: runner.Found) -> int:
    """Return 1 where a look-up was wrong."""
    return int(any(found["figures"][name]["wrong"] for name in ("shared", "private")))


main = runner.Program("beside-appends", __doc__, options, _measure, markdown, verdict).main


if __name__ == "__main__":
    sys.exit(main())
