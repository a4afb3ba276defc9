"""Caches: what look-ups compute from a codebook's keys once a version, each named by its owner.

An owner makes one `Cache` when it is imported, and asks it with a version. A new version makes what
is cached of another one stale: `build` is given that, and the owner says what may be kept of it.

    cache                     of                       stale, beside a new version, once
    index.maintained          Index                    never: it is told of each version
    lookup.backends.cpu       NativeView                  its index has published more codes
    lookup.backends.cuda      Table                    its index has published more codes
    lookup.backends.triton    Table                    never: it asks its index itself
    lookup.backends.faiss     Filled, by description   dropped (`drop_index`)
    lookup.backends.placed    Placed                   never: it is asked with its index's state
    lookup.backends.graphs    listeners, by back end   never: they subscribe to the codebook
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

Cached = dict["Cache[Any]", tuple[Any, Any]]  # of one codebook: of which version, and what


class Version(Protocol):
    """A snapshot, as far as caches go."""

    @property
    def cached(self) -> Cached | None:
        """What the versions of its codebook share; None for a draft, which may yet be dropped."""


T = TypeVar("T")
V = TypeVar("V", bound=Version)


class Cache(Generic[T]):
    """What one owner computes from the keys of any codebook; the codebook's versions share it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def of(self, snapshot: V, build: Callable[[V, T | None], T]) -> T | None:
        """Return what is computed of a version; None for a draft, which may yet be dropped.

        `build(snapshot, previous)` is called once a version; `previous` is what it returned for
        another version of the codebook, earlier or later, or None. Readers may build the same at
        once; the last one stays.
        """
        cached = snapshot.cached
        if cached is None:
            return None
        known = cached.get(self)
        if known is not None and known[0] is snapshot:
            return known[1]  # type: ignore[no-any-return]
        built = build(snapshot, known[1] if known is not None else None)
        cached[self] = (snapshot, built)
        return built

    def put(self, snapshot: Version, value: T) -> None:
        """Let a published version have something newer."""
        assert snapshot.cached is not None, "nothing is cached of a draft"
        snapshot.cached[self] = (snapshot, value)

    def invalidate(self, snapshot: Version) -> None:
        """Forget what is computed of a version's codebook, of all its versions."""
        if snapshot.cached is not None:
            snapshot.cached.pop(self, None)
