"""Versions of a directory: replayed from its journal, gone back to, compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.diff import back
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.history import History
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import files
from grace_fast.store.journal import JournalFile
from grace_fast.store.records import redo
from grace_fast.store.tensor_files import place


def journal_place(folder: Path, config: Mapping[str, Any]) -> tuple[Path, str, int]:
    """Return where the journal that a manifest names is, its name and the version before it.

    Raises: CodebookCorrupt where it is not described.
    """
    entry = config["journal"]
    name = entry.get("name")
    is_named = isinstance(name, str) and entry.get("file") == f"{files.JOURNALS}-{name}.sqlite"
    if not is_named or "version" not in config:
        raise CodebookCorrupt(f"{folder}: the manifest does not describe its journal")
    return place(folder, entry["file"]), name, int(config["version"])


def journal_of(
    folder: Path,
    config: Mapping[str, Any],
    hmac_key: bytes | None = None,
    read_only: bool = True,
) -> JournalFile | None:
    """Return the journal that a manifest names, None where it names none.

    Raises: CodebookCorrupt where it is missing or foreign, OSError where it cannot be read.
    """
    if config.get("journal") is None:
        return None
    return JournalFile(*journal_place(folder, config), hmac_key, read_only)


def replay(
    journal: JournalFile, book: Codebook, history: History, version: int | None = None
) -> None:
    """Take a codebook and its history to a version of the journal, by default the last.

    Raises: CodebookCorrupt where the journal is not what was written; the history is not to be used
    then, and the codebook is as before.
    """
    entries = journal.entries(book.version)
    if version is not None:
        entries = takewhile(lambda entry: entry.version <= version, entries)
    first = next(entries, None)
    if first is None:
        return
    with book.writing() as draft:
        for entry in chain([first], entries):
            try:
                redo(entry.content, draft, history)
            except CodebookCorrupt as error:
                raise CodebookCorrupt(
                    f"{journal.path}: version {entry.version}: {error}",
                    field=error.field,
                    row=error.row,
                ) from error
            draft.version = entry.version


def go_back(book: Codebook, history: History, then: Snapshot, earlier: History) -> None:
    """Publish a version that decides as an earlier one did; ids that were given stay so."""
    with book.locked() as now, history.attempting(), book.writing() as draft:
        back(now, then).apply(draft)
        history.go_back(earlier)


@dataclass(frozen=True)
class Logged:
    """One version of a directory, as the journal has it."""

    version: int
    time: float  # seconds since 1970
    kind: str  # edit, undo, checkout, or rows where no edit was involved
    bytes: int


@dataclass(frozen=True)
class Difference:
    """The difference of two versions of a codebook."""

    added: list[int]  # rows that only the later one has, or that were back
    removed: list[int]  # rows that were live in the earlier one only
    radii: dict[int, tuple[float, float]]  # by row: of the earlier and the later version
    values: list[int]  # rows of both with other values
    made: list[int]  # ids of edits that only the later one has
    undone: list[int]  # ids of edits that only the earlier one has


def difference(one: tuple[Snapshot, History], other: tuple[Snapshot, History]) -> Difference:
    """Return what a version has otherwise than an earlier one of the same directory."""
    (before, old), (after, new) = one, other
    listed = [{*each.live.nonzero()[:, 0].tolist()} for each in (before, after)]
    both = sorted(listed[0] & listed[1])
    radii = [each.radii.tolist() for each in (before, after)]
    slots = [each.column("value_slot").tolist() for each in (before, after)]
    return Difference(
        sorted(listed[1] - listed[0]),
        sorted(listed[0] - listed[1]),
        {row: (radii[0][row], radii[1][row]) for row in both if radii[0][row] != radii[1][row]},
        [row for row in both if slots[0][row] != slots[1][row]],
        sorted(set(new.edits) - set(old.edits)),
        sorted(set(old.edits) - set(new.edits)),
    )
