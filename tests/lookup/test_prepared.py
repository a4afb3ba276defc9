"""The prepared look-up as an op: its schema, its fake, and a compiled graph that sees edits."""

import gc

import pytest
import torch

import grace_fast as gf
from grace_fast import errors


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


MODES = ("replace_all", "replace_last", "replace_prompt")


@pytest.mark.parametrize("mode", MODES)
def test_replacing_in_place_is_replacing(mode):
    book = book_of(20)
    with book.writing() as draft:
        draft.set_value(3, torch.ones(3))
    queries = torch.cat([book.keys[2:5] + 0.01, torch.full((2, 16), 9.0)])
    output = torch.randn(5, 4, 3)
    positions = torch.tensor([3, 2, 1, 0, 3])
    expected = gf.replace(output, queries, book, positions, mode)
    written = output.clone()
    assert gf.prepare(book).replace_(written, queries, positions, mode) is written
    assert torch.equal(written, expected)
    strided = output.transpose(1, 2).contiguous().transpose(1, 2)
    gf.prepare(book).replace_(strided, queries, positions, mode)
    assert torch.equal(strided, expected)


def test_the_replacing_op_keeps_its_schema():
    prepared = gf.prepare(book_of(20))
    arguments = (torch.randn(4, 5, 3), torch.randn(4, 16), torch.full((4,), 4), "replace_all")
    torch.library.opcheck(torch.ops.grace_fast.replace_, (*arguments, prepared._handle))


def test_a_compiled_layer_replaces_and_sees_edits_without_recompiling():
    book = book_of(20)
    prepared = gf.prepare(book)
    layer = torch.nn.Linear(16, 3)
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    @torch.compile(backend=backend, fullgraph=True)
    def edited(hidden):
        return prepared.replace_(layer(hidden), hidden[:, -1])

    hidden = torch.randn(2, 4, 16)
    with torch.no_grad():
        assert torch.equal(edited(hidden), layer(hidden))
        for number in range(20):
            value = torch.full((1, 3), float(number))
            book.append(hidden[:1, -1] + 1e-3 * number, value, torch.full((1,), 1e-4))
            hidden[0, -1] += 1e-3 * number
            assert torch.equal(edited(hidden)[0, :-1], value.expand(3, 3)), number
            assert torch.equal(edited(hidden)[1], layer(hidden)[1])
    assert len(graphs) == 1


def test_an_output_that_autograd_needs_is_not_written():
    book = book_of(20)
    output = torch.zeros(1, 2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="cannot be written in place; use replace"):
        gf.prepare(book).replace_(output, book.keys[:1])


@pytest.mark.parametrize(("old", "new"), [("wait", "build_index"), ("graphs", "cuda_graphs")])
def test_a_former_name_still_works_and_names_the_new_one(old, new):
    book = gf.Codebook(4, 2)
    errors._told.clear()
    with pytest.warns(DeprecationWarning, match=rf"prepare\({old}=\) is prepare\({new}=\) now"):
        find = gf.prepare(book, **{old: False})
    assert not find(torch.zeros(1, 4)).hit.any()
