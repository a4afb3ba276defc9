"""The kept inputs of the fuzzer, given to every reader of foreign files without it.

`make fuzz` looks for further ones; what it finds is kept in `fuzz/corpus`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import readers
from fuzz.draw import Draw

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
INPUTS = sorted(CORPUS.iterdir())


@pytest.mark.parametrize("path", INPUTS, ids=[path.name for path in INPUTS])
def test_every_kept_input_is_refused_or_serves(path):
    readers.take(path.read_bytes())


def test_every_reader_has_an_input_and_one_that_it_refuses():
    told = {reader.__name__: set() for reader in readers.READERS}
    for path in INPUTS:
        content = path.read_bytes()
        told[Draw(content).pick(readers.READERS).__name__].add(readers.take(content))
    assert all(told.values())
    assert sum(True in each for each in told.values()) == len(told)


def test_what_a_reader_must_not_do_is_seen(monkeypatch):
    """The fuzzer's own test: an error of Python's, a file elsewhere, a warning, much memory."""

    def foreign(draw):
        with readers.refusing(ValueError):
            int("x")

    def elsewhere(draw):
        (readers.BESIDE / "more").touch()

    def through_a_link(draw):
        readers.VICTIM.write_text("changed")

    def hungry(draw):
        bytearray(2 * readers.ROOM_BYTES)

    for reader, error in (
        (foreign, ValueError),
        (elsewhere, AssertionError),
        (through_a_link, AssertionError),
        (hungry, MemoryError),
    ):
        monkeypatch.setattr(readers, "READERS", (reader,))
        with pytest.raises(error):
            readers.take(b"")
