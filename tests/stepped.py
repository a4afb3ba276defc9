"""Builds of codes that a test goes through itself, a step at a time, between edits and look-ups."""

from collections import deque
from collections.abc import Iterator

from grace_fast.index import maintained


class Builder:
    """What takes the place of `maintained.background`: nothing is done until it is asked for."""

    def __init__(self) -> None:
        self._builds: deque[Iterator[str]] = deque()  # whose first step is known
        self._next: deque[str] = deque()

    def __call__(self, steps):
        self._builds.append(steps)
        self._next.append("")
        return self.finish

    @property
    def next_step(self) -> str | None:
        """The step that `step` does next; None where nothing is being built."""
        if not self._builds:
            return None
        if not self._next[0]:
            self._next[0] = next(self._builds[0])  # names the first, and does nothing
        return self._next[0]

    def step(self) -> str | None:
        """Do one step of the oldest build; return its name, None where there was none."""
        done = self.next_step
        if done is None:
            return None
        try:
            self._next[0] = next(self._builds[0])
        except StopIteration:  # others may have been begun meanwhile, behind it
            self._builds.popleft()
            self._next.popleft()
        return done

    def until(self, name: str) -> None:
        """Do all steps before the next one of a name."""
        while self.next_step not in (name, None):
            self.step()

    def finish(self) -> None:
        """Do all that is left, and what that begins."""
        while self.step() is not None:
            pass


def builder(monkeypatch) -> Builder:
    """Let all builds of a test wait for it."""
    made = Builder()
    monkeypatch.setattr(maintained, "background", made)
    return made
