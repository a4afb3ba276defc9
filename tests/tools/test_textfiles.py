"""Files of records as people write them, and what is wrong in one told by its place."""

from __future__ import annotations

import csv
import json

import pytest

from grace_fast.tools import textfiles

RECORDS = [{"prompt": "a", "target": "b"}, {"prompt": "法国的首都是", "target": "巴\u2028黎"}]
LINES = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in RECORDS)
TABLE = "prompt,target\na,b\n法国的首都是,巴\u2028黎\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"], ids=ascii)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.jsonl", LINES),
        ("x.jsonl", "\n" + LINES.replace("\n", "\n\n \n")),
        ("x.jsonl", LINES.rstrip("\n")),
        ("x.json", json.dumps(RECORDS)),
        ("x.json", json.dumps(RECORDS, indent=2, ensure_ascii=False) + "\n\n"),
        ("x.jsonl", "\n".join(json.dumps(one, indent=1) for one in RECORDS)),
        ("x.csv", TABLE),
        ("x.CSV", TABLE + "\n\n"),
        ("x.csv", TABLE.replace(",", ";")),
        ("x.csv", "sep=;\n" + TABLE.replace(",", ";")),
        ("x.tsv", TABLE.replace(",", "\t")),
    ],
    ids=range(11),
)
def test_a_file_holds_the_same_records_however_it_was_saved(tmp_path, name, text, ends, encoding):
    path = tmp_path / name
    path.write_bytes(text.replace("\n", ends).encode(encoding))
    found = textfiles.read(path)
    assert found == RECORDS
    assert not any(record.wrong for record in found)


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("x.jsonl", b'{"a": 1}\n{\n{"a": 2}', {"line 2": "is not JSON"}),
        ("x.jsonl", b'{"a": 1}\n\n[1]\nnull\n"\xff"', {"line 3": "must be an object, got [1]"}),
        ("x.jsonl", b'{"a": "\xff"}\n{"a": 1}', {"line 1": "is not UTF-8"}),
        ("x.jsonl", b'{"a": ' + b"[" * 100_000, {"line 1": "is not JSON"}),
        ("x.jsonl", b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}", {"line 2": "is not JSON"}),
        ("x.json", b'[{"a": 1},\n\n3, {"a": 2}]', {"record 2 (line 3)": "must be an object, got"}),
        ("x.json", b'[{"a": 1},\n{"a": 2', {"record 2 (line 2)": "nothing after it was read"}),
        ("x.json", b'[{"a": 1}\n{"a": 2}]', {"record 1 (line 1)": "no comma or ]"}),
        ("x.csv", b"a,b\n1,\xff\n2,3\n", {"line 2": "is not UTF-8"}),
        ("x.jsonl", b'{"a": "\xff"}\n{"a": 1}\n{\n{"a": 2}', {"line 1": "UTF-8", "line 3": "JSON"}),
        ("x.jsonl", b'{"a": 1}, # one\n{"a": 1}\n{"a": 2}', {"line 1": "is not JSON: Extra"}),
        ("x.csv", b'a,b\n1,2\n"1,2\n3,4\n', {"line 3": "opens a quote that nothing closes"}),
    ],
    ids=range(12),
)
def test_what_is_wrong_is_told_by_its_place_and_the_rest_is_read(tmp_path, name, content, wrong):
    (tmp_path / name).write_bytes(content)
    odd = {one.place: one.wrong for one in textfiles.read(tmp_path / name) if one.wrong}
    for place, why in wrong.items():
        assert why in odd[place]
    good = [one for one in textfiles.read(tmp_path / name) if not one.wrong]
    assert all(set(one) <= {"a", "b"} for one in good)
    assert good or len(odd) == 1


def test_an_empty_file_holds_nothing_and_a_torn_one_is_refused(tmp_path):
    for name in ("x.jsonl", "x.json", "x.csv"):
        for content in (b"", b"\xef\xbb\xbf", b"\n \r\n", b"[]"):
            if name != "x.csv" or not content.strip():
                (tmp_path / name).write_bytes(content)
                assert textfiles.read(tmp_path / name) == []
    (tmp_path / "x.jsonl").write_bytes(LINES.encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"x.jsonl is not .jsonl in UTF-16"):
        textfiles.read(tmp_path / "x.jsonl")


