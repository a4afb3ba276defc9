"""The GPU benchmark without a GPU: its order and budget, its lines, its page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from gpu_on_host import SmallBooks

from benchmarks import (
    gpu,
    gpu_calls,
    gpu_cells,
    gpu_machine,
    gpu_page,
    gpu_peers,
    gpu_prediction,
)
from benchmarks.gpu_cells import BOXES, CUDA_DENSE, MISSES, Cell
from benchmarks.gpu_clock import Timing

ROOT = Path(__file__).parents[2]

HEAD = {
    "machine": {
        "device": "NVIDIA H200",
        "cpu": "a processor",
        "cores": 16,
        "commit": "abc",
        "python": "3.12",
        "packages": {"torch": "2.11"},
    },
    "command": "python -m benchmarks.gpu",
    "date": "2026-01-02",
}


# What is measured, and in which order.


def test_no_cell_is_measured_twice_and_every_contestant_takes_part():
    cells = gpu_cells.cells()
    assert len({cell.key for cell in cells}) == len(cells)
    paths = {cell.path for cell in cells}
    assert paths == {*gpu_cells.OURS, *gpu_cells.PEERS, *gpu_cells.MACHINE}
    assert {cell.asks for cell in cells} == {"-", *gpu_cells.ASKS}


def test_the_most_telling_come_first():
    first = list(gpu_cells.first())
    assert gpu_cells.cells()[: len(first)] == first
    assert list(dict.fromkeys(cell.stage for cell in first)) == [
        *("fixed cost", "dense", "codes", "other types", "many queries", "one NaN"),
        "beside a layer",
    ]
    assert first[0].path == "bytes read"  # what shares of the bandwidth are of
    goals = [cell for cell in gpu_cells.cells() if gpu_prediction.goal_of(cell) is not None]
    late = [cell for cell in goals if cell not in first and cell.caches == gpu_cells.SWEPT]
    largest = 100 * gpu_cells.MILLION
    assert all(cell.path == gpu_cells.CODE_TILES or largest == cell.N for cell in late)


def test_the_rest_holds_what_was_asked_for():
    cells = gpu_cells.cells()
    dense = {(cell.N, cell.B) for cell in cells if cell.path == CUDA_DENSE and cell.D == 4096}
    assert {(rows, batch) for rows in gpu_cells.DENSE_ROWS for batch in (1, 4, 8)} <= dense
    for path in (*BOXES, *gpu_cells.LINEAR):
        asked = {(cell.N, cell.B) for cell in cells if cell.path == path}
        assert {(rows, batch) for rows in gpu_cells.CODED_ROWS for batch in (1, 8)} <= asked
        assert (100 * gpu_cells.MILLION, 1) in asked
    assert {cell.B for cell in cells if cell.path == gpu_cells.PRODUCT} >= {1, 4, 32, 256, 4096}


# The budget, and lines that are whole whenever it ends.


class Time:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FixedClock:
    """Times every call at the same, and moves the time on."""

    def __init__(self, time, seconds=2.0, us=5.0):
        self._time, self._seconds, self._us = time, seconds, us
        self.asked = []

    def time(self, call, is_swept=True):
        self._time.now += self._seconds
        self.asked.append(is_swept)
        return Timing([self._us] * 5, 20, call())

    eager = started = time


@pytest.fixture
def fakes(monkeypatch):
    """Contestants that are right, without a device."""

    def told(cell, book):
        expected = book.expected(cell.B, cell.asks)
        count = min(cell.B, 32)
        hit, row = torch.zeros(count, dtype=torch.bool), torch.full((count,), -1)
        hit[expected.at], row[expected.at] = expected.hit, expected.row
        return lambda: gpu_calls.Answer(hit, row, None)

    monkeypatch.setattr(gpu_calls, "call_of", told)
    monkeypatch.setattr(gpu_peers, "call_of", told)
    alone = dict.fromkeys(gpu_cells.MACHINE, lambda cell: lambda: None)
    monkeypatch.setattr(gpu_machine, "_MACHINE", alone)
    return [cell for cell in gpu_cells.cells() if cell.B <= 8 and cell.asks in ("-", MISSES)]


def started(folder, budget, time, **clock):
    watched = gpu.given_up_after
    run = gpu.Run(folder, budget, SmallBooks(), FixedClock(time, **clock), time, watched)
    if not run.lines:
        run.write(HEAD)
    return run


def test_what_does_not_fit_is_passed_over_for_what_does(fakes, tmp_path):
    time = Time()
    large, small, other = (
        Cell("dense", CUDA_DENSE, rows, 4096, batch, "bfloat16", MISSES)
        for rows, batch in ((gpu_cells.MILLION, 4), (1_000, 4), (1_000, 1))
    )
    run = started(tmp_path, 40.0, time)
    done = [line["key"] for line in run.measure([fakes[0], large, small, other])]
    assert done == [fakes[0].key, small.key, other.key]
    assert list(started(tmp_path, 10.0, Time()).measure([large])) == []
    assert [line["key"] for line in started(tmp_path, 90.0, Time()).measure([large])] == [large.key]


def test_a_run_ends_before_its_budget_does(fakes, tmp_path):
    time = Time()
    done = list(started(tmp_path, 100.0, time).measure(fakes))
    assert 5 < len(done) < len(fakes)
    assert time.now <= 100 - gpu.LAST_S


def test_a_run_goes_on_behind_the_lines_that_are_there(fakes, tmp_path):
    first = [line["key"] for line in started(tmp_path, 60.0, Time()).measure(fakes)]
    second = [line["key"] for line in started(tmp_path, 1e6, Time()).measure(fakes)]
    assert first
    assert sorted(first + second) == sorted(cell.key for cell in fakes)
    assert len((tmp_path / gpu.LINES).read_text().splitlines()) == 1 + len(fakes)


def test_a_share_of_the_bandwidth_is_of_what_was_measured(fakes, tmp_path):
    run = started(tmp_path, 1e6, Time(), us=1000.0)
    lines = {line["key"]: line for line in run.measure(fakes)}
    read = next(line for line in lines.values() if line["path"] == "bytes read")
    assert read["gigabytes_s"] == pytest.approx(gpu_machine.READ_BYTES / 1e6)
    cell = Cell("dense", CUDA_DENSE, 100_000, 4096, 4, "bfloat16", MISSES)
    share = cell.key_bytes / gpu_machine.READ_BYTES
    assert lines[cell.key]["of_read"] == pytest.approx(share)
    assert "of_read" not in next(line for line in lines.values() if line["path"] in BOXES)


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = {paths}
import test_gpu_benchmarks as tests
from benchmarks import gpu_calls, gpu_cells, gpu_machine
class Dying(tests.FixedClock):
    def time(self, call, is_swept=True):
        if len(self.asked) == 3:
            os._exit(9)
        return super().time(call, is_swept)
    started = time
tests.FixedClock = Dying
gpu_machine._MACHINE = dict.fromkeys(gpu_cells.MACHINE, lambda cell: lambda: None)
list(tests.started(Path({folder!r}), 1e6, tests.Time()).measure(gpu_cells.cells()[:6]))
"""


