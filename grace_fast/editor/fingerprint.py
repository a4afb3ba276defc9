"""What a codebook remembers of the model it was made for, so that it is never put on another.

It is what a layer's input depends on: the model's class, the settings that its forward call reads,
and the layer's first weights. Settings of training, of `generate`, of what is returned, and names
change no query: they are not kept, and are passed over in what an older release kept. A setting
that is not known to be one of those counts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

PROBE_BYTES = 1 << 20  # of the layer's weight: enough to tell two trainings apart
DEPTH = 3  # of settings within settings; deeper ones are kept as a text
FORM = 2  # of "config"; the first one, without this mark, kept numbers, truths and texts only

# Settings of the config that no layer's input depends on, by exact name...
_NAMES = (
    # Of a release.
    "transformers_version dtype torch_dtype torchscript use_bfloat16 architectures"
    " attn_implementation experts_implementation auto_map tf_legacy_loss"
    # Of what is returned.
    " return_dict use_return_dict output_hidden_states output_attentions"
    " output_router_logits keys_to_ignore_at_inference use_cache"
    # Of a head; `problem_type` is set by the first forward call with labels.
    " problem_type id2label label2id num_labels finetuning_task task_specific_params"
    # Of a loss.
    " loss_type label_smoothing router_aux_loss_coef router_z_loss_coef aux_loss_alpha"
    " classifier_dropout ignore_index"
    # Of a name.
    " name_or_path tokenizer_class processor_class prefix unsloth_version unsloth_fixed"
    # Of training.
    " gradient_checkpointing init_std init_xavier_std drop_path_rate"
    " router_jitter_noise input_jitter_noise jitter_noise"
    # Special tokens are the tokenizer's and `generate`'s; but for the token a decoder starts with,
    # which asks, and padding, where positions are counted from it: see `_padding_of_positions`.
    " bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id"
    " forced_bos_token_id forced_eos_token_id max_length min_length"
    " max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups"
    " diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff"
    " eta_cutoff repetition_penalty length_penalty no_repeat_ngram_size"
    " encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores"
    " return_dict_in_generate remove_invalid_values suppress_tokens"
    " exponential_decay_length_penalty begin_suppress_tokens cache_implementation"
)
_VOLATILE = frozenset(_NAMES.split())
# ... or by a part of it: dropout is of training, and first weights are drawn once.
_VOLATILE_PARTS = ("dropout", "pdrop", "layerdrop", "initializer")

_QUANTISATION = "quantization_config"  # kept beside the others
# What earlier releases of transformers wrote of every model, and later ones no longer do.
_USUAL = {"position_embedding_type": "absolute", "pretraining_tp": 1}

Settings = dict[str, Any]


def fingerprint(model: nn.Module, layer: nn.Module) -> dict[str, Any]:
    """Return a model's class and the settings that count, and its layer's class and first weights.

    All of it can be written as JSON and is the same when it is read back.
    """
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    quantisation = settings.get(_QUANTISATION)
    told = {
        "class": type(model).__name__,
        "form": FORM,
        "config": _counting(settings),
        "layer class": type(layer).__name__,
        "layer weight": _weight(layer),
        "quantisation": None if quantisation is None else str(quantisation),
    }
    padding = _padding_of_positions(model)
    return told if padding is None else told | {"position padding": padding}


def _counting(settings: Mapping[Any, Any], depth: int = DEPTH) -> Settings:
    """Return the settings that a layer's input may depend on, as JSON holds them."""
    told = {
        str(name): _plain(value, depth)
        for name, value in settings.items()
        if not (str(name).startswith("_") or name == _QUANTISATION or _is_volatile(name, value))
    }
    return _with_one_rope({name: value for name, value in told.items() if value is not _ODD})


_ODD = object()  # a setting that is no number, text, list or mapping of such


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping | list | tuple) and not depth:
        return str(value)
    if isinstance(value, Mapping):
        return _counting(value, depth - 1)
    if isinstance(value, list | tuple):
        parts = [_plain(part, depth - 1) for part in value]
        return _ODD if any(part is _ODD for part in parts) else parts
    return _ODD


