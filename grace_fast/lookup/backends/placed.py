"""The codes of an index on a GPU: brought there once, and read by every engine.

Codes and boxes of sorted segments do not change once they are placed, so all versions that have the
segments share them. Radii do, and belong to whoever reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from grace_fast.codebook.caches import Cache
from grace_fast.codebook.snapshot import Snapshot
from grace_fast.index.native_view import IndexState
from grace_fast.index.segments import Segment

if TYPE_CHECKING:
    from grace_fast.kernels.positions import Positions

DELTA_ROOM = 20480  # positions of codes: the delta buffer is sorted before it is longer


class Placed:
    """The codes of a codebook's index on its device, those of the newest state that was asked."""

    def __init__(self) -> None:
        self._segments: tuple[Segment, ...] = ()  # the sorted ones
        self._positions: Positions | None = None
        self._brought: torch.cuda.Event | None = None  # None on a host, for tests

    def positions_of(self, state: IndexState, device: torch.device) -> Positions:
        """Return the codes of a state for what the current stream does from now on."""
        from grace_fast.kernels import positions

        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if stream is not None and self._brought is not None:
            stream.wait_event(self._brought)
        known = self._positions
        same = known is not None and self._segments == state.segments
        if known is not None and same and state.delta.count <= known.room:
            return known
        segments = (*state.segments, state.delta)
        made = positions.place(segments, device, DELTA_ROOM, known)
        self._segments, self._positions = state.segments, made
        self._brought = None if stream is None else stream.record_event()
        return made


def positions_of(snapshot: Snapshot, state: IndexState) -> Positions:
    """Return the codes of a state on a version's device; the caller holds the index meanwhile."""
    placed = _placed.of(snapshot, lambda _, previous: previous or Placed()) or Placed()
    return placed.positions_of(state, snapshot.device)


_placed: Cache[Placed] = Cache("placed")
