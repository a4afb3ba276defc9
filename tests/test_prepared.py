"""The prepared look-up as an op: its schema, its fake, and a compiled graph that sees edits."""

import gc

import pytest
import torch

import grace_fast as gf


def book_of(rows, width=16):
    keys = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    book = gf.Codebook(width, 3)
    book.append(keys, torch.zeros(rows, 3), torch.full((rows,), 0.5))
    return book


def test_the_op_keeps_its_schema():
    prepared = gf.prepare(book_of(20))
    torch.library.opcheck(torch.ops.grace_fast.find, (torch.randn(4, 16), prepared._handle))


def test_a_compiled_graph_sees_edits_without_recompiling():
    book = book_of(20)
    prepared = gf.prepare(book)
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    @torch.compile(backend=backend, fullgraph=True)
    def hits(queries):
        return prepared(queries).hit & (queries.sum(dim=1) == queries.sum(dim=1))

    query = book.keys[3:5].clone()
    assert hits(query).tolist() == [True, True]
    book.remove(int(book.ids[3]))
    assert hits(query).tolist() == [False, True]
    book.append(query[:1], torch.zeros(1, 3), torch.ones(1))
    assert hits(query).tolist() == [True, True]
    assert len(graphs) == 1


def test_a_graph_whose_codebook_is_gone_says_so():
    prepared = gf.prepare(book_of(20))
    handle = prepared._handle
    del prepared
    gc.collect()
    with pytest.raises(RuntimeError, match="codebook that this graph was compiled for is gone"):
        torch.ops.grace_fast.find(torch.zeros(1, 16), handle)


def test_only_a_codebook_can_be_prepared():
    with pytest.raises(TypeError, match="codebook must be a Codebook, got Tensor"):
        gf.prepare(torch.zeros(3))