def test_a_process_that_is_killed_leaves_whole_lines_and_its_cell_is_not_tried_again(tmp_path):
    paths = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT / "tests" / "lookup")]
    script = KILLED.format(paths=paths, folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert run.returncode == 9, run.stderr.decode()
    cells = gpu_cells.cells()[:6]
    with (tmp_path / gpu.LINES).open("a") as file:
        file.write('{"key": "torn')
    lines = gpu.read_lines(tmp_path)
    assert [line.get("key") for line in lines] == [None, *(cell.key for cell in cells[:3])]
    again = started(tmp_path, 0.0, Time())
    assert list(again.measure(cells)) == []
    assert again.lines[-1]["key"] == cells[3].key
    assert "the process ended" in again.lines[-1]["note"]
    assert gpu.read_lines(tmp_path) == again.lines


def test_a_cell_that_raises_is_a_line_and_the_next_is_measured(fakes, tmp_path, monkeypatch):
    def broken(cell, book):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(gpu_calls, "call_of", broken)
    lines = list(started(tmp_path, 1e6, Time()).measure(fakes))
    assert len(lines) == len(fakes)
    notes = {line["note"] for line in lines if line["path"] in gpu_cells.OURS}
    assert notes == {"failed: RuntimeError: no kernel image"}
    assert any("us_p50" in line for line in lines)


def test_no_speed_is_reported_of_ours_where_a_decision_is_wrong(fakes, tmp_path, monkeypatch):
    right = gpu_calls.call_of

    def lying(cell, book):
        answer = right(cell, book)()
        return lambda: answer._replace(hit=~answer.hit)

    monkeypatch.setattr(gpu_calls, "call_of", lying)
    cell = next(cell for cell in fakes if cell.is_ours)
    [line] = started(tmp_path, 1e6, Time()).measure([cell])
    assert line["wrong"] == line["checked"] > 0
    assert "us_p50" not in line

    answers = iter([right(cell, SmallBooks().of(cell))()])  # right once, wrong in the graph
    wrong_later = right(cell, SmallBooks().of(cell))()
    wrong_later = wrong_later._replace(hit=~wrong_later.hit)
    monkeypatch.setattr(gpu_calls, "call_of", lambda cell, book: lambda: next(answers, wrong_later))
    [line] = started(tmp_path / "other", 1e6, Time()).measure([cell])
    assert line["wrong"] > 0
    assert line["note"].startswith("wrong when replayed")


def test_without_a_device_nothing_is_measured_and_one_sentence_says_so(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_the_command_writes_lines_and_the_page_and_says_whether_all_was_right(
    fakes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "Books", SmallBooks)
    monkeypatch.setattr(gpu, "Clock", lambda: FixedClock(Time()))
    monkeypatch.setattr(gpu_cells, "cells", lambda: fakes[:9])
    properties = SimpleNamespace(multi_processor_count=132, L2_cache_size=1 << 20)
    for name, said in (
        ("is_available", lambda: True),
        ("get_device_name", lambda: "NVIDIA H200"),
        ("get_device_properties", lambda index: properties),
    ):
        monkeypatch.setattr(torch.cuda, name, said)
    assert gpu.main(["--out", str(tmp_path), "--budget", "1000"]) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert "NVIDIA H200" in page
    assert fakes[0].key in capsys.readouterr().out
    monkeypatch.setattr(gpu_machine, "_MACHINE", {})  # every cell fails, and the device is lost
    monkeypatch.setattr(torch.cuda, "synchronize", _lost)
    assert gpu.main(["--out", str(tmp_path / "lost"), "--budget", "1000"]) == gpu.AGAIN
    assert len(gpu.read_lines(tmp_path / "lost")) == 2


def _lost():
    raise RuntimeError("an illegal memory access was encountered")


def test_a_cell_that_hangs_ends_the_process_so_that_the_next_is_tried():
    script = "import time; from benchmarks import gpu\nwith gpu.given_up_after(0.1): time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert run.returncode == gpu.AGAIN


# The prediction and the page.


def test_every_cell_has_a_prediction_and_they_are_what_was_written_down():
    known = gpu_prediction.known()
    made = json.loads(json.dumps(gpu_prediction.table()))
    assert known == {row["key"]: row for row in made}
    for row in made:
        assert row["us"] > 0
        assert row["us"] == pytest.approx(sum(row["parts"].values()), abs=0.05)
        is_bound = row["path"] in gpu_cells.OURS and row["asks"] != gpu_cells.BESIDE
        assert (row["limit_us"] is not None) == is_bound
    written = gpu_prediction.RESULTS.with_suffix(".md").read_text()
    assert written == gpu_prediction.markdown(made)


def test_every_goal_is_held_against_a_cell_of_both_engines():
    goals = [cell for cell in gpu_cells.cells() if gpu_prediction.goal_of(cell) is not None]
    found = {(cell.path, cell.N, cell.B) for cell in goals}
    dense = (CUDA_DENSE, gpu_cells.TRITON_DENSE)
    assert {(path, rows, 4) for path in dense for rows in gpu_prediction.DENSE_GOALS} <= found
    assert {(path, rows, 8) for path in BOXES for rows in gpu_prediction.BOXES_GOALS} <= found
    linear = ((path, rows, 8) for path in gpu_cells.LINEAR for rows in gpu_prediction.LINEAR_GOALS)
    assert set(linear) <= found
    assert (gpu_cells.TILES, 100_000, 4096) in found
    assert gpu_cells.BESIDE in {cell.asks for cell in goals}


def test_no_look_up_is_predicted_below_its_limit_and_no_goal_is_below_it():
    for row in gpu_prediction.table():
        if row["limit_us"] is not None:
            assert row["limit_us"] <= row["us"], row["key"]
            assert row["goal_us"] is None or row["limit_us"] <= row["goal_us"], row["key"]


def test_the_prediction_is_written_by_its_command(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_prediction, "RESULTS", tmp_path / "prediction")
    assert gpu_prediction.known() == {}
    assert gpu_prediction.main() == 0
    assert len(gpu_prediction.known()) == len(gpu_cells.cells())


def line_of(cell, **fields):
    return {"key": cell.key, **cell.__dict__, "at_s": 1.0, **fields}


def test_the_page_of_a_run_that_was_broken_off_says_what_there_is(tmp_path, capsys):
    read, dense, nan = (
        next(cell for cell in gpu_cells.cells() if cell.path == path and cell.asks == asks)
        for path, asks in (
            ("bytes read", "-"),
            (CUDA_DENSE, MISSES),
            (gpu_cells.TILES, gpu_cells.NAN),
        )
    )
    figures = {"us_p5": 1.0, "us_p50": 9000.0, "us_p95": 9100.0}
    expected = gpu_prediction.predicted(read).us
    lines = [
        HEAD,
        line_of(read, us_p5=1.0, us_p50=expected, us_p95=1.0, gigabytes_s=4321.0),
        line_of(dense, **figures, checked=16, wrong=0, of_read=0.5, note="a | b"),
        line_of(nan, note="failed: RuntimeError: no"),
    ]
    for line in lines:
        with (tmp_path / gpu.LINES).open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert gpu_page.main([str(tmp_path)]) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert "16 decisions held against the law, 0 of ours wrong, 1 cells failed" in page
    assert "4,321 GB/s" in page
    assert "| 50% | 0 / 16 | a / b |" in page
    wrong = page.split("## Where the prediction was wrong")[1]
    assert dense.key in wrong
    assert read.key not in wrong
    assert f"{len(gpu_cells.cells()) - 3} of {len(gpu_cells.cells())} cells were not" in page
    assert "a | b" not in page
    assert gpu_page.in_a_line(lines[2]).endswith("0 / 16 wrong; a | b")
    assert "Nowhere by more than" in gpu_page.page(lines[:2])
    capsys.readouterr()
    assert gpu_page.main([]) == 2
    assert gpu_page.main([str(tmp_path / "nothing")]) == 1
    assert "no whole line" in capsys.readouterr().out
