"""Headers of safetensors files, tested before anything is done with what they say.

A file is 8 bytes of length, a JSON of that length, and the tensors. Readers are known to take two
tensors of one name, [2^62, 0], or bytes that no tensor owns. Here every byte after the header
belongs to one tensor, and nothing is allocated before the sizes are held against the file's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grace_fast.codebook.mapped import open_regular
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import strict_json

MAX_BYTES = 100_000_000  # of any header: what the format allows
_MAX_BYTES_EACH = 1024  # of a header whose tensors are known, for each of them and once more
_MAX_RANK = 8
_MAX_NUMBER = 2**63 - 1
_DEPTH = 3  # {name: {field: [number]}}
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Described:
    """The entry of one tensor in a header; it lies in the file at [begin, end)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def check(
    content: bytes | memoryview | Path | int, names: Collection[str] | None = None
) -> dict[str, Described]:
    """Return what the header of a safetensors file says, if it fits the file to the last byte.

    content: the file's bytes, its path, or a descriptor of it.
    names: the tensors that it must hold, if that is known: no more and no fewer.

    Raises: CodebookCorrupt saying what is wrong; nothing but the header has been read then.
    """
    if isinstance(content, Path):
        with os.fdopen(open_regular(content), "rb") as file:
            return check(file.fileno(), names)
    if isinstance(content, int):
        size = os.fstat(content).st_size
        length = _length(os.pread(content, 8, 0), size, names)
        return _described(os.pread(content, length, 8), size, names)
    length = _length(bytes(content[:8]), len(content), names)
    return _described(bytes(content[8 : 8 + length]), len(content), names)


def read(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file's bytes, in memory of their own, and its metadata.

    Raises: CodebookCorrupt as `check`, and for truths that are neither 0 nor 1.
    """
    found = check(content)
    bytes_of = np.frombuffer(content, np.uint8)
    tensors = {
        name: tensor(name, each, bytes_of[each.begin : each.end].copy())
        for name, each in found.items()
    }
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = strict_json.parse(content[8 : 8 + length], _DEPTH).get(
        "__metadata__", {}
    )
    return tensors, metadata


def tensor(name: str, described: Described, room: npt.NDArray[np.uint8]) -> Tensor:
    """Return bytes as the tensor that they are.

    Raises: CodebookCorrupt for truths that are neither 0 nor 1.
    """
    if not len(room):
        return torch.empty(described.shape, dtype=described.dtype, device="cpu")
    if described.dtype == torch.bool and room.max() > 1:
        raise CodebookCorrupt(f"its tensor {name} has truths that are neither 0 nor 1", field=name)
    return torch.from_numpy(room).view(described.dtype).view(described.shape)


def _length(prefix: bytes, size: int, names: Collection[str] | None) -> int:
    """Return the bytes of a header in a file of a size."""
    if len(prefix) < 8:
        raise CodebookCorrupt(f"it has {size} bytes, and the length of a header takes 8")
    length, most = int.from_bytes(prefix, "little"), MAX_BYTES
    if names is not None:
        most = min(most, _MAX_BYTES_EACH * (1 + len(names)))
    if length > most:
        raise CodebookCorrupt(f"its header has {length} bytes, wanted at most {most}")
    if length > size - 8:
        raise CodebookCorrupt(f"its header has {length} bytes, and there are {size - 8} after it")
    return length


def _described(text: bytes, size: int, names: Collection[str] | None) -> dict[str, Described]:
    if text[:1] != b"{":
        raise CodebookCorrupt("its header does not begin with {")
    try:
        header = strict_json.parse(text, _DEPTH)
    except (ValueError, RecursionError) as error:
        raise CodebookCorrupt(f"its header is not JSON as it should be: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise CodebookCorrupt("its __metadata__ must be an object of strings")
    if names is not None and header.keys() != set(names):
        others = sorted(header.keys() ^ set(names))
        raise CodebookCorrupt(f"it does not hold the tensors that were saved: {others[:5]}")
    first = 8 + len(text)
    described = {name: _checked(name, each, first) for name, each in header.items()}
    at = first
    for name, each in sorted(described.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if each.begin != at:
            what = "overlaps the one before it" if each.begin < at else "leaves a hole before it"
            raise CodebookCorrupt(f"its tensor {name!a} {what}", field=name)
        at = each.end
    if at != size:
        raise CodebookCorrupt(f"its tensors end at byte {at}, and it has {size} bytes")
    return described


def _checked(name: str, entry: Any, first: int) -> Described:
    """Return what a header says of one tensor, whose offsets count from `first`."""

    def refuse(why: str) -> NoReturn:
        raise CodebookCorrupt(f"its tensor {name!a} {why}", field=name)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse("must have dtype, shape and data_offsets, and nothing else")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        refuse(f"must have one of the element types {sorted(DTYPES)}")
    if not _whole(shape) or len(shape) > _MAX_RANK:
        refuse(f"must have a shape of at most {_MAX_RANK} whole numbers >= 0")
    # A zero makes every product small, so it is left out of the one that must not overflow.
    if math.prod(max(1, length) for length in shape) * dtype.itemsize > _MAX_NUMBER:
        refuse("has a shape whose size overflows")
    if not _whole(offsets) or len(offsets) != 2:
        refuse("must have two data_offsets, whole numbers >= 0")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        refuse(f"has {end - begin} bytes, and its shape {shape} takes another number of them")
    return Described(dtype, tuple(shape), first + begin, first + end)


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers
    )
