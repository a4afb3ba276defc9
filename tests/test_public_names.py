"""The public names: what `from grace_fast import *` gives, and the old ones, warned of once."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

import grace_fast as gf
from grace_fast import errors
from grace_fast.compat import old_names

ROOT = Path(__file__).parents[1]
PAGES = "".join(
    page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    monkeypatch.setattr(errors, "_told", set())


def test_star_leaves_the_builtins_alone_and_gives_what_is_documented():
    names: dict[str, object] = {}
    exec("from grace_fast import *", names)  # as a notebook does
    assert len(gf.__all__) <= 26
    assert not set(gf.__all__) & set(dir(builtins))
    assert set(gf.__all__) <= set(names)


@pytest.mark.parametrize("name", sorted({*gf.__all__, *gf._COMPAT} - {"__version__"}))
def test_a_public_name_is_in_the_documents(name):
    assert re.search(rf"\b{name}\b", PAGES)
    assert getattr(gf, name).__doc__


@pytest.mark.parametrize("name", sorted(old_names.PUBLIC))
def test_an_old_name_is_what_it_was_and_names_its_successor_once(name):
    _, now = old_names.PUBLIC[name]
    with pytest.warns(DeprecationWarning, match=re.escape(f"is grace_fast.{now} now")) as told:
        found = getattr(gf, name)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(gf, name) is found
    successor: object = gf
    for part in now.split("."):
        if hasattr(successor, "__path__") and not hasattr(successor, part):
            import_module(f"{successor.__name__}.{part}")
        successor = getattr(successor, part)
    assert successor is found or getattr(successor, "__name__", None) in (found.__name__, name)


@pytest.mark.parametrize("old", sorted(old_names.MODULES))
def test_a_module_is_found_by_its_old_name(old):
    new = old_names.MODULES[old]
    sys.modules.pop(f"grace_fast.{old}", None)
    with pytest.warns(DeprecationWarning, match=re.escape(f"is grace_fast.{new} now")):
        found = import_module(f"grace_fast.{old}")
    there = import_module(f"grace_fast.{new}")
    if old in old_names.PACKAGES:
        assert found.__doc__ == there.__doc__
    else:
        assert found is there
        assert there.__spec__.name == f"grace_fast.{new}"


def test_a_part_of_a_moved_package_is_the_one_there_is():
    with pytest.warns(DeprecationWarning, match="grace_fast.evaluate"):
        found = import_module("grace_fast.evaluate.records")
    assert found is import_module("grace_fast.tools.evaluate.records")


def test_the_command_line_runs_by_its_old_name():
    command = [sys.executable, "-P", "-m", "grace_fast.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == gf.__version__, done.stderr


def test_a_codebook_is_saved_and_opened_by_a_process_that_imported_nothing_else(tmp_path):
    program = (
        "import grace_fast as gf\n"
        f"gf.Codebook(4, 4).save({str(tmp_path / 'book')!r})\n"
        f"print(gf.Codebook.open({str(tmp_path / 'book')!r}))\n"
    )
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("Codebook(0 keys, key_dim=4"), done.stderr


def test_what_never_was_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'never_was'"):
        gf.never_was  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=r"grace_fast\.never_was"):
        import_module("grace_fast.never_was")


def test_an_edit_of_row_shards_goes_on_by_its_old_name(tmp_path):
    script = f"""
import warnings
import torch, torch.distributed as dist
from grace_fast.lookup.sharded import ShardedCodebook
from grace_fast.semantics import Rules, decide
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
shards, rules, label = ShardedCodebook(2, 2), Rules(1.0), torch.tensor([1])
outcomes = []
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for at, which in ((0.0, 1), (1.5, 2), (0.2, 1), (9.0, 1)):
        query, label = torch.tensor([at, 0.0]), torch.tensor([which])
        row, decision = shards.enact(rules, query, label, torch.zeros(2))
        outcomes.append((row, decision.outcome, decision.nearest_radius, decision.moves_key))
print(outcomes)
print([str(each.message) for each in told if each.category is DeprecationWarning])
dist.destroy_process_group()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    outcomes, told = (eval(line) for line in done.stdout.splitlines())  # noqa: S307
    assert outcomes == [
        (0, "added", None, False),
        (1, "split", 0.7499899864196777, False),
        (0, "reused", None, False),
        (2, "added", None, False),
    ]
    assert len(told) == 1
    assert "ShardedCodebook.enact is grace_fast.edits.apply.apply within writing() now" in told[0]
