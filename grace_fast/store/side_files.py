"""Files beside a journal that SQLite would read by their names, checked before SQLite is called.

SQLite takes `X-journal`, `X-wal` and `X-shm` for parts of a file X by their names alone, and a
rollback journal may end with the name of a file anywhere that SQLite then deletes. A journal of
ours has nothing beside it but the rollback journal of its own last transaction, which is no link,
names no other file, and puts nothing back that was not its own.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

from grace_fast.codebook.mapped import open_regular, refuse_special
from grace_fast.errors import CodebookCorrupt

APPLICATION = 0x47524143  # "GRAC", in the header of every journal
_LOGS = ("-wal", "-shm")  # of a mode that a journal is never in
_FILE_MAGIC = b"SQLite format 3\0"
_MAGIC = bytes.fromhex("d9d505f920a163d7")  # of a rollback journal, and behind a name at its end
_HEADER = struct.Struct(">8sIIIII")  # magic, records, nonce, pages before, sector, page
_TO_THE_END = 0xFFFFFFFF  # records of a header that does not count them
_SECTORS = {1 << power for power in range(5, 17)}


def rollback_of(path: Path) -> Path:
    """Return where SQLite keeps what a transaction on a file overwrites."""
    return path.with_name(path.name + "-journal")


def all_of(path: Path) -> list[Path]:
    """Return every name beside a file that SQLite would read."""
    return [rollback_of(path), *(path.with_name(path.name + end) for end in _LOGS)]


def foreign(path: Path, page_bytes: int | None = None, writes: bool = False) -> dict[Path, str]:
    """Return what lies beside a journal and is none of its own, each with the reason.

    page_bytes: of the journal, where that is known; writes: SQLite will write to what is there,
    so it must have no other name.
    """
    found = _foreign_names(path)
    rollback = rollback_of(path)
    if rollback in found:
        return found
    try:
        descriptor = open_regular(rollback, os.O_RDWR if writes else os.O_RDONLY)
    except FileNotFoundError:
        return found
    except CodebookCorrupt as error:
        return found | {rollback: _without_name(error, rollback)}
    try:
        why = _why_foreign(descriptor, path.stat().st_size, page_bytes)
    finally:
        os.close(descriptor)
    return found if why is None else found | {rollback: why}


def _foreign_names(path: Path) -> dict[Path, str]:
    """Return what has a name beside a journal that it must not have, unread."""
    rollback, *logs = all_of(path)
    why = "is none of ours: a journal keeps no write-ahead log"
    found = {each: why for each in logs if os.path.lexists(each)}
    try:
        refuse_special(rollback)
    except CodebookCorrupt as error:
        found[rollback] = _without_name(error, rollback)
    return found


def _without_name(error: CodebookCorrupt, path: Path) -> str:
    return str(error).removeprefix(f"{path} ")


def refuse_foreign(path: Path, page_bytes: int | None = None, writes: bool = False) -> None:
    """Raise CodebookCorrupt where something lies beside a journal that is none of its own."""
    _refuse(foreign(path, page_bytes, writes))


def refuse_foreign_names(path: Path) -> None:
    """Raise CodebookCorrupt where something has a name beside a journal that it must not have.

    For readers, who put nothing back, and may see a rollback journal while it is written.
    """
    _refuse(_foreign_names(path))


def refuse_before_writing(path: Path, page_bytes: int) -> None:
    """Raise CodebookCorrupt unless SQLite may begin a transaction on a journal that it has open.

    It opens what lies beside anew each time; ours is empty between two transactions, and holds the
    beginning of one that a full disk ended.
    """
    refuse_foreign_names(path)
    rollback = rollback_of(path)
    refuse_special(rollback, writes=True)
    with suppress(FileNotFoundError):
        if rollback.lstat().st_size:
            refuse_foreign(path, page_bytes, writes=True)


def _refuse(found: dict[Path, str]) -> None:
    for each, why in found.items():
        raise CodebookCorrupt(
            f"{each} {why}. It was left as it is; take it away, or let "
            "`grace-fast verify --repair` do so"
        )


def page_bytes_of(path: Path) -> int:
    """Return the size of a journal's pages, for who alone may write it.

    Its descriptor is closed again, and with it go the locks that this process has on the file: so
    no reader beside a writer may ask.

    Raises: CodebookCorrupt where it is no regular file, no file of SQLite's, has another name, or
    asks for a write-ahead log; OSError where it cannot be read.
    """
    with os.fdopen(open_regular(path, os.O_RDWR), "rb") as file:
        head = file.read(100)
    if len(head) < 100 or head[:16] != _FILE_MAGIC:
        raise CodebookCorrupt(f"{path} is not what was written: it is no file of SQLite's")
    if head[18:20] != b"\1\1":
        raise CodebookCorrupt(f"{path} is not what was written: it asks for a write-ahead log")
    return 65536 if head[16:18] == b"\0\1" else int.from_bytes(head[16:18], "big")


def _why_foreign(descriptor: int, bytes_there: int, page_bytes: int | None) -> str | None:
    """Return why a rollback journal is not one that a journal of ours left; None where it is."""
    size = os.fstat(descriptor).st_size
    if _names_another(descriptor, size):
        return "names another file, which SQLite would delete; ours name none"
    head = os.pread(descriptor, _HEADER.size, 0)
    # Its first bytes are written last: until then nothing in it is used.
    begun = head[:8].rstrip(b"\0")
    if not _MAGIC.startswith(begun):
        return "is no rollback journal of SQLite's"
    if begun != _MAGIC or len(head) < _HEADER.size:
        return None
    _, records, _, pages, sector, page = _HEADER.unpack(head)
    if sector not in _SECTORS or page not in _SECTORS or page < 512:
        return f"has sectors of {sector} bytes and pages of {page}"
    if page_bytes not in (None, page):
        return f"has pages of {page} bytes, wanted {page_bytes}"
    if not 1 <= pages <= -(-bytes_there // page):
        return f"was begun on {pages} pages, and there are {bytes_there} bytes"
    return _why_pages_foreign(descriptor, records, sector, page)


def _names_another(descriptor: int, size: int) -> bool:
    """Tell whether a rollback journal ends with the name of a file, as SQLite looks for one."""
    if size < 16:
        return False
    length, checksum, magic = struct.unpack(">II8s", os.pread(descriptor, 16, size - 16))
    if magic != _MAGIC or not 0 < length <= min(size - 16, 1 << 16):  # no path is longer
        return False
    name = os.pread(descriptor, length, size - 16 - length)
    signed = struct.unpack(f"{len(name)}b", name)  # as most processors have their characters
    return checksum in (sum(name) & 0xFFFFFFFF, sum(signed) & 0xFFFFFFFF)


def _why_pages_foreign(descriptor: int, records: int, sector: int, page: int) -> str | None:
    """Return why the pages that would be put back are not a journal's; None where they are."""
    at = sector
    while True:
        left = records
        while left:
            number = os.pread(descriptor, 4, at)
            if len(number) < 4 or number == b"\0\0\0\0":
                return None  # SQLite goes no further either
            if number == b"\0\0\0\1" and not _is_first_page(
                os.pread(descriptor, 100, at + 4), page
            ):
                return "would put another header in the place of the journal's"
            at += page + 8
            left -= left != _TO_THE_END
        at = -(-at // sector) * sector
        again = os.pread(descriptor, 12, at)
        if len(again) < 12 or again[:8] != _MAGIC:
            return None
        at, records = at + sector, int.from_bytes(again[8:], "big")


def _is_first_page(head: bytes, page: int) -> bool:
    """Tell whether a first page [100 bytes of it] is one of a journal with pages of a size."""
    size = page if page < 65536 else 1
    return (
        len(head) < 100
        or (
            head[:20] == _FILE_MAGIC + size.to_bytes(2, "big") + b"\1\1"
            and head[56:60] == b"\0\0\0\1"  # UTF-8
            and head[68:72] == APPLICATION.to_bytes(4, "big")
        )
    )
