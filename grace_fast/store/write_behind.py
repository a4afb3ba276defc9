"""Writing in another thread: the rows of a stream are written while the next ones are made."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any


class WriteBehind:
    """Work that another thread does, a few pieces behind; what it raises is raised here.

    All of them are done when a `with` block ends. A forked child has not got that thread: there,
    nothing is done and nothing waited for.
    """

    def __init__(self, work: Callable[[Any], None]) -> None:
        self._pieces: queue.Queue[Any] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        self._work, self._process = work, os.getpid()
        self._thread: threading.Thread | None = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self._error is None:
                try:
                    self._work(piece)
                except BaseException as error:
                    self._error = error

    def __call__(self, piece: Any) -> None:
        """Leave a piece to the other thread.

        Raises: what it raised, RuntimeError in a forked child.
        """
        if not self.is_here:
            raise RuntimeError(f"process {self._process} does this work; this is a fork of it")
        if self._error is not None:
            raise self._error
        self._pieces.put(piece)

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    @property
    def is_here(self) -> bool:
        """Whether this is the process that began, and not a fork of it."""
        return self._process == os.getpid()

    def finish(self) -> None:
        """Wait until everything is done."""
        if not self.is_here:
            return
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error
