"""SQLite files that are journals of ours: opened so that nothing that a foreign one brings is run.

The file is ours if its schema is, word for word. `TRUNCATE` and `FULL`: write-ahead logs lose rows
in SQLite 3.7.0 to 3.51.2 when they are reset.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from grace_fast.codebook import forks
from grace_fast.codebook.mapped import refuse_special
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import side_files
from grace_fast.store.atomic import synchronise

_FORMAT = 1
_SCHEMA = (
    "CREATE TABLE versions (version INTEGER PRIMARY KEY, time REAL NOT NULL, "
    "kind TEXT NOT NULL, content BLOB NOT NULL, checksum BLOB NOT NULL)",
    "CREATE TABLE head (version INTEGER NOT NULL, checksum BLOB NOT NULL)",
)
_TABLES = [
    ("table", name, name, sql) for name, sql in zip(("versions", "head"), _SCHEMA, strict=True)
]
_WAIT_S = 10.0  # for a reader or a writer that is just reading or writing
# What is said of a file that was changed; an interruption is ours, of a schema without end.
_WRONG = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_INTERRUPT")
_LEAST_BYTES = 512  # a page
_MOST_STEPS = 1_000_000  # of SQLite's machine, until a schema is known to be ours
_creating = threading.RLock()  # no process is forked meanwhile


def create(path: Path, base: int, checksum: bytes) -> None:
    """Make a file without versions and put it on the disk; base, checksum: what `head` says.

    Raises: OSError where it cannot be written.
    """
    path.unlink(missing_ok=True)
    try:
        with _creating, closing(connected(path, "mode=rwc")) as file:
            _be_written(file)
            file.execute("BEGIN IMMEDIATE")
            file.execute(f"PRAGMA application_id={side_files.APPLICATION}")
            file.execute(f"PRAGMA user_version={_FORMAT}")
            for statement in _SCHEMA:
                file.execute(statement)
            file.execute("INSERT INTO head VALUES (?, ?)", (base, checksum))
            file.execute("COMMIT")
    except sqlite3.Error as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    synchronise(path)
    synchronise(path.parent)


def opened(path: Path, read_only: bool) -> tuple[sqlite3.Connection, int]:
    """Return a connection to a journal, and where it is to be written the size of its pages.

    Raises: CodebookCorrupt where the file is missing, foreign or not what was written; OSError
    where it cannot be read.
    """
    refuse_special(path)
    if not path.is_file():
        raise CodebookCorrupt(f"{path} is missing: the codebook is not complete")
    if path.stat().st_size < _LEAST_BYTES:  # SQLite removes what lies beside an empty file
        raise CodebookCorrupt(f"{path} is not what was written: it is cut off")
    page_bytes = 0
    if read_only:
        side_files.refuse_foreign_names(path)
        _refuse_log_mode(path)
    else:
        page_bytes = side_files.page_bytes_of(path)
        side_files.refuse_foreign(path, page_bytes, writes=True)
    with reading(path):
        file = connected(path, "mode=ro" if read_only else "mode=rw")
        try:
            if not read_only:
                _be_written(file)
            _check_schema(path, file)
            file.set_progress_handler(None, 0)
            # Else what is appended could be written over what is there.
            if not read_only and (found := _read(file, "quick_check(1)")) != "ok":
                raise CodebookCorrupt(f"{path} is not what was written: {found}")
        except BaseException:
            file.close()
            raise
    return file, page_bytes


def _be_written(file: sqlite3.Connection) -> None:
    file.execute("PRAGMA journal_mode=TRUNCATE")
    file.execute("PRAGMA synchronous=FULL")


def _read(file: sqlite3.Connection, name: str) -> object:
    (found,) = file.execute(f"PRAGMA {name}").fetchone()
    return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell in our errors what SQLite says of a file."""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # A text that cannot be decoded has no name, and neither has a message of such a text.
        name = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT")
        if name.startswith(_WRONG):
            raise CodebookCorrupt(f"{path} is not what was written: {error}") from error
        if name.startswith("SQLITE_READONLY"):
            side_files.refuse_foreign(path)
            raise OSError(
                f"{path} needs a writer: an edit was interrupted; "
                "attach the codebook once where its directory can be written"
            ) from error
        raise OSError(f"{path} cannot be read: {error}") from error


def _refuse_log_mode(path: Path) -> None:
    """Raise CodebookCorrupt where the file asks for a write-ahead log, of which none is made.

    SQLite reads the header, and takes no lock for it: a file that is closed elsewhere in a
    process takes the locks of all its connections along.
    """
    with reading(path):  # where it cannot be opened at all
        file = connected(path, "mode=ro&nolock=1")
    try:
        file.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_CANTOPEN":
            raise CodebookCorrupt(
                f"{path} is not what was written: it asks for a write-ahead log"
            ) from error
        # Else it may be being written just now; who reads it with a lock says what it is.
    finally:
        file.close()


def _check_schema(path: Path, file: sqlite3.Connection) -> None:
    if _read(file, "application_id") != side_files.APPLICATION:
        raise CodebookCorrupt(f"{path} is not a journal of grace_fast")
    (number,) = file.execute("PRAGMA user_version").fetchone()
    if number > _FORMAT:
        raise CodebookCorrupt(
            f"{path} has format {number}, this version of grace_fast reads up to {_FORMAT}"
        )
    found = file.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY rowid LIMIT 3"
    ).fetchall()
    if found != _TABLES or number != _FORMAT:
        raise CodebookCorrupt(f"{path} does not hold the tables of a journal")


def connected(path: Path, how: str) -> sqlite3.Connection:
    """Return a connection that runs nothing that a file brings along, and does not go on for ever.

    how: parameters of SQLite's for a file's name. No character of the path is taken for one.
    """
    file = sqlite3.connect(
        f"file://{quote(os.fsencode(path.absolute()))}?{how}",
        uri=True,
        timeout=_WAIT_S,
        isolation_level=None,
        check_same_thread=False,
    )
    file.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    file.set_progress_handler(lambda: 1, _MOST_STEPS)
    settings = ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "temp_store=MEMORY")
    for setting in settings:
        file.execute(f"PRAGMA {setting}")
    return file


forks.guard(sys.modules[__name__], "_creating")
