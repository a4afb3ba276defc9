"""The compiled look-up decides as the law does, on every path, after every kind of edit."""

import math
import threading
import weakref
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
from certified_cases import KINDS, Data, book_of, law

import grace_fast as gf
from grace_fast import semantics
from grace_fast.index import maintained, native_view
from grace_fast.lookup.backends import cpu

pytestmark = pytest.mark.skipif(cpu._cpu is None, reason="grace_fast._cpu was not built")

SETS = [name for name in ("portable", "avx2", "avx512vnni") if cpu._cpu]


@pytest.fixture(params=SETS)
def instruction_set(request):
    usual = cpu._cpu.instruction_set()
    if not cpu._cpu.use_instruction_set(request.param):
        emulated = "a build with GRACE_FAST_EMULATE_AVX512=1 runs its source"
        pytest.skip(f"this processor has no {request.param}; {emulated}")
    yield request.param
    cpu._cpu.use_instruction_set(usual)


@contextmanager
def choosing(certified, snapshot):
    """Look a version up by its certificate, or by reading all keys, whatever is predicted."""
    version = cpu.view_of(snapshot).version
    usual = version.indexed_up_to
    version.indexed_up_to = native_view.ANY_BATCH if certified else 0
    try:
        yield
    finally:
        version.indexed_up_to = usual


def decide_as_the_law(book, queries):
    """Compare every path on every query; return how many decisions that were."""
    snapshot = book.snapshot() if isinstance(book, gf.Codebook) else book
    expected = law(queries, snapshot)
    decisions = 0
    for certified in (True, False):
        with choosing(certified, snapshot):
            found = cpu.find(queries, snapshot)
        for name, got, wanted in zip(("hit", "row", "S"), found, expected, strict=True):
            assert torch.equal(got, wanted), (name, certified, (got != wanted).nonzero()[:5])
        decisions += len(queries)
    return decisions


def settled(book):
    gf.prepare(book)
    view = cpu.view_of(book.snapshot())
    assert view.plan is not None
    return book


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_small_codebook_decides_as_the_law(kind, dtype, instruction_set):
    data = Data(hash_of(kind))
    keys, radii = getattr(data, kind)(700, 24)
    book = settled(book_of(keys, radii, dtype))
    queries = data.queries(book.keys, radii, 1200)
    assert decide_as_the_law(book, queries) == 2400


@pytest.mark.parametrize("kind", KINDS)
def test_an_ordered_codebook_decides_as_the_law(kind, instruction_set):
    data = Data(hash_of(kind) + 1)
    keys, radii = getattr(data, kind)(5500, 20)
    book = settled(book_of(keys, radii))
    view = cpu.view_of(book.snapshot())
    assert view.made_from.segments[0].leaf_boxes is not None
    decide_as_the_law(book, data.queries(keys, radii, 1000))


@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 63, 65, 130, 1000])
def test_any_width_decides_as_the_law(width, instruction_set):
    data = Data(width)
    keys, radii = data.clusters(300, width)
    for dtype in (torch.float32, torch.bfloat16):
        book = settled(book_of(keys, radii, dtype))
        decide_as_the_law(book, data.queries(book.keys, radii, 150))


def hash_of(name):
    return sum(map(ord, name))


@pytest.mark.parametrize("rows", [300, 5000])
def test_edits_are_seen_at_once_and_old_versions_stay(rows):
    data = Data(rows)
    keys, radii = data.clusters(rows, 20)
    book = settled(book_of(keys, radii))
    versions = [book.snapshot()]
    for step in range(25):
        row = int(torch.randint(rows, (1,), generator=data.random))
        with book.writing() as draft:
            draft.set_radius(row, float(data.uniform(1)) * 2)
            draft.set_key((row + 1) % rows, book.keys[row] + 0.01 * data.normal(20))
            if step % 3 == 0:
                added = data.some(keys, 3) + 0.02 * data.normal(3, 20)
                draft.append(added, torch.zeros(3, 2), torch.rand(3), None)
            decide_as_the_law(draft.snapshot(), data.queries(keys, radii, 8))
        if book.live[(row + 2) % rows]:
            book.remove(int(book.ids[(row + 2) % rows]))
        queries = torch.cat([data.queries(book.keys, book.radii, 40), book.keys[row : row + 1]])
        decide_as_the_law(book, queries)
        versions.append(book.snapshot())
    for version in versions[::5]:
        decide_as_the_law(version, data.queries(keys, radii, 40))


