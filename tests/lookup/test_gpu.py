"""On a GPU: every look-up against the law, in graphs and compiled, while the codebook is edited."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

import gpu_on_host

import grace_fast as gf
from benchmarks import gpu_calls, gpu_cells, gpu_clock
from benchmarks.gpu_cells import MISSES, SUMS, WRITTEN, Cell
from benchmarks.gpu_problems import Books
from grace_fast import semantics
from grace_fast.index import maintained
from grace_fast.lookup import dispatch, lookup
from grace_fast.lookup.backends.workload import Workload

# Without it torch warns of every product while `poisoned`, also in the thread that makes an index.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BACKENDS = ("cuda", "triton", "auto")
DENSE = (gpu_cells.CUDA_DENSE, gpu_cells.TRITON_DENSE)
FORCED = ((1, 64, "float32"), (8, 100, "float16"), (32, 4096, "bfloat16"))  # B, D
FORCED_ROWS = 4500  # more than a level-2 node, and not a whole one
SHAPES = ((1, 300, 64), (7, 5000, 384), (32, 20000, 768), (200, 3000, 100))


@contextmanager
def poisoned():
    """Fill torch.empty with NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def book_of(rows, width, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    spectrum = torch.arange(1, width + 1, device="cuda").float() ** -0.5
    keys = torch.randn(rows, width, device="cuda", generator=generator) * spectrum
    radii = 0.05 + 0.2 * torch.rand(rows, device="cuda", generator=generator)
    radii[::17] *= -1
    book = gf.Codebook(width, 8, dtype=dtype, device="cuda")
    book.append(keys.to(dtype), torch.randn(rows, 8, device="cuda").to(dtype), radii.cpu())
    return book


def queries_of(book, batch, seed=1):
    """Half beside a key, a few on one, the rest anywhere; one is not finite."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.randint(book.snapshot().rows, (batch,), device="cuda", generator=generator)
    queries = book.keys[rows].float()
    noise = torch.randn(queries.shape, device="cuda", generator=generator)
    scale = torch.tensor([0.0, 0.002, 0.005, 1.0], device="cuda").repeat(batch)[:batch]
    queries += noise * scale[:, None]
    if batch > 4:
        queries[4, 0] = torch.nan
    return queries.to(book.dtype)


def law(queries, book):
    snapshot = book.snapshot()
    row, squared = dispatch.BACKENDS["reference"].nearest(queries, snapshot)
    hit = semantics.in_ball(squared, snapshot.radii_of(row))
    return hit, row.masked_fill(~hit, -1), squared.masked_fill(~hit, torch.inf)


def assert_lawful(match, queries, book):
    hit, row, squared = law(queries, book)
    assert torch.equal(match.hit, hit)
    assert torch.equal(match.row, row)
    assert torch.equal(match.squared_distance, squared)


def skip_unless_taken(backend, book, batch):
    if backend == "auto":
        return
    snapshot = book.snapshot()
    work = Workload("cuda", book.dtype, batch, snapshot.rows, book.key_dim)
    if reason := dispatch.BACKENDS[backend].why_not(work):
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_codebooks(backend, shape, dtype):
    batch, rows, width = shape
    book = book_of(rows, width, dtype)
    skip_unless_taken(backend, book, batch)
    queries = queries_of(book, batch)
    with poisoned():
        assert_lawful(gf.find(queries, book, backend=backend), queries, book)
    gf.prepare(book)
    assert maintained.of(book.snapshot()).current.covered == rows  # codes were made
    with poisoned():
        assert_lawful(gf.find(queries, book, backend=backend), queries, book)


@pytest.fixture(scope="module")
def books():
    return Books()


def call_of(cell, books):
    """A path's call, and the codebook that it asks; where codes are read, those of all rows."""
    book = books.of(cell)
    reason = gpu_calls.why_not(cell, book)
    if reason is not None:
        pytest.skip(f"{cell.path}: {reason}")
    assert book.ordered.covered == cell.N
    assert book.ordered.segments[0].leaf_boxes is not None
    return gpu_calls.call_of(cell, book), book


@pytest.mark.parametrize("asks", [MISSES, WRITTEN, SUMS])
@pytest.mark.parametrize("shape", FORCED, ids=str)
@pytest.mark.parametrize("path", gpu_cells.OURS)
def test_each_path_is_forced_and_decides_as_the_law(books, path, shape, asks):
    batch, width, dtype = shape
    if path == gpu_cells.AUTO and asks == SUMS:
        pytest.skip("hits with their S are those of `test_random_codebooks`")
    cell = Cell("test", path, FORCED_ROWS, width, batch, dtype, asks)
    call, book = call_of(cell, books)
    with poisoned():
        answer = call()
    checked, wrong = gpu_calls.wrong(cell, book, answer)
    assert checked > 0
    assert wrong == 0


@pytest.mark.parametrize("path", [one for one in gpu_cells.OURS if one != gpu_cells.TILES])
def test_only_what_is_dense_reads_every_key(books, path):
    """A path by codes that was not taken, or whose index could not be made, would read them too."""
    for batch, width, dtype in FORCED[1:]:
        cell = Cell("test", path, FORCED_ROWS, width, batch, dtype, MISSES)
        call_of(cell, books)
        assert gpu_on_host.reads_every_key(cell, "cuda") == (path in DENSE)


@pytest.mark.parametrize("asks", [MISSES, WRITTEN])
@pytest.mark.parametrize("path", gpu_cells.OURS)
def test_each_path_decides_as_the_law_in_a_graph(books, path, asks):
    for batch, width, dtype in FORCED:
        cell = Cell("test", path, FORCED_ROWS, width, batch, dtype, asks)
        call, book = call_of(cell, books)
        graph, answer = gpu_clock.captured(call, 3)
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        assert gpu_calls.wrong(cell, book, answer)[1] == 0


def test_one_query_that_is_not_finite_leaves_thousands_alone(books):
    for path in (gpu_cells.TILES, gpu_cells.CODE_TILES):
        cell = Cell("test", path, FORCED_ROWS, 100, 4096, "float16", gpu_cells.NAN)
        call, book = call_of(cell, books)
        assert gpu_calls.wrong(cell, book, call())[1] == 0


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_graph_sees_edits(backend):
    book = book_of(5000, 384)
    skip_unless_taken(backend, book, 4)
    gf.prepare(book, cuda_graphs=True)
    queries = queries_of(book, 4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gf.find(queries, book, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        match = gf.find(queries, book, backend=backend)
        hit, row = match.hit, match.row
    graph.replay()
    assert torch.equal(hit, law(queries, book)[0])
    for number in range(20):
        fresh = torch.randn(1, 384, device="cuda")
        book.append(fresh, torch.zeros(1, 8, device="cuda"), torch.ones(1))
        queries[number % 4] = fresh[0] + 1e-3
        graph.replay()
        torch.cuda.synchronize()
        expected = law(queries, book)
        assert torch.equal(hit, expected[0])
        assert torch.equal(row, expected[1])


def test_a_capture_that_would_not_see_edits_is_refused():
    book = book_of(300, 64)
    queries = queries_of(book, 2)
    gf.find(queries, book)

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            queries.mul_(1)  # a graph that nothing was captured into is warned of
            gf.find(queries, book)

    with pytest.raises(RuntimeError, match="would not see later edits"):
        capture()


def test_a_compiled_look_up_sees_edits_without_recompiling():
    book = book_of(500, 64)
    prepared = gf.prepare(book)
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    @torch.compile(backend=backend, fullgraph=True)
    def hits(queries):
        return prepared(queries).hit

    for number in range(100):
        fresh = torch.randn(1, 64, device="cuda")
        assert not bool(hits(fresh * 50).any())
        book.append(fresh * 50, torch.zeros(1, 8, device="cuda"), torch.ones(1))
        assert bool(hits(fresh * 50).all()), number
    assert len(graphs) == 1


def test_keys_keep_their_address_while_the_codebook_grows():
    book = book_of(100, 64)
    start = book.snapshot().key_slots.data_ptr()
    for _ in range(8):
        book.append(torch.randn(4000, 64, device="cuda"), torch.zeros(4000, 8), torch.ones(4000))
    assert book.snapshot().key_slots.data_ptr() == start


@pytest.mark.parametrize("mode", ["replace_all", "replace_last", "replace_prompt"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_replacing_in_place_is_replacing(backend, tokens, mode):
    book = book_of(5000, 384)
    skip_unless_taken(backend, book, 8)
    queries = queries_of(book, 8)
    output = torch.randn(8, tokens, 8, device="cuda")
    positions = torch.randint(tokens, (8,), device="cuda")
    expected = gf.replace(output, queries, book, positions, mode, backend="reference")
    written = lookup.replace_(output.clone(), queries, book, positions, mode, backend)
    assert torch.equal(written, expected)
