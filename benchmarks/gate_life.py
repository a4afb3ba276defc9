"""The lifecycle gate: codebooks that live, asked in every way, each answer compared with the law.

`python -m benchmarks.gate_life --decisions 20000000`, with `tests` on the path too. A life is drawn
from its number: element type, width, kind of keys, thresholds, instruction set, how the work behind
look-ups goes, then operations and questions (tests/life). A life that is not in free threads is
lived again by `--first NUMBER --lives 1`. Triton's tables are asked in a process of their own,
where its kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cuda_build import host_module
from life import asking, tables
from life.background import MODES
from life.dropin import DropIn
from life.edited import Edited
from life.living import Life, Plan
from life.operations import FAMILIES

from benchmarks import runner

STEPS = 60  # of a life
MOST_EXAMPLES = 10
BATCHES = (1, 2, 8, 40, 160, 400, 1200, 3000)
OLD = 2  # of six numbers, and of ten
APART = 1_000_000  # numbers of the first lives of two processes
TRITON_SHARE = 0.04  # of the seconds


class Gate:
    """What was counted, of lives by their numbers."""

    def __init__(self, ways: list[str]) -> None:
        self.ways = ways
        self.counts: Counter[str] = Counter()  # decisions, by way
        self.operations: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()  # decisions, by how background work went
        self.stages: Counter[str] = Counter()  # steps of builds that a life did between others
        self.lives = self.wrong = 0
        self.examples: list[str] = []

    def live(self, number: int, seconds: float = 1e9) -> None:
        """Live one life, for about so many seconds at most; what is wrong ends it."""
        one: Any
        if number % 20 == 7:
            one, live, mode = Edited(number), lambda: one.live(40), ""
            mode = one.background.mode
        elif number % 20 == 13:
            one, live, mode = DropIn(number), lambda: one.live(40), "threads"
        else:
            one = Life(number, self.plan(number, seconds))
            live, mode = one.live, one.background.mode
        try:
            live()
        except Exception as error:  # an answer that is not the law's, or none at all
            self.wrong += 1
            told = str(error) if isinstance(error, AssertionError) else traceback.format_exc(-3)
            self.examples = [*self.examples, f"life {number}: {told}"][:MOST_EXAMPLES]
            print(f"life {number}: {told}", file=sys.stderr, flush=True)
        self.lives += 1
        self.counts += one.counts
        self.modes[mode] += sum(one.counts.values())
        self.operations += getattr(one, "done", Counter())
        self.stages += Counter(getattr(getattr(one, "background", None), "done", {}))

    def plan(self, number: int, seconds: float) -> Plan:
        """Return what a life is drawn from: one in six is mostly about old versions."""
        plan = Plan(ways=self.ways, batches=BATCHES, steps=STEPS, seconds=seconds)
        if self.ways == ["triton"]:
            plan.most_rows = tables.MOST_ROWS
        if number % 6 == OLD:
            plan.operations = FAMILIES["old"]
            if (
                number % 10 == OLD and not plan.most_rows
            ):  # soon with pages that old versions do not have
                plan.first_rows, plan.most_rows, plan.steps = 4095, 4500, STEPS // 6
        return plan

    @property
    def decisions(self) -> int:
        return sum(self.counts.values())

    def summary(self) -> dict[str, Any]:
        return {
            "decisions": self.decisions,
            "wrong": self.wrong,
            "lives": self.lives,
            "ways": dict(self.counts.most_common()),
            "background": {mode: self.modes[mode] for mode in MODES},
            "operations": dict(sorted(self.operations.items())),
            "steps": dict(self.stages),
            "examples": self.examples,
        }

    def take(self, other: dict[str, Any]) -> None:
        """Add what another process found."""
        self.lives, self.wrong = self.lives + other["lives"], self.wrong + other["wrong"]
        self.counts += Counter(other["ways"])
        self.modes += Counter(other["background"])
        self.operations += Counter(other["operations"])
        self.stages += Counter(other["steps"])
        self.examples = [*self.examples, *other["examples"]][:MOST_EXAMPLES]


def run(gate: Gate, first: int, lives: float, decisions: float, seconds: float) -> None:
    """Live lives from a number on, until there were enough of something."""
    from tqdm import tqdm

    start, number = time.monotonic(), first
    with tqdm(unit="decision", unit_scale=True, disable=None) as bar:
        while (
            number - first < lives
            and gate.decisions < decisions
            and time.monotonic() - start < seconds
        ):
            gate.live(number, start + seconds - time.monotonic())
            number += 1
            bar.update(gate.decisions - bar.n)


def begun(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """Begin the gate in a process of its own; it writes what it found as JSON."""
    command = [sys.executable, "-P", "-m", "benchmarks.gate_life", "--json", *words]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a process found.

    Raises: RuntimeError where it ended without saying that.
    """
    told, _ = process.communicate()
    if not told:
        raise RuntimeError(f"lives in another process ended with {process.returncode}, untold")
    return json.loads(told)  # type: ignore[no-any-return]


def markdown(found: dict[str, Any]) -> str:
    """Return a summary as a page."""
    page = (
        f"# Lifecycle gate\n\n{runner.where(found)}; {found['seconds']:,} s.\n\n"
        f"**{found['wrong']} wrong lives; {found['decisions']:,} decisions in {found['lives']:,} "
        "lives**, each compared with the law (float64, in the canonical order; row, S by its bits, "
        f"hit, and values where they are written), {found['per_second']:,} a second.\n\n"
    )
    lines = []
    for title, name in (
        ("asked by", "ways"),
        ("background work", "background"),
        ("operation, times done", "operations"),
        ("step of a build done between operations, times", "steps"),
    ):
        rows = [[key, f"{number:,}"] for key, number in found[name].items()]
        lines += [runner.table((title, ""), rows), ""]
    lines += [f"- {example}" for example in found["examples"]]
    return page + "\n".join(lines).rstrip() + "\n"


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--decisions", type=float, default=float("inf"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--lives", type=float, default=float("inf"))
    parser.add_argument("--first", type=int, default=0, help="the number of the first life")
    parser.add_argument("--only", default="", help="ways to ask whose name holds these words")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="without Triton's lives")


def _measure(given: Namespace) -> Iterator[runner.Found]:
    limits = (given.decisions, given.seconds, given.lives)
    if min(limits) == float("inf"):
        given.decisions = 1_000_000
    gate = Gate([name for name in asking.WAYS if given.only in name])
    start = time.perf_counter()
    others = []
    for number in range(1, given.processes):
        given.decisions -= (part := given.decisions / (given.processes - number + 1))
        limits = ("--decisions", str(part), "--seconds", str(given.seconds), "--alone")
        first = str(given.first + number * APART)
        others.append(begun([*limits, "--first", first, "--only", given.only]))
    if "cuda" in gate.ways:
        tables.use(host_module())
    run(gate, given.first, given.lives, given.decisions, given.seconds)
    for process in others:
        gate.take(ended(process))
    seconds = time.perf_counter() - start
    if not (given.only or given.alone) and given.lives == float("inf"):
        limit = str(max(10.0, TRITON_SHARE * seconds))
        gate.take(ended(begun(["--only", "triton", "--seconds", limit], TRITON_INTERPRET="1")))
    yield {
        "seconds": round(time.perf_counter() - start),
        "per_second": round(gate.decisions / max(seconds, 1e-9)),
        **gate.summary(),
    }


main = runner.Program(
    "gate-life", __doc__, options, _measure, markdown, lambda found: int(found["wrong"] > 0)
).main


if __name__ == "__main__":
    sys.exit(main())
