"""Reading of a directory for its page, beside whoever edits it; what several sections ask of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.once import cached_property
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.edits.edit import Edit
from grace_fast.edits.history import History
from grace_fast.semantics import Rules, label_mean, scores_of
from grace_fast.store.saved import Saved, read_newest

MOST_HITS = 1 << 40  # believed of one row: their sum is an int64
LABEL_IDS = 6  # of a label, that are shown


@dataclass(frozen=True)
class Told:
    """What there is to say of one row."""

    row: int
    edits: int  # how many live on it
    edit: int | None  # the newest of them; None for a key that was appended by hand
    prompt: str | None  # where it was stored
    answer: str  # the target where it was stored, else the label's ids or numbers
    radius: float
    hits: int


@dataclass(frozen=True)
class Reading:
    """One version of a codebook and its edits, as a directory has them."""

    saved: Saved
    book: Codebook
    history: History

    @cached_property
    def snapshot(self) -> Snapshot:
        """The version that everything is said of."""
        return self.book.snapshot()

    @cached_property
    def rules(self) -> Rules:
        """How its edits were decided."""
        return self.saved.settings.rules(self.snapshot.dtype)

    @cached_property
    def live(self) -> NDArray[np.int64]:
        """[L] the rows that were not removed, ascending."""
        return self.snapshot.live.nonzero()[:, 0].numpy()

    @cached_property
    def radii(self) -> NDArray[np.float32]:
        """[L] their radii."""
        return self.snapshot.radii.numpy()[self.live]

    @cached_property
    def hits(self) -> NDArray[np.int64]:
        """[L] how often each of them was hit, as the manifest has it."""
        counted = np.zeros(self.snapshot.rows, np.int64)
        for row, count in self.saved.hits.items():
            if 0 <= row < len(counted):
                counted[row] = min(count, MOST_HITS)
        return counted[self.live]

    def hits_on(self, row: int) -> int:
        """Return how often a row was hit; 0 of one that was removed."""
        at = int(np.searchsorted(self.live, row))
        return int(self.hits[at]) if at < len(self.live) and self.live[at] == row else 0

    def tell(self, row: int) -> Told:
        """Return what there is to say of a row."""
        life = self.history.rows.get(row)
        edits = () if life is None else life.edits
        newest = self.history.edits[edits[-1]] if edits else None
        text = None if newest is None else newest.text
        return Told(
            row,
            len(edits),
            None if newest is None else newest.id,
            None if text is None else text[0],
            answer_of(newest, self.snapshot.row(row).label),
            self.snapshot.row(row).radius,
            self.hits_on(row),
        )

    def asks_for(self, label: Tensor | None) -> Hashable:
        """Return what is equal where two labels call for the same answer; None for no label."""
        if label is None:
            return None
        if self.rules.semantics == "paper":
            return tuple(label.tolist())
        return label_mean(label)


def answer_of(edit: Edit | None, label: Tensor | None) -> str:
    """Return what a row answers, in words where they were stored."""
    if edit is not None and edit.text is not None:
        return edit.text[1]
    if label is None:
        return "no label"
    scores = scores_of(label)
    told = label.tolist() if scores is None else [float(f"{score:.6g}") for score in scores]
    shown = " ".join(map(str, told[:LABEL_IDS]))
    return f"label {shown}" + (" …" if len(told) > LABEL_IDS else "")


def read(directory: Path, hmac_key: bytes | None = None) -> Reading:
    """Read the newest version of a directory.

    Raises: FileNotFoundError, CodebookCorrupt, OSError as `read_saved`.
    """
    return Reading(*read_newest(directory, hmac_key))


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Return at most so many positions of `count`, evenly spread from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def keys_of(snapshot: Snapshot, rows: NDArray[np.int64]) -> Tensor:
    """Return keys as float64, [n, D]."""
    return snapshot.keys_at(torch.from_numpy(rows)).double()
