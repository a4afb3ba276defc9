"""Codes lie on a device once, wherever they are read, and are not brought there again."""

import pytest
import torch
from certified_cases import Data, book_of

from grace_fast.index import maintained, segments
from grace_fast.lookup.backends import cpu, placed

pytestmark = pytest.mark.skipif(cpu._cpu is None, reason="grace_fast._cpu was not built")
CODES = {"near": "near", "far": "far", "rows": "row"}
BOXES = ("leaf_boxes", "node_boxes")


@pytest.fixture
def book(monkeypatch):
    """Keys in order, under boxes; a segment without; and some in the delta buffer."""
    monkeypatch.setattr(segments, "ORDER_ROWS", 200)
    monkeypatch.setattr(maintained, "DELTA_ROWS", 100)
    data = Data(3)
    book = book_of(data.normal(2000, 24), torch.full((2000,), 0.3))
    settle(book)
    for count in (120, 30):
        book.append(data.normal(count, 24), torch.zeros(count, 2), torch.full((count,), 0.3))
        settle(book)
    return book


def settle(book):
    maintained.of(book.snapshot()).build(book.snapshot())


def state_of(book):
    with maintained.of(book.snapshot()).held(book.snapshot()) as state:
        return state


def assert_holds(positions, segment):
    """Whether the codes there are the host's, key by key."""
    lies = positions.codes_of(segment)
    near, far = segments.unpacked(segment, torch.arange(segment.count).numpy())
    assert torch.equal(lies["near"].view(torch.uint8), torch.from_numpy(near))
    assert torch.equal(lies["far"].view(torch.uint8), torch.from_numpy(far))
    assert torch.equal(lies["rows"], torch.from_numpy(segment.rows[: segment.count]))


def test_all_segments_have_their_place(book):
    state = state_of(book)
    assert [part.leaf_boxes is not None for part in state.segments] == [True, False]
    assert state.delta.count == 30
    positions = placed.positions_of(book.snapshot(), state)
    for segment in (*state.segments, state.delta):
        assert_holds(positions, segment)
    boxes = positions.codes_of(state.segments[0])["leaf_boxes"]
    low, high = boxes[:, 0].int(), -boxes[:, 1].int()
    assert (low <= high).all()
    assert positions.room >= placed.DELTA_ROOM
    used = sum(segment.count for segment in (*state.segments, state.delta))
    assert int((positions.row >= 0).sum()) == used


def test_what_lies_there_is_not_brought_again(book):
    state = state_of(book)
    before = placed.positions_of(book.snapshot(), state)
    assert placed.positions_of(book.snapshot(), state) is before
    known = state.segments[0]
    near, known.near = known.near, known.near * 0  # were it read again, codes would be zeros
    book.append(Data(4).normal(90, 24), torch.zeros(90, 2), torch.full((90,), 0.3))
    settle(book)
    after = placed.positions_of(book.snapshot(), state_of(book))
    known.near = near
    assert after is not before
    assert known in state_of(book).segments
    for segment in state_of(book).segments:
        assert_holds(after, segment)


def test_every_engine_reads_the_same_codes(book):
    code_layout = pytest.importorskip("grace_fast.kernels.code_layout")
    state = state_of(book)
    positions = placed.positions_of(book.snapshot(), state)
    parts = [*state.segments, state.delta]
    codes = code_layout.device_codes(
        state.projection, parts, state.covered, state.min_radius, "cpu", placed=positions
    )
    for name in (*CODES.values(), *BOXES):
        assert getattr(codes, name).data_ptr() == getattr(positions, name).data_ptr()
    for segment in state.segments:
        for name, view in positions.codes_of(segment).items():
            shared = getattr(codes, CODES.get(name, name)).untyped_storage().data_ptr()
            assert view.untyped_storage().data_ptr() == shared
    for segment in parts:
        assert_holds(positions, segment)
