"""The demo from end to end: prepare, stream the edits, show, save, verify."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import grace_fast as gf
from grace_fast.tools.demo import calibration, report, stream
from grace_fast.tools.demo.calibration import Scale
from grace_fast.tools.demo.data import MODULES, PER_MODULE, REWORDINGS
from grace_fast.tools.demo.examples import Generality, example, generality
from grace_fast.tools.demo.prepare import Prepared, bar, calibrate, prepare
from grace_fast.tools.demo.stream import Final, HeldOut, Point
from grace_fast.tools.threads import one_thread

POINTS = 6  # measurements along the stream


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
    # On a machine that is busy, two threads that wait for each other are slower than one.
    with one_thread():
        return _run(Path(output), seed, progress, as_json, per_module)


def _run(output: Path, seed: int, progress: bool, as_json: bool, per_module: int) -> dict[str, Any]:
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    out = report.console(silent=as_json)
    prepared = prepare(seed, per_module, progress)
    _say_data(out, prepared)
    scales, chosen = calibrate(prepared, progress)
    report.scales_table(out, scales)
    report.say(out, calibration.reason(chosen))
    held_out = _held_out(prepared, chosen.layer)
    _say_stream(out, held_out)
    measured = _edit_all(prepared, held_out, chosen, output / "codebook", progress, out)
    verified = _verify_saved(prepared, output / "codebook")
    failures = missed(measured["points"][-1], measured["final"], verified)
    figures = {
        "passed": not failures,
        "failures": failures,
        "seed": seed,
        "machine": {
            "cpu": report.cpu_name(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "grace_fast": gf.__version__,
        },
        "docstrings": {name: len(part) for name, part in prepared.inputs.items()},
        "held_out_accuracy": len(held_out.right) / len(held_out.inputs),
        "layers": [asdict(scale) for scale in scales],
        "layer": chosen.layer,
        "epsilon": chosen.epsilon,
        **measured,
        "points": [asdict(point) for point in measured["points"]],
        "final": asdict(measured["final"]),
        "verify": {
            "ok": verified.ok,
            "fires": len(verified.fires),
            "superseded": len(verified.superseded),
            "broken": list(verified.broken),
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    edits = len(held_out.wrong)
    title = f"GRACE on MiniLM: {edits} real mistakes edited away ({report.cpu_name()})"
    report.draw(measured["points"], output / "demo.png", title)
    (output / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    _say_end(out, figures, output)
    return figures


def _edit_all(
    prepared: Prepared,
    held_out: HeldOut,
    chosen: Scale,
    codebook: Path,
    progress: bool,
    out: Console,
) -> dict[str, Any]:
    """Edit the mistakes away, show what that did, save the codebook and detach it."""
    docs = prepared.splits.held_out
    grace = gf.attach(prepared.model, layer=chosen.layer, epsilon=chosen.epsilon)
    try:
        with bar("edits", len(held_out.wrong), progress) as ticks:
            points = stream.run(grace, held_out, POINTS, ticks)
        report.points_table(out, points)
        _say_lookups(out, points)
        final = stream.finish(grace, held_out)
        reworded = generality(grace, [docs[at] for at in held_out.wrong], prepared.encode)
        other = example(grace, "unrelated", docs[held_out.right[0]], prepared.encode)
        shown = [*reworded.shown, other]
        report.examples_table(out, shown)
        _say_generality(out, reworded)
        grace.save_pretrained(codebook)
        return {
            "points": points,
            "final": final,
            "outcomes": dict(Counter(edit.outcome for edit in grace.edits())),
            "rewordings": {"wrong": reworded.wrong_before, "repaired": reworded.right_after},
            "examples": [asdict(one) for one in shown],
        }
    finally:
        grace.unload()


def missed(last: Point, final: Final, verified: gf.Verification) -> list[str]:
    """Return which bars the end of the stream misses, in words."""
    bars = {
        f"ES must be at least .99, got {last.es:.4f}": last.es >= 0.99,
        f"ERR must be at least .95, got {final.err:.4f}": final.err >= 0.95,
        f"TRR may fall by .01, it fell by {1 - final.trr:.4f}": final.trr >= 0.99,
        f"keys must be fewer than edits, got {last.keys} for {last.edits}": last.keys < last.edits,
        f"verify must find every edit, broken are {verified.broken}": verified.ok,
    }
    return [failure for failure, passed in bars.items() if not passed]


def _held_out(prepared: Prepared, layer: str) -> HeldOut:
    """Return what the model said of the held-out inputs before any edit."""
    inputs, features = prepared.inputs["held_out"], prepared.features["held_out"]
    right = features.logits.argmax(dim=1) == inputs.labels
    return HeldOut(
        inputs,
        features.logits,
        features.queries[layer],
        wrong=(~right).nonzero()[:, 0].tolist(),
        right=right.nonzero()[:, 0].tolist(),
    )


def _verify_saved(prepared: Prepared, path: Path) -> gf.Verification:
    """Replay every edit on the codebook as it was written."""
    grace = gf.from_pretrained(prepared.model, path)
    try:
        return grace.verify()
    finally:
        grace.unload()


def _say_data(out: Console, prepared: Prepared) -> None:
    sizes = {name: len(part) for name, part in prepared.inputs.items()}
    report.say(
        out,
        f"{prepared.found} docstrings of {len(MODULES)} stdlib modules of Python "
        f"{platform.python_version()}; {prepared.different} differ as the model sees them and are "
        f"in one module only. {sizes['train']} train a linear head on MiniLM, "
        f"{sizes['validation']} are for validation, {sizes['held_out']} are held out.",
    )


def _say_stream(out: Console, held_out: HeldOut) -> None:
    report.say(
        out,
        f"The model is right on {len(held_out.right)} held-out docstrings, the unrelated inputs, "
        f"and wrong on {len(held_out.wrong)}: these are the edits, all real mistakes, no repeats.",
    )


def _say_lookups(out: Console, points: list[Point]) -> None:
    differ, asked = sum(point.disagreements for point in points), stream.LOOKUPS * len(points)
    report.say(
        out,
        "Look-ups: median of one query on one thread. The cdist rule is the reference's, "
        "torch.cdist(query, keys).min(1) and the radius; it decides "
        f"{differ} of {asked} otherwise.",
    )


def _say_generality(out: Console, reworded: Generality) -> None:
    report.say(
        out,
        f"Of {reworded.wrong_before} rewordings of edited texts ({', '.join(REWORDINGS)}) that "
        f"were wrong before, {reworded.right_after:.0%} are right now; above is the first one.",
    )


def _say_end(out: Console, figures: dict[str, Any], output: Path) -> None:
    last, final, verify = figures["points"][-1], figures["final"], figures["verify"]
    report.say(
        out,
        f"{last['edits']} edits on {last['keys']} keys: ES {last['es']:.3f}, "
        f"ERR {final['err']:.3f}. TRR was 1 and is {final['trr']:.4f}; {final['unchanged']:.2%} of "
        f"the unrelated inputs get the same logits bit for bit. {figures['seconds']:.0f} s on "
        f"{figures['machine']['cpu']}, one thread.",
    )
    report.say(
        out,
        f"verify of the saved codebook: {verify['fires']} edits fire, {verify['superseded']} are "
        f"superseded by a later edit, {len(verify['broken'])} are broken.",
    )
    report.say(out, f"Written to {output}: codebook/, demo.json, demo.png.")
    for failure in figures["failures"]:
        report.say(out, f"MISSED: {failure}")
