"""A value in training, written where it will be found once its edit is published."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast import lookup
from grace_fast.answers import Answer, write_values
from grace_fast.codebook import Snapshot
from grace_fast.semantics import Replacement


@dataclass
class Trial:
    """A value in training, in place of one row's."""

    value: Tensor  # [V]
    row: int
    snapshot: Snapshot  # the codebook as this edit leaves it
    others: Answer | None = None  # what the tokens of the batch hit, each for itself

    def write(
        self, output: Tensor, ends: Tensor, replacement: Replacement
    ) -> tuple[Tensor, Tensor]:
        """Return output [B, T, V] as if every prompt's end [B] hit this value, and what that is."""
        hit = torch.ones(len(output), dtype=torch.bool, device=output.device)
        return write_values(output, hit, self.value.expand(len(output), -1), ends, replacement)

    def write_tokens(self, queries: Tensor, output: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same where each token asks for itself: the others hit what they hit otherwise.

        queries: [B*T, D], the same at every step of the training.
        """
        if self.others is None:
            self.others = self._find(queries, ends, output.shape[1])
        hit, row = self.others.hit, self.others.row
        assert hit is not None
        assert row is not None
        stored = self.snapshot.values_of(row).to(self.value.dtype)
        values = torch.where((row == self.row)[:, None], self.value, stored)
        token = self.others.position
        return write_values(output, hit, values, token, "replace_last", token)

    def _find(self, queries: Tensor, ends: Tensor, length: int) -> Answer:
        match = lookup.find(queries.to(self.snapshot.device, self.snapshot.dtype), self.snapshot)
        hit, row = match.hit.clone(), match.row.clone()
        asked = (torch.arange(len(ends), device=ends.device) * length + ends).to(row.device)
        hit[asked], row[asked] = True, self.row
        token = torch.arange(len(queries), device=queries.device)
        return Answer(token, self.snapshot, hit, row, token)
