"""The demo from end to end: prepare, stream the edits, show, save, verify."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grace_fast as gf
from grace_fast.codebook import printable
from grace_fast.tools.demo import measured
from grace_fast.tools.demo.measured import Point, TimedEditor
from grace_fast.tools.evaluate import mistakes, stream
from grace_fast.tools.evaluate.docstrings import MODULES, PER_MODULE, REWORDINGS
from grace_fast.tools.evaluate.editors import GraceEditor
from grace_fast.tools.evaluate.mistakes import Mistakes
from grace_fast.tools.evaluate.report import panels
from grace_fast.tools.evaluate.stream import Progress
from grace_fast.tools.terminal import Screen, bar
from grace_fast.tools.timing import cpu_model, machine, one_thread

POINTS = 6  # measurements along the stream
SHOWN = 100  # characters of a text in the table of examples


@one_thread()  # on a machine that is busy, two that wait for each other are slower than one
def run(
    output: str | Path,
    seed: int = 0,
    progress: bool = True,
    as_json: bool = False,
    per_module: int = PER_MODULE,
) -> dict[str, Any]:
    """Run the demo on one thread, print what it measures and return it.

    output: a directory for `codebook/`, `demo.json` and `demo.png`; seed: deals the docstrings;
    progress: bars on standard error where that is a terminal; as_json: print nothing, the caller
    prints what is returned; per_module: how many docstrings of a module are used at most. `passed`
    of the answer is False where verify found a broken edit or a bar was missed, as `failures` says.
    """
    started = time.perf_counter()
    output, out = Path(output), Screen(as_json)
    output.mkdir(parents=True, exist_ok=True)
    known = mistakes.prepare(seed, per_module, progress)
    task = known.task
    _say_data(out, known)
    figures = _edit_all(known, output / "codebook", progress, out)
    points = figures["points"]
    with closing(GraceEditor(task, known.chosen.epsilon, output / "codebook")) as saved:
        verified = saved.grace.verify()  # of the codebook as it was written
    failures = missed(points[-1], verified)
    held_out = len(task.edits) + len(task.unrelated)
    figures = {
        "passed": not failures,
        "failures": failures,
        "seed": seed,
        "machine": machine(),
        "docstrings": _sizes(known),
        "held_out_accuracy": len(task.unrelated) / held_out,
        "layers": [asdict(scale) for scale in known.scales],
        "layer": task.layer,
        "epsilon": known.chosen.epsilon,
        **figures,
        "points": [asdict(point) for point in points],
        "verify": {
            "ok": verified.ok,
            "fires": len(verified.fires),
            "superseded": len(verified.superseded),
            "broken": list(verified.broken),
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    title = f"GRACE on MiniLM: {len(task.edits)} real mistakes edited away ({cpu_model()})"
    draw(points, output / "demo.png", title)
    (output / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    _say_end(out, figures, output)
    return figures


def _edit_all(known: Mistakes, codebook: Path, progress: bool, out: Screen) -> dict[str, Any]:
    """Edit the mistakes away, show what that did, save the codebook and detach it."""
    task = known.task
    every = -(-len(task.edits) // POINTS)
    with closing(TimedEditor(known)) as editor:
        grace = editor.grace
        with bar("edits", len(task.edits), progress) as ticks:
            made = stream.run(editor, task, every, Progress(""), None, ticks)
        points = editor.points(made.points)
        _show_points(out, points)
        final = {
            "err": points[-1].err,
            "trr": points[-1].trr,
            "unchanged": measured.unchanged(grace, known),
        }
        reworded = measured.generality(grace, known)
        other = measured.example(grace, "unrelated", task.unrelated[0], known)
        shown = [*reworded.shown, other]
        _show_examples(out, shown)
        out.say(
            f"Of {reworded.wrong_before} rewordings of edited texts ({', '.join(REWORDINGS)}) that "
            f"were wrong before, {reworded.right_after:.0%} are right now; above is the first one."
        )
        grace.save_pretrained(codebook)
        return {
            "points": points,
            "final": final,
            "outcomes": dict(Counter(edit.outcome for edit in grace.edits())),
            "rewordings": {"wrong": reworded.wrong_before, "repaired": reworded.right_after},
            "examples": [asdict(one) for one in shown],
        }


def missed(last: Point, verified: gf.Verification) -> list[str]:
    """Return which bars the end of the stream misses, in words."""
    bars = {
        f"ES must be at least .99, got {last.es:.4f}": last.es >= 0.99,
        f"ERR must be at least .95, got {last.err:.4f}": last.err >= 0.95,
        f"TRR may fall by .01, it fell by {1 - last.trr:.4f}": last.trr >= 0.99,
        f"keys must be fewer than edits, got {last.keys} for {last.edits}": last.keys < last.edits,
        f"verify must find every edit, broken are {verified.broken}": verified.ok,
    }
    return [failure for failure, passed in bars.items() if not passed]


def _sizes(known: Mistakes) -> dict[str, int]:
    return {name: len(part) for name, part in vars(known.dealt.splits).items()}


def _say_data(out: Screen, known: Mistakes) -> None:
    """Say where docstrings, edits, layer and epsilon come from."""
    sizes, task = _sizes(known), known.task
    out.say(
        f"{known.dealt.found} docstrings of {len(MODULES)} stdlib modules of Python "
        f"{platform.python_version()}; {known.dealt.different} differ as the model sees them and "
        f"are in one module only. {sizes['train']} train a linear head on MiniLM, "
        f"{sizes['validation']} are for validation, {sizes['held_out']} are held out."
    )
    names = ("layer", "another module (5 %)", "rewording (median)", "epsilon", "rewordings inside")
    rows = [
        (
            scale.layer,
            *(f"{each:.2f}" for each in (scale.unrelated, scale.reworded, scale.epsilon)),
            f"{scale.inside:.0%}",
        )
        for scale in known.scales
    ]
    out.table("Distances at the middle layers", names, rows, left=("layer",))
    out.say(mistakes.reason(known.chosen))
    out.say(
        f"The model is right on {len(task.unrelated)} held-out docstrings, the unrelated inputs, "
        f"and wrong on {len(task.edits)}: these are the edits, all real mistakes, no repeats."
    )


def _show_points(out: Screen, points: Sequence[Point]) -> None:
    """Print what was measured along the stream."""
    forms = {
        "edits": "{0.edits}",
        "keys": "{0.keys}",
        "ES": "{0.es:.3f}",
        "ERR": "{0.err:.3f}",
        "TRR": "{0.trr:.4f}",
        "hit rate": "{0.hit_rate:.4f}",
        "ms/edit": "{0.edit_ms:.0f}",
        "gf.find us": "{0.find_us:.0f}",
        "cdist rule us": "{0.reference_us:.0f}",
    }
    rows = [[form.format(point) for form in forms.values()] for point in points]
    out.table("The stream of edits", list(forms), rows)
    differ = sum(point.disagreements for point in points)
    out.say(
        "Look-ups: median of one query on one thread. The cdist rule is the reference's, "
        "torch.cdist(query, keys).min(1) and the radius; it decides "
        f"{differ} of {measured.LOOKUPS * len(points)} otherwise."
    )


def _show_examples(out: Screen, examples: Sequence[measured.Example]) -> None:
    """Print single inputs before and after all edits."""
    rows = []
    for one in examples:
        text = one.text if len(one.text) <= SHOWN else one.text[: SHOWN - 3] + "..."
        after = f"{one.after}, bit for bit" if one.bit_for_bit else one.after
        rows.append((one.what, text, one.wanted, one.before, after))
    names = ("input", "docstring", "of module", "before", "after all edits")
    out.table("Before and after", names, rows, left=names)


def _say_end(out: Screen, figures: dict[str, Any], output: Path) -> None:
    last, final, verify = figures["points"][-1], figures["final"], figures["verify"]
    out.say(
        f"{last['edits']} edits on {last['keys']} keys: ES {last['es']:.3f}, "
        f"ERR {final['err']:.3f}. TRR was 1 and is {final['trr']:.4f}; {final['unchanged']:.2%} of "
        f"the unrelated inputs get the same logits bit for bit. {figures['seconds']:.0f} s on "
        f"{figures['machine']['cpu']}, one thread."
    )
    out.say(
        f"verify of the saved codebook: {verify['fires']} edits fire, {verify['superseded']} are "
        f"superseded by a later edit, {len(verify['broken'])} are broken."
    )
    out.say(f"Written to {output}: codebook/, demo.json, demo.png.")
    for failure in figures["failures"]:
        out.say(f"MISSED: {failure}")


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Write one picture: ERR and TRR above, edits and keys below, over the number of edits."""
    figure, (rates, keys) = panels(2, 1, (7.5, 6.0), sharex=True, height_ratios=(3, 2))
    edits = [point.edits for point in points]
    err, trr = [point.err for point in points], [point.trr for point in points]
    rates.plot(edits, err, "o-", color="#0072b2", label="ERR: past edits answered right")
    rates.plot(edits, trr, "s--", color="#d55e00", label="TRR: unrelated inputs still right")
    rates.set_ylim(min(0.9, *(rate - 0.02 for rate in (*err, *trr))), 1.005)
    rates.set_ylabel("share of inputs")
    rates.legend(loc="lower left", frameon=False)
    keys.plot(edits, edits, ":", color="0.5", label="one key an edit")
    keys.plot(edits, [point.keys for point in points], "^-", color="#009e73", label="keys")
    keys.set(ylim=(0, None), xlim=(0, None), xlabel="edits", ylabel="keys in the codebook")
    keys.legend(loc="upper left", frameon=False)
    figure.suptitle(printable.for_plot(title), fontsize=10)
    figure.savefig(path, dpi=150)
