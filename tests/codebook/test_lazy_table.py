"""The table of items that are made when they are asked for: what is set, deleted and taken back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_fast.codebook import lazy_table

Table = getattr(lazy_table, "LazyTable", None) or lazy_table.Kept


class Columns:
    """Numbers 0, 2, 4, ... with their squares, made anew each time."""

    def __init__(self, count):
        self.numbers = 2 * np.arange(count)

    def make(self, at):
        return int(self.numbers[at]) ** 2


def test_items_come_in_order_whether_they_lay_in_columns_or_were_set():
    table = Table(Columns(4))
    table[3], table[2] = "three", "two"
    del table[4]
    assert list(table.items()) == [(0, 0), (2, "two"), (3, "three"), (6, 36)]
    assert len(table) == 4
    assert 4 not in table
    with pytest.raises(KeyError):
        table[4]


def test_a_mark_is_gone_back_to_and_the_one_before_it_too():
    table = Table(Columns(3))
    outer = table.mark()
    table[1] = "one"
    inner = table.mark()
    del table[0]
    table[1] = "another"
    table.take_back(inner)
    assert dict(table) == {0: 0, 1: "one", 2: 4, 4: 16}
    table.let_go()
    table.take_back(outer)
    assert dict(table) == {0: 0, 2: 4, 4: 16}
    table.let_go()


def test_what_was_let_go_is_not_taken_back_by_a_later_mark():
    table = Table(Columns(2))
    table.mark()
    table[5] = "stays"
    table.let_go()  # an edit that was made: nobody goes back before it
    mark = table.mark()
    table[7] = "goes"
    table.take_back(mark)
    assert dict(table) == {0: 0, 2: 4, 5: "stays"}
    assert mark == 0  # nothing is remembered of what nobody can go back to


def test_a_table_that_is_edited_for_ever_remembers_nothing_of_it():
    table = Table()
    for number in range(100):
        table.mark()
        table[number] = number
        table.let_go()
    assert table.mark() == 0


CHANGES = st.lists(st.tuples(st.sampled_from(["set", "delete"]), st.integers(0, 9)), max_size=12)


@given(CHANGES, CHANGES)
def test_it_is_a_dictionary_with_a_way_back(before, after):
    table, model = Table(Columns(4)), {2 * at: 4 * at * at for at in range(4)}

    def change(changes):
        for kind, number in changes:
            if kind == "set":
                table[number] = model[number] = (kind, number)
            elif number in model:
                del table[number], model[number]

    change(before)
    known, mark, copied = dict(model), table.mark(), table.copy()
    change(after)
    assert dict(table) == dict(sorted(model.items()))
    assert dict(copied) == known
    table.take_back(mark)
    table.let_go()
    assert dict(table) == known
