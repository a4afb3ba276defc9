"""The page of a codebook: it says what is so, hostile text does nothing, a browser shows it."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import browser
import golden_codebooks
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from saved_edits import EPSILON, book_of
from typer.testing import CliRunner

import grace_fast as gf
from grace_fast import semantics
from grace_fast.edits.edit import Edit
from grace_fast.edits.history import History
from grace_fast.edits.settings import Settings
from grace_fast.lookup import lookup
from grace_fast.store.files import CodebookCorrupt
from grace_fast.store.saved import Saved
from grace_fast.tools import report
from grace_fast.tools.cli import app
from grace_fast.tools.report import balls, keymap, neighbours, reading, texts, tradeoff
from grace_fast.tools.report.charts import Scale


class Parsed(HTMLParser):
    """A page taken apart: its text, its tables by caption, every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._caption, self._words = "", [""]
        self.feed(page)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables[self._caption].append([])
        elif tag in ("th", "td"):
            self.tables[self._caption][-1].append("")
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"</{tag}> closes another element"
        if tag == "caption":
            self.tables[self._caption] = []

    def handle_data(self, data):
        if "style" in self._open:
            return
        self._words.append(data)
        if "caption" in self._open:
            self._caption += data
        elif self._open[-1:] and {"th", "td"} & set(self._open):
            row = self.tables[self._caption][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())

    def table(self, caption: str) -> list[dict[str, str]]:
        """Return the rows of the table whose caption begins so, by the names of its columns."""
        (found,) = [rows for name, rows in self.tables.items() if name.startswith(caption)]
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


