"""A mapping from numbers whose first items lie in columns, and are made when they are asked for.

A million edits are opened as columns; an object is made of the few that are looked at. What is set
or deleted later lies beside the columns, which never change, so a copy costs what was changed. What
is done after a mark can be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class ColumnSource(Protocol[T_co]):
    """Items as columns."""

    @property
    def numbers(self) -> NDArray[np.int64]:
        """[N] their numbers, ascending."""

    def make(self, at: int) -> T_co:
        """Return the item of one position."""


class LazyTable(MutableMapping[int, T], Generic[T]):
    """Items by number, in ascending order; those that came in columns and those that came later.

    Items are taken as values: one that is to be changed is set anew.
    """

    def __init__(self, source: ColumnSource[T] | None = None) -> None:
        self.source = source  # the columns that the first items came in
        self._numbers = np.zeros(0, np.int64) if source is None else source.numbers
        # Set since, an item of the columns too, in its place; for others to read.
        self.later: dict[int, T] = {}
        self._gone: set[int] = set()  # of the columns: deleted, or another one in place
        self._marks = 0  # that may be gone back to
        self._done: list[tuple[int, Any, bool]] = []  # what was there before each change since

    def __getitem__(self, number: int) -> T:
        if number in self.later:
            return self.later[number]
        at = self._position(number)
        if self.source is None or at is None:
            raise KeyError(number)
        return self.source.make(at)

    def __contains__(self, number: object) -> bool:
        return number in self.later or (
            isinstance(number, int) and self._position(number) is not None
        )

    def _position(self, number: int) -> int | None:
        """Return where the columns hold an item that is still there; None where they do not."""
        at = int(self._numbers.searchsorted(number))
        there = at < len(self._numbers) and self._numbers[at] == number
        return at if there and number not in self._gone else None

    def __setitem__(self, number: int, item: T) -> None:
        self._note(number)
        if self._position(number) is not None:
            self._gone.add(number)
        self.later[number] = item

    def __delitem__(self, number: int) -> None:
        if number not in self:
            raise KeyError(number)
        self._note(number)
        if self.later.pop(number, _NOTHING) is _NOTHING:
            self._gone.add(number)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted([*self._numbers[self.source_positions()].tolist(), *self.later]))

    def __len__(self) -> int:
        return len(self._numbers) - len(self._gone) + len(self.later)

    def source_positions(self) -> NDArray[np.int64]:
        """Return the positions of the columns whose items are still as they came, ascending."""
        gone = np.fromiter(self._gone, np.int64, len(self._gone))
        stays = np.ones(len(self._numbers), bool)
        stays[np.searchsorted(self._numbers, gone)] = False
        return stays.nonzero()[0]

    def copy(self) -> LazyTable[T]:
        """Return one that later changes of this one do not change."""
        twin = LazyTable(self.source)
        twin.later, twin._gone = dict(self.later), set(self._gone)
        return twin

    def mark(self) -> int:
        """Begin to note changes, and return what `take_back` goes back to."""
        self._marks += 1
        return len(self._done)

    def take_back(self, mark: int) -> None:
        """Be as at a mark."""
        while len(self._done) > mark:
            number, item, was_gone = self._done.pop()
            if item is _NOTHING:
                self.later.pop(number, None)
            else:
                self.later[number] = item
            (self._gone.add if was_gone else self._gone.discard)(number)

    def let_go(self) -> None:
        """Forget the last mark."""
        self._marks -= 1
        if not self._marks:
            self._done.clear()

    def _note(self, number: int) -> None:
        if self._marks:
            item = self.later.get(number, _NOTHING)
            self._done.append((number, item, number in self._gone))


_NOTHING: Any = object()
