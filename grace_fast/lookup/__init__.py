"""Look-ups: which queries are in the ball of their nearest key, and of which.

    find, nearest, replace        lookup.py        checks a call, applies the law to the answer
        |
    chosen(Workload, backend)     dispatch.py      the first that has no reason against the call
        |
        |-- keys on the host      backends/cpu.py        compiled: codes, then keys; or all keys
        |                         backends/reference.py  the law in torch, where nothing is compiled
        |-- keys on a GPU         backends/triton.py     codes, all keys, or tiles of them
        |                         backends/reference.py
        `-- by name only          backends/cuda.py       compiled, few queries, one or two launches
                                  backends/faiss.py      a FAISS index; marks what it proved

    prepare                       prepared.py      `find` of one codebook: straight to the extension
    ShardedCodebook               sharded.py       rows over processes: each finds, they compare

A back end accelerates; it never decides anything. What each may remember of a codebook is listed in
`codebook.caches`.
"""

from grace_fast.errors import BackendUnavailable
from grace_fast.lookup.lookup import find, nearest, replace, replace_
from grace_fast.lookup.match import Match, Nearest
from grace_fast.lookup.prepared import Prepared, prepare

__all__ = [
    "BackendUnavailable",
    "Match",
    "Nearest",
    "Prepared",
    "find",
    "nearest",
    "prepare",
    "replace",
    "replace_",
]
