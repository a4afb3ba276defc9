"""One directory holds one codebook: tensors in safetensors, everything else in `grace_config.json`.

The JSON names the tensor files and a checksum of every tensor in them, so a bit that flipped is
seen. It is replaced last and in one step: a directory holds the old codebook or the new one, whole.
Nothing in it is ever executed; there is no pickle. Headers are tested before a tensor is read, and
what is no regular file is not read at all. `manifest` has the formats.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from grace_fast.codebook import forks
from grace_fast.codebook.mapped import MappedFile, Shape, open_regular
from grace_fast.errors import CodebookCorrupt as CodebookCorrupt
from grace_fast.errors import CodebookLocked as CodebookLocked
from grace_fast.store import headers, manifest, side_files
from grace_fast.store.headers import Described
from grace_fast.store.manifest import CONFIG as CONFIG

MAPPED = ("keys", "values")
JOURNALS = "journal"  # the stem of their names
_STEMS = ("codebook", "codes", *MAPPED)
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,250}")
_ROOM_BYTES = 1 << 20
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def checksum(tensor: Tensor) -> str:
    """Return a checksum of a tensor's bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data if len(flat) else b""
    return hashlib.sha256(content).hexdigest()


def write(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    hmac_key: bytes | None = None,
) -> None:
    """Save a codebook to a directory, made where it is absent.

    hmac_key: what the manifest is signed with.

    Raises: OSError where it cannot be written; what was there before stays valid then.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    sums = {name: checksum(tensor) for name, tensor in stored.items()}
    content = serialised(stored)
    name = f"codebook-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    whole = manifest.seal({**config, "tensors": {"file": name, "sha256": sums}}, hmac_key)
    replace(folder / name, content)
    _replace_manifest(folder, whole)
    kept = config.get("journal")
    _drop_others(folder, {name} if kept is None else {name, kept["file"]})


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the content of a file of tensors.

    Raises: MemoryError where there is no room for it.
    """
    # safetensors ends the process where it gets no memory: so it is asked for here, and given back.
    np.empty(3 * sum(tensor.nbytes for tensor in tensors.values()) + _ROOM_BYTES, np.uint8)
    content: bytes = save(dict(tensors), None if metadata is None else dict(metadata))
    return content


def publish(path: str | Path, config: Mapping[str, Any], hmac_key: bytes | None = None) -> None:
    """Let a directory hold the codebook of files that are whole and on the disk.

    Raises: OSError where it cannot be written; what was there before stays valid then.
    """
    folder = Path(path)
    _replace_manifest(folder, manifest.seal(config, hmac_key))
    described = [*config["mapped"].values(), config["tensors"], config["codes"]]
    _drop_others(folder, {each["file"] for each in described if each is not None})


def update(path: Path, fields: Mapping[str, Any], hmac_key: bytes | None = None) -> None:
    """Give some fields of a manifest other values, in one step.

    Raises: OSError where it cannot be written, CodebookCorrupt where it cannot be read.
    """
    config = manifest.read(path, hmac_key)
    if any(config.get(name) != value for name, value in fields.items()):
        _replace_manifest(path, manifest.seal({**config, **fields}, hmac_key))


def _replace_manifest(folder: Path, content: bytes) -> None:
    replace(folder / CONFIG, content, ready=lambda: require_claim(folder))


def change_journal(path: Path, journal: Mapping[str, Any], hmac_key: bytes | None = None) -> None:
    """Let a directory have another journal of the same base, which is whole and on the disk.

    Raises: OSError where it cannot be written, CodebookCorrupt where the manifest cannot be read.
    """
    update(path, {"journal": journal}, hmac_key)
    _drop_others(path, {journal["file"], manifest.read(path)["tensors"]["file"]})


