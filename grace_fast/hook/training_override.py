"""The override of one value while it is trained: written where it will be found once published.

Nothing is looked up while it is trained: other threads edit the codebook meanwhile, and the draft
that the edit was decided on is gone. What its own tokens hit is taken from that draft before.
"""

from __future__ import annotations

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


@dataclass
class TrainingOverride:
    """A value in training, in place of one row's, for those of a batch that it answers."""

    row: int
    value: Tensor  # [V], the start until training sets another
    picked: tuple[int, ...]  # rows of the batch
    tokens: Tokens | None = None  # where each token asks for itself

    def write(
        self, output: Tensor, ends: Tensor, replacement: Replacement
    ) -> tuple[Tensor, Tensor]:
        """Return output [B, T, V] as if every prompt's end [B] hit this value, and what that is."""
        if self.tokens is not None:
            return self._write_tokens(output, self.tokens)
        hit = torch.ones(len(output), dtype=torch.bool, device=output.device)
        return write_values(output, hit, self.value.expand(len(output), -1), ends, replacement)

    def _write_tokens(self, output: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Do the same where each token asks for itself: the others hit what they hit otherwise."""
        stored = tokens.stored.to(self.value.dtype)
        values = torch.where((tokens.row == self.row)[:, None], self.value, stored)
        token = torch.arange(len(values), device=values.device)
        return write_values(output, tokens.hit, values, token, "replace_last", token)
