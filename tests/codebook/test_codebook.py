"""The codebook: rows in place for life, snapshots that never change, drafts that leave no trace."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cases import PAGE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import grace_fast as gf
from grace_fast.codebook.caches import Cache
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.draft import Draft
from grace_fast.codebook.snapshot import Snapshot

WIDTH = 3


def numbered(first: int, count: int, width: int = WIDTH) -> Tensor:
    """Return rows that all hold their own number."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].repeat(1, width)


def add(book: Codebook, count: int, labelled: bool = True) -> list[int]:
    """Append rows: row i has key (i, ...), value (-i, ...), radius i and label [i, i]."""
    first = book.snapshot().rows
    labels = [torch.tensor([row, row]) for row in range(first, first + count)] if labelled else None
    rows = numbered(first, count)
    ids: list[int] = book.append(rows, -rows, rows[:, 0].clone(), labels).tolist()
    return ids


def filled(count: int) -> Codebook:
    book = Codebook(WIDTH, WIDTH)
    add(book, count)
    return book


def frozen(snapshot: Snapshot) -> tuple[object, ...]:
    """Return everything that a snapshot says, as bytes and lists of its own."""
    tensors = (snapshot.keys, snapshot.values, snapshot.radii, snapshot.live, snapshot.ids)
    labels = [None if label is None else label.tolist() for label in snapshot.labels]
    content = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]
    return (snapshot.version, snapshot.rows, len(snapshot), *content, labels)


def again(snapshot: Snapshot) -> tuple[object, ...]:
    """Return `frozen` of a snapshot whose columns are read anew, not those kept from before."""
    return frozen(Snapshot(*(getattr(snapshot, name) for name in Snapshot.__dataclass_fields__)))


# Growth


def test_the_first_row_keeps_its_address_while_the_codebook_grows():
    book = filled(1)
    first = book.snapshot()
    addresses = first.key_slots.data_ptr(), first.value_slots.data_ptr(), first.ids.data_ptr()
    for count in (1, 10, 1000, 30_000):
        add(book, count, labelled=False)
        now = book.snapshot()
        assert (now.key_slots.data_ptr(), now.value_slots.data_ptr(), now.ids.data_ptr()) == (
            addresses
        )
        assert book.keys.data_ptr() == addresses[0]
    assert first.keys.tolist() == [[0, 0, 0]]
    assert torch.equal(book.keys[:, 0], torch.arange(31_012.0))
    assert torch.equal(book.ids, torch.arange(31_012))


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements that tensor operations hand out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if isinstance(result, Tensor) and not any(view in name for view in VIEWS):
            self.elements += result.numel()
        return result


# They touch no element. copy_ is counted where it writes, not over the whole store.
VIEWS = ("slice", "select", "view", "detach", "unsqueeze", "expand", "alias", "lift_fresh")


@pytest.mark.parametrize("write", ["append", "edit"])
def test_a_write_touches_as_many_elements_in_a_large_codebook_as_in_a_small_one(write):
    def cost(rows: int) -> int:
        book = filled(0)
        add(book, rows, labelled=False)
        with Counter() as counter:
            if write == "append":
                add(book, 1)
            else:
                with book.writing() as draft:
                    draft.set_radius(0, 2.0)
                    draft.set_value(0, torch.ones(WIDTH))
        return counter.elements

    assert cost(8 * PAGE + 5) <= cost(PAGE + 5) + 8


def test_memory_is_committed_in_few_steps_and_by_the_rows_there_are():
    book = Codebook(256, 1)
    steps = []
    for _ in range(60):
        book.append(torch.zeros(500, 256), torch.zeros(500, 1), torch.zeros(500))
        steps.append(book._slots.keys.committed_bytes)
    needed = 30_000 * 1024
    assert needed <= steps[-1] <= 1.3 * needed
    assert len(set(steps)) < 25


def test_a_codebook_that_goes_gives_its_address_space_back():
    def in_use() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0])

    before = in_use()
    for _ in range(20):
        Codebook(4, 4)
    assert in_use() - before < 1 << 20  # pages: 4 GiB; one codebook reserves a hundred times that
    book = filled(3)
    keys = book.keys
    del book
    gc.collect()
    assert keys.tolist() == [[0] * 3, [1] * 3, [2] * 3]  # but not while a tensor looks there


