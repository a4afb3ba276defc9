"""Codebooks whose keys stay on the disk decide as those in memory, before and after edits."""

from __future__ import annotations

import os

import pytest
import torch
from cases import CASES
from disk import (
    ROWS,
    WIDTH,
    assert_same_answers,
    assert_same_book,
    blocks,
    compiled,
    in_memory,
    questions,
    run_python,
    some_keys,
)

import grace_fast as gf
from grace_fast import _native
from grace_fast.codebook.mapped import BLOCK_BYTES
from grace_fast.index import maintained, quantizer, segments
from grace_fast.lookup.backends import cpu
from grace_fast.store import columns, files


@pytest.mark.parametrize("name", CASES)
def test_an_opened_codebook_decides_as_the_one_that_was_saved(name, tmp_path):
    case = CASES[name]
    book = case.book()
    book.save(tmp_path)
    opened = gf.Codebook.open(tmp_path)
    assert_same_book(opened, book)
    assert_same_answers(opened, book, case.queries)


@compiled
def test_the_codes_are_those_that_were_saved_and_nothing_is_computed(parts, saved, monkeypatch):
    monkeypatch.setattr(quantizer, "encode_keys", None)
    book = in_memory(*parts)
    monkeypatch.undo()
    wanted = maintained.of(book.snapshot())
    wanted.build(book.snapshot())
    monkeypatch.setattr(quantizer, "fit", None)
    monkeypatch.setattr(quantizer, "encode_keys", None)
    opened = gf.Codebook.open(saved)
    state, expected = maintained.of(opened.snapshot()).current, wanted.current
    assert state.covered == ROWS
    assert (state.min_radius, state.predicted_bytes) == (
        expected.min_radius,
        expected.predicted_bytes,
    )
    assert torch.equal(state.projection.wide_rows, expected.projection.wide_rows)
    (run,), (other,) = state.segments, expected.segments
    for name in (
        "rows",
        "near",
        "far",
        "leaf_max_radius",
        "places",
        "leaf_boxes",
        "node_boxes",
        "isolated",
    ):
        assert (getattr(run, name) == getattr(other, name)).all(), name
    assert (run.node_max_radius == other.node_max_radius).all()
    asked = questions(parts[0])
    assert cpu.view_of(opened.snapshot()).effort(asked) == cpu.view_of(book.snapshot()).effort(
        asked
    )
    assert_same_answers(opened, book, asked)


@compiled
def test_rows_of_odd_widths_lie_across_blocks(tmp_path):
    # 2 046 bytes a row: almost every block of 4 MiB ends within a row.
    keys, values, radii = some_keys(6000, 1023, torch.float16)
    built = gf.Codebook.build(tmp_path, blocks((keys, values, radii), 1700), progress=False)
    assert len(built.snapshot().key_file.tested) == 6000 * 2046 // BLOCK_BYTES + 2
    rows = torch.arange(2040, 2060)  # around the first block's end
    assert torch.equal(built.snapshot().keys_at(rows), keys[rows])
    assert_same_answers(built, in_memory(keys, values, radii), questions(keys, 40))


def test_only_the_blocks_that_are_fetched_are_tested(tmp_path):
    keys, values, radii = some_keys(5000, 1023)
    in_memory(keys, values, radii).save(tmp_path)
    opened = gf.Codebook.open(tmp_path)
    tested = opened.snapshot().key_file.tested
    assert not tested.any()
    assert torch.equal(opened.snapshot().row(4999).key, keys[4999])
    assert tested.tolist() == [0] * (len(tested) - 2) + [1, 0]
    assert gf.Codebook.open(tmp_path, verify=True).snapshot().key_file.tested[:-1].all()


def test_a_directory_with_files_of_rows_is_read_into_memory_too(parts, saved):
    """As `from_pretrained` reads every directory."""
    tensors = files.read_tensors(saved, files.read_config(saved))
    book = columns.unpack_codebook(tensors, torch.device("cpu"))
    assert book.snapshot().key_file is None
    assert_same_book(book, in_memory(*parts))


def edited(book, keys):
    """Do to a codebook everything that may be done to one."""
    extra = some_keys(1500, WIDTH, seed=5)
    book.append(*extra)
    with book.writing() as draft:
        draft.set_radius(3, 2.0)
        draft.set_radius(4, -1.0)
        draft.set_key(7, keys[100] + 0.01)
        draft.set_key(ROWS + 1, keys[200] - 0.01)
        draft.set_value(9, torch.tensor([7.0, 7.0]))
    book.remove(20)
    book.append(*some_keys(30, WIDTH, seed=6), labels=torch.arange(30))
    return extra[0]


