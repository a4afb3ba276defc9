"""Layer and epsilon of a task, from its calibration sample.

The sample goes through the model once, and every epsilon is tried on its distances. Whether an
answer can be learnt at a layer is in no distance, so a few edits of the sample are tried at each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.editor import calibrate
from grace_fast.editor.calibrate import Distances, Labelled, Recommendation
from grace_fast.semantics import Rules
from grace_fast.tools.evaluate import answering
from grace_fast.tools.evaluate.editors import GraceEditor
from grace_fast.tools.evaluate.task import Case, Task
from grace_fast.tools.terminal import plain

TRIES = 8  # edits at each layer


@dataclass(frozen=True)
class Calibrated:
    """What calibration found, and what it cost."""

    recommended: Recommendation
    seconds: float
    cpu_seconds: float  # of this process
    measured: tuple[Distances, ...]  # one a layer
    learnt: Mapping[str, float] = field(default_factory=dict)  # the share by layer


def run(
    task: Task, layers: Sequence[str] | None = None, seed: int = 0, tries: int = TRIES
) -> Calibrated:
    """Measure the sample of a task at each layer and return the best layer and epsilon.

    layers: by default those that the task names; tries: edits to make at each layer, so that none
    is recommended where they cannot be learnt; 0: go by the distances alone.
    """
    start, cpu = time.perf_counter(), time.process_time()
    layers = layers or task.layers
    measured = distances(task, layers)
    learnt = {one.layer: learnable(task, one, tries) for one in measured} if tries else {}
    return Calibrated(
        _recommended(measured, task, seed, learnt),
        time.perf_counter() - start,
        time.process_time() - cpu,
        tuple(measured),
        learnt,
    )


def at_layer(calibrated: Calibrated, task: Task, seed: int = 0) -> Recommendation:
    """Return the best epsilon at the layer of a task, from the distances that were measured."""
    measured = [one for one in calibrated.measured if one.layer == task.layer]
    return _recommended(measured, task, seed)


def _recommended(
    measured: Sequence[Distances],
    task: Task,
    seed: int,
    learnt: Mapping[str, float] | None = None,
) -> Recommendation:
    rules = Rules(1.0, margin=semantics.EXPAND_MARGIN[torch.float32])
    coming = len(_prompts(task.edits))
    return calibrate.recommend(measured, rules, None, task.budget, seed, learnt, coming)


def learnable(task: Task, measured: Distances, tries: int) -> float:
    """Return the share of some edits of the sample, spread over it, that a layer can be taught.

    They are made with the smallest epsilon of the grid, so that each has a value to itself.
    """
    edits = task.calibration.edits
    picked = edits[:: max(1, len(edits) // tries)][:tries]
    smallest = calibrate.grid(measured)[0]
    with closing(GraceEditor(replace(task, layer=measured.layer), smallest)) as editor:
        return sum(editor.edit(case) for case in picked) / len(picked)


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
    finite: dict[str, Any] = plain(fields)
    return finite


def distances(task: Task, layers: Sequence[str]) -> list[Distances]:
    """Run the calibration sample through the model once and measure its distances at each layer."""
    sample = task.calibration
    groups = (_prompts(sample.edits), sample.paraphrases, sample.unrelated)
    asked = answering.queries_by_layer(task, layers, [case for group in groups for case in group])
    return [
        calibrate.measure(layer, *_labelled(queries, groups)) for layer, queries in asked.items()
    ]


def _prompts(edits: Sequence[Case]) -> list[Case]:
    return [one for case in edits for one in case.phrasings]


def _labelled(queries: Tensor, groups: Sequence[Sequence[Case]]) -> list[Labelled]:
    """Return the queries of every group, [M, D] in all, with what they are about."""
    parts = torch.split(queries, [len(group) for group in groups])
    return [
        Labelled(part, [case.answer for case in group], [case.about for case in group])
        for part, group in zip(parts, groups, strict=True)
    ]
