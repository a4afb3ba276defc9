"""Commands on the versions of a codebook, and for carrying it elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from grace_fast.store import archive
from grace_fast.store.files import steadily
from grace_fast.store.saved import Offline, Saved, read_saved
from grace_fast.store.versions import difference, journal_of
from grace_fast.tools.cli import command as shared
from grace_fast.tools.cli.command import Editable, Json, answer, command, typer
from grace_fast.tools.terminal import say, say_json, table


@command()
def log(directory: Editable, as_json: Json = False) -> None:
    """List the versions of a codebook since it was compacted last."""
    saved, entries = steadily(directory, lambda: _versions(directory))
    if as_json:
        named = [dict(zip(("version", "time", "kind"), each, strict=True)) for each in entries]
        say_json({"base": saved.base, "versions": named})
        return
    say(f"{directory}: {len(entries)} versions after version {saved.base}, the base")
    rows = [(number, _when(seconds), kind) for number, seconds, kind in entries]
    table(("version", "time", "kind"), rows)


def _versions(directory: Path) -> tuple[Saved, list[tuple[int, float, str]]]:
    saved = read_saved(directory)
    journal = journal_of(saved.path, saved.config)
    if journal is None:
        raise ValueError(
            f"{directory} has no versions: it was saved, and not attached with path= since"
        )
    with closing(journal):
        return saved, [(each.version, each.time, each.kind) for each in journal.entries()]


def _when(seconds: float) -> str:
    """Return a time as it was written; one that no calendar has as the number it is."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return f"{seconds!r}"


@command()
def diff(
    directory: Editable,
    old: Annotated[int, typer.Argument(help="A version, as `log` lists them.")],
    new: Annotated[int | None, typer.Argument(help="By default the newest.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a version has otherwise than an earlier one."""

    def two_versions() -> list[Any]:
        saved = read_saved(directory)
        return [saved.codebook(version=old), saved.codebook(version=new)]

    (one, edits), (other, later) = steadily(directory, two_versions)
    found = difference((one.snapshot(), edits), (other.snapshot(), later))
    if as_json:
        say_json(asdict(found))
        return
    say(f"edits made: {found.made}")
    say(f"edits undone: {found.undone}")
    say(f"rows added: {found.added}")
    say(f"rows removed: {found.removed}")
    say(f"rows with other values: {found.values}")
    for row, (before, after) in found.radii.items():
        say(f"row {row}: radius {before:.6g} -> {after:.6g}")


@command()
def checkout(
    directory: Editable,
    to: Annotated[int, typer.Argument(metavar="VERSION", help="As `log` lists them.")],
    as_json: Json = False,
) -> None:
    """Go back to an earlier version, in a new version that can itself be taken back."""
    figures = _change(directory, lambda offline: offline.checkout(to))
    said = f"version {figures['version']} decides as version {to}: {figures['keys']} keys"
    answer(figures, said, as_json)


@command()
def compact(directory: Editable, as_json: Json = False) -> None:
    """Make the newest version the base; earlier versions go, every edit stays."""
    figures = _change(directory, Offline.compact)
    said = f"version {figures['version']} is the base of {directory}: {figures['keys']} keys"
    answer(figures, said, as_json)


def _change(directory: Path, way: Callable[[Offline], None]) -> dict[str, int]:
    """Change a codebook without its model; return its version and the number of its keys."""
    with closing(Offline(directory)) as offline:
        way(offline)
        return {"version": offline.book.version, "keys": len(offline.book)}


@command("export")
def export_(
    directory: shared.Saved,
    file: Annotated[Path, typer.Argument(help="One file that does not exist yet.")],
    as_json: Json = False,
) -> None:
    """Write a codebook and its edits to one file, to be carried elsewhere."""
    edits = archive.pack(directory, file)
    answer({"edits": edits, "out": str(file)}, f"{edits} edits in {file}", as_json)


@command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file that `export` wrote.")],
    directory: Annotated[Path, typer.Argument(help="Absent or empty.")],
    as_json: Json = False,
) -> None:
    """Make a directory of a file that was exported, once all of it was tested."""
    edits = archive.unpack(file, directory)
    answer({"edits": edits, "out": str(directory)}, f"{edits} edits in {directory}", as_json)