def page_of(folder: Path) -> Parsed:
    return Parsed(report.render(report.facts(reading.read(folder))))


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A codebook with every outcome in it, an edit taken back, texts and hits."""
    folder = tmp_path_factory.mktemp("edited")
    grace = golden_codebooks.editor()
    for token in (1, 1, 10):
        grace.model(torch.tensor([[token]]))
    grace.save_pretrained(folder)
    return folder, grace


def test_every_edit_is_listed_as_it_is_newest_first(edited):
    folder, grace = edited
    verified = grace.verify()
    expected = [
        {
            "Edit": str(edit.id),
            "Prompt → answer": f"{edit.text[0]} → {edit.text[1]}",
            "Kind": edit.outcome,
            "Its query": f"superseded by {verified.superseded[edit.id]}"
            if edit.id in verified.superseded
            else "fires",
            "Row": str(edit.row),
            "Radius": f"{edit.radius:.3g}",
            "Learnt": "yes" if edit.correct else "no",
            "Hits": str(grace.hits[edit.row]),
        }
        for edit in reversed(grace.edits())
    ]
    listed = page_of(folder).table("The newest first")
    assert [{name: row[name] for name in expected[0]} for row in listed] == expected
    assert {row["Kind"] for row in listed} >= {"added", "split", "expanded", "replaced"}
    assert verified.superseded, "the codebook has an edit for each verdict but broken"


def test_the_head_says_what_an_operator_asks_first(edited):
    folder, grace = edited
    words = page_of(folder).text
    verified = grace.verify()
    assert f"{len(grace.edits())} edits 1 taken back" in words
    assert f"{len(grace.codebook)} keys" in words
    assert f"{len(verified.fires)} edits fire {len(verified.superseded)} superseded" in words
    live = grace.codebook.snapshot().live.nonzero()[:, 0].tolist()
    hits = [grace.hits[row] for row in live]
    hit = sum(count > 0 for count in hits)
    assert f"{sum(hits)} hits on {hit} of {len(live)} keys" in words
    assert "on layer , float32, keys of width 8, values of width 4" in words
    for setting in ("replacement replace_all", "store_text yes", "iterations 0", "epsilon 0.5"):
        assert setting in words, setting
    digest = json.loads((folder / "grace_config.json").read_text())["fingerprint"]["layer weight"]
    assert f"layer weight, sha256 {digest['sha256']}" in words


def test_rows_are_told_by_their_hits(edited):
    folder, grace = edited
    page = page_of(folder)
    live = grace.codebook.snapshot().live.nonzero()[:, 0].tolist()
    most = {int(row["Row"]): int(row["Hits"]) for row in page.table("Hit most often")}
    assert most == {row: grace.hits[row] for row in live if grace.hits[row]}
    assert list(most.values()) == sorted(most.values(), reverse=True)
    never = [int(row["Row"]) for row in page.table("Never hit")]
    assert never == [row for row in live if not grace.hits[row]] != []


def test_a_broken_edit_is_told_first(tmp_path):
    """A key that was removed by hand leaves its edit without an answer."""
    grace = golden_codebooks.editor()
    row = grace.edits()[-1].row
    grace.codebook.remove(int(grace.codebook.ids[row]))
    grace.save_pretrained(tmp_path)
    page = page_of(tmp_path)
    broken = grace.verify().broken
    assert f"{len(broken)} of the edits are broken" in page.text
    listed = {row["Edit"]: row["Its query"] for row in page.table("The newest first")}
    assert [number for number, verdict in listed.items() if verdict == "broken"] == [
        str(number) for number in reversed(broken)
    ]


def test_balls_are_counted_beside_epsilon(tmp_path):
    folder = book_of(
        tmp_path, [[4.0 * at] for at in range(6)], range(6), [0.5, 0.5, 0.25, 1.5, 90.0, -1.0]
    )
    found = balls.radii_of(reading.read(folder))
    assert (found.balls, found.dead, found.wider, found.narrower) == (5, 1, 2, 1)
    assert (found.smallest, found.median, found.largest) == (0.25, 0.5, 90.0)
    shown = [(bar.low <= 0.25 <= bar.high, bar.count) for bar in found.chart.bars]
    assert shown[0] == (True, 2 if found.chart.bars[0].high > 1.5 else 1)
    assert sum(bar.count for bar in found.chart.bars) == 3 - found.off_chart


def test_hits_are_counted_by_doublings(tmp_path, monkeypatch):
    monkeypatch.setattr(balls, "MOST_HIT", 3)
    hits = {0: 1, 1: 2, 2: 3, 3: 4, 4: 7, 5: 8, 7: 1000, 99: 5}
    folder = book_of(tmp_path, [[4.0 * at] for at in range(8)], range(8), hits=hits)
    found = balls.hits_of(reading.read(folder))
    bars = {bar.title: bar.count for bar in found.chart.bars}
    expected = {"0": 1, "1": 1, "2-3": 2, "4-7": 2, "8-15": 1, "512-1023": 1}
    assert bars == {f"{name} hits: {count} rows": count for name, count in expected.items()}
    assert (found.total, found.hit, found.rows) == (1025, 7, 8), "row 99 is none of them"
    assert [(told.row, told.hits) for told in found.most] == [(7, 1000), (5, 8), (4, 7)]
    assert [told.row for told in found.never] == [6]


def test_balls_of_other_answers_that_touch_are_conflicts(tmp_path):
    places = [0.0, 0.9, 10.0, 10.4, 20.0, 21.04, 30.0, 31.1]
    folder = book_of(tmp_path, [[at, 0.0] for at in places], [1, 2, 3, 3, 4, 5, 6, 7])
    found = neighbours.neighbours_of(reading.read(folder))
    assert (found.rows, found.looked_at, found.overlapping, found.nearly) == (8, 8, 2, 2)
    assert [(pair.one.row, pair.other.row) for pair in found.pairs] == [(0, 1), (4, 5)]
    assert [pair.gap for pair in found.pairs] == pytest.approx([-0.1, 0.04], abs=1e-5)
    assert found.closest[:2] == (2, 3)
    assert found.within_epsilon == 2, "rows 2 and 3, of one answer"


def test_a_split_is_told_as_one(tmp_path):
    grace = golden_codebooks.editor()
    grace.save_pretrained(tmp_path)
    read = reading.read(tmp_path)
    splits = {(life.neighbour, row) for row, life in read.history.rows.items()}
    for pair in neighbours.neighbours_of(read).pairs:
        assert pair.is_split == ((pair.one.row, pair.other.row) in splits)
        assert not pair.is_split or pair.gap == pytest.approx(semantics.SPLIT_GAP, rel=1e-2)
    assert any(pair.is_split for pair in neighbours.neighbours_of(read).pairs)


@pytest.mark.parametrize("labelled", [20_000, 0], ids=["all labels", "of the nearest"])
def test_conflicts_are_those_of_every_pair(tmp_path, monkeypatch, labelled):
    monkeypatch.setattr(neighbours, "LABELLED", labelled)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(60, 3, generator=draw) * 0.8
    radii = torch.rand(60, generator=draw) * 0.6 - 0.05
    labels = torch.randint(0, 4, (60,), generator=draw)
    folder = book_of(tmp_path, keys, labels.tolist(), radii.tolist())
    found = neighbours.neighbours_of(reading.read(folder))
    live = radii >= 0
    assert found.rows == int(live.sum()) < 60
    apart = semantics.squared_distances(keys, keys).sqrt().fill_diagonal_(math.inf)
    gaps = apart - radii.double()[:, None] - radii.double()[None, :]
    faces = live[:, None] & live[None, :] & (labels[:, None] != labels[None, :])
    least = gaps.masked_fill(~faces, math.inf).amin(dim=1)
    assert found.overlapping == int((least <= 2 * semantics.SPLIT_GAP).sum()) > 0
    assert found.overlapping + found.nearly == int((least <= 0.1 * EPSILON).sum())
    nearest = apart[live][:, live].amin(dim=1)
    assert found.median == pytest.approx(float(np.median(nearest)))
    assert found.closest[2] == float(nearest.min())
    assert found.pairs[0].gap == pytest.approx(float(least.min()))


@pytest.mark.parametrize("shape", [(50, 6), (6, 50), (5, 1)], ids=["tall", "wide", "one number"])
def test_the_map_shows_the_principal_components(shape):
    keys = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plane, variance = keymap.project(keys)
    left, singular, _ = np.linalg.svd((keys - keys.mean(dim=0)).numpy(), full_matrices=False)
    expected = np.zeros((shape[0], 2))
    expected[:, : min(2, len(singular))] = (left * singular)[:, :2]
    np.testing.assert_allclose(plane.abs().numpy(), np.abs(expected), atol=1e-9)
    assert variance == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum())
    assert (plane.gather(0, plane.abs().argmax(dim=0, keepdim=True)) >= 0).all()


def test_the_trade_off_is_that_of_codebooks_made_of_the_other_folds(tmp_path):
    draw = torch.Generator().manual_seed(2)
    keys = torch.randn(45, 4, generator=draw)
    labels = torch.randint(0, 3, (45,), generator=draw).tolist()
    read = reading.read(book_of(tmp_path, keys, labels))
    found = tradeoff.trade_off_of(read)
    assert found.asked == found.edits == 45
    assert [each.epsilon for each in found.tried if each.is_current] == [EPSILON]
    assert len({(each.own, each.another) for each in found.tried}) > 3
    for each in (*found.tried[::4], found.current):
        rules = Settings("layer", each.epsilon).rules(torch.float32)
        own = another = 0
        for fold in range(found.folds):
            book, history = gf.Codebook(4, 1), History()
            for at in (at for at in range(45) if at % found.folds != fold):
                with book.writing() as draft:
                    label = torch.tensor([labels[at]])
                    made = history.apply(draft, rules, keys[at], label, torch.zeros(1), at)
                    edit = Edit(at, made.outcome, made.row, 0, 0, keys[at], label, None, 0)
                    history.record(edit, 0)
            held = torch.arange(45)[torch.arange(45) % found.folds == fold]
            match = lookup.find(keys[held], book)
            for at, row in zip(held.tolist(), match.row.tolist(), strict=True):
                if row >= 0:
                    alike = int(book.snapshot().row(row).label) == labels[at]
                    own, another = own + alike, another + (not alike)
        assert (each.own, each.another) == pytest.approx((own / 45, another / 45)), each.epsilon


def test_a_large_codebook_says_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("grace_fast.tools.report.listing.COUNTED", 500)
    monkeypatch.setattr("grace_fast.tools.report.listing.REPLAYED", 1e6)
    monkeypatch.setattr(neighbours, "ROWS", 100)
    monkeypatch.setattr(neighbours, "LABELLED", 0)
    count = 3000
    keys = torch.randn(count, 4, generator=torch.Generator().manual_seed(3))
    folder = book_of(tmp_path, keys, [at % 5 for at in range(count)], hits={5: 2, 7: 9})
    report.write(folder, tmp_path / "page.html")
    content = (tmp_path / "page.html").read_text()
    page = Parsed(content)
    assert len(content) < 500_000
    assert len(page.table("The newest 200 of 3,000 edits; the other 2,800 are left out")) == 200
    assert "Of 500 edits, evenly spread over all, 500 were added" in page.text
    assert "not replayed" in page.text
    assert "100 rows, evenly spread over 3,000, were each compared with all others" in page.text
    assert "(their labels with those of the 32 nearest balls)" in page.text
    assert "1,500 keys, evenly spread over 3,000, on the plane" in page.text
    assert "500 edits, evenly spread over 3,000, were dealt into 5 folds" in page.text
    assert len(page.table("Never hit: the oldest 20 of 2,998")) == 20


HOSTILE = (
    ("<script>document.title='ran'</script>", "</style><script>document.title='ran'</script>"),
    ("\"'><img src=x onerror=\"document.title='ran'\">", "</title></svg><svg onload=alert(1)>"),
    ("\u202egnisrever \u2066isolated \x00\x1b[31m \ufeff\U000e0041", "{{ 7 * 191 }}{% raw %}"),
    ("lone \ud800 surrogate \udfff", "\u2028line\u2029ends\r\n" * 3),
    ("W" * 1_000_000, "M" * 1_000_000),
    ("z" + "\u0335\u0336" * 5000, "javascript:alert(1)"),
    ("&lt;b&gt; &amp;amp; <!-- -->", "]]></style><![CDATA["),
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A codebook whose every text is an attack, enough of them for every section to be drawn."""
    folder = tmp_path_factory.mktemp("hostile") / "<b>\u202eame"
    told = [HOSTILE[at % len(HOSTILE)] for at in range(42)]
    keys = torch.randn(42, 2, generator=torch.Generator().manual_seed(4))
    layer = "<script>document.title='ran'</script>" + "L" * 100_000
    bad = "</dd><script>document.title='ran'</script>"
    book_of(
        folder,
        keys,
        [at % 7 for at in range(42)],
        told=told,
        hits=dict.fromkeys(range(8), (1 << 53) - 1),
        settings=asdict(Settings(layer, EPSILON, store_text=True)),
        fingerprint={
            bad: bad,
            "config": {f"{bad} {at}": [bad] * 500 for at in range(200)},
            "layer weight": {"shape": {"deep": {"deeper": bad * 100}}},
        },
    )
    return folder


