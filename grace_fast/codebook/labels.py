"""Label ids by slot: those of a file in one tensor, later ones one by one.

A label is ids, [L] int64: of tokens, of a class, of the ends of a span. Numbers, as a regression is
taught, are ids too: a mark that no token has, then the bits of each (`semantics.score_label`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Labels:
    """The labels of a codebook by slot, int64 [L] each, or None. They are only ever added.

    lengths: [N] int64 of the first ones, -1 for none; ids: their ids, one after the other.
    """

    def __init__(self, lengths: Tensor | None = None, ids: Tensor | None = None) -> None:
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._lengths = nothing if lengths is None else lengths
        self._ids = nothing if ids is None else ids
        self._ends = self._lengths.clamp(min=0).cumsum(0).numpy()
        self._later: list[Tensor | None] = []

    def __len__(self) -> int:
        return len(self._lengths) + len(self._later)

    def __getitem__(self, slot: int) -> Tensor | None:
        first = len(self._lengths)
        if slot >= first:
            return self._later[slot - first]
        if not slot >= 0:
            raise IndexError(f"a label's slot must be at least 0, got {slot}")
        length = int(self._lengths[slot])
        if length < 0:
            return None
        end = int(self._ends[slot])
        return self._ids[end - length : end]

    def between(self, first: int, last: int) -> list[Tensor | None]:
        """Return the labels of slots [first, last)."""
        known = len(self._lengths)
        if first >= known:
            return self._later[first - known : last - known]
        return [self[slot] for slot in range(first, last)]

    def columns(self, count: int) -> tuple[Tensor, Tensor]:
        """Return lengths [count] and ids of the first labels, as they are given to `Labels`."""
        known = min(count, len(self._lengths))
        end = int(self._ends[known - 1]) if known else 0
        lengths, ids = columns_of(self._later[: count - known])
        return torch.cat([self._lengths[:known], lengths]), torch.cat([self._ids[:end], ids])

    def extend(self, labels: Iterable[Tensor | None]) -> None:
        """Add labels at the end."""
        self._later.extend(labels)

    def cut(self, count: int) -> None:
        """Keep the first ones: the others were added by a draft that was dropped."""
        known = len(self._lengths)
        assert count >= known, "no draft has added what came from a file"
        del self._later[count - known :]


def columns_of(labels: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return lengths and ids of labels, as they are given to `Labels`."""
    lengths = [-1 if label is None else len(label) for label in labels]
    present = [label for label in labels if label is not None]
    ids = torch.cat(present) if present else torch.zeros(0, dtype=torch.int64, device="cpu")
    return torch.tensor(lengths, dtype=torch.int64, device="cpu"), ids
