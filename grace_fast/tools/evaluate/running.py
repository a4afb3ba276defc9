"""One evaluation from end to end: the task, its calibration, the stream, baselines, the report."""

from __future__ import annotations

import functools
import importlib
import json
import math
import time
import warnings
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grace_fast as gf
from grace_fast.editor.calibrate import Recommendation
from grace_fast.tools.evaluate import cache, calibration, report, stream
from grace_fast.tools.evaluate.calibration import Calibrated
from grace_fast.tools.evaluate.editors import FineTuned, GraceEditor, Retrained
from grace_fast.tools.evaluate.reference_rule import ReferenceRule
from grace_fast.tools.evaluate.stream import Progress
from grace_fast.tools.evaluate.task import Task
from grace_fast.tools.terminal import Screen, bar, plain
from grace_fast.tools.timing import machine, one_thread

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


@dataclass(frozen=True)
class Options:
    """How a task is evaluated."""

    seed: int = 0
    every: int | None = None  # edits between measurements; by default eight points
    epsilon: float | None = None  # by default calibrated
    baselines: bool = False  # fine-tuning, retraining, the reference's rule on the same stream
    sweep: int = 0  # so many epsilons on the whole stream, beside the calibrated one
    restart: bool = False  # forget an interrupted run
    progress: bool = True
    as_json: bool = False  # print nothing: the caller prints what is returned


