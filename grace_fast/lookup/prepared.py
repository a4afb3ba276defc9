"""`find` for callers that ask again and again, in eager mode and in compiled graphs.

In eager mode a prepared look-up goes from the queries to the extension in one call; what depends on
the codebook's version only is looked at again when there is a new version. Under `torch.compile` it
is the registered op `grace_fast::find`, which takes the codebook as an integer: edits and growth
change neither the graph nor its guards.
"""

from __future__ import annotations

import itertools
import weakref
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.errors import warn_of_old_name
from grace_fast.index import maintained
from grace_fast.index.maintained import Index
from grace_fast.index.native_view import NativeView
from grace_fast.lookup import dispatch, lookup
from grace_fast.lookup.backends import cpu
from grace_fast.lookup.match import Distributed, Match
from grace_fast.semantics import Replacement

_books: weakref.WeakValueDictionary[int, Codebook] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


class Prepared:
    """`find` for one codebook; made by `prepare`, sees every later edit."""

    __slots__ = ("_book", "_handle", "_made")

    def __init__(self, codebook: Codebook) -> None:
        self._book = codebook
        # One attribute, read at once: another thread may be renewing it.
        self._made: tuple[Snapshot | None, NativeView | None, Index | None] = (None, None, None)
        self._handle = next(_numbers)
        _books[self._handle] = codebook

    def __call__(self, queries: Tensor) -> Match:
        """Return what `find(queries, codebook)` returns, and raise what it raises."""
        if is_dynamo_compiling():
            return self._registered(queries)
        # Plain attributes: with empty caches a Python call takes as long as the look-up's proof.
        snapshot, view, known = self._made
        if self._book.current is not snapshot or (
            view is not None and known.current is not view.made_from  # type: ignore[union-attr]
        ):
            view = self._renew()
        answer = None if view is None else view.version.ask(queries)
        if answer is not None:
            return Match(*answer)
        if torch.compiler.is_compiling():
            return self._registered(queries)
        return lookup.find(queries, self._book)  # what is rare, and every refusal

    def replace_(
        self,
        output: Tensor,
        queries: Tensor,
        positions: Tensor | None = None,
        mode: Replacement = "replace_prompt",
    ) -> Tensor:
        """Do what `lookup.replace_` does for the codebook: write hits' values into output."""
        if not torch.compiler.is_compiling():
            return lookup.replace_(output, queries, self._book, positions, mode)
        torch.ops.grace_fast.replace_(output, queries, positions, mode, self._handle)
        return output

    def _registered(self, queries: Tensor) -> Match:
        return Match(None, fields=torch.ops.grace_fast.find(queries, self._handle))

    def _renew(self) -> NativeView | None:
        snapshot = self._book.snapshot()
        view = cpu.view_of(snapshot)
        self._made = (snapshot, view, maintained.of(snapshot))
        return view

    def settle(self) -> None:
        """Wait for what is computed from the keys that are there.

        Raises: RuntimeError where that failed, but for want of memory.
        """
        self._renew()
        snapshot, _, known = self._made
        if known is not None and snapshot is not None:
            known.build(snapshot)
            if known.failure is not None:
                raise RuntimeError(
                    f"the index of {len(snapshot)} keys was not built: {known.failure!r}; look-ups "
                    "read all keys. prepare(codebook, build_index=False) goes on without it"
                ) from known.failure


def prepare(
    codebook: Codebook,
    build_index: bool = True,
    cuda_graphs: bool = False,
    *,
    wait: bool | None = None,
    graphs: bool | None = None,
) -> Prepared:
    """Return `find` for one codebook with everything chosen once a version; it sees later edits.

    build_index: compute first what can be computed from the keys that are there; without, the
        first look-ups may read all keys.
    cuda_graphs: keep the codebook at fixed addresses of its GPU, so that CUDA graphs that are
        captured from now on see every edit once it was made; a stream that replays one and the
        stream of the edit have to wait for each other, and a thread that does not edit replays
        within `codebook.locked()`.
    wait, graphs: the former names of these two.

    Raises: TypeError for no codebook; RuntimeError where the index could not be built, but for want
    of memory: look-ups read all keys then; with `cuda_graphs` BackendUnavailable, or MemoryError
    where the GPU cannot keep it so.
    """
    if isinstance(codebook, Distributed):
        raise TypeError(
            "row shards cannot be prepared, nor kept for CUDA graphs: a look-up is a call of all "
            "ranks; ask shards.find, or attach them to a model that runs without graphs"
        )
    if not isinstance(codebook, Codebook):
        raise TypeError(f"codebook must be a Codebook, got {type(codebook).__name__}")
    if wait is not None:
        build_index = _renamed("wait", "build_index", wait)
    if graphs is not None:
        cuda_graphs = _renamed("graphs", "cuda_graphs", graphs)
    prepared = Prepared(codebook)
    if build_index:
        prepared.settle()
    if cuda_graphs:
        dispatch.keep_for_graphs(codebook)
    return prepared


def _renamed(old: str, new: str, value: bool) -> bool:
    warn_of_old_name(f"prepare({old}=)", f"prepare({new}=)", stacklevel=4)
    return value


@torch.library.custom_op("grace_fast::find", mutates_args=())
def find_by_handle(queries: Tensor, codebook: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hit [B], row [B] and S [B] of queries [B, D] in the codebook of a `Prepared`."""
    match = lookup.found(queries, _book(codebook).snapshot())  # with S: a graph cannot ask later
    return match.hit.clone(), match.row.clone(), match.squared_distance.clone()


def _book(handle: int) -> Codebook:
    book = _books.get(handle)
    if book is None:
        raise RuntimeError("the codebook that this graph was compiled for is gone")
    return book


@find_by_handle.register_fake
def _(queries: Tensor, codebook: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = queries.shape[0]
    return (
        queries.new_empty(batch, dtype=torch.bool),
        queries.new_empty(batch, dtype=torch.int64),
        queries.new_empty(batch, dtype=torch.float64),
    )


@torch.library.custom_op("grace_fast::replace_", mutates_args={"output"})
def replace_by_handle(
    output: Tensor, queries: Tensor, positions: Tensor | None, replacement: str, codebook: int
) -> None:
    """Write the values of hits into output [B, T, V]; see `lookup.replace_`."""
    lookup.replace_(output, queries, _book(codebook), positions, cast("Replacement", replacement))


@replace_by_handle.register_fake
def _(
    output: Tensor, queries: Tensor, positions: Tensor | None, replacement: str, codebook: int
) -> None:
    return None
