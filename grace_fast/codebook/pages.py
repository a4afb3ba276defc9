"""Pages: what may change of 4 096 rows, copied before they are written.

Keys and values lie in slots that are only ever added. Radius, liveness, and which key, value and
label slot a row has are in pages; a version is a row count and a tuple of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_ROWS = 4096
COLUMNS = ("radius", "live", "key_slot", "value_slot", "label_slot")  # what may change of a row


@dataclass(frozen=True)
class Page:
    """The part of 4 096 rows that may change; copied before it is written once it was published."""

    radius: Tensor  # [4096] float32, on the codebook's device
    live: Tensor  # [4096] bool, on the codebook's device
    key_slot: Tensor  # [4096] int64, on the host
    value_slot: Tensor  # [4096] int64, on the host
    label_slot: Tensor  # [4096] int64, on the host

    @staticmethod
    def empty(device: torch.device) -> Page:
        """Return a page whose rows are not yet in use."""
        host = torch.zeros(3, PAGE_ROWS, dtype=torch.int64, device="cpu")
        radius = torch.zeros(PAGE_ROWS, device=device, dtype=torch.float32)
        live = torch.zeros(PAGE_ROWS, dtype=torch.bool, device=device)
        return Page(radius, live, host[0], host[1], host[2])

    def copy(self) -> Page:
        """Return a page of its own memory with the same rows."""
        return Page(*(getattr(self, name).clone() for name in COLUMNS))


@dataclass(frozen=True)
class Counts:
    """How much of the slots and pages a version has."""

    rows: int = 0  # removed rows included
    live: int = 0
    keys: int = 0  # slots in use; more than rows once a key has moved
    values: int = 0
    labels: int = 0
    key_moves: int = 0  # how often the key of a row changed: what is derived from keys starts anew
    value_moves: int = 0
    widest: float = -1.0  # at least every radius; it only grows


def filled(columns: Mapping[str, Tensor], device: torch.device) -> tuple[Page, ...]:
    """Return the pages of columns [N], one for each field."""
    count, pages = len(columns["radius"]), []
    for start in range(0, count, PAGE_ROWS):
        page = Page.empty(device)
        here = slice(0, min(PAGE_ROWS, count - start))
        for name in COLUMNS:
            getattr(page, name)[here] = columns[name][start : start + PAGE_ROWS]
        pages.append(page)
    return tuple(pages)


def gathered(pages: Sequence[Page], name: str, rows: Tensor, device: torch.device) -> Tensor:
    """Return one field of rows [B]; where there is no page and every row is a miss, zeros."""
    if len(pages) <= 1 or not len(rows):
        page = pages[0] if pages else Page.empty(device)
        column: Tensor = getattr(page, name)
        return column[rows.to(column.device)]
    picked = [getattr(pages[r // PAGE_ROWS], name)[r % PAGE_ROWS] for r in rows.tolist()]
    return torch.stack(picked)
