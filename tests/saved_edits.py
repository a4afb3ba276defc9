"""A saved codebook with an edit on each key, made without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import grace_fast as gf
from grace_fast.edits.edit import Edit, Event
from grace_fast.edits.history import History
from grace_fast.edits.settings import Settings
from grace_fast.store.saved import write

EPSILON = 0.5


def book_of(
    folder: Path,
    keys: Sequence[Sequence[float]] | torch.Tensor,
    labels: Sequence[int],
    radii: Sequence[float] | None = None,
    told: Sequence[tuple[str, str]] | None = None,
    hits: dict[int, int] | None = None,
    **fields: object,
) -> Path:
    """Save a codebook with an edit on each key; fields: of the manifest, in place of the usual."""
    keys = torch.as_tensor(keys, dtype=torch.float32)
    balls = torch.full((len(keys),), EPSILON) if radii is None else torch.tensor(radii)
    book, history = gf.Codebook(keys.shape[1], 3), History()
    book.append(keys, torch.zeros(len(keys), 3), balls, [torch.tensor([each]) for each in labels])
    now = book.snapshot()
    for at in range(len(keys)):
        text = None if told is None else told[at]
        history.add_event(Event(at, at, float(balls[at]), at, at))
        edit = Edit(
            at, "added", at, math.inf, float(balls[at]), keys[at], now.row(at).label, None, at,
            0.25, 7, True, at, text,
        )  # fmt: skip
        history.record(edit, at)
    described = {
        "settings": asdict(Settings("layer", EPSILON)),
        "fingerprint": {},
        "hits": {str(row): count for row, count in (hits or {}).items()},
        **fields,
    }
    write(folder, described, now, history)
    return folder