def test_a_thousand_codebooks_leave_room_for_each_other_and_for_the_process():
    books = [Codebook(64, 64) for _ in range(1000)]
    for book in books[:: len(books) // 9]:
        assert len(book.snapshot().key_slots) > 1_000_000
        book.append(torch.ones(1, 64), torch.ones(1, 64), torch.ones(1))
    assert int(torch.ones(1 << 24).sum()) == 1 << 24


UNDER_A_LIMIT = """
import resource, torch
from pathlib import Path
from grace_fast import Codebook
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (4 << 30),) * 2)
books = [Codebook(64, 64) for _ in range(3)]
for book in books:
    book.append(torch.ones(20_000, 64), torch.ones(20_000, 64), torch.ones(20_000))
torch.empty(1 << 28)
print(len(book))
try:
    Codebook(64, 64, reserve_rows=1 << 40)
except MemoryError as refusal:
    print(refusal)
"""


def test_a_limit_on_address_space_is_shared_with_the_process():
    out = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT], capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines() == [
        "20000",
        f"could not reserve {1 << 48} bytes of address space: Cannot allocate memory",
    ]


@pytest.mark.parametrize("wide", ["keys", "values"])
def test_beyond_the_reservation_is_refused_and_the_codebook_is_as_before(wide):
    width = 1 << 18  # 1 MiB a row
    dims = (width, 1) if wide == "keys" else (1, width)
    book = Codebook(*dims, reserve_rows=3)
    book.append(torch.ones(2, dims[0]), torch.ones(2, dims[1]), torch.ones(2))
    snapshot, before = book.snapshot(), frozen(book.snapshot())
    with pytest.raises(MemoryError) as refusal:
        book.append(torch.zeros(2, dims[0]), torch.zeros(2, dims[1]), torch.zeros(2))
    assert "reservation holds 3 rows, wanted 4" in str(refusal.value)
    assert "reserve_rows" in str(refusal.value)
    assert book.snapshot() is snapshot
    assert again(snapshot) == before
    last = book.append(torch.zeros(1, dims[0]), torch.zeros(1, dims[1]), torch.zeros(1))
    assert last.tolist() == [2]


# Rows, ids, removal


def test_ids_are_stable_and_removed_ones_are_not_given_again():
    book = filled(5)
    assert add(book, 2) == [5, 6]
    book.remove(6)
    book.remove(1)
    assert add(book, 1) == [7]
    assert len(book) == 6
    assert book.ids.tolist() == list(range(8))
    assert book.live.tolist() == [True, False, True, True, True, True, False, True]
    assert book.keys[:, 0].tolist() == list(range(8))
    assert book.snapshot().row_of(7) == 7


def test_an_emptied_codebook_goes_on_counting():
    book = filled(2)
    book.remove(0)
    book.remove(1)
    assert len(book) == 0
    assert add(book, 1) == [2]
    assert gf.find(numbered(2, 1), book).row.tolist() == [2]


@pytest.mark.parametrize(
    ("key_id", "text"),
    [(1, "the key with the id 1 was removed"), (9, "no key has the id 9"), (-1, "the id -1")],
    ids=["removed before", "never given", "negative"],
)
def test_an_id_without_a_live_row_is_refused(key_id, text):
    book = filled(4)
    book.remove(1)
    before = frozen(book.snapshot())
    with pytest.raises(KeyError, match=text):
        book.remove(key_id)
    assert frozen(book.snapshot()) == before


def test_an_id_given_in_a_draft_can_be_removed_in_it():
    book = filled(1)
    with book.writing():
        [fresh] = add(book, 1)
        book.remove(fresh)
    assert book.live.tolist() == [True, False]


def test_removing_twice_in_one_draft_is_refused():
    book = filled(2)
    with pytest.raises(KeyError, match="removed"), book.writing():  # noqa: PT012
        book.remove(0)
        book.remove(0)
    assert len(book) == 2


