"""A durable codebook beside a model of it in numpy, whatever is done to it in whatever order."""

from __future__ import annotations

import shutil
import tempfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import workload
from grace_model import Model
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import grace_fast as gf

EPSILON, MARGIN = 1.0, 1e-5
PLACES = st.tuples(st.integers(-5, 5), st.integers(-1, 1))
PICKS = st.integers(0, 1000)
DONE: dict[str, int] = {}  # how often each rule was taken


def at(place):
    """The query of a place on a grid whose neighbours share balls."""
    query = np.zeros(workload.WIDTH, np.float32)
    query[:2] = 0.3 * np.array(place)
    return query


def fresh_value(edit):
    """What a value is before it is trained."""
    return torch.rand(workload.CLASSES, generator=torch.Generator().manual_seed(edit))


def count(name):
    DONE[name] = DONE.get(name, 0) + 1


class Durable(RuleBasedStateMachine):
    """An editor with a directory, and what it has to be."""

    def __init__(self):
        super().__init__()
        self.room = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.folder, self.copies = self.room / "book", 0

    @initialize()
    def begin(self):
        self.grace = workload.attach(self.folder, epsilon=EPSILON, expand_margin=MARGIN)
        self.model = Model(EPSILON, MARGIN)
        self.versions = {0: deepcopy(self.model)}

    def teardown(self):
        if hasattr(self, "grace"):
            self.grace.unload()
        shutil.rmtree(self.room)

    def keep(self, name):
        self.versions[self.grace.codebook.version] = deepcopy(self.model)
        count(name)

    def edit_at(self, query, label):
        done = self.grace.edit(
            {
                "inputs_embeds": torch.from_numpy(query)[None, None],
                "labels": torch.tensor([label]),
            }
        )
        assert (done.outcome, done.row) == self.model.edit(query, label)
        self.keep(done.outcome)

    @rule(asked=st.lists(st.tuples(PLACES, st.integers(0, 2)), min_size=2, max_size=8))
    def edit(self, asked):
        for place, label in asked:
            self.edit_at(at(place), label)

    @precondition(lambda self: self.model.labels)
    @rule(pick=PICKS, other=st.integers(1, 2))
    def contradict(self, pick, other):
        edits = self.grace.edits()
        edit = edits[pick % len(edits)]
        self.edit_at(edit.query.numpy(), (int(edit.label) + other) % 3)

    @precondition(lambda self: self.model.labels)
    @rule(pick=PICKS)
    def undo(self, pick):
        edit = list(self.model.labels)[pick % len(self.model.labels)]
        assert self.grace.undo(edit).id == edit
        self.model.undo(edit)
        self.keep("undo")

    @precondition(lambda self: any(row.is_live for row in self.model.rows))
    @rule(pick=PICKS)
    def remove(self, pick):
        live = [number for number, row in enumerate(self.model.rows) if row.is_live]
        row, book = live[pick % len(live)], self.grace.codebook
        book.remove(int(book.ids[row]))
        self.model.rows[row].is_live = False
        self.keep("remove")

    @rule(pick=PICKS)
    def checkout(self, pick):
        version = list(self.versions)[pick % len(self.versions)]
        self.grace.checkout(version)
        self.model.go_back(deepcopy(self.versions[version]))
        self.keep("checkout")

    @rule(how=st.sampled_from(["compact", "reopen", "crash", "save and load"]))
    def outlive(self, how):
        {
            "compact": self.compact,
            "reopen": self.reopen,
            "crash": self.crash,
            "save and load": self.save_and_load,
        }[how]()
        count(how)

    def compact(self):
        self.grace.compact()
        self.versions = {self.grace.codebook.version: deepcopy(self.model)}

    def reopen(self):
        self.grace.unload()
        self.grace = workload.attach(self.folder)

    def crash(self):
        """Go on with the directory as another process would find it now."""
        self.copies += 1
        copy = self.room / f"copy-{self.copies}"
        shutil.copytree(self.folder, copy)
        self.grace.unload()
        self.folder, self.grace = copy, workload.attach(copy)

    def save_and_load(self):
        saved = self.room / "saved"
        self.grace.save_pretrained(saved)
        loaded = gf.from_pretrained(workload.Tiny(), saved)
        self.is_the_model(loaded)
        loaded.unload()

    @rule(places=st.lists(PLACES, min_size=1, max_size=8))
    def query(self, places):
        queries = np.stack([at(place) for place in places])
        rows = [self.model.hit(query) for query in queries]
        assert gf.find(torch.from_numpy(queries), self.grace.codebook).row.tolist() == rows
        for query, row in zip(torch.from_numpy(queries), rows, strict=True):
            logits = self.grace.model(inputs_embeds=query[None, None]).logits[0]
            made_by = self.model.rows[row].made_by if row >= 0 else None
            wanted = query[: workload.CLASSES] if made_by is None else fresh_value(made_by)
            assert torch.equal(logits, wanted)
        count("query")

    @invariant()
    def is_what_the_model_is(self):
        if hasattr(self, "grace"):
            self.is_the_model(self.grace)

    def is_the_model(self, grace):
        book, model = grace.codebook.snapshot(), self.model
        assert [edit.id for edit in grace.edits()] == sorted(model.labels)
        assert book.live.tolist() == [row.is_live for row in model.rows]
        assert len(book) == sum(row.is_live for row in model.rows)
        for number, row in enumerate(model.rows):
            if row.is_live:
                assert np.array_equal(book.row(number).key.numpy(), row.key)
                assert book.row(number).radius == model.radius(number)
                assert book.row(number).label.tolist() == [model.labels[row.edits[-1]]]


def run(examples, steps):
    """Run the machine, the same each time; say how often each rule was taken."""
    DONE.clear()
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    test = Durable.TestCase("runTest")
    test.settings = chosen
    test.runTest()
    print(f"S1: {examples} runs, {sum(DONE.values())} steps: {dict(sorted(DONE.items()))}")
    return DONE


OUTCOMES = {"added", "split", "expanded", "reused", "replaced"}
OTHERS = {"undo", "remove", "checkout", "query", "compact", "reopen", "crash", "save and load"}


@pytest.mark.filterwarnings("ignore::grace_fast.GraceWarning")
def test_whatever_is_done_to_a_durable_codebook_it_is_what_its_model_is():
    assert set(run(examples=25, steps=25)) == OUTCOMES | OTHERS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::grace_fast.GraceWarning")
def test_many_long_runs_leave_a_durable_codebook_as_its_model():
    done = run(examples=250, steps=50)
    assert set(done) == OUTCOMES | OTHERS
    assert sum(done.values()) > 3000
