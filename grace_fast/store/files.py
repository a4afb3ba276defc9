"""A directory of one codebook: tensors in safetensors, everything else in `grace_config.json`.

The JSON names the tensor files and a checksum of every tensor in them, so a bit that flipped is
seen. It is replaced last and in one step: a directory holds the old codebook or the new one, whole.
`docs/format.md` says what is in every file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from grace_fast.errors import CodebookCorrupt as CodebookCorrupt
from grace_fast.store import manifest, side_files
from grace_fast.store.atomic import replace
from grace_fast.store.locks import require_claim
from grace_fast.store.manifest import CONFIG as CONFIG
from grace_fast.store.tensor_files import checksum, map_file, read_file, serialised

T = TypeVar("T")
MAPPED = ("keys", "values")
JOURNALS = "journal"  # the stem of their names
_STEMS = ("codebook", "codes", *MAPPED)
_READINGS = 20


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
    entry = config.get("journal")
    _drop_others(folder, {name} if entry is None else {name, entry["file"]})


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


class ChangedMeanwhile(OSError):
    """A directory was replaced while it was read: it has to be read again."""


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


def _stamp(path: str | Path) -> tuple[int, ...] | None:
    """Return what tells one manifest of a directory from the next; None where there is none."""
    try:
        found = os.stat(Path(path) / CONFIG, follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
