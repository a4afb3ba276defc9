"""The command that edits a model with the lines of a file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import grace_fast as gf
from grace_fast import errors
from grace_fast.codebook.printable import listed
from grace_fast.editor import prompts
from grace_fast.edits.edit import Edit
from grace_fast.tools import textfiles
from grace_fast.tools.cli.command import FAILED, Json, Replacement, Strict, command, fail, typer
from grace_fast.tools.cli.looking import edit_table
from grace_fast.tools.terminal import say, say_json, ticking
from grace_fast.tools.textfiles import Record


@command(also=(TypeError,))
def edit(
    model: Annotated[str, typer.Argument(help="A transformers model: a directory or a hub name.")],
    layer: Annotated[str, typer.Option(help="Dotted name of the layer to edit.")],
    edits: Annotated[
        Path,
        typer.Option(
            help='JSON lines {"prompt": ..., "target": ...}, a JSON array, or CSV. Chat has '
            'messages in place of a prompt; "joint" is what stands between prompt and target.'
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for the codebook.")],
    epsilon: Annotated[float, typer.Option(help="Radius of a new key.")] = 1.0,
    replacement: Replacement = "replace_prompt",
    iterations: Annotated[int, typer.Option(help="Most training steps of one edit.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Of Adam on the value.")] = 1.0,
    value_init: Annotated[str, typer.Option(help="cold or warm.")] = "cold",
    store_text: Annotated[
        bool, typer.Option(help="Keep prompts and targets beside the codebook.")
    ] = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Edit a model with every line of a file and save the codebook.

    A line that cannot be edited is named and left out, and the command ends with code 1.
    """
    refused: list[Record] = []
    wanted = read_edits(edits, refused, strict)
    if any("messages" in record for record in wanted):
        errors.require("a chat template", "jinja2")
    _require_writable(out)
    loaded, tokenizer = load_model(model)
    grace = gf.attach(
        loaded,
        layer,
        tokenizer=tokenizer,
        epsilon=epsilon,
        replacement=replacement,  # type: ignore[arg-type]  # it is checked there
        iterations=iterations,
        learning_rate=learning_rate,
        value_init=value_init,  # type: ignore[arg-type]
        store_text=store_text,
    )
    made, failed = _make(grace, wanted, edits, strict)
    _tell(failed)
    if not made or (failed and strict):
        fail("no codebook was saved")
    verification = grace.verify()
    grace.save_pretrained(out)
    refused += failed
    wrong = [report.id for report in made if not report.correct]
    if as_json:
        say_json(
            {
                "edits": len(made),
                "keys": len(grace.codebook),
                "not_learnt": wrong,
                "refused": [record.wrong for record in refused],
                "broken": verification.broken,
                "superseded": len(verification.superseded),
                "out": out,
            }
        )
    else:
        edit_table(made, {})
        say(f"{len(made)} edits on {len(grace.codebook)} keys saved to {out}")
        if refused:
            say(f"left out: {listed(record.place for record in refused)} of {edits}", err=True)
        if wrong:
            say(f"not learnt: edits {wrong}; try more iterations or another layer", err=True)
    if wrong or refused or not verification.ok:
        raise typer.Exit(FAILED)


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


def _make(
    grace: gf.Grace, wanted: list[Record], file: Path, strict: bool
) -> tuple[list[Edit], list[Record]]:
    """Make the edits of a file; return them, and those that failed: one at most where strict."""
    made, failed = list[Edit](), list[Record]()
    for record in ticking(wanted, "edits", "edit"):
        prompt = record["messages"] if "messages" in record else record["prompt"]
        try:
            made.append(grace.edit(prompt, record["target"], joint=record.get("joint")))
        except ImportError:
            raise
        except Exception as error:  # of the model, its tokenizer or the record: the next goes on
            # By its kind where the words of the error alone say little.
            is_ours = isinstance(error, ValueError | TypeError)
            why = str(error) if is_ours else f"{type(error).__name__}: {error}"
            record.wrong = f"{file}, {record.place}: {why}"
            failed.append(record)
            if strict:
                break
    return made, failed


def _tell(refused: Iterable[Record]) -> None:
    for record in refused:
        say(f"error: {record.wrong}", err=True)


def read_edits(
    path: Path, refused: list[Record] | None = None, strict: bool = False
) -> list[Record]:
    """Return the edits of a file, and say what is wrong with its other records.

    refused: takes up those, with what is wrong; strict: end the command where there are any, not
    only where there is nothing else.
    """
    try:
        found = textfiles.read(path)
    except (OSError, ValueError) as error:
        fail(f"cannot read the edits: {error}")
    for record in found:
        if why := _odd_edit(record):
            record.wrong = f"{path}, {record.place} {why}"
    odd = [record for record in found if record.wrong]
    _tell(odd)
    if not found:
        fail(f"{path} holds no edits")
    if odd and (strict or len(odd) == len(found)):
        fail("nothing was edited")
    if refused is not None:
        refused.extend(odd)
    return [record for record in found if not record.wrong]


def _odd_edit(record: Record) -> str:
    """Return why a record is no edit, as it follows its place; "" where it is one."""
    if record.wrong:
        return record.wrong
    # Records of one table have all of its fields: those that say nothing are left empty.
    if record.get("joint", "") is None:
        del record["joint"]
    for name, other in (("messages", "prompt"), ("prompt", "messages")):
        if record.get(name, 0) in (None, "", []) and other in record:
            del record[name]
    if "target" not in record:
        return f"must be an object with a prompt and a target, got {sorted(record)}"
    if "prompt" not in record and "messages" not in record:
        return f"must have a prompt or messages, got {sorted(record)}"
    if not isinstance(record.get("joint", ""), str):
        return f"must have a text as its joint, got {textfiles.brief(record['joint'])}"
    if not isinstance(record.get("messages", []), list):
        return f"must have a list as its messages, got {textfiles.brief(record['messages'])}"
    try:
        prompts.one_prompt(record["messages"] if "messages" in record else record["prompt"])
        target = prompts.one_target(record["target"])
    except (ValueError, TypeError) as error:
        return f"has no edit: {error}"
    if target is None or not str(target).strip():
        return f"has no target: it must be a text or a number, got {target!r}"
    prompt = record.get("prompt", "messages")
    return "" if str(prompt).strip() else f"has no prompt: got {prompt!r}"


def _require_writable(out: Path) -> None:
    """Find out before the work whether its end can be kept."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        fail(f"{out} cannot be written: {place} is no directory")
    if not os.access(place, os.W_OK | os.X_OK):
        fail(f"{out} cannot be written: nobody but its owner may write to {place}")
