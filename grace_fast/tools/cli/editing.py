"""The command that edits a model with the lines of a file."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import grace_fast as gf
from grace_fast import errors
from grace_fast.codebook.printable import listed
from grace_fast.editor import calibrate
from grace_fast.edits.settings import Settings
from grace_fast.store import files
from grace_fast.store.saved import read_saved
from grace_fast.tools import textfiles
from grace_fast.tools.cli.command import CANNOT_BEGIN, Json, command, fail, typer
from grace_fast.tools.cli.edit_file import read_edits
from grace_fast.tools.cli.edit_run import Run, items_of
from grace_fast.tools.textfiles import Record

# By the field of the settings that they give.
FLAGS = {
    "layer": "--layer",
    "epsilon": "--epsilon",
    "replacement": "--replacement",
    "iterations": "--iterations",
    "learning_rate": "--learning-rate",
    "value_init": "--value-init",
    "store_text": "--store-text",
}
SCHEDULES = ("paper", "fast")
# What `--schedule` has no say in; every other field of the settings is part of it.
NOT_OF_A_SCHEDULE = {
    *("layer", "epsilon", "semantics", "replacement", "expand", "expand_margin"),
    *("query", "store_text", "max_radius"),
}


@dataclass(frozen=True)
class Options:
    """Options of `grace-fast edit`; None where one was left out that a directory may answer."""

    model: Annotated[str, typer.Argument(help="A transformers model: a directory or a hub name.")]
    layer: Annotated[str, typer.Option(help="Dotted name of the layer to edit.")]
    edits: Annotated[
        Path,
        typer.Option(
            help='JSON lines {"prompt": ..., "target": ...}, a JSON array, or CSV. Chat has '
            'messages in place of a prompt; "joint" is what stands between prompt and target; '
            '"paraphrases" are edited, too.'
        ),
    ]
    out: Annotated[
        Path,
        typer.Option(
            help="Directory of the codebook; what is there already is gone on with. An edit that "
            "was undone there, or a line that was left out, is tried again."
        ),
    ]
    epsilon: Annotated[
        str | None,
        typer.Option(help="Radius of a new key, by default 1; auto: measured on --unrelated."),
    ] = None
    unrelated: Annotated[
        Path | None,
        typer.Option(
            help='With --epsilon auto: at least 8 texts, one a line, or JSON lines {"prompt": ...}.'
        ),
    ] = None
    replacement: Annotated[
        str | None,
        typer.Option(help="replace_prompt (the default), replace_last or replace_all."),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(help="Training of a value: paper (the default), or fast, in fewer steps."),
    ] = None
    iterations: Annotated[
        int | None, typer.Option(help="Most training steps of one edit; 100 in the paper schedule.")
    ] = None
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the value; 1 in the paper schedule.")
    ] = None
    value_init: Annotated[
        str | None, typer.Option(help="cold (that of the paper schedule) or warm.")
    ] = None
    batch_size: Annotated[
        str, typer.Option(help="Edits that are trained at once: a number, or auto.")
    ] = "auto"
    store_text: Annotated[
        bool | None, typer.Option(help="Keep prompts and targets beside the codebook.")
    ] = None
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the edits that --out holds, and begin anew.")
    ] = False
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop at the first line that cannot be edited; before all others where that can "
            "be told without the model.",
        ),
    ] = False
    as_json: Json = False

    @property
    def is_measured(self) -> bool:
        """Whether epsilon is to be measured."""
        return self.epsilon == "auto"

    @property
    def at_once(self) -> int | Literal["auto"]:
        """How many edits are trained at once."""
        return "auto" if self.batch_size == "auto" else int(self.batch_size)

    def check(self) -> None:
        """End the command where its options are wrong by themselves."""
        if self.epsilon is not None and not self.is_measured and not _is_number(self.epsilon):
            _wrong_call(f"--epsilon must be a number or auto, got {self.epsilon!r}")
        if self.schedule not in (None, *SCHEDULES):
            _wrong_call(f"--schedule must be one of {listed(SCHEDULES)}, got {self.schedule!r}")
        size = self.batch_size
        if size != "auto" and not (re.fullmatch("[0-9]{1,9}", size) and int(size)):
            _wrong_call(f"--batch-size must be a whole number from 1, or auto, got {size!r}")
        if self.is_measured and self.unrelated is None:
            _wrong_call("--epsilon auto needs --unrelated FILE: texts that no edit is about")
        if self.unrelated is not None and not self.is_measured:
            _wrong_call("--unrelated is what --epsilon auto is measured on; give both, or neither")

    def settings(self) -> dict[str, Any]:
        """Return the fields of `Settings` that were given; an epsilon that is measured is none."""
        found: dict[str, Any] = {name: getattr(self, name) for name in FLAGS}
        found["epsilon"] = None if self.is_measured or not self.epsilon else float(self.epsilon)
        return {name: value for name, value in found.items() if value is not None}

    def refuse_others(self, stored: Settings, wanted: Settings) -> None:
        """Refuse to go on in a directory that was begun with other settings than are given.

        wanted: what a directory would be begun with now.

        Raises: ValueError naming both.
        """
        given = self.settings()
        options = {name: flag for name, flag in FLAGS.items() if name in given}
        if self.schedule is not None:
            every = {field.name for field in fields(Settings)} - NOT_OF_A_SCHEDULE - given.keys()
            options |= dict.fromkeys(sorted(every), f"--schedule {self.schedule}")
        for name, flag in options.items():
            old, new = getattr(stored, name), getattr(wanted, name)
            if old != new:
                keep = f"--layer {old}" if name == "layer" else f"leave {flag} out"
                raise ValueError(
                    f"{self.out} was begun with {name} = {old!r}, and {flag} now says {new!r}: "
                    f"{keep} to go on there, or forget its edits with --restart"
                )


@command(also=(TypeError,))
def edit(options: Options) -> None:
    """Edit a model with every line of a file; each edit is on the disk once it is made.

    The same command goes on where it was interrupted: lines whose edits the codebook has are
    skipped. A line that cannot be edited is named and left out, and the command ends with code 1.
    """
    options.check()
    bad: list[Record] = []
    wanted = read_edits(options.edits, bad, options.strict)
    if any("messages" in record for record in wanted):
        errors.require("a chat template", "jinja2")
    _require_writable(options.out)
    places, wrong = [record.place for record in bad], [record.wrong for record in bad]
    run = Run(options.edits, options.out, items_of(wanted), places, wrong, options.restart)
    try:
        _make(run, options)
    except KeyboardInterrupt:
        run.interrupted = True
    if run.earlier is not None and (run.interrupted or run.stopped):
        with suppress(KeyboardInterrupt):  # who is in a hurry is told what is known without it
            run.recount()
    run.tell(options.as_json)


def _make(run: Run, options: Options) -> None:
    """Load the model and make the edits of a run."""
    goes_on = files.holds_codebook(run.out) and not options.restart
    stored = read_saved(run.out).settings if goes_on else None
    texts = None if goes_on or options.unrelated is None else _texts(options.unrelated)
    model, tokenizer = load_model(options.model)
    how = options.settings()
    if options.schedule is not None:
        how["schedule"] = options.schedule
    probe = gf.attach(model, tokenizer=tokenizer, **how)
    try:
        if stored is not None:
            options.refuse_others(stored, probe.settings)
        run.sign(probe, "paper" if stored is None else stored.semantics)
    finally:
        probe.unload()
    if options.strict and any(item.wrong for item in run.items):
        fail("nothing was edited")
    if texts is not None:
        how |= {"epsilon": "auto", "calibration_inputs": texts}
    if options.restart:
        how["restart"] = True
    grace = gf.attach(model, tokenizer=tokenizer, path=run.out, **how)
    try:
        run.make(grace, options.at_once, options.strict)
    finally:
        grace.unload()


def _wrong_call(why: str) -> NoReturn:
    fail(why, CANNOT_BEGIN)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _texts(file: Path) -> list[str]:
    """Return the texts of a file that epsilon is measured on, as many as that takes."""
    try:
        found = textfiles.texts(file)
    except (OSError, ValueError) as error:
        fail(f"cannot read the unrelated texts: {error}")
    odd = [f"{file}, {record.place} {record.wrong}" for record in found if record.wrong]
    if odd:
        more = f" (and {len(odd) - 1:,} more lines are wrong)" if len(odd) > 1 else ""
        fail(f"epsilon cannot be measured: {odd[0]}{more}")
    least = calibrate.CALIBRATION_INPUTS
    if len(found) < least:
        fail(f"--epsilon auto needs at least {least} unrelated texts, {file} holds {len(found)}")
    return [record["prompt"] for record in found]


def load_model(name: str) -> tuple[Any, Any]:
    """Return a transformers model, of the class its config names, and its tokenizer.

    name: a directory, or a name on the hub.
    """
    errors.require("editing a model", "transformers")
    import transformers

    try:
        # A stranger's directory may hold code: it is refused rather than asked about.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if named is None:
            fallback = transformers.AutoModelForCausalLM
            named = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else fallback
        return named.from_pretrained(name).eval(), tokenizer
    except ImportError:
        raise
    except Exception as error:  # readers of its files have errors of their own kinds
        fail(f"cannot load the model {name!r}: {' '.join(str(error).split())}")


def _require_writable(out: Path) -> None:
    """Find out before the work whether its end can be kept."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        fail(f"{out} cannot be written: {place} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        fail(f"{out} cannot be written: nobody but its owner may write to {place}")