def test_edits_of_an_opened_codebook_are_those_of_one_in_memory(parts, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    book, opened = in_memory(*parts), gf.Codebook.open(saved)
    old = opened.snapshot()
    for each in (book, opened):
        more = edited(each, parts[0])
    asked = torch.cat([questions(parts[0]), questions(more, 40), parts[0][[3, 4, 7, 9, 20, 100]]])
    assert_same_answers(opened, book, asked)
    for each in (book, opened):
        gf.prepare(each)  # the appended rows become a run
    assert_same_book(opened, book)
    assert_same_answers(opened, book, asked)
    assert torch.equal(gf.find(asked, old).row, gf.find(asked, in_memory(*parts)).row)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_an_edited_codebook_is_saved_over_itself_while_it_serves(parts, folder):
    opened, book = gf.Codebook.open(folder), in_memory(*parts)
    for each in (book, opened):
        more = edited(each, parts[0])
    opened.save(folder)
    again = gf.Codebook.open(folder, verify=True)
    asked = torch.cat([questions(parts[0]), questions(more, 40)])
    assert_same_book(again, book)
    assert_same_answers(again, book, asked)
    assert_same_answers(opened, book, asked)  # its files are gone from the directory
    assert len(list(folder.glob("keys-*"))) == 1
    added = again.append(parts[0][:1], parts[1][:1], parts[2][:1])
    assert int(added) == int(book.ids[-1]) + 1


@compiled
def test_rows_past_what_an_int32_counts_are_read_as_they_are(parts, monkeypatch):
    monkeypatch.setattr(segments, "MOST_ROWS", 5000)
    book = in_memory(*parts)
    gf.prepare(book)
    state = maintained.of(book.snapshot()).current
    assert (state.covered, state.segments[-1].last) == (5000, 5000)
    book.append(*some_keys(40, WIDTH, seed=7))
    asked = questions(book.keys, 200)
    coded = gf.find(asked, book)
    assert maintained.of(book.snapshot()).current.covered == 5000
    assert maintained.of(book.snapshot())._wait is None
    expected = gf.find(asked, book, backend="reference")
    assert torch.equal(coded.row, expected.row)


@compiled
def test_the_kd_order_is_the_same_on_any_number_of_threads():
    points = (torch.randn(70_001, 16) * 300).to(torch.int16).numpy()
    made = []
    for threads in (1, 2, 3):
        rows = torch.empty(len(points), dtype=torch.int32)
        _native.cpu.kd_order(
            points=points.ctypes.data, count=len(points), order=rows.data_ptr(), threads=threads
        )
        made.append(rows)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[0].sort().values, torch.arange(len(points), dtype=torch.int32))


@compiled
@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="the address sanitizer needs more memory than the test leaves",
)
def test_a_codebook_larger_than_the_memory_that_may_be_had_is_built_and_serves(tmp_path):
    script = f"""
        import re, resource, torch
        import grace_fast as gf
        torch.set_num_threads(1)
        ROWS, WIDTH, STEP = 400_000, 256, 5_000
        def keys_from(first, count):
            generator = torch.Generator().manual_seed(first)
            return torch.randn(count, WIDTH, generator=generator)
        def parts(first):
            for at in range(first, ROWS, STEP):
                yield keys_from(at, STEP), torch.full((STEP, 2), 1.0), torch.full((STEP,), 1.0)
        # Threads and libraries have what they take, and nothing of it is still being made.
        gf.prepare(gf.Codebook.build({str(tmp_path / "warm")!r}, [next(parts(0))], progress=False))
        def taken(name):
            found = re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())
            return int(found[1]) << 10
        limit = taken("VmData") + (192 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        book = gf.Codebook.build({str(tmp_path / "large")!r}, parts, rows=ROWS, progress=False)
        assert book.snapshot().key_file.shape.nbytes > 1.9 * (192 << 20)
        del book
        base = taken("RssAnon")
        find = gf.prepare(gf.Codebook.open({str(tmp_path / "large")!r}))
        for first in range(0, ROWS, STEP):
            asked = keys_from(first, STEP)[:3]
            assert find(asked).row.tolist() == [first, first + 1, first + 2]
        grown = taken("RssAnon") - base
        assert grown < 80 << 20, grown
    """
    ran = run_python(script)
    assert ran.returncode == 0, ran.stderr
