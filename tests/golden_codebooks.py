"""The model and the codebook of the golden directories: exact numbers, drawn from no generator."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

import grace_fast as gf

LAYER, EPSILON, WIDTH = "layer", 0.5, 8
EDITS = ((1, 0), (4, 1), (2, 2), (1, 3), (7, 1), (10, 2), (4, 1), (8, 0), (2, 0))  # token, class
UNDONE = 5


class Model(nn.Module):
    """A classifier of one token; the codebook is on its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, WIDTH)
        self.layer = nn.Linear(WIDTH, 4)
        self.config = SimpleNamespace(
            to_dict=lambda: {"model_type": "golden", "hidden_size": WIDTH}
        )
        with torch.no_grad():
            for number, weight in enumerate(self.parameters()):
                steps = torch.arange(weight.numel()) * (7 + 4 * number) % 33
                weight.copy_(((steps - 16) / 16).reshape(weight.shape))

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.layer(self.embedding(input_ids))[:, -1]
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def tokens(text: str) -> dict[str, list[int]]:
    """Return the one token that a number stands for."""
    return {"input_ids": [int(text)]}


def editor() -> gf.Grace:
    """Return an editor with every outcome in it; no value is trained, so that none can differ."""
    grace = gf.attach(
        Model().eval(),
        LAYER,
        EPSILON,
        tokenizer=tokens,
        replacement="replace_all",
        iterations=0,
        expand_margin=0.0,
        store_text=True,
    )
    for token, label in EDITS:
        grace.edit(str(token), label)
    grace.undo(UNDONE)
    return grace


def book(rows: int = 64) -> gf.Codebook:
    """Return a codebook with codes, a label, a dead key and a removed row."""
    number = torch.arange(rows * WIDTH)
    keys = ((number * number + 3 * number) % 61 / 8 - 3).reshape(rows, WIDTH).float()
    values = ((number * 5) % 17 / 4).reshape(rows, WIDTH).float()
    radii = (torch.arange(rows) % 5 + 1).float() / 4
    radii[7] = -1.0
    made = gf.Codebook(WIDTH, WIDTH)
    labels = [torch.tensor([3, 1, 4])] + [None] * (rows - 1)
    ids = made.append(keys, values, radii, labels)
    made.remove(int(ids[9]))
    return made


def questions() -> torch.Tensor:
    """Return queries near the keys, on a radius, and far away, [96, WIDTH]."""
    keys = book().keys
    near = keys[::2] + 0.125
    on_the_radius = keys[:32].clone()
    on_the_radius[:, 3] += torch.arange(32) % 5 / 4 + 0.25
    return torch.cat((near, on_the_radius, -40 * keys[:32]))


def decisions(book: gf.Codebook) -> dict[str, object]:
    """Return what a codebook decides about the questions, numbers exact."""
    found, near = gf.find(questions(), book), gf.nearest(questions(), book)
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
