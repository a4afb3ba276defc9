"""A durable codebook that is cheap to edit: one linear layer, values that no training makes.

`OPERATIONS` is the same run everywhere, so that the state after each of its steps is known, and
`server` makes it in a process that a test can break: it answers one line a request, and forks.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import grace_fast as gf
from faults import shim
from grace_fast.codebook.pages import COLUMNS
from grace_fast.edits.history import History

WIDTH, CLASSES = 6, 4
Operation = tuple[Any, ...]
NOTHING = {"how": shim.NO_FAULT, "at": 0}


class Tiny(nn.Module):
    """A classifier of one layer, which is what is edited."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, inputs_embeds, labels=None):
        logits = self.layer(inputs_embeds)[:, -1]
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def attach(path: Path | str | None, **settings: Any) -> gf.editor.Grace:
    """Attach to a model of its own; what a directory holds is opened."""
    chosen = {"epsilon": 1.0, "iterations": 0, "replacement": "replace_all", **settings}
    return gf.attach(Tiny(), "layer", path=path, **chosen)


def operations(count: int, seed: int = 0, every: int = 0) -> list[Operation]:
    """Return a run of edits (new, near, repeated with another label) and undos, by its length.

    every: a compaction after so many.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(5, WIDTH, generator=generator)
    found: list[Operation] = []
    edits: list[int] = []
    made = 0
    for step in range(count):
        if step % 5 == 4:
            found.append(("undo", edits.pop(step % len(edits))))
        else:
            centre, near = torch.randint(0, 5, (2,), generator=generator).tolist()
            offset = (0.0, 0.3, 0.6, 1.2, 0.3)[near]
            query = centres[centre].clone()
            query[step % WIDTH] += offset
            found.append(("edit", query.tolist(), step % 3))
            edits.append(made)
            made += 1
        if every and step % every == every - 1:
            found.append(("compact",))
    return found


def do(grace: gf.editor.Grace, operation: Operation) -> None:
    """Make one step of a run."""
    kind, *given = operation
    if kind == "edit":
        query, label = given
        batch = {"inputs_embeds": torch.tensor([[query]]), "labels": torch.tensor([label])}
        grace.edit(batch)
    elif kind == "undo":
        grace.undo(given[0])
    elif kind == "compact":
        grace.compact()
    elif kind == "checkout":
        grace.checkout(given[0])
    elif kind == "ask":  # a hit is counted, and the counts are kept when the directory is left
        grace.model(inputs_embeds=torch.tensor([[given[0]]]))
    else:
        raise ValueError(f"no operation is called {kind}")


def state(grace: gf.editor.Grace) -> str:
    """Return a checksum of everything a codebook and its history hold."""
    book, history = grace.codebook.snapshot(), grace._history
    edits = [
        [
            each.tolist() if isinstance(each, torch.Tensor) else repr(each)
            for each in vars(one).values()
        ]
        for one in history.edits.values()
    ]
    whole = [
        book.version,
        len(book),
        book.keys.tolist(),
        book.values.tolist(),
        book.key_slots[: book.counts.keys].tolist(),
        book.value_slots[: book.counts.values].tolist(),
        [book.column(name).tolist() for name in COLUMNS],
        book.ids.tolist(),
        [
            None if each is None else each.tolist()
            for each in book.label_slots.between(0, book.counts.labels)
        ],
        edits,
        [(row, repr(_life(history, row))) for row in sorted(history.rows)],
        history.next_id,
    ]
    return hashlib.sha256(repr(whole).encode()).hexdigest()


def _life(history: History, row: int) -> dict[str, Any]:
    """Return what is known of a row; a neighbour that is gone is none, as it is once read again."""
    life = vars(history.rows[row])
    return life | {"neighbour": life["neighbour"] if life["neighbour"] in history.rows else -1}


def states(run: Sequence[Operation], folder: Path) -> list[str]:
    """Return the state before and after every step of a run in which nothing goes wrong."""
    grace = attach(folder)
    found = [state(grace)]
    for operation in run:
        do(grace, operation)
        found.append(state(grace))
    grace.unload()
    return found


def reopened(folder: Path) -> str:
    """Return the state that a new process finds, which edits on from there."""
    grace = attach(folder)
    found = state(grace)
    assert grace.verify().ok
    grace.unload()
    return found


# In the process that is broken


def say(*words: object) -> None:
    """Tell the test one line, at once."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def perform(request: dict[str, Any]) -> None:
    """Make a run with a fault in it, and acknowledge each step once it was made.

    After a step that was refused the next one is tried: what the codebook says is what counts.
    Steps are counted from `first`; file_bytes and pages are limits that are not the shim's.
    """
    shim.watch(request["folder"])
    shim.log_to(request.get("log"))
    if "file_bytes" in request:
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], usual[1]))
    shim.fail(**request.get("fault", NOTHING))
    try:
        grace = attach(request["folder"])
    except (OSError, gf.CodebookCorrupt) as error:
        say("refused", "attach", type(error).__name__, json.dumps(str(error)))
        shim.fail(**NOTHING)
        if "file_bytes" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        grace = attach(request["folder"])  # nothing of the first try is in the way of a second
    published = state(grace)
    for number, operation in enumerate(request["run"], start=request.get("first", 1)):
        if "pages" in request:  # of whichever journal there is now
            grace._store.journal._file.execute(f"PRAGMA max_page_count={request['pages']}")
        try:
            do(grace, operation)
        except (OSError, KeyError) as error:
            if state(grace) != published:
                say("changed", number)
            say("refused", number, type(error).__name__, json.dumps(str(error)))
            continue
        shim.mark(number)
        published = state(grace)
        say("done", number, published)
    grace.unload()
    say("calls", shim.calls())
    say("end", published)


def warm_up() -> None:
    """Make a run with everything in it, so that no fork has to import or build anything."""
    with tempfile.TemporaryDirectory() as folder:
        grace = attach(folder)
        for operation in operations(5, every=5):
            do(grace, operation)
        state(grace)
        grace.unload()


def serve(act: Callable[[dict[str, Any]], None] = perform) -> None:
    """Answer requests, one line each: what `act` says in a fork, then how the fork ended."""
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                act(json.loads(line))
            except BaseException as error:
                say("raised", type(error).__name__, json.dumps(str(error)))
            finally:
                os._exit(0)
        say("process", child)
        _, status = os.waitpid(child, 0)
        say("status", status)


if __name__ == "__main__":
    serve()
