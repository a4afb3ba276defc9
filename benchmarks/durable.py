"""What edits that outlive the process cost: `python -m benchmarks.durable [--quick]`.

The same edits with a journal and without one, in turns, beside what the disk takes to keep a page;
then codebooks of up to a million compacted edits: opened, compacted again, and beside the opening
what `torch.load` takes for keys, values and radii alone, without edits, labels or checksums. What
is opened has to be what was written, to the bit, before any time is told.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import grace_fast as gf
from benchmarks import runner
from grace_fast.codebook.codebook import Codebook
from grace_fast.editor.grace import Grace
from grace_fast.edits.edit import Edit, Event
from grace_fast.edits.history import History
from grace_fast.edits.settings import Settings
from grace_fast.store.saved import Offline, read_saved, write

WIDTH, LABELS = 64, 16
ALLOWED_MS = 5.0  # more for an edit with a journal
ALLOWED_S = 5.0  # to open a million edits
FULL, QUICK = (10_000, 100_000, 1_000_000), (1_000, 10_000)


class Linear(nn.Module):
    """A classifier of one layer, so that an edit is mostly what editing costs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, LABELS)

    def forward(self, inputs_embeds: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.layer(inputs_embeds)[:, -1]
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


@dataclass(frozen=True)
class Held:
    """What two codebooks must have alike."""

    keys: Tensor
    values: Tensor
    radii: Tensor
    edits: list[tuple[Any, ...]]

    @classmethod
    def of(cls, grace: Grace) -> Held:
        """Return what a codebook holds."""
        edits = [(each.id, each.outcome, each.row, each.radius) for each in grace.edits()]
        book = grace.codebook.snapshot()
        return cls(book.keys, book.values, book.radii, edits)

    def is_as(self, other: Held) -> bool:
        """Whether both are the same, to the bit."""
        pairs = ((self.keys, other.keys), (self.values, other.values), (self.radii, other.radii))
        return self.edits == other.edits and all(torch.equal(*pair) for pair in pairs)


def editor(path: Path | None) -> Grace:
    """Return an editor of a model that is always the same."""
    torch.manual_seed(0)
    return gf.attach(Linear(), "layer", epsilon=1.0, path=path, replacement="replace_all")


def milliseconds(call: Callable[[], Any]) -> float:
    """Return what one call takes."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def edit_beside(folder: Path, count: int) -> dict[str, Any]:
    """Make the same edits with a journal and without, first the one, then the other."""
    plain, kept = editor(None), editor(folder / "book")
    generator = torch.Generator().manual_seed(1)
    taken: dict[str, list[float]] = {"without": [], "with a journal": [], "a page": []}
    page = os.open(folder / "page", os.O_WRONLY | os.O_CREAT)

    def keep_a_page() -> None:
        os.pwrite(page, bytes(4096), 0)
        os.fsync(page)

    for number in tqdm(range(count), desc="edits", disable=None):
        query = torch.randn(1, 1, WIDTH, generator=generator)
        batch = {"inputs_embeds": query, "labels": torch.tensor([number % LABELS])}
        both = [("without", plain), ("with a journal", kept)]
        for name, grace in both[:: 1 if number % 2 else -1]:
            taken[name].append(milliseconds(lambda grace=grace, batch=batch: grace.edit(batch)))
        taken["a page"].append(milliseconds(keep_a_page))
    os.close(page)
    known = Held.of(kept)
    is_same = known.is_as(Held.of(plain))
    kept.unload()
    again = editor(folder / "book")
    is_same &= known.is_as(Held.of(again))
    again.unload()
    more = np.subtract(taken["with a journal"], taken["without"])
    return {
        "edits": count,
        "is_same": is_same,
        "more_ms": float(np.median(more)),
        **{name: _spread(times) for name, times in taken.items()},
    }


def _spread(times: list[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(times, share)) for share in (50, 90, 99)}


def made(rows: int) -> tuple[Codebook, History]:
    """Return a codebook and the history of as many edits, one on each row."""
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, rows, WIDTH, generator=generator)
    book, history = Codebook(WIDTH, WIDTH), History()
    labels = [torch.tensor([row % LABELS, row]) for row in range(rows)]
    book.append(keys, values, torch.full((rows,), 0.5), labels)
    for row in tqdm(range(rows), desc=f"{rows:,} edits", disable=None):
        history.add_event(Event(row, row, 0.5, row, row))
        edit = Edit(
            id=row,
            outcome="added",
            row=row,
            distance=math.inf,
            radius=0.5,
            query=keys[row],
            label=labels[row],
            value_before=None,
            value_after=row,
            loss=0.1,
        )
        history.record(edit, row)
    return book, history


def is_as_made(found: tuple[Codebook, History], book: Codebook, history: History) -> bool:
    """Whether a codebook that was opened is the one that was written; of a thousand edits, all."""
    opened, edits = found[0].snapshot(), found[1].edits
    known = book.snapshot()
    pairs = ((opened.keys, known.keys), (opened.values, known.values), (opened.radii, known.radii))
    asked = range(0, len(known), max(1, len(known) // 1000))
    return (
        list(edits) == list(history.edits)
        and all(torch.equal(*pair) for pair in pairs)
        and all(_is_one(edits[number], history.edits[number]) for number in asked)
        and all(found[1].rows[number] == history.rows[number] for number in asked)
    )


def _is_one(one: Edit, other: Edit) -> bool:
    return all(
        torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
        for ours, theirs in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def open_beside(folder: Path, rows: int, turns: int) -> dict[str, Any]:
    """Write a codebook of so many edits, open it and read its arrays by torch, in turns."""
    path, arrays = folder / "large", folder / "arrays.pt"
    wrote, is_same = _written(path, arrays, rows)
    book_bytes = sum(each.stat().st_size for each in path.iterdir())
    taken: dict[str, list[float]] = {"open": [], "torch.load of the arrays": []}
    for _ in range(turns):
        taken["open"].append(milliseconds(lambda: read_saved(path).codebook()))
        taken["torch.load of the arrays"].append(
            milliseconds(lambda: torch.load(arrays, weights_only=True))
        )
    with contextlib.closing(Offline(path)) as offline:
        compacted = milliseconds(offline.compact)
    shutil.rmtree(path)
    arrays.unlink()
    return {
        "edits": rows,
        "is_same": is_same,
        "bytes": book_bytes,
        "write_ms": wrote,
        "compact_ms": compacted,
        **{name: _spread(times) for name, times in taken.items()},
    }


def _written(path: Path, arrays: Path, rows: int) -> tuple[float, bool]:
    """Write a codebook, its arrays beside it; return the time it took, and if it reads the same."""
    book, history = made(rows)
    settings = asdict(Settings(layer="layer", epsilon=0.5))
    described = {"settings": settings, "fingerprint": {}, "hits": {}, "version": book.version}
    wrote = milliseconds(lambda: write(path, described, book.snapshot(), history))
    torch.save({"keys": book.keys, "values": book.values, "radii": book.radii}, arrays)
    return wrote, is_as_made(read_saved(path).codebook(), book, history)


def run(sizes: tuple[int, ...], edits: int, turns: int, folder: Path | None) -> dict[str, Any]:
    """Return all figures; folder: where there is room for the largest, 1 kB an edit."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        edited = edit_beside(Path(room), edits)
        opened = [open_beside(Path(room), rows, turns) for rows in sizes]
    return {"edited": edited, "opened": opened}


def markdown(found: dict[str, Any]) -> str:
    """Return the figures as a page; no times where something was not what was written."""
    edited, opened = found["figures"]["edited"], found["figures"]["opened"]
    page = (
        f"# Durable edits\n\n{runner.where(found)}. One layer of {WIDTH} inputs is edited; what is "
        "opened is in the disk's cache.\n\n"
    )
    if not all(each["is_same"] for each in (edited, *opened)):
        return f"{page}What was opened is not what was written: no times.\n"
    edits = []
    for name in ("without", "with a journal", "a page"):
        words = "a page written and synchronised, alone" if name == "a page" else f"an edit {name}"
        words += " one" if name == "without" else ""
        edits.append([words, *(f"{edited[name][f'p{share}']:.2f} ms" for share in (50, 90, 99))])
    books = []
    for each in opened:
        ours, theirs = each["open"]["p50"], each["torch.load of the arrays"]["p50"]
        seconds = (f"{each_ms / 1e3:.3f} s" for each_ms in (ours, theirs))
        compacted, size = f"{each['compact_ms'] / 1e3:.2f} s", f"{each['bytes'] / 1e6:,.0f} MB"
        books.append([f"{each['edits']:,}", *seconds, f"{ours / theirs:.1f}", compacted, size])
    heads = ("edits", "opened", "torch.load of the arrays", "ratio", "compacted", "on the disk")
    first = runner.table((f"{edited['edits']:,} edits", "p50", "p90", "p99"), edits)
    return (
        f"{page}{first}\n\n"
        f"A journal adds {edited['more_ms']:.2f} ms to an edit ({ALLOWED_MS:g} allowed).\n\n"
        f"{runner.table(heads, books)}\n\n"
        f"A million edits may take {ALLOWED_S:g} s to open.\n"
    )


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="ten thousand edits at most")
    parser.add_argument("--folder", type=Path, help="with room for 2 GB; by default the system's")


def _measure(given: Namespace) -> Iterator[runner.Found]:
    sizes, edits = (QUICK, 100) if given.quick else (FULL, 1000)
    yield {"figures": run(sizes, edits, turns=5, folder=given.folder)}


def verdict(found: runner.Found) -> int:
    """Return 1 for a wrong codebook, 2 for a figure that was missed."""
    edited, opened = found["figures"]["edited"], found["figures"]["opened"]
    if not all(each["is_same"] for each in (edited, *opened)):
        return 1
    slow = edited["more_ms"] > ALLOWED_MS or opened[-1]["open"]["p50"] > 1e3 * ALLOWED_S
    return 2 * slow


main = runner.Program("durable", __doc__, options, _measure, markdown, verdict).main


if __name__ == "__main__":
    sys.exit(main())
