"""What a disk holds after any part of a recorded run: replayed call by call, torn, or lost.

A `Disk` keeps every file twice, as the process sees it and as a loss of power would leave it: what
was written since the file was last synchronised may be lost, all of it or any part. Names are lost
likewise until their folder is synchronised, the newest first, as a journalling file system does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faults.shim import MAKE, MARK, OPEN, RENAME, SYNC, SYNC_REFUSED, TRUNCATE, UNLINK, WRITE

_RECORD = struct.Struct("<IIqIIII")
_IS_NEW, _IS_EMPTIED = 1, 2


@dataclass(frozen=True)
class Call:
    """One call as the shim recorded it."""

    kind: int
    file: int  # the number of the open that made the descriptor
    offset: int  # of a write; a truncation's length; a mark's number; an open's inode
    flags: int
    path: str  # below the folder that was watched; "." for that folder
    other: str  # where a rename leads
    data: bytes


def read_log(log: Path, root: Path) -> list[Call]:
    """Return the calls of a log, with paths below the folder that was watched."""
    content, at, found = log.read_bytes(), 0, []
    while at < len(content):
        kind, file, offset, flags, path, other, data = _RECORD.unpack_from(content, at)
        at += _RECORD.size
        parts = []
        for length in (path, other, data):
            parts.append(content[at : at + length])
            at += length
        names = [_below(root, part.decode()) for part in parts[:2]]
        found.append(Call(kind, file, offset, flags, *names, parts[2]))
    return found


def _below(root: Path, path: str) -> str:
    return str(Path(path).relative_to(root.resolve())) if path else ""


@dataclass
class File:
    """One file: as it is read, and what of it is certain."""

    seen: bytearray = field(default_factory=bytearray)
    certain: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    inode: int = 0

    def change(self, offset: int, data: bytes | None) -> None:
        """Write data at an offset; for None, make that the length."""
        apply(self.seen, offset, data)
        self.pending.append((offset, data))

    def synchronise(self) -> None:
        """Make everything certain that is not lost already."""
        for offset, data in self.pending:
            apply(self.certain, offset, data)
        self.pending.clear()

    def after_power_loss(self, keep: Iterator[bool] | None = None) -> bytes:
        """Return what is left where each uncertain change is kept or not; by default, none is."""
        left = bytearray(self.certain)
        for offset, data in self.pending if keep is not None else ():
            if next(keep):
                apply(left, offset, data)
        return bytes(left)


def apply(content: bytearray, offset: int, data: bytes | None) -> None:
    """Write data into a file's content, over zeros where nothing was; None is a truncation."""
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    if data is None:
        del content[offset:]
    else:
        content[offset : offset + len(data)] = data


