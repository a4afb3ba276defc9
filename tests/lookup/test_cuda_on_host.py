"""The GPU look-up decides as the law does: the same kernels, run on a host by fibers.

Every launch takes the threads of all its blocks in another order, and what a block writes reaches
another when it is published; what is not seen is in cuda_on_host/on_host.h.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from cases import CASES, codebooks
from certified_cases import KINDS, Data, book_of, law
from cuda_build import host_module
from hypothesis import given, settings

import grace_fast as gf
from grace_fast import semantics
from grace_fast.index import maintained, segments
from grace_fast.lookup.backends import cpu, cuda, graphs
from grace_fast.lookup.backends.workload import Workload

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def module():
    return host_module()


@dataclass
class Shape:
    """How a look-up is dealt out."""

    blocks: int = 3
    threads: int = 64
    seed: int = 0


def table_of(module, book, shape, certified=False):
    """Return a version for the kernels; loads are checked against the memory it takes."""
    snapshot = book.snapshot()
    state, widest = None, float("inf")
    if certified:
        view = settled_view(book)
        state, widest = view.made_from, view.widest
        assert state is not None
    table = cuda.Table(module, snapshot, state, widest, shape.blocks)
    module.set_order(shape.seed, shape.threads)
    announce(module, table.book, *table.tensors.values())
    return table


def announce(module, *tensors):
    for tensor in tensors:
        module.announce(tensor.data_ptr(), tensor.untyped_storage().nbytes())


@pytest.fixture(autouse=True)
def _forget(module):
    module.forget()


def settled_view(book):
    cpu.view_of(book.snapshot())
    maintained.of(book.snapshot()).settle()
    return cpu.view_of(book.snapshot())


def assert_decides_as_the_law(table, queries):
    expected = law(queries, table.snapshot)
    parts = [table.find(part) for part in queries.split(cuda.MOST_QUERIES)]
    found = [torch.cat(column) for column in zip(*parts, strict=True)]
    for name, got, wanted in zip(("hit", "row", "S"), found, expected, strict=True):
        wrong = (got != wanted).nonzero().flatten().tolist()
        assert not wrong, (name, wrong[:5], got[wrong[:5]], wanted[wrong[:5]])


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_named_cases(module, name, blocks):
    case = CASES[name]
    if len(case.queries):
        table = table_of(module, case.book(), Shape(blocks, seed=blocks))
        assert_decides_as_the_law(table, case.queries)


@given(case=codebooks())
@settings(max_examples=60)
def test_drawn_cases(module, case):
    assert_decides_as_the_law(table_of(module, case.book(), Shape(2)), case.queries)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("certified", [False, True], ids=["dense", "certified"])
@pytest.mark.parametrize("kind", KINDS)
def test_hard_data(module, monkeypatch, kind, certified, seed):
    """Several runs with boxes and a tail, or few keys without; edits since; strange queries."""
    if cpu._cpu is None:
        pytest.skip("grace_fast._cpu was not built")
    drawn, data = random.Random(f"{kind} {seed}"), Data(seed)
    monkeypatch.setattr(segments, "ORDER_ROWS", 200)
    monkeypatch.setattr(maintained, "DELTA_ROWS", drawn.choice((30, 16384)))
    rows, width = drawn.choice((60, 300, 1500)), drawn.choice((3, 16, 33, 64, 100))
    dtype, batch = drawn.choice(DTYPES), drawn.choice((1, 5, 32))
    keys, radii = getattr(data, kind)(rows, width)
    book = book_of(keys, radii, dtype)
    settled_view(book)
    if drawn.random() < 0.6:
        edit(book, data, kind, rows, width, dtype)
    if certified and drawn.random() < 0.3:  # rows without a code
        monkeypatch.setattr(maintained, "INLINE_ROWS", 0)
        monkeypatch.setattr(maintained.Index, "_build_if_needed", lambda self: None)
        more, more_radii = getattr(data, kind)(20, width)
        book.append(more.to(dtype), torch.zeros(20, 2, dtype=dtype), more_radii)
    queries = data.queries(keys, radii, batch).to(drawn.choice(DTYPES))
    queries[0, -1] = torch.nan
    if batch > 2 and queries.dtype == torch.float32:
        queries[1], queries[2, 0] = 1e30, 3e38
    shape = Shape(drawn.choice((1, 2, 5)), drawn.choice((32, 64, 160)), seed)
    table = table_of(module, book, shape, certified)
    for _ in range(2):  # what a launch leaves behind must not matter to the next
        assert_decides_as_the_law(table, queries)


def test_rows_without_a_code_are_read_as_they_are(module, monkeypatch):
    data = Data(6)
    book = book_of(data.normal(300, 20), torch.full((300,), 0.2))
    settled_view(book)
    monkeypatch.setattr(maintained, "INLINE_ROWS", 0)
    monkeypatch.setattr(maintained.Index, "_build_if_needed", lambda self: None)
    keys = data.normal(20, 20)
    book.append(keys, torch.zeros(20, 2), torch.full((20,), 0.2))
    table = table_of(module, book, Shape(2), certified=True)
    assert table.find(keys)[1].tolist() == list(range(300, 320))
    assert_decides_as_the_law(table, keys)


@pytest.mark.parametrize("seed", range(6))
def test_several_super_leaves_of_one_block(module, seed):
    """A block comes back to its list of leaves, which it has emptied meanwhile."""
    data = Data(seed)
    keys, radii = data.clusters(17000, 10)
    table = table_of(module, book_of(keys, radii), Shape(1, 64, seed), certified=True)
    assert len(table.tensors["node_max_radius 0"]) == 5
    assert_decides_as_the_law(table, data.queries(keys, radii, 12))


def edit(book, data, kind, rows, width, dtype):
    more, radii = getattr(data, kind)(40, width)
    book.append(more.to(dtype), torch.zeros(40, 2, dtype=dtype), radii)
    ids = book.ids
    with book.writing() as draft:
        for row in range(3, rows, 50):
            draft.set_key(row, more[row % 40].to(dtype))
        for row in range(5, rows, 60):
            draft.set_radius(row, 2.0)
    for row in range(0, rows, 7):
        book.remove(int(ids[row]))


def near_ties(rows, width, spread, radius=2.0):
    """Keys at distance 1 + something that float32 sums do not see, the nearest at the end."""
    keys = torch.zeros(rows, width)
    keys[:, 0] = 1
    keys[:, 1] = spread * torch.arange(rows, 0, -1) / rows
    return torch.zeros(2, width), keys, torch.full((rows,), radius)


@pytest.mark.parametrize("certified", [False, True], ids=["dense", "certified"])
@pytest.mark.parametrize("rows", [50, 300])
def test_ties_that_float32_does_not_see(module, rows, certified):
    queries, keys, radii = near_ties(rows, 20, 3e-5)
    squared = (keys.double() ** 2).sum(dim=1)
    assert 0 < float(squared.max() - squared.min()) < 1e-9
    table = table_of(module, book_of(keys, radii), Shape(2), certified)
    assert_decides_as_the_law(table, queries)
    assert table.find(queries)[1].tolist() == [rows - 1, rows - 1]


@pytest.mark.parametrize("certified", [False, True], ids=["dense", "certified"])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_radius_a_rounding_away_decides(module, wanted, certified):
    queries, keys, radii = near_ties(60, 20, 3e-5)
    distance = float((keys[-1].double() ** 2).sum().sqrt())
    radius = torch.tensor(distance, dtype=torch.float32)
    while (float(radius) >= distance) != wanted:
        radius = torch.nextafter(radius, torch.tensor(9.0 if wanted else 0.0))
    radii[-1] = radius
    table = table_of(module, book_of(keys, radii), Shape(2), certified)
    assert table.find(queries)[0].tolist() == [wanted, wanted]
    assert_decides_as_the_law(table, queries)


def test_more_survivors_than_a_list_holds(module, monkeypatch):
    monkeypatch.setattr(segments, "ORDER_ROWS", 200)
    data = Data(5)
    keys = data.normal(1, 12).repeat(1400, 1) + 1e-4 * data.normal(1400, 12)
    book = book_of(keys, torch.full((1400,), 0.5))
    queries = keys[[3, 700, 1399]] + 1e-5
    table = table_of(module, book, Shape(1, 64), certified=True)
    assert_decides_as_the_law(table, queries)


def test_a_shorter_reach_hides_no_nearer_key(module, monkeypatch):
    """The query is outside the ball of its nearest key, which is beyond the reach of its leaf.

    A farther key's ball holds it: that would be a hit, were the nearest key not looked for again.
    """
    monkeypatch.setattr(segments, "ORDER_ROWS", 200)
    keys = 0.02 * Data(3).normal(640, 16).clamp(-3, 3)
    keys[320:, 0] += 8  # five leaves of 64 each: none holds keys of both
    keys[450, 0] = 7.7
    radii = torch.full((640,), 0.5)
    radii[450] = 5.0
    queries = torch.zeros(3, 16)
    queries[:, 0] = torch.tensor([3.5, 4.4, 7.0])
    table = table_of(module, book_of(keys, radii), Shape(3, 64), certified=True)
    assert_decides_as_the_law(table, queries)
    assert table.find(queries)[1].tolist() == [-1, 450, 450]


def test_a_certified_miss_reads_no_key(module, monkeypatch):
    """Were one read, it would be the query itself, and hit."""
    monkeypatch.setattr(segments, "ORDER_ROWS", 200)
    data = Data(2)
    keys = data.normal(700, 48)
    book = book_of(keys, torch.full((700,), 0.2))
    table = table_of(module, book, Shape(3, 64), certified=True)
    queries = data.normal(4, 48)
    assert not table.find(queries)[0].any()
    table.tensors["keys"][:700] = queries[2]
    assert not table.find(queries)[0].any()


def assert_shared(module, blocks):
    """Every block has loaded about as much as the others."""
    loads = module.loads()
    assert len(loads) == blocks
    assert max(loads) < 1.5 * sum(loads) / blocks, loads


def test_a_query_too_large_to_project_is_read_by_all_blocks(module):
    data = Data(11)
    table = table_of(
        module, book_of(data.normal(400, 64), torch.full((400,), 0.2)), Shape(4, 64), certified=True
    )
    queries = data.normal(32, 64)
    table.find(queries)
    codes = sum(module.loads())
    queries[9] = 1e30
    assert_decides_as_the_law(table, queries)
    assert sum(module.loads()) >= codes + 400 * 64 * 4 / 16 * 0.9
    assert_shared(module, 4)


def test_a_query_too_large_to_project_hits_where_a_ball_holds_it(module):
    keys = Data(12).normal(300, 20)
    book = book_of(keys, torch.full((300,), 0.2))
    settled_view(book)
    with book.writing() as draft:
        for row in range(300):
            draft.set_radius(row, 1e17)
    queries = torch.full((3, 20), 3e15)  # in float32 as far from one key as from another
    queries[1] *= -1
    queries[2] = 1e17
    table = table_of(module, book, Shape(4, 64), certified=True)
    assert table.find(queries)[0].tolist() == [True, True, False]
    assert_decides_as_the_law(table, queries)


def test_a_query_that_is_not_finite_reads_nothing(module):
    data = Data(13)
    keys, radii = data.clusters(400, 64)
    table = table_of(module, book_of(keys, radii), Shape(4, 64), certified=True)
    queries = keys[:32].clone()
    queries[:, 5] = torch.nan
    queries[16:, 5] = torch.inf
    assert not table.find(queries)[0].any()
    assert module.loads() == [0, 0, 0, 0]


def test_near_ties_are_looked_at_again_by_the_blocks_that_have_them(module):
    """Equal keys fill every block's share; the lowest row decides."""
    data = Data(14)
    keys = data.normal(1, 64).repeat(800, 1)
    keys[:80] += 3
    table = table_of(module, book_of(keys, torch.full((800,), 0.5)), Shape(4, 64), certified=True)
    queries = keys[[700, 3]] + 1e-3
    assert table.find(queries[:1])[1].tolist() == [80]
    assert_shared(module, 4)
    assert_decides_as_the_law(table, queries)


