"""GRACE for deployed language models: lifelong edits, found again exactly and fast."""

from typing import Any

from grace_fast._version import __version__
from grace_fast.advice import GraceWarning
from grace_fast.attachment import CodebookMismatch, attach, from_pretrained
from grace_fast.backends.faiss_index import FaissIndex
from grace_fast.calibrate import CalibrationEdit
from grace_fast.codebook import Codebook
from grace_fast.counters import Counters, LookupWarning
from grace_fast.editor import Explanation, Grace
from grace_fast.edits import Edit, Verification
from grace_fast.index_errors import IndexErrors, measure_indexes
from grace_fast.lookup import (
    BackendUnavailable,
    Match,
    Nearest,
    build_index,
    drop_index,
    find,
    nearest,
    replace,
)
from grace_fast.prepared import Prepared, prepare
from grace_fast.selection import SelectionWarning, using
from grace_fast.shards import RankLost, ShardedCodebook, ShardsDiffer
from grace_fast.store.durable import CodebookLocked, CodebookReadOnly
from grace_fast.store.files import CodebookCorrupt
from grace_fast.store.resident import open, save
from grace_fast.store.stream import build

__all__ = [
    "BackendUnavailable",
    "CalibrationEdit",
    "Codebook",
    "CodebookCorrupt",
    "CodebookLocked",
    "CodebookMismatch",
    "CodebookReadOnly",
    "Counters",
    "Edit",
    "Explanation",
    "FaissIndex",
    "Grace",
    "GraceWarning",
    "IndexErrors",
    "LookupWarning",
    "Match",
    "Nearest",
    "Prepared",
    "RankLost",
    "SelectionWarning",
    "ShardedCodebook",
    "ShardsDiffer",
    "Verification",
    "__version__",
    "attach",
    "build",
    "build_index",
    "drop_index",
    "find",
    "from_pretrained",
    "measure_indexes",
    "nearest",
    "open",
    "prepare",
    "replace",
    "save",
    "using",
]

# The references' surfaces are read when they are asked for; nothing else looks at them.
_COMPAT = {"GRACE": "reference", "accelerate": "handover"}


def __getattr__(name: str) -> Any:
    if name not in _COMPAT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"grace_fast.compat.{_COMPAT[name]}"), name)
