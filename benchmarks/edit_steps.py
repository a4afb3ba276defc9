"""Edits step for step: as many steps of Adam for everybody, with few keys and with many.

Before anything is timed, keys, radii and chosen rows are compared with those of the reference's
rules in exact arithmetic, after each edit of a stream with repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import edit_asking
from benchmarks import edit_contestants as contestants
from benchmarks.edit_contestants import Contestant
from benchmarks.edit_floor import Floor
from benchmarks.edit_models import Item, Studied
from benchmarks.timing import Run, ratio

OURS: tuple[type[Contestant], ...] = (contestants.Native, contestants.DropIn)
OTHERS: tuple[type[Contestant], ...] = (contestants.Authors, contestants.EasyEdit)


@dataclass(frozen=True)
class Row:
    """One editor on one model; a ratio is another's time over its."""

    model: str
    keys: int
    steps: int
    editor: str
    checked: int  # decisions
    wrong: int  # of this editor, against the law
    ms_a_step: float | None = None  # the median edit's, over its steps
    over_authors: float | None = None  # how many times as long the authors' algorithm took
    over_authors_least: float | None = None
    over_authors_most: float | None = None
    over_easyedit: float | None = None
    floor_products_ms: float | None = None  # of a step
    floor_suffix_ms: float | None = None


def measure(
    studied: Studied, keys: int, steps: int, floor: Floor, checked: int, rounds: int, edits: int
) -> list[Row]:
    """Compare the editors on one model; checked: edits compared first; edits: timed a round."""
    given = edit_asking.layer_inputs(studied, keys)
    epsilon = edit_asking.spacing(given) / 4
    exact, *editors = (
        kind(studied, epsilon, given) for kind in (contestants.Exact, *OTHERS, *OURS)
    )
    counts = _wrong(exact, editors, list(islice(repeating(studied.items), checked)))
    rows = [
        Row(str(studied), keys, steps, each.name, checked, wrong)
        for each, wrong in zip(editors, counts, strict=True)
    ]
    if any(row.wrong for row in rows[len(OTHERS) :]):
        return rows
    runs = turns(
        [lambda item, editor=editor: editor.edit(item, steps) for editor in editors],
        studied.items,
        rounds,
        edits,
    )
    products, suffix = floor.of_steps(steps)
    return [
        Row(
            row.model,
            keys,
            steps,
            row.editor,
            checked,
            row.wrong,
            run.p50 / 1e3 / steps,
            *_spread(runs[0], run),
            ratio(runs[1], run).median,
            products / 1e3 / steps,
            suffix / 1e3 / steps,
        )
        for row, run in zip(rows, runs, strict=True)
    ]


def _spread(other: Run, run: Run) -> tuple[float, float, float]:
    found = ratio(other, run)
    return found.median, found.least, found.most


def _wrong(exact: Contestant, editors: Sequence[Contestant], stream: Sequence[Item]) -> list[int]:
    """Return how many decisions of each editor are not the law's."""
    wrong = [0] * len(editors)
    for at, item in enumerate(stream):
        for editor in (exact, *editors):
            torch.manual_seed(at)
            editor.edit(item, 1)
        wrong = [
            before + (not alike(one, exact)) for before, one in zip(wrong, editors, strict=True)
        ]
    return wrong


def alike(one: Contestant, other: Contestant) -> bool:
    """Tell whether two editors have the same codebook, and asked the same row last."""
    (keys, radii, row), (its_keys, its_radii, its_row) = one.decided(), other.decided()
    return (
        torch.equal(keys, its_keys)
        and torch.allclose(radii, its_radii, rtol=1e-6, atol=1e-7)
        and row == its_row
    )


def repeating(items: Sequence[Item]) -> Iterator[Item]:
    """Yield prompts, most of them with one answer; and old ones with their own and with another."""
    known: list[Item] = []
    fresh = cycle(items)
    for at in count():
        if at % 4 == 2:
            item = known[at // 4 % len(known)]
        elif at % 4 == 3:
            item = _answered_by(known[at // 2 % len(known)], lambda labels: labels // 2 + 2)
        else:
            item = next(fresh)
            if at % 8:
                item = _answered_by(item, lambda labels: torch.full_like(labels, 5))
        known.append(item)
        yield item


def _answered_by(item: Item, other: Callable[[Tensor], Tensor]) -> Item:
    labels = item["labels"]
    # What is ignored stays so, and 1, which closes every answer of T5.
    return item | {"labels": torch.where(labels > 1, other(labels), labels)}


def turns(
    calls: Sequence[Callable[[Any], Any]], items: Sequence[Any], rounds: int, edits: int
) -> list[Run]:
    """Time calls on the same items, one right after the other and each first in turn.

    What a busy machine does to one it does to the others; and a time is what the process computed,
    all its threads together, so that waiting for a core does not count.
    """
    stream = cycle(items)
    first = [cpu_us(call, items[0]) for call in calls]
    taken: list[list[Any]] = [[] for _ in calls]
    for _ in range(rounds):
        times: list[list[float]] = [[] for _ in calls]
        for at, item in enumerate(islice(stream, edits)):
            order = [(which + at) % len(calls) for which in range(len(calls))]
            for which in order if at % 2 else reversed(order):
                times[which].append(cpu_us(calls[which], item))
        for which, each_time in enumerate(times):
            taken[which].append(np.array(each_time))
    return [Run(tuple(rounds_of), start) for rounds_of, start in zip(taken, first, strict=True)]


def cpu_us(call: Callable[[Any], Any], item: Any) -> float:
    """Return what one call took of the processor, in microseconds."""
    start = time.process_time_ns()
    call(item)
    return (time.process_time_ns() - start) / 1e3
