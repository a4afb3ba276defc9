"""GRACE for deployed language models: lifelong edits, found again exactly, by fast codebook look-ups."""

from grace_fast._version import __version__
from grace_fast.codebook import Codebook
from grace_fast.lookup import BackendUnavailable, Match, Nearest, find, nearest, replace
from grace_fast.prepared import Prepared, prepare

__all__ = [
    "BackendUnavailable",
    "Codebook",
    "Match",
    "Nearest",
    "Prepared",
    "__version__",
    "find",
    "nearest",
    "prepare",
    "replace",
]