def test_a_dropped_draft_leaves_no_code_behind():
    data = Data(3)
    keys, radii = data.clusters(300, 12)
    book = settled(book_of(keys, radii))
    with suppress(RuntimeError), book.writing() as draft:
        draft.append(keys[:5] + 9, torch.zeros(5, 2), torch.ones(5), None)
        decide_as_the_law(draft.snapshot(), keys[:5] + 9)
        raise RuntimeError
    book.append(keys[:5] - 9, torch.zeros(5, 2), torch.ones(5))
    decide_as_the_law(book, torch.cat([keys[:5] + 9, keys[:5] - 9]))


def test_a_codebook_that_grows_from_nothing_refits_and_sorts(monkeypatch):
    monkeypatch.setattr(maintained, "DELTA_ROWS", 500)
    monkeypatch.setattr("grace_fast.index.segments.ORDER_ROWS", 256)
    data = Data(5)
    keys, radii = data.clusters(6000, 16)
    book = book_of(keys[:1], radii[:1])
    at, runs = 1, 0
    while at < 6000:
        count = min(int(torch.randint(1, 400, (1,), generator=data.random)), 6000 - at)
        book.append(keys[at : at + count], torch.zeros(count, 2), radii[at : at + count])
        at += count
        decide_as_the_law(book, data.queries(keys[:at], radii[:at], 40))
        if at % 2:
            gf.prepare(book)
        state = cpu.view_of(book.snapshot()).made_from
        runs = max(runs, len(state.segments) if state else 0)
        decide_as_the_law(book, data.queries(keys[:at], radii[:at], 40))
    assert runs > 1, "no run was added beside another"


def test_look_ups_while_another_thread_edits_are_right():
    data = Data(8)
    keys, radii = data.clusters(3000, 16)
    book = settled(book_of(keys, radii))
    stop = threading.Event()

    def edit():
        mine = Data(9)
        while not stop.is_set():
            row = int(torch.randint(3000, (1,), generator=mine.random))
            with book.writing() as draft:
                draft.set_radius(row, float(mine.uniform(1)))
                if draft.rows < 8000:
                    draft.append(keys[row : row + 1] + 0.1, torch.zeros(1, 2), torch.ones(1), None)

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        for _ in range(30):
            decide_as_the_law(book.snapshot(), data.queries(keys, radii, 30))
    finally:
        stop.set()
        editor.join()


def test_the_isolated_bit_falls_with_what_it_was_seen_on():
    data = Data(11)
    keys = data.normal(500, 20) * 3
    radii = torch.full((500,), 0.2)
    radii[:20] = 1.0
    book = settled(book_of(keys, radii))
    part = cpu.view_of(book.snapshot()).made_from.segments[0]
    assert part.isolated.any()
    queries = keys[:20] + 0.9 * torch.nn.functional.normalize(data.normal(20, 20), dim=1)
    decide_as_the_law(book, queries)
    book.append(queries[:10] + 0.01, torch.zeros(10, 2), torch.full((10,), -1.0))
    decide_as_the_law(book, queries)
    with book.writing() as draft:
        for row in range(10, 20):
            draft.set_key(row + 100, queries[row] + 0.01)
    decide_as_the_law(book, queries)


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf"), 3e38, -1e30, 1e-40])
def test_a_query_that_is_not_finite_misses_and_a_huge_one_is_right(fill, instruction_set):
    data = Data(4)
    keys, radii = data.clusters(200, 70)
    book = settled(book_of(keys, radii))
    queries = keys[:6].clone()
    queries[1, 69] = fill
    queries[3, 0] = fill
    queries[5] = fill
    expected = law(queries, book.snapshot())
    for certified in (True, False):
        with choosing(certified, book.snapshot()):
            hit, row, squared = cpu.find(queries, book.snapshot())
        assert torch.equal(hit, expected[0])
        assert torch.equal(row, expected[1])
        assert torch.equal(squared, expected[2])
    assert hit[0]
    if fill - fill != 0:  # not finite
        assert not hit[[1, 3, 5]].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e25])
def test_keys_of_any_size_are_right(scale):
    data = Data(6)
    keys, radii = data.clusters(300, 24)
    book = book_of(keys * scale, radii * scale)
    gf.find(keys[:1], book)
    gf.prepare(book)
    decide_as_the_law(book, data.queries(keys * scale, radii * scale, 200))


