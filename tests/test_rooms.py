"""The house keeps its plan: rooms, imports, sizes; `make check` holds the imports themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grace_fast"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
SOURCES = [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]


def tracked(folder: str) -> set[str]:
    """The first names below a folder of the repository, of what is in it or would be added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    found = [line for line in done.stdout.splitlines() if (ROOT / line).exists()]
    return {line.removeprefix(f"{folder}/").split("/")[0] for line in found}


def layers() -> list[str]:
    """The rooms of the import contract, top to bottom."""
    [contract] = [one for one in CONTRACTS["contracts"] if one["type"] == "layers"]
    assert contract["exhaustive"]
    return [room for line in contract["layers"] for room in re.split(r" [|:] ", line)]


def test_the_top_of_the_package_is_seen_at_a_glance():
    assert len(tracked("grace_fast")) <= 14


def test_the_table_of_contributing_is_the_import_contract():
    table = re.findall(r"^\| `(\w+)(?:\.py|/)` ", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert table == layers()


def test_the_tests_lie_in_folders_of_the_rooms():
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= set(layers()) | {"life"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_class_and_a_call_are_read_in_one_go(path):
    parameters = 16 if path.parent.name == "kernels" else 12
    for part in ast.walk(ast.parse(path.read_text())):
        if isinstance(part, ast.ClassDef):
            methods = [one.name for one in part.body if isinstance(one, ast.FunctionDef)]
            assert len(methods) <= 25, f"{part.name} has {len(methods)} methods"
        if isinstance(part, ast.FunctionDef):
            named = part.args.posonlyargs + part.args.args + part.args.kwonlyargs
            assert len(named) <= parameters, f"{part.name} takes {len(named)} arguments"


def test_no_file_says_what_another_room_is_called_by_now():
    """Modules that moved are named in documents by where they are."""
    there = {f"grace_fast.{room}" for room in layers()} | {"grace_fast.kernels"}
    for page in [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for named in re.findall(r"(?:from|import) (grace_fast\.\w+)", page.read_text()):
            assert named in there, f"{page.name} names {named}"
