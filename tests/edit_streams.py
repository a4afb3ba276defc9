"""A codebook and its edits without a model, to be undone, stored and replayed."""

from __future__ import annotations

import torch

import grace_fast as gf
from grace_fast.edits.edit import Edit
from grace_fast.edits.history import History
from grace_fast.edits.verify import verify

WIDTH = 16


class Stream:
    """A codebook and its edits, each with a value that tells which edit wrote it."""

    def __init__(self, rules, width=WIDTH):
        self.rules, self.width = rules, width
        self.book, self.history = gf.Codebook(width, 4), History()

    def edit(self, query, label):
        number = self.history.next_id
        query, label = torch.as_tensor(query).float(), torch.tensor([label])
        with self.book.writing() as draft:
            done = self.history.apply(
                draft, self.rules, query, label, torch.full((4,), -1.0), number
            )
            draft.set_value(done.row, torch.full((4,), float(number)))
            after = draft.snapshot()
        edit = Edit(
            id=number,
            outcome=done.outcome,
            row=done.row,
            distance=done.distance,
            radius=done.radius,
            query=query,
            label=label,
            value_before=done.value_before,
            value_after=after.row(done.row).value_slot,
        )
        self.history.record(edit, after.row(done.row).label_slot)
        return edit

    def undo(self, edit_id):
        with self.book.writing() as draft:
            return self.history.undo(draft, edit_id)

    def verify(self):
        return verify(self.history, self.book, self.rules)

    def live_rows(self):
        live = self.book.live
        pairs = zip(self.book.labels, live.tolist(), strict=True)
        labels = [None if label is None else label.tolist() for label, on in pairs if on]
        book = self.book
        return book.ids[live], book.keys[live], book.values[live], book.radii[live], labels


def same(one, other):
    return one[4] == other[4] and all(
        torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True)
    )


def zero(*leading):
    query = torch.zeros(WIDTH)
    query[: len(leading)] = torch.tensor(leading)
    return query
