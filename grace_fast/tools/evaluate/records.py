"""Records of a data file: every field checked, every error with its line. See `textfiles`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from grace_fast.codebook.printable import listed
from grace_fast.tools import textfiles
from grace_fast.tools.textfiles import Record, brief, is_unicode

# What is wrong with a field, in words; None where it is right.
Check = Callable[[Any], str | None]


def text(value: Any) -> str | None:
    """Want a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        return f"must be a text that is not empty, got {value!r}"
    if not is_unicode(value):
        return f"must be Unicode, got half of a pair of surrogates in {brief(value)}"
    return None


def texts(value: Any) -> str | None:
    """Want a list of texts, none of them empty."""
    if isinstance(value, list) and value and all(text(one) is None for one in value):
        return None
    return f"must be a list of texts, none of them empty, got {brief(value)}"


def answers(value: Any) -> str | None:
    """Want a text, or a list of texts."""
    return texts(value) if isinstance(value, list) else text(value)


def first(answer: str | list[str]) -> str:
    """Return the first of several answers."""
    return answer if isinstance(answer, str) else answer[0]


def rewordings(value: Any) -> str | None:
    """Want a list of texts, or none; a text in a cell of CSV is one of them."""
    return None if value in ([], "", None) else answers(value)


def output(value: Any) -> str | None:
    """Want zsRE's list of objects with an answer, the first of them not empty."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and text(first.get("answer")) is None:
        return None
    return f'must be [{{"answer": TEXT}}] with an answer that is not empty, got {brief(value)}'


def label(value: Any) -> str | None:
    """Want a class: a whole number from 0."""
    number = (
        int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 10 else value
    )
    if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
        return None
    return f"must be a class, a whole number from 0, got {value!r}"


def verdicts(value: Any) -> str | None:
    """Want one verdict a sentence, as SelfCheckGPT's annotators gave them."""
    known = {"accurate", "minor_inaccurate", "major_inaccurate"}
    if isinstance(value, list) and value and set(map(str, value)) <= known:
        return None
    return f"must be a list of {sorted(known)}, got {brief(value)}"


def read(
    path: Path,
    fields: Mapping[str, Check],
    refused: list[str] | None = None,
    optional: Collection[str] = (),
) -> list[Record]:
    """Return the records of a file, `.jsonl`, `.json` or `.csv`, once every field is checked.

    refused: takes up what is wrong with a record, which is left out then; without it nothing may
    be wrong; optional: fields that a record may lack.

    Raises: ValueError naming the line and the field, and every other line that is wrong; or for a
    file without records.
    """
    good: list[Record] = []
    bad: list[tuple[Record, str]] = []
    for record in textfiles.read(path):
        wrong = f" {record.wrong}" if record.wrong else _wrong(record, fields, optional)
        if wrong is None:
            good.append(record)
        else:
            bad.append((record, f"{path}, {record.place}{wrong}"))
    if refused is not None:
        refused.extend(wrong for _, wrong in bad)
    elif bad:
        others = listed(record.place for record, _ in bad[1:])
        raise ValueError(bad[0][1] + (f"; also wrong: {others}" if others else ""))
    if not good:
        every = f", all {len(bad)} are wrong: {bad[0][1]}" if bad else ""
        raise ValueError(f"{path} holds no records{every}")
    return good


def _wrong(record: Record, fields: Mapping[str, Check], optional: Collection[str]) -> str | None:
    """Return what is wrong with a record, as it follows its place."""
    for name, check in fields.items():
        if name not in record:
            if name in optional:
                continue
            return (
                f": the field {name!r} is missing; a record has {sorted(fields)}, "
                f"this one {sorted(record)}"
            )
        wrong = check(record[name])
        if wrong is not None:
            return f": {name!r} {wrong}"
    return None
