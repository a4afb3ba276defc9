"""One directory holds one codebook: tensors in safetensors, everything else in `grace_config.json`.

The JSON names the tensor files and a checksum of every tensor in them, so a bit that flipped is
seen. It is replaced last and in one step: a directory holds the old codebook or the new one, whole.
Nothing in it is ever executed; there is no pickle.

Format 1 has one tensor file (`save_pretrained`). In format 2 (`gf.save`, `gf.build`) keys and
values have files of their own, to be mapped, and so have the codes of the certificate.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from grace_fast.mapped import CodebookCorrupt as CodebookCorrupt
from grace_fast.mapped import MappedFile, Shape

FORMAT, MAPPED_FORMAT = 1, 2
CONFIG = "grace_config.json"
MAPPED = ("keys", "values")
_STEMS = ("codebook", "codes", *MAPPED)
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def checksum(tensor: Tensor) -> str:
    """Return a checksum of a tensor's bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data if len(flat) else b""
    return hashlib.sha256(content).hexdigest()


def write(path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Save a codebook to a directory, made where it is absent.

    Raises: OSError where it cannot be written; what was there before stays valid then.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    sums = {name: checksum(tensor) for name, tensor in stored.items()}
    content = save(stored)
    name = f"codebook-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    whole = {"format": FORMAT, **config, "tensors": {"file": name, "sha256": sums}}
    replace(folder / name, content)
    replace(folder / CONFIG, (json.dumps(whole, indent=1) + "\n").encode())
    _drop_others(folder, {name})


def publish(path: str | Path, config: Mapping[str, Any]) -> None:
    """Let a directory hold the codebook of files that are whole and on the disk.

    Raises: OSError where it cannot be written; what was there before stays valid then.
    """
    folder = Path(path)
    whole = {"format": MAPPED_FORMAT, **config}
    replace(folder / CONFIG, (json.dumps(whole, indent=1) + "\n").encode())
    described = [*config["mapped"].values(), config["tensors"], config["codes"]]
    _drop_others(folder, {each["file"] for each in described if each is not None})


def _drop_others(folder: Path, names: set[str]) -> None:
    """Remove the files of a codebook that is no longer the directory's."""
    for stem in _STEMS:
        for old in folder.glob(f"{stem}-*.safetensors"):
            if old.name not in names:
                old.unlink()


def store(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a file of tensors that nothing refers to yet; return what the JSON says of it.

    Raises: OSError where it cannot be written; there is no such file then.
    """
    stored = {each: tensor.detach().to("cpu").contiguous() for each, tensor in tensors.items()}
    sums = {each: checksum(tensor) for each, tensor in stored.items()}
    file = folder / f"{name}.safetensors"
    try:
        save_file(stored, file)
        synchronise(file)
    except (OSError, SafetensorError) as error:
        file.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else OSError(f"{file}: {error}") from error
    synchronise(folder)
    return {"file": file.name, "sha256": sums}


def synchronise(path: Path) -> None:
    """Put a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Put a file in place in one step, and on the disk before anything refers to it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    synchronise(path.parent)


def holds_codebook(path: str | Path) -> bool:
    """Tell whether a directory has a codebook in it."""
    return (Path(path) / CONFIG).is_file()


def read_config(path: str | Path) -> dict[str, Any]:
    """Return what the JSON of a directory says.

    Raises: FileNotFoundError where there is none, CodebookCorrupt where it is not ours.
    """
    file = Path(path) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a codebook: it has no {CONFIG}")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CodebookCorrupt(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise CodebookCorrupt(f"{file} is not a codebook's: it has no format number")
    if config["format"] > MAPPED_FORMAT:
        raise CodebookCorrupt(
            f"{file} has format {config['format']}, "
            f"this version of grace_fast reads up to {MAPPED_FORMAT}"
        )
    return config


def read_tensors(path: str | Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a directory, each one checked, keys and values too.

    Raises: CodebookCorrupt naming the file or tensor that is not what was saved.
    """
    tensors = read_file(path, config.get("tensors"))
    for name in MAPPED if is_mapped(config) else ():
        file = map_file(path, config, name, tensors)
        file.test_all()
        tensors[name] = load(file.path.read_bytes())[name]
    return tensors


def is_mapped(config: Mapping[str, Any]) -> bool:
    """Tell whether keys and values have files of their own."""
    return bool(config["format"] >= MAPPED_FORMAT)


def read_file(path: str | Path, described: Any) -> dict[str, Tensor]:
    """Return the tensors of one file, in memory of their own, as the JSON describes them.

    Raises: CodebookCorrupt as `read_tensors`.
    """
    if not isinstance(described, dict) or not isinstance(described.get("sha256"), dict):
        raise CodebookCorrupt(f"{path}: {CONFIG} does not describe its tensors")
    file, sums = _named(path, described.get("file")), described["sha256"]
    if not file.is_file() or file.is_symlink():
        raise CodebookCorrupt(f"{file} is missing: the codebook is not complete")
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            tensors = {name: _copy(opened.get_tensor(name)) for name in names}
    except (SafetensorError, OSError) as error:
        raise CodebookCorrupt(f"{file} is truncated or no safetensors file: {error}") from error
    if tensors.keys() != sums.keys():
        odd = sorted(tensors.keys() ^ sums.keys())
        raise CodebookCorrupt(f"{file} does not hold the tensors that were saved: {odd}")
    for tensor_name, tensor in tensors.items():
        if checksum(tensor) != sums[tensor_name]:
            raise CodebookCorrupt(f"{file}: {tensor_name} is not what was saved (checksum)")
    return tensors


def map_file(
    path: str | Path, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
) -> MappedFile:
    """Return the file of the keys or values of a directory; its rows are tested when fetched.

    Raises: CodebookCorrupt where it is missing, of another size or not described.
    """
    described, checks = config.get("mapped"), tensors.get(f"{name}.blocks")
    try:
        told = described[name]  # type: ignore[index]
        shape = Shape(int(told["rows"]), int(told["width"]), DTYPES[told["dtype"]])
        file = told["file"]
    except (KeyError, TypeError, ValueError) as error:
        raise CodebookCorrupt(f"{path}: {CONFIG} does not describe its {name}") from error
    if checks is None or checks.dtype != torch.int64 or checks.ndim != 1:
        raise CodebookCorrupt(f"{path}: there are no checksums of the {name}")
    if shape.rows < 0 or shape.width < 1:
        raise CodebookCorrupt(f"{path}: {name} must be [>= 0, >= 1], got {shape}")
    return MappedFile(_named(path, file), name, shape, checks)


def _named(path: str | Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name:
        raise CodebookCorrupt(f"{path}: {name!r} is not the name of a file in this directory")
    return Path(path) / name


def _copy(tensor: Tensor) -> Tensor:
    """Return a tensor in memory of numpy's, which asks for huge pages where there is much of it."""
    if not tensor.numel():
        return tensor.clone()
    room = torch.from_numpy(np.empty(tensor.nbytes, np.uint8)).view(tensor.dtype)
    return room.view(tensor.shape).copy_(tensor)
