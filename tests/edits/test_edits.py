"""The life of edits without a model: found again, undone in any order, replayed."""

from __future__ import annotations

import math

import pytest
import torch
from edit_streams import WIDTH, Stream, same, zero
from hypothesis import given, settings
from hypothesis import strategies as st

import grace_fast as gf
from grace_fast.edits.apply import apply
from grace_fast.edits.edit import Edit
from grace_fast.edits.history import History
from grace_fast.semantics import Rules


def expanded_stream(count, margin=1e-5):
    """A stream whose every key was expanded to the distance of a second query."""
    torch.manual_seed(0)
    stream = Stream(Rules(0.5, margin=margin))
    centres = 10 * torch.randn(count, WIDTH)
    offsets = torch.nn.functional.normalize(torch.randn(count, WIDTH), dim=1) * 0.8
    for centre, offset in zip(centres, offsets, strict=True):
        assert stream.edit(centre, 1).outcome == "added"
        assert stream.edit(centre + offset, 1).outcome == "expanded"
    return stream, centres + offsets


def test_a_thousand_expanded_edits_are_all_found_again_where_the_references_rule_loses_many():
    stream, queries = expanded_stream(1000, margin=0.0)
    match = gf.find(queries, stream.book)
    assert match.hit.all()
    assert match.row.tolist() == list(range(1000))
    assert len(stream.verify().fires) == 2000
    distance, row = torch.cdist(queries, stream.book.keys).min(dim=1)  # over 25 rows: by matmul
    lost = int((distance > stream.book.radii[row]).sum())
    assert lost > 200
    few = torch.cdist(queries[:20], stream.book.keys[:20]).min(dim=1)
    assert (few.values <= stream.book.radii[few.indices] * (1 + 1e-6)).all()


LAST = {
    "added": (Rules(1.0), [(zero(), 1)], (zero(5.0), 2)),
    "split": (Rules(1.0), [(zero(), 1)], (zero(0.5), 2)),
    "expanded": (Rules(1.0, margin=1e-5), [(zero(), 1)], (zero(1.5), 1)),
    "moved": (Rules(1.0, "moving_average"), [(zero(), 1)], (zero(1.5), 1)),
    "reused": (Rules(1.0), [(zero(), 1)], (zero(0.5), 1)),
    "replaced": (Rules(1.0), [(zero(), 1)], (zero(), 2)),
}


@pytest.mark.parametrize("case", list(LAST))
def test_undoing_the_last_edit_gives_the_live_rows_back_bit_for_bit(case):
    rules, first, last = LAST[case]
    stream = Stream(rules)
    for query, label in first:
        stream.edit(query, label)
    before = stream.live_rows()
    report = stream.edit(*last)
    assert report.outcome == ("expanded" if case == "moved" else case)
    assert not same(stream.live_rows(), before)
    assert stream.undo(report.id) is report
    assert same(stream.live_rows(), before)


def test_a_split_is_taken_back_when_the_row_it_added_goes():
    stream = Stream(Rules(1.0))
    stream.edit(zero(), 1)
    split = stream.edit(zero(0.5), 2)
    shared = stream.edit(zero(0.6), 2)
    assert shared.row == split.row
    assert stream.book.radii.tolist() == pytest.approx([0.24999, 0.25])
    stream.undo(split.id)  # the row stays: another edit lives on it
    assert stream.book.live.tolist() == [True, True]
    assert stream.book.radii[0].item() == pytest.approx(0.24999)
    assert stream.book.values[1, 0] == shared.id
    stream.undo(shared.id)
    assert stream.book.live.tolist() == [True, False]
    assert stream.book.radii[0].item() == 1.0


def test_an_edit_in_the_middle_leaves_what_came_after_it():
    stream = Stream(Rules(1.0, margin=1e-5))
    stream.edit(zero(), 1)
    grown = stream.edit(zero(1.5), 1)
    larger = stream.edit(zero(2.2), 1)
    assert grown.row == larger.row == 0
    radius = stream.book.radii[0].item()
    stream.undo(grown.id)
    assert stream.book.radii[0].item() == radius
    assert stream.book.values[0, 0] == larger.id
    stream.undo(larger.id)
    assert stream.book.radii[0].item() == 1.0
    assert stream.book.values[0, 0] == 0


