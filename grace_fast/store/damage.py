"""Damaged directories: what of one can be read, and the report of its repair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_fast.errors import CodebookCorrupt
from grace_fast.store import tensor_files
from grace_fast.store.columns import ROW_COLUMNS, row_columns
from grace_fast.store.salvage import HISTORY, Dropped


@dataclass
class Repaired:
    """The report of a repair; where the directory was sound, nothing was changed."""

    path: Path
    kept: Path | None = None  # where the directory lies as it was; None where it was sound
    dropped: list[Dropped] = field(default_factory=list)
    made_again: list[str] = field(default_factory=list)  # what was damaged, and nothing is lost by

    @property
    def was_sound(self) -> bool:
        """Whether there was nothing to repair."""
        return self.kept is None


def read_columns(folder: Path, described: Any, report: Repaired) -> tuple[dict[str, Tensor], bool]:
    """Return the columns of a directory that are what was saved, and whether its history is.

    Raises: CodebookCorrupt where rows cannot be told without one that is not.
    """
    wrong: set[str] = set()
    columns = tensor_files.read_file(folder, described, wrong)
    history = {name for name in wrong if name.startswith(HISTORY)}
    labels = wrong & {"labels.length", "labels.ids"}
    needed = sorted(wrong - history - labels)
    if needed:
        raise CodebookCorrupt(
            f"{folder}: {needed} of {described['file']} are not what was saved (checksum), and "
            "nothing tells which rows are meant; take the directory from a backup",
            field=needed[0],
        )
    if labels and "labels.length" in columns:
        columns["labels.length"] = torch.full_like(columns["labels.length"], -1)
        columns["labels.ids"] = torch.zeros(0, dtype=torch.int64, device="cpu")
        report.dropped.append(Dropped("label", None, "the labels are not what was saved"))
    return columns, not history


def without_rows(live: Tensor, rows: Mapping[int, str]) -> Tensor:
    """Return which rows are live once some are removed."""
    left = live.clone()
    left[list(rows)] = False
    return left


def require_rows(columns: Mapping[str, Tensor]) -> None:
    """Raise CodebookCorrupt, naming it, for a column of rows or labels that cannot be read."""
    try:
        row_columns(columns)
    except CodebookCorrupt as error:
        dtype = ROW_COLUMNS.get(str(error.field).removeprefix("rows."), torch.int64)
        message = f"{error.field} must be {dtype}, one for each row"
        raise CodebookCorrupt(message, field=error.field) from error
