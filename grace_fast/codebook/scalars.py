"""Numbers as numpy and torch write them, taken as Python's own: what is kept is written as JSON."""

from __future__ import annotations

from decimal import Decimal
from numbers import Rational, Real
from operator import index
from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """Return a number of numpy or torch, or an array or tensor of one, as Python's; others as is.

    A truth of numpy's becomes one of Python's, and so does a text.
    """
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        return value.item()
    return value


def number(name: str, value: Any) -> int | float:
    """Return a number as Python's own, of `fractions` and `decimal` as well.

    Raises: ValueError for anything else, a truth or a text among them.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int | float):
        return value
    if isinstance(value, Rational) and value.denominator == 1:
        return int(value.numerator)
    try:
        return float(value)
    except (ValueError, OverflowError):  # a signalling NaN, 10^400
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def positive(name: str, value: Any) -> int:
    """Return a whole number of at least 1 as Python's.

    Raises: ValueError for anything else.
    """
    value = plain(value)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return value


def whole(name: str, value: Any) -> int:
    """Return a whole number as Python's.

    Raises: TypeError for anything else, a fraction among them.
    """
    try:
        return index(plain(value))
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
