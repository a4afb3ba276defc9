"""What a look-up that is captured in a CUDA graph asks for: a codebook kept at fixed addresses.

A graph replays addresses. A back end with `keep_for_graphs(codebook)` holds the newest version
where it was from then on, written by whoever publishes an edit before the edit is seen. A capture
without that would never see an edit, and is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from grace_fast.codebook.codebook import Codebook, Snapshot


def is_capturing(snapshot: Snapshot) -> bool:
    """Tell whether launches on the codebook's device go into a graph now."""
    return snapshot.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep(codebook: Codebook, backend: str, kept: Any) -> None:
    """Let `kept` be told of every version (`follow`), and `kept_of` find it.

    Raises: what `follow` raises for the version that there is.
    """
    known = _kept(codebook.snapshot(), backend)
    if not known:
        codebook.tell(backend, kept.follow)
        known.append(kept)


def kept_of(snapshot: Snapshot, backend: str) -> Any:
    """Return what a back end keeps of a codebook for graphs.

    Raises: RuntimeError where it keeps nothing, or this is not the newest version.
    """
    known = _kept(snapshot, backend)
    if not known or known[0].version != snapshot.version:
        raise RuntimeError(
            "a graph captured now would not see later edits: first call "
            "grace_fast.prepare(codebook, graphs=True), and look up in the codebook itself"
        )
    return known[0]


def _kept(snapshot: Snapshot, backend: str) -> list[Any]:
    """Return a list of the one thing that is kept, or of nothing; the same for all versions."""
    kept = snapshot.derived(
        f"{backend}, for graphs", lambda _, previous: [] if previous is None else previous
    )
    return [] if kept is None else kept  # a draft has none
