"""The demo: its data, its bars, and a small run from end to end."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

import grace_fast as gf
from grace_fast.edits.verify import Replay, Verification
from grace_fast.tools.demo import measured, story
from grace_fast.tools.demo.measured import Point
from grace_fast.tools.evaluate import docstrings, mistakes
from grace_fast.tools.evaluate.docstrings import Docstring, Rewording


def first_words(texts):
    """Stand in for a tokenizer: lower case, cut off after four words."""
    return [[hash(word) for word in text.lower().split()[:4]] for text in texts]


@pytest.fixture(scope="module")
def docs():
    return docstrings.docstrings()


def test_every_module_has_docstrings_enough_to_learn_and_to_edit(docs):
    counts = Counter(doc.label for doc in docs)
    assert sorted(counts) == list(range(len(docstrings.MODULES)))
    assert min(counts.values()) >= 40


def test_a_module_without_python_source_is_refused_by_name():
    with pytest.raises(LookupError, match=r"Python source of 'math', and this Python has none"):
        docstrings.docstrings(["email", "math"])


def test_a_text_counts_once_as_the_model_sees_it():
    docs = [
        Docstring("Return the user name.", 0),
        Docstring("return the USER name.", 0),
        Docstring("Return the user name. It may be empty.", 0),
        Docstring("Close the socket.", 0),
    ]
    assert docstrings.distinct(docs, first_words) == [docs[0], docs[3]]


def test_a_text_of_two_modules_is_dropped_from_both():
    docs = [
        Docstring("Return the user name.", 0),
        Docstring("Return the user name.", 1),
        Docstring("Return the user name.", 1),
        Docstring("Close the socket.", 1),
    ]
    assert docstrings.distinct(docs, first_words) == [docs[3]]


def test_the_same_seed_deals_the_same_docstrings_and_another_seed_others(docs):
    assert docstrings.split(docs, seed=3) == docstrings.split(docstrings.docstrings(), seed=3)
    assert docstrings.split(docs, seed=3) != docstrings.split(docs, seed=4)


def test_no_docstring_is_dealt_twice(docs):
    different = docstrings.distinct(docs, lambda texts: [[hash(text)] for text in texts])
    splits = docstrings.split(different, seed=0, per_module=50)
    dealt = [doc.text for part in vars(splits).values() for doc in part]
    assert len(dealt) == len(set(dealt))
    per_module = Counter(doc.label for part in vars(splits).values() for doc in part)
    assert max(per_module.values()) == 50


@pytest.mark.parametrize(
    ("how", "text", "reworded"),
    [
        ("without the final stop", "Close the socket. ", "Close the socket"),
        ("without articles", "Return the name of a theatre.", "Return name of theatre."),
        ("in the third person", "Return the name.", "Returns the name."),
        ("in the third person", "Like quote(), for bytes.", "Like quote(), for bytes."),
    ],
)
def test_rewordings_keep_the_meaning(how, text, reworded):
    assert docstrings.REWORDINGS[how](text) == reworded


def test_a_rewording_that_the_model_cannot_tell_from_a_text_is_left_out():
    docs = [
        Docstring("Close it.", 0),  # without the final stop: the model sees a new text
        Docstring("Return all that there is.", 0),  # no articles to leave out
        Docstring("Return one.", 0),  # in the third person: the next text
        Docstring("Returns one.", 1),  # without the final stop: new
    ]
    assert docstrings.rewordings(docs, first_words) == [
        Rewording(0, "without the final stop", "Close it"),
        Rewording(3, "without the final stop", "Returns one"),
    ]


def test_epsilon_is_half_the_distance_to_another_module():
    queries = torch.arange(20.0)[:, None] * 3 + torch.tensor([0.0, 1.0]).repeat(10)[:, None]
    labels = torch.tensor([0, 1]).repeat(10)
    originals, reworded = torch.zeros(4, 1), torch.tensor([[0.5], [0.9], [1.5], [1.0]])
    scale = mistakes.measure("here", queries, labels, originals, reworded)
    assert scale.unrelated == 2.0  # the queries are 0, 4, 6, 10, 12, ... of two modules by turns
    assert scale.epsilon == 1.0
    assert scale.inside == 0.75
    assert mistakes.choose([scale]).layer == "here"
    assert mistakes.reason(scale).startswith("epsilon 1 at here: only 5% of the inputs")


def test_look_ups_are_timed_on_the_same_decisions():
    book = gf.Codebook(8, 2)
    keys = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    book.append(keys, torch.zeros(40, 2), torch.full((40,), 0.5))
    find_us, reference_us, disagreements = measured.time_lookups(keys + 0.01, book)
    assert find_us > 0
    assert reference_us > 0
    assert disagreements == 0


POINT = dict.fromkeys(("hit_rate", "edit_ms", "find_us", "reference_us", "disagreements"), 0)
FIRES, BROKEN = (Verification((Replay(0, verdict),)) for verdict in ("fires", "broken"))


@pytest.mark.parametrize(
    ("es", "keys", "err", "trr", "verified", "failures"),
    [
        pytest.param(1.0, 9, 1.0, 1.0, FIRES, [], id="all is well"),
        pytest.param(0.99, 9, 0.95, 0.99, FIRES, [], id="on the bars is enough"),
        pytest.param(0.98, 9, 1.0, 1.0, FIRES, ["ES must be at least .99, got 0.9800"], id="ES"),
        pytest.param(1.0, 9, 0.94, 1.0, FIRES, ["ERR must be at least .95, got 0.9400"], id="ERR"),
        pytest.param(
            1.0, 9, 1.0, 0.98, FIRES, ["TRR may fall by .01, it fell by 0.0200"], id="TRR"
        ),
        pytest.param(
            1.0, 10, 1.0, 1.0, FIRES, ["keys must be fewer than edits, got 10 for 10"], id="keys"
        ),
        pytest.param(
            1.0, 9, 1.0, 1.0, BROKEN, ["verify must find every edit, broken are [0]"], id="verify"
        ),
    ],
)
def test_a_missed_bar_is_named(es, keys, err, trr, verified, failures):
    last = Point(edits=10, keys=keys, es=es, err=err, trr=trr, **POINT)
    assert story.missed(last, verified) == failures


@pytest.mark.slow
def test_a_small_run_repairs_its_mistakes_and_writes_what_it_printed(tmp_path, capsys):
    threads = torch.get_num_threads()
    figures = story.run(tmp_path, per_module=30)
    printed = capsys.readouterr().out

    last, final = figures["points"][-1], figures["final"]
    assert last["es"] >= 0.99
    assert final["err"] >= 0.95
    assert final["trr"] >= 0.99
    assert final["unchanged"] == pytest.approx(1 - last["hit_rate"])
    assert last["trr"] == pytest.approx(final["trr"])
    assert figures["verify"]["broken"] == []
    edited, *_, unrelated = figures["examples"]
    assert edited["before"] != edited["after"] == edited["wanted"]
    assert unrelated["bit_for_bit"]

    assert f"{last['edits']} edits on {last['keys']} keys: ES {last['es']:.3f}" in printed
    assert json.loads((tmp_path / "demo.json").read_text()) == figures
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_the_demo_prints_nothing_where_its_caller_prints_json(tmp_path, capsys):
    figures = story.run(tmp_path, as_json=True, per_module=12)
    assert capsys.readouterr().out == ""
    json.dumps(figures)
