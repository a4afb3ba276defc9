"""Calibration of a model and a sample that a user gives: files in, layers and epsilon out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grace_fast.evaluate import records
from grace_fast.evaluate.task import Case, Sample, Task


def task(
    model: Any,
    tokenizer: Any,
    edits: Path,
    unrelated: Path,
    layers: Sequence[str],
    replacement: str,
    budget: float,
) -> Task:
    """Return what there is to calibrate: a model, and a sample from two files.

    edits: JSON lines with `prompt`, `target` and, where there are any, `paraphrases`; unrelated:
    JSON lines with `prompt`; layers: dotted names, `{}` in one standing for every block.

    Raises: ValueError naming the line of a file or the layer that is not there.
    """
    wanted = records.read(edits, {"prompt": records.text, "target": records.answers})
    cases: list[Case] = []
    reworded: list[Case] = []
    for number, record in enumerate(wanted, start=1):
        case = Case(record["prompt"], str(record["target"]), record["prompt"])
        cases.append(case)
        paraphrases = record.get("paraphrases", [])
        if paraphrases and (wrong := records.texts(paraphrases)) is not None:
            raise ValueError(f"{edits}, record {number}: 'paraphrases' {wrong}")
        reworded.extend(Case(text, case.answer, case.about) for text in paraphrases)
    others = [
        Case(record["prompt"], "", record["prompt"])  # no edit's target is empty: a hit disturbs it
        for record in records.read(unrelated, {"prompt": records.text})
    ]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = [name for layer in layers for name in _matching(model, layer)]
    return Task(
        name="calibrate",
        model=model,
        tokenizer=tokenizer,
        layer=found[0],
        layers=found,
        settings={"replacement": replacement},
        edits=(),
        held_out=(),
        unrelated=(),
        calibration=Sample(cases, reworded, others),
        batch=16,
        budget=budget,
    )


def _matching(model: Any, layer: str) -> list[str]:
    """Return the layers that a pattern names, in the order of the model; a plain name is itself."""
    if "{}" not in layer:
        return [layer]  # attach says what is wrong with it
    pattern = re.compile(re.escape(layer).replace(r"\{\}", r"\d+"))
    found = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    if not found:
        raise ValueError(f"the model has no layer like {layer!r}")
    return found
