"""The page of `benchmarks.edits`: what was checked, step for step, to the learnt answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import runner

_STEPS = (
    "Each makes as many steps of Adam as the others, at the same rate, on the same edits, in "
    "turns; milliseconds are of the processor. `wrong` counts decisions (keys, radii, chosen row "
    "after each edit of a stream with repeats) that are not those of the reference's rules in "
    "exact arithmetic; the references' own `torch.cdist` and EasyEdit's order of labels are why "
    "theirs may be. A ratio is the other's time over this one's: the median of the rounds' (least "
    "to most)."
)
_LEARNT = (
    "Until the answer is greedily right and the loss below the stop, 100 steps at most; everybody "
    "starts with the same value, rate and rule; `authors, who do not stop` make all 100 steps, as "
    "their code does. `answered`: greedily, each prompt alone, after all edits. Where the "
    "references made fewer edits, their seconds are compared with ours one by one on the same "
    "edits, and from there."
)
_FLOOR = (
    "Floors: the matrix products that have to run (from the edited layer on, forward and by the "
    "activations, the head where labels are), bare, at the rate that the machine gives such "
    "shapes; and these layers alone, written by hand, with their attention, norms, loss and "
    "gradient. Both for the steps that were taken and the edits that were still in their batch; "
    "what runs below the edit, once, is not in them."
)


def markdown(found: runner.Found) -> str:
    """Return the results as a page."""
    left_out = "".join(f" Left out: {each}." for each in found["skipped"])
    return "\n\n".join(
        [
            "# Edits",
            f"{runner.where(found)}. Load average {found['load']} at the start.{left_out} What the "
            "hook adds to a forward call is measured by `make bench-adaptor`.",
            "## Decisions, before anything is timed",
            "A stream with repeats and changed answers, one by one and at once: outcomes, rows, "
            "radii, labels and queries to the bit.",
            runner.table(_GATE, [_gate(row) for row in found["gate"]]),
            "## Step for step",
            _STEPS,
            runner.table(_STEP, [_step(row) for row in found["steps"]]),
            "## To the learnt answer",
            _LEARNT,
            runner.table(_ANSWER, [_answer(row) for row in found["learnt"]]),
            _FLOOR,
            "Rates of the products by edits at once: " + "; ".join(map(_rates, found["floors"])),
            "",
        ]
    )


_GATE = ("", "edits", "other than by law", "other than one by one", "outcomes")
_STEP = (
    "",
    "keys",
    "wrong",
    "ms a step",
    "over authors",
    "over EasyEdit",
    "over bare products",
    "over suffix",
)
_ANSWER = (
    "",
    "threads",
    "answered",
    "steps",
    "s an edit",
    "over authors",
    "over their 100 steps",
    "over EasyEdit",
    "over one by one",
    "over bare products",
    "over suffix",
)


def _gate(row: dict[str, Any]) -> list[str]:
    outcomes = ", ".join(f"{count} {name}" for name, count in row["outcomes"].items())
    counts = [str(row[name]) for name in ("checked", "wrong_by_law", "other_than_one_by_one")]
    return [f"{row['model']}, {row['way']}", *counts, outcomes]


def _step(row: dict[str, Any]) -> list[str]:
    name = f"{row['editor']}, {row['steps']} steps: {row['model']}"
    cells = [name, f"{row['keys']:,}", f"{row['wrong']} / {row['checked']}"]
    if row["ms_a_step"] is None:
        return [*cells, *"-----"]
    least, most = row["over_authors_least"], row["over_authors_most"]
    spread = f"{_times(row['over_authors'])} ({least:.3g} to {most:.3g})"
    floors = [row["ms_a_step"] / row[f"floor_{name}_ms"] for name in ("products", "suffix")]
    others = [_times(row["over_easyedit"]), *map(_times, floors)]
    return [*cells, f"{row['ms_a_step']:.2f}", spread, *others]


def _answer(row: dict[str, Any]) -> list[str]:
    share = f"{row['answered']} / {row['edits']}"
    cells = [f"{row['way']}: {row['model']}", str(row["threads"]), share, f"{row['steps']:.1f}"]
    taken = row["s_an_edit"]
    if taken is None:
        return [*cells, *"-------"]
    ratios = [row[f"over_{name}"] for name in ("authors", "authors_100", "easyedit", "one_by_one")]
    floors = [row[f"floor_{name}_s"] for name in ("products", "suffix")]
    over = [None if floor is None else taken / floor for floor in floors]
    return [*cells, f"{taken:.4f}", *map(_times, [*ratios, *over])]


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}x"


def _rates(row: dict[str, Any]) -> str:
    rates: Sequence[str] = [f"{size}: {rate:.0f}" for size, rate in row["gflop_per_s"].items()]
    return f"{row['model']} {', '.join(rates)} GFLOP/s"
