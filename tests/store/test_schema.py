"""The schema of edits: a field of one has a column in the base and in the journal, by one line."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from grace_fast.edits.edit import Edit, Event
from grace_fast.store import schema
from grace_fast.store.schema import EDITS, EVENTS, Field

EDIT = Edit(
    id=3,
    outcome="split",
    row=2,
    distance=0.25,
    radius=0.5,
    query=torch.ones(2),
    label=None,
    value_before=None,
    value_after=7,
    loss=0.125,
    steps=4,
    correct=True,
    prompt=99,
)


def test_every_field_of_an_edit_and_of_an_event_has_a_column():
    named = {field.name for field in EDITS.fields}
    beside = {"query", "label", "text"}  # a matrix, the label's slot, and the manifest
    assert {field.name for field in fields(Edit)} == named - {"label_slot"} | beside
    assert {field.name for field in fields(Event)} == {
        each.attribute or each.name for each in EVENTS.fields
    }


@pytest.mark.parametrize("each", [EDITS, EVENTS], ids=["edits", "events"])
def test_columns_of_a_version_have_a_place_each(each):
    for is_fraction in (False, True):
        places = [f.place for f in each.fields if (f.dtype == torch.float64) == is_fraction]
        assert sorted(places) == list(range(len(places)))


def test_a_new_field_is_one_line():
    """It is written to and read from a base and a version, None and all."""
    newest = max(field.place for field in EDITS.fields if field.dtype != torch.float64)
    more = replace(
        EDITS,
        fields=(*EDITS.fields, Field("author", torch.int64, newest + 1, *schema.OR_NONE)),
    )
    edits = [vars(EDIT) | {"label_slot": 5, "author": author} for author in (None, 12)]
    columns = more.numbers(edits)
    base, version = more.to_base(columns), more.to_record(columns)
    assert base["edits.author"].tolist() == [-1, 12]
    assert version["edits"].shape == (2, len(EDITS.fields) - 3 + 1)
    for again in (more.from_base(base), more.from_record(version)):
        assert list(again) == list(columns)
        for name in columns:
            np.testing.assert_array_equal(again[name], columns[name])
            assert again[name].dtype == columns[name].dtype
        assert [more.values(again, at)["author"] for at in (0, 1)] == [None, 12]
        assert more.values(again, 0)["outcome"] == "split"
        assert more.values(again, 0)["value_before"] is None
