"""The edits of a row: any number of them, any order of taking them back, in few steps each."""

from __future__ import annotations

import random

import pytest
import torch

from grace_fast.codebook import ascending
from grace_fast.codebook.ascending import Ascending
from grace_fast.codebook.codebook import Codebook
from grace_fast.edits.edit import Edit, Event
from grace_fast.edits.history import History


def nodes_of(items):
    """Every node of a tree, by its identity."""
    found, left = {}, [(items._root, items._height)]
    while left:
        node, height = left.pop()
        found[id(node)] = node
        left += [(each, height - 1) for each in node[1]] if height else []
    return found


@pytest.mark.parametrize("seed", range(6))
def test_what_is_added_and_taken_out_is_what_a_list_would_hold(seed, monkeypatch):
    monkeypatch.setattr(ascending, "WIDTH", 2 + seed)
    drawn, items, known, older = random.Random(seed), Ascending(), {}, []
    for number in range(400):
        if known and drawn.random() < 0.45:
            gone = drawn.choice([min(known), max(known), drawn.choice([*known])])
            items = items.without(gone)
            del known[gone]
        else:
            items, known[number] = items.adding(number, str(number)), str(number)
        older.append((items, tuple(known.values())))
        assert items.get(number) == known.get(number)
        assert (len(items), bool(items)) == (len(known), bool(known))
        if known:
            assert (items[0], items[-1]) == (known[min(known)], known[max(known)])
    for version, wanted in older:
        assert tuple(version) == wanted
        assert repr(version) == repr(wanted)
    assert Ascending([*known], [*known.values()]) == items


def test_numbers_that_do_not_ascend_or_are_not_there_are_refused():
    items = Ascending([3, 5], "ab")
    with pytest.raises(ValueError, match="beyond 5 was wanted, got 5"):
        items.adding(5, "c")
    with pytest.raises(ValueError, match="must ascend"):
        Ascending([3, 3], "ab")
    for number in (2, 4, 6):
        assert items.get(number) is None
        with pytest.raises(KeyError):
            items.without(number)
    with pytest.raises(KeyError):
        Ascending().without(0)
    with pytest.raises(IndexError):
        Ascending()[0]


@pytest.mark.parametrize("count", [1000, 32_000])
def test_a_change_makes_one_branch_anew(count):
    """A list would be made anew whole, and a row of many edits take the square of their number."""
    numbers = range(count)
    grown = Ascending()
    for number in numbers:
        grown = grown.adding(number, number)
    for items in (grown, Ascending(numbers, numbers)):
        shared = nodes_of(items)
        for changed in (
            items.adding(count, count),
            items.without(0),
            items.without(count // 2),
            items.without(count - 1),
        ):
            made = [node for name, node in nodes_of(changed).items() if name not in shared]
            assert len(made) <= 5
            assert all(len(node[1]) <= ascending.WIDTH for node in made)


@pytest.mark.parametrize("order", ["oldest first", "newest first", "drawn"])
def test_no_edit_of_a_row_looks_at_all_the_others(order, monkeypatch):
    count, walks, walk = 400, [], Ascending.__iter__
    monkeypatch.setattr(Ascending, "__iter__", lambda items: walks.append(items) or walk(items))
    book, history, query = Codebook(4, 4), History(), torch.ones(4)
    with book.writing() as draft:
        draft.append(query[None], query[None], torch.tensor([0.5]), [torch.tensor([0])])
        for number in range(count):
            if number:
                draft.set_value(0, query)
            owner_row = None if number else 0
            history.add_event(Event(number, 0, 0.5 + number, 0, owner_row))
            before, after = (number - 1 if number else None), number
            outcome = "replaced" if number else "added"
            edit = Edit(number, outcome, 0, 1.0, 0.5, query, None, before, after)
            history.record(edit, 0)
        ids = [*range(count)]
        if order == "newest first":
            ids.reverse()
        elif order == "drawn":
            random.Random(0).shuffle(ids)
        for done, number in enumerate(ids, start=1):
            history.undo(draft, number)
            left = history.rows.get(0)
            assert (0 if left is None else len(left.edits)) == count - done
    assert not walks
    assert not history.edits
    assert len(book) == 0
