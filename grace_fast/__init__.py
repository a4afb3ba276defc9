"""GRACE for deployed language models: lifelong edits, found again exactly and fast."""

from typing import Any

from grace_fast.codebook.codebook import Codebook
from grace_fast.editor.attach import CodebookMismatch, attach, from_pretrained
from grace_fast.editor.calibrate import CalibrationEdit
from grace_fast.editor.edit_warnings import GraceWarning
from grace_fast.editor.grace import Explanation, Grace
from grace_fast.edits.edit import Edit
from grace_fast.edits.verify import Verification
from grace_fast.errors import CodebookCorrupt, CodebookLocked, CodebookReadOnly
from grace_fast.hook.counters import Counters, LookupWarning
from grace_fast.hook.selection import SelectionWarning, using
from grace_fast.lookup.backends.faiss_index import FaissIndex
from grace_fast.lookup.index_errors import IndexErrors, measure_indexes
from grace_fast.lookup.lookup import (
    BackendUnavailable,
    Match,
    Nearest,
    build_index,
    drop_index,
    find,
    nearest,
    replace,
)
from grace_fast.lookup.prepared import Prepared, prepare
from grace_fast.lookup.sharded import RankLost, ShardedCodebook, ShardsDiffer
from grace_fast.store.large.resident import open, save
from grace_fast.store.large.stream import build

__version__ = "0.1.0"

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
_COMPAT = {"GRACE": "reference", "accelerate": "takeover"}


def __getattr__(name: str) -> Any:
    if name not in _COMPAT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"grace_fast.compat.{_COMPAT[name]}"), name)
