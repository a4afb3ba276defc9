"""What an edit is made of: a batch of prompts with labels, from tensors, text or chat.

Three kinds of model are told apart, because they read labels differently: `decoder` (labels beside
the prompt's own tokens, predicted one token ahead), `seq2seq` (labels of a second sequence) and
`classifier` (one label a row, or one a token, predicted in place).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grace_fast import positions
from grace_fast.semantics import IGNORED_LABEL, label_ids

Kind = Literal["decoder", "seq2seq", "classifier"]
Batch = dict[str, Any]


def kind_of(model: nn.Module) -> Kind:
    """Return how a model reads labels, from its config and whether it generates."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    can_generate = getattr(model, "can_generate", None)
    return "decoder" if can_generate is not None and can_generate() else "classifier"


def size(batch: Mapping[str, Any]) -> int:
    """Return B, the rows of a batch.

    Raises: ValueError where the batch names no tokens.
    """
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        given = sorted(batch)
        raise ValueError(f"a batch must hold input_ids [B, T] as a tensor, got the fields {given}")
    return len(tokens)


def rows(batch: Mapping[str, Any], picked: Sequence[int]) -> Batch:
    """Return the picked rows of a batch; what is not [B, ...] stays as it is."""
    count = size(batch)
    index = torch.as_tensor(picked, dtype=torch.int64, device="cpu")
    return {
        name: value[index.to(value.device)]
        if isinstance(value, Tensor) and value.ndim and len(value) == count
        else value
        for name, value in batch.items()
    }


def runnable(batch: Batch, kind: Kind, model: nn.Module) -> Batch:
    """Return a batch that a model runs on: a prompt without a target still starts the decoder."""
    if kind != "seq2seq" or batch.get("labels") is not None or "decoder_input_ids" in batch:
        return batch
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    assert isinstance(tokens, Tensor)
    start = getattr(model.config, "decoder_start_token_id", None) or 0
    column = torch.full((len(tokens), 1), start, device=tokens.device, dtype=torch.int64)
    return {**batch, "decoder_input_ids": column}


def check(batch: Mapping[str, Any], kind: Kind, classes: int | None) -> None:
    """Check that every row of a batch to edit has a prompt and a target.

    classes: how many labels there are, where that is known.

    Raises: ValueError naming the row.
    """
    count = size(batch)
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    assert isinstance(tokens, Tensor)
    if tokens.shape[1] == 0:
        raise ValueError("the prompt must have at least one token, got an empty prompt")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        _refuse(mask.sum(dim=1) == 0, "has an empty prompt: its attention mask is all zero")
    if not isinstance(labels, Tensor) or labels.ndim == 0 or len(labels) != count:
        given = tuple(labels.shape) if isinstance(labels, Tensor) else labels
        raise ValueError(f"an edit needs labels, one row for each of {count} prompts, got {given}")
    counted = labels.reshape(count, -1) != IGNORED_LABEL
    _refuse(~counted.any(dim=1), "has a target without tokens: every label is -100")
    if kind == "decoder" and labels.shape == tokens.shape[:2]:
        _refuse(
            positions.prompt_lengths(labels) == 0,
            "has an empty prompt: the first token already has a label",
        )
    if classes is not None:
        outside = counted & (
            (labels.reshape(count, -1) < 0) | (labels.reshape(count, -1) >= classes)
        )
        if outside.any():
            row = int(outside.any(dim=1).nonzero()[0])
            label = int(labels.reshape(count, -1)[row][outside[row]][0])
            raise ValueError(f"labels must be in [0, {classes}) or -100, got {label} in row {row}")


def _refuse(bad: Tensor, why: str) -> None:
    if bad.any():
        raise ValueError(f"row {int(bad.nonzero()[0])} of the batch {why}")


def classes_of(model: nn.Module, kind: Kind) -> int | None:
    """Return how many labels a model tells apart, where its config says so."""
    config = getattr(model, "config", None)
    name = "num_labels" if kind == "classifier" else "vocab_size"
    if kind == "classifier" and not type(model).__name__.endswith("Classification"):
        return None  # every config has a num_labels; only a classifier's means anything
    count = getattr(config, name, None)
    return count if isinstance(count, int) else None


