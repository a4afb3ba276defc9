"""The recorded decisions of the authors' adaptor, replayed step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grace_fast as gf
from grace_fast import semantics
from grace_fast.edits.history import History

FOLDER = Path(__file__).parents[1] / "golden"
TRACES = json.loads((FOLDER / "index.json").read_text())


@pytest.mark.parametrize("trace", TRACES, ids=[trace["file"].split(".")[0] for trace in TRACES])
def test_every_recorded_decision_of_the_reference_is_made_again(trace):
    recorded = load_file(FOLDER / trace["file"])
    rules = semantics.Rules(trace["eps"], trace["eps_expand"], semantics="reference")
    weight, bias = recorded["weight"], recorded["bias"]
    book, history = gf.Codebook(24, 12), History()
    hits = 0
    for step, (x, label) in enumerate(zip(recorded["x"], recorded["label"], strict=True)):
        query, output = x[0, -1] if x.ndim == 3 else x[-1], x @ weight.T + bias
        output = output.reshape(1, 5, 12)
        if label >= 0:
            row = len(book)
            warm = trace["val_init"] == "warm"
            fresh = output[0, -1] if warm else recorded["values"][min(row, trace["keys"] - 1)]
            with book.writing() as draft:
                history.apply(draft, rules, query, label.reshape(1), fresh, step)
        assert len(book) == recorded["n_keys"][step], step
        radii = recorded["radii"][step]
        torch.testing.assert_close(book.radii, radii[: len(book)], rtol=0, atol=1e-5)
        assert radii[len(book) :].isnan().all()
        if len(book):
            near = gf.nearest(query[None], book)
            assert near.row[0] == recorded["nearest"][step], step
        match = gf.find(query[None], book)
        assert bool(match.hit[0]) == bool(recorded["hit"][step]), step
        hits += int(match.hit[0])
        out = gf.replace(output, query[None], book, mode=trace["replacement"])
        torch.testing.assert_close(out[0], recorded["out"][step], rtol=0, atol=1e-5)
    assert hits == trace["hits"]
    torch.testing.assert_close(book.keys, recorded["keys"], rtol=0, atol=1e-5)
    torch.testing.assert_close(book.values, recorded["values"], rtol=0, atol=1e-5)
    assert [int(label) for label in book.labels] == recorded["key_labels"].tolist()
