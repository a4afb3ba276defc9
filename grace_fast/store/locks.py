"""Locks of directories: one process edits or builds, until it closes its lock or ends."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path

from grace_fast.codebook import forks
from grace_fast.codebook.mapped import open_regular
from grace_fast.errors import CodebookLocked
from grace_fast.store.atomic import synchronise

LOCK = "lock"
_REMOVALS = 10
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class Claim:
    """A file that is this process's alone until it is closed; forked children have no part in it.

    Raises: BlockingIOError where somebody has it, OSError where it cannot be opened or the file
    system keeps no locks.
    """

    def __init__(self, path: Path) -> None:
        # From here on: another working directory does not make it another file.
        self.path = path.absolute()
        for _ in range(_REMOVALS):
            with _claiming:  # no fork comes between the two lines
                self.descriptor = open_regular(self.path, os.O_RDWR | os.O_CREAT)
                _claims.add(self)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.is_in_place():
                    return
            except BaseException as error:
                self.close()
                if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                    raise OSError(
                        error.errno,
                        f"{path} cannot be locked, as its file system keeps no locks "
                        f"({error.strerror}); keep the codebook on a local disk, or open it to be "
                        "read",
                    ) from error
                raise
            self.close()  # it was removed before it was locked: somebody may have the next one
        raise OSError(f"{path} is removed again and again; leave a lock where it is")

    def is_in_place(self) -> bool:
        """Tell whether the file still has its name: else somebody may have another of that name."""
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return self.descriptor >= 0 and os.path.samestat(found, os.fstat(self.descriptor))

    def close(self) -> None:
        """Give the file back."""
        _claims.discard(self)
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_claims: set[Claim] = set()
_claiming = threading.Lock()


def _leave_claims(*_: object) -> None:
    """Close what a forked child has inherited: a lock lasts as long as one copy of it is open."""
    for claim in list(_claims):
        claim.close()


forks.guard(sys.modules[__name__], "_claiming", mend=_leave_claims)


def require_claim(folder: Path) -> None:
    """Raise CodebookLocked where a lock that this process has in a directory is not there any more.

    Somebody may have removed it, and another process has its own since.
    """
    for claim in list(_claims):
        if claim.path.parent == folder.absolute() and not claim.is_in_place():
            raise CodebookLocked(
                f"{claim.path} was removed or replaced, so another process may have {folder} by "
                "now; nothing further is written: unload() or close this one, and open it again"
            )


class Lock:
    """The right to edit a directory, until it is closed or its process ends, however it ends.

    Raises: CodebookLocked where somebody has it, OSError where the directory cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            synchronise(made.parent)
        try:
            claim = Claim(folder / LOCK)
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
