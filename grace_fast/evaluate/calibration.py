"""Layer and epsilon of a task, from its calibration sample: one run, then every epsilon."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_fast import calibrate, semantics
from grace_fast.calibrate import Distances, Labelled, Recommendation
from grace_fast.evaluate import answering
from grace_fast.evaluate.task import Case, Task
from grace_fast.semantics import Rules


@dataclass(frozen=True)
class Calibrated:
    """What calibration found, and what it cost."""

    recommended: Recommendation
    seconds: float
    measured: tuple[Distances, ...]  # one a layer


def run(task: Task, layers: Sequence[str] | None = None, seed: int = 0) -> Calibrated:
    """Measure the sample of a task at each layer and return the best layer and epsilon.

    layers: by default those that the task names.
    """
    start = time.perf_counter()
    measured = distances(task, layers or task.layers)
    rules = Rules(1.0, margin=semantics.EXPAND_MARGIN[torch.float32])
    recommended = calibrate.recommend(measured, rules, budget=task.budget, seed=seed)
    return Calibrated(recommended, time.perf_counter() - start, tuple(measured))


def at_layer(calibrated: Calibrated, task: Task, seed: int = 0) -> Recommendation:
    """Return the best epsilon at the layer of a task, from the distances that were measured."""
    measured = [one for one in calibrated.measured if one.layer == task.layer]
    rules = Rules(1.0, margin=semantics.EXPAND_MARGIN[torch.float32])
    return calibrate.recommend(measured, rules, budget=task.budget, seed=seed)


def report_on(task: Task, plot: Path | None, seed: int, as_json: bool) -> dict[str, Any]:
    """Calibrate a task over its layers, print the trade-off, draw it, and return the figures."""
    from grace_fast.evaluate import report  # which draws, and names what is in here

    calibrated = run(task, seed=seed)
    out = report.console(silent=as_json)
    report.trials(out, calibrated.recommended)
    report.say(
        out, f"In {calibrated.seconds:.1f} s: {report.recommendation(calibrated.recommended)}"
    )
    if plot is not None:
        found = calibrated.recommended
        report.draw_trade_off(found, found.epsilon, plot)
    return {**figures(calibrated.recommended), "seconds": round(calibrated.seconds, 3)}


def figures(found: Recommendation) -> dict[str, Any]:
    """Return a recommendation and every trial as JSON takes it, NaN as null."""
    fields = {name: value for name, value in vars(found).items() if name != "trials"}
    fields["trials"] = [
        {
            "layer": trial.layer,
            "epsilon": trial.epsilon,
            "keys": trial.keys,
            "ERR": trial.err,
            "generality": trial.generality,
            "TRR": trial.trr,
        }
        for trial in found.trials
    ]
    finite: dict[str, Any] = without_nan(fields)
    return finite


def without_nan(value: Any) -> Any:
    """Return figures as JSON knows them: what is not a finite number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return value


def distances(task: Task, layers: Sequence[str]) -> list[Distances]:
    """Run the calibration sample through the model once and measure its distances at each layer."""
    sample = task.calibration
    groups = (sample.edits, sample.paraphrases, sample.unrelated)
    asked = answering.queries_by_layer(task, layers, [case for group in groups for case in group])
    return [
        calibrate.measure(layer, *_labelled(queries, groups)) for layer, queries in asked.items()
    ]


def _labelled(queries: Tensor, groups: Sequence[Sequence[Case]]) -> list[Labelled]:
    """Return the queries of every group, [M, D] in all, with what they are about."""
    parts = torch.split(queries, [len(group) for group in groups])
    return [
        Labelled(part, [case.answer for case in group], [case.about for case in group])
        for part, group in zip(parts, groups, strict=True)
    ]
