"""What stands around a layer: the model under its wrappers, and where the layer computes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from grace_fast.codebook import DTYPES, Codebook
from grace_fast.tensor_parallel import declared_widths


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` was given, with the names that it has there."""
    original: Any = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` and peft were given, whose call names the tokens."""
    model = uncompiled(model)
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    find_base: Any = model.get_base_model
    return uncompiled(find_base())


def stack_of(model: nn.Module, layer: nn.Module) -> tuple[nn.Module, bool]:
    """Return the module whose call names the layer's tokens, and if that is a second decoder."""
    for module in [model, *_around(model, layer)]:
        if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            continue
        find_encoder: Any = getattr(module, "get_encoder", None)
        encoder = None if find_encoder is None else find_encoder()
        if isinstance(encoder, nn.Module) and any(one is layer for one in encoder.modules()):
            return encoder, False
        return model, True
    return model, False


def _around(outermost: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """Return the modules between a module and a layer in it, inwards."""
    path = next((name for name, module in outermost.named_modules() if module is layer), "")
    parts = path.split(".")[:-1]
    return [outermost.get_submodule(".".join(parts[: at + 1])) for at in range(len(parts))]


NAMES_OF_TOKENS = {"input_ids", "inputs_embeds", "decoder_input_ids"}


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of what a module's call takes, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def names_tokens(module: nn.Module) -> bool:
    """Tell whether a module's call says of tokens which there are.

    One that is given hidden states comes later: a block that looks at the ids beside them, when the
    blocks before it have put these tokens into the cache.
    """
    taken = parameters_of(module)
    return "hidden_states" not in taken and not NAMES_OF_TOKENS.isdisjoint(taken)


def finds_padding(model: nn.Module) -> bool:
    """Tell whether a model that takes no labels of a text needs no mask to be right.

    It reads from left to right (its call takes a cache, its attention is causal), so that padding
    on the right changes nothing before; a classifier's head finds the last token by the padding's
    id.
    """
    if {"past_key_values", "cache_params"}.isdisjoint(parameters_of(model)):
        return False
    if type(model).__name__.endswith("Classification"):
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def stacks_of(outermost: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """Return a module and those within it around a layer whose call names tokens, inwards."""
    return [outermost, *filter(names_tokens, _around(outermost, layer))]


def place(layer: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Return where a layer computes and in which element type; None where its weights do not say.

    Packed weights have no element type of the kind, and offloaded ones are nowhere.
    """
    for parameter in layer.parameters():
        if parameter.dtype in DTYPES and not parameter.is_meta:
            return parameter.device, parameter.dtype
    return None


def declared_codebook(layer: nn.Module) -> Codebook | None:
    """Return an empty codebook of what a layer declares; None where the first activation tells."""
    key_dim, value_dim = declared_widths(layer)
    placed = place(layer)
    if key_dim is None or value_dim is None or placed is None:
        return None
    return Codebook(key_dim, value_dim, placed[1], placed[0])
