"""The compiled host path: the look-up by the index, and every key read where that does not pay.

`find` proves most misses from a few code bytes (`maintained`, `quantizer`); `nearest` needs the
distance even of a far key and reads all of them in float32. Either way what is within a rounding of
the decision is summed again in the canonical order (csrc/cpu/canonical.cpp). The choice between the
two is by predicted bytes; the decision is the same.
"""

from __future__ import annotations

import math
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from grace_fast import _native, semantics
from grace_fast.codebook.caches import Cache
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index import maintained
from grace_fast.index.native_view import NativeView, asked, in_rows
from grace_fast.lookup.backends.workload import Workload

_cpu: Any = _native.cpu

NAME = "cpu"
# The answers of a batch side by side: S of all, row of all, hit of all, then the effort
# (bindings.cpp).
FIRST_OF_ANSWER = {torch.float64: 0, torch.int64: 8, torch.bool: 16}
BYTES_PER_ANSWER = 17
EFFORT = Struct("=qq")
_Known = tuple[maintained.Index | None, NativeView | None]
_views: Cache[_Known] = Cache(NAME)


def why_not(workload: Workload) -> str | None:
    """Return why the compiled host path cannot take a call, or None."""
    if _cpu is None:
        return _native.missing
    if workload.device != "cpu":
        return f"keys are on {workload.device}, not on the host"
    return None


def nearest(queries: Tensor, snapshot: Snapshot, within: float = math.inf) -> tuple[Tensor, Tensor]:
    """Return the nearest live row and its S of queries [B, D]; see `backends`."""
    batch = len(queries)
    if not (len(snapshot) and batch):
        return semantics.no_row(batch, queries.device)
    queries, view = in_rows(queries), _view(snapshot)
    row = torch.empty(batch, dtype=torch.int64, device="cpu")
    squared = torch.empty(batch, dtype=torch.float64, device="cpu")
    by_index = within < math.inf and view.keys_pay
    answers = (row.data_ptr(), squared.data_ptr(), within, by_index)
    view.version.nearest(*asked(queries), torch.get_num_threads(), *answers)
    return (row, squared) if by_index else semantics.not_beyond(within, row, squared)


def find(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor, Tensor]:
    """Return hit [B] bool, the row that hit [B] and its S [B]; see `backends`."""
    answers = find_packed(queries, snapshot)[1]
    hit, row = unpack(answers, torch.bool), unpack(answers, torch.int64)
    return hit, row, unpack(answers, torch.float64)


def find_packed(queries: Tensor, snapshot: Snapshot) -> tuple[int, bytearray]:
    """Return the number of hits and the answers, to be unpacked by whoever reads them."""
    if not len(queries):
        return 0, bytearray()
    queries, view = in_rows(queries), _view(snapshot)  # which keeps alive what is read
    return view.version.find(*asked(queries), torch.get_num_threads())  # type: ignore[no-any-return]


def unpack(answers: bytearray | None, dtype: torch.dtype) -> Tensor:
    """Return S (float64), row (int64) or hit (bool) of the answers, over their own memory."""
    if not answers:
        return torch.empty(0, dtype=dtype, device="cpu")
    batch = (len(answers) - EFFORT.size) // BYTES_PER_ANSWER
    first = FIRST_OF_ANSWER[dtype]
    return torch.frombuffer(answers, dtype=dtype, count=batch, offset=first * batch)


def effort(answers: bytearray) -> tuple[int, int]:
    """Return how many misses were proved without reading a key, and how many keys were read."""
    if not answers:
        return 0, 0
    return EFFORT.unpack_from(answers, len(answers) - EFFORT.size)


def ask(queries: Tensor, snapshot: Snapshot) -> tuple[int, bytearray] | None:
    """Return what `find_packed` does, quickly; None where a call has to be looked at first.

    That is anything but a tensor [B, D] on the host, its rows' elements side by side, of a type
    that queries may have, asked of a published version on the host.
    """
    view = view_of(snapshot)
    return None if view is None else view.version.ask(queries)


def view_of(snapshot: Snapshot) -> NativeView | None:
    """Return a version as the extension reads it, with what its index says by now.

    None where the extension is missing or the keys are not on the host.
    """
    cached = _views.of(snapshot, _made)
    if cached is None:
        return _view_of_draft(snapshot) if _reads(snapshot) else None
    known, view = cached
    if known is not None and view is not None and known.current is not view.made_from:
        view = known.view(snapshot, view)
        _views.put(snapshot, (known, view))
    return view


def _view(snapshot: Snapshot) -> NativeView:
    view = view_of(snapshot)
    assert view is not None, "`why_not` was not asked"
    return view


def _view_of_draft(snapshot: Snapshot) -> NativeView:
    """Return a draft's view; its keys are those of the version it changes, and new ones."""
    base = snapshot.base
    if base is None or (known := view_of(base)) is None:
        return NativeView(_cpu, snapshot, None)
    view = NativeView(_cpu, snapshot, known)
    if base.counts.key_moves == snapshot.counts.key_moves:
        view.use_keys_of(known)
    return view


def _made(snapshot: Snapshot, previous: _Known | None) -> _Known:
    if not _reads(snapshot):
        return None, None
    known = maintained.of(snapshot)
    assert known is not None
    return known, known.view(snapshot, previous[1] if previous else None)


def _reads(snapshot: Snapshot) -> bool:
    return _cpu is not None and snapshot.device.type == "cpu"
