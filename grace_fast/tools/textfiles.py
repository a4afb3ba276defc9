"""Files of records as people write them: JSON lines, one JSON array, or CSV, in UTF-8 or UTF-16.

A byte order mark, blank lines, any line ends and any of three delimiters are understood; nothing of
them gets into a field. What cannot be read is one bad record, by its place: those before and after
it are read all the same.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grace_fast.store import strict_json

_DELIMITERS = (",", ";", "\t")
NOT_UTF8 = "is not UTF-8"
UNCLOSED = "opens a quote that nothing closes"
_SHOWN = 80  # characters of a value that is told of
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what a byte that is none is decoded to
_BLANK_LINES = re.compile(r"(?:[ \t]*(?:\r\n|\r|\n))*")
_EXCEL = re.compile(r"sep=(.)[ \t]*(?:\r\n|\r|\n)", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\n]*")


class Record(dict[str, Any]):
    """The fields of one record.

    place: where it stands, "line 3"; wrong: why it is none, "" where it is one.
    """

    def __init__(self, place: str, fields: Any = None, wrong: str = "") -> None:
        super().__init__(fields if isinstance(fields, dict) else {})
        self.place = place
        if not wrong and not isinstance(fields, dict):
            wrong = f"must be an object, got {brief(fields)}"
        self.wrong = wrong


def read(path: Path) -> list[Record]:
    """Return the records of a file, those that are wrong among them.

    A name in `.csv` or `.tsv` says CSV with a head; every other one JSON.

    Raises: OSError where it cannot be read; ValueError where it is no text, or no CSV.
    """
    found = _records(path, _decoded(path))
    if found and all(record.wrong == NOT_UTF8 for record in found):  # Latin-1, GBK, no text at all
        raise ValueError(f"{path} is not {path.suffix} in UTF-8: {found[0].place} {NOT_UTF8}")
    return found


def texts(path: Path) -> list[Record]:
    """Return the texts of a file as the `prompt` of records, those that are wrong among them.

    One a line; or, by the file's name or its first line, records as `read` takes them, each with a
    `prompt` or a `text`.

    Raises: as `read`.
    """
    lines = _decoded(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    first = next((line for line in lines if line.strip()), "")
    is_named = path.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv")
    if not is_named and not (first.lstrip().startswith("{") and _is_whole(first)):
        return [
            Record(f"line {number}", {"prompt": line}, NOT_UTF8 if _NOT_UTF8.search(line) else "")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    found = read(path)
    for record in found:
        text = record.get("prompt", record.get("text"))
        if not record.wrong and not (isinstance(text, str) and text.strip() and is_unicode(text)):
            record.wrong = f"must have a text as its prompt, got {brief(text)}"
        record["prompt"] = text
    return found


def brief(value: Any) -> str:
    """Return a value as Python writes it, cut off where that is long."""
    written = repr(value)
    return written if len(written) <= _SHOWN else written[: _SHOWN - 3] + "..."


def _decoded(path: Path) -> str:
    """Return a file's text; bytes that are no UTF-8 as surrogates."""
    content = path.read_bytes()
    encoding = json.detect_encoding(content[:4])
    is_utf8 = encoding in ("utf-8", "utf-8-sig")
    try:
        text = content.decode(encoding, "surrogateescape" if is_utf8 else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {path.suffix} in {encoding.upper()}: {error}") from error
    return text.removeprefix("\ufeff")


def _records(path: Path, text: str) -> list[Record]:
    if path.suffix.lower() in (".csv", ".tsv"):
        return list(_csv(path, text))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        found = _values(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; write one record a line") from error
    return list(_lines(text)) if found is None else found


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written at all: half of a pair of surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place, line = f"line {number}", line.removeprefix("\ufeff")  # of files put together
        if _NOT_UTF8.search(line):
            yield Record(place, wrong=NOT_UTF8)
            continue
        try:
            yield Record(place, strict_json.parse_line(line))
        except (ValueError, RecursionError) as error:
            yield Record(place, wrong=f"is not JSON: {error}")


def _values(text: str) -> list[Record] | None:
    """Return the objects of one array, or objects over several lines; None of JSON lines.

    Raises: ValueError for more values than a text may have.
    """
    begin = _past_space(text, 0)
    if text.startswith("[", begin):
        strict_json.outline(text.encode("utf-8", "surrogateescape"))
        return _objects(text, begin + 1, is_array=True)
    first = text[begin:].partition("\n")[0]
    if first.startswith("{") and not _is_whole(first):
        strict_json.outline(text.encode("utf-8", "surrogateescape"))
        found = _objects(text, begin, is_array=False)
        if found and any(record.wrong for record in found):  # one bad line, the first
            lines = list(_lines(text))
            return max(lines, found, key=lambda records: sum(not each.wrong for each in records))
        return found
    return None


def _is_whole(line: str) -> bool:
    try:
        strict_json.parse_line(line)
    except (ValueError, RecursionError):
        return False
    return True


def _objects(text: str, at: int, is_array: bool) -> list[Record] | None:
    """Return the values from a place on; None where this is no such file after all."""
    decoder, found = json.JSONDecoder(), list[Record]()
    line, counted = 1, 0
    while True:
        at = _past_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        place = f"record {len(found) + 1} (line {line})"
        if is_array and text.startswith("]", at):
            return found if not text[at + 1 :].strip() else None
        if not is_array and at == len(text):
            return found
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if found:
                wrong = f"is not JSON: {error}; nothing after it was read"
                found.append(Record(place, wrong=wrong))
            return found or None
        is_utf8 = not _NOT_UTF8.search(text, counted, at)
        found.append(Record(place, value, "" if is_utf8 else NOT_UTF8))
        at = _past_space(text, at)
        if is_array and text.startswith(",", at):
            at += 1
        elif is_array and not text.startswith("]", at):
            found.append(Record(place, wrong="has no comma or ] after it; nothing more was read"))
            return found


def _past_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None, "it matches the empty text"
    return space.end()


def _csv(path: Path, text: str) -> Iterator[Record]:
    blank = _BLANK_LINES.match(text)
    assert blank is not None, "it matches the empty text"
    told = _EXCEL.match(text, blank.end())
    body = blank.end() if told is None else told.end()
    skipped, head = len(text[:body].splitlines()), text[body:].splitlines()[:1]
    text, names = text[body:], list[str]()
    if told is not None:
        delimiter = told[1]
    else:
        delimiter = next((one for one in _DELIMITERS if head and one in head[0]), ",")
        delimiter = "\t" if path.suffix.lower() == ".tsv" else delimiter
    for at, row, wrong in _rows(text, delimiter):
        if at == 0 or not names:
            names = [name.strip() for name in row]
            continue
        # A short line lacks fields, a long one's rest has no name.
        fields = {name: value for name, value in zip(names, row, strict=False) if name}
        if not any(value.strip() for value in fields.values()):
            continue  # a blank line, as a table of numbers ends
        odd = any(map(_NOT_UTF8.search, fields.values()))
        yield Record(f"line {at + 1 + skipped}", fields, NOT_UTF8 if odd else wrong)


def _rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Yield every row of a table: the line that it begins in, its cells, and what is wrong.

    A quote that nothing closes would take in all that follows: it ends with its line.
    """
    lines, begin = list(io.StringIO(text, newline="")), 0
    usual = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        reader = csv.reader(lines, delimiter=delimiter)
        for row in reader:
            end = reader.line_num
            is_open = end == len(lines) and end - begin > 1
            if is_open and sum(line.count('"') for line in lines[begin:]) % 2:
                yield from _one_by_one(lines, begin, delimiter)
                return
            yield begin, row, ""
            begin = end
    finally:
        csv.field_size_limit(usual)


def _one_by_one(
    lines: list[str], begin: int, delimiter: str
) -> Iterator[tuple[int, list[str], str]]:
    """Yield the rows from a line on that opens a quote which no line but the last can close.

    So every later one that opens a quote takes in the rest, too, and each line is read once.
    """
    quotes = sum(line.count('"') for line in lines[begin:])
    for at in range(begin, len(lines)):
        reader = csv.reader([lines[at], ""], delimiter=delimiter)
        row = next(reader)
        is_open = reader.line_num > 1 and at + 1 < len(lines)
        if is_open and quotes % 2 == 0:
            yield at, next(csv.reader(lines[at:], delimiter=delimiter)), ""
            return
        yield (at, [lines[at].strip()], UNCLOSED) if is_open else (at, row, "")
        quotes -= lines[at].count('"')
