"""The one course of every benchmark: options, figures checked before they are timed, two files.

A program names its options, what it measures, how that reads and which exit code it earns. The
machine and its commit are taken down before the first line of it runs. `<name>-<machine>-<date>`
is written as JSON and as a page after each part of the figures, so that what broke off is there.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"
Found = dict[str, Any]  # machine, command and date; then the program's own figures


@dataclass(frozen=True)
class Program:
    """A benchmark."""

    name: str  # of its files
    doc: str  # the first line of which is its help
    options: Callable[[ArgumentParser], Any]
    measure: Callable[[Namespace], Iterator[Found]]  # figures, each more complete than the last
    page: Callable[[Found], str]
    verdict: Callable[[Found], int]  # 1: something was wrong, so no speed counts
    results: Path | None = None  # where they go unless it is said; None: nowhere
    threads: int | None = 1  # where there is no option --threads; None: as many as torch has
    more: Callable[[Namespace], str] = lambda given: ""  # of the files' names
    module: str = ""  # by default after the name

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command; return its exit code."""
        parser = ArgumentParser(description=self.doc.splitlines()[0])
        self.options(parser)
        parser.add_argument("--json", dest="as_json", action="store_true", help="and no page")
        parser.add_argument("--out", type=Path, default=self.results, help="folder of the results")
        given = parser.parse_args(arguments)
        threads = getattr(given, "threads", self.threads) or torch.get_num_threads()
        torch.set_num_threads(threads)
        module = self.module or self.name.replace("-", "_")
        head = machine.heading(machine.describe(threads), f"benchmarks.{module}", arguments)
        found = head
        for figures in self.measure(given):
            found = head | figures
            if given.out:
                machine.keep(given.out, self.name, found, self.page(found), self.more(given))
        print(json.dumps(found) if given.as_json else self.page(found), end="")
        return self.verdict(found)


def table(heads: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown: a column of names, then numbers."""
    lines = [" | ".join(heads), " | ".join(["---", *["---:"] * (len(heads) - 1)])]
    return "\n".join(f"| {line} |" for line in [*lines, *map(" | ".join, rows)])


def where(found: Found) -> str:
    """Return the command, the day and the machine in words."""
    told = found["machine"]
    names = ", ".join(f"{name} {version}" for name, version in told.get("packages", {}).items())
    return (
        f"`{found['command']}` on {found['date']}: {told['cpu']}, {told.get('threads', 1)} of "
        f"{told['cores']} cores, commit {told['commit'] or 'unknown'}, Python {told['python']}"
        + (f", {names}" if names else "")
    )
