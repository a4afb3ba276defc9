"""What a codebook remembers of the model it was made for, so that it is never put on another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

PROBE_BYTES = 1 << 20  # of the layer's weight: enough to tell two trainings apart

# Settings of a run or a release rather than of the model.
_VOLATILE = {"transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict"}
_VOLATILE |= {"problem_type"}  # set by the first forward call with labels


def fingerprint(model: nn.Module, layer: nn.Module) -> dict[str, Any]:
    """Return a model's class and plain settings, and its layer's class and first weights."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    plain = {
        name: value
        for name, value in settings.items()
        if isinstance(value, bool | int | float | str)
        and name not in _VOLATILE
        and not name.startswith("_")
    }
    quantisation = settings.get("quantization_config")
    return {
        "class": type(model).__name__,
        "config": plain,
        "layer class": type(layer).__name__,
        "layer weight": _weight(layer),
        "quantisation": None if quantisation is None else str(quantisation),
    }


def _weight(layer: nn.Module) -> dict[str, Any] | None:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.is_meta:
        return None
    if hasattr(weight, "full_tensor"):  # spread over processes, all of which ask
        weight = weight.full_tensor()
    flat = weight.detach().reshape(-1)[: PROBE_BYTES // weight.element_size()]
    raw = flat.to("cpu").contiguous().view(torch.uint8).numpy().data
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def differences(stored: Any, given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return in words what a model has otherwise than the one a codebook was made for."""
    if not isinstance(stored, Mapping):
        return [f"{prefix or 'fingerprint'} must be {stored!r}, this model has {dict(given)!r}"]
    found = []
    for name in sorted(stored.keys() | given.keys()):
        ours, theirs = stored.get(name), given.get(name)
        if isinstance(theirs, Mapping):
            found += differences(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            found.append(f"{prefix}{name} must be {ours!r}, this model has {theirs!r}")
    return found
