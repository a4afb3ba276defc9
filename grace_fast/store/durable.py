"""A directory that is edited: files of a base, and a journal of every version since.

    grace_config.json   names the base and the journal; replaced in one step
    codebook-*          the base: the codebook and its edits at one version
    journal-*.sqlite    one row for every later version
    lock                held by the one process that edits

An edit is in the journal, on the disk, before anybody sees it; where that fails nobody ever does.
What fails in a way that leaves the disk in doubt makes the store read-only: what it holds is read
again when it is opened anew. Compaction writes another base and begins another journal, and one
rename of the manifest goes from the old pair to the new one.
"""

from __future__ import annotations

import logging
import os
import secrets
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_fast.codebook import printable
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.diff import Change, back
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.edit import EditRecorded, Reset, Step, Undone
from grace_fast.edits.history import History
from grace_fast.errors import CodebookCorrupt
from grace_fast.errors import CodebookLocked as CodebookLocked
from grace_fast.errors import CodebookReadOnly as CodebookReadOnly
from grace_fast.store import files, manifest
from grace_fast.store.journal import Entry, Journal
from grace_fast.store.records import Version, redo

_log = logging.getLogger(__name__)

LOCK = "lock"
_DISK_FULL = ("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_TOOBIG")  # rolled back, and all is as before


