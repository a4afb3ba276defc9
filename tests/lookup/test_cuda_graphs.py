"""What a CUDA graph holds of a look-up, and what edits leave alone: recorded on a host."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from certified_cases import Data, book_of, law
from cuda_build import host_module
from torch.utils._python_dispatch import TorchDispatchMode

import grace_fast as gf
from grace_fast.index import maintained
from grace_fast.lookup import lookup
from grace_fast.lookup.backends import cpu, cuda, graphs

KEYS, RADII = Data(7).clusters(300, 24)
NODES = {"dense": ["dense_kernel"], "codes": ["encode_kernel", "indexed_kernel"]}


@pytest.fixture(scope="module")
def module():
    return host_module()


@pytest.fixture(autouse=True)
def engine(module, monkeypatch):
    """Let the engine for a GPU be the one that runs on the host, asked by whoever asks."""
    module.forget()
    module.take_launched()
    module.set_capture(0)
    monkeypatch.setattr(cuda, "_cuda", module)
    monkeypatch.setattr(lookup, "chosen", lambda *asked: cuda)
    monkeypatch.setattr(lookup, "_has_kernels_order", lambda output: True)
    monkeypatch.setattr(cpu, "ask", lambda queries, snapshot: None)


@pytest.fixture
def capture(module, monkeypatch):
    """Return what makes a `with` block one capture, of the number it is given."""

    @contextmanager
    def capturing(number=1):
        with monkeypatch.context() as within:
            within.setattr(graphs, "is_capturing", lambda snapshot: True)
            module.set_capture(number)
            yield
        module.set_capture(0)

    return capturing


@pytest.fixture(params=NODES)
def way(request, monkeypatch):
    """Look up by reading all keys, or by codes."""
    usual = cuda.Table.__init__

    def made(self, *arguments, **named):
        usual(self, *arguments, **named)
        self.indexed = request.param == "codes" and self.state is not None

    monkeypatch.setattr(cuda.Table, "__init__", made)
    return request.param


def kept_book():
    """Return a codebook that has codes and is kept for graphs."""
    book = book_of(KEYS, RADII.abs())
    cpu.view_of(book.snapshot())
    maintained.of(book.snapshot()).settle()
    cuda.keep_for_graphs(book)
    return book


class Operations(TorchDispatchMode):
    """Collects what torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


SAME_MEMORY = {"aten.detach.default"}  # another name for a tensor: nothing is launched


def test_a_captured_find_is_one_node_or_by_codes_two(module, way, capture):
    book, queries = kept_book(), KEYS[:5] + 0.01
    cuda.table_of(book.snapshot())
    with capture(), Operations() as asked:
        match = gf.find(queries, book)
    assert module.take_launched() == NODES[way]
    assert set(asked.names) - SAME_MEMORY == {"aten.empty.memory_format"}  # room for hit and row
    assert asked.names.count("aten.empty.memory_format") == 2
    assert torch.equal(match.row, law(queries, book.snapshot())[1])


@pytest.mark.parametrize("positions", [None, torch.tensor([0, 3, 90, 91, 5])], ids=["last", "told"])
@pytest.mark.parametrize("tokens", [1, 92])
@pytest.mark.parametrize("mode", cuda.MODES)
def test_a_captured_replacement_is_as_many_nodes_and_nothing_else(
    module, way, capture, mode, tokens, positions
):
    book, queries = kept_book(), KEYS[:5] + 0.01
    queries[2] += 40
    output = Data(3).normal(5, tokens, 2)
    expected = gf.replace(output, queries, book, positions, mode, backend="reference")
    module.take_launched()
    with capture(), Operations() as asked:
        assert lookup.replace_(output, queries, book, positions, mode) is output
    assert module.take_launched() == NODES[way]
    assert set(asked.names) <= SAME_MEMORY
    assert torch.equal(output, expected)


def test_look_ups_of_one_capture_share_a_workspace_that_was_there_before_it(
    module, capture, monkeypatch
):
    book = kept_book()
    listener = graphs.listening(book.snapshot(), cuda.NAME)
    ready = {spare.data_ptr() for spare in listener._spares}
    used = []
    usual = cuda.Table.lookup_in

    def noted(table, description, workspace):
        used.append(workspace.data_ptr())
        return usual(table, description, workspace)

    monkeypatch.setattr(cuda.Table, "lookup_in", noted)
    for number in (1, 2):
        with capture(number):
            gf.find(KEYS[:2], book)
            gf.find(KEYS[:9], book)
    assert used[0] == used[1] != used[2] == used[3]
    assert set(used) == ready
    gf.find(KEYS[:2], book)  # what two captures have taken is there again
    assert len(listener._spares) == cuda.SPARES
    assert not ready & {spare.data_ptr() for spare in listener._spares}


def test_a_capture_that_finds_no_workspace_takes_one_of_the_graph_and_says_so(capture, caplog):
    book = kept_book()
    for number in range(1, cuda.SPARES + 2):
        assert not caplog.records
        with capture(number):
            match = gf.find(KEYS[:4], book)
        assert torch.equal(match.row, law(KEYS[:4], book.snapshot())[1])
    assert "look up once before each capture" in caplog.text


