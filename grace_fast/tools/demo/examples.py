"""What the edits do to single inputs: an edited text, a rewording of it, and an unrelated text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import grace_fast as gf
from grace_fast.tools.demo import data
from grace_fast.tools.demo.data import MODULES, Docstring
from grace_fast.tools.demo.model import batch_of, logits_of
from grace_fast.tools.demo.prepare import Encoder


@dataclass(frozen=True)
class Example:
    """One input before and after all edits."""

    what: str
    text: str
    wanted: str
    before: str
    after: str
    bit_for_bit: bool  # the logits did not change


@dataclass(frozen=True)
class Generality:
    """What the edits do to rewordings of the edited texts that were wrong before."""

    wrong_before: int
    right_after: float  # the share of them
    shown: list[Example]  # the first rewording that is repaired, after the edit that repairs it


@torch.no_grad()
def example(grace: gf.Grace, what: str, doc: Docstring, encode: Encoder) -> Example:
    """Ask the model about one text, without the edits and with them."""
    batch = batch_of(encode([doc.text]))
    after = grace.model(**batch).logits[0]
    with grace.disable_adapter():
        before = grace.model(**batch).logits[0]
    return Example(
        what=what,
        text=doc.text,
        wanted=MODULES[doc.label],
        before=MODULES[int(before.argmax())],
        after=MODULES[int(after.argmax())],
        bit_for_bit=torch.equal(before, after),
    )


def generality(grace: gf.Grace, mistakes: Sequence[Docstring], encode: Encoder) -> Generality:
    """Reword every edited text, and count the answers that were wrong and are right."""
    reworded = data.rewordings(mistakes, encode)
    tokens = encode([one.text for one in reworded])
    labels = torch.tensor([mistakes[one.of].label for one in reworded])
    with grace.disable_adapter():
        wrong = logits_of(grace.model, tokens).argmax(dim=1) != labels
    repaired = wrong & (logits_of(grace.model, tokens).argmax(dim=1) == labels)
    if not repaired.any():
        shown = [example(grace, "edited", mistakes[0], encode)]
        return Generality(int(wrong.sum()), 0.0, shown)
    first = reworded[int(repaired.int().argmax())]
    edited = mistakes[first.of]
    shown = [
        example(grace, "edited", edited, encode),
        example(grace, first.how, Docstring(first.text, edited.label), encode),
    ]
    return Generality(int(wrong.sum()), float(repaired.sum() / wrong.sum()), shown)
