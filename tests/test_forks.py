"""A child of a warmed-up process looks up, prepares, edits, saves and ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager

import models
import pytest
import torch

import grace_fast as gf
from grace_fast import certificate, compiled, forks, native, training
from grace_fast.backends import faiss

needs_extension = pytest.mark.skipif(native.cpu is None, reason=native.missing)
FAMILY = models.FAMILIES["gpt2"]
PATIENCE = 20  # seconds; a child that waits for ever is ended by then
ROWS, WIDTH = 6000, 32


def forked(work, leave=os._exit):
    """Do some work in a forked child; return how it ended: 0 where the work returned."""
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE)
        try:
            work()
        except BaseException as error:
            print(f"in the child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        leave(0)
    return os.waitpid(child, 0)[1]


def a_book(rows=ROWS):
    torch.manual_seed(0)
    book = gf.Codebook(WIDTH, 2)
    keys = torch.randn(rows, WIDTH)
    book.append(keys, torch.randn(rows, 2), torch.full((rows,), 0.1))
    return book, keys


@contextmanager
def another_thread(within):
    """Let another thread be within a `with` block meanwhile."""
    inside, may_leave = threading.Event(), threading.Event()

    def run():
        with within:
            inside.set()
            may_leave.wait(PATIENCE)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert inside.wait(PATIENCE)
    try:
        yield
    finally:
        may_leave.set()
        thread.join()
