"""Measure edits: `python -m benchmarks.edits [--quick] [--models t5 bert ...]`.

Single and batched edits against the authors' algorithm and EasyEdit's, on a T5, a BERT, two GPT-2s
and SmolLM2-135M: step for step, with 10 keys and 10 000, and to the learnt answer; with the floor
beside them: the matrix products of what has to run, bare, and the layers above the edit alone.
What was decided and whether it is answered is compared before a speed is told; where ours is wrong
none is told and the command fails. What the hook adds to a forward call is in `benchmarks.adaptor`.
Results go to `benchmarks/results/`.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.utils import logging

from benchmarks import edit_gate, edit_learnt, edit_page, edit_steps, runner
from benchmarks.edit_floor import Floor
from benchmarks.edit_models import MODELS, NotInstalled, Studied

SIZES = (1, 8, 64)
ON_TWO_THREADS = "smollm2"
OURS = {kind.name for kind in edit_steps.OURS}


@dataclass(frozen=True)
class Plan:
    """How much of one model is measured."""

    edits: int  # to the learnt answer
    compared: int  # of these, made by the references too
    rounds: int = 1
    checked: int = 12  # decisions, of each editor


PLANS = {
    "t5": Plan(64, 64, rounds=3, checked=24),
    "bert": Plan(64, 16, checked=24),
    "gpt2": Plan(64, 16, checked=24),
    "gpt2-small": Plan(16, 4),
    "smollm2": Plan(64, 8),
}
QUICK = Plan(8, 2)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="few edits, and T5 and BERT only")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="by default all")
    parser.add_argument("--parts", nargs="+", choices=("steps", "learnt"), help="by default both")
    parser.add_argument("--keys", type=int, nargs="+", default=[10, 10_000])
    parser.add_argument("--steps", type=int, help="of edits step for step; by default the model's")
    parser.add_argument("--edits", type=int, help="to the learnt answer; by default the model's")
    parser.add_argument("--rounds", type=int, default=3, help="of edits step for step")


def _measure(given: Namespace) -> Iterator[runner.Found]:
    logging.disable_progress_bar()
    found: dict[str, Any] = {"load": f"{os.getloadavg()[0]:.1f}", "skipped": []}
    found |= {"gate": [], "steps": [], "learnt": [], "floors": []}
    names = given.models or (["t5", "bert"] if given.quick else list(MODELS))
    for name in names:
        plan = QUICK if given.quick else PLANS[name]
        count = given.edits or plan.edits
        try:
            studied = MODELS[name](count)
        except NotInstalled as why:
            print(f"{name} is left out: {why}", flush=True)
            found["skipped"].append(f"{name}: {why}")
            yield found
            continue
        for part, row in _rows(given, name, plan, studied):
            print(row, flush=True)
            found[part].append(row if isinstance(row, dict) else asdict(row))
            yield found


def _rows(given: Namespace, name: str, plan: Plan, studied: Studied) -> Iterator[tuple[str, Any]]:
    """Yield the rows of one model, each with the part it belongs to."""
    count = len(studied.items)
    sizes = sorted({size for size in SIZES if size < count} | {min(count, SIZES[-1])})
    gate = edit_gate.check(studied, sizes, 2 * plan.checked)
    for row in gate:
        yield "gate", row
    parts = given.parts or ("steps", "learnt")
    if any(row.wrong_by_law or row.other_than_one_by_one for row in gate):
        return
    around = {max(1, size // 2) for size in sizes} | set(sizes)
    floor = Floor(studied, studied.items, sorted(around), 5)
    yield "floors", {"model": studied.name, "gflop_per_s": floor.gflop_per_s}
    if "steps" in parts:
        steps = given.steps or studied.steps
        for keys in given.keys:
            for each in edit_steps.measure(
                studied, keys, steps, floor, plan.checked, given.rounds, 1
            ):
                yield "steps", each
    if "learnt" in parts:
        compared = min(plan.compared, count)
        for one in edit_learnt.measure(studied, sizes, compared, floor, plan.rounds):
            yield "learnt", one
        if name == ON_TWO_THREADS and (os.cpu_count() or 1) > 1 and not given.quick:
            yield from _on_two_threads(studied, sizes)


def _on_two_threads(studied: Studied, sizes: list[int]) -> Iterator[tuple[str, Any]]:
    """Yield one by one against the largest batch by the clock: two threads compute twice a time."""
    torch.set_num_threads(2)
    try:
        ends = [sizes[0], sizes[-1]]
        floor = Floor(studied, studied.items, [1, sizes[-1] // 2, sizes[-1]], 3, time.perf_counter)
        ways = edit_learnt.measure(studied, ends, 0, floor, 1, time.perf_counter, others=False)
        for row in ways:
            yield "learnt", row
    finally:
        torch.set_num_threads(1)


def is_wrong(found: runner.Found) -> bool:
    """Tell whether anything of ours was decided wrongly, or is not answered."""
    return (
        any(row["wrong_by_law"] or row["other_than_one_by_one"] for row in found["gate"])
        or any(row["wrong"] for row in found["steps"] if row["editor"] in OURS)
        or any(row["wrong"] for row in found["learnt"])
    )


main = runner.Program(
    "edits",
    __doc__,
    options,
    _measure,
    edit_page.markdown,
    lambda found: int(is_wrong(found)),
    runner.RESULTS,
).main


if __name__ == "__main__":
    sys.exit(main())