def test_degenerate_codebooks_are_right(instruction_set):
    one = torch.ones(1, 5)
    for keys, radii in (
        (one, torch.zeros(1)),
        (one.repeat(300, 1), torch.full((300,), 0.5)),
        (one.repeat(300, 1), torch.zeros(300)),
        (one.repeat(300, 1), torch.full((300,), -1.0)),
        (Data(1).normal(300, 5), torch.zeros(300)),
    ):
        book = book_of(keys, radii)
        cpu.find(one, book.snapshot())
        gf.prepare(book)
        queries = torch.cat([keys[:20], keys[:20] + 0.5 / 5**0.5, one + 1e-7])
        decide_as_the_law(book, queries)


def test_offsets_past_2_31_are_right():
    width, rows = 32768, 66000  # 2.2e9 elements of address space; few of them are ever touched
    book = gf.Codebook(width, 1, dtype=torch.float16, reserve_rows=rows)
    book.append(torch.ones(60, width).half(), torch.zeros(60, 1).half(), torch.ones(60))
    book._slots.keys.commit(rows)
    book._slots.keys.tensor[rows - 1] = 2
    with book.writing() as draft:
        draft.point_key(7, rows - 1)
    query = torch.full((1, width), 2.0)
    assert gf.find(query, book).row.tolist() == [7]
    gf.prepare(book)
    assert gf.find(query, book).row.tolist() == [7]
    assert gf.nearest(query, book).row.tolist() == [7]


def test_strided_queries_are_read_where_they_are():
    data = Data(2)
    keys, radii = data.clusters(300, 64)
    book = settled(book_of(keys, radii))
    tokens = data.queries(keys, radii, 120).view(40, 3, 64)
    for queries in (tokens[:, -1], tokens[::2, 0], tokens[:, 1].T.contiguous().T, tokens[0, :0]):
        expected = law(queries, book.snapshot()) if len(queries) else None
        match = gf.prepare(book)(queries)
        assert len(match.hit) == len(queries)
        if expected:
            assert torch.equal(match.row, expected[1])
            assert torch.equal(gf.find(queries, book).row, expected[1])


def test_a_prepared_look_up_sees_edits_and_refuses_what_find_refuses():
    data = Data(12)
    keys, radii = data.clusters(300, 16)
    book = book_of(keys, radii)
    prepared = gf.prepare(book)
    stranger = torch.full((1, 16), 50.0)
    assert prepared(stranger).hits == 0
    book.append(stranger, torch.zeros(1, 2), torch.ones(1))
    assert prepared(stranger).row.tolist() == [300]
    book.remove(int(book.ids[300]))
    assert prepared(stranger).hits == 0
    with pytest.raises(ValueError, match=r"queries must be \[B, 16\], got \(1, 15\)"):
        prepared(torch.zeros(1, 15))
    with pytest.raises(ValueError, match="queries must be float32, bfloat16 or float16"):
        prepared(torch.zeros(1, 16, dtype=torch.float64))


def test_nearest_is_the_law_on_every_path(instruction_set):
    for kind in ("ties", "massive", "clusters"):
        data = Data(hash_of(kind))
        keys, radii = getattr(data, kind)(900, 40)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            book = book_of(keys, radii, dtype)
            book.remove(3)
            queries = data.queries(book.keys, radii, 103)
            for batch in (queries, queries[:1], queries[:2], queries[:7]):
                got = cpu.nearest(batch, book.snapshot())
                wanted = semantics.nearest(batch, book.keys, book.live)
                assert torch.equal(got[0], wanted[0])
                assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("kind", ["ties", "massive", "clusters"])
def test_the_nearest_key_within_a_distance_is_the_law(instruction_set, kind, monkeypatch):
    monkeypatch.setattr(
        native_view.NativeView, "keys_pay", property(lambda view: view.plan is not None)
    )
    data = Data(hash_of(kind) + 1)
    keys, radii = getattr(data, kind)(900, 40)
    book = settled(book_of(keys, radii))
    book.remove(3)
    queries = data.queries(book.keys, radii, 103)
    row, squared = semantics.nearest(queries, book.keys, book.live)
    exact = squared.sqrt().median().item()
    for within in (0.0, float(radii.clamp(min=0).median()), exact, 10 * exact, 1e18, math.inf):
        got = gf.nearest(queries, book, within=within)
        there = squared <= within * within
        assert torch.equal(got.row, row.masked_fill(~there, -1))
        assert torch.equal(got.squared_distance, squared.masked_fill(~there, math.inf))


