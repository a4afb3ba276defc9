"""Files of tensors: written with a checksum of every tensor, read only where all of them hold.

Headers are tested before a tensor is read, and what is no regular file is not read at all. There is
no pickle; nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from grace_fast.codebook.mapped import MappedFile, Shape, open_regular
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import headers
from grace_fast.store.atomic import synchronise
from grace_fast.store.headers import Described
from grace_fast.store.manifest import CONFIG

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,250}")
_ROOM_BYTES = 1 << 20


def checksum(tensor: Tensor) -> str:
    """Return a checksum of a tensor's bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().data if len(flat) else b""
    return hashlib.sha256(content).hexdigest()


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the content of a file of tensors.

    Raises: MemoryError where there is no room for it.
    """
    # safetensors ends the process where it gets no memory: so it is asked for here, and given back.
    np.empty(3 * sum(tensor.nbytes for tensor in tensors.values()) + _ROOM_BYTES, np.uint8)
    content: bytes = save(dict(tensors), None if metadata is None else dict(metadata))
    return content


def write_new(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
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


def place(path: str | Path, name: Any) -> Path:
    """Return where a file of a directory is.

    Raises: CodebookCorrupt for what is not the name of a file in it.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CodebookCorrupt(f"{path}: {name!a} is not the name of a file in this directory")
    return Path(path) / name


def read_file(path: str | Path, described: Any, wrong: set[str] | None = None) -> dict[str, Tensor]:
    """Return the tensors of one file, in memory of their own, as the JSON describes them.

    wrong: where the names go of tensors that are not what was saved, rather than being refused;
        those that cannot be read at all are left out.

    Raises: CodebookCorrupt as `read_tensors`.
    """
    if not isinstance(described, dict) or not isinstance(described.get("sha256"), dict):
        raise CodebookCorrupt(f"{path}: {CONFIG} does not describe its tensors")
    file, sums = place(path, described.get("file")), described["sha256"]
    tensors: dict[str, Tensor] = {}
    try:
        descriptor = open_regular(file)
    except OSError as error:
        raise CodebookCorrupt(f"{file} is missing: the codebook is not complete") from error
    try:
        for tensor_name, each in headers.check(descriptor, sums.keys()).items():
            try:
                tensors[tensor_name] = _read(descriptor, tensor_name, each)
            except CodebookCorrupt as error:
                if wrong is None or error.field is None:
                    raise
                wrong.add(tensor_name)
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
        entry = described[name]  # type: ignore[index]
        rows, width = entry["rows"], entry["width"]
        shape, file = Shape(rows, width, DTYPES[entry["dtype"]]), entry["file"]
    except (KeyError, TypeError) as error:
        raise CodebookCorrupt(f"{path}: {CONFIG} does not describe its {name}") from error
    if type(rows) is not int or type(width) is not int or rows < 0 or width < 1:
        raise CodebookCorrupt(f"{path}: {name} must be [>= 0, >= 1], got [{rows}, {width}]")
    kind, tail = (torch.int64, ()) if config["format"] == 2 else (torch.uint8, (32,))
    if checks is None or checks.dtype != kind or not checks.ndim or checks.shape[1:] != tail:
        raise CodebookCorrupt(f"{path}: there are no checksums of the {name}")
    return place(path, file), shape, checks
