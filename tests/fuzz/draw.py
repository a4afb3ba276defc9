"""Numbers and choices out of the bytes of an input, the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Any_ = TypeVar("Any_")


class Draw:
    """Bytes that are used up from the front; what is asked for behind their end is zero."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    @property
    def left(self) -> int:
        """How many bytes are not used up."""
        return max(0, len(self._content) - self._at)

    def below(self, count: int) -> int:
        """Return a number in [0, count), of as few bytes as hold one; 0 where count is 0."""
        taken = self.bytes(max(1, (count - 1).bit_length() + 7 >> 3))
        return int.from_bytes(taken, "little") % max(count, 1)

    def pick(self, choices: Sequence[Any_]) -> Any_:
        """Return one of some choices."""
        return choices[self.below(len(choices))]

    def bytes(self, most: int) -> bytes:
        """Return the next bytes, fewer where they end."""
        self._at += most
        return self._content[self._at - most : self._at]

    def short(self) -> bytes:
        """Return some bytes whose number comes first, at most 255."""
        return self.bytes(self.below(256))

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.bytes(self.left)
