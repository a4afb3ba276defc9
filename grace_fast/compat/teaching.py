"""One edit through an adaptor: exactly as many steps of Adam as asked, the last value kept.

The keys do not change after the first step and the query stays where it is, so the nearest row is
found once, and the layers before the adaptor run once; only that row's value has a gradient.
Nothing is published before the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast.compat.adaptor import Adaptor
from grace_fast.editor.prefix_cache import PrefixCache
from grace_fast.editor.training import descend, frozen
from grace_fast.edits.settings import Schedule
from grace_fast.hook.wrappers import parameters_of
from grace_fast.semantics import IGNORED_LABEL


def teach(
    adaptor: Adaptor, model: nn.Module, tokens: Mapping[str, Any], steps: Schedule, at_labels: bool
) -> tuple[list[Any], Tensor]:
    """Edit tokens with `labels` into an adaptor of a model; return the losses, and the last again.

    The losses are numpy scalars, each before its step; the last is a tensor, too.

    at_labels: the query is taken from before the first label; else where `key_id` says.

    Raises: ValueError for tokens without labels, TypeError for a model that returns no loss, and
    what the model raises. Nothing has changed then.
    """
    labels = tokens.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(f"an edit needs tokens['labels'], got {sorted(tokens)}")
    asked = dict(tokens)
    if "use_cache" in parameters_of(model):
        asked.setdefault("use_cache", False)
    before = adaptor.key_id
    if at_labels:
        adaptor.key_id = prompt_end(labels)
    try:
        return _train(adaptor, model, asked, labels, steps)
    except BaseException:
        adaptor.key_id = before
        raise


def _train(
    adaptor: Adaptor, model: nn.Module, asked: dict[str, Any], labels: Tensor, steps: Schedule
) -> tuple[list[Any], Tensor]:
    loss: Any = None
    losses: list[Any] = []
    prefix = PrefixCache(model, adaptor.layer, adaptor, looks=1)

    def attempt() -> Tensor:
        nonlocal loss
        adaptor.iter = len(losses)
        with prefix.step():
            loss = getattr(model(**asked), "loss", None)
        if not isinstance(loss, Tensor):
            raise TypeError("the model must return an object with .loss when given labels")
        losses.append(loss.detach().float().cpu().numpy()[()])
        return loss

    still = frozen(model, with_modes=False)
    with still, torch.enable_grad(), adaptor.editing(labels), prefix:
        first = attempt()
        descend(adaptor.trained, attempt, steps, first)
    return losses, loss.detach()


def prompt_end(labels: Tensor) -> int | Tensor:
    """Return where the references take the query of a labelled batch from.

    labels: [B, T]. Of one row the number of ignored labels less one, as they count; of several the
    token before each row's first label that counts, [B].
    """
    ignored = labels == IGNORED_LABEL
    if len(labels) == 1 or labels.ndim < 2:
        return int(ignored.sum()) - 1
    return (~ignored).int().argmax(dim=1) - 1
