"""What stands around a layer: the model under its wrappers, and where the layer computes."""

from __future__ import annotations

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
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model, False
    find_encoder: Any = getattr(model, "get_encoder", None)
    encoder = None if find_encoder is None else find_encoder()
    if isinstance(encoder, nn.Module) and any(module is layer for module in encoder.modules()):
        return encoder, False
    return model, True


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
