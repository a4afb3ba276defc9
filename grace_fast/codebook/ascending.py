"""Items in ascending order of their numbers that never change: each change makes another one.

A row may be edited a hundred thousand times, and every version of it is somebody's to go back to.
So the items are in a tree of which two versions share all but one branch: adding one at the end,
finding one and taking one out are as many steps as the tree is high, and it is never unfolded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")
WIDTH = 32  # of a node
# Of a leaf: numbers and items. Above: a number that none of a branch is below, and the branches.
_Node = tuple[tuple[int, ...], tuple[Any, ...]]


class Ascending(Sequence[T], Generic[T]):
    """Items by numbers; the first and the last are had at once, all of them in order."""

    __slots__ = ("_height", "_length", "_root")

    def __init__(self, numbers: Sequence[int] = (), items: Sequence[T] = ()) -> None:
        if any(later <= number for number, later in pairwise(numbers)):
            raise ValueError("numbers must ascend")
        self._length, self._height = len(items), 0
        nodes: list[_Node] = _grouped(numbers, items) or [((), ())]
        while len(nodes) > 1:
            nodes = _grouped([each[0][0] for each in nodes], nodes)
            self._height += 1
        self._root = nodes[0]

    def _with(self, root: _Node, height: int, length: int) -> Ascending[T]:
        made: Ascending[T] = Ascending.__new__(Ascending)
        while height and len(root[1]) == 1:
            root, height = root[1][0], height - 1
        made._root, made._height, made._length = root, height, length
        return made

    def adding(self, number: int, item: T) -> Ascending[T]:
        """Return these and one more at the end.

        Raises: ValueError where it is not beyond the others.
        """
        if self._length and number <= self.last_number:
            raise ValueError(f"a number beyond {self.last_number} was wanted, got {number}")
        height, root = self._height, _added(self._root, self._height, number, item)
        if root is None:
            first = self._root[0][0]
            root = ((first, number), (self._root, _branch(height, number, item)))
            height += 1
        return self._with(root, height, self._length + 1)

    def without(self, number: int) -> Ascending[T]:
        """Return all but one.

        Raises: KeyError where none has the number.
        """
        left = _left(self._root, self._height, number)
        return Ascending() if left is None else self._with(left, self._height, self._length - 1)

    def get(self, number: int) -> T | None:
        """Return the item of a number; None where there is none."""
        numbers, parts = self._root
        for height in range(self._height, -1, -1):
            at = bisect_right(numbers, number) - 1
            if at < 0:
                return None
            if height:
                numbers, parts = parts[at]
        return parts[at] if numbers[at] == number else None

    @property
    def last_number(self) -> int:
        """The number of the last item; there must be one."""
        numbers, parts = self._root
        for _ in range(self._height):
            numbers, parts = parts[-1]
        return numbers[-1]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        return _items(self._root, self._height)

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...

    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        if at not in (0, -1) or not self._length:
            return tuple(self)[at]
        parts = self._root[1]
        for _ in range(self._height):
            parts = parts[at][1]
        found: T = parts[at]
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ascending):
            return NotImplemented
        return self._length == other._length and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


def _grouped(numbers: Sequence[int], items: Sequence[Any]) -> list[_Node]:
    return [
        (tuple(numbers[at : at + WIDTH]), tuple(items[at : at + WIDTH]))
        for at in range(0, len(items), WIDTH)
    ]


def _branch(height: int, number: int, item: Any) -> _Node:
    """Return a branch of a height that holds one item."""
    for _ in range(height):
        item = ((number,), (item,))
    return (number,), (item,)


def _added(node: _Node, height: int, number: int, item: Any) -> _Node | None:
    """Return a node with one more item at the end; None where it has no room."""
    numbers, parts = node
    if height:
        last = _added(parts[-1], height - 1, number, item)
        if last is not None:
            return numbers, (*parts[:-1], last)
        item = _branch(height - 1, number, item)
    if len(numbers) == WIDTH:
        return None
    return (*numbers, number), (*parts, item)


def _left(node: _Node, height: int, number: int) -> _Node | None:
    """Return a node without one item; None where nothing is left of it."""
    numbers, parts = node
    at = bisect_right(numbers, number) - 1
    if at < 0 or (not height and numbers[at] != number):
        raise KeyError(number)
    if height:
        below = _left(parts[at], height - 1, number)
        if below is not None:
            return numbers, (*parts[:at], below, *parts[at + 1 :])
    if len(numbers) == 1:
        return None
    return numbers[:at] + numbers[at + 1 :], parts[:at] + parts[at + 1 :]


def _items(node: _Node, height: int) -> Iterator[Any]:
    if not height:
        return iter(node[1])
    return (item for part in node[1] for item in _items(part, height - 1))
