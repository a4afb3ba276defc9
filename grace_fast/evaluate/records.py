"""Records of a data file: JSON lines or CSV, every field checked, every error with its line."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grace_fast.store import headers

# What is wrong with a field, in words; None where it is right.
Check = Callable[[Any], str | None]


def text(value: Any) -> str | None:
    """Want a text that is not empty."""
    if isinstance(value, str) and value.strip():
        return None
    return f"must be a text that is not empty, got {value!r}"


def texts(value: Any) -> str | None:
    """Want a list of texts, none of them empty."""
    if isinstance(value, list) and value and all(text(one) is None for one in value):
        return None
    return f"must be a list of texts, none of them empty, got {_short(value)}"


def answers(value: Any) -> str | None:
    """Want a text, or a list of texts."""
    return texts(value) if isinstance(value, list) else text(value)


def output(value: Any) -> str | None:
    """Want zsRE's list of objects with an answer, the first of them not empty."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and text(first.get("answer")) is None:
        return None
    return f'must be [{{"answer": TEXT}}] with an answer that is not empty, got {_short(value)}'


def label(value: Any) -> str | None:
    """Want a class: a whole number from 0."""
    number = int(value) if isinstance(value, str) and value.isdigit() else value
    if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
        return None
    return f"must be a class, a whole number from 0, got {value!r}"


def verdicts(value: Any) -> str | None:
    """Want one verdict a sentence, as SelfCheckGPT's annotators gave them."""
    known = {"accurate", "minor_inaccurate", "major_inaccurate"}
    if isinstance(value, list) and value and set(map(str, value)) <= known:
        return None
    return f"must be a list of {sorted(known)}, got {_short(value)}"


def read(path: Path, fields: Mapping[str, Check]) -> list[dict[str, Any]]:
    """Return the records of a file, `.jsonl` or `.csv`, once every field of each is right.

    Raises: ValueError naming the line and the field, or for a file without records.
    """
    records = []
    for number, record in _csv(path) if path.suffix == ".csv" else _json_lines(path):
        for name, check in fields.items():
            if name not in record:
                raise ValueError(
                    f"{path}, line {number}: the field {name!r} is missing; a record has "
                    f"{sorted(fields)}, this one {sorted(record)}"
                )
            wrong = check(record[name])
            if wrong is not None:
                raise ValueError(f"{path}, line {number}: {name!r} {wrong}")
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _told(path), path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = headers.parse_line(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} must be an object, got {_short(record)}")
            yield number, record


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _told(path), path.open(encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        for record in reader:
            # A short line has None for what it lacks, a long one its rest under None.
            yield (
                reader.line_num,
                {name: value for name, value in record.items() if name and value is not None},
            )


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say of which file it is that a line cannot be read."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not {path.suffix} in UTF-8: {error}") from error


def _short(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 80 else written[:77] + "..."