def _with_one_rope(settings: Settings) -> Settings:
    """Write rotary positions in one way: releases have it in one setting or in two."""
    told = settings.pop("rope_parameters", None)
    if isinstance(told, Mapping):
        rest = dict(told)
        if "rope_theta" in rest:
            settings["rope_theta"] = rest.pop("rope_theta")
        settings["rope_scaling"] = rest
    scaling = settings.get("rope_scaling")
    if isinstance(scaling, Mapping):
        rest = {"rope_type" if name == "type" else name: each for name, each in scaling.items()}
        settings["rope_scaling"] = None if rest in ({}, {"rope_type": "default"}) else rest
    return settings


def _is_volatile(name: Any, value: Any) -> bool:
    if name in _VOLATILE:
        return True
    # A rate is of training; a switch (`token_dropout`) may be of every call.
    return not isinstance(value, bool) and any(part in str(name) for part in _VOLATILE_PARTS)


def _padding_of_positions(model: nn.Module) -> int | None:
    """Return the token that a model counts its positions from, where it counts from padding."""
    for name, module in model.named_modules():
        if "position" in name.rpartition(".")[2]:
            padding = getattr(module, "padding_idx", None)
            if isinstance(padding, int):
                return padding
    return None


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


def differences(
    stored: Any, given: Mapping[str, Any], usual: Mapping[str, Any] | None = None
) -> list[str]:
    """Return in words what a model has otherwise than the one a codebook was made for.

    stored: what `fingerprint` said of that one, in this release or an earlier one; given: what it
    says of this one; usual: settings that the model's class has where nothing was said, of
    `usual_settings`.
    """
    if not isinstance(stored, Mapping) or not isinstance(stored.get("config", {}), Mapping):
        return [f"fingerprint must be {stored!r}, this model has {dict(given)!r}"]
    ours, theirs = dict(stored), dict(given)
    settings, others = _counting(ours.pop("config", {})), dict(theirs.pop("config", {}))
    padding = ours.pop("position padding", stored.get("config", {}).get("pad_token_id"))
    if "position padding" in theirs and theirs.pop("position padding") != padding:
        found = given["position padding"]
        return [f"positions must be counted from padding {padding!r}, this model's from {found!r}"]
    usual = dict(usual or {})
    if ours.pop("form", None) is None:  # of a release that did not keep every setting
        others = {
            name: each
            for name, each in others.items()
            if isinstance(each, bool | int | float | str)
        }
        if "rope_theta" not in settings:
            others.pop("rope_theta", None)
        usual = {}
    theirs.pop("form", None)
    return _compared(ours, theirs, {}, "") + _compared(settings, others, usual, "config.")


def usual_settings(model: nn.Module) -> Settings:
    """Return what a model's config says where it is given nothing; nothing if it has to be."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    try:
        made = type(config)().to_dict()
    except Exception:  # whatever a foreign class asks for
        return {}
    return _counting(made)


def _compared(
    stored: Mapping[str, Any], given: Mapping[str, Any], usual: Mapping[str, Any], prefix: str
) -> list[str]:
    found = []
    for name in sorted(stored.keys() | given.keys()):
        ours, theirs = stored.get(name), given.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            known = usual.get(name)
            found += _compared(
                ours, theirs, known if isinstance(known, Mapping) else {}, f"{prefix}{name}."
            )
        elif ours != theirs and not _is_unsaid(name, stored, given, usual):
            found.append(f"{prefix}{name} must be {ours!r}, this model has {theirs!r}")
    return found


def _is_unsaid(
    name: str, stored: Mapping[str, Any], given: Mapping[str, Any], usual: Mapping[str, Any]
) -> bool:
    """Tell whether a setting that only one side has is what the other does without it.

    A release that adds a setting starts with what models did before.
    """
    if name in stored and name in given:
        return False
    value = stored[name] if name in stored else given[name]
    return not value or value == usual.get(name, _ODD) or value == _USUAL.get(name, _ODD)
