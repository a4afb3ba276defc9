"""The launches of eager and of captured look-ups, as Triton tells kernels apart.

Run as a program under the interpreter, see `test_triton_launches.py`. Nothing is computed: what a
launch is given is noted, by what a kernel is compiled for.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from triton.runtime.interpreter import InterpretedFunction

import grace_fast as gf
from grace_fast.index import maintained
from grace_fast.lookup.backends import graphs
from grace_fast.lookup.backends import triton as backend

BATCHES = (1, 2, 5, 40)


def kind_of(argument: object) -> object:
    """Return all of an argument that a kernel is compiled for."""
    if isinstance(argument, tuple):
        return tuple(kind_of(one) for one in argument)
    if isinstance(argument, torch.Tensor):
        return str(argument.dtype), argument.data_ptr() % 16 == 0
    if isinstance(argument, int) and not isinstance(argument, bool):
        return "int", argument == 1, argument % 16 == 0
    return repr(argument)


@contextmanager
def noted():
    """Collect the kernels that are launched, and what each is compiled for."""
    launches = []
    run = InterpretedFunction.run

    def note(kernel, *arguments, grid, warmup, **options):
        named = {name: repr(value) for name, value in sorted(options.items())}
        launches.append((kernel.fn.__name__, tuple(kind_of(one) for one in arguments), str(named)))

    InterpretedFunction.run = note
    try:
        yield launches
    finally:
        InterpretedFunction.run = run


@contextmanager
def capture():
    usual, graphs.is_capturing = graphs.is_capturing, lambda snapshot: True
    try:
        yield
    finally:
        graphs.is_capturing = usual


def launches_of(book: gf.Codebook, batch: int, positions: torch.Tensor | None) -> list:
    queries, output = torch.zeros(batch, book.key_dim), torch.zeros(batch, 3, 4)
    with noted() as launches:
        match = gf.find(queries, book, backend="triton")
        _ = match.squared_distance
        backend.write_(output, match.hit, match.row, book.snapshot(), positions, "replace_last")
    return launches


def assert_alike(book: gf.Codebook, what: str) -> set[str]:
    """Compare for several batches; return the kernels."""
    names = set()
    for batch in BATCHES:
        for positions in (None, torch.zeros(batch, dtype=torch.int64)):
            eager = launches_of(book, batch, positions)
            with capture():
                captured = launches_of(book, batch, positions)
            for one, other in zip(eager, captured, strict=True):
                assert one == other, (what, batch, one, other)
            names |= {name for name, _, _ in eager}
    return names


def append(book: gf.Codebook, rows: int) -> None:
    keys = torch.randn(rows, 24) * torch.arange(1, 25).float() ** -1
    values = torch.zeros(rows, 4, dtype=book.dtype)
    book.append(keys.to(book.dtype), values, torch.full((rows,), 0.1))


def settle(book: gf.Codebook) -> None:
    maintained.of(book.snapshot()).settle()


def main() -> None:
    torch.manual_seed(0)
    seen = set()
    backend.SHARED = 1  # codes pay for few queries; many are multiplied
    for dtype in (torch.float32, torch.bfloat16):
        book = gf.Codebook(24, 4, dtype=dtype)
        prepared = gf.Codebook(24, 4, dtype=dtype)
        append(prepared, 300)
        gf.find(prepared.keys[:1], prepared, backend="triton")  # a table that is not for graphs
        for one in (book, prepared):
            backend.keep_for_graphs(one)
        assert_alike(prepared, "kept after a look-up")
        assert_alike(book, "of no keys")
        append(book, 40)
        seen |= assert_alike(book, "few keys")
        append(book, 300)
        settle(book)
        seen |= assert_alike(book, "codes that graphs have yet to be told of")
        append(book, 1)
        seen |= assert_alike(book, "by codes")
        with book.writing() as draft:
            draft.set_key(5, torch.ones(24, dtype=dtype))
            draft.set_value(5, torch.ones(4, dtype=dtype))
        seen |= assert_alike(book, "after a key and a value moved")
        book.remove(int(book.ids[3]))
        append(book, 4096)
        seen |= assert_alike(book, "across pages")
    assert {"scan_keys", "filter_tiles", "collect", "write_values"} <= seen, seen


if __name__ == "__main__":
    main()