@pytest.mark.parametrize("count", [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1])
def test_nothing_is_lost_at_the_end_of_a_page(count):
    book = filled(0)
    add(book, count, labelled=False)
    add(book, 2)
    rows = count + 2
    assert torch.equal(book.radii, torch.arange(float(rows)))
    assert torch.equal(book.keys[:, 0], torch.arange(float(rows)))
    assert bool(book.live.all())
    assert book.labels[count - 1] is None
    assert book.labels[count].tolist() == [count, count]
    last = torch.tensor([count + 1, 0, count - 1])
    assert book.snapshot().radii_of(last).tolist() == [count + 1, 0, count - 1]
    assert book.snapshot().values_of(last)[:, 0].tolist() == [-count - 1, 0, 1 - count]
    book.remove(count)
    assert len(book) == count + 1
    assert (~book.live).nonzero().flatten().tolist() == [count]


# Snapshots


def change_radius(draft: Draft, book: Codebook) -> None:
    draft.set_radius(1, -3.0)


def train_value(draft: Draft, book: Codebook) -> None:
    draft.set_value(1, torch.full((WIDTH,), 9.0))


def move_key(draft: Draft, book: Codebook) -> None:
    draft.set_key(1, torch.full((WIDTH,), 8.0))


def relabel(draft: Draft, book: Codebook) -> None:
    draft.set_label(1, torch.tensor([7]))


def point(draft: Draft, book: Codebook) -> None:
    draft.point_key(0, 2)
    draft.point_value(0, 2)
    draft.point_label(0, 2)


def remove(draft: Draft, book: Codebook) -> None:
    draft.remove(0)


def append(draft: Draft, book: Codebook) -> None:
    add(book, 3)


WRITES = (change_radius, train_value, move_key, relabel, point, remove, append)


@given(steps=st.lists(st.lists(st.sampled_from(WRITES), max_size=3), max_size=6))
def test_a_snapshot_never_changes_whatever_is_written_later(steps):
    book = filled(4)
    taken = [(book.snapshot(), frozen(book.snapshot()))]
    for writes in steps:
        with book.writing() as draft:
            for write in writes:
                if write is not remove or draft.snapshot().live[0]:
                    write(draft, book)
            taken.append((draft.snapshot(), frozen(draft.snapshot())))
        taken.append((book.snapshot(), frozen(book.snapshot())))
    for snapshot, before in taken:
        assert again(snapshot) == before


def test_a_radius_written_in_one_page_copies_that_page_alone():
    book = filled(0)
    add(book, 2 * PAGE + 10, labelled=False)
    before = book.snapshot()
    with book.writing() as draft:
        draft.set_radius(PAGE + 1, 0.5)
        draft.set_radius(PAGE + 2, 0.5)
    after = book.snapshot()
    shared = [one is other for one, other in zip(before.pages, after.pages, strict=True)]
    assert shared == [True, False, True]
    assert before.row(PAGE + 1).radius == PAGE + 1
    assert after.row(PAGE + 1).radius == after.row(PAGE + 2).radius == 0.5


def test_labels_do_not_change_with_the_tensor_they_were_given_as():
    book = Codebook(WIDTH, WIDTH)
    given_label = torch.tensor([4, 5])
    book.append(numbered(0, 1), numbered(0, 1), torch.zeros(1), [given_label])
    given_label.zero_()
    assert book.labels[0].tolist() == [4, 5]


def test_keys_and_values_do_not_change_with_the_tensors_they_were_given_as():
    book = Codebook(WIDTH, WIDTH)
    keys, values, radii = numbered(1, 2), numbered(3, 2), torch.ones(2)
    book.append(keys, values, radii)
    for given_tensor in (keys, values, radii):
        given_tensor.zero_()
    assert book.keys.tolist() == [[1] * 3, [2] * 3]
    assert book.values.tolist() == [[3] * 3, [4] * 3]
    assert book.radii.tolist() == [1, 1]


def test_a_snapshot_says_what_it_is_without_reading_memory_that_has_no_rows():
    book = filled(2)
    book.remove(0)
    assert repr(book.snapshot()) == "Snapshot(version=2, 1 keys, 2 rows)"
    assert repr(book) == (
        "Codebook(1 keys, key_dim=3, value_dim=3, dtype=torch.float32, device='cpu', version=2)"
    )


