"""The stream: every edit in order, and at regular steps everything that it should have kept.

ES    an edit is answered right straight after it was made
ERR   each prompt edited so far is answered as its newest edit says; edits that a later one of the
      same prompt replaced are counted apart, as superseded
TRR   unrelated inputs are answered right; `locality`: they are answered as before any edit
ARR   true answers of the kind that is edited are still given
generality   phrasings that were never edited get the newest answer

Means of a score from 0 to 1, or of perplexities where that is the metric of the task. The stream
goes on where it was interrupted: at every save the codebook is on disk first, then the line of
`stream.json` that names it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from grace_fast.store import atomic, strict_json
from grace_fast.tools.evaluate import answering
from grace_fast.tools.evaluate.editors import GraceEditor
from grace_fast.tools.evaluate.metrics import mean
from grace_fast.tools.evaluate.task import Answer, Case, Task

SAVE_EVERY = 50  # edits
STATE = "stream.json"
_NAME = re.compile(r"codebook-[0-9]{6,19}")
_MOST_BYTES = 1 << 26  # of a checkpoint: a million edits are some 30 MB
_ODD = "is not the checkpoint of an evaluation; remove it, or start anew"


class Editor(Protocol):
    """What the stream drives: GRACE, or a baseline."""

    @property
    def keys(self) -> int:
        """Rows in the codebook, 0 without one."""

    def edit(self, case: Case) -> bool:
        """Edit, and tell whether the answer was reached while training."""

    def lookups_per_second(self, cases: Sequence[Case]) -> float:
        """Time look-ups of these prompts, one at a time; NaN without a codebook."""


@dataclass(frozen=True)
class Point:
    """What was measured after so many edits."""

    edits: int
    keys: int
    superseded: int  # edits whose prompt was edited again
    not_learnt: int  # edits whose training did not reach the answer
    ES: float
    ERR: float
    TRR: float
    ARR: float  # NaN where the task has none
    generality: float
    locality: float
    edits_per_key: float
    edit_seconds: float  # median since the last point
    lookups_per_second: float
    perplexity: dict[str, float] = field(default_factory=dict)  # of decoders: ERR, TRR, ARR


@dataclass
class Progress:
    """What is known of a stream, and all that resuming needs beside the codebook."""

    recipe: str  # checksum of task and settings: another run's state is not taken
    done: int = 0
    success: list[float] = field(default_factory=list)  # ES of each edit
    not_learnt: list[int] = field(default_factory=list)  # places in the stream
    seconds: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)  # TRR and ARR before any edit
    codebook: str = ""  # folder beside this file

    def write(self, folder: Path) -> None:
        """Put the state in the place of the one before, in one step."""
        put(folder / STATE, asdict(self))

    @classmethod
    def read(cls, folder: Path, recipe: str) -> Progress | None:
        """Return the state of an interrupted run; None where there is none of this recipe."""
        if not (folder / STATE).exists():
            return None
        fields = checkpoint(folder / STATE)
        if fields.get("recipe") != recipe:
            return None
        try:
            fields["points"] = [Point(**point) for point in fields["points"]]
            progress = cls(**fields)
            is_beside = progress.codebook == "" or _NAME.fullmatch(progress.codebook)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / STATE} {_ODD}: {error!r}") from error
        if not is_beside:  # it is read, and removed once there is a later one
            raise ValueError(f"{folder / STATE} {_ODD}: no codebook beside it is named")
        return progress


def run(
    editor: Editor,
    task: Task,
    every: int,
    progress: Progress,
    keep: Callable[[Progress], None] | None,
    bar: Any,
) -> Progress:
    """Make the edits that are left, measure every so many and at the end, and return the progress.

    keep: called with the progress whenever it should be on disk; None: it is not kept.
    """
    before = _unedited(editor, task)
    if not progress.done:
        progress.before = {
            "TRR": mean(answering.scores(task, task.unrelated, before)),
            "ARR": mean(answering.scores(task, task.accurate)),
        }
    for at in range(progress.done, len(task.edits)):
        case = task.edits[at]
        start = time.perf_counter()
        learnt = editor.edit(case)
        progress.seconds.append(time.perf_counter() - start)
        if not learnt:
            progress.not_learnt.append(at)
        progress.success.extend(answering.scores(task, [case]))
        progress.done = at + 1
        bar.update()
        measured = progress.done % every == 0 or progress.done == len(task.edits)
        if measured:
            point = measure(editor, task, progress, before)
            progress.points.append(point)
            bar.set_postfix(keys=point.keys, ERR=f"{point.ERR:.3f}", TRR=f"{point.TRR:.3f}")
        if keep is not None and (measured or progress.done % SAVE_EVERY == 0):
            keep(progress)
    return progress


def _unedited(editor: Editor, task: Task) -> list[Answer]:
    with getattr(editor, "standing_aside", nullcontext)():
        return _unrelated(task)


def _unrelated(task: Task) -> list[Answer]:
    """Return the answers to unrelated inputs, none where they are not compared."""
    return [] if task.metric == "perplexity" else answering.answers(task, task.unrelated)


def measure(editor: Editor, task: Task, progress: Progress, before: Sequence[Answer]) -> Point:
    """Ask everything again, after the edits made so far."""
    past = task.edits[: progress.done]
    kept = list({case.prompt: case for case in past}.values())  # the newest of every prompt
    now = {case.about: case.answer for case in past}
    reworded = [
        Case(case.prompt, now[case.about], case.about)
        for case in task.held_out
        if case.about in now
    ]
    since = progress.points[-1].edits if progress.points else 0
    keys = editor.keys
    unrelated = _unrelated(task)
    perplexity = {}
    if task.perplexity:
        groups = {"ERR": kept, "TRR": task.unrelated, "ARR": task.accurate}
        perplexity = {
            name: mean(answering.perplexities(task, cases)) for name, cases in groups.items()
        }
    return Point(
        edits=progress.done,
        keys=keys,
        superseded=len(past) - len(kept),
        not_learnt=len(progress.not_learnt),
        ES=mean(progress.success),
        ERR=mean(answering.scores(task, kept)),
        TRR=mean(answering.scores(task, task.unrelated, unrelated)),
        ARR=mean(answering.scores(task, task.accurate)),
        generality=mean(answering.scores(task, reworded)),
        locality=mean([float(one == two) for one, two in zip(unrelated, before, strict=True)]),
        edits_per_key=progress.done / keys if keys else math.nan,
        edit_seconds=median(progress.seconds[since:] or [math.nan]),
        lookups_per_second=editor.lookups_per_second(task.unrelated),
        perplexity=perplexity,
    )


def final(editor: Editor, task: Task, bar: Any) -> Point:
    """Make every edit and measure at the end alone, without asking for each one's success."""
    before = _unedited(editor, task)
    progress = Progress("")
    for at, case in enumerate(task.edits):
        if not editor.edit(case):
            progress.not_learnt.append(at)
        bar.update()
    progress.done = len(task.edits)
    return measure(editor, task, progress, before)