def test_hostile_texts_are_inert_and_bounded(hostile, tmp_path):
    report.write(hostile, tmp_path / "page.html")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Parsed(content)
    assert len(content) < 1_000_000
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "img", "iframe", "object", "link", "base", "form", "b-"}
    assert content.count("<style>") == content.count("</style>") == 1
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "style", "action"), (tag, name)
            assert name != "href" or value.startswith("#"), (tag, value)
    assert max(map(len, re.findall(r"\S+", page.text))) < 300
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u0000-\u0009\ud800-\udfff]", content)
    for shown in ("<script>document.title='ran'</script>", "[U+202E]gnisrever", "{{ 7 * 191 }}"):
        assert shown in page.text, shown
    assert "lone [U+D800] surrogate [U+DFFF]" in page.text
    assert "(1,000,000 characters)" in page.text


def test_the_policy_allows_the_style_sheet_and_nothing_else(hostile):
    page = page_of(hostile)
    (policy,) = [
        found["content"]
        for tag, found in page.tags
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy"
    ]
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/=]{44}'; base-uri 'none'; form-action 'none'",
        policy,
    )


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain", "plain"),
        ("two\n\tlines ", "two lines"),
        ("a\u202eb", "a[U+202E]b"),
        ("\ud83d", "[U+D83D]"),
        ("nul\x00 \x7f", "nul[U+0000] [U+007F]"),
        ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"),
        ("\U0001f469\u200d\U0001f52c", "\U0001f469\u200d\U0001f52c"),
        ("a" * 300, "a" * 200 + "… (300 characters)"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_stored_text_is_shown_as_one_line_that_hides_nothing(given, shown):
    assert texts.inert(given) == shown


@given(st.text(st.characters(), max_size=300))
def test_any_text_is_bounded_and_can_be_written(text):
    shown = texts.inert(text)
    shown.encode()
    assert len(shown) <= len("[U+10FFFF]") * texts.LIMIT + len("… (300 characters)")
    assert len(shown.splitlines()) <= 1


def test_an_empty_codebook_has_a_page(tmp_path):
    words = page_of(book_of(tmp_path, torch.zeros(0, 3), [])).text
    assert "0 edits 0 taken back 0 keys" in words
    for said in ("There are no edits.", "No hits were counted.", "There is no ball."):
        assert said in words
    assert "fewer than two balls" in words
    assert "too few keys that differ" in words


def test_one_edit_is_spoken_of_in_the_singular(tmp_path):
    words = page_of(book_of(tmp_path, [[1.0, 2.0]], [3], hits={0: 1})).text
    for said in ("1 edit 0 taken back", "1 key 0 rows", "1 edit fires", "1 hit on 1 of 1 key"):
        assert f" {said} " in words, said
    assert "Of the 1 edit 1 was added" in words


def test_a_codebook_of_undone_edits_has_a_page(tmp_path):
    grace = golden_codebooks.editor()
    made = [edit.id for edit in grace.edits()]
    for number in made:
        grace.undo(number)
    grace.save_pretrained(tmp_path)
    words = page_of(tmp_path).text
    assert f"There are no edits: all {len(made) + 1} were taken back." in words
    assert "0 keys" in words


def test_a_directory_of_the_first_format_has_a_page():
    words = page_of(Path(__file__).parents[1] / "golden_formats" / "edits-1").text
    assert "8 edits 1 taken back" in words
    assert "format 1" in words


def test_every_reference_within_the_page_is_answered_once(hostile, edited):
    for folder in (hostile, edited[0]):
        page = page_of(folder)
        named = [found["id"] for _, found in page.tags if "id" in found]
        assert len(named) == len(set(named))
        for _, found in page.tags:
            wanted = (found.get("aria-labelledby") or "").split()
            wanted += [found["href"].removeprefix("#")] if "href" in found else []
            assert set(wanted) <= set(named), found


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale.linear(0, 235, "rows", whole=True), ["0", "50", "100", "150", "200"]),
        (Scale.linear(0, 2.1, "balls", whole=True), ["0", "1", "2"]),
        (Scale.linear(0, 1e6, "rows"), ["0", "200k", "400k", "600k", "800k", "1M"]),
        (Scale.linear(0, 0, "none"), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Scale.linear(0, 4.2, "held-out", unit=" %"), ["0 %", "1 %", "2 %", "3 %", "4 %"]),
        (Scale.log(1.6, 10.5, "epsilon"), ["2", "5", "10"]),
        (Scale.log(1e-3, 1e3, "epsilon"), ["0.001", "0.01", "0.1", "1", "10", "100", "1k"]),
    ],
    ids=["tens", "whole", "millions", "nothing", "per cent", "a decade", "six decades"],
)
def test_axes_have_round_ticks(scale, ticks):
    assert [tick.text for tick in scale.ticks] == ticks
    places = [scale.part(tick.value) for tick in scale.ticks]
    assert places == sorted(places)
    assert 0 <= places[0] <= places[-1] <= 1 + 1e-9


