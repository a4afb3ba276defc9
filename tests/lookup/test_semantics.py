"""The edit table, the margin, labels and replacement, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grace_fast import semantics
from grace_fast.semantics import Rules, decide

PAPER = Rules(1.0, margin=1e-5)
MOVING = Rules(1.0, "moving_average", margin=1e-5)
REFERENCE = Rules(1.0, semantics="reference")

# name: (rules, distance, radius, same label) -> (outcome, radius, nearest's radius, moves)
TABLE = {
    "the first key is added": ((PAPER, math.inf, 0.0, False), ("added", 1.0, None, False)),
    "far away is added": ((PAPER, 3.0, 1.5, True), ("added", 1.0, None, False)),
    "exactly e0 + e is still near": ((PAPER, 2.5, 1.5, False), ("split", 1.25, 1.24999, False)),
    "another label in reach splits": ((PAPER, 1.0, 1.5, False), ("split", 0.5, 0.49999, False)),
    "a like label outside expands": ((PAPER, 2.0, 1.5, True), ("expanded", 2.00002, None, False)),
    "a moving average also moves": ((MOVING, 2.0, 1.5, True), ("expanded", 2.00002, None, True)),
    "a like label inside is reused": ((PAPER, 1.0, 1.5, True), ("reused", 1.5, None, False)),
    "on the radius is inside": ((PAPER, 1.5, 1.5, True), ("reused", 1.5, None, False)),
    "a repeat with a new label replaces": (
        (PAPER, 1e-6, 1.5, False),
        ("replaced", 1.5, None, False),
    ),
    "a repeat on a small ball opens it": (
        (PAPER, 1.5e-5, 1e-6, False),
        ("replaced", 2e-5, None, False),
    ),
    "a repeat on a dead key revives it": (
        (PAPER, 0.0, -1.0, False),
        ("replaced", 2e-5, None, False),
    ),
    "a like label on a dead key expands": (
        (PAPER, 0.0, -0.5, True),
        ("expanded", 0.0, None, False),
    ),
    "the reference has no margin": ((REFERENCE, 2.0, 1.5, True), ("expanded", 2.0, None, False)),
    "the reference kills on a repeat": ((REFERENCE, 0.0, 1.0, False), ("split", 0.0, -1e-5, False)),
}


@pytest.mark.parametrize("case", list(TABLE))
def test_an_edit_is_decided_as_the_table_says(case):
    (rules, distance, radius, same), (outcome, after, nearest_after, moves) = TABLE[case]
    decision = decide(rules, distance**2, radius, same)
    assert decision.outcome == outcome
    assert decision.radius == pytest.approx(after, rel=1e-6, abs=1e-12)
    assert decision.moves_key is moves
    if nearest_after is None:
        assert decision.nearest_radius is None
    else:
        assert decision.nearest_radius == pytest.approx(nearest_after, rel=1e-9)


@given(st.floats(0, 1e30), st.sampled_from([0.0, 1e-5, 2.5e-3, 2e-2]))
def test_a_grown_radius_covers_its_own_distance(squared, margin):
    radius = semantics.covering_radius(squared, margin)
    assert torch.tensor(radius, dtype=torch.float32).item() == radius
    assert bool(semantics.in_ball(torch.tensor(squared, dtype=torch.float64), torch.tensor(radius)))
    if margin == 0.0 and radius > 0:  # and is the least float32 that does
        below = torch.nextafter(torch.tensor(radius), torch.tensor(-1.0))
        assert below.double() ** 2 < squared or float(below) < math.sqrt(squared)


def test_a_replaced_edit_is_inside_its_ball_even_where_the_root_rounds_down():
    rules = Rules(1.0, margin=0.5)  # a repeat is what is not beyond .5
    squared = 0.25 * (1 + 2.0**-52)
    assert math.sqrt(squared) == 0.5
    decision = decide(rules, squared, 0.1, same_label=False)
    assert decision.outcome == "replaced"
    assert squared <= decision.radius**2


@pytest.mark.parametrize("dtype", semantics.EXPAND_MARGIN, ids=str)
def test_the_margin_covers_what_was_measured_between_batch_shapes(dtype):
    # MiniLM layer 4, a batch of 16 against single prompts, relative to the distance; fp16 has three
    # more bits than bf16.
    jitter = {torch.float32: 2e-6, torch.bfloat16: 1.3e-2, torch.float16: 1.3e-2 / 8}[dtype]
    margin = semantics.EXPAND_MARGIN[dtype]
    assert jitter < margin < 10 * jitter
    grown = decide(Rules(1.0, margin=margin), 2.25, 1.0, same_label=True)
    assert grown.radius >= 1.5 * (1 + jitter)


@pytest.mark.parametrize(
    ("rules", "one", "other", "same"),
    [
        (PAPER, [4, 6], [4, 6], True),
        (PAPER, [1, 9], [4, 6], False),
        (PAPER, [4], [4, 6], False),
        (REFERENCE, [1, 9], [4, 6], True),
        (REFERENCE, [-100, 5], [5], False),
    ],
    ids=["equal ids", "paper compares ids", "a longer label", "means", "-100 counts in a mean"],
)
def test_labels_match_by_ids_or_in_the_reference_by_means(rules, one, other, same):
    assert semantics.same_label(rules, torch.tensor(one), torch.tensor(other)) is same


def test_ignored_labels_and_padding_do_not_count():
    labels = torch.tensor([[-100, 7, 8, 0, -100, 0]])
    assert semantics.label_ids(labels, padding=0).tolist() == [7, 8]
    assert semantics.label_ids(labels).tolist() == [7, 8, 0, 0]


def test_the_three_modes_replace_all_the_query_or_what_is_before_it():
    positions = torch.tensor([0, 2, 3])
    masks = {
        "replace_all": ["1111", "1111", "1111"],
        "replace_last": ["1000", "0010", "0001"],
        "replace_prompt": ["0000", "1100", "1110"],
    }
    for mode, rows in masks.items():
        expected = torch.tensor([[token == "1" for token in row] for row in rows])
        assert torch.equal(semantics.replacement_mask(mode, positions, 4), expected), mode
    with pytest.raises(ValueError, match=r"replacement must be one of .*replace_prompt.*got 'all'"):
        semantics.replacement_mask("all", positions, 4)


def test_only_hits_are_replaced_and_only_where_the_mask_says():
    output = torch.arange(24.0).reshape(2, 3, 4)
    values = torch.full((2, 4), -1.0)
    mask = torch.tensor([[True, True, False]] * 2)
    replaced = semantics.replace(output, torch.tensor([False, True]), values, mask)
    assert torch.equal(replaced[0], output[0])
    assert torch.equal(replaced[1, :2], values[:1].expand(2, 4))
    assert torch.equal(replaced[1, 2], output[1, 2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be a positive number of float32, got 0.0"),
        ({"epsilon": 1e300}, "epsilon must be a positive number of float32, got 1e"),
        ({"epsilon": math.nan}, "epsilon must be a positive number of float32, got nan"),
        ({"epsilon": 1.0, "margin": -1.0}, "expand_margin must be a number >= 0, got -1.0"),
        ({"epsilon": 1.0, "expand": "grow"}, "expand must be one of"),
        ({"epsilon": 1.0, "semantics": "mine"}, "semantics must be one of"),
    ],
    ids=[
        "zero epsilon",
        "vast epsilon",
        "NaN epsilon",
        "negative margin",
        "unknown expand",
        "unknown semantics",
    ],
)
def test_rules_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Rules(**fields)
