"""The benchmarks of large codebooks count what a scan of all keys contradicts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from disk import compiled

import grace_fast as gf
from grace_fast.tools.bench import large

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import beside_appends, durable, machine, out_of_core, readers_and_writer


@pytest.fixture
def source(monkeypatch):
    """Clusters in the place of activations, which take a model and minutes."""

    def made(_):
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(60, 64, generator=generator)
        rows = centres.repeat(40, 1) + 0.3 * torch.randn(2400, 64, generator=generator)
        return rows[:2000], rows[2000:]

    monkeypatch.setattr(out_of_core, "activations", made)
    monkeypatch.setattr(out_of_core, "BLOCK_ROWS", 1024)
    return out_of_core.Source(6000)


def test_the_stream_gives_the_same_rows_from_any_row_on(source):
    whole = [torch.cat(parts) for parts in zip(*source(0), strict=True)]
    assert [len(part) for part in whole] == [6000] * 3
    for first in (1, 1024, 2500, 5999):
        rest = [torch.cat(parts) for parts in zip(*source(first), strict=True)]
        for part, other in zip(rest, whole, strict=True):
            assert torch.equal(part, other[first:])


@compiled
def test_every_decision_is_held_against_both_scans(source, tmp_path, monkeypatch):
    def served(folder, queries, epsilon):
        asked = tmp_path / "asked.safetensors"
        out_of_core.save_file({"queries": queries}, asked)
        return out_of_core.serve(folder, asked, epsilon)

    monkeypatch.setattr(out_of_core, "_served", served)
    found = out_of_core.run(source, tmp_path / "book", 120, 60)
    assert out_of_core.wrong([found]) == 0
    hits = [figures["hits"] for figures in found["epsilons"]]
    assert all(0 < some < 40 for some in hits)
    assert all(figures["decisions"] == 40 for figures in found["epsilons"])
    assert found["keys"] == 6000
    page = out_of_core.markdown(
        {
            "machine": {
                "cpu": "some processor",
                "cores": 2,
                "commit": "abc",
                "python": "3",
                "packages": {"torch": "2"},
            },
            "command": "run",
            "date": "today",
            "memory_gib": 1,
            "sizes": [found],
        }
    )
    assert "**0 wrong of 120 decisions**" in page
    assert page.count("| 6,000 | 0.0 GB |") == 3
    monkeypatch.setattr(large.Scan, "hits", lambda self, radius: self.row.clamp(max=-1) - 7)
    assert out_of_core.wrong([out_of_core.run(source, tmp_path / "other", 120, 6)]) == 120


def test_a_scan_keeps_the_lowest_row_of_a_tie_across_chunks():
    keys = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0], [0.0, -1.0]])
    queries = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    chunks = [(0, keys[:2]), (2, keys[2:])]
    found = large.scan(queries, chunks, torch.tensor([1.0, 1.0]))
    assert found.row.tolist() == [1, -1]
    assert found.hits(torch.tensor([1.0, 1.0])).tolist() == [1, -1]
    assert found.hits(torch.tensor([0.5, 1.0])).tolist() == [-1, -1]


@compiled
def test_look_ups_beside_appends_are_counted_and_wrong_ones_seen(monkeypatch):
    figures = beside_appends.run(rows=1500, width=32, appends=80, turns=2)
    for name in ("shared", "private"):
        assert figures[name]["wrong"] == 0
        assert figures[name]["look_ups"] > 0
    assert figures["ratio_p99.9"] > 0

    class Blind:
        row = torch.tensor([-1])

    monkeypatch.setattr(gf, "prepare", lambda book: lambda query: Blind)
    assert beside_appends.run(1500, 32, 80, 1)["private"]["wrong"] > 0


def test_eight_readers_beside_an_editor_read_nothing_mixed_and_lose_no_row():
    figures = readers_and_writer.run(rows=4200, width=16, look_ups=16000, turns=2)
    assert figures["wrong"] == 0
    assert figures["edits"] > 100
    assert all(figures[name]["look_ups"] == 16000 for name in ("alone", "beside the editor"))


def test_a_mixed_read_and_a_lost_row_are_seen():
    edited, reader = readers_and_writer.Edited(4200, 16, 4300), readers_and_writer.Reader()
    random = np.random.default_rng(0)
    with edited.book.writing() as draft:
        for row in range(0, 4200, 2):
            draft.set_radius(row, edited.epsilon / 2)  # and not the other's
    edited.look_up(reader, random)
    assert (reader.mixed, reader.lost) == (1, 0)
    with edited.book.writing() as draft:
        for row in range(4200):
            draft.set_radius(row, -1.0)
    edited.look_up(reader, random)
    assert (reader.mixed, reader.lost) == (1, 1)
    figures = {"wrong": 1, "rows": 1, "width": 1, "edits": 1, "readers": 8}
    where = {"cpu": "a", "cores": 1, "commit": "b", "python": "c"}
    found = {"machine": where, "command": "d", "date": "e", "figures": figures}
    assert readers_and_writer.markdown(found).endswith("1 look-ups were wrong: no times.\n")


def test_what_was_made_durable_is_opened_as_it_was_before_any_time_is_told(tmp_path):
    figures = durable.run(sizes=(50, 500), edits=6, turns=2, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert [each["edits"] for each in figures["opened"]] == [50, 500]
    assert all(each["is_same"] for each in (figures["edited"], *figures["opened"]))
    found = machine.heading(machine.describe(1), "benchmarks.durable", []) | {"figures": figures}
    assert "| 500 |" in durable.markdown(found)
    figures["opened"][1]["is_same"] = False
    assert durable.markdown(found).endswith("What was opened is not what was written: no times.\n")


def test_a_codebook_that_is_not_what_was_written_is_told():
    book, history = durable.made(20)
    assert durable.is_as_made((book, history), book, history)
    other = durable.made(20)
    with other[0].writing() as draft:
        draft.set_radius(3, 0.25)
    assert not durable.is_as_made((book, history), *other)
    assert not durable.is_as_made(durable.made(21), book, history)