# Drafts


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("write", WRITES)
def test_a_draft_dropped_by_an_exception_leaves_no_trace(write, error):
    book = filled(4)
    snapshot, before = book.snapshot(), frozen(book.snapshot())
    with pytest.raises(error), book.writing() as draft:  # noqa: PT012
        write(draft, book)
        add(book, 2)
        raise error
    assert book.snapshot() is snapshot
    assert again(snapshot) == before
    assert add(book, 1) == [4]
    undisturbed = filled(4)
    add(undisturbed, 1)
    assert frozen(book.snapshot()) == frozen(undisturbed.snapshot())


def test_writing_inside_writing_is_the_same_draft_and_one_version():
    book = filled(1)
    with book.writing() as outer:
        add(book, 1)
        with book.writing() as inner:
            assert inner is outer
            inner.set_radius(1, 0.25)
        assert book.version == 1
        assert len(book) == 1
    assert book.version == 2
    assert book.radii.tolist() == [0, 0.25]


def test_an_inner_exception_drops_the_whole_draft():
    book = filled(1)
    before = frozen(book.snapshot())
    with pytest.raises(ValueError, match="inner"), book.writing():  # noqa: PT012
        add(book, 1)
        with book.writing() as draft:
            draft.set_radius(0, 0.25)
            raise ValueError("inner")
    assert frozen(book.snapshot()) == before
    with book.writing() as draft:  # and the next one starts anew
        assert draft.rows == 1


def test_a_draft_is_seen_by_nobody_until_it_is_published():
    book = filled(2)
    with book.writing() as draft:
        draft.set_radius(0, 5.0)
        draft.set_key(1, torch.full((WIDTH,), 50.0))
        add(book, 1)
        assert book.radii.tolist() == [0, 1]
        assert book.keys.tolist() == [[0] * 3, [1] * 3]
        drafted = draft.snapshot()
        assert drafted.radii.tolist() == [5, 1, 2]
        assert drafted.keys.tolist() == [[0] * 3, [50] * 3, [2] * 3]
    assert book.keys.tolist() == [[0] * 3, [50] * 3, [2] * 3]


def test_a_new_rows_value_is_trained_in_place_and_an_old_one_in_a_new_slot():
    book = filled(2)
    with book.writing() as draft:
        add(book, 1)
        draft.set_value(2, torch.full((WIDTH,), 9.0))
        assert draft.counts.values == 3
        draft.set_value(0, torch.full((WIDTH,), 7.0))
        assert draft.counts.values == 4
    assert book.values[:, 0].tolist() == [7, -1, 9]
    assert book.snapshot().values_of(torch.tensor([2, 0, -1]))[:, 0].tolist()[:2] == [9, 7]


def test_a_new_row_that_points_at_an_old_value_does_not_write_there():
    book = filled(2)
    before = book.snapshot()
    with book.writing() as draft:
        add(book, 1)
        draft.point_value(2, 1)
        draft.set_value(2, torch.full((WIDTH,), 9.0))
    assert before.values[:, 0].tolist() == [0, -1]
    assert book.values[:, 0].tolist() == [0, -1, 9]


def test_points_lead_back_to_what_a_row_held_before():
    book = filled(3)
    original = book.snapshot()
    with book.writing() as draft:
        draft.set_key(1, torch.full((WIDTH,), 50.0))
        draft.set_value(1, torch.full((WIDTH,), 60.0))
        draft.set_label(1, torch.tensor([70]))
    assert book.keys[1].tolist() == [50] * 3
    assert book.labels[1].tolist() == [70]
    with book.writing() as draft:
        draft.point_key(1, original.row(1).key_slot)
        draft.point_value(1, original.row(1).value_slot)
        draft.point_label(1, original.row(1).label_slot)
    assert frozen(book.snapshot())[1:] == frozen(original)[1:]
    add(book, 1)  # the slots that nobody uses shift those of later rows
    assert book.keys[:, 0].tolist() == [0, 1, 2, 3]
    assert book.values[:, 0].tolist() == [0, -1, -2, -3]
    assert book.snapshot().row(3).key.tolist() == [3] * 3
    assert gf.find(numbered(3, 1), book).row.tolist() == [3]


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there_cannot_be_written_or_read(row):
    book = filled(2)
    text = rf"row must be in \[0, 2\), got {row}"
    with pytest.raises(IndexError, match=text), book.writing() as draft:
        draft.set_radius(row, 1.0)
    with pytest.raises(IndexError, match=text):
        book.snapshot().row(row)
    assert book.version == 1


