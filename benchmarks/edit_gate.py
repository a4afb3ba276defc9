"""What has to hold before an edit is timed: many at once decide as one after the other, and by law.

A stream with repeats, among them old prompts with another answer, is edited one by one and so many
at once, without training. Outcomes, rows, radii and labels must be equal, and those that the law
(`grace_fast.semantics`, on the stored queries) gives. Whether every edit is answered is seen in the
runs that are timed: see `edit_learnt`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from benchmarks import edit_asking
from benchmarks import edit_contestants as contestants
from benchmarks.edit_models import Item, Studied
from benchmarks.edit_steps import repeating
from grace_fast import semantics


@dataclass(frozen=True)
class Row:
    """One way to edit a stream of one model."""

    model: str
    way: str
    checked: int
    outcomes: dict[str, int]  # of edits one after the other
    wrong_by_law: int
    other_than_one_by_one: int


def check(studied: Studied, sizes: Sequence[int], count: int) -> list[Row]:
    """Return a row for edits one by one and for each size of batch."""
    stream = list(islice(repeating(studied.items), count))
    epsilon = edit_asking.spacing(contestants.queries(studied, studied.items))
    alone = _decisions(studied, epsilon, stream, 1)
    rows = []
    for size in (1, *(each for each in sizes if each > 1)):
        made = alone if size == 1 else _decisions(studied, epsilon, stream, size)
        pairs = zip(made.reports, alone.reports, strict=False)  # one that is refused leaves none
        differ = count - sum(_same(one, other) for one, other in pairs)
        way = "one by one" if size == 1 else f"{size} at once"
        outcomes = [report.outcome for report in made.reports]
        counted = {name: outcomes.count(name) for name in dict.fromkeys(outcomes)}
        rows.append(Row(studied.name, way, count, counted, _wrong(made), differ))
    return rows


@dataclass(frozen=True)
class _Made:
    """A stream as it was edited."""

    reports: list[Any]
    rules: semantics.Rules


def _decisions(studied: Studied, epsilon: float, stream: Sequence[Item], size: int) -> _Made:
    grace = contestants.attached(studied, epsilon, iterations=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is learnt in no steps
        if size == 1:
            contestants.one_by_one(grace, stream)
        else:
            contestants.many(grace, stream, size)
    # As the history has them: a report lacks nothing then, whoever made it.
    return _Made(grace.edits(), grace.settings.rules(grace.codebook.dtype))


def _same(one: Any, other: Any) -> bool:
    """Tell whether two edits decided alike, to the bit."""
    return (
        (one.outcome, one.row, one.radius) == (other.outcome, other.row, other.radius)
        and torch.equal(one.label, other.label)
        and torch.equal(one.query, other.query)
    )


def _wrong(made: _Made) -> int:
    """Return how many edits of a stream the law decides otherwise, each with those before it."""
    keys: list[torch.Tensor] = []
    radii: list[float] = []
    labels: list[torch.Tensor] = []
    wrong = 0
    for edit in made.reports:
        near, squared = -1, math.inf
        if keys:
            every = semantics.squared_distances(edit.query[None], torch.stack(keys))[0]
            near = int(every.argmin())
            squared = float(every[near])
        alike = near >= 0 and semantics.same_label(made.rules, edit.label, labels[near])
        decided = semantics.decide(made.rules, squared, radii[near] if keys else 0.0, alike)
        is_new = decided.outcome in ("added", "split")
        row = len(keys) if is_new else near
        if is_new:
            keys.append(edit.query)
            radii.append(0.0)
            labels.append(edit.label)
        if decided.nearest_radius is not None:
            radii[near] = _float32(decided.nearest_radius)
        radii[row], labels[row] = _float32(decided.radius), edit.label
        told = (edit.outcome, edit.row, _float32(edit.radius))
        wrong += told != (decided.outcome, row, radii[row])
    return wrong


def _float32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))
