"""How often an approximate index is wrong: measured against the law before it is relied on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast.codebook.codebook import Codebook
from grace_fast.lookup import lookup
from grace_fast.lookup.backends.faiss_index import FaissIndex


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
