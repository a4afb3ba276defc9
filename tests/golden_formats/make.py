"""Write the golden directory of the format that this version writes, and what it decides.

    PYTHONPATH=tests/golden_formats python tests/golden_formats/make.py

`edits-N` hold a model's edits (`save_pretrained`), `book-N` a codebook by itself (`gf.save`); N is
the format. Those of an earlier format were written by the last version that wrote it (3c6fd9a for 1
and 2) and are never written again.
"""

from __future__ import annotations

import json
from pathlib import Path

import small
import torch

import grace_fast as gf
from grace_fast.store import files

HERE = Path(__file__).parent


def decisions(book: gf.Codebook) -> dict[str, object]:
    """Return what a codebook decides about the questions, numbers exact."""
    found, near = gf.find(small.questions(), book), gf.nearest(small.questions(), book)
    return {
        "hit": found.hit.int().tolist(),
        "nearest": near.row.tolist(),
        "squared_distance": [number.hex() for number in near.squared_distance.tolist()],
        "sums": [float(getattr(book, name).double().sum()) for name in ("keys", "values", "radii")],
        "ids": book.ids.tolist(),
        "live": book.live.int().tolist(),
        "labels": [None if label is None else label.tolist() for label in book.labels],
    }


def edits(grace: gf.Grace) -> list[list[object]]:
    """Return what is known of every edit, and how the model answers its prompt."""
    with torch.no_grad():
        answers = [grace.model(torch.tensor([[token]])).logits[0].tolist() for token in range(16)]
    known = [
        [e.id, e.outcome, e.row, e.distance.hex(), e.radius.hex(), list(e.text)]
        for e in grace.edits()
    ]
    return [known, answers]


def keep(folder: Path, decided: object) -> None:
    """Move a directory to the place that its format gives it, beside what it decides."""
    number = files.read_config(folder)["format"]
    place = HERE / folder.name.replace("new", str(number))
    if place.exists():
        raise FileExistsError(f"{place} is kept for ever; remove it by hand if you must")
    folder.rename(place)
    place.with_suffix(".json").write_text(json.dumps(decided) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    gf.save(small.book(), HERE / "book-new")
    keep(HERE / "book-new", decisions(small.book()))
    grace = small.editor()
    grace.save_pretrained(HERE / "edits-new")
    keep(HERE / "edits-new", edits(grace))