def _drop_others(folder: Path, names: set[str]) -> None:
    """Remove the files of a codebook that is no longer the directory's."""
    for stem in _STEMS:
        for old in folder.glob(f"{stem}-*.safetensors"):
            if old.name not in names and not _is_folder(old):
                old.unlink()
    for old in folder.glob(f"{JOURNALS}-*.sqlite"):
        for each in (*side_files.all_of(old), old):
            if old.name not in names and not _is_folder(each):
                each.unlink(missing_ok=True)


def _is_folder(path: Path) -> bool:
    """Tell whether a folder has the name of a file; it is none of ours, and stays."""
    return path.is_dir() and not path.is_symlink()


def store(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a file of tensors that nothing refers to yet; return what the JSON says of it.

    Raises: OSError where it cannot be written; there is no such file then.
    """
    stored = {each: tensor.detach().to("cpu").contiguous() for each, tensor in tensors.items()}
    sums = {each: checksum(tensor) for each, tensor in stored.items()}
    file = folder / f"{name}.safetensors"
    file.unlink(missing_ok=True)  # a link would be followed
    try:
        save_file(stored, file)
        synchronise(file)
    except (OSError, SafetensorError) as error:
        file.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else OSError(f"{file}: {error}") from error
    synchronise(folder)
    return {"file": file.name, "sha256": sums}


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


_REMOVALS = 10
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
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


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Have a new folder within a `with` block; unlike tempfile's, no fork that ends removes it."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def absolute(path: str | os.PathLike[str] | bytes) -> Path:
    """Return where a path leads now, for later: the working directory may be another one then.

    A `~` is the home directory; links on the way stay what they are, so that `..` behind one leads
    where the system says.
    """
    return Path(os.path.expanduser(os.fsdecode(path))).absolute()


class ChangedMeanwhile(OSError):
    """What was read of a directory is of two of its states; it has to be read again."""


def steadily(path: str | Path, read: Callable[[], T]) -> T:
    """Return what `read` reads of a directory, again where another process replaced it meanwhile.

    A manifest names files that go when the next one takes its place. What does not fit under the
    same manifest is damaged; under another one it was only read too slowly.

    Raises: what `read` raises, where the manifest is the same as before.
    """
    for _ in range(_READINGS):
        before = _stamp(path)
        try:
            return read()
        except ChangedMeanwhile:
            continue
        except (CodebookCorrupt, OSError):
            if _stamp(path) == before:
                raise
    return read()


_READINGS = 20
T = TypeVar("T")


def _stamp(path: str | Path) -> tuple[int, ...] | None:
    """Return what tells one manifest of a directory from the next; None where there is none."""
    try:
        found = os.stat(Path(path) / CONFIG, follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def synchronise(path: Path) -> None:
    """Put a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes, ready: Callable[[], None] = lambda: None) -> None:
    """Put a file in place in one step, and on the disk before anything refers to it.

    ready: called right before that step; what it raises prevents it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # never through a link that has its name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        ready()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    synchronise(path.parent)


def holds_codebook(path: str | Path) -> bool:
    """Tell whether a directory has a codebook in it, or something in the place of one."""
    return os.path.lexists(Path(path) / CONFIG)


def read_config(path: str | Path, hmac_key: bytes | None = None) -> dict[str, Any]:
    """Return what the JSON of a directory says.

    Raises: as `manifest.read`.
    """
    return manifest.read(path, hmac_key)


def read_tensors(path: str | Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a directory, each one checked, keys and values too.

    Raises: CodebookCorrupt naming the file or tensor that is not what was saved.
    """
    tensors = read_file(path, config.get("tensors"))
    for name in MAPPED if is_mapped(config) else ():
        file = map_file(path, config, name, tensors)
        file.test_all()
        tensors[name] = file.read(0, file.shape.rows)
    return tensors


def is_mapped(config: Mapping[str, Any]) -> bool:
    """Tell whether keys and values have files of their own."""
    return config["format"] == 2 or "mapped" in config


