"""The override of values while they are trained: written where they will be found once published.

Nothing is looked up while it is trained: other threads edit the codebook meanwhile, and the draft
that the edit was decided on is gone. What its own tokens hit is taken from that draft before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast.codebook.snapshot import Snapshot
from grace_fast.hook.answers import write_values
from grace_fast.lookup import lookup
from grace_fast.semantics import Replacement


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the tokens of a batch hit, each for itself, with an edit in the codebook."""

    hit: Tensor  # [B*T] bool
    row: Tensor  # [B*T] int64
    stored: Tensor  # [B*T, V], the values of these rows, as they were then

    @staticmethod
    def of(queries: Tensor, ends: Tensor, row: int, snapshot: Snapshot) -> Tokens:
        """Look the tokens of a batch up: queries [B, T, D], of which those at ends [B] hit a row.

        What is returned shares no memory with the snapshot.
        """
        rows = queries.flatten(0, 1).to(snapshot.device, snapshot.dtype)
        match = lookup.find(rows, snapshot)
        hit, found = match.hit.clone(), match.row.clone()
        first = torch.arange(len(ends), device=ends.device) * queries.shape[1]
        asked = (first + ends).to(found.device)
        hit[asked], found[asked] = True, row
        return Tokens(hit, found, snapshot.values_of(found).clone())

    @staticmethod
    def joined(parts: Sequence[Tokens]) -> Tokens:
        """Return the tokens of several batches, one after the other."""
        fields = ((one.hit, one.row, one.stored) for one in parts)
        return Tokens(*map(torch.cat, zip(*fields, strict=True)))


@dataclass
class TrainingOverride:
    """Values in training, in place of those of rows, for the rows of a batch that they answer."""

    values: Tensor  # [R, V]
    rows: tuple[int, ...]  # R, of the codebook
    owner: Tensor  # [B] int64, which of the values each row of the batch gets
    tokens: Tokens | None = None  # where each token asks for itself
    queries: Tensor | None = None  # [B, D], what the rows asked when it was last written
    on_write: Callable[[], None] | None = None  # told before the values are written

    def write(
        self, output: Tensor, ends: Tensor, replacement: Replacement
    ) -> tuple[Tensor, Tensor]:
        """Return output [B, T, V] as if every prompt's end [B] hit its value, and what that is."""
        if self.on_write is not None:
            self.on_write()
        owner = self.owner.to(self.values.device)
        if self.tokens is not None:
            return self._write_tokens(output, self.tokens, owner)
        hit = torch.ones(len(output), dtype=torch.bool, device=output.device)
        return write_values(output, hit, self.values[owner], ends, replacement)

    def _write_tokens(self, output: Tensor, tokens: Tokens, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same where each token asks for itself: the others hit what they hit otherwise.

        A token that hits the row of another value gets that as it is now, and teaches it nothing.
        """
        values, stored = self.values, tokens.stored.to(self.values.dtype)
        own = owner.repeat_interleave(len(stored) // len(owner))
        written = stored
        for at, row in enumerate(self.rows):
            here = tokens.row == row
            value = torch.where((own == at)[:, None], values[at], values[at].detach())
            written = torch.where(here[:, None], value, written)
        token = torch.arange(len(stored), device=stored.device)
        return write_values(output, tokens.hit, written, token, "replace_last", token)
