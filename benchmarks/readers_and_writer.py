"""Eight readers and one editor of a codebook: `python -m benchmarks.readers_and_writer`.

Every key is drawn for one number, and the value that belongs to it is that number, over and over;
the two rows of a pair have one radius. The editor moves keys to new numbers, with their values and
both radii of the pair, appends pairs and removes them. A look-up that hits has to give the number
that was asked for, from a row whose partner has its radius; anything else is a mixed read. It has
to hit where the row had that number before the call and after it.

The readers look up as often without the editor, in turns: what it costs them is the ratio of p99.
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

VALUE_DIM = 16
READERS = 8
PER_EDIT = 4  # look-ups
ALLOWED = 3.0  # times the p99 without the editor


@dataclass
class Reader:
    """One thread's look-ups."""

    taken_us: list[float] = field(default_factory=list)
    mixed: int = 0  # key, value or radius of different versions
    lost: int = 0  # a row that was there all the time was not found

    @property
    def wrong(self) -> int:
        """The look-ups that the gate refuses."""
        return self.mixed + self.lost


class Edited:
    """A codebook of pairs, and what the editor has said of it before and after it was so."""

    def __init__(self, rows: int, width: int, numbers: int) -> None:
        generator = torch.Generator().manual_seed(0)
        # Far apart by chance, as variance 1/j leaves enough dimensions; the radius is well inside.
        scale = torch.arange(1, width + 1).rsqrt()
        self.keys = torch.randn(numbers, width, generator=generator) * scale
        apart = torch.cdist(self.keys[:256], self.keys[256:4096]).amin(dim=1)
        self.epsilon = 0.1 * float(apart.min())
        self.book = gf.Codebook(width, VALUE_DIM)
        self.book.append(
            self.keys[:rows], values_of(range(rows)), torch.full((rows,), self.epsilon)
        )
        self.used = rows  # numbers
        self.rows = rows
        self.begun = list(range(rows))  # by row: the number it may have by now
        self.done = list(range(rows))  # by row: the number it has at least
        gf.prepare(self.book)

    def edit(self, random: np.random.Generator) -> None:
        """Give one row another number, and its pair another radius, in one version."""
        row = int(random.integers(self.rows))
        number, self.used = self.used, self.used + 1
        radius = self.epsilon * float(random.uniform(0.5, 1.0))
        self.begun[row] = number
        with self.book.writing() as draft:
            draft.set_key(row, self.keys[number])
            draft.set_radius(row, radius)
            draft.set_radius(row ^ 1, radius)
            draft.set_value(row, values_of([number])[0])
        self.done[row] = number

    def pass_by(self) -> None:
        """Append a pair, and remove the two again."""
        pair = torch.stack([self.keys[-1], self.keys[-2]]) * 3
        ids = self.book.append(pair, values_of([-1, -1]), torch.full((2,), self.epsilon))
        with self.book.writing():
            for key_id in ids.tolist():
                self.book.remove(key_id)

    def look_up(self, reader: Reader, random: np.random.Generator) -> None:
        """Ask for the number that a row has, or had a moment ago."""
        row = int(random.integers(self.rows))
        number = self.done[row]
        query = self.keys[number : number + 1]
        start = time.perf_counter_ns()
        snapshot = self.book.snapshot()
        match = gf.find(query, snapshot)
        values = snapshot.values_of(match.row)
        reader.taken_us.append((time.perf_counter_ns() - start) / 1e3)
        still_there = self.begun[row] == number
        if bool(match.hit[0]):
            found = int(match.row[0])
            radii = snapshot.radii_of(torch.tensor([found, found ^ 1]))
            whole = found == row and bool((values == number).all()) and bool(radii[0] == radii[1])
            reader.mixed += not (whole and torch.equal(snapshot.row(found).key, query[0]))
        else:
            reader.lost += still_there


def values_of(numbers: Any) -> Tensor:
    """Return the values [n, V] that belong to numbers."""
    return torch.tensor(list(numbers), dtype=torch.float32)[:, None].repeat(1, VALUE_DIM)


