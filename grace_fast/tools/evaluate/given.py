"""Calibration of a model and a sample that a user gives: files in, layers and epsilon out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grace_fast.tools.evaluate import records
from grace_fast.tools.evaluate.task import Case, Sample, Task, layers_like


def sample(edits: Path, unrelated: Path, refused: list[str] | None = None) -> Sample:
    """Return what there is to calibrate on, from two files.

    edits: records with `prompt`, `target` and, where there are any, `paraphrases`; unrelated:
    records with `prompt`; refused: takes up what is wrong with a record, as in `records.read`.

    Raises: ValueError naming the line of a file.
    """
    fields = {"prompt": records.text, "target": records.answers, "paraphrases": records.rewordings}
    cases: list[Case] = []
    reworded: list[Case] = []
    for record in records.read(edits, fields, refused, optional=("paraphrases",)):
        case = Case(record["prompt"], records.first(record["target"]), record["prompt"])
        cases.append(case)
        paraphrases = record.get("paraphrases") or []
        paraphrases = [paraphrases] if isinstance(paraphrases, str) else paraphrases
        reworded.extend(Case(text, case.answer, case.about) for text in paraphrases)
    others = [
        Case(record["prompt"], "", record["prompt"])  # no edit's target is empty: a hit disturbs it
        for record in records.read(unrelated, {"prompt": records.text}, refused)
    ]
    return Sample(cases, reworded, others)


def task(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    layers: Sequence[str],
    replacement: str,
    budget: float,
) -> Task:
    """Return what there is to calibrate: a model and a sample.

    layers: dotted names, `{}` in one standing for every block.

    Raises: ValueError for a layer that is not there.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    found: list[str] = []
    for layer in layers:
        # Of a plain name attach says what is wrong with it.
        named = layers_like(model, layer) if "{}" in layer else [layer]
        if not named:
            raise ValueError(f"the model has no layer like {layer!r}")
        found += named
    return Task(
        name="calibrate",
        model=model,
        tokenizer=tokenizer,
        layer=found[0],
        layers=found,
        settings={"replacement": replacement},
        calibration=sample,
        batch=16,
        budget=budget,
    )
