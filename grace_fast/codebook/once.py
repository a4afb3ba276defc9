"""Cached properties without a lock.

`functools.cached_property` of Python 3.11 holds one lock for all objects of a class while it
computes. Who asks of one object waits for another, and a forked child waits for ever where a thread
that it has not was computing. Here, as from Python 3.12 on, two threads may compute the same at
once; the last one stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functools import cached_property as cached_property
else:

    class cached_property:
        """A method that is an attribute of its result; the object's `__dict__` keeps that."""

        def __init__(self, compute: Callable[[Any], Any]) -> None:
            self._compute, self._name = compute, compute.__name__
            self.__doc__ = compute.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            computed = instance.__dict__[self._name] = self._compute(instance)
            return computed
