"""What CI runs of the Makefile."""

from __future__ import annotations

from pathlib import Path


def test_ci_runs_every_kind_of_test():
    steps = (Path(__file__).parents[1] / ".ci" / "run").read_text().splitlines()
    assert {"make test", "make slow", "make fuzz", "make sanitize", "make tsan"} <= set(steps)
