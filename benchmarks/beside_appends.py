"""Look-ups beside a writer: `python -m benchmarks.beside_appends`.

Two threads look up without a pause while a third appends rows one by one: to their codebook, or to
a private one of the same keys. Both cost the interpreter's lock the same, so the ratio of the two
is what it costs to follow the edits. They take turns; each look-up is held against what it may say:
row i is found where it was there before the call, and is not where it came after it.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grace_fast as gf
from benchmarks import machine
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
    threads = [
        threading.Thread(target=look_up, args=(shared.book, shared.keys, stop, each, seed + number))
        for number, each in enumerate(readers)
    ]
    for thread in threads:
        thread.start()
    start = time.perf_counter()
    try:
        written.append(appends)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
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
            **{f"us_p{share:g}": float(np.percentile(taken, share)) for share in (50, 99, 99.9)},
            "us_most": float(taken.max()),
        }
    figures["ratio_p99.9"] = figures["shared"]["us_p99.9"] / figures["private"]["us_p99.9"]
    return figures


def markdown(found: dict[str, Any]) -> str:
    """Return the figures as a page."""
    where, figures = found["machine"], found["figures"]
    lines = [
        "# Look-ups beside appends",
        "",
        f"`{found['command']}` on {found['date']}: {where['cpu']}, {where['cores']} cores, commit "
        f"{where['commit']}, Python {where['python']}. {READERS} threads look up one query after "
        f"the other in {figures['rows']:,} keys (synthetic, variance 1/j, D = {figures['width']}, "
        f"fp32) while a third appends {figures['appends']:,} rows one by one.",
        "",
        "| the writer's codebook | look-ups | p50 | p99 | p99.9 | longest | appends a second "
        "| wrong |",
        "| --- |" + " ---: |" * 7,
    ]
    for name in ("private", "shared"):
        each = figures[name]
        times = (f"{each[f'us_{key}']:,.0f} us" for key in ("p50", "p99", "p99.9", "most"))
        cells = [name, f"{each['look_ups']:,}", *times, f"{each['appends_per_s']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} | {each['wrong']} |")
    ratio = figures["ratio_p99.9"]
    lines += ["", f"p99.9 is {ratio:.2f} times that beside a writer whose codebook nobody reads."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code, 1 where a look-up was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="that are there before")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--appends", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path, help="a folder that gets the result as two files")
    given = parser.parse_args(arguments)
    described = machine.describe(1)
    figures = run(given.rows, given.width, given.appends, given.turns)
    words = sys.argv[1:] if arguments is None else arguments
    found = machine.heading(described, "benchmarks.beside_appends", words) | {"figures": figures}
    print(markdown(found), end="")
    if given.out:
        machine.keep(given.out, "beside-appends", found, markdown(found))
    return 1 if figures["shared"]["wrong"] or figures["private"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
