"""The takeover of a reference's live adaptor, codebook and all, until it is restored.

The references' adaptors are known by their attributes, not by an import. Nothing is computed anew:
keys, values and radii are moved as they are, so decisions are those that exact arithmetic makes of
them.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from grace_fast.codebook import printable
from grace_fast.compat import easyedit, reference
from grace_fast.compat.adaptor import Adaptor
from grace_fast.compat.live import CODEBOOK, as_epsilons, home
from grace_fast.compat.reference import put
from grace_fast.errors import GraceWarning, warn_of_old_name

_NAMES = ("layer", "init_epsilon", "replacement", "key_id", "config")  # of any reference's adaptor
# `training` is not moved: where the model is in training mode it says nothing of an edit.
_STATE = ("key_id", "iter", "edit_label", "edit_id")


class Accelerated:
    """An adaptor that stands in for a reference's, until that is restored."""

    def __init__(self, model: nn.Module, layer: str, original: nn.Module, adaptor: Adaptor) -> None:
        self.model, self.layer, self.original, self.adaptor = model, layer, original, adaptor
        put(model, layer, adaptor)

    def restore(self) -> nn.Module:
        """Put the reference's adaptor back, with the edits made meanwhile, and return it.

        Raises: RuntimeError where it was given back already.
        """
        if self.model.get_submodule(self.layer) is not self.adaptor:
            raise RuntimeError(f"{self.layer} was given back already, or holds another module")
        adaptor, original = self.adaptor, cast(Any, self.original)
        if hasattr(adaptor, "keys"):
            original.keys = adaptor.keys.clone()
            original.values = nn.Parameter(adaptor.values.detach().clone())
            original.epsilons = as_epsilons(adaptor.epsilons.detach().reshape(-1).clone())
            labels: list[Any] = list(adaptor.key_labels)
            if isinstance(adaptor, easyedit.GRACEAdapter):
                labels.reverse()
                # A flat list, in which any id is found; the nested one finds the newest only.
                original.edit_ids = adaptor.edit_ids
            original.key_labels = labels
        for name in _STATE:
            if hasattr(adaptor, name):
                object.__setattr__(original, name, getattr(adaptor, name))
        put(self.model, self.layer, original)
        return self.original

    def give_back(self) -> nn.Module:
        """Do what `restore` does, under its old name."""
        warn_of_old_name("give_back()", "restore()")
        return self.restore()


def accelerate(editor_or_model: Any) -> Accelerated:
    """Take over the live adaptor of an editor or a model of the authors' kind or EasyEdit's.

    The editor goes on as before: it finds the same names at the same place. EasyEdit keeps labels
    in the reverse order of the keys; they are put right, with a GraceWarning that says so.

    Raises: ValueError where there is no such adaptor, more than one, or one around another;
    TypeError or ValueError for a codebook that does not fit its layer. Nothing has changed then.
    """
    model = editor_or_model
    if not _holds_layers(model):
        model = getattr(editor_or_model, "model", None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate takes an editor or a model, got {type(editor_or_model).__name__}"
        )
    found = {name: module for name, module in model.named_modules() if _is_reference(module)}
    if not found:
        raise ValueError(
            "the model has no adaptor of the authors' kind or EasyEdit's; "
            f"they are modules with {', '.join(_NAMES)}"
        )
    if len(found) > 1:
        raise ValueError(f"the model must have one adaptor, it has them at {sorted(found)}")
    ((name, original),) = found.items()
    return Accelerated(model, name, original, _twin(original, name))


def _holds_layers(given: Any) -> bool:
    """Tell whether a module is a model, and not an editor that holds one as `model`."""
    inner = getattr(given, "model", None)
    return isinstance(given, nn.Module) and not (
        isinstance(inner, nn.Module) and isinstance(getattr(given, "layer", None), str)
    )


def _is_reference(module: nn.Module) -> bool:
    return not isinstance(module, Adaptor) and all(hasattr(module, name) for name in _NAMES)


def _twin(original: nn.Module, name: str) -> Adaptor:
    """Return an adaptor of ours with everything that a reference's holds."""
    layer, config = original.layer, original.config
    assert isinstance(layer, nn.Module)
    from_easyedit = hasattr(original, "delete_key")
    transpose = type(layer).__name__ != "Conv1D"
    twin: Adaptor
    if from_easyedit:
        twin = easyedit.GRACEAdapter(config, layer, transpose)
    else:
        nested: Any = config if "editor" in config else {"editor": config}  # type: ignore[operator]
        twin = reference.GRACEAdapter(nested, layer, transpose)
    if hasattr(original, "keys"):
        _move_codebook(original, twin, name)
    for attribute in (*_STATE, "init_epsilon", "replacement"):
        if hasattr(original, attribute):
            setattr(twin, attribute, getattr(original, attribute))
    return twin


def _move_codebook(original: Any, twin: Adaptor, name: str) -> None:
    missing = [part for part in CODEBOOK if not hasattr(original, part)]
    if missing:
        raise ValueError(f"the adaptor at {name} has keys but no {', '.join(missing)}")
    for part in ("keys", "values"):
        if not isinstance(given := getattr(original, part), Tensor):
            raise TypeError(
                f"{part} of the adaptor at {name} must be a tensor, got {type(given).__name__}"
            )
    device = home(twin.layer)[0]
    keys: Tensor = original.keys.detach().to(device)
    values = original.values.detach().to(device)
    try:
        epsilons = original.epsilons
        if not isinstance(epsilons, Tensor):
            epsilons = torch.as_tensor(epsilons, dtype=torch.float32, device="cpu")
        epsilons = epsilons.to(device)
        labels = list(original.key_labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"epsilons and key_labels of the adaptor at {name} must be numbers and a list: {error}"
        ) from error
    if not isinstance(twin, easyedit.GRACEAdapter):
        twin.load(keys, values, epsilons, labels)
        return
    labels.reverse()
    ids = _flat(getattr(original, "edit_ids", []))
    if keys.shape[:1] != (len(ids),):
        ids = [None] * len(labels)
    twin.load(keys, values, epsilons, labels, ids)
    if len(keys) > 1:
        warnings.warn(
            f"the adaptor at {printable.spelt(name)} kept its {len(keys)} labels in the reverse "
            "order of its keys, as EasyEdit does, and decided edits by the label of another key; "
            "they are in the order of the keys now",
            GraceWarning,
            stacklevel=4,
        )


def _flat(ids: Any) -> list[Any]:
    """Return EasyEdit's nested ids, [[[a], b], c], as a list in the order of the keys."""
    if not isinstance(ids, list):
        return [ids]
    return [flat for part in ids for flat in _flat(part)]
