"""The compiled host path: the certified look-up, and every key read where that does not pay.

`find` proves most misses from a few code bytes (`certificate`, `codes`); `nearest` needs the
distance even of a far key and reads all of them in float32. Either way what is within a rounding of
the decision is summed again in the canonical order (csrc/cpu/canonical.cpp). The choice between the
two is by predicted bytes; the decision is the same.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.backends.workload import Workload
from grace_fast.certificate import Certificate
from grace_fast.codebook import Snapshot
from grace_fast.views import View

_cpu: Any = None
try:
    _cpu = importlib.import_module("grace_fast._cpu")
except ImportError as error:
    _missing = f"the extension grace_fast._cpu was not built ({error})"
    logging.getLogger("grace_fast").warning("%s: look-ups on the host run in torch", _missing)

NAME = "cpu"
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # lookup.h, Dtype


def why_not(workload: Workload) -> str | None:
    """Return why the compiled host path cannot take a call, or None."""
    if _cpu is None:
        return _missing
    if workload.device != "cpu":
        return f"keys are on {workload.device}, not on the host"
    return None


def nearest(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """Return the nearest live row and its S of queries [B, D]; see `backends`."""
    batch = len(queries)
    if not (len(snapshot) and batch):
        return semantics.no_row(batch, queries.device)
    row = torch.empty(batch, dtype=torch.int64)
    squared = torch.empty(batch, dtype=torch.float64)
    outputs = (row.data_ptr(), squared.data_ptr())
    read_nearest(_in_rows(queries), view_of(snapshot), outputs)
    return row, squared


def find(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor, Tensor]:
    """Return hit [B] bool, the row that hit [B] and its S [B]; see `backends`."""
    return unpack(find_packed(queries, snapshot)[1], len(queries))


def find_packed(queries: Tensor, snapshot: Snapshot) -> tuple[int, bytearray]:
    """Return the number of hits and the answers, to be unpacked by whoever reads them."""
    if not len(queries):
        return 0, bytearray()
    return read(_in_rows(queries), view_of(snapshot))


def unpack(answers: bytearray, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hit, row and S as tensors over the answers' own memory."""
    if not batch:
        row, squared = semantics.no_row(0, torch.device("cpu"))
        return row.bool(), row, squared
    squared = torch.frombuffer(answers, dtype=torch.float64, count=batch)
    row = torch.frombuffer(answers, dtype=torch.int64, count=batch, offset=8 * batch)
    hit = torch.frombuffer(answers, dtype=torch.bool, count=batch, offset=16 * batch)
    return hit, row, squared


def read_nearest(queries: Tensor, view: View, outputs: tuple[int, int]) -> None:
    """Write row and S of queries [B, D], B >= 1, whose elements are side by side."""
    view.book.nearest(
        queries.data_ptr(),
        queries.stride(0),
        DTYPE_NUMBERS[queries.dtype],
        len(queries),
        torch.get_num_threads(),
        *outputs,
    )


def read(queries: Tensor, view: View) -> tuple[int, bytearray]:
    """Return the number of hits and the answers to queries [B, D], B >= 1, as in `read_nearest`."""
    batch = queries.shape[0]
    dtype, threads = DTYPE_NUMBERS[queries.dtype], torch.get_num_threads()
    asked = (queries.data_ptr(), queries.stride(0), dtype, batch)
    if view.certified_pays(batch):
        # A thread is worth waking for 16 MiB, some 2 ms: it may have to wait for a busy core.
        threads = min(threads, 1 + (int(view.predicted_bytes * batch) >> 24))
        return view.plan.find(view.book, *asked, threads)  # type: ignore[no-any-return]
    return view.book.find(*asked, threads, view.widest)  # type: ignore[no-any-return]


def view_of(snapshot: Snapshot) -> View:
    """Return a version as the extension reads it, with what its certificate says by now."""
    kept = snapshot.derived(NAME, _keep)
    if kept is None:  # a draft: no codes
        return View(_cpu, snapshot, None)
    certificate, view = kept
    if not certificate.is_current(view):
        view = certificate.view(snapshot, view)
        kept[1] = view
    return view  # type: ignore[no-any-return]


def certificate_of(snapshot: Snapshot) -> Certificate:
    """Return the certificate of a published version's codebook."""
    return snapshot.derived(NAME, _keep)[0]  # type: ignore[no-any-return]


def _keep(snapshot: Snapshot, previous: Any) -> list[Any]:
    certificate, view = previous or (Certificate(_cpu), None)
    return [certificate, certificate.view(snapshot, view)]


def _in_rows(queries: Tensor) -> Tensor:
    return queries if queries.stride(1) == 1 else queries.contiguous()
