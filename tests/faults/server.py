"""A process that forks a workload for every request, under the shim: what it said, how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from faults import shim


@dataclass
class Outcome:
    """What one fork said of its run."""

    states: dict[int, str] = field(default_factory=dict)  # acknowledged, by the step's number
    refused: dict[int | str, tuple[str, str]] = field(default_factory=dict)  # exception and text
    changed: list[int] = field(default_factory=list)  # steps that were refused, and yet changed it
    raised: str = ""  # what nobody expected
    calls: int = 0
    last: str = ""  # the state at the end, where it was reached
    lines: list[str] = field(default_factory=list)  # anything else
    process: int = 0
    status: int = 0  # as of os.waitpid

    @property
    def acknowledged(self) -> int:
        """The last step that was acknowledged, 0 for none."""
        return max(self.states, default=0)

    def hear(self, line: str) -> None:
        """Take in one line."""
        kind, _, rest = line.partition(" ")
        if kind == "done":
            number, state = rest.split()
            self.states[int(number)] = state
        elif kind == "refused":
            number, name, text = rest.split(" ", 2)
            step = int(number) if number.isdigit() else number
            self.refused[step] = (name, json.loads(text))
        elif kind == "changed":
            self.changed.append(int(rest))
        elif kind == "raised":
            self.raised = rest
        elif kind == "calls":
            self.calls = int(rest)
        elif kind == "end":
            self.last = rest
        elif kind == "process":
            self.process = int(rest)
        elif kind == "status":
            self.status = int(rest)
        else:
            self.lines.append(line)


class Server:
    """Forks of one process that has everything imported; one at a time."""

    def __init__(self, module: str = "faults.workload") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=shim.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, **request: Any) -> Outcome:
        """Have one run made; return what became of it."""
        return self._listen(request, None, 0.0)

    def ask_and_kill(self, after: int, delay_s: float, **request: Any) -> Outcome:
        """Have one run made, and kill it a moment after it acknowledged a step, or began for 0."""
        return self._listen(request, after, delay_s)

    def _listen(self, request: dict[str, Any], after: int | None, delay_s: float) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        outcome = Outcome()
        for line in self._process.stdout:
            outcome.hear(line.strip())
            if line.startswith("status "):
                return outcome
            if after is not None and outcome.process and outcome.acknowledged >= after:
                time.sleep(delay_s)
                os.kill(outcome.process, signal.SIGKILL)
                after = None
        raise AssertionError("the server of forks ended by itself")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()
