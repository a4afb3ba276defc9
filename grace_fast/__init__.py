"""GRACE for deployed language models: lifelong edits, found again exactly and fast."""

from grace_fast._version import __version__
from grace_fast.advice import GraceWarning
from grace_fast.attachment import CodebookMismatch, attach, from_pretrained
from grace_fast.calibrate import CalibrationEdit
from grace_fast.codebook import Codebook
from grace_fast.editor import Explanation, Grace
from grace_fast.edits import Edit, Verification
from grace_fast.lookup import BackendUnavailable, Match, Nearest, find, nearest, replace
from grace_fast.prepared import Prepared, prepare
from grace_fast.store.files import CodebookCorrupt

__all__ = [
    "BackendUnavailable",
    "CalibrationEdit",
    "Codebook",
    "CodebookCorrupt",
    "CodebookMismatch",
    "Edit",
    "Explanation",
    "Grace",
    "GraceWarning",
    "Match",
    "Nearest",
    "Prepared",
    "Verification",
    "__version__",
    "attach",
    "find",
    "from_pretrained",
    "nearest",
    "prepare",
    "replace",
]