def test_keys_that_are_all_the_same_have_a_page(tmp_path):
    words = page_of(book_of(tmp_path, torch.full((12, 3), 0.1), [1] * 12)).text
    assert "too few keys that differ" in words
    assert "all ask with one query" in words


@pytest.mark.parametrize("semantics", ["paper", "reference"])
@pytest.mark.parametrize(
    ("epsilon", "scale", "radii"),
    [
        (5e-324, 1e-38, [0.0] * 10),
        (1e-300, 1e-38, [1e-45] * 10),
        (3e38, 1e38, [3e38] * 10),
        (1.0, 1.0, [0.0, 1e-45, 1e38, 3e38, -1.0, -3e38, 1.0, 2.0, 0.5, 1e10]),
        (1.0, 1.0, [-1.0] * 10),
    ],
    ids=["smallest", "tiny", "huge", "of every size", "all dead"],
)
def test_numbers_at_the_ends_are_drawn(tmp_path, epsilon, scale, radii, semantics):
    keys = torch.randn(10, 3, generator=torch.Generator().manual_seed(5)) * scale
    settings = asdict(Settings("layer", epsilon, semantics=semantics))
    page = page_of(book_of(tmp_path, keys, [0, 1] * 5, radii, settings=settings))
    drawn = [
        value
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if tag in ("circle", "path", "polyline", "rect", "text", "use") and name != "class"
    ]
    assert drawn
    assert not [value for value in drawn if re.search(f"nan|inf|∞|{texts.NOTHING}", value)]