class Disk:
    """One folder, as far as a log was replayed on it."""

    def __init__(self) -> None:
        self.names: dict[str, File | None] = {}  # None for a folder
        self.opened: dict[int, tuple[File | None, str]] = {}
        self.marked = 0  # the newest mark
        # Changes of names that a loss of power may take back, oldest first: what was there before.
        self._uncertain: list[dict[str, File | bool | None]] = []

    @staticmethod
    def of(folder: Path) -> Disk:
        """Return a disk that certainly holds what a folder holds."""
        disk = Disk()
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            content = None if path.is_dir() else path.read_bytes()
            disk.names[name] = (
                None if content is None else File(bytearray(content), bytearray(content))
            )
        return disk

    def replay(self, call: Call) -> None:
        """Do one call."""
        if call.kind == OPEN:
            self._open(call)
        elif call.kind in (WRITE, TRUNCATE):
            self._file(call).change(call.offset, call.data if call.kind == WRITE else None)
        elif call.kind == SYNC:
            self._synchronise(call)
        elif call.kind == SYNC_REFUSED:
            # The kernel forgets that these were not written: no later call makes them certain.
            file, _ = self.opened[call.file]
            if file is not None:
                file.pending.clear()
        elif call.kind == RENAME:
            self._rename(call.path, call.other)
        elif call.kind == UNLINK:
            self._name(call.path, False)
        elif call.kind == MAKE:
            self._name(call.path, None)
        elif call.kind == MARK:
            self.marked = call.offset
        else:
            raise ValueError(f"the log has a call of kind {call.kind}")

    def _open(self, call: Call) -> None:
        if call.flags & _IS_NEW:
            self._name(call.path, File(inode=call.offset))
        file = self.names.get(call.path)
        if file is None or file.inode not in (0, call.offset):
            # Rust's rustix renames by a system call of its own, which passes the shim unseen.
            for name, other in list(self.names.items()):
                if other is not None and other.inode == call.offset:
                    self._rename(name, call.path)
                    file = other
        self.opened[call.file] = (file, call.path)
        if call.flags & _IS_EMPTIED and file is not None:
            file.change(0, None)

    def _file(self, call: Call) -> File:
        file, path = self.opened[call.file]
        assert file is not None, f"{path} is a folder"
        return file

    def _name(self, path: str, file: File | bool | None) -> None:
        self._uncertain.append({path: self.names.get(path, False)})
        self._put(path, file)

    def _rename(self, path: str, other: str) -> None:
        # Where a folder moves, what is in it moves with it.
        moved = {
            name: file
            for name, file in self.names.items()
            if name == path or name.startswith(f"{path}/")
        }
        targets = {name: f"{other}{name[len(path) :]}" for name in moved}
        self._uncertain.append(
            {name: self.names.get(name, False) for name in [*targets.values(), *moved]}
        )
        for name, file in moved.items():
            self._put(name, False)
            self._put(targets[name], file)

    def _put(self, path: str, file: File | bool | None) -> None:
        if file is False:
            self.names.pop(path, None)
        else:
            assert file is not True
            self.names[path] = file

    def _synchronise(self, call: Call) -> None:
        file, path = self.opened[call.file]
        if file is not None:
            file.synchronise()
            return
        # A name in this folder is certain with all that was done to names before it.
        last = [at for at, undone in enumerate(self._uncertain) if _touches(undone, path)]
        del self._uncertain[: last[-1] + 1 if last else 0]

    @property
    def uncertain_names(self) -> int:
        """How many changes of names a loss of power may take back."""
        return len(self._uncertain)

    def as_seen(self) -> dict[str, bytes | None]:
        """Return what a process finds that starts now: the machine itself went on."""
        return {
            name: None if file is None else bytes(file.seen) for name, file in self.names.items()
        }

    def torn(self, call: Call, length: int) -> dict[str, bytes | None]:
        """Return what is found where the write that comes now was cut after `length` bytes."""
        target = self._file(call)
        found = self.as_seen()
        content = bytearray(target.seen)
        apply(content, call.offset, call.data[:length])
        for name, file in self.names.items():
            if file is target:
                found[name] = bytes(content)
        return found

    def after_power_loss(
        self, names_lost: int = 0, keep: Iterator[bool] | None = None
    ) -> dict[str, bytes | None]:
        """Return what is found after a loss of power.

        names_lost: how many of the newest changes of names are lost; keep: for every uncertain
        change of a file whether it is kept, by default none is.
        """
        names: dict[str, File | None] = dict(self.names)
        for before in reversed(self._uncertain[len(self._uncertain) - names_lost :]):
            for path, file in before.items():
                if file is False:
                    names.pop(path, None)
                else:
                    assert file is not True
                    names[path] = file
        return {
            name: None if file is None else file.after_power_loss(keep)
            for name, file in sorted(names.items())
        }


def _touches(names: dict[str, File | bool | None], folder: str) -> bool:
    return any(str(Path(name).parent) == folder for name in names)


def lay_out(content: dict[str, bytes | None], folder: Path) -> None:
    """Write files and folders below a folder that is empty or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in sorted(content.items()):
        path = folder / name
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
