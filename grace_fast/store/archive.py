"""A codebook and its edits in one file, to be carried elsewhere: a zip of a directory's files.

Nothing in it is compressed, so what is taken out is never more than the file itself. It is read
into a new directory, and every test of a directory is made there before it gets its name.
"""

from __future__ import annotations

import errno
import io
import secrets
import shutil
import zipfile
from pathlib import Path

from grace_fast.codebook.mapped import refuse_special
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import atomic, tensor_files
from grace_fast.store.saved import read_newest, read_saved, write

_MOST_AT_ONCE = 1 << 20  # bytes; the list of the members of a packed codebook has some hundred


class _Sparing(io.BufferedReader):
    """A file of which no more is read at once than a packed codebook needs.

    The list of its members is read whole, and some ten times that of memory is made of it.
    """

    def read(self, size: int | None = -1) -> bytes:
        wanted = _MOST_AT_ONCE + 1 if size is None or size < 0 else size
        content = super().read(wanted) if wanted <= _MOST_AT_ONCE + 1 else b""
        if wanted > _MOST_AT_ONCE + 1 or len(content) > _MOST_AT_ONCE:
            raise zipfile.BadZipFile(f"it lists its members in more than {_MOST_AT_ONCE} bytes")
        return content


def pack(path: str | Path, file: str | Path, hmac_key: bytes | None = None) -> int:
    """Write the newest version of a directory to one file; return the number of its edits.

    hmac_key: what the directory is signed with, and the file will be.

    Raises: CodebookCorrupt, OSError where the file cannot be written; FileExistsError where it is
    there.
    """
    target = atomic.absolute(file)
    if target.exists():
        raise FileExistsError(f"{target} is there already; choose another name")
    saved, book, history = read_newest(path, hmac_key)
    described = {**saved.described, "version": book.version}
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with atomic.temporary_folder(target.parent) as folder:
            write(folder, described, book.snapshot(), history, hmac_key)
            with zipfile.ZipFile(partial, "x", zipfile.ZIP_STORED) as packed:
                for each in sorted(folder.iterdir()):
                    packed.write(each, each.name)
        atomic.synchronise(partial)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    atomic.synchronise(target.parent)
    return len(history.edits)


def unpack(file: str | Path, path: str | Path, hmac_key: bytes | None = None) -> int:
    """Make a directory of such a file, once all of it was tested; return the number of its edits.

    hmac_key: the key that it must have been signed with.

    Raises: CodebookCorrupt where it is not what was packed, FileExistsError where the directory is
    not empty, OSError where it cannot be written. There is no directory then.
    """
    source, target = atomic.absolute(file), atomic.absolute(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty; choose a directory that is, or another name")
    refuse_special(source)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with _Sparing(source.open("rb", buffering=0)) as whole, zipfile.ZipFile(whole) as packed:
            members = packed.infolist()
            size, total = source.stat().st_size, sum(each.file_size for each in members)
            if total > size or len({each.filename for each in members}) != len(members):
                raise CodebookCorrupt(f"{source} holds more than it has bytes, or a name twice")
            partial.mkdir(parents=True)
            for each in members:
                if each.compress_type != zipfile.ZIP_STORED or each.flag_bits & 1:
                    raise CodebookCorrupt(f"{source}: {each.filename!a} is compressed or encrypted")
                place = tensor_files.place(partial, each.filename)
                with packed.open(each) as content, place.open("xb") as made:
                    shutil.copyfileobj(content, made)
                atomic.synchronise(place)
        edits = len(read_saved(partial, hmac_key).codebook()[1].edits)
        atomic.synchronise(partial)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, UnicodeDecodeError) as error:
        raise CodebookCorrupt(f"{source} is not a packed codebook: {error}") from error
    except OSError as error:
        # It tells of a place before its beginning, or lacks a file of a directory.
        if error.filename is not None or not (
            isinstance(error, FileNotFoundError) or error.errno == errno.EINVAL
        ):
            raise
        raise CodebookCorrupt(f"{source} is not a packed codebook: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    atomic.synchronise(target.parent)
    return edits
