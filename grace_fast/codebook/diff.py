"""Differences of two versions of a codebook, to be stored and to be applied again.

Slots are only ever added, so a change is the slots that are new, and every field of the rows that
are new or differ. Done to a codebook of the version before, it gives the version after, bit for
bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grace_fast.codebook.draft import Draft
from grace_fast.codebook.pages import COLUMNS, PAGE_ROWS, Page
from grace_fast.codebook.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Change:
    """The way from one version to a later one; on the host."""

    keys: Tensor  # [new slots, D]
    values: Tensor  # [new slots, V]
    labels: list[Tensor | None]  # of new slots
    ids: Tensor  # [new rows] int64
    rows: Tensor  # [M] int64, ascending: those that differ or are new
    columns: dict[str, Tensor]  # of them, each [M]

    @staticmethod
    def between(before: Snapshot, after: Snapshot) -> Change:
        """Return what a later version of the same codebook has otherwise."""
        old, new = before.counts, after.counts
        rows = [_differing(before, after), torch.arange(old.rows, new.rows, device="cpu")]
        changed = torch.cat(rows)
        return Change(
            after.key_slots[old.keys : new.keys].cpu(),
            after.value_slots[old.values : new.values].cpu(),
            after.label_slots.between(old.labels, new.labels),
            after.ids[old.rows :].clone(),
            changed,
            _columns(after, changed),
        )

    def apply(self, draft: Draft) -> None:
        """Make the version after of the version before, which a draft holds."""
        known = draft.rows
        draft.extend(self.keys, self.values, self.labels, self.ids)
        draft.set_columns(self.rows, self.columns, known)


def back(now: Snapshot, then: Snapshot) -> Change:
    """Return the change that gives every row what it held in an earlier version; later ones go."""
    columns, differ = {}, torch.zeros(now.rows, dtype=torch.bool, device="cpu")
    for name in COLUMNS:
        held = now.column(name).cpu()
        columns[name] = column = held.clone()
        column[: then.rows] = then.column(name).cpu()
        if name == "live":
            column[then.rows :] = False
        differ |= _bits(column) != _bits(held)
    changed = differ.nonzero()[:, 0]
    return Change(
        now.key_slots[:0].cpu(),
        now.value_slots[:0].cpu(),
        [],
        torch.zeros(0, dtype=torch.int64, device="cpu"),
        changed,
        {name: column[changed] for name, column in columns.items()},
    )


def _differing(before: Snapshot, after: Snapshot) -> Tensor:
    """Return the rows of both whose fields differ: looked for in pages that are not shared."""
    found = [torch.zeros(0, dtype=torch.int64, device="cpu")]
    for number, (old, new) in enumerate(zip(before.pages, after.pages, strict=False)):
        if old is new:
            continue
        count = min(PAGE_ROWS, before.rows - number * PAGE_ROWS)
        differ = torch.zeros(count, dtype=torch.bool, device="cpu")
        for name in COLUMNS:
            one, other = (_bits(getattr(page, name)[:count]).cpu() for page in (old, new))
            differ |= one != other
        found.append(differ.nonzero()[:, 0] + number * PAGE_ROWS)
    return torch.cat(found)


def _columns(snapshot: Snapshot, rows: Tensor) -> dict[str, Tensor]:
    """Return the fields of some rows, ascending, on the host."""
    parts: dict[str, list[Tensor]] = {name: [] for name in COLUMNS}
    numbers = rows // PAGE_ROWS
    for number in sorted({*numbers.tolist()}):
        at, page = rows[numbers == number] % PAGE_ROWS, snapshot.pages[number]
        for name, part in parts.items():
            field: Tensor = getattr(page, name)
            part.append(field[at.to(field.device)].cpu())
    empty = Page.empty(torch.device("cpu"))
    return {
        name: torch.cat(part) if part else getattr(empty, name)[:0] for name, part in parts.items()
    }


def _bits(column: Tensor) -> Tensor:
    return column.view(torch.int32) if column.dtype == torch.float32 else column