def test_a_capture_without_preparation_is_refused(module, capture):
    book = book_of(KEYS, RADII.abs())
    gf.find(KEYS[:1], book)
    module.take_launched()
    with capture(), pytest.raises(RuntimeError, match=r"first call grace_fast\.prepare"):
        lookup.replace_(torch.zeros(1, 1, 2), KEYS[:1], book)
    assert not module.take_launched()


def test_a_version_that_is_read_is_not_written_to_by_edits(way):
    book, queries = kept_book(), KEYS[:6] + 0.01
    old = book.snapshot()
    table = cuda.table_of(old)
    listener = graphs.listening(old, cuda.NAME)
    described, told = table.book.clone(), listener._book.data_ptr()
    held = {name: tensor.clone() for name, tensor in table.tensors.items() if len(tensor) <= 300}
    for row in range(6):
        with book.writing() as draft:
            draft.set_radius(row, 1e-6)
            draft.set_key(row + 20, queries[row])
            draft.set_value(row, torch.ones(2))
        book.append(queries[row : row + 1], torch.zeros(1, 2), torch.full((1,), 0.1))
        assert listener._book.data_ptr() == told
        assert torch.equal(listener._book, cuda.table_of(book.snapshot()).book)
    assert torch.equal(table.book, described)
    for name, tensor in held.items():
        assert torch.equal(table.tensors[name], tensor), name
    for got, wanted in zip(table.find(queries), law(queries, old), strict=True):
        assert torch.equal(got, wanted)


class Stream:
    """A stream that remembers what it waited for."""

    def __init__(self, number):
        self.cuda_stream, self.waited = number, []

    def record_event(self):
        return f"event of {self.cuda_stream}"

    def wait_event(self, event):
        self.waited.append(event)


def test_another_stream_waits_for_a_version_and_keeps_its_memory(monkeypatch):
    mine, other = Stream(1), Stream(2)
    lent = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, on: lent.append((tensor, on)))
    monkeypatch.setattr(cuda, "_current_stream", lambda device: mine)
    table = cuda.table_of(book_of(KEYS, RADII.abs()).snapshot())
    table.find(KEYS[:1])
    assert not lent
    monkeypatch.setattr(cuda, "_current_stream", lambda device: other)
    for _ in range(2):
        assert torch.equal(table.find(KEYS[:3])[1], law(KEYS[:3], table.snapshot)[1])
    assert other.waited == ["event of 1"]
    assert not mine.waited
    assert {id(tensor) for tensor, on in lent if on is other} == {
        id(tensor) for tensor in (table.book, *table.tensors.values())
    }


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_memory_that_ends_at_an_edit_refuses_it_and_the_old_version_serves(
    capture, monkeypatch, error
):
    book, queries = kept_book(), KEYS[:4] + 0.01
    with capture():
        captured = cuda.table_of(book.snapshot())._lookup()[0]
    old = book.snapshot()

    def full(*arguments, **named):
        raise error

    with monkeypatch.context() as at_its_end:
        at_its_end.setattr(cuda, "Table", full)
        with pytest.raises(MemoryError, match="no room"):
            book.append(queries, torch.zeros(4, 2), torch.ones(4))
    assert (book.snapshot().version, book.snapshot().rows) == (old.version, old.rows)
    hit, row = torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    captured.find(*cuda.asked(queries), hit.data_ptr(), row.data_ptr(), 0, 0)
    for got in (row, gf.find(queries, book).row):
        assert torch.equal(got, law(queries, old)[1])
    book.append(queries, torch.zeros(4, 2), torch.ones(4))
    captured.find(*cuda.asked(queries), hit.data_ptr(), row.data_ptr(), 0, 0)
    assert torch.equal(row, law(queries, book.snapshot())[1])


def test_a_distance_is_computed_when_it_is_read_from_the_version_that_answered(module):
    book, queries = kept_book(), KEYS[:9] + 0.01
    wanted = law(queries, book.snapshot())[2]
    match = gf.find(queries, book)
    book.remove(int(book.ids[0]))
    module.take_launched()
    assert torch.equal(match.squared_distance, wanted)
    assert len(module.take_launched()) >= 1
    assert torch.equal(match.distance, wanted.sqrt().float())
    assert not module.take_launched()


def test_a_distance_whose_queries_were_written_to_is_refused():
    book, queries = kept_book(), KEYS[:2] + 0.01
    match = gf.find(queries, book)
    queries += 1
    with pytest.raises(RuntimeError, match="queries were written to since they were looked up"):
        _ = match.squared_distance
    assert match.hit[0]


def test_a_distance_of_a_captured_look_up_is_read_inside_the_capture(module, way, capture):
    book, queries = kept_book(), KEYS[:2] + 0.01
    with capture():
        match, late = gf.find(queries, book), gf.find(queries, book)
        assert torch.equal(match.squared_distance, law(queries, book.snapshot())[2])
    assert module.take_launched() == 3 * NODES[way]
    with pytest.raises(RuntimeError, match="read them inside the capture"):
        _ = late.distance
    outside = gf.find(queries, book)
    with capture(), pytest.raises(RuntimeError, match="read them before a capture"):
        _ = outside.distance