def labels_of(batch: Mapping[str, Any], row: int, padding: int | None, whole: bool) -> Tensor:
    """Return the label of one row as it is stored: [L] int64.

    whole: keep -100 and padding, as the reference compares them.
    """
    labels: Tensor = batch["labels"][row]
    if whole:
        return labels.detach().reshape(-1).to("cpu", torch.int64)
    return label_ids(labels, padding)


def prompt_checksum(batch: Mapping[str, Any], row: int) -> int:
    """Return a checksum of one row's prompt tokens, without padding and target."""
    tokens = batch.get("input_ids")
    if not isinstance(tokens, Tensor):
        return 0
    ids, keep = tokens[row], torch.ones_like(tokens[row], dtype=torch.bool)
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
        keep &= mask[row].bool()
    if isinstance(labels, Tensor) and labels.shape == tokens.shape:
        keep &= labels[row] == IGNORED_LABEL
    return zlib.crc32(ids[keep].to("cpu", torch.int64).numpy().tobytes())


def is_correct(logits: Tensor, labels: Tensor, kind: Kind) -> bool:
    """Tell whether the model's own prediction is the target, for every row.

    logits: [B, C] or [B, T, C]; labels: [B] or [B, T] with -100 where nothing is asked.
    """
    predicted = logits.argmax(dim=-1)
    if kind == "decoder" and predicted.ndim == 2:
        predicted, labels = predicted[:, :-1], labels[:, 1:]
    asked = labels != IGNORED_LABEL
    return bool((predicted.reshape(labels.shape) == labels)[asked].all())


Prompt = str | Sequence[Mapping[str, str]]


def from_text(
    prompt: Prompt, target: str | int | None, tokenizer: Any, model: nn.Module, kind: Kind
) -> Batch:
    """Return the batch of one prompt and its target.

    prompt: text, or chat messages that go through the tokenizer's template; target: the text that
    the model should answer, or for a classifier a class index or name; None for a prompt alone.

    Raises: ValueError for an empty prompt, a target without tokens or an unknown class.
    """
    if tokenizer is None:
        raise ValueError("editing by text needs a tokenizer: attach(..., tokenizer=...)")
    device = next(model.parameters()).device
    ids, text = _prompt_ids(prompt, tokenizer)
    if not ids or not text.strip():
        raise ValueError(f"the prompt must have at least one token, got {prompt!r}")
    batch: Batch = {"input_ids": torch.tensor([ids], device=device, dtype=torch.int64)}
    if kind == "classifier":
        if target is not None:
            batch["labels"] = torch.tensor(
                [_class_index(target, model)], device=device, dtype=torch.int64
            )
    elif target is not None:
        wanted = _target_ids(str(target), text, ids, tokenizer, kind, isinstance(prompt, str))
        if not wanted:
            raise ValueError(f"the target must have at least one token, got {target!r}")
        if kind == "decoder":
            batch["input_ids"] = torch.tensor([ids + wanted], device=device, dtype=torch.int64)
            wanted = [IGNORED_LABEL] * len(ids) + wanted
        batch["labels"] = torch.tensor([wanted], device=device, dtype=torch.int64)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def _prompt_ids(prompt: Prompt, tokenizer: Any) -> tuple[list[int], str]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"]), prompt
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]), text


def _target_ids(
    target: str, text: str, ids: list[int], tokenizer: Any, kind: Kind, spaced: bool
) -> list[int]:
    """Return the target's tokens; for a decoder those that follow the prompt's in one text."""
    if not target.strip():
        return []
    if kind == "seq2seq":
        return list(tokenizer(text_target=target)["input_ids"])
    # A word of its own, unless the prompt or the target says otherwise.
    joint = " " if spaced and not (text[-1].isspace() or target[0].isspace()) else ""
    together = list(tokenizer(text + joint + target, add_special_tokens=spaced)["input_ids"])
    if together[: len(ids)] == ids and len(together) > len(ids):
        return together[len(ids) :]
    return list(tokenizer(joint + target, add_special_tokens=False)["input_ids"])


def _class_index(target: str | int, model: nn.Module) -> int:
    if isinstance(target, int):
        return target
    names: dict[str, int] = getattr(getattr(model, "config", None), "label2id", None) or {}
    if target not in names:
        raise ValueError(
            f"the target must be a class index or one of {sorted(names)}, got {target!r}"
        )
    return names[target]
