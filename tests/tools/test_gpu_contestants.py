"""The GPU benchmark's contestants, for real: CUDA's kernels by fibers, Triton's interpreted."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

import gpu_on_host
import triton_interpreted
from cuda_build import host_module
from gpu_on_host import SmallBooks
from triton_compile import compiled, dumped, resources, target_of

from benchmarks import gpu_calls, gpu_cells, gpu_peers, gpu_probe, gpu_problems
from benchmarks.gpu_cells import BOXES, CUDA_DENSE, MISSES, SUMS, WRITTEN, Cell
from grace_fast.index import segments
from grace_fast.lookup.backends import cuda

ROOT = Path(__file__).parents[2]


class FewBlocks:
    """The extension for a host, with a device of two multiprocessors."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    def device(self, index):
        return {**self._module.device(index), "multiprocessors": 2}


@pytest.fixture(scope="module")
def on_host():
    module = host_module()
    module.forget()
    module.set_order(1, 64)
    return FewBlocks(module)


@pytest.fixture
def forced(on_host, monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", on_host)
    monkeypatch.setattr(gpu_calls, "why_not", lambda cell, book: None)
    monkeypatch.setattr(segments, "ORDER_ROWS", 100)


def test_cuda_paths_are_forced_and_held_against_the_law(forced):
    books = gpu_problems.Books("cpu")
    paths = [path for path in (*gpu_cells.OURS,) if path.startswith("cuda")]
    for cell in gpu_on_host.cells([*paths, gpu_cells.AUTO]):
        checked, wrong = gpu_on_host.asked(cell, books)
        assert checked == cell.B
        assert wrong == 0, cell.key
    kept = books.of(cell).kept
    assert [kept[path].indexed for path in paths] == ["codes" in path for path in paths]
    boxes = {path: kept[path].state.segments[0].leaf_boxes is not None for path in paths[1:]}
    assert boxes == {path: "boxes" in path for path in paths[1:]}


def test_only_the_dense_path_of_cuda_reads_every_key(forced):
    paths = [path for path in gpu_cells.OURS if path.startswith("cuda")]
    reading = [path for path in paths if gpu_on_host.reads_every_key(gpu_on_host.cell_of(path))]
    assert reading == [CUDA_DENSE]


def test_a_path_that_cannot_take_a_cell_says_why():
    if torch.cuda.is_available():
        pytest.skip("there it can")
    cell = Cell("host", CUDA_DENSE, 40, 8, 1, "float32", MISSES)
    with pytest.raises(RuntimeError, match="not on a CUDA GPU"):
        gpu_calls.call_of(cell, SmallBooks().of(cell))


def test_an_aliased_codebook_is_one_of_many_times_the_rows(forced):
    """Its codes are those of its keys, which the kernels look up in."""
    few = segments.BLOCK * segments.LEAF**2
    books = gpu_problems.Books("cpu", {3 * few: 3})
    cell = Cell("host", BOXES[0], 3 * few, 4, 2, "float32", MISSES)
    book = books.of(cell)
    assert book.snapshot.rows == 3 * few
    assert books.has(cell)
    (one,) = book.ordered.segments
    assert sorted(one.rows.tolist()) == list(range(3 * few))
    assert gpu_on_host.asked(cell, books) == (2, 0)
    hits = Cell("host", BOXES[0], 3 * few, 4, 2, "float32", WRITTEN)
    assert gpu_on_host.asked(hits, books) == (2, 0)  # of rows that share a key, the first
    with pytest.raises(ValueError, match="only groups of 16 level-2 nodes can be repeated"):
        gpu_problems.repeated(
            gpu_problems.Books("cpu")
            .of(Cell("host", BOXES[0], 150, 4, 2, "float32", MISSES))
            .ordered,
            2,
        )


def test_triton_paths_and_peers_are_held_against_the_law(tmp_path):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the benchmark itself does so on the GPU")
    path = tmp_path / "found.json"
    triton_interpreted.run(gpu_on_host.__file__, path)
    found = json.loads(path.read_text())
    assert found.pop("reads every key") == [gpu_cells.TRITON_DENSE]
    summed, wanted = found.pop("words")
    assert summed == wanted
    assert len(found) == 5 * 2 + 1 + 2 + 1
    for key, (checked, wrong) in found.items():
        assert (checked, wrong) == (gpu_on_host.BATCH, 0), key


def test_the_benchmarks_own_kernels_are_what_they_are_meant_to_be(tmp_path):
    """What reads the memory does so 16 bytes at a time, and writes next to nothing."""
    pytest.importorskip("triton")
    from benchmarks import gpu_kernels
    from benchmarks.gpu_kernels import OPTIONS

    target, wide = target_of("sm_90"), r"LDG\.E(?:\.\w+)*\.128"
    arguments = {"words": "*i32", "sink": "*i32", "count": "i32 aligned", "BLOCK": 8192}
    built = compiled(gpu_kernels.read_words, target, arguments, num_warps=8, **OPTIONS)
    code = dumped(built.asm["cubin"], "-sass", tmp_path)
    assert len(re.findall(wide, code)) >= 8
    assert len(re.findall(r"\bSTG\b", code)) == 1
    assert resources(built.asm["cubin"], tmp_path)["REG"] <= 64  # four blocks of 256 threads
    sizes = {"batch": "i32", "rows": "i32", "width": "i32 aligned"}
    vectors = {"queries": "*bf16", "keys": "*bf16", "query_norm": "*fp32", "key_norm": "*fp32"}
    for block in (16, 128):
        tile = {"BLOCK_B": block, "BLOCK_N": 128, "BLOCK_D": 64}
        arguments = {**vectors, "best": "*i64", **sizes, **tile}
        options = {"num_warps": 8 if block > 64 else 4, "num_stages": 3, **OPTIONS}
        built = compiled(gpu_kernels.nearest_keys, target, arguments, **options)
        code = dumped(built.asm["cubin"], "-sass", tmp_path)
        assert re.search(r"HGMMA|HMMA", code)
        assert resources(built.asm["cubin"], tmp_path)["LOCAL"] == 0
    columns = {"best": "*i64", "limits": "*fp32", "hit": "*i1", "found": "*i64"}
    compiled(
        gpu_kernels.within_radius, target, {**columns, "batch": "i32", "BLOCK": 256}, **OPTIONS
    )


def test_libraries_take_part_where_they_are_installed(monkeypatch):
    cell = Cell("host", gpu_cells.CUVS, 40, 8, 2, "float32", SUMS)
    book = SmallBooks().of(cell)

    def nearest(index, queries, count):
        squared, row = torch.cdist(queries, index).square().min(dim=1, keepdim=True)
        return squared, row

    class Flat:
        def __init__(self, resources, width):
            self.keys = torch.empty(0, width)

        def add(self, keys):
            self.keys = torch.cat([self.keys, keys])

        def search(self, queries, count):
            return nearest(self.keys, queries, count)

    cuvs = SimpleNamespace(build=lambda keys, metric: keys, search=nearest)
    faiss = SimpleNamespace(GpuIndexFlatL2=Flat, StandardGpuResources=lambda: None)
    modules = {"cuvs.neighbors.brute_force": cuvs, "faiss": faiss, "faiss.contrib.torch_utils": 0}
    monkeypatch.setattr(gpu_peers.importlib, "import_module", modules.__getitem__)
    for path in (gpu_cells.CUVS, gpu_cells.FAISS):
        answer = gpu_peers.call_of(Cell("host", path, 40, 8, 2, "float32", SUMS), book)()
        assert gpu_calls.wrong(cell, book, answer) == (2, 0)
    modules["faiss"] = SimpleNamespace()
    book.kept.clear()
    with pytest.raises(ImportError, match="built for the host"):
        gpu_peers.call_of(Cell("host", gpu_cells.FAISS, 40, 8, 2, "float32", SUMS), book)


def test_the_product_is_compiled_once_for_any_shape(monkeypatch):
    compiled = []

    def compile_(function, dynamic):
        compiled.append(dynamic)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    gpu_peers._compiled.cache_clear()
    book = SmallBooks().of(Cell("host", gpu_cells.PRODUCT, 40, 8, 2))
    for batch in (1, 2):
        cell = Cell("host", gpu_cells.PRODUCT, 40, 8, batch, "float32", SUMS)
        answer = gpu_peers.call_of(cell, book)()
        assert gpu_calls.wrong(cell, book, answer) == (batch, 0)
    assert compiled == [True]
    gpu_peers._compiled.cache_clear()


def test_the_probe_asks_every_path_before_and_after_edits(forced, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_probe, "SHAPES", ((16, "float32"),))
    monkeypatch.setattr(gpu_probe, "BATCHES", (1, 2))
    out = tmp_path / "probe.jsonl"
    assert gpu_probe.main(["--rows", "130", "--paths", "cuda", "--out", str(out)], "cpu") == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 3 * 2 * 3 * 2
    assert {line["wrong"] for line in lines} == {0}
    assert len({line["edited"] for line in lines}) == 2
    monkeypatch.setattr(gpu_calls, "why_not", lambda cell, book: "too old")
    arguments = ["--rows", "130", "--few", "--out", str(out)]
    assert gpu_probe.main(arguments, "cpu") == 0
    assert "too old" in out.read_text()


def test_the_probe_takes_every_path_in_every_batch_and_width():
    cells = list(gpu_probe.cells())
    assert {cell.path for cell in cells} == set(gpu_cells.OURS)
    assert {cell.B for cell in cells} == {1, 4, 8, 32}
    assert {cell.D for cell in cells} == {64, 100, 4096}
    assert {cell.D for cell in gpu_probe.cells("cuda", few=True)} == {4096}
    assert all("cuda" in cell.path for cell in gpu_probe.cells("cuda"))