def test_an_array_of_many_records_is_read_in_one_pass(tmp_path):
    many = [{"a": at} for at in range(20_000)]
    (tmp_path / "x.json").write_text(json.dumps(many, indent=0))
    assert textfiles.read(tmp_path / "x.json") == many


@pytest.mark.parametrize("line", range(3))
def test_one_bad_line_takes_no_other_along_wherever_it_stands(tmp_path, line):
    for bad in ("{", '{"a": 1},', "// of our own", '{"a": "\x00"}'):
        lines = [json.dumps({"a": at}) for at in range(2)]
        lines.insert(line, bad)
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        found = textfiles.read(tmp_path / "x.jsonl")
        assert [one.place for one in found if one.wrong] == [f"line {line + 1}"], bad
        assert [one for one in found if not one.wrong] == [{"a": 0}, {"a": 1}]


def test_files_put_together_and_tables_of_long_texts_are_read(tmp_path):
    (tmp_path / "x.jsonl").write_text('\ufeff{"a": 1}\n\ufeff{"a": 2}\n', encoding="utf-8")
    assert textfiles.read(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]
    usual = csv.field_size_limit()
    (tmp_path / "x.csv").write_text(f'a , b\n{"x" * 200_000},"1\n2"\n3,4\n')
    found = textfiles.read(tmp_path / "x.csv")
    assert found == [{"a": "x" * 200_000, "b": "1\n2"}, {"a": "3", "b": "4"}]
    assert [one.place for one in found] == ["line 2", "line 4"]
    assert csv.field_size_limit() == usual


@pytest.mark.parametrize("count", [100, 1000])
def test_every_line_of_a_table_full_of_open_quotes_is_read_a_few_times(
    tmp_path, monkeypatch, count
):
    """Each of these lines opens a quote that takes in all lines after it."""
    read, reader = [], csv.reader

    def counted(lines, **how):
        return reader((read.append(line) or line for line in lines), **how)

    monkeypatch.setattr(textfiles.csv, "reader", counted)
    (tmp_path / "x.csv").write_text("a,b\n" + 'x"y,"z\n' * count + '"\n')
    found = textfiles.read(tmp_path / "x.csv")
    assert [one.place for one in found if one.wrong] == [f"line {at + 2}" for at in range(count)]
    assert len(read) <= 4 * count


TEXTS = {
    "a text a line": ("t.txt", "one\n\n two\r\nthree", ["one", " two", "three"]),
    "lines that are nearly JSON": ("t.txt", '{"prompt": "a"', ['{"prompt": "a"']),
    "brackets are text": ("t", "[INST] one\n[1]", ["[INST] one", "[1]"]),
    "JSON lines by the first of them": ("t", '\n{"prompt": "a"}\n{"text": "b"}', ["a", "b"]),
    "JSON lines by the name": ("t.jsonl", '{"text": "a"}', ["a"]),
    "one array": ("t.json", '[{"prompt": "a"},\n{"prompt": "b"}]', ["a", "b"]),
    "a table": ("t.csv", "prompt,x\na,1\nb,2\n", ["a", "b"]),
    "a mark at the begin": ("t.txt", "\ufeffone\ntwo", ["one", "two"]),
    "other line ends are text": ("t.txt", "one\u2028still one", ["one\u2028still one"]),
}


@pytest.mark.parametrize(("name", "content", "wanted"), TEXTS.values(), ids=TEXTS.keys())
def test_texts_are_read_from_any_file(tmp_path, name, content, wanted):
    (tmp_path / name).write_text(content, newline="")
    found = textfiles.texts(tmp_path / name)
    assert [record["prompt"] for record in found] == wanted
    assert not any(record.wrong for record in found)


def test_a_text_that_is_none_is_told_by_its_line(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n{"text": " "}\n{"x": 1}\n{')
    told = [(record.place, record.wrong) for record in textfiles.texts(tmp_path / "t.jsonl")]
    assert told[0] == ("line 1", "")
    assert told[1] == ("line 2", "must have a text as its prompt, got 3")
    assert told[2] == ("line 3", "must have a text as its prompt, got ' '")
    assert told[3] == ("line 4", "must have a text as its prompt, got None")
    assert told[4][1].startswith("is not JSON")
    (tmp_path / "t.txt").write_bytes(b"one\n\xff\n")
    assert [record.wrong for record in textfiles.texts(tmp_path / "t.txt")] == ["", "is not UTF-8"]
