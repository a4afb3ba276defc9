"""Layer and epsilon from measured distances, on inputs that no reported figure is about.

    epsilon = d / 2, where only 5 % of the inputs have one of another module nearer than d

A ball that takes in another edit of its label can grow to twice its epsilon: so half of d. Of the
middle layers the one is taken whose epsilon holds most rewordings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast.editor.calibrate import CLOSE_QUANTILE


@dataclass(frozen=True)
class Scale:
    """How far apart inputs are at one layer."""

    layer: str
    unrelated: float  # 5 % of the inputs have one of another module nearer than this
    reworded: float  # the median distance from an input to its rewording
    epsilon: float
    inside: float  # the share of rewordings within epsilon


def measure(
    layer: str, queries: Tensor, labels: Tensor, originals: Tensor, reworded: Tensor
) -> Scale:
    """Return the distances of one layer.

    queries: [M, D] of different inputs, labels: [M]; originals and reworded: [R, D], in pairs.
    """
    wide = queries.double()
    apart = torch.cdist(wide, wide).masked_fill(labels[:, None] == labels[None, :], torch.inf)
    unrelated = float(apart.amin(dim=1).quantile(CLOSE_QUANTILE))
    to_rewording = (originals - reworded).norm(dim=1)
    epsilon = unrelated / 2
    inside = float((to_rewording <= epsilon).float().mean())
    return Scale(layer, unrelated, float(to_rewording.median()), epsilon, inside)


def choose(scales: Sequence[Scale]) -> Scale:
    """Return the layer whose epsilon holds most rewordings."""
    return max(scales, key=lambda scale: scale.inside)


def reason(chosen: Scale) -> str:
    """Say in words why this epsilon."""
    return (
        f"epsilon {chosen.epsilon:.3g} at {chosen.layer}: only {CLOSE_QUANTILE:.0%} of the inputs "
        f"have one of another module within {chosen.unrelated:.3g}, and a ball that takes in "
        "another edit of its label can reach twice its epsilon. It holds "
        f"{chosen.inside:.0%} of the rewordings, the most of the middle layers."
    )