def turn(edited: Edited, readers: list[Reader], count: int, with_editor: bool, seed: int) -> int:
    """Look up `count` times in each thread, beside the editor or not; return the edits made."""
    stop, edits = threading.Event(), 0

    def read(reader: Reader, number: int) -> None:
        random = np.random.default_rng(seed + number)
        for _ in range(count):
            edited.look_up(reader, random)

    def write() -> None:
        nonlocal edits
        random = np.random.default_rng(seed + len(readers))
        before = sum(len(reader.taken_us) for reader in readers)
        while not stop.is_set():
            if edits * PER_EDIT >= sum(len(reader.taken_us) for reader in readers) - before:
                time.sleep(1e-4)  # else it would be done before the readers are
                continue
            edited.edit(random)
            edits += 1
            if edits % 16 == 0:
                edited.pass_by()

    with at_once(*[write] * with_editor):
        with at_once(*(partial(read, each, at) for at, each in enumerate(readers))):
            pass
        stop.set()
    return edits


def run(rows: int, width: int, look_ups: int, turns: int) -> dict[str, Any]:
    """Return the readers' times with the editor and without, and how many look-ups were wrong."""
    torch.set_num_threads(1)
    edited = Edited(rows, width, numbers=rows + look_ups // PER_EDIT + turns)
    readers = {name: [Reader() for _ in range(READERS)] for name in ("alone", "beside the editor")}
    edits, each_turn = 0, look_ups // turns // READERS
    for number in range(turns):
        for name, each in readers.items():
            beside = name != "alone"
            edits += turn(edited, each, each_turn, beside, seed=100 * number + 50 * beside)
    figures: dict[str, Any] = {"rows": rows, "width": width, "edits": edits, "readers": READERS}
    for name, each in readers.items():
        taken = np.concatenate([reader.taken_us for reader in each])
        figures[name] = {
            "look_ups": len(taken),
            "mixed": sum(reader.mixed for reader in each),
            "lost": sum(reader.lost for reader in each),
            **shares(taken, 50, 99, 99.9),
            "us_most": float(taken.max()),
        }
    beside, alone = figures["beside the editor"], figures["alone"]
    figures["ratio_p99"] = beside["us_p99"] / alone["us_p99"]
    figures["wrong"] = sum(figures[name]["mixed"] + figures[name]["lost"] for name in readers)
    return figures


def markdown(found: runner.Found) -> str:
    """Return the figures as a page; no speed where a look-up was wrong."""
    figures = found["figures"]
    page = (
        f"# Readers and an editor\n\n{runner.where(found)}. {figures['readers']} threads look up "
        f"one query after the other in {figures['rows']:,} keys (synthetic, variance 1/j, "
        f"D = {figures['width']}, fp32), alone and beside an editor that made "
        f"{figures['edits']:,} edits, one for every {PER_EDIT} look-ups.\n\n"
    )
    if figures["wrong"]:
        return f"{page}{figures['wrong']} look-ups were wrong: no times.\n"
    heads = ("readers", "look-ups", "mixed reads", "rows lost", "p50", "p99", "p99.9", "longest")
    rows = []
    for name in ("alone", "beside the editor"):
        each = figures[name]
        times = (f"{each[f'us_{key}']:,.0f} us" for key in ("p50", "p99", "p99.9", "most"))
        counts = (f"{each[key]:,}" for key in ("look_ups", "mixed", "lost"))
        rows.append([name, *counts, *times])
    ratio = f"p99 is {figures['ratio_p99']:.2f} times that of the same readers alone"
    return f"{page}{runner.table(heads, rows)}\n\n{ratio} ({ALLOWED:g} allowed).\n"


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=20_000, help="an even number, from 4096")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--look-ups", type=int, default=1_000_000, help="with the editor")
    parser.add_argument("--turns", type=int, default=5)


def _measure(given: Namespace) -> Iterator[runner.Found]:
    yield {"figures": run(given.rows, given.width, given.look_ups, given.turns)}


def verdict(found: runner.Found) -> int:
    """Return 1 for a wrong look-up, 2 where readers wait long."""
    figures = found["figures"]
    return 1 if figures["wrong"] else 2 * (figures["ratio_p99"] > ALLOWED)


main = runner.Program("readers-and-writer", __doc__, options, _measure, markdown, verdict).main


if __name__ == "__main__":
    sys.exit(main())
