"""One version of a codebook as the extension reads it: page tables, codes, and their owners.

A view is made once a version, in time that does not grow with the keys: the page table is that of
another version, changed where the pages differ, and the codes are those of the certificate.
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
from grace_fast.index.segments import Array, Part

ANY_BATCH = 1 << 62
BOX_BYTES = 64
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # lookup.h, Dtype


@dataclass(frozen=True)
class Effort:
    """What certified look-ups read, in the mean of some queries."""

    boxes: float
    codes: float  # near codes; of a leaf all 64
    survivors: float  # keys that the near codes do not settle
    rechecks: float  # keys read whole, those of exhaustive look-ups too
    exhaustive: float  # look-ups that read all keys after all
    bytes: float  # of all that, and of the rows that the query is projected on


class PageTable:
    """The addresses of a snapshot's pages, made from those of another snapshot where they agree."""

    def __init__(self, snapshot: Snapshot, other: PageTable | None = None) -> None:
        self.pages = snapshot.pages
        self.addresses = np.zeros((3, len(self.pages)), np.uint64)  # radius, live, key slot
        known = other.pages if other is not None else ()
        shared = min(len(known), len(self.pages))
        if other is not None:
            self.addresses[:, :shared] = other.addresses[:, :shared]
        for number, page in enumerate(self.pages):
            if number < shared and page is known[number]:
                continue
            fields = (page.radius, page.live, page.key_slot)
            self.addresses[:, number] = [field.data_ptr() for field in fields]

    def book(self, cpu: Any, snapshot: Snapshot) -> Any:
        """Return the extension's description of the snapshot's keys."""
        radius, live, key_slot = (int(row.ctypes.data) for row in self.addresses)
        return cpu.Book(
            slots=snapshot.key_slots.data_ptr(),
            slot_pages=key_slot if snapshot.counts.key_moves else 0,
            live_pages=live,
            radius_pages=radius,
            rows=snapshot.rows,
            width=snapshot.key_dim,
            dtype=str(snapshot.dtype).removeprefix("torch."),
            mapped=snapshot.key_file.for_extension() if snapshot.key_file is not None else None,
        )


class View:
    """One version, ready to be looked up: what the extension reads and what keeps it alive."""

    def __init__(self, cpu: Any, snapshot: Snapshot, other: View | None) -> None:
        self.table: PageTable = PageTable(snapshot, other.table if other is not None else None)
        self._cpu = cpu
        self.pages = snapshot.pages
        self.keys, self.key_file = snapshot.key_slots, snapshot.key_file
        self.book = self.table.book(cpu, snapshot)
        self.plan: Any = None  # None while the certificate says nothing about this version
        self.made_from: Any = None  # the certificate's state
        self.holds: Any = None  # what the plan points into
        self.rows = snapshot.rows
        self.key_bytes = snapshot.key_dim * snapshot.dtype.itemsize
        self.widest = float("inf")
        self.predicted_bytes = float("inf")
        self.knows_radii = True  # whether the plan's bounds on the radii are of this version

    @cached_property
    def version(self) -> Any:
        """What the extension answers from: by the certificate where that is predicted to pay."""
        # A batch shares what it reads densely: 12 queries at a time keep the arithmetic as busy as
        # one keeps the memory (Zen 3, N = 1e5, D = 1536).
        shared = self.rows * self.key_bytes / max(self.predicted_bytes, 1.0)
        up_to = ANY_BATCH if shared > 12 else math.ceil(shared) - 1
        return self._cpu.Version(
            book=self.book,
            plan=self.plan,
            widest=self.widest,
            predicted_bytes=min(self.predicted_bytes, 1e30),
            certified_up_to=up_to if self.knows_radii else 0,
        )

    @property
    def keys_pay(self) -> bool:
        """Tell whether what is near is found by codes, for less than reading all keys."""
        return self.plan is not None and self.predicted_bytes < self.rows * self.key_bytes

    def effort(self, queries: Tensor) -> Effort:
        """Return what `find` reads for queries [B, D] whose rows' elements are side by side."""
        batch, width = queries.shape
        number = DTYPE_NUMBERS[queries.dtype]
        asked = (queries.data_ptr(), queries.stride(0), number, batch)
        read = {name: n / batch for name, n in self.plan.effort(self.book, *asked).items()}
        total = BOX_BYTES * read["boxes"] + quantizer.NEAR * read["codes"]
        total += quantizer.FAR * read["survivors"] + read["rechecks"] * self.key_bytes
        return Effort(**read, bytes=total + quantizer.NEAR * width * 2)

    def use_keys_of(self, base: View) -> None:
        """Let the nearest key be found by the codes of another version, whose keys are these.

        It may have fewer rows, and other radii.
        """
        self.plan, self.holds = base.plan, base.holds
        self.predicted_bytes, self.knows_radii = base.predicted_bytes, False


class State:
    """What a build publishes in one store."""

    def __init__(self, phi: quantizer.Map, fitted_rows: int, floor: float) -> None:
        self.phi = phi
        self.fitted_rows = fitted_rows
        self.floor = floor
        self.runs: tuple[Part, ...] = ()
        self.tail = segments.tail(256, floor)
        self.covered = 0  # rows below have a position
        self.oldest = 0  # the first version it is true of
        self.predicted_bytes = float("inf")  # of a look-up


def plan_of(cpu: Any, state: State, rows: int, widest: float) -> Any:
    """Return the extension's description of a state, for a version of so many rows."""
    phi, plan = state.phi, cpu.Plan()
    plan.set_map(
        centre=phi.padded_centre.data_ptr(),
        rows=phi.packed_rows.data_ptr(),
        turn=phi.turn.data_ptr(),
        step=phi.step,
        lipschitz=phi.lipschitz,
        row_norm=phi.row_norm,
        eta=phi.eta,
        norm_slot=phi.norm_slot,
        far=phi.far,
    )
    plan.set_bounds(covered=min(state.covered, rows), floor=state.floor, widest=widest)
    for part in (*state.runs, state.tail):
        plan.add_part(
            count=part.count,
            row=part.rows.ctypes.data,
            near=part.near.ctypes.data,
            far=part.far.ctypes.data,
            reach=part.reach.ctypes.data,
            near_residual=part.near_error,
            far_residual=part.far_error,
            leaf_boxes=_address(part.leaf_boxes),
            super_boxes=_address(part.super_boxes),
            super_reach=_address(part.super_reach),
            isolated=_address(part.isolated),
        )
    return plan


def _address(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)