def test_a_draft_finds_its_nearest_key_by_the_codes_of_the_version_it_changes(monkeypatch):
    data = Data(15)
    keys = data.normal(3000, 64) * torch.arange(1, 65).float() ** -1
    book = settled(book_of(keys, torch.full((3000,), 0.05)))
    asked = torch.cat([keys[:40] + 0.001, data.normal(20, 64), keys[100:101], keys[7:8] + 1])
    with book.writing() as draft:
        draft.remove(100)
        draft.set_radius(5, 3.0)
        draft.append(asked[-1:], torch.zeros(1, 2), torch.ones(1), None)
        view = cpu.view_of(draft.snapshot())
        assert view.keys_pay
        assert view.version.indexed_up_to == 0
        for moved in (False, True):
            if moved:
                draft.set_key(9, asked[45])
                assert not cpu.view_of(draft.snapshot()).keys_pay
            now = draft.snapshot()
            row, squared = semantics.nearest(asked, now.keys, now.live)
            there = squared <= 0.25
            assert 40 < there.sum() < 62
            got = gf.nearest(asked, now, within=0.5)
            assert torch.equal(got.row, row.masked_fill(~there, -1))
            assert torch.equal(gf.find(asked, now).hit, semantics.in_ball(squared, now.radii[row]))
    assert gf.nearest(asked[-1:], book, within=0.0).row.tolist() == [3000]


def test_within_is_a_distance():
    book = book_of(torch.ones(3, 2), torch.ones(3))
    for within in (-1.0, math.nan):
        with pytest.raises(
            ValueError, match=f"within must be a distance of at least 0, got {within}"
        ):
            gf.nearest(torch.ones(1, 2), book, within=within)


@pytest.mark.parametrize("kind", ["ties", "lognormal"])
def test_threads_decide_as_one_does(kind, instruction_set):
    """They share a batch of queries, and the keys where there are few queries."""
    data = Data(hash_of(kind))
    keys, radii = getattr(data, kind)(6000, 40)
    book = settled(book_of(keys, radii))
    queries = data.queries(book.keys, radii, 200)
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert cpu.view_of(book.snapshot()).predicted_bytes * 200 > 1 << 24  # worth two threads
        decide_as_the_law(book, queries)
        for batch in (queries[:40], queries[:5], queries[:1]):
            decide_as_the_law(book, batch)
            for got, wanted in zip(
                cpu.nearest(batch, book.snapshot()),
                semantics.nearest(batch, book.keys, book.live),
                strict=True,
            ):
                assert torch.equal(got, wanted)
    finally:
        torch.set_num_threads(usual)


def test_wide_isotropic_balls_are_read_densely():
    data = Data(13)
    keys = data.normal(3000, 64)
    book = settled(book_of(keys, torch.full((3000,), 12.0)))
    assert cpu.view_of(book.snapshot()).version.indexed_up_to == 0


def test_small_balls_are_read_through_the_certificate():
    data = Data(14)
    keys = data.normal(3000, 64) * torch.arange(1, 65).float() ** -1
    book = settled(book_of(keys, torch.full((3000,), 0.05)))
    assert cpu.view_of(book.snapshot()).version.indexed_up_to >= 256


def test_what_a_look_up_reads_lives_until_it_is_done(monkeypatch):
    """Another thread may put a newer view in the place of the one that is asked."""

    class View:
        pass

    def only_here(snapshot):
        view = View()
        alive = weakref.ref(view)
        view.version = SimpleNamespace(find=lambda *asked: (alive() is not None, bytearray()))
        return view

    monkeypatch.setattr(cpu, "_view", only_here)
    assert cpu.find_packed(torch.zeros(1, 4), None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_decisions_are_the_law_s(kind):
    data = Data(1000 + hash_of(kind))
    decisions = 0
    for rows, width, dtype in (
        (9000, 16, torch.float32),
        (2000, 48, torch.bfloat16),
        (40000, 8, torch.float32),
        (600, 384, torch.float16),
    ):
        keys, radii = getattr(data, kind)(rows, width)
        book = settled(book_of(keys, radii, dtype))
        queries = data.queries(book.keys, radii, 400_000_000 // (rows * width))
        decisions += decide_as_the_law(book, queries)
    assert decisions > 10_000
