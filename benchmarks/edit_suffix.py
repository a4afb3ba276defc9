"""The layers above an edit, written by hand for each family: the least that a training runs.

value [B, V] in the edited layer's output -> rest of its block -> later blocks -> norm and head
at the label positions -> cross entropy -> gradient by the value
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.edit_models import Item, Studied


class Suffix:
    """The model from the edited layer on, for one batch; `loss` of values [B, V] is its own."""

    def __init__(self, studied: Studied, batch: Item) -> None:
        self.batch, self.model = batch, studied.model
        family = FAMILIES[self.model.config.model_type](self.model, studied.layer)
        self._block, self._later, self._rest, self._end, self._labels = family
        self._seen = _seen(self.model, studied.layer, self._block, self._later, self._rest, batch)
        output = self._seen.output
        everywhere = torch.ones(output.shape[:2], dtype=torch.bool)
        self.replaced = everywhere[:, :, None]  # replace_all
        self.asked, self.wanted = self._labels(batch)

    def loss(self, values: Tensor) -> Tensor:
        """Return the loss of every row, [B]: the mean over its labels."""
        seen = self._seen
        output = torch.where(self.replaced, values[:, None, :], seen.output)
        hidden = self._rest[0](output, seen.beside)
        for block, (args, kwargs) in zip(self._later, seen.given, strict=True):
            hidden = block(hidden, *args, **kwargs)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        logits = self._end(hidden, self.asked)
        each = nn.functional.cross_entropy(logits, self.wanted, reduction="none")
        rows = self.asked.nonzero()[:, 0]
        total = torch.zeros(len(values)).index_add(0, rows, each)
        return total / self.asked.sum(1)

    def forward(self, values: Tensor) -> None:
        """Make the forward part of a step alone."""
        with torch.no_grad():
            self.loss(values)

    def step(self, values: Tensor) -> Tensor:
        """Return the gradient by the values, [B, V]."""
        values = values.detach().requires_grad_()
        return torch.autograd.grad(self.loss(values).sum(), [values])[0]

    def start(self) -> Tensor:
        """Return values to begin with: what the layer said at the last token."""
        return self._seen.output[:, -1].clone()


# What a family has above the layer: its block, the later blocks, (the rest of its block, the module
# whose input goes around the layer), and the end.
Blocks = nn.ModuleList
Rest = tuple[Callable[[Tensor, Tensor], Tensor], nn.Module]
End = Callable[[Tensor, Tensor], Tensor]
Labels = Callable[[Item], tuple[Tensor, Tensor]]
Family = tuple[nn.Module, list[nn.Module], Rest, End, Labels]


def _gpt2(model: Any, layer: str) -> Family:
    block, later = _split(model.transformer.h, layer, 2)
    mlp = block.mlp
    rest = (lambda output, beside: beside + mlp.c_proj(mlp.act(output)), block.ln_2)

    def end(hidden: Tensor, asked: Tensor) -> Tensor:
        return model.lm_head(model.transformer.ln_f(hidden[asked]))

    return block, later, rest, end, _next_tokens


def _llama(model: Any, layer: str) -> Family:
    block, later = _split(model.model.layers, layer, 2)
    rest = (lambda output, beside: beside + output, block.post_attention_layernorm)

    def end(hidden: Tensor, asked: Tensor) -> Tensor:
        return model.lm_head(model.model.norm(hidden[asked]))

    return block, later, rest, end, _next_tokens


def _bert(model: Any, layer: str) -> Family:
    block, later = _split(model.bert.encoder.layer, layer, 3)
    out = block.output
    rest = (lambda output, beside: out.LayerNorm(output + beside), block.intermediate)

    def end(hidden: Tensor, _: Tensor) -> Tensor:
        return model.classifier(model.bert.pooler(hidden))

    def labels(batch: Item) -> tuple[Tensor, Tensor]:
        return torch.ones(len(batch["labels"]), 1, dtype=torch.bool), batch["labels"]

    return block, later, rest, end, labels


def _t5(model: Any, layer: str) -> Family:
    block, later = _split(model.decoder.block, layer, 2)
    rest = (lambda output, beside: beside + output, block.layer[2].layer_norm)

    def end(hidden: Tensor, asked: Tensor) -> Tensor:
        hidden = model.decoder.final_layer_norm(hidden[asked])
        scale = model.model_dim**-0.5 if model.config.scale_decoder_outputs else 1.0
        return model.lm_head(hidden * scale)

    def labels(batch: Item) -> tuple[Tensor, Tensor]:
        asked = batch["labels"] != -100
        return asked, batch["labels"][asked]

    return block, later, rest, end, labels


FAMILIES: dict[str, Callable[[Any, str], Family]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "bert": _bert,
    "t5": _t5,
}


def _split(blocks: nn.ModuleList, layer: str, at: int) -> tuple[Any, list[nn.Module]]:
    number = int(layer.split(".")[at])
    return blocks[number], list(blocks[number + 1 :])


def _next_tokens(batch: Item) -> tuple[Tensor, Tensor]:
    """Return the positions [B, T] that a decoder is asked at, and what it should say there."""
    labels = batch["labels"]
    asked = torch.zeros_like(labels, dtype=torch.bool)
    asked[:, :-1] = labels[:, 1:] != -100
    return asked, labels[labels != -100]


@dataclass
class _Seen:
    output: Tensor  # of the layer
    beside: Tensor  # what goes around the rest of its block
    given: list[tuple[Any, Any]]  # what later blocks are given beside the hidden states


def _seen(
    model: Any, layer: str, block: Any, later: list[nn.Module], rest: Rest, batch: Item
) -> _Seen:
    """Run a model once and return what the suffix needs."""
    found = _Seen(torch.empty(0), torch.empty(0), [])

    def at_layer(_: nn.Module, __: Any, output: Tensor) -> None:
        found.output = output

    def around(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.beside = given[0]

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.given.append((args[1:], dict(kwargs)))

    handles = [
        model.get_submodule(layer).register_forward_hook(at_layer),
        rest[1].register_forward_pre_hook(around),
        *(each.register_forward_pre_hook(enter, with_kwargs=True) for each in later),
    ]
    cacheless = {} if "bert" in model.config.model_type else {"use_cache": False}
    try:
        with torch.no_grad():
            model(**batch, **cacheless)
    finally:
        for handle in handles:
            handle.remove()
    return found