def call(*arguments: object):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_one_file_in_place_of_another(edited, tmp_path):
    folder, grace = edited
    before = {each.name: each.read_bytes() for each in folder.iterdir()}
    out = tmp_path / "page.html"
    out.write_text("old")
    told = call(folder, "--out", out, "--json")
    assert told.exit_code == 0, told.output
    figures = json.loads(told.stdout)
    assert figures["edits"] == len(grace.edits())
    assert figures["bytes"] == out.stat().st_size
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"], "nothing half-written"
    assert f"{len(grace.edits())} edits on" in call(folder, "--out", out).stdout
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == before


def test_what_has_no_page_is_told_in_one_line(edited, parts, tmp_path):
    folder, _ = edited
    keys = torch.eye(3)
    bare = gf.Codebook(3, 3)
    bare.append(keys, keys, torch.ones(3))
    bare.save(tmp_path / "bare")

    def refused(*arguments: object) -> str:
        result = call(*arguments)
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        return result.stderr

    assert "is not a codebook" in refused(tmp_path, "--out", tmp_path / "a.html")
    assert "open it with gf.Codebook.open" in refused(
        tmp_path / "bare", "--out", tmp_path / "a.html"
    )
    config = folder / "grace_config.json"
    before = config.read_bytes()
    assert "must be named .html" in refused(folder, "--out", config)
    assert config.read_bytes() == before
    assert "cannot write" in refused(folder, "--out", tmp_path / "absent" / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_a_signed_directory_wants_its_key(tmp_path):
    key = b"k" * 16
    grace = golden_codebooks.editor(path=tmp_path / "book", hmac_key=key)
    grace.unload()
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "other").write_bytes(b"x" * 16)
    out = tmp_path / "page.html"
    assert call(tmp_path / "book", "--out", out, "--key-file", tmp_path / "key").exit_code == 0
    assert "signed yes" in Parsed(out.read_text(encoding="utf-8")).text
    assert call(tmp_path / "book", "--out", out, "--key-file", tmp_path / "other").exit_code == 1


