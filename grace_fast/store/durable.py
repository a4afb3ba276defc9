"""A directory that an editor edits: the files of a base, and a journal of every version since.

    grace_config.json   names the base and the journal; replaced in one step
    codebook-*          the base: the codebook and its edits at one version
    journal-*.sqlite    one row for every later version
    lock                held by the one process that edits

An edit is in the journal, on the disk, before anybody sees it; where that fails nobody ever does.
What fails in a way that leaves the disk in doubt makes it read-only: what it holds is read
again when it is opened anew. Compaction writes another base and begins another journal, and one
rename of the manifest goes from the old pair to the new one.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.diff import Change
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.edit import EditRecorded, Reset, Step, Undone
from grace_fast.edits.history import History
from grace_fast.errors import CodebookCorrupt, CodebookLocked, CodebookReadOnly, spelt
from grace_fast.store import files, manifest
from grace_fast.store.atomic import synchronise
from grace_fast.store.journal import JournalFile
from grace_fast.store.locks import LOCK, Lock
from grace_fast.store.records import Version

_log = logging.getLogger(__name__)
_DISK_FULL = ("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_TOOBIG")  # rolled back, and all is as before


class EditableDirectory:
    """The directory of one editor. It is the codebook's journal: it sees every version first.

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
        self.journal: JournalFile | None = None
        self._process = os.getpid()
        self._failure: str | None = None
        self._is_closed = False
        self._is_lost = False  # the lock

    def resume(self, journal: JournalFile, book: Codebook) -> None:
        """Go on with the journal of a codebook that was read from it.

        Raises: OSError where the directory cannot be synchronised.
        """
        # Who wrote it may have died between renaming the manifest and making that certain.
        synchronise(self.folder)
        self._attach(journal, book)

    def _attach(self, journal: JournalFile, book: Codebook) -> None:
        self.journal = journal
        self._history().keeps_steps = True
        book.retain(self)

    def begin(self, book: Codebook, write: Callable[[dict[str, Any]], None]) -> None:
        """Write a codebook as the base of a new journal.

        write: writes the base and a manifest that holds the fields it is given.

        Raises: OSError where it cannot be written; what was there before stays valid then.
        """
        with book.locked() as now:
            self.require_writable()
            name = secrets.token_hex(8)
            path = self.folder / f"{files.JOURNALS}-{name}.sqlite"
            journal = JournalFile.create(path, name, now.version, self._key)
            try:
                write({"version": now.version, "journal": {"file": path.name, "name": name}})
            except BaseException as error:
                journal.close()
                if _is_named(self.folder, path.name):
                    self._failure = str(
                        error
                    )  # an edit in the journal of before would not be found again
                else:
                    path.unlink(missing_ok=True)
                raise
            if self.journal is not None:
                self.journal.close()
            self._attach(journal, book)

    def record(self, before: Snapshot, after: Snapshot) -> None:
        """Put a version on the disk.

        Raises: CodebookReadOnly where the disk is in doubt, CodebookLocked where another process
        may edit, OSError where it is full; the version is refused.
        """
        assert self.journal is not None, "begin or resume comes first"
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
                self._failure = str(error)
            raise
        self._require_lock()  # else another process may not have seen it

    def revoke(self, after: Snapshot) -> None:
        """Take a version off the disk again that was refused by somebody else."""
        assert self.journal is not None, "begin or resume comes first"
        try:
            self.journal.drop_last()
        except (OSError, CodebookCorrupt) as error:
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
                quoted = (spelt(self.folder), spelt(error))
                _log.warning("the hits of %s were not kept: %s", *quoted)
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
        entry = files.read_config(folder).get("journal")
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True  # in doubt it stays
    return entry is not None and entry.get("file") == name
