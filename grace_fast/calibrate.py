"""Epsilon from measured distances: how far apart unrelated inputs are where the model is edited."""

from __future__ import annotations

import torch
from torch import Tensor

# Half the distance of the closest 5 % of unrelated pairs: balls of such a radius rarely touch.
CLOSE_QUANTILE = 0.05
CALIBRATION_INPUTS = 8  # fewer say nothing of a quantile


def nearest_distances(queries: Tensor) -> Tensor:
    """Return each query's distance to the nearest of the others, [M] float32.

    queries: [M, D] of unrelated inputs; repeats of one query are dropped first.
    """
    distinct = torch.unique(queries, dim=0).double()
    exactly = "donot_use_mm_for_euclid_dist"  # the matmul formula loses small distances
    distances = torch.cdist(distinct, distinct, compute_mode=exactly)
    return distances.fill_diagonal_(torch.inf).amin(dim=1).float()


def epsilon_from(queries: Tensor) -> float:
    """Return an epsilon for a layer from the queries [M, D] of unrelated inputs.

    Raises: ValueError for fewer than 8 inputs, or where they all ask with one query.
    """
    if len(queries) < CALIBRATION_INPUTS:
        raise ValueError(
            f'epsilon="auto" needs at least {CALIBRATION_INPUTS} unrelated calibration_inputs, '
            f"got {len(queries)}"
        )
    if len(torch.unique(queries, dim=0)) < 2:
        raise ValueError(
            "the calibration inputs all ask with the same query, so no epsilon can tell them "
            "apart; attach to another layer"
        )
    return float(nearest_distances(queries).quantile(CLOSE_QUANTILE)) / 2
