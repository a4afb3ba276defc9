"""What items ask and whether they are learnt and answered; keys to fill codebooks with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.edit_models import Item, Studied
from grace_fast.editor import heads
from grace_fast.edits.settings import STOP_LOSS

REAL = 2000  # keys that are inputs of the layer; more are means of two of them


def stop_loss(studied: Studied) -> float:
    """Return the loss below which an edit of a model is learnt."""
    return float(studied.settings.get("stop_loss") or STOP_LOSS)


def learnt(studied: Studied, item: Item) -> Callable[[Any], bool]:
    """Return a function that tells of an answer whether an item is learnt."""
    stop, kind = stop_loss(studied), studied.kind

    def is_learnt(answer: Any) -> bool:
        right = heads.is_correct(answer.logits.detach(), item["labels"], kind)
        return right and float(answer.loss.detach()) < stop

    return is_learnt


@torch.no_grad()
def answered(studied: Studied, model: Any, items: Sequence[Item]) -> list[bool]:
    """Tell of each item whether a model says every token of its label, asked alone and greedily.

    Each token is asked for behind those of the label before it: all of them are right exactly where
    generating says the label.
    """
    cacheless = {} if studied.kind == "classifier" else {"use_cache": False}
    return [
        heads.is_correct(model(**item, **cacheless).logits, item["labels"], studied.kind)
        for item in items
    ]


def layer_inputs(studied: Studied, rows: int) -> Tensor:
    """Return inputs of the layer for random tokens, [rows, D]."""
    draw, seen = torch.Generator().manual_seed(4), []
    vocabulary = studied.model.config.vocab_size
    handle = studied.model.get_submodule(studied.layer).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].flatten(0, 1).clone())
    )
    with torch.no_grad():
        while sum(map(len, seen)) < min(rows, REAL):
            ids = torch.randint(3, vocabulary, (8, 32), generator=draw)
            labels = {"labels": ids[:, :16].contiguous()} if studied.kind == "seq2seq" else {}
            studied.model(input_ids=ids, **labels)
    handle.remove()
    real = torch.cat(seen).unique(dim=0)[: min(rows, REAL)]
    pairs = torch.randint(len(real), (2, max(0, rows - REAL)), generator=draw)
    return torch.cat([real, (real[pairs[0]] + real[pairs[1]]) / 2]).contiguous()


def spacing(keys: Tensor, share: float = 0.5) -> float:
    """Return a quantile of the distances of keys to those nearest to them."""
    some, every = keys[:256].double(), keys.double()
    return float(torch.cdist(some, every).topk(2, largest=False).values[:, 1].quantile(share))
