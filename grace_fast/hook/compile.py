"""torch.compile integration: reset caches on attach, force eager while training."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from grace_fast.codebook import forks

_standing_aside = threading.Lock()
_wanted: list[int] = []  # by which threads
_stance: Any = None
sees_hooks = False  # whether torch tells blocks apart by their hooks already


# In how many dispatch modes of torch's this thread is. `is_in_torch_dispatch_mode` goes by a flag
# of the process, which two threads whose modes overlap leave set for good.
modes_here: Any = torch._C._len_torch_dispatch_stack


def see_hooks() -> None:
    """Let torch tell blocks apart by their hooks, once it compiles at all.

    Else the blocks of a model that are compiled one by one share what was made of the first, which
    has no hook, and edits are lost.
    """
    global sees_hooks
    if sees_hooks or "torch._dynamo" not in sys.modules:
        return
    config: Any = getattr(sys.modules["torch._dynamo"], "config", None)
    if config is not None:  # None while another thread imports it
        config.skip_nnmodule_hook_guards = False
        sees_hooks = True


def forget_compiled_code() -> None:
    """Let compiled code be made again, where there is any: torch does not look for new hooks in it.

    It is the code of the whole process: who compiled a model is not told from the model.
    """
    see_hooks()
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.convert_frame.input_codes.seen:
        torch.compiler.reset()


@contextmanager
def stood_aside() -> Iterator[None]:
    """Run compiled modules as they are written, within a `with` block.

    A value in training needs its gradient, which an op that finds the value does not give.
    """
    global _stance
    if "torch._dynamo" not in sys.modules:
        yield
        return
    # The stance is of the process: the first who needs it takes it, the last gives it back.
    with _standing_aside:
        if not _wanted:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
        me = threading.get_ident()
        _wanted.append(me)
    try:
        yield
    finally:
        with _standing_aside:
            _wanted.remove(me)
            _go_on_if_unwanted()


def is_in_progress() -> bool:
    """Tell whether what this thread runs is being compiled.

    Torch says so of the whole process; another thread may compile while a value is trained here.
    """
    if is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and threading.get_ident() not in _wanted


def _go_on_if_unwanted() -> None:
    if not _wanted:
        _stance.__exit__(None, None, None)


def _go_on_in_child(*_: object) -> None:
    """Let a forked child compile again where only threads that it has not stood aside."""
    if _wanted:
        me = threading.get_ident()
        _wanted[:] = [thread for thread in _wanted if thread == me]
        _go_on_if_unwanted()


forks.guard(sys.modules[__name__], "_standing_aside", mend=_go_on_in_child)
