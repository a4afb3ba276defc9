"""One version of a codebook as the extension reads it: page tables, codes, and their owners.

A view is made once a version, in time that does not grow with the keys: the page table is that of
another version, changed where the pages differ, and the codes are those of the index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grace_fast.codebook.once import cached_property
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import quantizer, segments
from grace_fast.index.segments import Array, Segment

ANY_BATCH = 1 << 62
BOX_BYTES = 64
DTYPE_NUMBERS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
}  # Dtype of lookup.h and layout.h


@dataclass(frozen=True)
class Effort:
    """What look-ups by the index read, in the mean of some queries."""

    boxes: float
    codes: float  # near codes; of a leaf all 64
    candidates: float  # keys that the near codes do not settle
    exact_reranks: float  # keys read whole, those of exhaustive look-ups too
    exhaustive: float  # look-ups that read all keys after all
    bytes: float  # of all that, and of the rows that the query is projected on


class NativeView:
    """One version, ready to be looked up: what the extension reads and what keeps it alive."""

    def __init__(self, cpu: Any, snapshot: Snapshot, other: NativeView | None) -> None:
        self._cpu = cpu
        self.pages = snapshot.pages
        self._table = self._page_table(other)
        self.keys, self.key_file = snapshot.key_slots, snapshot.key_file
        self.plan: Any = None  # None while the index says nothing about this version
        self.made_from: Any = None  # the index's state
        self.holds: Any = None  # what the plan points into
        self.rows, self.width = snapshot.rows, snapshot.key_dim
        self.key_moves = snapshot.counts.key_moves
        self.key_bytes = snapshot.key_dim * snapshot.dtype.itemsize
        self.widest = float("inf")
        self.predicted_bytes = float("inf")
        self.knows_radii = True  # whether the plan's bounds on the radii are of this version

    def _page_table(self, other: NativeView | None) -> Array:
        """Return the addresses of the pages, those of another view where they agree."""
        addresses = np.zeros((3, len(self.pages)), np.uint64)  # radius, live, key slot
        known = other.pages if other is not None else ()
        shared = min(len(known), len(self.pages))
        if other is not None:
            addresses[:, :shared] = other._table[:, :shared]
        for number, page in enumerate(self.pages):
            if number < shared and page is known[number]:
                continue
            fields = (page.radius, page.live, page.key_slot)
            addresses[:, number] = [field.data_ptr() for field in fields]
        return addresses

    @cached_property
    def version(self) -> Any:
        """What the extension answers from: by the index where that is predicted to pay."""
        # A batch shares what it reads densely: 12 queries at a time keep the arithmetic as busy as
        # one keeps the memory (Zen 3, N = 1e5, D = 1536).
        shared = self.rows * self.key_bytes / max(self.predicted_bytes, 1.0)
        up_to = ANY_BATCH if shared > 12 else math.ceil(shared) - 1
        fields = self._fields() | {
            "widest": self.widest,
            "predicted_bytes": min(self.predicted_bytes, 1e30),
            "indexed_up_to": up_to if self.knows_radii else 0,
        }
        mapped = None if self.key_file is None else self.key_file.for_extension()
        return self._cpu.Version(fields=fields, mapped=mapped, plan=self.plan)

    def _fields(self) -> dict[str, Any]:
        radius, live, key_slot = (int(row.ctypes.data) for row in self._table)
        return {
            "slots": self.keys.data_ptr(),
            "slot_pages": key_slot if self.key_moves else 0,
            "live_pages": live,
            "radius_pages": radius,
            "rows": self.rows,
            "width": self.width,
            "dtype": DTYPE_NUMBERS[self.keys.dtype],
        }

    @property
    def keys_pay(self) -> bool:
        """Tell whether what is near is found by codes, for less than reading all keys."""
        return self.plan is not None and self.predicted_bytes < self.rows * self.key_bytes

    def effort(self, queries: Tensor) -> Effort:
        """Return what `find` reads for queries [B, D] whose rows' elements are side by side."""
        batch, width = queries.shape
        read = [total / batch for total in self.version.effort(*asked(queries))]
        boxes, codes, candidates, exact_reranks, exhaustive = read
        total = BOX_BYTES * boxes + quantizer.NEAR * codes
        total += quantizer.FAR * candidates + exact_reranks * self.key_bytes
        total += quantizer.NEAR * width * 2
        return Effort(boxes, codes, candidates, exact_reranks, exhaustive, bytes=total)

    def use_keys_of(self, base: NativeView) -> None:
        """Let the nearest key be found by the codes of another version, whose keys are these.

        It may have fewer rows, and other radii.
        """
        self.plan, self.holds = base.plan, base.holds
        self.predicted_bytes, self.knows_radii = base.predicted_bytes, False


class IndexState:
    """What a build publishes in one store."""

    def __init__(
        self, projection: quantizer.Projection, fitted_rows: int, min_radius: float
    ) -> None:
        self.projection = projection
        self.fitted_rows = fitted_rows
        self.min_radius = min_radius
        self.segments: tuple[Segment, ...] = ()
        self.delta = segments.delta_buffer(256, min_radius)
        self.covered = 0  # rows below have a position
        self.oldest = 0  # the first version it is true of
        self.predicted_bytes = float("inf")  # of a look-up


def plan_of(cpu: Any, state: IndexState, rows: int, widest: float) -> Any:
    """Return the extension's description of a state, for a version of so many rows."""
    projection = state.projection
    arrays = {
        "centre": projection.padded_centre,
        "rows": projection.packed_rows,
        "turn": projection.turn,
    }
    return cpu.Plan(
        projection=projection.numbers | {name: each.data_ptr() for name, each in arrays.items()},
        segments=[segment.fields() for segment in (*state.segments, state.delta)],
        covered=min(state.covered, rows),
        min_radius=state.min_radius,
        widest=widest,
    )


def in_rows(queries: Tensor) -> Tensor:
    """Return queries [B, D] with the elements of each side by side."""
    return queries if queries.stride(1) == 1 else queries.contiguous()


def asked(queries: Tensor) -> tuple[int, int, int, int]:
    """Return address, stride, type and number of queries [B, D], as the extensions take them."""
    return queries.data_ptr(), queries.stride(0), DTYPE_NUMBERS[queries.dtype], len(queries)
