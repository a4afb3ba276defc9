"""The command line: try it, edit a model, evaluate and calibrate, look at a codebook, verify, time.

Every command prints a table, or with `--json` one object, and ends with

    0    all is well
    1    something is wrong, or was left out: an error, an edit not learnt, a line of a file refused
    2    it could not begin: a wrong call, or an extra that is not installed (it is named)
    3    a directory was repaired, and not all of it is there any more
    130  it was interrupted, and said how far it had come

Commands that look after a codebook need nothing but `pip install .`.
"""

from __future__ import annotations

import os
import sys

from grace_fast.tools.cli import benching, edit_file, editing, evaluating, looking, versions
from grace_fast.tools.cli.command import CANNOT_BEGIN, FAILED, INTERRUPTED, LOST, app
from grace_fast.tools.terminal import guard

__all__ = ["CANNOT_BEGIN", "FAILED", "INTERRUPTED", "LOST", "app", "main"]

# What they add to `app` is all that they are imported for.
COMMANDS = (editing, evaluating, looking, versions, benching)
_read_edits = edit_file.read_edits  # its former name, for one version


def main() -> None:
    """Run the command line."""
    guard()
    try:
        app()
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
