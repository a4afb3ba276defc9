"""Tables and pictures of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grace_fast.codebook import printable
from grace_fast.editor.calibrate import LEARNABLE, Recommendation
from grace_fast.tools.evaluate.calibration import Calibrated
from grace_fast.tools.evaluate.stream import Progress
from grace_fast.tools.evaluate.task import Task
from grace_fast.tools.terminal import Screen

COLOURS = {
    "GRACE": "#0072b2",
    "reference rule": "#d55e00",
    "fine-tuning": "#999999",
    "retraining": "#009e73",
}
SHARES = ("ES", "ERR", "TRR", "ARR", "generality", "locality")


def say_task(out: Screen, task: Task, epsilon: float, layers: Calibrated | None, done: int) -> None:
    """Say what is evaluated and how epsilon was found."""
    given = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in task.facts.items())
    out.say(f"{task.name}: {len(task.edits)} edits at {task.layer}. {given}")
    if layers is not None:
        out.say(
            f"Epsilon {epsilon:g}. Over {len(task.layers)} layers, calibrated in "
            f"{layers.seconds:.1f} s: {recommendation(layers.recommended)}",
        )
    if done:
        out.say(f"{done} edits were made by an earlier run; this one goes on from there.")


def recommendation(found: Recommendation) -> str:
    """Say a recommendation, and how sure it is, in words."""
    low, high = found.intervals["epsilon"]
    parts = [
        f"{name} {value:.3f} ({found.intervals[name][0]:.3f} to {found.intervals[name][1]:.3f})"
        for name, value in (
            ("ERR", found.err),
            ("generality", found.generality),
            ("TRR", found.trr),
        )
        if not math.isnan(value)
    ]
    budget = "" if found.within_budget else " No epsilon keeps the budget; this is the gentlest."
    unable = [name for name, share in found.learnt.items() if share < LEARNABLE]
    left_out = f" Too few edits are learnt at {', '.join(unable)}." if unable else ""
    if not found.learnable:
        left_out = " Too few edits are learnt at any of the layers, this one among them."
    return (
        f"{found.layer} with epsilon {found.epsilon:g} (95 %: {low:g} to {high:g}): "
        f"{', '.join(parts)} on the sample. In {found.near_best:.0%} of the resamples it is within "
        f"2 % of the best ERR + TRR.{budget}{left_out}"
    )


def trials(out: Screen, found: Recommendation) -> None:
    """Print every layer and epsilon that was tried."""
    columns = ("layer", "learnt", "epsilon", "keys", "ERR", "generality", "TRR")
    rows = [
        [trial.layer, _share(found.learnt.get(trial.layer, math.nan))]
        + [f"{trial.epsilon:g}", str(trial.keys)]
        + [_share(value) for value in (trial.err, trial.generality, trial.trr)]
        for trial in found.trials
    ]
    out.table("Every epsilon at every layer, on the sample", columns, rows, left=("layer",))


def tables(out: Screen, rows: Mapping[str, Progress], figures: Mapping[str, Any]) -> None:
    """Print the stream of edits, and the last point of every method beside the others."""
    names = (
        "edits",
        "keys",
        *SHARES,
        "superseded",
        "not learnt",
        "edits/key",
        "s/edit",
        "look-ups/s",
    )
    out.table("The stream of edits", names, [_row(point) for point in rows["GRACE"].points])
    if len(rows) > 1:
        compared = ("keys", "ES", "ERR", "TRR", "ARR", "generality", "not learnt", "s/edit")
        picked = [names.index(name) for name in compared]
        last = [
            (method, *(_row(one.points[-1])[at] for at in picked)) for method, one in rows.items()
        ]
        out.table("After the last edit", ("method", *compared), last, left=("method",))
    if "sweep" in figures:
        swept = figures["sweep"]
        kept = ("epsilon", "keys", "ERR", "TRR", "generality", "seconds")
        lines = [[f"{row[name]:.4g}" for name in kept] for row in swept["rows"]]
        out.table("Every epsilon on the whole stream", kept, lines)
    before = ", ".join(
        f"{name} {value:.4f}" for name, value in figures["before"].items() if value == value
    )
    out.say(f"Before any edit: {before}. {figures['seconds']:.0f} s in all.")
    for missed in figures["not_learnt"]:
        out.say(f"NOT LEARNT: edit {missed['edit']}, {missed['prompt']} -> {missed['answer']}")
    if figures["broken"]:
        out.say(f"BROKEN: edits {figures['broken']}")


def _row(point: Any) -> list[str]:
    return [
        str(point.edits),
        str(point.keys),
        *(_share(getattr(point, name)) for name in SHARES),
        str(point.superseded),
        str(point.not_learnt),
        "" if math.isnan(point.edits_per_key) else f"{point.edits_per_key:.1f}",
        f"{point.edit_seconds:.3f}",
        "" if math.isnan(point.lookups_per_second) else f"{point.lookups_per_second:.0f}",
    ]


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def draw(rows: Mapping[str, Progress], task: Task, path: Path) -> None:
    """Write one picture: ERR, TRR and keys of every method over the edits."""
    figure, (kept, unrelated, keys) = panels(3, 1, (7.5, 6.0), sharex=True)
    for name, progress in rows.items():
        edits = [point.edits for point in progress.points]
        # Broad beneath thin: lines that coincide are both seen.
        is_ours = name == "GRACE"
        how: dict[str, Any] = {
            "color": COLOURS[name],
            "linewidth": 4 if is_ours else 1.2,
            "alpha": 0.6 if is_ours else 1.0,
            "marker": "" if is_ours else ".",
        }
        kept.plot(edits, [point.ERR for point in progress.points], label=name, **how)
        unrelated.plot(edits, [point.TRR for point in progress.points], **how)
        if progress.points[-1].keys:
            keys.plot(edits, [point.keys for point in progress.points], **how)
    points = rows["GRACE"].points
    edits = [point.edits for point in points]
    if not all(math.isnan(point.generality) for point in points):
        held_out = [point.generality for point in points]
        kept.plot(edits, held_out, ":", color=COLOURS["GRACE"], label="GRACE, held-out phrasings")
    keys.set_ylim(bottom=0)
    kept.set_ylabel("ERR")
    unrelated.set_ylabel("TRR")
    keys.set_ylabel("keys")
    keys.set_xlabel(printable.for_plot(f"edits of {task.name}, {len(task.edits)} in all"))
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path)


def draw_trade_off(found: Recommendation, epsilon: float, path: Path) -> None:
    """Write TRR against ERR for every layer and epsilon, as the paper's Figure 2 does."""
    figure, (trade, both, general) = panels(1, 3, (9.0, 3.8))
    for layer in dict.fromkeys(trial.layer for trial in found.trials):
        trials = [trial for trial in found.trials if trial.layer == layer]
        err, trr = [trial.err for trial in trials], [trial.trr for trial in trials]
        (line,) = trade.plot(
            err, trr, "o-", markersize=3, linewidth=0.8, label=printable.for_plot(layer)
        )
        values = [trial.epsilon for trial in trials]
        both.plot(values, [trial.err + trial.trr for trial in trials], color=line.get_color())
        general.plot(values, [trial.generality for trial in trials], color=line.get_color())
    for axes, name in ((both, "ERR + TRR"), (general, "generality")):
        axes.axvline(epsilon, color="0.5", linestyle=":")
        axes.set_xscale("log")
        axes.set_xlabel(f"epsilon; dotted: {epsilon:g}")
        axes.set_ylabel(name)
    trade.set_xlabel("ERR")
    trade.set_ylabel("TRR")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path)


def panels(
    rows: int, columns: int, size: tuple[float, float], **how: Any
) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure and its plots, in the style of all pictures; how: as `subplots` takes it."""
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    plots = list(figure.subplots(rows, columns, **how))
    for axes in plots:
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    return figure, plots
