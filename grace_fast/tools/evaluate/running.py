"""One evaluation from end to end: the task, its calibration, the stream, baselines, the report."""

from __future__ import annotations

import functools
import importlib
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import grace_fast as gf
from grace_fast.codebook import printable
from grace_fast.editor.calibrate import Recommendation
from grace_fast.tools.demo.report import cpu_name
from grace_fast.tools.evaluate import cache, calibration, report, stream
from grace_fast.tools.evaluate.baselines import FineTuned, Retrained
from grace_fast.tools.evaluate.editors import GraceEditor
from grace_fast.tools.evaluate.reference_rule import ReferenceRule
from grace_fast.tools.evaluate.stream import Progress
from grace_fast.tools.evaluate.task import Task
from grace_fast.tools.threads import one_thread

OFFLINE = ("facts", "labels", "fabrications")
PAPER = ("zsre", "scotus", "hallucination")
POINTS = 8  # measurements along a stream, where no step is asked for
BASELINES = ("fine-tuning", "retraining", "reference rule")


def load(
    name: str, seed: int, cache_folder: str | Path | None, data: Path | None, progress: bool
) -> Task:
    """Return a task by its name.

    data: the folder with the files of a task of the paper.

    Raises: ValueError for a name that does not exist, FileNotFoundError naming the files that a
    task needs and where they go, and what is wrong in one of them, by line.
    """
    if name in OFFLINE:
        module = importlib.import_module(f"grace_fast.tools.evaluate.{name}")
        task: Task = module.prepare(seed, cache.folder(cache_folder), progress)
        return task
    if name in PAPER:
        from grace_fast.tools.evaluate import paper

        return paper.load(name, data)
    raise ValueError(f"the evaluation must be one of {(*OFFLINE, *PAPER)}, got {name!r}")


