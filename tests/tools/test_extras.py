"""What is not installed: the command line works without it, or names the extra to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

from grace_fast import errors
from grace_fast.tools import arguments, cli

GOLDEN = str(Path(__file__).parents[1] / "golden_formats" / "edits-1")
# Runs commands in a process that cannot import some modules; prints what each of them did.
WITHOUT = """
import contextlib, io, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent, commands = map(json.loads, sys.argv[1:])
sys.meta_path.insert(0, Absent())
from grace_fast.tools.cli import app
ran = []
for command in commands:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(command)
        except SystemExit as end:
            code = end.code
    ran.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(ran))
"""


def without(absent, *commands):
    ran = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT, json.dumps(list(absent)), json.dumps(commands)],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_a_bare_install_does_what_it_can_and_names_the_extra_for_the_rest(tmp_path):
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "a", "target": "b"}')
    files = ["--layer", "x", "--edits", str(edits), "--out", str(tmp_path / "out")]
    needs = {
        "demo": ["demo"],
        "evaluate": ["evaluate", "facts"],
        "report": ["report", GOLDEN, "--out", str(tmp_path / "page.html")],
        "models": ["edit", str(tmp_path), *files],
    }
    helped, asked, listed, absent, *ran = without(
        errors.EXTRA_OF,
        ["--help"],
        ["edit", "--help"],
        ["info", GOLDEN],
        ["info", "/nowhere"],
        *needs.values(),
    )
    assert helped[0] == asked[0] == listed[0] == 0
    for command in ("info", "edit", "verify", "demo", "pip install 'grace_fast[cli]'"):
        assert command in helped[1]
    assert "--learning-rate FLOAT" in asked[1]
    assert "8 edits on 4 keys" in listed[1]
    assert "expanded  1" in listed[1]
    assert absent[0] == cli.FAILED
    for extra, (code, out, err) in zip(needs, ran, strict=True):
        assert (code, out) == (cli.CANNOT_BEGIN, ""), extra
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert line.endswith(f"is not installed: pip install 'grace_fast[{extra}]'")


def test_every_extra_is_one_of_the_package():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for extra in set(errors.EXTRA_OF.values()):
        assert f"\n{extra} = [" in project


def test_an_import_that_fails_is_told_by_the_module_that_is_absent():
    absent = ModuleNotFoundError("No module named 'tokenizers.models'", name="tokenizers.models")
    assert errors.told("x", absent) == (
        "x needs tokenizers, which is not installed: pip install 'grace_fast[models]'"
    )
    broken = ImportError("cannot import name 'y'\nfrom 'transformers'", name="transformers")
    assert "could not import what it needs: cannot import name 'y' from" in errors.told("x", broken)
    assert not errors.is_installed("no_such_module_at_all")
    with pytest.raises(errors.MissingExtra, match=r"pip install no_such_module_at_all$"):
        errors.require("x", "sys", "no_such_module_at_all")


def by_argparse():
    """A program of one command with every kind of parameter, and what that was called with."""
    app, seen = arguments.Typer(help="100 % plain."), {}

    @app.callback()
    def first(show: Annotated[bool, arguments.Option("--version", help="Say it.")] = False):
        if show:
            arguments.echo("1.2")
            raise arguments.Exit

    @app.command("make")
    def make_(
        place: Annotated[Path, arguments.Argument(help="Where.")],
        shards: Annotated[list[Path], arguments.Argument(help="What of 50 %.")],
        rate: Annotated[float, arguments.Option(help="How fast.")] = 1.5,
        tries: Annotated[int | None, arguments.Option(min=0, help="How often.")] = None,
        layer: Annotated[list[str] | None, arguments.Option(help="Which.")] = None,
        keep: Annotated[bool, arguments.Option(help="Or not.")] = True,
        as_json: Annotated[bool, arguments.Option("--json", help="So.")] = False,
    ):
        """Make it, 100 %."""
        seen.update(locals())
        if rate > 9:
            raise arguments.Exit(3)

    return app, seen


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--version"], 0, "1.2"),
        ([], 2, "commands:"),
        (["--help"], 0, "Make it, 100 %."),
        (["make", "--help"], 0, "--keep, --no-keep"),
        (["make", "a"], 2, "required: SHARDS"),
        (["make", "a", "b", "--tries", "-1"], 2, "-1 is below 0"),
        (["make", "a", "b", "--rate", "fast"], 2, "invalid number value: 'fast'"),
        (["make", "a", "b", "--rate", "10"], 3, ""),
        (["mend"], 2, "invalid choice: 'mend'"),
        (["make", "a", "b", "--\x1b[2J\u202e"], 2, r"unrecognized arguments: --\x1b[2J\u202e"),
    ],
    ids=str,
)
def test_commands_are_read_by_argparse_where_typer_is_not_installed(given, code, said, capsys):
    app, _ = by_argparse()
    with pytest.raises(SystemExit) as end:
        app(given)
    assert end.value.code == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_argparse_gives_a_command_what_typer_would(capsys):
    app, seen = by_argparse()
    with pytest.raises(SystemExit) as end:
        app(["make", "a", "b", "c", "--layer", "x", "--layer", "y", "--no-keep", "--json"])
    assert end.value.code == 0
    assert seen["place"] == Path("a")
    assert seen["shards"] == [Path("b"), Path("c")]
    assert (seen["rate"], seen["tries"], seen["layer"]) == (1.5, None, ["x", "y"])
    assert (seen["keep"], seen["as_json"]) == (False, True)