def test_a_page_is_made_beside_the_one_who_edits(tmp_path):
    grace = golden_codebooks.editor(path=tmp_path)
    grace.edit("12", 3)
    newest = page_of(tmp_path).table("The newest first")[0]
    assert newest["Edit"] == str(grace.edits()[-1].id)
    assert newest["Prompt → answer"] == "12 → 3"
    grace.undo(int(newest["Edit"]))
    assert page_of(tmp_path).table("The newest first")[0]["Edit"] != newest["Edit"]
    grace.unload()


def test_a_compaction_between_manifest_and_files_is_followed(tmp_path, monkeypatch):
    grace = golden_codebooks.editor(path=tmp_path)
    first, compacted = Saved.codebook, []

    def codebook(saved: Saved):
        if not compacted:
            grace.edit("12", 3)
            grace.compact()
            compacted.append(True)
        return first(saved)

    monkeypatch.setattr(Saved, "codebook", codebook)
    assert len(reading.read(tmp_path).history.edits) == len(grace.edits())
    grace.unload()


def test_a_directory_that_lost_a_file_is_refused(edited, tmp_path):
    folder, _ = edited
    (tmp_path / "grace_config.json").write_bytes((folder / "grace_config.json").read_bytes())
    with pytest.raises(CodebookCorrupt, match="is missing"):
        reading.read(tmp_path)