def save(editor: GraceEditor, folder: Path, progress: Progress) -> None:
    """Put codebook and progress on disk, and drop the codebook of the save before."""
    old = progress.codebook
    name = f"codebook-{progress.done:06d}"
    if (folder / name).is_symlink():
        raise ValueError(f"{folder / name} is a link; remove it")
    editor.grace.save_pretrained(folder / name)
    progress.codebook = name
    progress.write(folder)
    if old and old != name:
        shutil.rmtree(folder / old, ignore_errors=True)


def put(path: Path, fields: dict[str, Any]) -> None:
    """Put fields as JSON in the place of those before, in one step."""
    atomic.replace(path, f"{json.dumps(fields)}\n".encode())


def checkpoint(path: Path) -> dict[str, Any]:
    """Return the fields of such a file, of which no more is taken into memory than one holds.

    Raises: ValueError for what is none, OSError where it cannot be read.
    """
    try:
        fields = strict_json.read(path, _MOST_BYTES, depth=8, constants=True)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {_ODD}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} {_ODD}: it must hold an object")
    return fields


def digest(decisions: Sequence[Any]) -> str:
    """Return a checksum of every decision of a stream, exact to the last bit."""
    return hashlib.sha256(json.dumps(list(decisions)).encode()).hexdigest()


def weights_checksum(model: torch.nn.Module) -> str:
    """Return a checksum of a model's weights."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
