"""Run of a file of edits into a directory: which are there already, the others made, the account.

A run is resumed by what the directory itself holds, so nothing can be done twice or lost: each edit
there is matched with one of the file by the tokens of its prompt and its answer.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grace_fast as gf
from grace_fast.codebook.printable import listed
from grace_fast.editor import batches, memory, signatures
from grace_fast.editor.signatures import Signature
from grace_fast.edits.edit import Edit
from grace_fast.edits.verify import Verification
from grace_fast.semantics import Semantics
from grace_fast.store.saved import read_newest
from grace_fast.tools.cli.command import FAILED, INTERRUPTED, typer
from grace_fast.tools.cli.looking import edit_table
from grace_fast.tools.terminal import rate_bar, say, say_json
from grace_fast.tools.textfiles import Record

BatchSize = int | Literal["auto"]


def _prompt(item: Mapping[str, Any]) -> Any:
    return item["messages"] if "messages" in item else item["prompt"]


@dataclass
class Item:
    """One edit that a file asks for."""

    place: str  # "line 3", "line 3, paraphrase 1"
    given: dict[str, Any]  # prompt or messages, target, perhaps joint
    signature: Signature | None = None
    edit: Edit | None = None  # once it is made
    is_new: bool = False  # it was made by this run
    wrong: str = ""  # once it is refused


def items_of(records: Sequence[Record]) -> list[Item]:
    """Return the edits that records ask for: of each its prompt, then its paraphrases."""
    found = list[Item]()
    for record in records:
        given = {name: value for name, value in record.items() if name != "paraphrases"}
        found.append(Item(record.place, given))
        given = {name: value for name, value in given.items() if name != "messages"}
        for number, text in enumerate(record.get("paraphrases", ()), start=1):
            found.append(Item(f"{record.place}, paraphrase {number}", {**given, "prompt": text}))
    return found


@dataclass
class Run:
    """A file of edits on its way into a directory, and what came of it until now.

    restarted: it began by forgetting what was there.
    """

    file: Path
    out: Path
    items: list[Item]
    left_out: list[str] = field(default_factory=list)  # places
    refused: list[str] = field(default_factory=list)  # what is wrong with each of those, in words
    restarted: bool = False
    earlier: int | None = None  # edits of the file that were there at its begin; None before it
    others: int = 0  # edits that are there, and of no line of the file
    made: int = 0  # by this run, those that were not reported any more among them
    keys: int = 0
    epsilon: float | None = None
    verification: Verification | None = None
    stopped: str = ""  # why it did not come to the end
    goes_on: str = "the same command goes on"
    interrupted: bool = False

    def refuse(self, item: Item, error: Exception) -> None:
        """Leave an edit out, and say why by its line."""
        # By its kind where the words of the error alone say little.
        is_ours = isinstance(error, ValueError | TypeError)
        why = str(error) if is_ours else f"{type(error).__name__}: {error}"
        item.wrong = f"{self.file}, {item.place}: {why}"
        self.left_out.append(item.place)
        self.refused.append(item.wrong)
        say(f"error: {item.wrong}", err=True)

    def sign(self, grace: gf.Grace, semantics: Semantics) -> None:
        """Find out what each edit will be known by; refuse those that have no tokens or no target.

        grace: on the model, for its tokenizer; semantics: by which edits are decided.
        """
        for item in self.items:
            try:
                batch = batches.from_text(
                    _prompt(item.given),
                    item.given["target"],
                    grace.tokenizer,
                    grace.model,
                    grace.kind,
                    item.given.get("joint"),
                )
                item.signature = signatures.of_batch(batch, grace.model, grace.kind, semantics)
            except ImportError:
                raise
            except Exception as error:  # of the tokenizer, its template or the record
                self.refuse(item, error)

    def make(self, grace: gf.Grace, batch_size: BatchSize, strict: bool) -> None:
        """Make the edits that are not there yet; the directory has each before the next.

        strict: stop at the first that cannot be made.
        """
        before = grace.edits()
        self._find(before)
        self.epsilon = grace.settings.epsilon
        try:
            self._make_rest(grace, batch_size, strict)
            self.verification = grace.verify()
        except (OSError, MemoryError, RuntimeError) as error:  # the next edit could not be, either
            if isinstance(error, RuntimeError) and not memory.has_ended(error):
                raise
            self.stopped = str(error) or type(error).__name__
        finally:
            known = {edit.id for edit in before}
            self.made = sum(edit.id not in known for edit in grace.edits())
            self.keys = grace.counters.keys

    def _find(self, edits: Sequence[Edit]) -> None:
        """Match the edits that are there with those of the file, in the order of both."""
        there = defaultdict[Signature, deque[Edit]](deque)
        for edit in edits:
            there[signatures.of_edit(edit)].append(edit)
        for item in self.items:
            if item.signature is not None and there[item.signature]:
                item.edit = there[item.signature].popleft()
        self.others = sum(map(len, there.values()))
        self.earlier = len(edits) - self.others

    def recount(self) -> None:
        """Count what is there by the directory: the last edits may be in it and never reported."""
        try:
            _, book, history = read_newest(self.out)
        except (OSError, ValueError):
            return  # as far as this run knows
        there = Counter(map(signatures.of_edit, history.edits.values()))
        wanted = Counter(item.signature for item in self.items if item.signature is not None)
        self.made = (there & wanted).total() - (self.earlier or 0)
        self.keys = len(book)

    def _make_rest(self, grace: gf.Grace, batch_size: BatchSize, strict: bool) -> None:
        rest = [item for item in self.items if item.edit is None and not item.wrong]
        reports = grace.edit_many([item.given for item in rest], batch_size, progress=False)
        done = len(self.items) - len(rest)
        with rate_bar("edits", len(self.items), done, "edits") as ticks:
            for item, report in zip(rest, reports, strict=True):
                ticks.update()
                if isinstance(report, Edit):
                    item.edit, item.is_new = report, True
                    continue
                ticks.clear()
                self.refuse(item, report.error)
                if strict:
                    self.stopped = "stopped at the first line that cannot be edited"
                    self.goes_on = "mend it, and the same command goes on"
                    return

    # The account

    @property
    def in_out(self) -> int:
        """How many edits of the file are in the directory."""
        return (self.earlier or 0) + self.made

    def not_learnt(self) -> list[tuple[str, Edit]]:
        """Return the edits that the model does not answer, each with its line.

        One that a later edit answers for was perhaps never trained: it is not asked any more.
        """
        over = {} if self.verification is None else self.verification.superseded
        return [
            (item.place, item.edit)
            for item in self.items
            if item.edit is not None
            and not item.edit.correct
            and not (item.edit.id in over and math.isnan(item.edit.loss))
        ]

    def tell(self, as_json: bool) -> None:
        """Say what was done, and end the command with a code that says whether that was all."""
        wrong = self.not_learnt()
        for place, edit in wrong:
            after = f"loss {edit.loss:.3g} after {edit.steps} steps"
            say(f"not learnt: {self.file}, {place}: edit {edit.id}, {after}", err=True)
        if as_json:
            say_json(self._figures(wrong))
        else:
            if new := [item.edit for item in self.items if item.edit and item.is_new]:
                edit_table(new, {})
            if not self.interrupted and not self.stopped:
                say(self._summary())
        if self.left_out:
            say(f"left out: {listed(self.left_out)} of {self.file}", err=True)
        if wrong:
            numbers = [edit.id for _, edit in wrong]
            say(f"not learnt: edits {numbers}; try more iterations or another layer", err=True)
        if self.interrupted or self.stopped:
            say(self._ending(), err=True)
            raise typer.Exit(INTERRUPTED if self.interrupted else FAILED)
        verified = self.verification is not None and self.verification.ok
        if wrong or self.refused or not verified:
            raise typer.Exit(FAILED)

    def _summary(self) -> str:
        """Say what a run that came to its end left in the directory."""
        said = f"{self.in_out:,} edits on {self.keys:,} keys are in {self.out}"
        if self.earlier:
            said += f", {self.earlier:,} of them from before"
        if self.others:
            said += f"; edits there that {self.file} does not ask for: {self.others:,}"
        return said

    def _ending(self) -> str:
        """Say how far a run came that did not come to its end, and what goes on from there."""
        why = "interrupted" if self.interrupted else f"error: {self.stopped}"
        if self.earlier is None:
            return f"{why}: no edit was made"
        how = self.goes_on
        if self.restarted:
            how = how.replace("the same command", "the same command without --restart")
        return f"{why}: {self.in_out:,} of {len(self.items):,} edits are in {self.out}; {how}"

    def _figures(self, wrong: Sequence[tuple[str, Edit]]) -> dict[str, Any]:
        found = self.verification
        return {
            "edits": None if self.earlier is None else self.in_out,
            "made": self.made,
            "wanted": len(self.items),
            "others": self.others,
            "keys": self.keys,
            "epsilon": self.epsilon,
            "not_learnt": [edit.id for _, edit in wrong],
            "not_learnt_at": [place for place, _ in wrong],
            "refused": self.refused,
            "broken": None if found is None else found.broken,
            "superseded": None if found is None else len(found.superseded),
            "interrupted": self.interrupted,
            "stopped": self.stopped or None,
            "out": self.out,
        }