@one_thread()
def run(
    name: str,
    out: str | Path,
    options: Options = Options(),
    cache_folder: str | Path | None = None,
    data: Path | None = None,
) -> dict[str, Any]:
    """Run an evaluation on one thread, or what is left of one, and return its figures.

    out: a directory, in which the state, `NAME.json` and its plots go to a folder NAME; data: as in
    `load`.

    Raises: as `load`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gf.GraceWarning)  # a sweep tries epsilons far off
        start = time.perf_counter()
        task = load(name, options.seed, cache_folder, data, options.progress)
        return evaluate(task, Path(out) / name, options, start)


def evaluate(task: Task, folder: Path, options: Options, start: float) -> dict[str, Any]:
    """Run the evaluation of a task that is loaded; start: when it began, by `perf_counter`."""
    folder.mkdir(parents=True, exist_ok=True)
    out = Screen(options.as_json)
    prepared = time.perf_counter() - start
    # A given epsilon is taken as it is.
    tries = calibration.TRIES if options.epsilon is None else 0
    calibrated, layers = _calibrate(task, options.seed, tries)
    epsilon = options.epsilon
    if epsilon is None:
        epsilon = calibrated.epsilon if calibrated is not None else 1.0
    every = options.every or _step(len(task.edits))
    recipe = recipe_of(task, epsilon, every, options.seed)
    whole = _Run(task, folder, options, epsilon, every, recipe)
    state = whole.state_in(folder)
    resumed = state is not None
    report.say_task(out, task, epsilon, layers, 0 if state is None else state.done)
    state, decisions, verified = whole.stream(state)
    baselines = whole.baselines() if options.baselines else {}
    last = state.points[-1]
    clocks = {
        "calibration_seconds": None if layers is None else round(layers.seconds, 3),
        "calibration_cpu_seconds": None if layers is None else round(layers.cpu_seconds, 3),
    }
    figures: dict[str, Any] = {
        "task": task.name,
        "edits": last.edits,
        "keys": last.keys,
        **{name: getattr(last, name) for name in report.SHARES},
        "metric": task.metric,
        "before": state.before,
        "superseded": last.superseded,
        "not_learnt": [
            {"edit": at, "prompt": task.edits[at].prompt, "answer": task.edits[at].answer}
            for at in state.not_learnt
        ],
        "layer": task.layer,
        "epsilon": epsilon,
        "calibration": None if layers is None else calibration.figures(layers.recommended),
        "calibration_at_layer": None if calibrated is None else calibration.figures(calibrated),
        **clocks,
        "points": [asdict(point) for point in state.points],
        "baselines": {
            name: [asdict(point) for point in one.points] for name, one in baselines.items()
        },
        "decisions": decisions,
        "broken": verified.broken,
        "facts": task.facts,
        "seed": options.seed,
        "resumed": resumed,
        "machine": machine(),
        "prepare_seconds": round(prepared, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "process_cpu_seconds": round(time.process_time(), 1),  # what a busy machine does not blur
    }
    if options.sweep:
        tried = [] if layers is None else layers.recommended.trials
        grid = [trial.epsilon for trial in tried if trial.layer == task.layer]
        figures["sweep"] = whole.sweep(grid) | clocks
    rows = {"GRACE": state} | baselines
    report.tables(out, rows, figures)
    report.draw(rows, task, folder / f"{task.name}.png")
    if layers is not None:
        report.draw_trade_off(layers.recommended, epsilon, folder / f"{task.name}-tradeoff.png")
    figures = plain(figures)
    written = json.dumps(figures, indent=2) + "\n"
    (folder / f"{task.name}.json").write_text(written, encoding="utf-8")
    out.say(f"Written to {folder}: {task.name}.json and plots.")
    return figures


def report_calibration(
    task: Task, plot: Path | None, seed: int, as_json: bool, tries: int = calibration.TRIES
) -> dict[str, Any]:
    """Calibrate a task over its layers, print the trade-off, draw it, and return the figures."""
    calibrated = calibration.run(task, seed=seed, tries=tries)
    found, out = calibrated.recommended, Screen(as_json)
    report.trials(out, found)
    out.say(f"In {calibrated.seconds:.1f} s: {report.recommendation(found)}")
    if plot is not None:
        report.draw_trade_off(found, found.epsilon, plot)
    return {
        **calibration.figures(found),
        "learnable": found.learnable,
        "seconds": round(calibrated.seconds, 3),
        "process_cpu_seconds": round(calibrated.cpu_seconds, 3),
    }


def _calibrate(
    task: Task, seed: int, tries: int
) -> tuple[Recommendation | None, Calibrated | None]:
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


@dataclass(frozen=True)
class _Run:
    """One task, one epsilon, and what each of its streams shares."""

    task: Task
    folder: Path
    options: Options
    epsilon: float
    every: int
    recipe: str

    def state_in(self, folder: Path) -> Progress | None:
        """Return what an earlier run left there, None where it does not count."""
        return None if self.options.restart else Progress.read(folder, self.recipe)

    def stream(self, state: Progress | None) -> tuple[Progress, str, gf.Verification]:
        """Stream the edits into GRACE, from where the state says."""
        saved = None if state is None else self.folder / state.codebook
        state = state or Progress(self.recipe)
        with closing(GraceEditor(self.task, self.epsilon, saved)) as editor:
            with self._bar("edits", state.done) as ticks:
                keep = functools.partial(stream.save, editor, self.folder)
                state = stream.run(editor, self.task, self.every, state, keep, ticks)
            return state, stream.digest(editor.decisions()), editor.grace.verify()

    def baselines(self) -> dict[str, Progress]:
        """Run every baseline on the same stream; one that had ended is read again."""
        rows = {}
        for name in BASELINES:
            place = self.folder / f"baseline-{name.replace(' ', '-')}"
            place.mkdir(exist_ok=True)
            state = self.state_in(place)
            if state is None:
                state = self._baseline(name)
                state.write(place)
            rows[name] = state
        return rows

    def _baseline(self, name: str) -> Progress:
        state = Progress(self.recipe)
        with self._bar(name) as ticks:
            if name == "reference rule":
                with closing(ReferenceRule(self.task, self.epsilon)) as rule:
                    return stream.run(rule, self.task, self.every, state, None, ticks)
            is_plain = name == "fine-tuning"
            tuned = FineTuned(self.task) if is_plain else Retrained(self.task, self.options.seed)
            return stream.run(tuned, tuned.task, self.every, state, None, ticks)

    def sweep(self, grid: list[float]) -> dict[str, Any]:
        """Run the whole stream with some epsilons of a grid, and with the calibrated one.

        Rows that an earlier sweep left are not run again.
        """
        kept, count = self.folder / "sweep.json", self.options.sweep
        if self.options.restart:
            kept.unlink(missing_ok=True)
        places = [at * (len(grid) - 1) // max(1, count - 1) for at in range(count if grid else 0)]
        known = _swept(kept, self.recipe)
        rows = []
        for value in sorted({*(grid[at] for at in places), self.epsilon}):
            if value not in known:
                known[value] = self._swept_at(value)
                stream.put(kept, {"recipe": self.recipe, "rows": list(known.values())})
            rows.append(known[value])
        (chosen,) = [row for row in rows if row["epsilon"] == self.epsilon]
        return {
            "rows": rows,
            "best": max(row["ERR"] + row["TRR"] for row in rows),
            "calibrated": chosen["ERR"] + chosen["TRR"],
            "seconds": round(sum(row["seconds"] for row in rows), 1),
            "process_cpu_seconds": round(sum(row["process_cpu_seconds"] for row in rows), 1),
        }

    def _swept_at(self, epsilon: float) -> dict[str, Any]:
        """Run the whole stream with one epsilon; the ES of each edit is not asked for."""
        start, cpu = time.perf_counter(), time.process_time()
        with (
            closing(GraceEditor(self.task, epsilon)) as editor,
            self._bar(f"epsilon {epsilon:g}") as ticks,
        ):
            point = stream.final(editor, self.task, ticks)
        return {
            "epsilon": epsilon,
            **{name: getattr(point, name) for name in ("keys", "ERR", "TRR", "generality")},
            "seconds": round(time.perf_counter() - start, 1),
            "process_cpu_seconds": round(time.process_time() - cpu, 1),
        }

    def _bar(self, name: str, done: int = 0) -> Any:
        what = f"{self.task.name}: {name}"
        return bar(what, len(self.task.edits), self.options.progress, done)


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


def recipe_of(task: Task, epsilon: float, every: int, seed: int) -> str:
    """Return a checksum of all that a stream of GRACE or of a baseline depends on."""
    groups = (task.edits, task.held_out, task.unrelated, task.accurate, task.rehearsal)
    cases = [[[case.prompt, case.answer, case.also] for case in group] for group in groups]
    rates = [task.tuning_rate, task.retraining_rate]
    weights = stream.weights_checksum(task.model)
    settings = [task.name, task.layer, epsilon, every, seed, task.settings, rates]
    return cache.checksum([*settings, cases, weights])
