"""What an edit is made of: a batch of prompts with labels, from tensors, text or chat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast.editor import heads, prompts
from grace_fast.editor.heads import Head, Kind
from grace_fast.editor.prompts import Prompt, Target
from grace_fast.hook import positions
from grace_fast.semantics import IGNORED_LABEL

Batch = dict[str, Any]


# What an encoder is given where that is no text: sound, images.
SIGNALS = ("input_features", "input_values", "pixel_values", "flattened_patches", "inputs")


def prompts_of(batch: Mapping[str, Any]) -> Tensor:
    """Return what a batch holds its prompts as: tokens or embeddings [B, T, ...], else a signal.

    Raises: ValueError where it holds none.
    """
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    for given in (tokens, *(batch.get(name) for name in SIGNALS)):
        if isinstance(given, Tensor) and given.ndim >= 2:
            return given
    raise ValueError(
        f"a batch must hold input_ids [B, T] as a tensor, got the fields {sorted(batch)}"
    )


def token_count(batch: Mapping[str, Any]) -> int | None:
    """Return T of a batch's prompts; None where they are a signal, which the model counts anew."""
    given = prompts_of(batch)
    is_text = any(given is batch.get(name) for name in ("input_ids", "inputs_embeds"))
    return given.shape[1] if is_text else None


def rows(batch: Mapping[str, Any], picked: Sequence[int]) -> Batch:
    """Return the picked rows of a batch; what is not [B, ...] stays as it is."""
    count = len(prompts_of(batch))
    index = torch.as_tensor(picked, dtype=torch.int64, device="cpu")
    return {
        name: value[index.to(value.device)]
        if isinstance(value, Tensor) and value.ndim and len(value) == count
        else value
        for name, value in batch.items()
    }


# Fields whose second dimension is that of tokens, and what stands at a token that is padding.
_PADDED: dict[str, int] = {
    "input_ids": -1,  # the padding's own token
    "inputs_embeds": 0,
    "attention_mask": 0,
    "labels": IGNORED_LABEL,
    "token_type_ids": 0,
    "position_ids": 0,
    "decoder_input_ids": -1,
    "decoder_attention_mask": 0,
}


def signature(batch: Batch) -> tuple[Any, ...] | None:
    """Return what batches of one row have in common that stand in one; None for one that stands
    alone.

    Prompts without a mask stand beside others of their length only: padding would be text. So do
    spans, for every token may be the end of one; and embeddings, whose padding is not found where a
    model looks for its token to know which of a prompt is the last.
    """
    told: list[Any] = []
    has_mask = isinstance(batch.get("attention_mask"), Tensor)
    may_pad = has_mask and batch.get("inputs_embeds") is None and heads.SPAN[0] not in batch
    for name, value in sorted(batch.items()):
        if not isinstance(value, Tensor):
            if not (value is None or isinstance(value, bool | int | float | str)):
                return None
            told.append((name, value))
            continue
        if not value.ndim or len(value) != 1:
            return None
        is_padded = may_pad and name in _PADDED and value.ndim > 1
        told.append((name, value.dtype, value.device, value.shape[2 if is_padded else 1 :]))
    return tuple(told)


def together(rows: Sequence[Batch], padding: int) -> Batch:
    """Return batches of one row and one signature as one, padded on the right.

    padding: the token that stands where there is none.
    """
    whole: Batch = {}
    for name, first in rows[0].items():
        given = [row[name] for row in rows]
        if not isinstance(first, Tensor):
            whole[name] = first
        elif first.ndim > 1 and name in _PADDED:
            whole[name] = joined(given, padding if _PADDED[name] == -1 else _PADDED[name])
        else:
            whole[name] = torch.cat(given)
    return whole


def joined(parts: Sequence[Tensor], filler: int) -> Tensor:
    """Return tensors [B, T, ...] of several T as one, filled on the right."""
    length = max(each.shape[1] for each in parts)
    filled = []
    for each in parts:
        more = each.new_full((len(each), length - each.shape[1], *each.shape[2:]), filler)
        filled.append(torch.cat([each, more], dim=1) if more.numel() else each)
    return torch.cat(filled)


def runnable(batch: Batch, kind: Kind, model: nn.Module) -> Batch:
    """Return a batch that a model runs on: a prompt without a target still starts the decoder."""
    if kind != "seq2seq" or batch.get("labels") is not None or "decoder_input_ids" in batch:
        return batch
    given = prompts_of(batch)
    column = torch.full((len(given), 1), start_of(model), device=given.device, dtype=torch.int64)
    return {**batch, "decoder_input_ids": column}


def start_of(model: Any) -> int:
    """Return the token that a decoder beside an encoder starts with, in training or `generate`."""
    holders = [getattr(model, "config", None), getattr(model, "generation_config", None)]
    of_text = getattr(holders[0], "get_text_config", None)
    if of_text is not None:
        holders.append(of_text(decoder=True))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for holder in holders:
            token = getattr(holder, name, None)
            if isinstance(token, int):
                return token
    return 0


