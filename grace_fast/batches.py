"""What an edit is made of: a batch of prompts with labels, from tensors, text or chat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast import heads, positions
from grace_fast.heads import Head, Kind
from grace_fast.semantics import IGNORED_LABEL

Batch = dict[str, Any]


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


def check(batch: Mapping[str, Any], kind: Kind, head: Head, classes: int | None) -> None:
    """Check that every row of a batch to edit has a prompt and a target.

    classes: how many labels there are, where that is known.

    Raises: ValueError naming the row.
    """
    size(batch)
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    mask = batch.get("attention_mask")
    assert isinstance(tokens, Tensor)
    if tokens.ndim > (2 if "input_ids" in batch else 3):
        raise ValueError(
            f"a prompt must be one sequence of tokens, [B, T] in all, got {tuple(tokens.shape)}"
        )
    if tokens.shape[1] == 0:
        raise ValueError("the prompt must have at least one token, got an empty prompt")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        _refuse(mask.sum(dim=1) == 0, "has an empty prompt: its attention mask is all zero")
    targets = heads.targets_of(batch, head)
    heads.check_targets(targets, head, classes, tokens.shape[1])
    if kind == "decoder" and targets.shape == tokens.shape[:2]:
        _refuse(
            positions.prompt_lengths(targets) == 0,
            "has an empty prompt: the first token already has a label",
        )


def _refuse(bad: Tensor, why: str) -> None:
    if bad.any():
        raise ValueError(f"row {int(bad.nonzero()[0])} of the batch {why}")


def prompt_checksum(batch: Mapping[str, Any], row: int, kind: Kind) -> int:
    """Return a checksum of one row's prompt tokens, without padding and target."""
    tokens = batch.get("input_ids")
    if not isinstance(tokens, Tensor):
        return 0
    ids, keep = tokens[row], torch.ones_like(tokens[row], dtype=torch.bool)
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
        keep &= mask[row].bool()
    if kind == "decoder" and isinstance(labels, Tensor) and labels.shape == tokens.shape:
        keep &= labels[row] == IGNORED_LABEL
    return zlib.crc32(ids[keep].to("cpu", torch.int64).numpy().tobytes())


Prompt = str | Sequence[Mapping[str, str]]
Target = str | int | float


def from_text(
    prompt: Prompt, target: Target | None, tokenizer: Any, model: nn.Module, kind: Kind
) -> Batch:
    """Return the batch of one prompt and its target.

    prompt: text, or chat messages that go through the tokenizer's template; target: the text that
    the model should answer, for a classifier a class index or name, for a regression a number; None
    for a prompt alone.

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
            batch["labels"] = heads.label_from_text(target, model).to(device)
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
