"""Every command on a stranger's codebook: what is printed is inert, whole, and can be printed."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import asdict

import pytest
import torch
from saved_edits import book_of
from typer.testing import CliRunner

from grace_fast.edits.settings import Settings
from grace_fast.tools import terminal
from grace_fast.tools.cli import app

TOLD = [
    ("[INST] Who wrote it? [/INST] So", "[red]Eco[/red]"),
    ("a[i] = [/b] [link=file:///etc]x[/link]", ":smile: {{ 7 * 7 }} $x$"),
    ("\x1b]0;owned\x07\x1b[2J\x1b[31m \x9b1m \x7f", "two\nlines\r\tand"),
    ("\u202egnisrever \u2066isolated\u2069 \u200e\u200f\u061c", "zero\u200bwidth\ufeff\u00ad"),
    ("line\u2028para\u2029graph\x85", "lone \ud800 \udfff"),
    ("法国的首都是", "巴黎 \u00e9t\u00e9 \U0001f469\u200d\U0001f52c"),
]
LAYER = "h.0.[/INST]\x1b[2J\u202e\n$x$"
SHOWN = (
    "[INST] Who wrote it? [/INST] So -> [red]Eco[/red]",
    "a[i] = [/b] [link=file:///etc]x[/link] -> :smile: {{ 7 * 7 }} $x$",
    r"\x1b]0;owned\x07\x1b[2J\x1b[31m \x9b1m \x7f -> two\nlines\r\tand",
    r"\u202egnisrever \u2066isolated\u2069 \u200e\u200f\u061c -> zero\u200bwidth\ufeff\xad",
    r"line\u2028para\u2029graph\x85 -> lone \ud800 \udfff",
)


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strange") / "[/b]\x1b[2J\u202e"
    keys = torch.arange(12.0).view(6, 2) * 9
    settings = asdict(Settings(LAYER, 0.5, store_text=True))
    return book_of(folder, keys, range(6), told=TOLD, settings=settings)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def is_inert(printed):
    kinds = {unicodedata.category(one) for one in printed if one not in "\n\u200d"}
    return not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_a_codebook_is_listed_with_its_texts_as_they_are(strange):
    listed = call("info", strange)
    assert listed.exit_code == 0, listed.output
    assert is_inert(listed.stdout)
    assert len(listed.stdout.splitlines()) == 2 + len(TOLD)
    for line in (*SHOWN, " -> ".join(TOLD[5]), r"at h.0.[/INST]\x1b[2J\u202e\n$x$"):
        assert line in listed.stdout


def test_as_json_every_text_comes_back_as_it_was_stored(strange):
    told = call("info", strange, "--json")
    assert told.stdout.isascii()
    found = json.loads(told.stdout, parse_constant=pytest.fail)
    assert [tuple(edit["text"]) for edit in found["edits"]] == TOLD
    assert found["settings"]["layer"] == LAYER


@pytest.mark.parametrize(
    "command",
    [
        ["info", "DIR"],
        ["log", "DIR"],
        ["diff", "DIR", "0"],
        ["checkout", "DIR", "0"],
        ["compact", "DIR"],
        ["verify", "DIR"],
        ["verify", "DIR", "--repair"],
        ["verify", "DIR", "--key-file", "DIR/[/x]\x1b"],
        ["export", "DIR", "OUT"],
        ["export", "DIR", "DIR"],
        ["import", "DIR/grace_config.json", "OUT"],
        ["report", "DIR", "--out", "OUT"],
        ["report", "DIR", "--out", "OUT.html"],
        ["build", "OUT", "DIR/[/x]\x1b"],
        ["bench", "--rows", "[/x]\x1b\u202e"],
        ["evaluate", "[/x]\x1b\u202e"],
        ["calibrate", "[/x]\x1b\u202e", "--layer", "x"],
        ["edit", "[/x]\x1b", "--layer", "x", "--edits", "DIR/[/x]\x1b", "--out", "OUT"],
        ["edit", "[/x]\x1b", "--layer", "x", "--edits", "DIR/grace_config.json", "--out", "OUT"],
    ],
    ids=lambda command: " ".join(command[:1] + command[2:3]).encode("ascii", "ignore").decode(),
)
def test_no_command_carries_out_what_it_was_given(strange, tmp_path, command):
    out = str(tmp_path / "[/o]\x1b\u202e")
    ran = call(*(part.replace("DIR", str(strange)).replace("OUT", out) for part in command))
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    assert is_inert(ran.output)
    assert ran.output


def test_bad_lines_are_told_inertly(strange, tmp_path):
    edits = tmp_path / "[e]\x1b.jsonl"
    edits.write_text(json.dumps({"[/x]\x1b\u202e": 1, "target": "\x1b"}) + "\n{\x1b\u202e\n")
    ran = call("edit", "x", "--layer", "x", "--edits", edits, "--out", tmp_path / "out")
    assert ran.exit_code == 1
    assert is_inert(ran.stderr)
    assert r"[e]\x1b.jsonl, line 1 must have a prompt or messages" in ran.stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_terminal_of_any_encoding_is_written_to(strange, encoding):
    """A pseudo-terminal: Rich draws its table there."""
    leader, follower = pty.openpty()
    try:
        ran = subprocess.Popen(
            [sys.executable, "-P", "-m", "grace_fast.tools.cli", "info", str(strange)],
            stdout=follower,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "300", "TERM": "xterm"},
        )
        os.close(follower)
        printed = b""
        try:
            while part := os.read(leader, 1 << 16):
                printed += part
        except OSError:  # its other end is closed
            pass
        error = ran.communicate(timeout=120)[1]
    finally:
        os.close(leader)
    assert ran.returncode == 0, error
    text = printed.decode(encoding).replace("\r\n", "\n")
    assert is_inert(re.sub("\x1b\\[[0-9;]*m", "", text))  # Rich's own: bold heads
    for line in SHOWN:
        assert line in text
    if encoding == "ascii":
        assert r"\u6cd5\u56fd\u7684\u9996\u90fd\u662f -> \u5df4\u9ece \xe9t\xe9" in text


def test_warnings_logs_and_tracebacks_of_the_command_line_are_inert():
    """In a process of its own, for it is the process that is changed."""
    program = (
        "import logging, sys, warnings\n"
        "from grace_fast.tools.terminal import guard\n"
        "guard()\n"
        "text = '\\x1b[2J\\u202e [/x] \\u6cd5'\n"
        "warnings.warn(text)\n"
        "logging.getLogger('other').warning('of %s', text)\n"
        "import threading\n"
        "one = threading.Thread(target=lambda: int(text + 'thread'))\n"
        "one.start(); one.join()\n"
        "print(text.replace('\\x1b', ''))\n"
        "raise KeyError(text) from ValueError(text + '\\nsecond')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=120,
    )
    assert ran.returncode == 1
    told = ran.stderr.decode("ascii")
    assert "\x1b" not in told
    assert r"UserWarning: \x1b[2J\u202e [/x] \u6cd5" in told
    assert r"of \x1b[2J\u202e [/x] \u6cd5" in told
    assert "ValueError: \\x1b[2J\\u202e [/x] \\u6cd5\nsecond" in told


def test_figures_are_json_whatever_numbers_they_are_of(capsys):
    import numpy as np

    terminal.say_json(
        {"a": np.float32("nan"), "b": [np.int64(3), torch.tensor(0.5)], "c": {1: float("inf")}}
    )
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [3, 0.5], "c": {"1": None}}


def test_a_plain_table_stands_in_columns(capsys):
    terminal.table(("name", "of"), [("法国", "x"), ("plain", "")])
    assert capsys.readouterr().out == "name   of\n法国   x\nplain\n"


def test_a_legend_shows_the_name_of_a_layer_as_it_is(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from grace_fast.codebook import printable

    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in ("_hidden", "a$\\frac{$", LAYER):
        axes.plot([1, 2], label=printable.for_plot(name))
    legend = axes.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO())
    assert len(legend.get_texts()) == 3


def test_a_log_line_of_the_library_spells_out_the_directory(tmp_path, caplog):
    from grace_fast.store.files import CodebookCorrupt

    assert str(CodebookCorrupt("a \x1b\u202e")) == r"a \x1b\u202e"
    assert logging.getLogRecordFactory() is logging.LogRecord, "only the command line changes it"


def test_long_texts_are_not_folded_for_minutes(monkeypatch, capsys):
    monkeypatch.setattr(terminal.sys.stdout, "isatty", lambda: True, raising=False)
    terminal.table(("name", "text"), [("a", "x " * 1_000_000)])
    assert len(capsys.readouterr().out.splitlines()) == 2