def test_nothing_of_a_workspace_but_its_counters_has_to_be_zero(module):
    data = Data(15)
    keys, radii = data.clusters(300, 48)
    for certified in (False, True):
        table = table_of(module, book_of(keys, radii), Shape(4, 64), certified)
        workspace = cuda._workspace(module, table.device, 0, 48, 4)
        for batch in (1, 5, 32):
            workspace[module.COUNTER_BYTES :] = 255  # NaNs, and states that there are not
            queries = data.queries(keys, radii, batch)
            queries[0, 0] = torch.nan
            assert_decides_as_the_law(table, queries)


@pytest.mark.parametrize("rows", [9, 200])
@pytest.mark.parametrize("width", [264, 1032, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_wider_than_what_a_warp_reads_at_a_time(module, dtype, width, rows):
    """They go through the ring in several stages; few rows take fewer keys a stage than many."""
    data = Data(width + rows)
    keys, radii = data.clusters(rows, width)
    book = book_of(keys, radii.abs(), dtype)
    book.remove(int(book.ids[rows // 2]))
    with book.writing() as draft:
        draft.set_key(1, keys[0].to(dtype))  # a tie
    for batch, threads in ((1, 64), (3, 32), (11, 64)):
        queries = data.queries(keys, radii, batch).to(dtype)
        queries[0] = keys[0]
        table = table_of(module, book, Shape(2, threads, batch))
        assert_decides_as_the_law(table, queries)


def test_the_number_of_rows_is_read_on_the_device(module):
    data = Data(8)
    keys, radii = data.clusters(100, 24)
    book = book_of(keys, radii.abs())
    table = table_of(module, book, Shape(2))
    at = module.ROWS_OFFSET
    for rows in (0, 1, 37, 100):
        table.book[at : at + 8] = torch.tensor([rows]).view(torch.uint8)
        hit, row, _ = table.find(keys[[0, 36, 37, 99]])
        squared = torch.cdist(keys[[0, 36, 37, 99]], keys[:rows]).square()
        for i in range(4):
            inside = rows > 0 and bool(squared[i].min() <= radii[int(squared[i].argmin())] ** 2)
            assert bool(hit[i]) == inside
            assert int(row[i]) < rows


def test_tickets_are_zero_after_every_launch(module):
    data = Data(1)
    keys, radii = data.clusters(300, 16)
    for certified in (False, True):
        table = table_of(module, book_of(keys, radii), Shape(4, 64), certified)
        for batch in (1, 4, 9, 32):
            table.find(data.queries(keys, radii, batch))
            table.replace_(torch.zeros(batch, 20, 2), data.queries(keys, radii, batch))
            workspace = cuda._workspace(module, table.device, 0, 16, 4)
            assert not workspace[: module.COUNTER_BYTES].any()


@pytest.mark.parametrize("mode", cuda.MODES)
@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 11, 70])
@pytest.mark.parametrize("value_width", [16, 5])
def test_values_are_written_where_the_mode_says(module, output_dtype, tokens, value_width, mode):
    """By one block where tokens are few, by all that are there where they are many."""
    data = Data(4)
    keys, radii = data.clusters(80, 20)
    for seed, dtype in enumerate(DTYPES):
        book = gf.Codebook(20, value_width, dtype)
        book.append(keys.to(dtype), data.normal(80, value_width).to(dtype), radii.abs())
        with book.writing() as draft:
            draft.set_value(7, torch.ones(value_width, dtype=dtype))
        table = table_of(module, book, Shape(1 + 2 * seed, seed=seed + tokens), seed == 2)
        queries = keys[[3, 7, 50, 9, 11]].to(dtype)
        queries[2] += 40
        whole = data.normal(5, tokens, value_width + 8).to(output_dtype)
        positions = torch.tensor([tokens - 1, tokens // 2, 0, tokens + 3, -1])
        hit, row, _ = law(queries, table.snapshot)
        assert hit.tolist() == [True, True, False, True, True]
        values = table.snapshot.values_of(row).to(output_dtype)
        for asked in (positions, None):
            at = torch.full((5,), tokens - 1) if asked is None else asked
            mask = semantics.replacement_mask(mode, at, tokens)
            expected = whole.clone()
            inside = semantics.replace(whole[:, :, :value_width], hit, values, mask)
            expected[:, :, :value_width] = inside
            table.replace_(whole[:, :, :value_width], queries, asked, mode)
            assert torch.equal(whole, expected)
            whole.neg_()


@pytest.mark.parametrize("certified", [False, True], ids=["dense", "certified"])
def test_without_sums_the_decision_is_the_same(module, certified):
    data = Data(9)
    keys, radii = data.clusters(500, 24)
    table = table_of(module, book_of(keys, radii), Shape(3), certified)
    queries = data.queries(keys, radii, 32)
    hit, row, nothing = table.find(queries, sums=False)
    expected = law(queries, table.snapshot)
    assert nothing is None
    assert torch.equal(hit, expected[0])
    assert torch.equal(row, expected[1])


def test_what_cannot_be_asked_is_refused(module):
    table = table_of(module, book_of(torch.zeros(3, 4), torch.ones(3)), Shape(1))
    with pytest.raises(ValueError, match=r"1 \.\. 32 queries"):
        table.find(torch.zeros(33, 4))
    with pytest.raises(ValueError, match="output must be"):
        table.replace_(torch.zeros(1, 1, 3), torch.zeros(1, 4))
    columns = dict.fromkeys(("keys", "key_slot", "live", "radius", "values", "value_slot"), 0)
    sizes = {"covered": 0, "widest": 0.0, "min_radius": 0.0, "projection": None}
    with pytest.raises(ValueError, match="2\\^31"):
        module.pack_book(columns=columns, **sizes, rows=2**31, segments=[])
    with pytest.raises(ValueError, match="at most 16 parts"):
        module.pack_book(columns=columns, **sizes, rows=1, segments=[{}] * 17)


def test_the_workload_says_why_not():
    assert "not on a CUDA GPU" in str(cuda.why_not(Workload("cpu", torch.float32, 1, 9, 4)))
    if not torch.cuda.is_available():
        assert cuda.why_not(Workload("cuda", torch.float32, 1, 9, 4))


def test_a_table_takes_what_has_not_changed_from_an_earlier_one(module, monkeypatch):
    if cpu._cpu is None:
        pytest.skip("grace_fast._cpu was not built")
    monkeypatch.setattr(segments, "ORDER_ROWS", 200)
    data = Data(5)
    keys, radii = data.clusters(700, 24)
    book = book_of(keys, radii)
    queries = data.queries(keys, radii, 24)
    settled_view(book)
    previous = captured = None
    listener = cuda.Listener()
    for number in range(4):
        snapshot = book.snapshot()
        with maintained.of(snapshot).held(snapshot) as state:
            table = cuda.Table(module, snapshot, state, snapshot.widest, 2)
        module.forget()
        announce(module, table.book, *table.tensors.values())
        assert_decides_as_the_law(table, queries)
        if previous is None:
            # What a graph holds: an address of a description, and its own queries and answers.
            listener.hold(table)
            captured = listener.lookup(0)
        else:
            assert table.tensors["near 0"].data_ptr() == previous.tensors["near 0"].data_ptr()
            assert table.book.data_ptr() != previous.book.data_ptr()
            listener.hold(table)
            announce(module, listener._book)
            hit, row = torch.zeros(24, dtype=torch.bool), torch.zeros(24, dtype=torch.int64)
            captured.find(*cuda.asked(queries), hit.data_ptr(), row.data_ptr(), 0, 0)
            wanted = law(queries, snapshot)
            assert torch.equal(hit, wanted[0])
            assert torch.equal(row, wanted[1])
        previous = table
        with book.writing() as draft:
            draft.set_radius(number, 3.0 + number)
        book.append(queries[number : number + 1], torch.zeros(1, 2), torch.full((1,), 0.1))
        book.remove(int(book.ids[50 + number]))


def test_a_captured_look_up_sees_every_edit_before_it_is_published(module, monkeypatch):
    """A graph holds the address of a description, which is that of the newest version."""
    monkeypatch.setattr(cuda, "_cuda", module)
    data = Data(7)
    keys, radii = data.clusters(300, 24)
    book = book_of(keys, radii.abs())
    queries = data.queries(keys, radii, 8)
    settled_view(book)
    with monkeypatch.context() as capture:
        capture.setattr(graphs, "is_capturing", lambda snapshot: True)
        with pytest.raises(RuntimeError, match="would not see later edits"):
            cuda.find(queries, book.snapshot())
    cuda.keep_for_graphs(book)
    with monkeypatch.context() as capture:
        capture.setattr(graphs, "is_capturing", lambda snapshot: True)
        captured = cuda.table_of(book.snapshot())._lookup()[0]
    for number in range(6):
        hit, row = torch.zeros(8, dtype=torch.bool), torch.zeros(8, dtype=torch.int64)
        captured.find(*cuda.asked(queries), hit.data_ptr(), row.data_ptr(), 0, 0)
        wanted = law(queries, book.snapshot())
        assert torch.equal(hit, wanted[0]), number
        assert torch.equal(row, wanted[1]), number
        with book.writing() as draft:
            draft.set_radius(number, 0.5 + number)
            draft.set_key(10 + number, queries[number])
        book.append(queries[number : number + 1] + 0.01, torch.zeros(1, 2), torch.full((1,), 0.1))
        if number == 3:
            known = maintained.of(book.snapshot())
            known.current, known._build_if_needed = None, lambda: None
