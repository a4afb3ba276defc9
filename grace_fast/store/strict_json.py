"""Strict JSON: files of a bounded size, of bounded depth and number of values, no name twice."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from grace_fast.codebook.mapped import open_regular

_BLOCK_BYTES = 1 << 20  # of a text that is looked at, at once
MOST_VALUES = 1 << 22  # of a JSON text: some 200 bytes each once they are parsed
_MOST_IN_LINE = 1 << 18  # of a line of many
_COMMA, _QUOTE, _SLASH = b',"\\'


def read_bounded(
    descriptor: int, most: int, longer: str = "it has more than {most} bytes"
) -> bytes:
    """Return what a file holds, and close it; no more than that is taken into memory.

    descriptor: of a file that may hold `most` bytes; longer: what is said of one that holds more.

    Raises: ValueError for one that holds more, OSError where it cannot be read.
    """
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        # Room for what is asked is made at once; a pipe does not say how much it has.
        size = min(found.st_size, most) if stat.S_ISREG(found.st_mode) else most
        content = file.read(size + 1)
    if len(content) > most:
        raise ValueError(longer.format(most=most, size=found.st_size))
    return content


def read(
    path: Path,
    most: int,
    depth: int,
    constants: bool = False,
    longer: str = "it has more than {most} bytes",
) -> Any:
    """Return what the JSON of a regular file says; as `read_bounded` and `parse`.

    Raises: ValueError and RecursionError for what is none, CodebookCorrupt for no regular file,
    OSError where it cannot be read.
    """
    return parse(read_bounded(open_regular(path), most, longer), depth, constants)


def parse(text: bytes, depth: int, constants: bool = False) -> Any:
    """Return what a JSON text says.

    depth: how many brackets may be open at once; constants: whether NaN and Infinity are numbers.

    Raises: ValueError where it is not UTF-8, no JSON, too deep, or names something twice; where it
    holds more values than are taken into memory, before any is.
    """
    brackets = outline(text)
    # Each round closes the innermost brackets, and no parser has gone down into them yet.
    for _ in range(depth):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    if brackets:
        raise ValueError(f"its brackets do not close, or more than {depth} are open at once")
    constant = None if constants else _refuse_constant
    return json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=constant)


def parse_line(text: str) -> Any:
    """Return what one line of a file of JSON lines says.

    Raises: ValueError where it is no JSON or holds more values than a line may, RecursionError.
    """
    outline(text.encode(), _MOST_IN_LINE)
    return json.loads(text)


def outline(text: bytes, most: int | None = None) -> bytes:
    """Return the brackets of a JSON text outside its strings.

    most: the values it may have, by default `MOST_VALUES`.

    It is looked at block by block: what that takes does not grow with what the text holds.

    Raises: ValueError for more values or brackets than a text may have.
    """
    most = MOST_VALUES if most is None else most
    brackets, values, inside, slashes = bytearray(), 0, 0, 0
    for at in range(0, len(text), _BLOCK_BYTES):
        block = np.frombuffer(text, np.uint8, min(_BLOCK_BYTES, len(text) - at), at)
        quotes, slashes = _unescaped_quotes(block, slashes)
        strings = np.bitwise_xor.accumulate(quotes.view(np.uint8)) ^ inside
        inside = int(strings[-1])
        outside = strings == 0
        values += int(np.count_nonzero(outside & (block == _COMMA)))
        # [ and {, ] and } differ in one bit.
        kind = block | 0x20
        found = block[outside & ((kind == 0x7B) | (kind == 0x7D))]
        brackets += found.tobytes()
        if values > most or len(brackets) > most:  # a list or an object has two
            raise ValueError(f"it holds more than {most} values, or {most // 2} lists and objects")
    return bytes(brackets)


def _unescaped_quotes(
    block: npt.NDArray[np.uint8], slashes: int
) -> tuple[npt.NDArray[np.bool_], int]:
    """Return where a string begins or ends, and whether the next block begins escaped, 0 or 1.

    slashes: whether this one does.
    """
    quotes, slash = block == _QUOTE, block == _SLASH
    if not slashes and not slash.any():
        return quotes, 0
    # An odd number of backslashes before a character escapes it.
    places = np.arange(1, len(block) + 1, dtype=np.int32)
    runs = places - np.maximum.accumulate(np.where(slash, np.int32(-slashes), places))
    escaped = np.empty(len(block), bool)
    escaped[0], escaped[1:] = slashes, runs[:-1] & 1
    return quotes & ~escaped, int(runs[-1]) & 1


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it names {twice!a} more than once")
    return made