# What is derived from the keys


CODES: Cache[str] = Cache("codes")


def builder(calls: list[tuple[int, object]]):
    def build(snapshot: Snapshot, previous: object) -> str:
        calls.append((snapshot.rows, previous))
        return f"{snapshot.rows} rows"

    return build


def test_what_is_derived_is_built_once_a_version_and_extended_after_an_append():
    book, calls = filled(2), []
    build = builder(calls)
    for _ in range(3):
        assert CODES.of(book.snapshot(), build) == "2 rows"
    assert calls == [(2, None)]
    add(book, 1)
    assert CODES.of(book.snapshot(), build) == "3 rows"
    book.remove(0)
    CODES.of(book.snapshot(), build)
    assert calls[1:] == [(3, "2 rows"), (3, "3 rows")]


@pytest.mark.parametrize("move", ["set_key", "point_key"])
def test_what_is_derived_is_told_of_a_moved_key_with_what_there_was(move):
    book, calls = filled(2), []
    build = builder(calls)
    CODES.of(book.snapshot(), build)
    with book.writing() as draft:
        if move == "set_key":
            draft.set_key(0, torch.ones(WIDTH))
        else:
            draft.point_key(0, 1)
    CODES.of(book.snapshot(), build)
    add(book, 1)
    CODES.of(book.snapshot(), build)
    assert calls == [(2, None), (2, "2 rows"), (3, "2 rows")]


def test_nothing_is_derived_from_a_draft():
    book = filled(2)
    with book.writing() as draft:
        assert CODES.of(draft.snapshot(), builder([])) is None


def test_two_caches_are_apart_though_they_have_one_name():
    book, other = filled(1), Cache("codes")
    assert CODES.of(book.snapshot(), lambda snapshot, previous: "1") == "1"
    assert other.of(book.snapshot(), lambda snapshot, previous: "2") == "2"
    assert CODES.of(book.snapshot(), builder([])) == "1"


def test_what_is_invalidated_is_built_anew_and_the_rest_stays():
    book, other, calls = filled(1), Cache("other"), []
    for each in (CODES, other):
        each.of(book.snapshot(), builder([]))
    CODES.invalidate(book.snapshot())
    assert CODES.of(book.snapshot(), builder(calls)) == "1 rows"
    assert other.of(book.snapshot(), builder(calls)) == "1 rows"
    assert calls == [(1, None)]


def test_what_is_put_is_a_versions_own():
    book, calls = filled(1), []
    CODES.put(book.snapshot(), "put")
    assert CODES.of(book.snapshot(), builder(calls)) == "put"
    add(book, 1)
    assert CODES.of(book.snapshot(), builder(calls)) == "2 rows"
    assert calls == [(2, "put")]


def test_a_reader_of_an_older_version_is_answered_for_its_own():
    book, calls = filled(1), []
    old = book.snapshot()
    add(book, 1)
    assert CODES.of(book.snapshot(), builder(calls)) == "2 rows"
    assert CODES.of(old, builder(calls)) == "1 rows"
    assert CODES.of(book.snapshot(), builder(calls)) == "2 rows"
    assert calls == [(2, None), (1, "2 rows"), (2, "1 rows")]


# Refusals

FORMS = {
    "key_dim zero": (lambda: Codebook(0, 3), "key_dim must be a whole number >= 1, got 0"),
    "value_dim a float": (lambda: Codebook(3, 2.0), "value_dim must be a whole number >= 1, got"),
    "float64": (
        lambda: Codebook(3, 3, torch.float64),
        "dtype must be one of (torch.float32, torch.bfloat16, torch.float16), got torch.float64",
    ),
    "reserve_rows zero": (lambda: Codebook(3, 3, reserve_rows=0), "reserve_rows must be"),
}


