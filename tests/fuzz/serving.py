"""What a codebook has to do that somebody's files were taken for: what any other one does."""

from __future__ import annotations

import math
from collections.abc import Iterable

import golden_codebooks as golden
import torch

import grace_fast as gf
from grace_fast import semantics
from grace_fast.edits.history import History
from grace_fast.edits.verify import verify
from grace_fast.semantics import Rules
from grace_fast.store import columns, history_columns


def assert_decides_by_the_law(book: gf.Codebook) -> None:
    """Look up keys, what is near to them, and NaN; every answer is that of the law."""
    queries = torch.full((1, book.key_dim), math.nan, dtype=book.dtype)
    if book.key_dim == golden.WIDTH:
        queries = torch.cat((golden.questions().to(book.dtype), book.keys, queries))
    found = gf.find(queries, book)
    row, squared = semantics.nearest(queries, book.keys, book.live)
    radius = torch.cat((book.radii.double(), torch.tensor([-1.0])))[row]
    hit = (radius >= 0) & (squared <= radius * radius)
    assert torch.equal(found.hit, hit)
    assert torch.equal(found.row[hit], row[hit])


def assert_serves(
    book: gf.Codebook, history: History, rules: Rules, undone: Iterable[int] | None = None
) -> None:
    """Look up, verify, be written and read again, and have every edit undone in some order."""
    assert_decides_by_the_law(book)
    snapshot = book.snapshot()
    packed = columns.pack_codebook(snapshot) | history_columns.pack_history(history, snapshot)
    texts = {str(e.id): e.text for e in history.edits.values() if e.text is not None}
    again = columns.unpack_codebook(packed, torch.device("cpu"), book.version)
    history_again = history_columns.unpack_history(packed, again.snapshot(), texts, history.next_id)
    assert [vars(e).keys() for e in history_again.edits.values()] == [
        vars(e).keys() for e in history.edits.values()
    ]
    assert list(history_again.edits) == list(history.edits)
    for edit in list(history.edits) if undone is None else undone:
        verify(history, book, rules)
        with book.writing() as draft:
            history.undo(draft, edit)
    assert not history.edits
    assert_decides_by_the_law(book)
