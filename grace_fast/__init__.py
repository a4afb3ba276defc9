"""GRACE for deployed language models: lifelong edits, found again exactly and fast."""

import sys
from importlib import import_module
from typing import Any

from grace_fast.codebook.codebook import Codebook
from grace_fast.editor.attach import attach, from_pretrained
from grace_fast.editor.grace import Explanation, Grace
from grace_fast.edits.edit import Edit, Refused
from grace_fast.edits.settings import Schedule, Settings
from grace_fast.edits.verify import Verification
from grace_fast.errors import (
    BackendUnavailable,
    CodebookCorrupt,
    CodebookLocked,
    CodebookMismatch,
    CodebookReadOnly,
    GraceWarning,
)
from grace_fast.hook.counters import Counters
from grace_fast.hook.selection import using
from grace_fast.lookup import (
    Match,
    Nearest,
    Prepared,
    find,
    nearest,
    prepare,
    replace,
)
from grace_fast.store import large as large  # gives `Codebook` open, save and build

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Codebook",
    "CodebookCorrupt",
    "CodebookLocked",
    "CodebookMismatch",
    "CodebookReadOnly",
    "Counters",
    "Edit",
    "Explanation",
    "Grace",
    "GraceWarning",
    "Match",
    "Nearest",
    "Prepared",
    "Refused",
    "Schedule",
    "Settings",
    "Verification",
    "__version__",
    "attach",
    "find",
    "from_pretrained",
    "nearest",
    "prepare",
    "replace",
    "using",
]

import_module("grace_fast.store.large")  # what `Codebook.open`, `save` and `build` do

# The references' surfaces are read when they are asked for; nothing else looks at them.
_COMPAT = {"GRACE": "reference", "accelerate": "takeover"}


def __getattr__(name: str) -> Any:
    if name in _COMPAT:
        return getattr(import_module(f"grace_fast.compat.{_COMPAT[name]}"), name)
    return import_module("grace_fast.compat.old_names").public(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_COMPAT})


class _OldModules:
    """Modules by the names that they had before; asked where no module of a name is there."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("grace_fast."):
            return None
        return import_module("grace_fast.compat.old_names").spec_of(name)


if not any(getattr(finder, "__name__", "") == "_OldModules" for finder in sys.meta_path):
    sys.meta_path.append(_OldModules)