@pytest.mark.parametrize(("make", "text"), FORMS.values(), ids=FORMS.keys())
def test_a_codebook_of_no_form_is_refused(make, text):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        make()
    assert text in str(refusal.value)


NAN = torch.tensor([[0.0, 0, 0], [0, float("nan"), 0]])
ROWS = {
    "keys of another width": ({"keys": torch.zeros(2, 4)}, "keys must be [M, 3], got (2, 4)"),
    "values of another width": ({"values": torch.zeros(2, 1)}, "values must be [M, 3], got (2, 1)"),
    "one key without a dimension": ({"keys": torch.zeros(3)}, "keys must be [M, 3], got (3,)"),
    "keys as a list": ({"keys": [[0, 0, 0]]}, "keys must be a tensor [M, 3], got list"),
    "double keys": (
        {"keys": torch.zeros(2, 3).double()},
        "keys must be torch.float32 like the codebook, got torch.float64",
    ),
    "whole numbers as values": (
        {"values": torch.zeros(2, 3).long()},
        "values must be torch.float32 like the codebook, got torch.int64",
    ),
    "NaN in a key": ({"keys": NAN}, "keys must be finite, got NaN or infinity in row 1"),
    "infinity in a value": ({"values": NAN.nan_to_num(torch.inf) / 0}, "got NaN or infinity in"),
    "fewer values": (
        {"values": torch.zeros(1, 3)},
        "keys, values and radii must have as many rows, got 2, 1 and 2",
    ),
    "fewer radii": ({"radii": torch.zeros(1)}, "must have as many rows, got 2, 2 and 1"),
    "radii as a column": (
        {"radii": torch.zeros(2, 1)},
        "radii must be floats [M], got torch.float",
    ),
    "whole radii": ({"radii": torch.tensor([1, 2])}, "radii must be floats [M], got torch.int64"),
    "NaN radius": ({"radii": NAN[:, 1]}, "radii must be finite in float32, got nan in row 1"),
    "a radius beyond float32": (
        {"radii": torch.tensor([0, 1e39], dtype=torch.float64)},
        "radii must be finite in float32, got 1e+39 in row 1",
    ),
    "one label for two": ({"labels": [None]}, "labels must be 2, one for each key, got 1"),
    "labels of fractions": (
        {"labels": [torch.ones(1), torch.ones(1)]},
        "labels must be whole numbers, got torch.float32",
    ),
}


@pytest.mark.parametrize(("changed", "text"), ROWS.values(), ids=ROWS.keys())
def test_rows_that_do_not_fit_are_refused_and_nothing_changes(changed, text):
    book = filled(2)
    snapshot, before = book.snapshot(), frozen(book.snapshot())
    rows = {"keys": torch.zeros(2, 3), "values": torch.zeros(2, 3), "radii": torch.zeros(2)}
    with pytest.raises((ValueError, TypeError)) as refusal:
        book.append(**rows | changed)
    assert text in str(refusal.value)
    assert book.snapshot() is snapshot
    assert again(snapshot) == before
    assert add(book, 1) == [2]


def test_narrow_rows_are_stored_exactly_in_a_wide_codebook_and_never_the_other_way():
    book = Codebook(1, 1)
    narrow = torch.tensor([[1.0078125]], dtype=torch.bfloat16)
    book.append(narrow, narrow.half(), torch.zeros(1))
    assert book.keys.tolist() == [[1.0078125]]
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)):
        with pytest.raises(
            ValueError, match=f"keys must be {dtype} like the codebook, got {other}"
        ):
            Codebook(1, 1, dtype).append(narrow.to(other), narrow.to(dtype), torch.zeros(1))


@pytest.mark.parametrize(
    ("labels", "stored"),
    [
        (torch.tensor([3, 4]), [[3], [4]]),
        (torch.tensor([[3, 4], [5, 6]]), [[3, 4], [5, 6]]),
        ([None, torch.tensor([5, 6, 7], dtype=torch.int32)], [None, [5, 6, 7]]),
        ([torch.tensor([[1, 2]]), torch.tensor([], dtype=torch.int64)], [[1, 2], []]),
        (None, [None, None]),
    ],
    ids=["one number each", "a matrix", "of several lengths", "a batch of one", "none"],
)
def test_labels_are_kept_as_ids(labels, stored):
    book = Codebook(WIDTH, WIDTH)
    book.append(numbered(0, 2), numbered(0, 2), torch.zeros(2), labels)
    assert [None if label is None else label.tolist() for label in book.labels] == stored
    assert {label.dtype for label in book.labels if label is not None} <= {torch.int64}


