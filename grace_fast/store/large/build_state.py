"""State of a build that is not finished: which of its files count, and how far."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from grace_fast.codebook.mapped import BLOCK_BYTES
from grace_fast.errors import CodebookCorrupt
from grace_fast.store import atomic, files, locks, manifest, strict_json, tensor_files

STREAMED = (*files.MAPPED, "radii")
STATE = "state.json"
FORMAT = 2  # of the state
_SHA256 = re.compile("[0-9a-f]{64}")
_TOKEN = re.compile("[0-9a-f]{16}")  # nothing that leads out of the directory


class BuildState(dict[str, Any]):
    """The fields of a build's state; none where it is to begin.

    Raises: CodebookCorrupt where the file is not one that `save` wrote.
    """

    def __init__(self, work: Path) -> None:
        super().__init__()
        self._work, file = work, work / STATE
        if not os.path.lexists(file):
            return
        try:
            self |= strict_json.read(file, manifest.MAX_BYTES, depth=4)
            known = self["format"]
        except CodebookCorrupt:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CodebookCorrupt(f"{file} is not the state of a build; remove {work}") from error
        if known != FORMAT:
            raise CodebookCorrupt(f"{file} has format {known}, wanted {FORMAT}; remove {work}")
        if not _TOKEN.fullmatch(str(self.get("token"))):
            raise CodebookCorrupt(f"{file} does not name the files of a build; remove {work}")
        if not _is_complete(self):
            raise CodebookCorrupt(f"{file} does not tell what was written; remove {work}")

    def begin(self, dtype: torch.dtype, key_dim: int, value_dim: int) -> None:
        """Note down what the codebook is like."""
        none = {"rows": 0, "checks": [], "last_check": sha256().hexdigest()}
        self.save(
            token=secrets.token_hex(8),
            dtype=str(dtype),
            widths={"keys": key_dim, "values": value_dim},
            **dict.fromkeys(STREAMED, none),
        )

    def save(self, **changes: Any) -> None:
        """Put changes on the disk, once what they say is on it."""
        locks.require_claim(self._work)
        self |= {"format": FORMAT, **changes}
        atomic.replace(self._work / STATE, json.dumps(self).encode())

    @property
    def rows(self) -> int:
        """The number of rows that were written."""
        return int(self["keys"]["rows"]) if self else 0

    @property
    def dtype(self) -> torch.dtype:
        """The element type of keys and values."""
        return tensor_files.DTYPES[self["dtype"]]


def _is_complete(state: Mapping[str, Any]) -> bool:
    """Tell whether a state says all that a build goes on from, each part of its type."""
    widths, dtype = state.get("widths"), state.get("dtype")
    if (
        not isinstance(dtype, str)
        or dtype not in tensor_files.DTYPES
        or not isinstance(widths, dict)
    ):
        return False
    if widths.keys() != set(files.MAPPED) or not all(
        _is_count(width, 1) for width in widths.values()
    ):
        return False
    sizes = {"radii": 4} | {
        name: width * tensor_files.DTYPES[dtype].itemsize for name, width in widths.items()
    }
    rows = [_rows_of(state.get(name), sizes[name]) for name in STREAMED]
    encoded, fitted = state.get("encoded", {}), state.get("map", {})
    return (
        None not in rows
        and (len(set(rows)) == 1 or not state.get("written"))
        and isinstance(fitted, dict)
        and isinstance(encoded, dict)
        and set(encoded) in (set(), {"rows", "near_error", "far_error"})
        and all(isinstance(each, int | float) and 0 <= each < math.inf for each in encoded.values())
        and _is_count(encoded.get("rows", 0), 0)
        and encoded.get("rows", 0) <= (rows[0] or 0)
    )


def _rows_of(checkpoint: Any, row_bytes: int) -> int | None:
    """Return how many rows a checkpoint tells of; None where it is none of such rows."""
    if not isinstance(checkpoint, dict) or checkpoint.keys() != {"rows", "checks", "last_check"}:
        return None
    rows, checks = checkpoint["rows"], checkpoint["checks"]
    if not _is_count(rows, 0) or not isinstance(checks, list):
        return None
    sums = [*checks, checkpoint["last_check"]]
    if not all(isinstance(each, str) and _SHA256.fullmatch(each) for each in sums):
        return None
    return int(rows) if len(checks) == rows * row_bytes // BLOCK_BYTES else None


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < manifest.MAX_NUMBER
