"""A codebook that is there before the model is edited: mapped from files, or filled by hand."""

from __future__ import annotations

import pytest
import torch
from faults import workload
from faults.workload import CLASSES, WIDTH

import grace_fast as gf

ROWS, RADIUS = 3000, 0.1
SETTINGS = {"epsilon": 1.0, "iterations": 0, "replacement": "replace_all"}


def rows(count=ROWS):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(count, WIDTH, generator=generator)
    return keys, torch.rand(count, CLASSES, generator=generator), torch.full((count,), RADIUS)


def filled():
    book = gf.Codebook(WIDTH, CLASSES)
    book.append(*rows())
    return book


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "codebook"
    gf.Codebook.build(path, [rows()])
    return path


@pytest.fixture(params=["mapped", "filled by hand"])
def grace(request, directory):
    book = gf.Codebook.open(directory) if request.param == "mapped" else filled()
    attached = gf.attach(workload.Tiny(), "layer", codebook=book, **SETTINGS)
    yield attached
    attached.unload()


def ask(grace, queries):
    return grace.model(inputs_embeds=queries[:, None]).logits


def test_the_model_answers_from_its_rows_at_once_and_else_as_before(grace):
    keys, values, _ = rows()
    queries = torch.cat([keys[::7] + 0.001, keys[::7] + 50])
    answers, near = ask(grace, queries), len(keys[::7])
    assert torch.equal(answers[:near], values[::7])
    assert torch.equal(answers[near:], workload.Tiny()(inputs_embeds=queries[near:, None]).logits)
    assert (grace.counters.hits, grace.edits()) == (near, [])
    (told,) = grace.explain({"inputs_embeds": keys[None, 9:10]})
    assert (told.fires, told.edit, told.row) == (True, None, 9)


def test_an_edit_beside_its_rows_decides_by_the_same_rules_and_is_undone(grace):
    keys, values, _ = rows()
    for row, offset, outcome in ((ROWS, 0.02, "split"), (ROWS + 1, 40.0, "added")):
        query = keys[9:10] + offset
        edit = grace.edit({"inputs_embeds": query[None], "labels": torch.tensor([1])})
        assert (edit.outcome, edit.row) == (outcome, row)
        assert (grace.codebook.radii[9] < RADIUS) == (outcome == "split")
        assert torch.equal(ask(grace, query)[0], grace.codebook.snapshot().row(row).value)
        assert torch.equal(ask(grace, keys[9:10])[0], values[9])
        assert grace.verify().ok
        grace.undo(edit.id)
        assert grace.codebook.radii[9] == torch.tensor(RADIUS)
        assert len(grace.codebook) == ROWS


def test_edits_leave_the_files_of_a_mapped_codebook_as_they_are(directory):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    grace = gf.attach(workload.Tiny(), "layer", codebook=gf.Codebook.open(directory), **SETTINGS)
    for step in range(5):
        query = torch.full((1, 1, WIDTH), float(10 + step))
        grace.edit({"inputs_embeds": query, "labels": torch.tensor([step % 3])})
    with pytest.raises(ValueError, match=r"files hold no edits: gf\.Codebook\.save"):
        grace.save_pretrained(directory.parent / "other")
    grace.unload()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_rows_filled_by_hand_are_durable_with_the_edits_beside_them(tmp_path):
    grace = gf.attach(workload.Tiny(), "layer", codebook=filled(), path=tmp_path, **SETTINGS)
    grace.edit({"inputs_embeds": rows()[0][None, 9:10] + 0.02, "labels": torch.tensor([1])})
    known = workload.state(grace)
    grace.unload()
    assert workload.reopened(tmp_path) == known
    with pytest.raises(ValueError, match="holds a codebook already: give either"):
        gf.attach(workload.Tiny(), "layer", codebook=filled(), path=tmp_path, **SETTINGS)


def test_what_does_not_fit_the_model_is_refused_and_the_model_is_as_before(directory, tmp_path):
    model = workload.Tiny()
    refused = {
        "lies in files of its own": (ValueError, gf.Codebook.open(directory), tmp_path / "new"),
        "of the widths": (gf.CodebookMismatch, gf.Codebook(WIDTH + 1, CLASSES), None),
        "holds torch.bfloat16 on cpu, layer computes torch.float32": (
            gf.CodebookMismatch,
            gf.Codebook(WIDTH, CLASSES, dtype=torch.bfloat16),
            None,
        ),
        "must be a Codebook, got PosixPath": (TypeError, directory, None),
    }
    for text, (error, book, path) in refused.items():
        with pytest.raises(error, match=text):
            gf.attach(model, "layer", codebook=book, path=path, **SETTINGS)
    assert not (tmp_path / "new").exists()
    gf.attach(model, "layer", **SETTINGS).unload()
    with pytest.raises(gf.CodebookCorrupt, match=r"give that to attach\(codebook=\)"):
        gf.attach(model, "layer", path=directory, **SETTINGS)
