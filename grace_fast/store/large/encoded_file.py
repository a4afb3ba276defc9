"""Codes of a build in files, in order of rows: what was noted down need not be encoded again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from grace_fast.codebook.mapped import refuse_special
from grace_fast.index.quantizer import Quantized
from grace_fast.index.segments import Encoded

CHECKPOINT_KEYS = 1 << 18  # encoded between two states


class EncodedOnDisk(Encoded):
    """Codes in files.

    known: what was noted down last; note: notes down how much of them counts.
    """

    def __init__(
        self,
        work: Path,
        count: int,
        known: dict[str, Any] | None,
        note: Callable[[dict[str, Any]], None],
        bar: Any,
    ) -> None:
        room = Encoded.room(0)
        self._files: list[np.memmap[Any, Any]] = []
        for name in ("points", "near", "far"):
            like = getattr(room, name)
            self._files.append(
                _mapped(work / name, like.dtype, (count, like.shape[1]), bool(known))
            )
        points, near, far = self._files
        super().__init__(points, near, far, **(known or {}))
        self._note, self._bar, self._noted = note, bar, self.rows
        bar.update(self.rows)

    def put(self, codes: Quantized) -> None:
        """Take the codes of the next keys in."""
        super().put(codes)
        self._bar.update(len(codes.whole))
        if self.rows - self._noted >= CHECKPOINT_KEYS:
            for file in self._files:
                file.flush()
            errors = {"near_error": self.near_error, "far_error": self.far_error}
            self._note({"rows": self.rows, **errors})
            self._noted = self.rows


def _mapped(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, int], known: bool
) -> np.memmap[Any, Any]:
    refuse_special(path)
    if not known:
        # A page of a hole that the disk has no room for is a bus error, not an OSError.
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shape[0] * shape[1] * dtype.itemsize))
    return np.memmap(path, dtype, "r+", shape=shape)