def read_file(path: str | Path, described: Any, wrong: set[str] | None = None) -> dict[str, Tensor]:
    """Return the tensors of one file, in memory of their own, as the JSON describes them.

    wrong: where the names go of tensors that are not what was saved, rather than being refused;
        those that cannot be read at all are left out.

    Raises: CodebookCorrupt as `read_tensors`.
    """
    if not isinstance(described, dict) or not isinstance(described.get("sha256"), dict):
        raise CodebookCorrupt(f"{path}: {CONFIG} does not describe its tensors")
    file, sums = place(path, described.get("file")), described["sha256"]
    try:
        descriptor = open_regular(file)
    except OSError as error:
        raise CodebookCorrupt(f"{file} is missing: the codebook is not complete") from error
    try:
        found = headers.check(descriptor, sums.keys())
        tensors = _read_all(descriptor, found, wrong)
    except CodebookCorrupt as error:
        raise CodebookCorrupt(
            f"{file} is truncated or no safetensors file: {error}", field=error.field, row=error.row
        ) from error
    except OSError as error:
        raise CodebookCorrupt(f"{file} could not be read: {error}") from error
    finally:
        os.close(descriptor)
    for tensor_name, tensor in tensors.items():
        if checksum(tensor) != sums[tensor_name]:
            if wrong is not None:
                wrong.add(tensor_name)
                continue
            raise CodebookCorrupt(
                f"{file}: {tensor_name} is not what was saved (checksum)", field=tensor_name
            )
    return tensors


def map_file(
    path: str | Path, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
) -> MappedFile:
    """Return the file of the keys or values of a directory; its rows are tested when fetched.

    Raises: CodebookCorrupt where it is missing, of another size or not described.
    """
    file, shape, checks = described_rows(path, config, name, tensors)
    return MappedFile(file, name, shape, checks)


def described_rows(
    path: str | Path, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
) -> tuple[Path, Shape, Tensor]:
    """Return where the keys or values of a directory are, their shape, the checks of their blocks.

    Raises: CodebookCorrupt where that is not described.
    """
    described, checks = config.get("mapped"), tensors.get(f"{name}.blocks")
    try:
        told = described[name]  # type: ignore[index]
        rows, width = told["rows"], told["width"]
        shape, file = Shape(rows, width, DTYPES[told["dtype"]]), told["file"]
    except (KeyError, TypeError) as error:
        raise CodebookCorrupt(f"{path}: {CONFIG} does not describe its {name}") from error
    if type(rows) is not int or type(width) is not int or rows < 0 or width < 1:
        raise CodebookCorrupt(f"{path}: {name} must be [>= 0, >= 1], got [{rows}, {width}]")
    kind, tail = (torch.int64, ()) if config["format"] == 2 else (torch.uint8, (32,))
    if checks is None or checks.dtype != kind or not checks.ndim or checks.shape[1:] != tail:
        raise CodebookCorrupt(f"{path}: there are no checksums of the {name}")
    return place(path, file), shape, checks


def place(path: str | Path, name: Any) -> Path:
    """Return where a file of a directory is.

    Raises: CodebookCorrupt for what is not the name of a file in it.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CodebookCorrupt(f"{path}: {name!a} is not the name of a file in this directory")
    return Path(path) / name


def _read_all(
    descriptor: int, found: Mapping[str, Described], wrong: set[str] | None
) -> dict[str, Tensor]:
    tensors = {}
    for name, each in found.items():
        try:
            tensors[name] = _read(descriptor, name, each)
        except CodebookCorrupt as error:
            if wrong is None or error.field is None:
                raise
            wrong.add(name)
    return tensors


def _read(descriptor: int, name: str, described: Described) -> Tensor:
    """Return a tensor in memory of numpy's, which asks for huge pages where there is much of it."""
    size = described.end - described.begin
    room = np.empty(size, np.uint8)
    at = 0
    while at < size:
        got = os.preadv(descriptor, [room.data[at:]], described.begin + at)
        if not got:
            raise CodebookCorrupt("it shrank while it was read")
        at += got
    return headers.tensor(name, described, room)