def decoder_length(batch: Batch) -> int | None:
    """Return how many tokens a second decoder is given; None where the batch does not say."""
    for name in ("decoder_input_ids", "labels"):
        given = batch.get(name)
        if isinstance(given, Tensor) and given.ndim == 2:
            return given.shape[1]
    return None


def with_more_tokens(batch: Batch) -> Batch:
    """Return prompts of one token with that token twice, and no labels."""
    count = len(prompts_of(batch))
    return {
        name: torch.cat([value, value], dim=1)
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == (count, 1)
        else value
        for name, value in batch.items()
        if name != "labels"
    }


def with_decoder_of(batch: Batch, length: int, start: int) -> Batch:
    """Return a batch with a number of tokens for a second decoder, all of them its start."""
    tokens = prompts_of(batch)
    ids = torch.full((len(tokens), length), start, device=tokens.device, dtype=torch.int64)
    others = ("labels", *(name for name in batch if name.startswith("decoder_")))
    kept = {name: value for name, value in batch.items() if name not in others}
    return {**kept, "decoder_input_ids": ids}


def check(batch: Mapping[str, Any], kind: Kind, head: Head, classes: int | None) -> None:
    """Check that every row of a batch to edit has a prompt and a target.

    classes: how many labels there are, where that is known.

    Raises: ValueError naming the row.
    """
    tokens, mask = prompts_of(batch), batch.get("attention_mask")
    dimensions = {"input_ids": 2, "inputs_embeds": 3}
    if any(tokens is batch.get(name) and tokens.ndim > most for name, most in dimensions.items()):
        raise ValueError(
            f"a prompt must be one sequence of tokens, [B, T] in all, got {tuple(tokens.shape)}"
        )
    if tokens.shape[1] == 0:
        raise ValueError("the prompt must have at least one token, got an empty prompt")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        _refuse(mask.sum(dim=1) == 0, "has an empty prompt: its attention mask is all zero")
    targets = heads.targets_of(batch, head, len(tokens))
    heads.check_targets(targets, head, classes, tokens.shape[1])
    if kind == "decoder" and targets.shape == tokens.shape[:2]:
        _refuse(
            positions.prompt_lengths(targets) == 0,
            "has an empty prompt: the first token already has a label",
        )


def _refuse(bad: Tensor, why: str) -> None:
    if bad.any():
        raise ValueError(f"row {int(bad.nonzero()[0])} of the batch {why}")


def out_of_range(batch: Mapping[str, Any], model: nn.Module, error: IndexError) -> str:
    """Say what of a batch a model's embeddings have no row for, where an IndexError came of it."""
    tokens, config = batch.get("input_ids"), getattr(model, "config", None)
    if isinstance(tokens, Tensor) and tokens.numel():
        most, vocabulary = (
            getattr(config, name, None) for name in ("max_position_embeddings", "vocab_size")
        )
        if isinstance(most, int) and tokens.shape[1] > most:
            return f"the model takes at most {most} tokens, got {tokens.shape[1]} with the target"
        lowest, highest = int(tokens.min()), int(tokens.max())
        if isinstance(vocabulary, int) and not 0 <= lowest <= highest < vocabulary:
            odd = lowest if lowest < 0 else highest
            return f"input_ids must be in [0, {vocabulary}), got {odd}"
    return f"the model has no embedding for part of the batch: {error}"


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


def from_text(
    prompt: Prompt,
    target: Target | None,
    tokenizer: Any,
    model: nn.Module,
    kind: Kind,
    joint: str | None = None,
) -> Batch:
    """Return the batch of one prompt and its target.

    prompt: text, or chat messages that go through the tokenizer's template; target: the text that
    the model should answer, for a classifier a class index or name, for a regression a number; None
    for a prompt alone; joint: what stands between the two, by default as `joining` says, or a
    chat's template.

    Raises: ValueError for an empty prompt, several prompts, a target without tokens or an unknown
    class; TypeError for what is neither text nor messages.
    """
    prompt, target = prompts.one_prompt(prompt), prompts.one_target(target)
    if tokenizer is None:
        raise ValueError("editing by text needs a tokenizer: attach(..., tokenizer=...)")
    device = next(model.parameters()).device
    ids, text = prompts.prompt_ids(prompt, tokenizer)
    if not ids or not text.strip():
        raise ValueError(f"the prompt must have at least one token, got {prompt!r}")
    batch: Batch = {"input_ids": torch.tensor([ids], device=device, dtype=torch.int64)}
    if kind == "classifier":
        if target is not None:
            batch["labels"] = heads.label_from_text(target, model).to(device)
    elif target is not None:
        asked = None if isinstance(prompt, str) else prompt
        if kind == "seq2seq":
            wanted = prompts.answer_ids(str(target), tokenizer)
        else:
            wanted = prompts.target_ids(str(target), text, ids, tokenizer, asked, joint)
        if not wanted:
            raise ValueError(f"the target must have at least one token, got {target!r}")
        if kind == "decoder":
            batch["input_ids"] = torch.tensor([ids + wanted], device=device, dtype=torch.int64)
            wanted = [IGNORED_LABEL] * len(ids) + wanted
        batch["labels"] = torch.tensor([wanted], device=device, dtype=torch.int64)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch
