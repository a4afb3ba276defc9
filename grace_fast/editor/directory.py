"""The directory of an editor: the versions of its codebook, written, read and followed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from grace_fast.codebook import scalars
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.history import History
from grace_fast.errors import CodebookReadOnly
from grace_fast.store import files
from grace_fast.store.durable import EditableDirectory
from grace_fast.store.journal import JournalFile
from grace_fast.store.locks import Lock
from grace_fast.store.saved import read_saved, write
from grace_fast.store.versions import replay


class Directory:
    """Where an editor's codebook lies on the disk; `path` is None where it lies nowhere.

    history: returns the editor's history; described: what the manifest says beside the codebook.
    """

    def __init__(
        self,
        path: Path | None,
        lock: Lock | None,
        hmac_key: bytes | None,
        history: Callable[[], History],
        described: Callable[[], dict[str, Any]],
    ) -> None:
        self.path, self._key = path, hmac_key
        self._history, self._described = history, described
        self.store: EditableDirectory | None = None  # where every edit goes before anybody sees it
        if path is not None and lock is not None:
            self.store = EditableDirectory(path, lock, history, hmac_key)
        self.followed: JournalFile | None = None  # what another process writes, of a reader
        self._is_reader = False

    def begin(self, book: Codebook | None, journal: JournalFile | None = None) -> None:
        """Keep a codebook from now on, where there is a directory to edit.

        book: None where the first edit will make it; journal: of a codebook that was read from it.
        """
        if self.store is None or book is None:
            return
        if journal is not None:
            self.store.resume(journal, book)
        else:
            folder = self.store.folder
            self.store.begin(
                book, lambda told: self._write(folder, book.snapshot(), self._key, told)
            )

    def follow(self, journal: JournalFile | None) -> None:
        """Only read from now on, what others write to a journal."""
        self.followed, self._is_reader = journal, True

    def require_writable(self) -> None:
        """Raise CodebookReadOnly or CodebookLocked where edits are not to be made here."""
        if self._is_reader:
            raise CodebookReadOnly(
                f"{self.path} was attached with read_only=True; attach it without to edit"
            )
        if self.store is not None:
            self.store.require_writable()

    def journal(self) -> JournalFile:
        """Return the journal of the versions.

        Raises: ValueError where there is none.
        """
        journal = self.followed if self.store is None else self.store.journal
        if journal is None:
            raise ValueError("there are no versions without a directory; attach(..., path=DIR)")
        return journal

    def at(self, version: int) -> tuple[Codebook, History]:
        """Return the codebook and the history of an earlier version."""
        self.journal()
        assert self.path is not None, "a journal lies in a directory"
        path, version = self.path, scalars.whole("version", version)
        return files.steadily(path, lambda: read_saved(path, self._key).codebook(version=version))

    def compact(self, book: Codebook) -> None:
        """Make the newest version the base of a new journal."""
        self.journal()
        self.begin(book)

    def newer(
        self, book: Codebook, history: History, max_radius: float | None
    ) -> tuple[Codebook, History]:
        """Return a followed codebook's newest version: itself gone on with, or one that is anew.

        Raises: CodebookCorrupt, OSError where it cannot be read; the codebook stays as it is then.
        """
        path, followed = self.path, self.followed
        if followed is None or path is None:
            raise ValueError("only an editor that was attached with read_only=True can refresh()")

        def read() -> tuple[Codebook, History]:
            told = files.read_config(path, self._key).get("journal")
            if told is None or told.get("file") != followed.path.name:  # compacted, saved anew
                fresh, its, journal = read_saved(path, self._key, max_radius).open(book.device)
                followed.close()
                self.followed = journal
                return fresh, its
            if followed.newest() != book.version:
                with book.held(), history.attempting():
                    replay(followed, book, history)
            return book, history

        return files.steadily(path, read)

    def save(self, path: Path, snapshot: Snapshot, hmac_key: bytes | None) -> None:
        """Write a codebook and its edits elsewhere, signed as here unless another key is given."""
        with closing(Lock(path)):
            self._write(path, snapshot, self._key if hmac_key is None else hmac_key, {})

    def is_at(self, path: Path) -> bool:
        """Tell whether this is the directory that edits go to."""
        return self.store is not None and self.store.folder.resolve() == path.resolve()

    def close(self, hits: Mapping[int, int]) -> None:
        """Give the directory back, with the hits by row."""
        if self.store is not None:
            self.store.close(hits)

    def _write(
        self, path: Path, snapshot: Snapshot, hmac_key: bytes | None, told: Mapping[str, Any]
    ) -> None:
        write(path, {**self._described(), **told}, snapshot, self._history(), hmac_key)