def test_keys_that_no_edit_made_stay_when_every_edit_on_them_goes():
    stream = Stream(Rules(1.0, margin=1e-5))
    stream.book.append(zero()[None], torch.full((1, 4), 7.0), torch.ones(1), [torch.tensor([1])])
    before = stream.live_rows()
    reports = [stream.edit(zero(0.5), 1), stream.edit(zero(1.5), 1), stream.edit(zero(0.4), 2)]
    assert [report.outcome for report in reports] == ["reused", "expanded", "split"]
    for report in (reports[1], reports[2], reports[0]):
        stream.undo(report.id)
    assert same(stream.live_rows(), before)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=14),
    st.randoms(use_true_random=False),
    st.sampled_from(["coverage", "moving_average"]),
)
def test_edits_undone_in_any_order_leave_what_the_remaining_ones_say(asked, order, expand):
    stream = Stream(Rules(1.0, expand, margin=1e-5), width=2)
    ids = [stream.edit([0.4 * place, 0.0], label).id for place, label in asked]
    order.shuffle(ids)
    for edit_id in ids:
        stream.undo(edit_id)
        remaining = stream.history.edits.values()
        rows = {edit.row for edit in remaining}
        live = {row for row, on in enumerate(stream.book.live.tolist()) if on}
        assert live == rows
        snapshot = stream.book.snapshot()
        for row in rows:
            newest = [edit for edit in remaining if edit.row == row][-1]
            assert snapshot.row(row).value[0] == newest.id
            event = stream.history.rows[row].events[-1]
            assert snapshot.row(row).radius == event.radius
            assert snapshot.row(row).key_slot == event.key_slot
    assert len(stream.book) == 0
    assert stream.history.rows == {}


def test_verify_names_the_edit_that_superseded_another():
    stream = Stream(Rules(1.0))
    first = stream.edit(zero(), 1)
    second = stream.edit(zero(0.9), 1)  # reuses the first key
    split = stream.edit(zero(0.8), 2)  # shrinks it, so that .9 is nearer to the new one
    assert [first.outcome, second.outcome, split.outcome] == ["added", "reused", "split"]
    verification = stream.verify()
    assert verification.ok
    assert verification.fires == [first.id, split.id]
    assert verification.superseded == {second.id: split.id}
    repeated = stream.edit(zero(), 3)
    assert repeated.outcome == "replaced"
    assert stream.verify().superseded == {second.id: split.id, first.id: repeated.id}


def test_verify_calls_broken_what_no_later_edit_explains():
    stream = Stream(Rules(1.0))
    first, second = stream.edit(zero(), 1), stream.edit(zero(5.0), 1)
    stream.book.remove(int(stream.book.ids[second.row]))
    verification = stream.verify()
    assert not verification
    assert verification.fires == [first.id]
    assert verification.broken == [second.id]


def test_in_reference_semantics_an_exact_repeat_with_a_new_label_kills_both():
    stream = Stream(Rules(1.0, semantics="reference"))
    first, second = stream.edit(zero(), 1), stream.edit(zero(), 2)
    assert second.outcome == "split"
    assert stream.book.radii.tolist() == [pytest.approx(-1e-5), 0.0]
    assert not gf.find(zero()[None], stream.book).hit
    verification = stream.verify()
    assert verification.superseded == {first.id: second.id}
    assert verification.broken == [second.id]


def test_the_first_edit_has_no_distance():
    report = Stream(Rules(1.0)).edit(zero(), 1)
    assert report.distance == math.inf
    assert report.value_before is None


def test_an_unknown_id_is_refused_with_the_known_ones():
    stream = Stream(Rules(1.0))
    stream.edit(zero(), 1)
    with pytest.raises(KeyError, match="no edit has the id 3; there remain the ids 0 to 0"):
        stream.undo(3)


BORDER = {  # epsilon, radius and the query's distance along two axes, squared to a hair over theirs
    "split": (0.5, 0.5, (1.0, 2.0**-26), 2),
    "expanded": (0.5, 0.5, (1.0, 2.0**-26), 1),
    "split, far from the origin of radii": (0.25, 3.75, (4.0, 2.0**-24), 2),
    "added, a float32 beyond": (0.5, 0.5, (1.0 + 2.0**-23, 0.0), 2),
}


@pytest.mark.parametrize("where", ["a codebook", "a codebook of many rows"])
@pytest.mark.parametrize("case", list(BORDER))
def test_a_query_on_the_border_of_a_ball_and_epsilon_meets_the_key_however_s_is_rounded(
    case, where
):
    """The distance is epsilon and radius, and S is the next float64 after its square."""
    epsilon, radius, offset, label = BORDER[case]
    squared = sum(part * part for part in offset)
    assert squared > (epsilon + radius) ** 2
    assert (math.sqrt(squared) == epsilon + radius) == (not case.startswith("added"))
    book = gf.Codebook(WIDTH, 4)
    book.append(zero()[None], torch.zeros(1, 4), torch.tensor([radius]), [torch.tensor([1])])
    if where == "a codebook of many rows":  # of which the codes prove what is far
        others = 100 + 10 * torch.randn(3000, WIDTH, generator=torch.Generator().manual_seed(0))
        book.append(others, torch.zeros(3000, 4), torch.full((3000,), min(radius, 0.1)))
    rules = Rules(epsilon, margin=1e-5)
    with book.writing() as draft:
        done = apply(draft, rules, zero(*offset), torch.tensor([label]), torch.ones(4))
    assert done.outcome == case.split(",")[0]


PLACES = st.tuples(st.integers(-8, 8), st.integers(-3, 3), st.integers(0, 2))
STREAMS = st.lists(PLACES, min_size=1, max_size=12)
RULES = st.builds(
    Rules,
    st.just(1.0),
    st.sampled_from(["coverage", "moving_average"]),
    st.sampled_from([0.0, 1e-5, 2e-2, 0.3]),
)


