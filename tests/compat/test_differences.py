"""The page of differences is true: each of its rows names tests, and they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "differences.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip()[:40] for row in ROWS])
def test_a_row_of_the_page_names_tests_that_are_there(row):
    cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
    assert len(cells) == 5
    named = re.findall(r"`(\w+\.py)::(\w+)`", cells[-1])
    assert named
    assert cells[-1] == ", ".join(f"`{file}::{test}`" for file, test in named)
    for file, test in named:
        tree = ast.parse(next(TESTS.rglob(file)).read_text())
        assert test in {part.name for part in tree.body if isinstance(part, ast.FunctionDef)}


def test_the_page_has_rows():
    assert len(ROWS) > 20
