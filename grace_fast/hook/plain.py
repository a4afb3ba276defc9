"""The compiled way of plain calls: what the extension (csrc/hook.h) is told, once.

A plain call says where its prompts end by its ids and mask alone, runs on the host without autograd
on what is written, and nothing watches or traces it. It is noted, and answered at the layer, in one
call of the extension each; it decides, counts and returns what Python would, or leaves the call to
Python before anything has happened.
"""

from __future__ import annotations

import _thread
import sys
import threading
from typing import Any

import torch
from torch.autograd import forward_ad

from grace_fast import _native
from grace_fast.hook import compile, selection
from grace_fast.hook.generation import Generation
from grace_fast.hook.modes import Modes
from grace_fast.hook.positions import TELLING, Padding
from grace_fast.lookup.prepared import Prepared

_C: Any = torch._C
_TORCH = {
    "modes": compile.modes_here,
    "compiler": vars(torch.compiler),
    "tracing": _C._get_tracing_state,
    "transform": _C._functorch.peek_interpreter_stack,
    "forward_ad": forward_ad,
}


def layer_hook(site: Any, modes: Modes, padding: Padding, counted: Any) -> Any:
    """Return the hook of an adaptor for plain calls, None where there can be none.

    Its `respond` is called with the adaptor, and with the module, the arguments and the output as
    torch gives them to a hook; it returns the output with values, None where that stays, or
    NotImplemented for other calls. site: the adaptor's; counted: where it counts.
    """
    every_token = site.query == "every_token"
    if _native.cpu is None or (site.first_token and not every_token):
        return None
    told = {
        "prepared": Prepared,
        "generation": Generation,
        "in_use": selection.in_use,
        "name": site.name,
        "telling": frozenset((*TELLING, "input_ids", "attention_mask")),  # by other names' places
        "every_token": every_token,
        "needs_mask": site.decoder_only or site.finds_padding,
        "padding": padding.token,
    }
    hook = _native.cpu.LayerHook(_TORCH | told, counted)
    modes.count_plain = hook.count_modes
    return hook


def call_noter(names: tuple[str, ...], **told: Any) -> Any:
    """Return what notes the plain calls of a module, None where there can be none.

    Its `run` is called with `forward`, args, kwargs, and with what is to be called with these two
    where the call is not plain. names: of what is given by place.
    """
    # What notes by the thread cannot tell greenlets apart, as a local put in the place of threads'.
    if _native.cpu is None or threading.local is not _thread._local:
        return None
    others = {"compile": compile, "modules": sys.modules, "dynamo": "torch._dynamo"}
    return _native.cpu.CallNoter(_TORCH | others | told | {"names": names})