def run(
    name: str,
    out: str | Path,
    *,
    seed: int = 0,
    every: int | None = None,
    epsilon: float | None = None,
    baselines: bool = False,
    sweep: int = 0,
    restart: bool = False,
    cache_folder: str | Path | None = None,
    data: Path | None = None,
    progress: bool = True,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run an evaluation on one thread, or what is left of one, and return its figures.

    out: a directory, in which the state, `NAME.json` and its plots go to a folder NAME; every:
    edits between measurements; epsilon: by default calibrated; baselines: run fine-tuning,
    retraining and the reference's rule on the same stream; sweep: try so many epsilons on the whole
    stream beside the calibrated one; restart: forget an interrupted run.
    """
    with _repeatable():
        start = time.perf_counter()
        task = load(name, seed, cache_folder, data, progress)
        return evaluate(
            task,
            Path(out) / name,
            start,
            seed=seed,
            every=every,
            epsilon=epsilon,
            baselines=baselines,
            sweep=sweep,
            restart=restart,
            progress=progress,
            as_json=as_json,
        )


def evaluate(
    task: Task,
    folder: Path,
    start: float,
    *,
    seed: int = 0,
    every: int | None = None,
    epsilon: float | None = None,
    baselines: bool = False,
    sweep: int = 0,
    restart: bool = False,
    progress: bool = True,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run the evaluation of a task that is loaded; see `run`.

    start: when it began, by `time.perf_counter`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = report.console(silent=as_json)
    prepared = time.perf_counter() - start
    tries = calibration.TRIES if epsilon is None else 0  # a given one is taken as it is
    calibrated, layers = _calibrate(task, seed, tries)
    if epsilon is None:
        epsilon = calibrated.epsilon if calibrated is not None else 1.0
    every = every or _step(len(task.edits))
    recipe = recipe_of(task, epsilon, every, seed)
    state = None if restart else Progress.read(folder, recipe)
    resumed = state is not None
    report.say_task(out, task, epsilon, layers, 0 if state is None else state.done)
    state, decisions, verified = _stream(task, epsilon, every, state, recipe, folder, progress)
    rows = {"GRACE": state}
    if baselines:
        rows |= _baselines(task, epsilon, every, seed, recipe, folder, restart, progress)
    last = state.points[-1]
    figures: dict[str, Any] = {
        "task": task.name,
        "edits": last.edits,
        "keys": last.keys,
        **{name: getattr(last, name) for name in ("ES", "ERR", "TRR", "ARR")},
        "generality": last.generality,
        "locality": last.locality,
        "metric": task.metric,
        "before": state.before,
        "superseded": last.superseded,
        "not_learnt": [_named(task, at) for at in state.not_learnt],
        "layer": task.layer,
        "epsilon": epsilon,
        "calibration": None if layers is None else calibration.figures(layers.recommended),
        "calibration_at_layer": None if calibrated is None else calibration.figures(calibrated),
        "calibration_seconds": None if layers is None else round(layers.seconds, 3),
        "calibration_cpu_seconds": None if layers is None else round(layers.cpu_seconds, 3),
        "points": [asdict(point) for point in state.points],
        "baselines": {
            name: [asdict(point) for point in one.points]
            for name, one in rows.items()
            if name != "GRACE"
        },
        "decisions": decisions,
        "broken": verified.broken,
        "facts": task.facts,
        "seed": seed,
        "resumed": resumed,
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "grace_fast": gf.__version__,
        },
        "prepare_seconds": round(prepared, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "process_cpu_seconds": round(time.process_time(), 1),  # what a busy machine does not blur
    }
    if sweep:
        kept = folder / "sweep.json"
        if restart:
            kept.unlink(missing_ok=True)
        figures["sweep"] = _sweep(task, epsilon, sweep, layers, kept, recipe, progress)
    report.tables(out, rows, figures)
    report.draw(rows, task, folder / f"{task.name}.png")
    if layers is not None:
        report.draw_trade_off(layers.recommended, epsilon, folder / f"{task.name}-tradeoff.png")
    figures = calibration.without_nan(figures)
    written = json.dumps(figures, indent=2) + "\n"
    (folder / f"{task.name}.json").write_text(written, encoding="utf-8")
    report.say(out, f"Written to {folder}: {task.name}.json and plots.")
    return figures


def _calibrate(
    task: Task, seed: int, tries: int
) -> tuple[Recommendation | None, calibration.Calibrated | None]:
    """Return what is recommended at the task's layer, and over all of its layers."""
    if not task.calibration.edits:
        return None, None
    layers = list(dict.fromkeys([task.layer, *task.layers]))
    measured = calibration.run(task, layers, seed, tries)
    return calibration.at_layer(measured, task, seed), measured


def _step(edits: int) -> int:
    """Return a step, a multiple of ten where there are edits enough, for about eight points."""
    step = math.ceil(edits / POINTS)
    return step if step < 10 else math.ceil(step / 10) * 10


def _stream(
    task: Task,
    epsilon: float,
    every: int,
    state: Progress | None,
    recipe: str,
    folder: Path,
    progress: bool,
) -> tuple[Progress, str, gf.Verification]:
    """Stream the edits into GRACE, from where the state says."""
    saved = None if state is None else folder / state.codebook
    editor = GraceEditor(task, epsilon, saved)
    try:
        state = state or Progress(recipe)
        with _bar(task, "edits", state.done, progress) as bar:
            keep = functools.partial(stream.save, editor, folder)
            state = stream.run(editor, task, every, state, keep, bar)
        return state, stream.digest(editor.decisions()), editor.grace.verify()
    finally:
        editor.close()


def _baselines(
    task: Task,
    epsilon: float,
    every: int,
    seed: int,
    recipe: str,
    folder: Path,
    restart: bool,
    progress: bool,
) -> dict[str, Progress]:
    """Run every baseline on the same stream; one that had ended is read again."""
    rows = {}
    for name in BASELINES:
        place = folder / f"baseline-{name.replace(' ', '-')}"
        place.mkdir(exist_ok=True)
        state = None if restart else Progress.read(place, recipe)
        if state is None:
            state = _baseline(name, task, epsilon, every, seed, Progress(recipe), progress)
            state.write(place)
        rows[name] = state
    return rows


def _baseline(
    name: str,
    task: Task,
    epsilon: float,
    every: int,
    seed: int,
    state: Progress,
    progress: bool,
) -> Progress:
    with _bar(task, name, 0, progress) as bar:
        if name == "reference rule":
            rule = ReferenceRule(task, epsilon)
            try:
                return stream.run(rule, task, every, state, None, bar)
            finally:
                rule.close()
        tuned = FineTuned(task) if name == "fine-tuning" else Retrained(task, seed)
        return stream.run(tuned, tuned.task, every, state, None, bar)


def _sweep(
    task: Task,
    epsilon: float,
    count: int,
    layers: calibration.Calibrated | None,
    kept: Path,
    recipe: str,
    progress: bool,
) -> dict[str, Any]:
    """Run the whole stream with each of so many epsilons, and with the calibrated one.

    kept: a file for the rows; those that are there already are not run again.
    """
    tried = [] if layers is None else layers.recommended.trials
    grid = [trial.epsilon for trial in tried if trial.layer == task.layer]
    picked = (
        {grid[at * (len(grid) - 1) // max(1, count - 1)] for at in range(count)} if grid else ()
    )
    known = _swept(kept, recipe)
    rows = []
    for value in sorted({*picked, epsilon}):
        if value not in known:
            known[value] = _swept_at(task, value, progress)
            stream.put(kept, {"recipe": recipe, "rows": list(known.values())})
        rows.append(known[value])
    best = max(row["ERR"] + row["TRR"] for row in rows)
    (chosen,) = [row for row in rows if row["epsilon"] == epsilon]
    return {
        "rows": rows,
        "best": best,
        "calibrated": chosen["ERR"] + chosen["TRR"],
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "process_cpu_seconds": round(sum(row["process_cpu_seconds"] for row in rows), 1),
        "calibration_seconds": None if layers is None else round(layers.seconds, 3),
        "calibration_cpu_seconds": None if layers is None else round(layers.cpu_seconds, 3),
    }


def _swept(kept: Path, recipe: str) -> dict[float, dict[str, Any]]:
    """Return the rows that earlier sweeps of this recipe left, by epsilon."""
    if not kept.exists():
        return {}
    fields = stream.checkpoint(kept)
    try:
        rows = fields["rows"] if fields["recipe"] == recipe else []
        return {float(row["epsilon"]): row for row in rows}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{kept} is not what a sweep left; remove it: {error!r}") from error


def _swept_at(task: Task, epsilon: float, progress: bool) -> dict[str, Any]:
    """Run the whole stream with one epsilon; the ES of each edit is not asked for."""
    start, cpu = time.perf_counter(), time.process_time()
    editor = GraceEditor(task, epsilon)
    try:
        with _bar(task, f"epsilon {epsilon:g}", 0, progress) as bar:
            point = stream.final(editor, task, bar)
    finally:
        editor.close()
    return {
        "epsilon": epsilon,
        "keys": point.keys,
        "ERR": point.ERR,
        "TRR": point.TRR,
        "generality": point.generality,
        "seconds": round(time.perf_counter() - start, 1),
        "process_cpu_seconds": round(time.process_time() - cpu, 1),
    }


def _named(task: Task, at: int) -> dict[str, Any]:
    case = task.edits[at]
    return {"edit": at, "prompt": case.prompt, "answer": case.answer}


def recipe_of(task: Task, epsilon: float, every: int, seed: int) -> str:
    """Return a checksum of all that a stream of GRACE or of a baseline depends on."""
    groups = (task.edits, task.held_out, task.unrelated, task.accurate, task.rehearsal)
    cases = [[[case.prompt, case.answer, case.also] for case in group] for group in groups]
    rates = [task.tuning_rate, task.retraining_rate]
    weights = stream.weights_checksum(task.model)
    settings = [task.name, task.layer, epsilon, every, seed, task.settings, rates]
    return cache.checksum([*settings, cases, weights])


def _bar(task: Task, name: str, done: int, progress: bool) -> Any:
    return tqdm(
        total=len(task.edits),
        initial=done,
        desc=printable.fit(f"{task.name}: {name}", sys.stderr),
        disable=None if progress else True,
        leave=False,
    )


@contextmanager
def _repeatable() -> Iterator[None]:
    """Compute the same sums at every run, and do not warn: a sweep tries epsilons far off."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", gf.GraceWarning)
        yield
