"""Give readers inputs without end, guided by what of the package each one reaches.

    PYTHONPATH=tests python -m fuzz [options of libFuzzer] FOUND tests/fuzz/corpus

New inputs go to FOUND; what a reader must not do ends the run, and its input is kept.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["grace_fast"]):
    from fuzz import readers

import torch


def main() -> None:
    """Run until a time is over, or something was found."""
    torch.set_num_threads(1)
    atheris.Setup(sys.argv, readers.take)
    atheris.Fuzz()


main()
