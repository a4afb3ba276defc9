"""Edits to the learnt answer: greedily right, with the loss below the stop; one by one and at once.

Everybody starts with the same value, learns at the same rate and stops by the same rule. The
authors' algorithm, which never stops, is timed as it is, too. Every edit of ours has to be answered
in the end, and to be where it is after one by one; else no speed is told.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import edit_asking
from benchmarks import edit_contestants as contestants
from benchmarks.edit_floor import Clock, Floor
from benchmarks.edit_models import Item, Studied

STEPS = 100  # of the reference
ONE_BY_ONE = "grace.edit, one by one"
NO_STOP = "authors, who do not stop"


@dataclass(frozen=True)
class Row:
    """One way to make edits; a ratio is another's seconds an edit over its."""

    model: str
    way: str
    threads: int
    edits: int
    answered: int  # greedily, each alone, after all of them
    wrong: int  # of ours: not answered, or decided otherwise than one by one
    steps: float  # on average
    s_an_edit: float | None = None
    over_authors: float | None = None
    over_authors_100: float | None = None  # who do not stop
    over_easyedit: float | None = None
    over_one_by_one: float | None = None
    floor_products_s: float | None = None  # of an edit
    floor_suffix_s: float | None = None


@dataclass(frozen=True)
class _Run:
    seconds: list[float]  # of each edit; of edits at once their share
    steps: list[int]
    answered: list[bool]
    reports: list[Any]

    def first(self, count: int) -> float:
        """Return the seconds of an edit, of the first so many."""
        return float(np.mean(self.seconds[:count]))


def measure(
    studied: Studied,
    sizes: Sequence[int],
    compared: int,
    floor: Floor,
    rounds: int,
    clock: Clock = time.process_time,
    others: bool = True,
) -> Iterator[Row]:
    """Yield a row for each way; compared: how many of the edits the references make, too.

    A reference's seconds are compared with those of ours for the same edits, and from there with
    those of all edits by what they took one by one.
    """
    items, epsilon = studied.items, _apart(studied)
    alone = _median(lambda: _ours(studied, epsilon, items, 1, clock), rounds)
    over: dict[str, float] = {}
    threads = torch.get_num_threads()
    if others:
        for name, kind, stops in (
            ("authors", contestants.Authors, True),
            ("EasyEdit", contestants.EasyEdit, True),
            (NO_STOP, contestants.Authors, False),
        ):
            count = compared if stops else max(1, compared // 8)
            run = _theirs(kind(studied, epsilon), items[:count], stops, clock)
            # All their edits take the same steps where nobody stops.
            mine = alone.first(count if stops else len(items))
            over[name] = run.first(count) / mine
            share = (studied.name, name, threads, count, sum(run.answered), 0)
            yield Row(*share, float(np.mean(run.steps)), run.first(count))
    for size in sizes:
        run = alone
        if size > 1:
            run = _median(lambda size=size: _ours(studied, epsilon, items, size, clock), rounds)
        way = ONE_BY_ONE if size == 1 else f"grace.edit_many, {size} at once"
        wrong = _wrong(run, alone)
        share = (studied.name, way, threads, len(items), sum(run.answered), wrong)
        if wrong:
            yield Row(*share, float(np.mean(run.steps)))
            continue
        faster = alone.first(len(items)) / run.first(len(items))
        products, suffix = floor.of_edits(run.steps, size)
        yield Row(
            *share,
            float(np.mean(run.steps)),
            run.first(len(items)),
            *(over[name] * faster if others else None for name in ("authors", NO_STOP, "EasyEdit")),
            faster,
            products / 1e6 / len(items),
            suffix / 1e6 / len(items),
        )


def _apart(studied: Studied) -> float:
    """Return a radius with which every item has a row of its own, far above what cdist errs by."""
    asked = contestants.queries(studied, studied.items)
    return edit_asking.spacing(asked, 0.0) / 4


def _median(make: Callable[[], _Run], rounds: int) -> _Run:
    """Return the run with the median time of some."""
    runs = sorted((make() for _ in range(rounds)), key=lambda run: sum(run.seconds))
    return runs[len(runs) // 2]


def _ours(studied: Studied, epsilon: float, items: Sequence[Item], size: int, clock: Clock) -> _Run:
    grace = contestants.attached(studied, epsilon)
    seconds, reports = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not learnt is counted
        for at in range(0, len(items), size):
            part, start = items[at : at + size], clock()
            made = (
                contestants.one_by_one(grace, part)
                if size == 1
                else contestants.many(grace, part, size)
            )
            seconds += [(clock() - start) / len(part)] * len(part)
            reports += made
    answered = edit_asking.answered(studied, grace.model, items)
    grace.unload()
    return _Run(seconds, [getattr(each, "steps", 0) for each in reports], answered, reports)


def _theirs(editor: contestants.Authors, items: Sequence[Item], stops: bool, clock: Clock) -> _Run:
    seconds, steps = [], []
    for item in items:
        start = clock()
        steps.append(editor.learn(item, STEPS, stops))
        seconds.append(clock() - start)
    answered = contestants.answered_by_reference(editor, items)
    return _Run(seconds, steps, answered, [])


def _wrong(run: _Run, alone: _Run) -> int:
    """Return how many edits are not answered, or decided otherwise than one by one."""
    pairs = zip(run.reports, alone.reports, run.answered, strict=True)
    return sum(
        not (is_answered and _placed(one) == _placed(other)) for one, other, is_answered in pairs
    )


def _placed(report: Any) -> tuple[Any, ...]:
    return tuple(getattr(report, name, None) for name in ("outcome", "row", "radius"))