def streamed(rules, places):
    stream = Stream(rules, width=2)
    for x, y, label in places:
        stream.edit([0.3 * x, 0.3 * y], label)
    return stream


@given(rules=RULES, places=STREAMS)
def test_no_edit_breaks_another_and_whoever_supersedes_is_later_and_still_there(rules, places):
    stream = streamed(rules, places)
    verification = stream.verify()
    assert verification.ok, verification
    assert len(verification.fires) + len(verification.superseded) == len(places)
    assert len(places) - 1 in verification.fires  # the last one always
    assert all(edit < by for edit, by in verification.superseded.items())


@given(rules=RULES, places=STREAMS, picks=st.lists(st.integers(0, 11), min_size=1, max_size=4))
def test_after_undo_whoever_supersedes_is_still_there(rules, places, picks):
    stream = streamed(rules, places)
    undone = [stream.undo(pick) for pick in dict.fromkeys(picks) if pick < len(places)]
    verification = stream.verify()
    for edit, by in verification.superseded.items():
        assert edit < by
        assert by in stream.history.edits
    for edit in verification.broken:  # only what lived in a ball that an undo took back
        assert any(gone.id < edit for gone in undone)


@given(rules=RULES, places=STREAMS, pick=st.integers(0, 11))
def test_a_key_removed_behind_the_editors_back_breaks_all_its_edits(rules, places, pick):
    stream = streamed(rules, places)
    edits = stream.history.edits
    row = edits[pick % len(edits)].row
    stream.book.remove(int(stream.book.ids[row]))
    verification = stream.verify()
    on_it = {edit.id for edit in edits.values() if edit.row == row}
    assert on_it <= set(verification.broken)
    for edit in sorted(on_it):
        stream.undo(edit)
    assert not bool(stream.book.live[row])
    assert not on_it & set(stream.history.edits)


@given(rules=RULES, places=STREAMS)
def test_undoing_the_last_edit_of_any_stream_gives_the_live_rows_back(rules, places):
    stream = streamed(rules, places[:-1])
    before = stream.live_rows()
    x, y, label = places[-1]
    stream.undo(stream.edit([0.3 * x, 0.3 * y], label).id)
    assert same(stream.live_rows(), before)


@given(rules=RULES, places=STREAMS, kept=st.integers(0, 11))
def test_edits_whose_draft_was_dropped_leave_no_trace_in_the_history(rules, places, kept):
    stream = streamed(rules, places[:kept])
    before, remembered = stream.live_rows(), stream.history.copy()
    attempt = stream.history.attempting()
    with pytest.raises(OSError, match="disk full"), attempt, stream.book.writing() as draft:  # noqa: PT012
        for number, (x, y, label) in enumerate(places[kept:], start=len(places[:kept])):
            query, value = torch.tensor([0.3 * x, 0.3 * y]), torch.full((4,), float(number))
            done = stream.history.apply(draft, rules, query, torch.tensor([label]), value, number)
            slot = draft.snapshot().row(done.row).value_slot
            stream.history.record(
                Edit(
                    number,
                    done.outcome,
                    done.row,
                    done.distance,
                    done.radius,
                    query,
                    torch.tensor([label]),
                    done.value_before,
                    slot,
                ),
                draft.snapshot().row(done.row).label_slot,
            )
        raise OSError("disk full")
    assert same(stream.live_rows(), before)
    assert stream.history.rows == remembered.rows
    assert list(stream.history.edits) == list(remembered.edits)
    assert stream.history.label_slots == remembered.label_slots


def test_who_keeps_a_split_up_after_its_own_undo_is_named():
    stream = Stream(Rules(1.0))
    first = stream.edit(zero(), 1)
    inside = stream.edit(zero(0.9), 1)
    split = stream.edit(zero(0.8), 2)
    keeper = stream.edit(zero(0.7), 2)
    assert (split.outcome, keeper.outcome) == ("split", "reused")
    stream.undo(split.id)
    assert stream.verify().superseded == {inside.id: keeper.id}
    stream.undo(keeper.id)
    assert stream.verify().fires == [first.id, inside.id]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_mean_of_two_large_keys_does_not_overflow(dtype):
    large = torch.finfo(dtype).max
    book, history = gf.Codebook(1, 1, dtype), History()
    rules = Rules(1e38 if dtype != torch.float16 else 1000.0, "moving_average")
    near = torch.tensor(large, dtype=dtype)
    far = near - near / 128
    with book.writing() as draft:
        for number, query in enumerate((near, far)):
            value = torch.zeros(1, dtype=dtype)
            done = history.apply(draft, rules, query[None], torch.tensor([1]), value, number)
            draft.set_radius(0, 0.0)  # so that the second one is outside, and moves the key
    assert done.outcome == "expanded"
    assert bool(book.keys.isfinite().all())
    assert float(far) <= float(book.keys[0]) <= float(near)
