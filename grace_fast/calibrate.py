"""What is measured before it is relied on: epsilon, and how often an approximate index is wrong.

Epsilon comes from how far apart unrelated inputs are where the model is edited.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast import lookup
from grace_fast.backends.faiss_index import FaissIndex
from grace_fast.codebook import Codebook

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


@dataclass(frozen=True)
class IndexErrors:
    """How a FAISS index decided some queries, compared with R64."""

    index: str
    asked: int
    hits: int  # of the law
    wrong: int  # decisions that are not the law's
    lost: int  # of these, hits of the law that were given as misses
    certified: int
    wrong_certified: int  # 0, or the proof is broken
    us: float  # of one query, in the mean of a batch

    @property
    def rate(self) -> float:
        """The share of decisions that were wrong."""
        return self.wrong / self.asked if self.asked else 0.0


def measure_indexes(
    queries: Tensor, codebook: Codebook, indexes: Iterable[FaissIndex | str], batch: int = 64
) -> list[IndexErrors]:
    """Return how often each FAISS index decides otherwise than the law, for a codebook.

    queries: [M, D] as the codebook will be asked, hits among them. An index stays trained.

    Raises: BackendUnavailable, ValueError for an index that FAISS does not know or cannot train.
    """
    snapshot = codebook.snapshot()
    law = lookup.find(queries, snapshot)
    measured = []
    for asked in indexes:
        index = FaissIndex(asked) if isinstance(asked, str) else asked
        lookup.build_index(codebook, index)
        start = time.perf_counter()
        found = [lookup.find(some, snapshot, index) for some in torch.split(queries, batch)]
        took = time.perf_counter() - start
        row, certified = (
            torch.cat([getattr(match, name) for match in found]) for name in ("row", "certified")
        )
        wrong = row != law.row
        measured.append(
            IndexErrors(
                index=str(index),
                asked=len(queries),
                hits=int(law.hit.sum()),
                wrong=int(wrong.sum()),
                lost=int((wrong & (row < 0)).sum()),
                certified=int(certified.sum()),
                wrong_certified=int((wrong & certified).sum()),
                us=1e6 * took / max(1, len(queries)),
            )
        )
    return measured


def as_table(measured: Sequence[IndexErrors]) -> str:
    """Return what was measured as a table in Markdown, the wrong decisions beside the speed."""
    lines = [
        "| index | one query | wrong decisions | of them lost hits | certified | certified wrong |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in measured:
        share = each.certified / each.asked if each.asked else 1.0
        lines.append(
            f"| {each.index} | {each.us:,.0f} us | {each.wrong} / {each.asked} ({each.rate:.2%}) | "
            f"{each.lost} / {each.hits} | {share:.0%} | {each.wrong_certified} |"
        )
    return "\n".join(lines)
