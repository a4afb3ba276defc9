"""Which token of each row is the query: rules on the arguments of one forward call.

`prompt_end` asks once a sequence, at its last prompt token. In order of precedence that is
  1. the positions the caller gives,
  2. for a decoder-only model, the token before the first label that counts, where `labels` is
     shaped like `input_ids`: the end of the prompt, with the target after it,
  3. the last token under the 2-D attention mask, on whichever side the padding is,
  4. the last token.
A prompt alone, the same prompt with labels, and `generate` therefore ask with the same query.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grace_fast.semantics import IGNORED_LABEL


def prompt_end(batch: Mapping[str, Any], decoder_only: bool) -> Tensor | None:
    """Return the position of each row's query, [B] int64, or None where the call names no tokens.

    batch: the arguments of a forward call by name; `labels` count only where the model is
    decoder-only.
    """
    tokens = batch.get("input_ids")
    if tokens is None:
        tokens = batch.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return None
    batch_size, length = tokens.shape[:2]
    last = last_unmasked(batch.get("attention_mask"), batch_size, length, tokens.device)
    labels = batch.get("labels")
    if not (decoder_only and isinstance(labels, Tensor) and labels.shape == (batch_size, length)):
        return last
    end = prompt_lengths(labels) - 1
    return torch.where(end >= 0, end, last)


def prompt_lengths(labels: Tensor) -> Tensor:
    """Return how many tokens precede the first label that counts, [B]; 0 where there is none."""
    return (labels != IGNORED_LABEL).int().argmax(dim=1)


def last_unmasked(mask: Any, batch_size: int, length: int, device: torch.device) -> Tensor:
    """Return the last position of each row that a 2-D mask lets through, [B] int64.

    A mask that reaches further back than the tokens (a cache) counts from its end; one of another
    rank, or a row without any token, leaves the last position.
    """
    last = torch.full((batch_size,), length - 1, dtype=torch.int64, device=device)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < length:
        return last
    reversed_mask = mask[:, mask.shape[1] - length :].bool().flip(1)
    return last - reversed_mask.int().argmax(dim=1).to(last)