# Readers beside a writer


def test_readers_never_see_half_an_edit():
    """Row i's key, value and radius always hold the same number: a torn read would mix two."""
    book = Codebook(1, 2)
    book.append(torch.ones(1, 1), torch.full((1, 2), 1.0), torch.ones(1))
    stop, torn = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            snapshot = book.snapshot()
            rows = snapshot.rows
            keys, values, radii = snapshot.keys[:, 0], snapshot.values, snapshot.radii
            whole = len(keys) == len(values) == len(radii) == rows
            alike = torch.equal(keys, radii) and torch.equal(values, keys[:, None].expand(rows, 2))
            found = gf.find(keys[-1:, None], snapshot)
            value = snapshot.values_of(found.row)
            if not (whole and alike and found.hit.all() and value[0, 0] == keys[-1]):
                torn.append((rows, keys, values, radii))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    number, end = 1.0, time.monotonic() + 1.5
    while time.monotonic() < end and not torn:
        number += 1
        with book.writing() as draft:
            row = int(number) % draft.rows
            draft.set_key(row, torch.tensor([number]))
            draft.set_value(row, torch.tensor([number, number]))
            draft.set_radius(row, number)
            if number % 3 == 0:
                fresh = torch.tensor([[number + 0.5]])
                book.append(fresh, fresh.repeat(1, 2), fresh[:, 0])
        if number % 50 == 0:
            with pytest.raises(ValueError, match="dropped"), book.writing() as draft:  # noqa: PT012
                draft.set_radius(0, -7.0)
                book.append(torch.full((2, 1), -9.0), torch.full((2, 2), -8.0), torch.zeros(2))
                raise ValueError("dropped")
    stop.set()
    for reader in readers:
        reader.join()
    assert not torn
    assert number > 50


def test_two_writers_take_turns():
    book = Codebook(1, 1)

    def write(first: int) -> None:
        for number in range(first, first + 100):
            with book.writing() as draft:
                rows = draft.rows
                fresh = torch.tensor([[float(number)]])
                book.append(fresh, fresh, fresh[:, 0])
                draft.set_radius(rows, float(number) + 1)

    writers = [threading.Thread(target=write, args=(first,)) for first in (0, 1000)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert book.version == 200
    assert sorted(book.keys[:, 0].tolist()) == [*range(100), *range(1000, 1100)]
    assert torch.equal(book.radii, book.keys[:, 0] + 1)
    assert book.ids.tolist() == list(range(200))


COPIED = """
import copy, io, pickle
import torch
from grace_fast import Codebook
for dtype in (torch.float32, torch.bfloat16):
    book = Codebook(4, 3, dtype=dtype)
    for is_empty in (True, False):
        if not is_empty:
            rows = (torch.randn(5, width, dtype=dtype) for width in (4, 3))
            book.append(*rows, torch.ones(5))
        found = [book.keys, book.values, book.radii, book.ids]
        if not is_empty:
            found += [book.snapshot().row(3).key, book.snapshot().row(3).value]
        for tensor in found:
            assert tensor.untyped_storage().nbytes() <= 4096 * 4, tensor
            saved = io.BytesIO()
            torch.save(tensor, saved)
            saved.seek(0)
            read = [torch.load(saved), copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))]
            assert all(torch.equal(each, tensor) for each in read)
assert book.keys.data_ptr() == book.snapshot().key_slots.data_ptr()
"""


def test_what_a_codebook_shows_is_copied_without_the_room_that_is_reserved():
    out = subprocess.run(
        [sys.executable, "-c", COPIED], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr  # the process would end at an address that is not there


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_codebook_is_not_copied_by_accident_and_says_what_to_do(copied):
    book = Codebook(4, 3)
    for each in (book, book.snapshot()):
        with pytest.raises(TypeError, match="save the codebook"):
            copied(each)
