"""Write the golden directory of the format that this version writes, and what it decides.

    PYTHONPATH=tests python tests/golden_formats/make.py

`edits-N` hold a model's edits (`save_pretrained`), `book-N` a codebook by itself (`Codebook.save`);
N is the format. Those of an earlier format were written by the last version that wrote it (3c6fd9a
for 1 and 2) and are never written again.
"""

from __future__ import annotations

import json
from pathlib import Path

import golden_codebooks as golden
import torch

from grace_fast.store import files

HERE = Path(__file__).parent


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
    golden.book().save(HERE / "book-new")
    keep(HERE / "book-new", golden.decisions(golden.book()))
    grace = golden.editor()
    grace.save_pretrained(HERE / "edits-new")
    keep(HERE / "edits-new", golden.edits(grace))
