"""FAISS indexes of a codebook: made, dropped, and measured against the law before they serve.

index = FaissIndex("IVF1024,Flat", nprobe=16)   # as faiss.index_factory reads it
build_index(book, index)                        # else the first look-up does
find(queries, book, backend=index)              # Match.certified: which answers are proved
measure_indexes(queries, book, [index])         # how often the others are wrong
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast.codebook.codebook import Codebook
from grace_fast.lookup import dispatch, lookup
from grace_fast.lookup.backends import faiss as backend
from grace_fast.lookup.backends.faiss_index import FaissIndex as FaissIndex


def build_index(codebook: Codebook, index: FaissIndex) -> None:
    """Train and fill a FAISS index of a codebook now, so that no look-up waits for it.

    Raises: BackendUnavailable, ValueError for an index that FAISS does not know or cannot train.
    """
    dispatch.chosen(codebook.snapshot(), backend=index)
    backend.train(codebook, index)


def drop_index(codebook: Codebook, index: FaissIndex) -> None:
    """Forget a FAISS index of a codebook and give its memory back."""
    backend.drop(codebook, index)


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
        build_index(codebook, index)
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
