"""Forks: a child finds locks that nobody holds, nothing half done, nobody to wait for.

A fork copies the memory and one thread, the one that forks. A lock that another thread held is held
in the child for ever, by nobody. So every lock of the package is taken before a fork and given back
after it, in the parent and in the child, and what it guards is whole in both. Who holds one for
longer than a moment (a compaction, a value that is trained under the lock) is not waited for: the
child gets that lock anew, and the owner is told that what it guards may be half done.

OpenMP keeps threads for each thread that asked for some, and the child would wait for them in the
first product of two matrices, of torch's as of ours. They are ended before the fork; those that are
wanted again come back by themselves (EPYC: 1 ms for a fork, .1 ms for the next product).

MKL has locks of its own, which a thread takes in a product and when it ends. What this package does
in the background it does in steps, and a fork comes between two of them.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from enum import IntEnum
from itertools import count
from pathlib import Path
from typing import Any

import torch

WAIT_S = 1.0  # for all locks together; most are held for microseconds
STEP_WAIT_S = 10.0  # for background work, which takes milliseconds a step and depends on nobody
_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5: give back all there is
_MAPS = Path("/proc/self/maps")


class Order(IntEnum):
    """Which locks are taken first: who holds one may wait for a later one, and never otherwise."""

    STEP = 0  # of work in the background
    MAKING = 1  # of an editor's first codebook
    WRITING = 2  # a codebook
    INDEX = 3  # of FAISS
    CODES = 4
    LAST = 5  # nothing else is waited for under it


@dataclass(frozen=True)
class _Guarded:
    owner: weakref.ref[Any]
    lock: str | None  # the attribute of the owner
    order: Order
    mend: Callable[[Any, bool], None] | None


_guarded: dict[int, _Guarded] = {}
_numbers = count()
_is_child = False
_forking = threading.Lock()  # two threads may fork at once


class _Taken(threading.local):
    """What a thread took before it forks, in the order of that."""

    def __init__(self) -> None:
        self.locks: list[Any] = []


_taken = _Taken()
_ending: list[int] = []  # threads that have done their work, by the system's number


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


_may_step = _open_gate()
_may_guard = _open_gate()  # shut from when every lock is taken until the fork is over


def guard(
    owner: Any,
    lock: str | None,
    order: Order = Order.LAST,
    mend: Callable[[Any, bool], None] | None = None,
) -> None:
    """Let a fork hold a lock of an object or a module, as long as that is alive.

    lock: the name of the attribute; None where only `mend` is asked for.
    mend: called in the child with the owner, and whether the lock could be had: else what it guards
        may be half done. Those whose locks are taken last are called first.
    """
    if not _taken.locks:  # else this thread forks
        _may_guard.wait()
    number = next(_numbers)
    gone = weakref.ref(owner, lambda _: _guarded.pop(number, None))
    _guarded[number] = _Guarded(gone, lock, order, mend)


def _listed(but: Collection[int] = ()) -> list[tuple[int, Any, _Guarded]]:
    """Return the living owners by number, in the order in which their locks are taken."""
    known = [(number, each.owner(), each) for number, each in list(_guarded.items())]
    found = [each for each in known if each[0] not in but and each[1] is not None]
    return sorted(found, key=lambda each: each[2].order)


class _Work:
    """What a thread does in the background."""

    def __init__(self) -> None:
        self.step = threading.Lock()
        guard(self, "step", Order.STEP)


def do(steps: Iterator[str], meanwhile: Collection[str] = ()) -> None:
    """Go through the steps of some work; a process is forked between two of them, or afterwards.

    For threads of this package's own: this thread has to end right behind it.

    steps: yields the name of each before it is done; meanwhile: of those that a fork may fall in.
    """
    work = _Work()
    name: str | None = ""
    while name is not None:
        _may_step.wait()
        with nullcontext() if name in meanwhile else work.step:
            name = next(steps, None)
    with work.step:
        rest_openmp()
        _ending[:] = [each for each in _ending if _is_alive(each)]
        _ending.append(threading.get_native_id())


def _is_alive(thread: int) -> bool:
    return os.path.exists(f"/proc/self/task/{thread}")


def _before() -> None:
    _take(_forking, time.monotonic() + WAIT_S)
    _may_step.clear()
    steps_until = time.monotonic() + STEP_WAIT_S
    until, seen = 0.0, set[int]()
    # Other threads go on meanwhile: what they make has locks too, which are taken in another round.
    while (listed := _listed(but=seen)) or _may_guard.is_set():
        if seen or not listed:
            _may_guard.clear()
        for number, owner, each in listed:
            seen.add(number)
            if each.order > Order.STEP and not until:
                until = time.monotonic() + WAIT_S
            if each.lock is not None:
                _take(getattr(owner, each.lock), until or steps_until)
    while _ending and time.monotonic() < steps_until:
        if _is_alive(_ending[-1]):
            time.sleep(0.0005)
        else:
            _ending.pop()
    rest_openmp()


def _take(lock: Any, until: float) -> None:
    if lock.acquire(timeout=max(0.0, until - time.monotonic())):
        _taken.locks.append(lock)


def _in_parent() -> None:
    _let_go()
    _may_step.set()
    _may_guard.set()


def _let_go() -> None:
    while _taken.locks:
        _taken.locks.pop().release()


def _in_child() -> None:
    global _is_child, _may_step, _may_guard
    _is_child, _may_step, _may_guard = True, _open_gate(), _open_gate()
    _ending.clear()
    _let_go()
    _is_free(_forking)
    for _, owner, each in reversed(_listed()):
        whole = each.lock is None or _is_free(getattr(owner, each.lock))
        if each.mend is not None:
            each.mend(owner, whole)


def _is_free(lock: Any) -> bool:
    """Tell whether a lock can be had, as nobody else is there to hold it; make it so if not."""
    if lock.acquire(blocking=False):
        lock.release()
        return True
    lock._at_fork_reinit()  # what Python does with its own
    return False


def rest_openmp() -> None:
    """End the threads that OpenMP keeps for this one, in every copy of libgomp that is loaded."""
    try:
        mapped = _MAPS.read_text(errors="replace")
    except OSError:  # no Linux
        return
    for path in {line.split()[-1] for line in mapped.splitlines() if "libgomp" in line}:
        with suppress(OSError, AttributeError):  # replaced on the disk; older than OpenMP 5
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            library.omp_pause_resource_all(_PAUSE_HARD)


@atexit.register
def _rest_in_child() -> None:
    """Let a forked child end: torch waits for threads of another pool, which it takes these for.

    That pool (caffe2's, made by `set_num_threads`) is joined when the process exits. Its threads
    were the parent's: a child gives their identity to the next that it starts, and where several
    threads were at work in the parent it ended with a segmentation fault. To set the number anew
    puts a pool of the child's own in the place of that one.
    """
    if _is_child:
        torch.set_num_threads(torch.get_num_threads())
        rest_openmp()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
