"""Output of commands: lines, tables, JSON, progress, with nothing of a stored text carried out.

Every text goes through `shown` on its way. Rich and tqdm draw where they are installed and a
terminal is there to draw on; without them, and into files and pipes, it is plain text.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import traceback
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from grace_fast.codebook import printable

GAP = "  "  # between the columns of a plain table
_MOST_DRAWN = 1 << 18  # characters of a table: Rich takes 4 s to fold a million


def say(text: Any, err: bool = False) -> None:
    """Print one line."""
    stream = sys.stderr if err else sys.stdout
    print(printable.fit(text, stream), file=stream, flush=True)


def say_json(figures: Mapping[str, Any]) -> None:
    """Print one JSON object: in ASCII, and null for a number that JSON does not know."""
    print(json.dumps(plain(figures), allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """Return figures as JSON knows them: numbers of numpy and torch as Python's, NaN as null."""
    if isinstance(value, np.generic | Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    title: str = "",
    right: Collection[str] = (),
) -> None:
    """Print a table of texts; right: the columns of numbers, which stand at their right ends."""
    stream = sys.stdout
    cells = [[printable.fit(cell, stream) for cell in row] for row in rows]
    is_right = [name in right for name in columns]
    is_short = sum(len(cell) for row in cells for cell in row) <= _MOST_DRAWN
    if not (is_short and stream.isatty() and _drawn(columns, cells, title, is_right)):
        for line in (*[title] * bool(title), *lines_of([list(columns), *cells], is_right)):
            print(line, file=stream)
    stream.flush()


def _drawn(
    columns: Sequence[str], cells: Sequence[Sequence[str]], title: str, is_right: Sequence[bool]
) -> bool:
    """Draw a table by Rich; tell whether it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    made = Table(title=Text(title) if title else None, title_justify="left")
    for name, right in zip(columns, is_right, strict=True):
        made.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in cells:
        made.add_row(*map(Text, row))
    Console(file=sys.stdout, highlight=False, markup=False, emoji=False).print(made)
    return True


def lines_of(cells: Sequence[Sequence[str]], is_right: Sequence[bool]) -> Iterator[str]:
    """Yield the lines of a plain table, every column as wide as its widest cell but the last."""
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = []
        for cell, width, right in zip(row, widths, is_right, strict=True):
            gap = " " * (width - _width(cell))
            padded.append(gap + cell if right else cell + gap)
        yield GAP.join(padded).rstrip()


@dataclass(frozen=True)
class Screen:
    """Paragraphs and tables on standard output; nothing where the caller prints JSON."""

    silent: bool = False

    def say(self, words: str) -> None:
        """Print a paragraph."""
        if not self.silent:
            say(words)
            say("")

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        left: Collection[str] = (),
    ) -> None:
        """Print a table of numbers; left: the columns of texts."""
        if not self.silent:
            table(columns, rows, title, set(columns).difference(left))
            say("")


def _width(text: str) -> int:
    """Return the columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(one) in "WF" for one in text)
    return len(text) + wide - sum(bool(unicodedata.combining(one)) for one in text)


def bar(name: str, total: int, progress: bool, done: int = 0) -> Any:
    """Return a progress bar on standard error by tqdm, off where that is not a terminal."""
    from tqdm import tqdm

    desc, disable = printable.fit(name, sys.stderr), None if progress else True
    return tqdm(desc=desc, total=total, initial=done, disable=disable, leave=False)


# Always a rate, never seconds for one: "412/1000 [00:31<00:44, 13.3 edits/s]".
_RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


def rate_bar(name: str, total: int, done: int, unit: str) -> Any:
    """Return a progress bar of work that goes on, with its rate and the time that is left.

    done: what was done before it began, which counts for neither. What comes in batches is drawn as
    it comes, and the rate is that of all until now.
    """
    from tqdm import tqdm

    how: dict[str, Any] = {"smoothing": 0, "mininterval": 0, "miniters": 1, "bar_format": _RATE}
    desc = printable.fit(name, sys.stderr)
    return tqdm(desc=desc, total=total, initial=done, disable=None, unit=f" {unit}", **how)


class _ShownRecord(logging.LogRecord):
    """A log record whose message may quote what was stored."""

    def getMessage(self) -> str:
        return printable.spelt(super().getMessage(), keep="\n\t")


def guard() -> None:
    """Let no warning, log line or traceback of this process carry anything out on a terminal.

    For a process of our own: it changes what all of Python's messages look like.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what others print: spelt out rather than refused
            stream.reconfigure(errors="backslashreplace")
    as_usual = warnings.formatwarning

    def formatted(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        text = as_usual(printable.spelt(message), category, filename, lineno, line)
        return printable.spelt(text, keep="\n\t")

    def uncaught(
        kind: type[BaseException], error: BaseException, where: TracebackType | None
    ) -> None:
        lines = "".join(traceback.format_exception(kind, error, where))
        sys.stderr.write(printable.fit(lines, sys.stderr, keep="\n\t"))

    def uncaught_in_thread(told: threading.ExceptHookArgs) -> None:
        if told.exc_type is not SystemExit:
            error = told.exc_value or told.exc_type()
            say(f"in thread {getattr(told.thread, 'name', None)!r}:", err=True)
            uncaught(told.exc_type, error, told.exc_traceback)

    warnings.formatwarning = formatted
    threading.excepthook = uncaught_in_thread
    logging.setLogRecordFactory(_ShownRecord)
    sys.excepthook = uncaught
