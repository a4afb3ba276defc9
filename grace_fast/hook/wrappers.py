"""What stands around a layer: the model under its wrappers, and where the layer computes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grace_fast.codebook.checks import DTYPES
from grace_fast.codebook.codebook import Codebook
from grace_fast.hook.tensor_parallel import declared_widths


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


@dataclass(frozen=True)
class Host:
    """The model inside of what `attach` was given."""

    called: nn.Module  # takes a batch with labels, and returns loss and logits
    model: nn.Module  # whose call names the tokens, and whose config is read
    layer: str  # the dotted name of the layer in that
    is_wrapper: bool = False  # whether `called` is a module around it that makes its own loss


def host_of(given: nn.Module, layer: str) -> Host:
    """Return the outermost model around a layer, by its dotted name.

    DistributedDataParallel, a value head or a LightningModule say nothing of how labels are read,
    and may return anything: it is the model in them that is edited, where it makes a loss itself.
    What holds no such model is taken for one.

    Raises: ValueError for a layer beside the model, in a wrapper that makes no loss or in peft's.
    """
    root = uncompiled(given)
    found = next((module for module, _ in around(root, layer) if _is_model(module)), None)
    if found is None:
        beside = next((module for module in root.modules() if _is_model(module)), None)
        if beside is not None and not _makes_loss(root):
            raise ValueError(
                f"{layer} is a layer of {type(root).__name__}, which takes no labels, and not of "
                f"the {type(beside).__name__} in it; attach to a layer of that"
            )
        return Host(given, root, layer, is_wrapper=beside is not None)
    inner = unwrapped(found)
    within = {id(module): name for module, name in around(root, layer)}.get(id(inner))
    if within is None:
        raise ValueError(
            f"{layer} is not a layer of the {type(inner).__name__} that reads the tokens, but of "
            f"what {type(found).__name__} puts before it; attach to a layer of that"
        )
    reads_labels = "labels" in inspect.signature(inner.forward).parameters
    if found is root:
        return Host(given, inner, within)
    if found is not inner or reads_labels or not _makes_loss(root):
        return Host(found, inner, within)
    return Host(given, inner, within, is_wrapper=True)


def around(root: nn.Module, layer: str) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules around a layer, outermost first, each with the layer's name in it."""
    module, parts = root, layer.split(".")
    for at, part in enumerate(parts):
        yield module, ".".join(parts[at:])
        module = getattr(module, part)


def _is_model(module: nn.Module) -> bool:
    """Tell whether a module is a model of transformers or peft: by what its class has."""
    if hasattr(module, "config") and callable(getattr(type(module), "can_generate", None)):
        return True
    return hasattr(module, "peft_config") and hasattr(type(module), "get_base_model")


def _makes_loss(model: nn.Module) -> bool:
    """Tell whether a module can be called with tokens and labels, by their names."""
    taken = inspect.signature(model.forward).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    return takes_any or {"input_ids", "labels"} <= taken.keys()


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
