"""Section on epsilon: what another one would do, asked of stored edits that are held out in turn.

Asked with its own edits, a codebook answers all of them with any epsilon. So the edits are dealt
into folds: each fold's queries are looked up among the edits of the others, which go through the
edit table with every epsilon of a grid. Distances are measured once (`calibrate`).

    own       the query falls into a ball of its own answer: the edit generalises
    another   it falls into a ball of another answer: that edit disturbs it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch

from grace_fast.editor import calibrate
from grace_fast.editor.calibrate import Distances, Labelled
from grace_fast.semantics import Rules
from grace_fast.tools.report.charts import Chart, Line, Scale
from grace_fast.tools.report.reading import Reading, spread

EDITS = 500  # at most, that are dealt
FEWEST = 10
FOLDS = 5
STEPS = 15


@dataclass(frozen=True)
class Tried:
    """What one epsilon does to held-out edits, in shares."""

    epsilon: float
    own: float
    another: float
    is_current: bool


def trade_off_of(reading: Reading) -> SimpleNamespace | None:
    """Try epsilons on held-out edits; None of fewer than ten edits, or of one query only."""
    numbers = sorted(reading.history.edits)
    if len(numbers) < FEWEST:
        return None
    edits = [reading.history.edits[numbers[at]] for at in spread(len(numbers), EDITS)]
    labels = [reading.asks_for(edit.label) for edit in edits]
    queries = torch.stack([edit.query for edit in edits])
    sample = Labelled(queries, labels, range(len(edits)))
    nothing = Labelled(queries[:0], (), ())
    measured = calibrate.measure(reading.saved.settings.layer, sample, nothing, nothing)
    epsilon = reading.rules.epsilon
    try:
        grid = calibrate.grid(measured, STEPS)
    except ValueError:  # one query only: no epsilon tells anything apart
        return None
    folds = _folds(measured)
    tried = [_try(folds, reading.rules, each, epsilon) for each in sorted({*grid, epsilon})]
    counts = Counter(labels)
    return SimpleNamespace(
        chart=_chart(tried),
        tried=tried,
        current=next(each for each in tried if each.is_current),
        asked=len(edits),
        edits=len(numbers),
        folds=FOLDS,
        # The share of edits with another one of the same answer.
        reachable=sum(count for count in counts.values() if count > 1) / len(edits),
    )


def _folds(measured: Distances) -> list[Distances]:
    """Return, for every fold, the distances of its edits to those of the others."""
    every = np.arange(len(measured.edits.labels))
    folds = []
    for fold in range(FOLDS):
        held, kept = every[every % FOLDS == fold], every[every % FOLDS != fold]
        asked = _picked(measured.edits, held)
        order = np.concatenate([kept, held, held])  # asked twice: for its own answer, for another
        to_edits = measured.to_edits[np.ix_(order, kept)]
        edits = _picked(measured.edits, kept)
        folds.append(Distances(measured.layer, edits, asked, asked, to_edits))
    return folds


def _picked(sample: Labelled, places: np.typing.NDArray[np.int64]) -> Labelled:
    chosen: list[Hashable] = [sample.labels[place] for place in places]
    return Labelled(sample.queries[places], chosen, places.tolist())


def _try(folds: list[Distances], rules: Rules, epsilon: float, current: float) -> Tried:
    trials = [calibrate.attempt(fold, replace(rules, epsilon=epsilon)) for fold in folds]
    own = np.concatenate([trial.general for trial in trials])
    undisturbed = np.concatenate([trial.undisturbed for trial in trials])
    return Tried(epsilon, float(own.mean()), 1 - float(undisturbed.mean()), epsilon == current)


def _chart(tried: list[Tried]) -> Chart:
    epsilons = [each.epsilon for each in tried]
    highest = max(max(each.own, each.another) for each in tried)
    percent = [(each.epsilon, 100 * each.own, 100 * each.another) for each in tried]
    lines = (
        Line("own answer", "good", tuple((x, own) for x, own, _ in percent)),
        Line("another answer", "bad", tuple((x, another) for x, _, another in percent)),
    )
    y = Scale.linear(0, max(1.0, 105 * highest), "held-out edits", unit=" %")
    return Chart(Scale.log(epsilons[0], epsilons[-1], "epsilon"), y, lines=lines)
