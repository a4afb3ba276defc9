"""Commands that look at a codebook: its edits, its page, whether it is sound; and its repair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import grace_fast as gf
from grace_fast.edits import verify as replays
from grace_fast.edits.edit import Edit
from grace_fast.store import repair as repairing
from grace_fast.store.files import read_config
from grace_fast.store.salvage import Repaired
from grace_fast.store.saved import read_newest
from grace_fast.tools.cli.command import (
    FAILED,
    LOST,
    Json,
    KeyFile,
    Saved,
    answer,
    command,
    fail,
    read_key,
    typer,
)
from grace_fast.tools.terminal import say, say_json, table


@command()
def info(directory: Saved, as_json: Json = False) -> None:
    """List the edits of a codebook: radii, hits, and the text where it was stored."""
    saved, book, history = read_newest(directory)
    listed = list(history.edits.values())
    if as_json:
        rows = [_edit_fields(edit, saved.hits) for edit in listed]
        settings = saved.config["settings"]
        say_json({"settings": settings, "keys": len(book), "edits": rows})
        return
    say(f"{directory}: {len(listed)} edits on {len(book)} keys at {saved.settings.layer}")
    edit_table(listed, saved.hits)


def _edit_fields(edit: Edit, hits: Mapping[int, int]) -> dict[str, Any]:
    # The distance of the first is infinite.
    names = ("id", "outcome", "row", "radius", "distance", "loss", "correct")
    text = None if edit.text is None else list(edit.text)
    told = {name: getattr(edit, name) for name in names}
    return told | {"hits": hits.get(edit.row, 0), "text": text}


def edit_table(edits: Iterable[Edit], hits: Mapping[int, int]) -> None:
    """Print edits, one a line."""
    columns = ("edit", "outcome", "row", "radius", "distance", "loss", "right", "hits", "text")
    rows = [
        (
            edit.id,
            edit.outcome,
            edit.row,
            f"{edit.radius:.4g}",
            f"{edit.distance:.4g}",
            f"{edit.loss:.3g}",
            "yes" if edit.correct else "no",
            hits.get(edit.row, 0),
            "" if edit.text is None else f"{edit.text[0]} -> {edit.text[1]}",
        )
        for edit in edits
    ]
    table(columns, rows)


@command()
def report(
    directory: Saved,
    out: Annotated[
        Path, typer.Option(help="Where the page goes, a name in .html; in place of one there.")
    ] = Path("report.html"),
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page of a codebook: edits, hits, radii, conflicts, a map, epsilon."""
    key = read_key(key_file)
    from grace_fast.tools.report import write

    figures = write(directory, out, key)
    answer(figures, f"{out}: {figures['edits']} edits on {figures['keys']} keys", as_json)


@command()
def verify(
    directory: Saved,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop what cannot be trusted, and list it.")
    ] = False,
    keep_rows: Annotated[
        bool, typer.Option("--keep-rows", help="With --repair: rows stay whose edits are lost.")
    ] = False,
    max_radius: Annotated[
        float | None, typer.Option(help="With --repair: no ball may be wider.")
    ] = None,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Check every checksum of a codebook and look every stored query up again.

    With --repair it ends with 0 where nothing was lost, and with 3 where something was.
    """
    key = read_key(key_file)
    if repair:
        _tell_repair(
            repairing.repair(directory, hmac_key=key, max_radius=max_radius, keep_rows=keep_rows),
            directory,
            as_json,
        )
    elif keep_rows or max_radius is not None:
        fail("--keep-rows and --max-radius need --repair")
    elif "settings" in read_config(directory):
        _verify_edits(directory, key, as_json)
    else:
        _verify_files(directory, key, as_json)


def _verify_edits(directory: Path, key: bytes | None, as_json: bool) -> None:
    saved, book, history = read_newest(directory, key)
    verification = replays.verify(history, book, saved.settings.rules(book.dtype))
    fires, superseded = len(verification.fires), verification.superseded
    if as_json:
        figures = {"ok": verification.ok, "fires": fires, "superseded": superseded}
        say_json(figures | {"broken": verification.broken})
    else:
        say(
            f"{fires} edits fire, {len(superseded)} are superseded, "
            f"{len(verification.broken)} are broken"
        )
        for old, new in superseded.items():
            say(f"edit {old} is superseded by edit {new}")
    if not verification.ok:
        say(f"broken: edits {verification.broken}", err=True)
        raise typer.Exit(FAILED)


def _verify_files(directory: Path, key: bytes | None, as_json: bool) -> None:
    """Verify a directory that holds a codebook alone, without a model's edits."""
    try:
        keys = len(gf.Codebook.open(directory, verify=True, hmac_key=key))
    except TypeError as error:  # of an element type that is none
        fail(str(error))
    said = f"{keys:,} keys and their values are as they were saved"
    answer({"ok": True, "keys": keys}, said, as_json)


def _tell_repair(done: Repaired, directory: Path, as_json: bool) -> None:
    if as_json:
        figures = {"was_sound": done.was_sound, "kept": done.kept, "made_again": done.made_again}
        say_json(figures | {"dropped": [asdict(each) for each in done.dropped]})
    elif done.was_sound:
        say(f"{directory} is sound; nothing was changed")
    else:
        say(f"{directory} is sound again; as it was it lies in {done.kept}")
        for each in done.made_again:
            say(f"made again: {each}")
        if done.dropped:
            rows = [
                (one.what, "" if one.number is None else one.number, one.why)
                for one in done.dropped
            ]
            table(("dropped", "number", "why"), rows)
    if done.dropped:
        raise typer.Exit(LOST)