class Lock:
    """The right to edit a directory, until it is closed or its process ends, however it ends.

    Raises: CodebookLocked where somebody has it, OSError where the directory cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            files.synchronise(made.parent)
        try:
            claim = files.Claim(folder / LOCK)
        except BlockingIOError as error:
            holder = ""
            with suppress(OSError), (folder / LOCK).open("rb") as file:
                holder = file.read(20).decode("ascii", "replace").strip()
            raise CodebookLocked(
                f"{folder} is being edited by process {holder or 'unknown'}; "
                "attach with read_only=True, or unload() the editor there first"
            ) from error
        try:
            os.ftruncate(claim.descriptor, 0)
            os.pwrite(claim.descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            claim.close()
            raise
        self.is_in_place = claim.is_in_place
        self.close = weakref.finalize(self, claim.close)
        self._path = claim.path

    def remove(self) -> None:
        """Give the directory back without a trace; who waits for the file sees that it is gone."""
        if self.is_in_place():
            self._path.unlink()
        self.close()


class Store:
    """The directory of one editor. It is the codebook's ledger: it sees every version first.

    history: returns the history that the editor keeps, whose steps are journalled.
    """

    def __init__(
        self,
        folder: Path,
        lock: Lock,
        history: Callable[[], History],
        hmac_key: bytes | None = None,
    ) -> None:
        self.folder, self._lock, self._history = folder, lock, history
        self._key = hmac_key
        self.journal: Journal | None = None
        self._process = os.getpid()
        self._failure: str | None = None
        self._is_closed = False
        self._is_lost = False  # the lock

    def resume(self, journal: Journal, book: Codebook) -> None:
        """Go on with the journal of a codebook that was read from it.

        Raises: OSError where the directory cannot be synchronised.
        """
        # Who wrote it may have died between renaming the manifest and making that certain.
        files.synchronise(self.folder)
        self._keep(journal, book)

    def _keep(self, journal: Journal, book: Codebook) -> None:
        self.journal = journal
        self._history().keeps_steps = True
        book.retain(self)

    def begin(self, book: Codebook, write: Callable[[dict[str, Any]], None]) -> None:
        """Write a codebook as the base of a new journal.

        write: writes the base and a manifest that holds the fields it is given.

        Raises: OSError where it cannot be written; what was there before stays valid then.
        """
        with book.held() as now:
            self.require_writable()
            name = secrets.token_hex(8)
            path = self.folder / f"{files.JOURNALS}-{name}.sqlite"
            journal = Journal.create(path, name, now.version, self._key)
            told = {"file": path.name, "name": name}
            try:
                write({"version": now.version, "journal": told})
            except BaseException as error:
                journal.close()
                if _is_named(self.folder, path.name):
                    self._fail(error)  # an edit in the journal of before would not be found again
                else:
                    path.unlink(missing_ok=True)
                raise
            if self.journal is not None:
                self.journal.close()
            self._keep(journal, book)

    def record(self, before: Snapshot, after: Snapshot) -> None:
        """Put a version on the disk.

        Raises: CodebookReadOnly where the disk is in doubt, CodebookLocked where another process
        may edit, OSError where it is full; the version is refused.
        """
        assert self.journal is not None, "a ledger has a journal before it is kept"
        steps = self._history().take_steps()
        self.require_writable()
        content = Version(Change.between(before, after), steps).encode()
        try:
            self.journal.append(after.version, _kind(steps), content)
        except BaseException as error:
            cause = getattr(error.__cause__, "sqlite_errorname", "")
            # Else there was no memory, or it was interrupted.
            is_of_the_disk = isinstance(error, OSError | ValueError)
            may_go_on = cause.startswith(_DISK_FULL) or not is_of_the_disk
            if not (may_go_on and self.journal.is_as_before()):
                self._fail(error)
            raise
        self._require_lock()  # else another process may not have seen it

    def revoke(self, after: Snapshot) -> None:
        """Take a version off the disk again that was refused by somebody else."""
        assert self.journal is not None, "a ledger has a journal before it is kept"
        try:
            self.journal.drop_last()
        except (OSError, CodebookCorrupt) as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = str(error)

    def require_writable(self) -> None:
        """Raise CodebookReadOnly or CodebookLocked where nothing may be written any more."""
        if self._is_closed:
            raise CodebookReadOnly(f"{self.folder} was given back by unload(); attach() again")
        if self._process != os.getpid():
            raise CodebookReadOnly(
                f"{self.folder} is edited by process {self._process}, of which this is a fork; "
                "attach it with read_only=True"
            )
        if self._failure is not None:
            raise CodebookReadOnly(
                f"{self.folder} is read-only since an edit could not be kept: {self._failure}; "
                "mend the disk and attach() again"
            )
        self._require_lock()

    def _require_lock(self) -> None:
        if self._is_lost or not self._lock.is_in_place():
            self._is_lost = True  # though it be put back: others may have written since
            raise CodebookLocked(
                f"{self.folder / LOCK} was removed or replaced, so another process may edit there "
                "by now; nothing further is kept: unload() and attach() again"
            )

    def close(self, hits: Mapping[int, int] | None = None) -> None:
        """Give the directory back; hits, by row, are kept in its manifest where that can be."""
        mine = self._process == os.getpid() and self._failure is None and not self._is_closed
        if hits and self.journal is not None and mine:
            try:
                files.update(self.folder, {"hits": manifest.counted(hits)}, self._key)
            except (OSError, ValueError) as error:
                told = (printable.spelt(self.folder), printable.spelt(error))
                _log.warning("the hits of %s were not kept: %s", *told)
        self._is_closed = True
        if self.journal is not None:
            self.journal.close()
        self._lock.close()


def _kind(steps: list[Step]) -> str:
    kinds = {Reset: "checkout", EditRecorded: "edit", Undone: "undo"}
    present = {type(step) for step in steps}
    return next((kind for step, kind in kinds.items() if step in present), "rows")


def _is_named(folder: Path, name: str) -> bool:
    """Tell whether the manifest of a directory names a journal."""
    try:
        told = files.read_config(folder).get("journal")
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # in doubt it stays
    return told is not None and told.get("file") == name


def journal_place(folder: Path, config: Mapping[str, Any]) -> tuple[Path, str, int]:
    """Return where the journal that a manifest names is, its name and the version before it.

    Raises: CodebookCorrupt where that is not told.
    """
    told = config["journal"]
    name = told.get("name")
    is_named = isinstance(name, str) and told.get("file") == f"{files.JOURNALS}-{name}.sqlite"
    if not is_named or "version" not in config:
        raise CodebookCorrupt(f"{folder}: the manifest does not describe its journal")
    return files.place(folder, told["file"]), name, int(config["version"])


def journal_of(
    folder: Path,
    config: Mapping[str, Any],
    hmac_key: bytes | None = None,
    read_only: bool = True,
) -> Journal | None:
    """Return the journal that a manifest names, None where it names none.

    Raises: CodebookCorrupt where it is missing or foreign, OSError where it cannot be read.
    """
    if config.get("journal") is None:
        return None
    return Journal(*journal_place(folder, config), hmac_key, read_only)


def replay(journal: Journal, book: Codebook, history: History, version: int | None = None) -> None:
    """Take a codebook and its history to a version of the journal, by default the last.

    Raises: CodebookCorrupt where the journal is not what was written; the history is not to be used
    then, and the codebook is as before.
    """
    entries = journal.entries(book.version)
    first = next(entries, None)
    if first is None or (version is not None and first.version > version):
        return
    with book.writing() as draft:
        entry: Entry | None = first
        while entry is not None and (version is None or entry.version <= version):
            try:
                redo(entry.content, draft, history)
            except CodebookCorrupt as error:
                raise CodebookCorrupt(
                    f"{journal.path}: version {entry.version}: {error}",
                    field=error.field,
                    row=error.row,
                ) from error
            draft.version = entry.version
            entry = next(entries, None)


def go_back(book: Codebook, history: History, then: Snapshot, earlier: History) -> None:
    """Publish a version that decides as an earlier one did; ids that were given stay so."""
    with book.held() as now, history.attempting(), book.writing() as draft:
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
    """What one version of a codebook has otherwise than another."""

    added: list[int]  # rows that only the later one has, or that were back
    removed: list[int]  # rows that were live in the earlier one only
    radii: dict[int, tuple[float, float]]  # by row: of the earlier and the later version
    values: list[int]  # rows of both with other values
    made: list[int]  # ids of edits that only the later one has
    undone: list[int]  # ids of edits that only the earlier one has


def difference(one: tuple[Snapshot, History], other: tuple[Snapshot, History]) -> Difference:
    """Return what a version has otherwise than an earlier one of the same directory."""
    (before, old), (after, new) = one, other
    shared = min(before.rows, after.rows)
    live = [each.live.tolist() for each in (before, after)]
    both = [row for row in range(shared) if live[0][row] and live[1][row]]
    radii = [each.radii.tolist() for each in (before, after)]
    slots = [each.column("value_slot").tolist() for each in (before, after)]
    listed = [{row for row, alive in enumerate(each) if alive} for each in live]
    return Difference(
        sorted(listed[1] - listed[0]),
        sorted(listed[0] - listed[1]),
        {row: (radii[0][row], radii[1][row]) for row in both if radii[0][row] != radii[1][row]},
        [row for row in both if slots[0][row] != slots[1][row]],
        sorted(set(new.edits) - set(old.edits)),
        sorted(set(old.edits) - set(new.edits)),
    )
