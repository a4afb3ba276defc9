"""Tiny models of every family, from their configs, with seeded weights; and batches for them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 100
PADDING = 0


@dataclass(frozen=True)
class Family:
    """One kind of model, and a layer of it that can be edited."""

    name: str
    layer: str
    epsilon: float
    labels: str  # "class", "target" (a second sequence) or "continuation"


FAMILIES = {
    family.name: family
    for family in (
        Family("bert", "bert.encoder.layer.1.output.dense", 0.2, "class"),
        Family("gpt2", "transformer.h.1.mlp.c_proj", 0.05, "continuation"),
        Family("llama", "model.layers.1.mlp.down_proj", 0.1, "continuation"),
        Family("qwen", "model.layers.1.mlp.down_proj", 0.1, "continuation"),
        Family("t5-encoder", "encoder.block.1.layer.1.DenseReluDense.wo", 0.2, "target"),
        Family("t5-decoder", "decoder.block.1.layer.2.DenseReluDense.wo", 0.02, "target"),
    )
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a tiny model in eval mode."""
    torch.manual_seed(seed)
    wide = {"vocab_size": VOCABULARY, "pad_token_id": PADDING}
    decoder = wide | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    if name == "bert":
        config = BertConfig(
            **wide,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_labels=4,
            initializer_range=0.3,
        )
        model: Any = BertForSequenceClassification(config)
    elif name == "gpt2":
        config = GPT2Config(
            **wide,
            n_embd=32,
            n_layer=3,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.15,
        )
        model = GPT2LMHeadModel(config)
        model.loss_type = "ForCausalLM"  # else it is guessed, with a warning that no graph may hold
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**decoder))
    elif name == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(**decoder))
    else:
        config = T5Config(
            **wide,
            d_model=32,
            d_ff=64,
            d_kv=16,
            num_layers=3,
            num_heads=2,
            decoder_start_token_id=PADDING,
            eos_token_id=2,
            initializer_factor=1.0,
        )
        model = T5ForConditionalGeneration(config)
    return model.to(dtype).eval()


def prompts(count: int, seed: int = 0, shortest: int = 4, longest: int = 9) -> list[list[int]]:
    """Return prompts of random tokens, all different."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    while len(found) < count:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        if tokens not in found:
            found.append(tokens)
    return found


def pad(rows: list[list[int]], side: str, filler: int = PADDING) -> torch.Tensor:
    """Return rows as one tensor, padded on one side."""
    width = max(map(len, rows))
    padded = [
        [filler] * (width - len(row)) + row
        if side == "left"
        else row + [filler] * (width - len(row))
        for row in rows
    ]
    return torch.tensor(padded)


def prompt_batch(rows: list[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
    """Return prompts alone, as one padded batch with its mask."""
    return {
        "input_ids": pad(rows, side),
        "attention_mask": pad([[1] * len(row) for row in rows], side),
    }


def edit_batch(
    family: Family, rows: list[list[int]], targets: list[list[int]], side: str = "right"
) -> dict[str, torch.Tensor]:
    """Return prompts with their targets, labelled as the family reads labels."""
    if family.labels == "class":
        labels = torch.tensor([target[0] % 4 for target in targets])
        return prompt_batch(rows, side) | {"labels": labels}
    if family.labels == "target":
        return prompt_batch(rows, side) | {"labels": pad(targets, "right", -100)}
    whole = [row + target for row, target in zip(rows, targets, strict=True)]
    labels = [[-100] * len(row) + target for row, target in zip(rows, targets, strict=True)]
    return prompt_batch(whole, side) | {"labels": pad(labels, side, -100)}


DECODERS = ("gpt2", "llama", "qwen")


def remember(grace: Any, rows: list[list[int]], radius: float = 1e-2, seed: int = 0) -> None:
    """Put a key for each prompt into an editor's codebook, with a random value of the layer's size.

    No value is trained: what a hit writes is as far from the layer's own output as can be.
    """
    queries = torch.cat([grace.query_of(prompt_batch([row])) for row in rows])
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(rows), grace.codebook.value_dim, generator=generator)
    radii = torch.full((len(rows),), radius)
    grace.codebook.append(queries, values.to(queries.dtype), radii)


def with_positions(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a decoder's batch with the position ids that `generate` gives: padding has none."""
    ids = batch["attention_mask"].cumsum(1) - 1
    return batch | {"position_ids": ids.masked_fill(batch["attention_mask"] == 0, 0)}


def with_lora(model: Any) -> Any:
    """Return a model with LoRA on two of its layers, as peft wraps it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # it asks transformers by names that are to go
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config)
