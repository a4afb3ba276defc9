"""One edit through an adaptor: exactly as many steps of Adam as asked, the last value kept.

The keys do not change after the first step and the query stays where it is, so the nearest row is
found once, and the layers before the adaptor run once; only that row's value has a gradient.
Nothing is published before the last step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grace_fast.compat.adaptor import Adaptor
from grace_fast.compat.method import Steps
from grace_fast.compat.prefix import Prefix
from grace_fast.semantics import IGNORED_LABEL


@dataclass(frozen=True)
class Taught:
    """What an edit's training saw."""

    losses: list[Any]  # numpy scalars, each before its step
    loss: Tensor  # the last of them


def teach(
    adaptor: Adaptor, model: nn.Module, tokens: Mapping[str, Any], steps: Steps, at_labels: bool
) -> Taught:
    """Edit tokens with `labels` into an adaptor of a model.

    at_labels: the query is taken from before the first label; else where `key_id` says.

    Raises: ValueError for tokens without labels, TypeError for a model that returns no loss, and
    what the model raises. Nothing has changed then.
    """
    labels = tokens.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(f"an edit needs tokens['labels'], got {sorted(tokens)}")
    asked = dict(tokens)
    if "use_cache" in inspect.signature(model.forward).parameters:
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
    adaptor: Adaptor, model: nn.Module, asked: dict[str, Any], labels: Tensor, steps: Steps
) -> Taught:
    losses = []
    adam: torch.optim.Optimizer | None = None
    still = without_weight_gradients(model)
    with still, torch.enable_grad(), adaptor.editing(labels), ExitStack() as later_steps:
        prefix = Prefix(model, adaptor)
        for step in range(steps.n_iter):
            adaptor.iter = step
            with nullcontext() if step else prefix.keeping():
                loss: Any = getattr(model(**asked), "loss", None)
            if not isinstance(loss, Tensor):
                raise TypeError("the model must return an object with .loss when given labels")
            losses.append(loss.detach().float().cpu().numpy()[()])
            trained = adaptor.trained
            if trained is None:
                raise RuntimeError("the edited layer did not run in the model's forward call")
            if adam is None:
                later_steps.enter_context(prefix.returning())
                adam = torch.optim.Adam([trained], lr=steps.edit_lr)
            # A mode that replaces no token here leaves the loss without a gradient.
            (gradient,) = torch.autograd.grad(loss, [trained], allow_unused=True)
            trained.grad = torch.zeros_like(trained) if gradient is None else gradient
            adam.step()
    return Taught(losses, loss.detach())


def prompt_end(labels: Tensor) -> int | Tensor:
    """Return where the references take the query of a labelled batch from.

    labels: [B, T]. Of one row the number of ignored labels less one, as they count; of several the
    token before each row's first label that counts, [B].
    """
    ignored = labels == IGNORED_LABEL
    if len(labels) == 1 or labels.ndim < 2:
        return int(ignored.sum()) - 1
    return (~ignored).int().argmax(dim=1) - 1


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters of a model in the block; its modes stay as they are."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
