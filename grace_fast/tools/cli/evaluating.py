"""Commands that measure editing itself: the demo, evaluations, calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from grace_fast.tools.cli.command import FAILED, Json, Replacement, Strict, command, fail, typer
from grace_fast.tools.cli.editing import load_model
from grace_fast.tools.terminal import say, say_json


@command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the codebook, table and plot go.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the classifier and the order of edits.")] = 0,
    as_json: Json = False,
) -> None:
    """Repair the real mistakes of a real model, offline, and show what it cost."""
    from grace_fast.tools.demo import run

    figures = run(out, seed=seed, as_json=as_json)
    if as_json:
        say_json(figures)
    if not figures["passed"]:
        raise typer.Exit(FAILED)


@command(also=(LookupError,))
def evaluate(
    name: Annotated[
        str,
        typer.Argument(
            help="facts, labels or fabrications (offline); zsre, scotus or hallucination (files)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where state, table and plots go.")] = Path(
        "evaluation-output"
    ),
    seed: Annotated[int, typer.Option(help="Of the data, the training and the resamples.")] = 0,
    every: Annotated[int | None, typer.Option(help="Edits between measurements.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="By default calibrated.")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Fine-tuning, retraining, the reference's rule.")
    ] = False,
    sweep: Annotated[
        int, typer.Option(help="Epsilons to try on the whole stream beside the calibrated one.")
    ] = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget a run that was interrupted or ended.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Trained models; by default $XDG_CACHE_HOME/grace_fast."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with the files of zsre, scotus or hallucination.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Stream edits into a model and measure what lasts, generalises and disturbs nothing."""
    from grace_fast.tools.evaluate import Options, run

    options = Options(seed, every, epsilon, baselines, sweep, restart, as_json=as_json)
    figures = run(name, out, options, cache, data)
    if as_json:
        say_json(figures)
    if figures["broken"]:
        raise typer.Exit(FAILED)


@command(also=(LookupError,))
def calibrate(
    model: Annotated[
        str,
        typer.Argument(help="A transformers model, or facts, labels or fabrications."),
    ],
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Dotted name; {} for every block. May be given more than once."),
    ] = None,
    edits: Annotated[
        Path | None,
        typer.Option(help='JSON lines: {"prompt": ..., "target": ..., "paraphrases": [...]}.'),
    ] = None,
    unrelated: Annotated[Path | None, typer.Option(help='JSON lines: {"prompt": ...}.')] = None,
    replacement: Replacement = "replace_prompt",
    budget: Annotated[
        float, typer.Option(help="Share of unrelated inputs that may be disturbed.")
    ] = 0.01,
    tries: Annotated[
        int,
        typer.Option(min=0, help="Edits to try at each layer; 0: go by the distances alone."),
    ] = 8,
    plot: Annotated[Path | None, typer.Option(help="Where the trade-off is drawn, a PNG.")] = None,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Where trained models are kept.")] = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Find layer and epsilon from a sample of edits, and say how sure they are.

    Ends with code 1 where too few edits can be learnt at any of the layers, or a line of a file is
    wrong: it is named and left out.
    """
    from grace_fast.tools.evaluate import OFFLINE, given, load, report_calibration

    refused: list[str] = []
    if model in OFFLINE:
        task = load(model, seed, cache, None, progress=True)
    else:
        if not layer or edits is None or unrelated is None:
            fail("calibrating a model needs --layer, --edits and --unrelated")
        sample = given.sample(edits, unrelated, None if strict else refused)
        for why in refused:
            say(f"error: {why}", err=True)
        task = given.task(*load_model(model), sample, layer, replacement, budget)
    found = report_calibration(task, plot, seed, as_json, tries)
    if as_json:
        say_json({**found, "refused": refused})
    if refused or not found["learnable"]:
        raise typer.Exit(FAILED)
