"""Cut of the language head: logits only where there is a target.

Of a prompt and its target a few tokens are asked for, and the vocabulary is the widest layer of
many models. What is given to the head is cut to the tokens that count, so that its logits are
[1, n, C]; the loss is then made of them here, and the model is given no labels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grace_fast.editor.batches import Batch
from grace_fast.editor.heads import Head, Kind
from grace_fast.semantics import IGNORED_LABEL

# MKL multiplies two or three rows slower than four (AVX-512, 384 x 50,257: 28 ms, 28 ms, 13 ms).
LEAST = 4


class Asked(NamedTuple):
    """The tokens of a batch that have a target, n of them."""

    row: Tensor  # [n] int64
    token: Tensor  # [n] int64, whose logits are asked
    wanted: Tensor  # [n] int64
    length: int  # L of the tokens that these are counted in


def asked_of(targets: Tensor, kind: Kind, head: Head) -> Asked | None:
    """Return where logits are asked for; None where each token of a batch is not asked alone."""
    if targets.ndim != 2 or head not in ("tokens", "classes"):
        return None
    row, token = (targets != IGNORED_LABEL).nonzero(as_tuple=True)
    if kind == "decoder":  # predicted one token ahead; nothing predicts the first
        row, token = row[token > 0], token[token > 0]
    wanted = targets[row, token].to(torch.int64)
    return Asked(row, token - int(kind == "decoder"), wanted, targets.shape[1])


def bare(asked: Batch, model: nn.Module, kind: Kind) -> Batch | None:
    """Return a batch without labels that the model computes the same for; None: none is known."""
    rest = {name: value for name, value in asked.items() if name != "labels"}
    if kind != "seq2seq" or "decoder_input_ids" in asked or "decoder_inputs_embeds" in asked:
        return rest
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return None if shift is None else {**rest, "decoder_input_ids": shift(labels=asked["labels"])}


class HeadCut:
    """The output embeddings of a model, given the hidden states of some tokens alone."""

    def __init__(self, model: nn.Module, asked: Asked) -> None:
        find: Any = getattr(model, "get_output_embeddings", None)
        self._head = find() if callable(find) else None
        self.asked = asked
        self.taken = 0  # calls of the head that were cut

    @property
    def is_possible(self) -> bool:
        """Tell whether there is a head that takes one vector a token."""
        return isinstance(self._head, nn.Linear) and len(self.asked.row) > 0

    @contextmanager
    def on(self) -> Iterator[None]:
        """Cut what this thread's calls give to the head within the block."""
        me, self.taken = threading.get_ident(), 0
        assert self._head is not None, "a cut is possible"

        def cut(_: nn.Module, args: tuple[Any, ...]) -> Any:
            # Another thread that compiles the model now has a graph made without the cut.
            if (
                torch.compiler.is_dynamo_compiling()
                or threading.get_ident() != me
                or not args
                or not isinstance(args[0], Tensor)
            ):
                return None
            self.taken += 1
            return (self._rows(args[0]), *args[1:])

        hook = self._head.register_forward_pre_hook(cut)
        try:
            yield
        finally:
            hook.remove()

    def _rows(self, hidden: Tensor) -> Tensor:
        """Return the asked tokens of hidden states [B, T, D], [1, n, D], at least `LEAST`."""
        asked, length = self.asked, hidden.shape[-2]
        at = asked.row * length + (length - asked.length) + asked.token
        if 1 < len(at) < LEAST:
            at = torch.cat([at, at[:1].expand(LEAST - len(at))])
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat.index_select(0, at.to(flat.device))[None]

    def logits_of(self, answer: Any) -> Tensor | None:
        """Return what an answer says of the asked tokens, [n, C]; None where it was not cut."""
        logits = getattr(answer, "logits", None)
        if self.taken != 1 or not isinstance(logits, Tensor) or logits.ndim != 3:
            return None
        return logits[0, : len(self.asked.row)]
