"""Layers on which no codebook can sit, told by what they are and by what stands around them.

A query is the vector of one token, so a layer has to see one vector for each token of a call, in
every call. What cannot be told here is told by the first edit.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from grace_fast.editor.heads import Kind
from grace_fast.hook.positions import Query
from grace_fast.hook.wrappers import Host, around, half_around, parameters_of, stack_of

ELSEWHERE = "; attach to a linear layer in a block of the language model, as the last of its MLP"
_TOKENS = {"input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"}
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "its input is token ids, not a vector for each token"),
    ((nn.modules.conv._ConvNd,), "a convolution's input is not one vector for each token"),
    ((nn.Bilinear,), "it has two inputs, and a query is one"),
    ((nn.RNNBase, nn.MultiheadAttention), "it returns several tensors"),
)


def refuse(host: Host, layer: nn.Module, query: Query, kind: Kind) -> None:
    """Refuse a layer that does not see one vector for each token of a call.

    Raises: ValueError saying why.
    """
    why = _of_itself(layer) or _by_place(host, layer, query, kind)
    if why is not None:
        advice = "" if ";" in why else ELSEWHERE
        raise ValueError(f"{host.layer} cannot take a codebook: {why}{advice}")


def _of_itself(layer: nn.Module) -> str | None:
    if any(nn.parameter.is_lazy(parameter) for parameter in layer.parameters()):
        return "its weights are made by the first forward call; run the model once, then attach"
    if type(layer).forward is nn.Module.forward:
        return "it holds layers, and is not called itself"
    return next((why for kinds, why in _KINDS if isinstance(layer, kinds)), None)


def _by_place(host: Host, layer: nn.Module, query: Query, kind: Kind) -> str | None:
    outside = list(around(host.model, host.layer))
    if isinstance(outside[-1][0], nn.MultiheadAttention):
        return "MultiheadAttention computes with its weight and does not call it"
    if any(getattr(module, "use_nested_tensor", False) for module, _ in outside):
        return "it is given nested tensors; make the encoder with enable_nested_tensor=False"
    if "experts" in host.layer.split(".")[:-1]:
        return "an expert sees those tokens only that are routed to it"
    models = [module for module, _ in outside if hasattr(type(module), "get_output_embeddings")]
    if query != "every_token" and any(_keeps_some(model, layer) for model in models):
        return "a head is given those positions only whose logits are kept"
    readers = [model for model in models if "hidden_states" not in parameters_of(model)]
    # The encoder beside a decoder reads the prompt, whatever that is: sound, an image.
    if not readers or (kind == "seq2seq" and stack_of(host.model, layer)[0] is readers[-1]):
        return None
    if kind == "seq2seq" and half_around(host.model, "get_decoder", layer) is not None:
        return None
    if (given := _given_instead_of_tokens(readers[-1])) is not None:
        return f"{type(readers[-1]).__name__} around it takes {given}, no tokens"
    return None


def _keeps_some(model: Any, layer: nn.Module) -> bool:
    """Tell whether a layer makes a model's logits, and callers choose at which positions."""
    names = inspect.signature(model.forward).parameters
    head = model.get_output_embeddings() if "logits_to_keep" in names else None
    return head is not None and any(module is layer for module in head.modules())


def _given_instead_of_tokens(model: nn.Module) -> str | None:
    names = list(inspect.signature(model.forward).parameters.values())
    named = [each.name for each in names if each.kind is each.POSITIONAL_OR_KEYWORD]
    return named[0] if named and not _TOKENS & set(named) else None
