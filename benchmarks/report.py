"""Results as JSON, as a Markdown table, on the terminal, and as one plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import runner


@dataclass(frozen=True)
class Row:
    """One contestant on one problem. No time is given where ours decided wrongly."""

    work: str  # what is asked, and what of the data is synthetic
    contestant: str
    kind: str  # "ours", "baseline" or "peer"
    rows: int  # N
    width: int  # D
    batch: int  # B
    dtype: str
    epsilon_ratio: float
    radii: str
    hit_rate: float
    caches: str  # "warm" or "flushed"
    checked: int  # decisions compared with the law before timing
    wrong: int
    edges: int  # of them, queries exactly on a radius
    wrong_at_edges: int
    us_p5: float | None = None
    us_p50: float | None = None
    us_p95: float | None = None
    us_first: float | None = None  # the first call
    ratio: float | None = None  # baseline / this: of ours; the median over rounds
    ratio_least: float | None = None
    ratio_most: float | None = None
    behind: float | None = None  # this / the first of ours: of the baseline and the peers
    behind_least: float | None = None
    behind_most: float | None = None
    build_s: float | None = None
    codes: float | None = None  # of a certified look-up, in the mean: near codes read
    survivors: float | None = None  # keys that these do not settle
    rechecks: float | None = None  # keys read whole
    bytes: float | None = None  # read for all that
    note: str = ""

    @property
    def failed(self) -> bool:
        """Tell whether this is ours and wrong."""
        return self.kind == "ours" and self.wrong > 0


def markdown(found: runner.Found) -> str:
    """Return the results as a page: one table for each work."""
    rows = [Row(**row) for row in found["rows"]]
    page = (
        f"# Look-up times\n\n{runner.where(found)} "
        f"({', '.join(found['machine']['instructions'])}).\n\n"
        "Decisions are compared with the law (float64, in the canonical order) before each timing: "
        "wrong ones of all, and of those exactly on a radius (`on edge`). `to baseline` is the "
        "time of faiss flat, which searches and decides nothing, over ours; `to ours` is a peer's "
        "time over ours; `reads` is what a certified look-up reads in the "
        "mean. Each is timed in turns with ours; the median (least to most) of the "
        "rounds. A peer that cannot be had here is listed with the reason.\n"
    )
    for work in dict.fromkeys(row.work for row in rows):
        some = (cells(row) for row in rows if row.work == work)
        page += f"\n## {work}\n\n{runner.table(HEADINGS, some)}\n"
    return page


HEADINGS = (
    "",
    "p50",
    "p5",
    "p95",
    "to baseline",
    "to ours",
    "wrong",
    "on edge",
    "build",
    "reads",
    "note",
)


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    times = [_time(us) for us in (row.us_p50, row.us_p5, row.us_p95)]
    wrong = f"{row.wrong} / {row.checked}" if row.checked else "-"
    edges = f"{row.wrong_at_edges} / {row.edges}" if row.checked else "-"
    built = f"{row.build_s:.1f} s" if row.build_s is not None else "-"
    ratios = [
        _spread(row.ratio, row.ratio_least, row.ratio_most),
        _spread(row.behind, row.behind_least, row.behind_most),
    ]
    return [row.contestant, *times, *ratios, wrong, edges, built, _reads(row), row.note]


def _reads(row: Row) -> str:
    if row.bytes is None:
        return "-"
    parts = (row.codes, row.survivors, row.rechecks, row.bytes / 1024)
    return "{} codes, {} survivors, {} keys: {} KiB".format(*(_figure(part) for part in parts))


def print_work(work: str, rows: Iterable[Row]) -> None:
    """Print the table of one work."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=work, title_justify="left", title_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("", "note") else "right")
    for row in rows:
        style = "red" if row.failed else "bold" if row.kind == "ours" else None
        table.add_row(*cells(row), style=style)
    console = Console()
    if not console.is_terminal:  # a log or a file: no folding
        console = Console(width=180)
    console.print(table)


def plot(path: Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    """Draw the time of one query against N on real activations, with the wrong decisions beside."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    drawn = [row for row in rows if row.us_p50 is not None and in_plot(row)]
    figure, axes = pyplot.subplots(figsize=(9.5, 5.5), layout="constrained")
    axes.set_prop_cycle(color=mpl.colormaps["tab20"].colors)
    names = dict.fromkeys(row.contestant for row in drawn)
    for name in names:
        line = sorted((row for row in drawn if row.contestant == name), key=lambda row: row.rows)
        wrong, checked = sum(row.wrong for row in line), sum(row.checked for row in line)
        ours = line[0].kind == "ours"
        axes.plot(
            [row.rows for row in line],
            [row.us_p50 for row in line],
            marker="o" if ours else ".",
            linewidth=2.5 if ours else 1,
            label=f"{name}: {wrong} wrong of {checked}",
        )
    axes.set(xscale="log", yscale="log", xlabel="keys (N)", ylabel="time of one query, p50 (us)")
    axes.set_title(
        "One look-up, D = 1536, real activations (larger N by jitter), epsilon = .1 spacing\n"
        + _named(machine),
        fontsize=10,
    )
    axes.grid(which="both", alpha=0.2)
    if names:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def in_plot(row: Row) -> bool:
    """Tell whether a row belongs to the plot: one warm query to real activations."""
    return (
        row.work.startswith("find: real activations (minilm)")
        and (row.batch, row.caches, row.radii, row.dtype) == (1, "warm", "equal", "float32")
        and (row.epsilon_ratio, row.hit_rate) == (0.1, 0.05)
    )


def _named(machine: dict[str, Any]) -> str:
    used = f"{machine['threads']} of {machine['cores']} cores"
    return f"{machine['cpu']}, {used}, commit {machine['commit'] or 'unknown'}"


def _spread(median: float | None, least: float | None, most: float | None) -> str:
    if median is None or least is None or most is None:
        return "-"
    return f"{_figure(median)}x ({_figure(least)} to {_figure(most)})"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _time(us: float | None) -> str:
    if us is None:
        return "-"
    if us < 1000:
        return f"{us:.3g} us"
    return f"{us / 1e3:.3g} ms" if us < 1e6 else f"{us / 1e6:.3g} s"