def test_colours_can_be_told_from_what_they_lie_on():
    """WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    sheet = (Path(report.__file__).parent / "style.css").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", part)) for part in sheet.split("@media")[:2]]

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in schemes:
        for name, least in [
            *((name, 4.5) for name in ("ink", "soft", "accent", "bad", "good")),
            *((name, 3.0) for name in ("bar", *(f"k{kind}" for kind in range(8)))),
        ]:
            for ground in ("ground", "raised"):
                light, dark = sorted(map(luminance, (scheme[name], scheme[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= least, (name, scheme[name], ground)


@pytest.mark.skipif(browser.where() is None, reason=f"none of {browser.NAMES} is installed")
def test_a_browser_shows_it_and_runs_nothing(hostile, tmp_path):
    file = tmp_path / "page.html"
    report.write(hostile, file)
    grounds = {}
    with browser.browser() as page:
        for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
            page.requests.clear()
            page.show(file, width, scheme=scheme)
            assert page.requests == [file.as_uri()], "it loads nothing"
            assert (page.said, page.dialogs) == ([], []), "no error, nothing ran"
            assert page.value("document.title").startswith("<b>[U+202E]ame: a codebook of 42")
            assert page.value("document.scripts.length") == 0
            assert page.value("document.documentElement.scrollWidth") == width, "nothing sticks out"
            assert (
                page.value("getComputedStyle(document.querySelector('.tiles')).display") == "grid"
            )
            seen = Image.open(io.BytesIO(page.picture())).convert("RGB")
            assert seen.size == (width, 900)
            assert len(seen.getcolors(1 << 20)) > 50, "it is not blank"
            grounds[scheme] = sum(seen.getpixel((2, 450)))
        assert grounds["dark"] < 128 < 600 < grounds["light"]
        # A script that got in all the same is refused by the page's own policy, and that is told.
        page.value(
            "document.body.appendChild(Object.assign(document.createElement('script'),"
            "{textContent: 'document.title = \"ran\"'}))"
        )
        assert page.value("document.title") != "ran"
        assert any("Content Security Policy" in str(entry) for entry in page.said)
