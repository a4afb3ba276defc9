"""CUDA graphs: what a captured look-up reads is at fixed addresses, and is told of every edit.

A graph replays addresses. A back end with `keep_for_graphs(codebook)` holds the newest version
where it was from then on, written by whoever publishes an edit before the edit is seen. A capture
without that would never see an edit, and is refused.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from grace_fast.codebook.caches import Cache
from grace_fast.codebook.codebook import Codebook
from grace_fast.codebook.snapshot import Snapshot


class Listener(Protocol):
    """What holds the newest version of a codebook for graphs."""

    @property
    def version(self) -> int:
        """The version that it was told of last."""

    def on_publish(self, snapshot: Snapshot) -> None:
        """Bring a version to the device. What is raised refuses it."""


_listeners: Cache[dict[str, Any]] = Cache("listeners of graphs")  # by back end


def is_capturing(snapshot: Snapshot) -> bool:
    """Tell whether launches on the codebook's device go into a graph now."""
    return snapshot.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def retain(codebook: Codebook, backend: str, listener: Listener) -> None:
    """Let a listener be told of every version, unless one is, and `retained` find it.

    Raises: what `on_publish` raises for the version that there is.
    """
    known = _known(codebook.snapshot())
    if backend not in known:
        codebook.subscribe(backend, listener.on_publish)
        known[backend] = listener


def retained(snapshot: Snapshot, backend: str) -> Any:
    """Return the listener of a back end that holds this version of a codebook for graphs.

    Raises: RuntimeError where there is none, or this is not the newest version.
    """
    listener = listening(snapshot, backend)
    if listener is None or listener.version != snapshot.version:
        raise RuntimeError(
            "a graph captured now would not see later edits: first call "
            "grace_fast.prepare(codebook, cuda_graphs=True), and look up in the codebook itself"
        )
    return listener


def listening(snapshot: Snapshot, backend: str) -> Any:
    """Return what holds versions of a codebook for graphs; None where nothing does."""
    return _known(snapshot).get(backend)


def _known(snapshot: Snapshot) -> dict[str, Any]:
    """Return the listeners of a codebook, the same for all versions; a draft has none."""
    known = _listeners.of(snapshot, lambda _, previous: {} if previous is None else previous)
    return {} if known is None else known
