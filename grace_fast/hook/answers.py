"""What the queries of one call found, and how it is written into the layer's output.

An answer outlives its call: `generate` holds it for the steps that follow, and a checkpointed
layer that runs again in the backward pass writes what it wrote before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.semantics import Replacement


@dataclass(frozen=True)
class Answer:
    """Which of Q queries hit, of which row, and where in their sequences they were asked.

    A query is a row of the batch, or with an `owner` one of several in a row.
    """

    position: Tensor  # [Q], the query token: of its row, cached tokens counted; of B*T with owner
    snapshot: Snapshot
    hit: Tensor | None  # [Q] bool; None where nothing hit
    row: Tensor | None  # [Q] int64
    owner: Tensor | None = None  # [B*T] int64, the query that decides for each token

    def fits(self, batch: int) -> bool:
        """Tell whether this was decided for the rows of a batch of this size."""
        return self.owner is None and len(self.position) == batch

    def for_batch(self, batch: int) -> Answer | None:
        """Return this for a batch whose rows may be several for each of these; None if not."""
        if self.fits(batch):
            return self
        count = len(self.position)
        if self.owner is not None or not count or batch % count:
            return None
        each = [
            None if one is None else one.repeat_interleave(batch // count)
            for one in (self.position, self.hit, self.row)
        ]
        assert each[0] is not None
        return Answer(each[0], self.snapshot, each[1], each[2])

    def values(self) -> Tensor | None:
        """Return the value of each query's row [Q, V], None where nothing hit.

        Raises: CodebookCorrupt where they lie in a file that is not what was saved.
        """
        return None if self.row is None else self.snapshot.values_of(self.row)

    def write(
        self, output: Tensor, values: Tensor, mode: Replacement, cached: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """Return output [B, T, V] with the hits' values and what was replaced [B, T].

        values: what `values` returned; cached: the tokens of the sequences before these.
        """
        assert self.hit is not None, "there are values"
        return write_values(output, self.hit, values, self.position - cached, mode, self.owner)


def write_values(
    output: Tensor,
    hit: Tensor,
    values: Tensor,
    position: Tensor,
    mode: Replacement,
    owner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output [B, T, V] with values [Q, V] where they hit, and what was replaced [B, T].

    position: [Q], the query token in this call, of its row or with an owner [B*T] of all tokens.
    """
    hit, values, position = (tensor.to(output.device) for tensor in (hit, values, position))
    batch, length, width = output.shape
    if owner is None:
        mask = semantics.replacement_mask(mode, position, length)
        return semantics.replace(output, hit, values, mask), hit[:, None] & mask
    # Each token is a row of its own, which the query that owns it answers for.
    owner = owner.to(output.device)
    token = torch.arange(batch * length, device=output.device)
    after = position[owner] - token
    mask = {"replace_all": after == after, "replace_last": after == 0, "replace_prompt": after > 0}[
        mode
    ]
    asked = hit[owner]
    rows = output.reshape(batch * length, 1, width)
    written = semantics.replace(rows, asked, values[owner], mask[:, None])
    return written.view(output.shape), (asked & mask).view(batch, length)
