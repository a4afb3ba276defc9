"""What the demo shows: tables on the terminal, one JSON file and one picture."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grace_fast.codebook import printable
from grace_fast.tools.demo.calibration import Scale
from grace_fast.tools.demo.examples import Example
from grace_fast.tools.demo.stream import Point

PLAIN_WIDTH = 120
SHOWN = 100  # characters of a text in the table of examples


def console(silent: bool) -> Console:
    """Return a console for standard output: plain where that is not a terminal."""
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(highlight=False, width=width, quiet=silent)


def say(out: Console, words: str) -> None:
    """Print a paragraph, as it is."""
    out.print(Text(printable.fit(words, out.file)))
    out.print()


def table(
    out: Console, title: str, columns: Mapping[str, str], rows: Sequence[Sequence[str]]
) -> None:
    """Print a table; columns: name to justification."""

    def cell(text: str) -> Text:
        return Text(printable.fit(text, out.file))

    made = Table(
        title=cell(title), title_justify="left", box=box.SIMPLE if out.is_terminal else None
    )
    for name, justify in columns.items():
        right = justify == "right"
        made.add_column(cell(name), justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(cell, row))
    out.print(made)
    out.print()


def scales_table(out: Console, scales: Sequence[Scale]) -> None:
    """Print the distances that layer and epsilon were chosen by."""
    names = ("another module (5 %)", "rewording (median)", "epsilon", "rewordings inside")
    columns = {"layer": "left"} | dict.fromkeys(names, "right")
    rows = [
        (
            scale.layer,
            f"{scale.unrelated:.2f}",
            f"{scale.reworded:.2f}",
            f"{scale.epsilon:.2f}",
            f"{scale.inside:.0%}",
        )
        for scale in scales
    ]
    table(out, "Distances at the middle layers", columns, rows)


def points_table(out: Console, points: Sequence[Point]) -> None:
    """Print what was measured along the stream."""
    names = (
        "edits",
        "keys",
        "ES",
        "ERR",
        "TRR",
        "hit rate",
        "ms/edit",
        "gf.find us",
        "cdist rule us",
    )
    rows = [
        (
            str(point.edits),
            str(point.keys),
            f"{point.es:.3f}",
            f"{point.err:.3f}",
            f"{point.trr:.4f}",
            f"{point.hit_rate:.4f}",
            f"{point.edit_ms:.0f}",
            f"{point.find_us:.0f}",
            f"{point.reference_us:.0f}",
        )
        for point in points
    ]
    table(out, "The stream of edits", dict.fromkeys(names, "right"), rows)


def examples_table(out: Console, examples: Sequence[Example]) -> None:
    """Print single inputs before and after all edits."""
    rows = []
    for one in examples:
        text = one.text if len(one.text) <= SHOWN else one.text[: SHOWN - 3] + "..."
        after = f"{one.after}, bit for bit" if one.bit_for_bit else one.after
        rows.append((one.what, text, one.wanted, one.before, after))
    columns = dict.fromkeys(
        ("input", "docstring", "of module", "before", "after all edits"), "left"
    )
    table(out, "Before and after", columns, rows)


def cpu_name() -> str:
    """Return the name of the machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Write one picture: ERR and TRR above, edits and keys below, over the number of edits."""
    figure = Figure(figsize=(7.5, 6.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rates, keys = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    edits = [point.edits for point in points]
    err, trr = [point.err for point in points], [point.trr for point in points]
    rates.plot(edits, err, "o-", color="#0072b2", label="ERR: past edits answered right")
    rates.plot(edits, trr, "s--", color="#d55e00", label="TRR: unrelated inputs still right")
    lowest = min(*err, *trr)
    rates.set_ylim(min(0.9, lowest - 0.02), 1.005)
    rates.set_ylabel("share of inputs")
    rates.legend(loc="lower left", frameon=False)
    keys.plot(edits, edits, ":", color="0.5", label="one key an edit")
    keys.plot(edits, [point.keys for point in points], "^-", color="#009e73", label="keys")
    keys.set_ylim(bottom=0)
    keys.set_xlim(left=0)
    keys.set_ylabel("keys in the codebook")
    keys.set_xlabel("edits")
    keys.legend(loc="upper left", frameon=False)
    for axes in (rates, keys):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(printable.for_plot(title), fontsize=10)
    figure.savefig(path)
