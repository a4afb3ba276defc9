"""One directory holds one codebook: tensors in safetensors, everything else in `grace_config.json`.

The JSON names the tensor file and a checksum of every tensor in it, so a bit that flipped is seen.
It is replaced last and in one step: a directory holds the old codebook or the new one, whole.
Nothing in it is ever executed; there is no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

FORMAT = 1
CONFIG = "grace_config.json"


class CodebookCorrupt(ValueError):
    """A file is not what was saved: truncated, changed, or never a codebook of ours."""


def checksum(tensor: Tensor) -> str:
    """Return a checksum of a tensor's bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


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
    _replace(folder / name, content)
    _replace(folder / CONFIG, (json.dumps(whole, indent=1) + "\n").encode())
    for old in folder.glob("codebook-*.safetensors"):
        if old.name != name:
            old.unlink()


def _replace(path: Path, content: bytes) -> None:
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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
    if config["format"] > FORMAT:
        raise CodebookCorrupt(
            f"{file} has format {config['format']}, this version of grace_fast reads up to {FORMAT}"
        )
    return config


def read_tensors(path: str | Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a directory, each one checked.

    Raises: CodebookCorrupt naming the file or tensor that is not what was saved.
    """
    described = config.get("tensors")
    if not isinstance(described, dict) or not isinstance(described.get("sha256"), dict):
        raise CodebookCorrupt(f"{path}: {CONFIG} does not describe its tensors")
    name, sums = described.get("file"), described["sha256"]
    if not isinstance(name, str) or Path(name).name != name:
        raise CodebookCorrupt(f"{path}: {name!r} is not the name of a file in this directory")
    file = Path(path) / name
    if not file.is_file() or file.is_symlink():
        raise CodebookCorrupt(f"{file} is missing: the codebook is not complete")
    try:
        tensors: dict[str, Tensor] = load(file.read_bytes())
    except SafetensorError as error:
        raise CodebookCorrupt(f"{file} is truncated or no safetensors file: {error}") from error
    if tensors.keys() != sums.keys():
        odd = sorted(tensors.keys() ^ sums.keys())
        raise CodebookCorrupt(f"{file} does not hold the tensors that were saved: {odd}")
    for tensor_name, tensor in tensors.items():
        if checksum(tensor) != sums[tensor_name]:
            raise CodebookCorrupt(f"{file}: {tensor_name} is not what was saved (checksum)")
    return tensors
