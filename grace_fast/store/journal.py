"""Journal of a directory: a row of an SQLite file for every version, on the disk before it is seen.

A row's checksum covers the checksum of the row before, and `head` says which row is the last: a row
that is lost, changed or added is seen.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_fast.codebook import forks
from grace_fast.codebook.checks import MAX_COUNTER
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import side_files, sqlite_file
from grace_fast.store.files import ChangedMeanwhile

_LAST = (1 << 63) - 1  # at most any version
_AT_ONCE = 1 << 20  # bytes of rows that are read, before they are looked at


@dataclass(frozen=True)
class Entry:
    """One row of the journal."""

    version: int
    time: float  # seconds since 1970
    kind: str
    content: bytes
    checksum: bytes  # [32], of all that and of the row before


class JournalFile:
    """The versions after a base, in one file. One process writes it, any number read it.

    name: what tells this journal from another one of the directory; base: the version it begins
    after; hmac_key: what the checksums are made with, where the directory is signed; salvage: it
    need not say which version is the last, and only `sound_entries` is asked.

    Raises: CodebookCorrupt where the file is missing, foreign or not what was written; OSError
    where it cannot be read.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        base: int,
        hmac_key: bytes | None = None,
        read_only: bool = False,
        salvage: bool = False,
    ) -> None:
        self.path, self.base, self._key = path, base, hmac_key or b""
        self._start = _started(name, base, self._key)
        # No process is forked while SQLite is at work: it has locks of its own, which a child would
        # find held, and notes what locks this process has on a file, which a child has not.
        self._using = threading.RLock()
        self._page_bytes = 0  # where it is written
        self._connection: sqlite3.Connection | None = None
        forks.guard(self, "_using", mend=JournalFile._leave_in_child)
        with self._using:
            self._connection = self._opened(read_only)
        self.version, self.checksum = (base, self._start) if salvage else self._head()

    def _opened(self, read_only: bool) -> sqlite3.Connection:
        file, self._page_bytes = sqlite_file.opened(self.path, read_only)
        return file

    @property
    def _file(self) -> sqlite3.Connection:
        """The connection of this process; a forked child makes one of its own, to read."""
        if self._connection is None:
            self._connection = self._opened(read_only=True)
        return self._connection

    def _leave_in_child(self, _: bool) -> None:
        """Touch the parent's connection never again: not even to close it, which may roll back."""
        if self._connection is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
            self._connection = None

    @staticmethod
    def create(path: Path, name: str, base: int, hmac_key: bytes | None = None) -> JournalFile:
        """Make an empty journal and put it on the disk.

        Raises: OSError where it cannot be written.
        """
        sqlite_file.create(path, base, _started(name, base, hmac_key or b""))
        return JournalFile(path, name, base, hmac_key)

    def _head(self) -> tuple[int, bytes]:
        side_files.refuse_foreign_names(self.path)
        with self._using, sqlite_file.reading(self.path):
            # One statement, so that a version that is just appended is in neither or in both.
            rows = self._file.execute(
                "SELECT version, checksum, (SELECT max(version) FROM versions) FROM head LIMIT 2"
            ).fetchall()
        if len(rows) != 1 or not isinstance(rows[0][0], int) or not isinstance(rows[0][1], bytes):
            raise CodebookCorrupt(f"{self.path} does not say which version is the last")
        version, checksum, newest = rows[0]
        if newest is not None and newest > version:
            raise CodebookCorrupt(f"{self.path}: version {version} is the last, found {newest}")
        return version, checksum

    def append(self, version: int, kind: str, content: bytes, when: float | None = None) -> None:
        """Put one version behind the others and on the disk.

        when: seconds since 1970, by default now.

        Raises: OSError where that failed, ValueError where it is not the next one. Nothing was
        added then, unless the disk says otherwise when it is read again.
        """
        if version != self.version + 1:
            raise ValueError(f"the next version is {self.version + 1}, got {version}")
        entry = (version, time.time() if when is None else when, kind, content)
        checksum = _chained(self._key, self.checksum, *entry)
        self._write(
            ("INSERT INTO versions VALUES (?, ?, ?, ?, ?)", (*entry, checksum)),
            ("UPDATE head SET version = ?, checksum = ?", (version, checksum)),
        )
        self.version, self.checksum = version, checksum

    def drop_last(self) -> None:
        """Take the last version off again.

        Raises: OSError where that failed.
        """
        before = self._start
        for entry in self.entries(self.version - 2):
            if entry.version == self.version - 1:
                before = entry.checksum
        version = self.version - 1
        self._write(
            ("DELETE FROM versions WHERE version = ?", (self.version,)),
            ("UPDATE head SET version = ?, checksum = ?", (version, before)),
        )
        self.version, self.checksum = version, before

    def _write(self, *statements: tuple[str, tuple[object, ...]]) -> None:
        side_files.refuse_before_writing(self.path, self._page_bytes)
        with self._using:
            try:
                self._file.execute("BEGIN IMMEDIATE")
                for statement, values in statements:
                    self._file.execute(statement, values)
                self._file.execute("COMMIT")
            except BaseException as error:  # no memory, or Control-C between two statements
                if self._file.in_transaction:
                    with suppress(sqlite3.Error):  # the next writer to open the file rolls it back
                        self._file.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise OSError(f"{self.path} cannot be written: {error}") from error
                raise

    def entries(self, after: int | None = None) -> Iterator[Entry]:
        """Yield the rows after a version, by default all, each one checked where all are read.

        Raises: CodebookCorrupt where a row is not what was written, or is missing;
        ChangedMeanwhile where the last one was taken off while they were read.
        """
        first = self.base if after is None else max(after, self.base)
        version, checksum = first, self._start if first == self.base else self._checksum_of(first)
        last, head = self._head()
        try:
            for entry in self._chain(first, checksum, last):
                version, checksum = entry.version, entry.checksum
                yield entry
            if version != last or checksum != head:
                raise CodebookCorrupt(f"{self.path}: version {last} is the last, found {version}")
        except CodebookCorrupt as error:
            if self._head() != (last, head):
                raise ChangedMeanwhile(f"{self.path} changed while it was read") from error
            raise

    def sound_entries(self) -> Iterator[Entry]:
        """Yield the rows from the first on, as long as each is what was written.

        Raises: CodebookCorrupt behind them, where there was a further one, or may have been.
        """
        version, checksum = self.base, self._start
        for entry in self._chain(version, checksum, _LAST):
            version, checksum = entry.version, entry.checksum
            yield entry
        if (version, checksum) != self._head():
            raise CodebookCorrupt(f"{self.path}: another version is the last, found {version}")

    def _chain(self, version: int, checksum: bytes, last: int) -> Iterator[Entry]:
        """Yield the rows after a version with a checksum, up to another version, each checked."""
        content_bytes = 0
        while rows := self._some_rows(version, last):
            for row in rows:
                if row[0] >= MAX_COUNTER:
                    raise CodebookCorrupt(f"{self.path}: versions must be below {MAX_COUNTER}")
                if row[0] != version + 1 or not _is_entry(row):
                    raise CodebookCorrupt(f"{self.path}: version {version + 1} is missing")
                checksum = _chained(self._key, checksum, *row[:4])
                if checksum != row[4]:
                    raise CodebookCorrupt(
                        f"{self.path}: version {row[0]} is not what was written (checksum)"
                    )
                # Rows of a file that was made to harm may share their pages.
                content_bytes += len(row[2]) + len(row[3])
                if content_bytes > self._bytes_there():
                    raise CodebookCorrupt(f"{self.path} holds more than it has bytes")
                version = row[0]
                yield Entry(*row)

    def _some_rows(self, after: int, last: int) -> list[tuple[Any, ...]]:
        """Return the next rows after a version up to another one; none where there are no more.

        A statement that goes on while its rows are used would keep writers and forks off.
        """
        rows, size = [], 0
        with self._using, sqlite_file.reading(self.path):
            found = self._file.execute(
                "SELECT version, time, kind, content, checksum FROM versions "
                "WHERE version > ? AND version <= ? ORDER BY version",
                (after, last),
            )
            with closing(found):
                while size < _AT_ONCE and (row := found.fetchone()) is not None:
                    rows.append(row)
                    size += sum(len(each) for each in row if isinstance(each, str | bytes))
        return rows

    def _bytes_there(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError as error:
            raise ChangedMeanwhile(
                f"{self.path} was replaced when the codebook was compacted; refresh() first"
            ) from error

    def _checksum_of(self, version: int) -> bytes:
        with self._using, sqlite_file.reading(self.path):
            found = self._file.execute(
                "SELECT checksum FROM versions WHERE version = ?", (version,)
            ).fetchone()
        if found is None or not isinstance(found[0], bytes):
            raise CodebookCorrupt(f"{self.path}: version {version} is missing")
        return found[0]

    def is_as_before(self) -> bool:
        """Tell whether the disk holds the versions that this knows of, after an append failed."""
        try:
            return not self._file.in_transaction and self._head() == (self.version, self.checksum)
        except (OSError, CodebookCorrupt):
            return False

    def newest(self) -> int:
        """Return the last version that is on the disk now."""
        return self._head()[0]

    def close(self) -> None:
        """Let go of the file."""
        with self._using:
            if self._connection is not None:
                self._connection.close()


def _is_entry(row: tuple[object, ...]) -> bool:
    kinds = (int, float, str, bytes, bytes)
    return all(isinstance(each, kind) for each, kind in zip(row, kinds, strict=True))


def _started(name: str, base: int, key: bytes) -> bytes:
    """Return what the first row of a journal comes after."""
    return hmac.digest(key, f"{name} after {base}".encode(), "sha256")


def _chained(
    key: bytes, before: bytes, version: int, when: float, kind: str, content: bytes
) -> bytes:
    """Return the checksum of a row that comes after one with a checksum."""
    digest = hmac.new(key, before, hashlib.sha256)
    digest.update(struct.pack("<qd", version, when))
    digest.update(f"{kind}\n".encode())
    digest.update(content)
    return digest.digest()
