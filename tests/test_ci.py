"""What CI runs of the Makefile."""

from __future__ import annotations

from pathlib import Path


def test_ci_runs_every_kind_of_test():
    steps = (Path(__file__).parents[1] / ".ci" / "run").read_text().splitlines()
    made = {word for step in steps if step.startswith("make ") for word in step.split()}
    assert {"test", "slow", "fuzz", "sanitize", "tsan", "check"} <= made
