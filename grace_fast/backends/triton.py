"""Every key read, in the canonical order, by a Triton kernel on the codebook's GPU.

The kernel is `grace_fast.kernels.nearest`. It is imported at the first call that may use it, so
that neither a missing triton nor the time to load it is anyone else's concern. With
TRITON_INTERPRET set before that import it is interpreted, takes host tensors, and can be tested
without a GPU.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from grace_fast import semantics
from grace_fast.backends.workload import Workload
from grace_fast.codebook import Snapshot

NAME = "triton"


def why_not(workload: Workload) -> str | None:
    """Return why the Triton kernel cannot take a call, or None."""
    if workload.device not in ("cpu", "cuda"):
        return f"keys are on {workload.device}, not on a GPU"
    missing = _missing()
    if missing is not None:
        return missing
    if workload.device == "cpu" and not _interpreted():
        return "keys are on cpu, and TRITON_INTERPRET=1 was not set before triton was imported"
    if workload.device == "cuda" and _interpreted():
        return "TRITON_INTERPRET is set, and interpreted kernels take keys on cpu only"
    return None


def nearest(queries: Tensor, snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """Return the nearest live row and its S of queries [B, D]; see `backends`."""
    if not (len(snapshot) and len(queries)):
        return semantics.no_row(len(queries), queries.device)
    from grace_fast.kernels import nearest as kernel

    found: tuple[Tensor, Tensor] = kernel.nearest(
        queries=queries.to(torch.float32).contiguous(),  # exact: bf16 and fp16 fit fp32
        keys=snapshot.key_slots,
        key_slot=snapshot.device_key_slot,
        live=snapshot.live,
    )
    return found


@cache
def _missing() -> str | None:
    try:
        import grace_fast.kernels.nearest  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install 'grace_fast[triton]'"
    return None


@cache
def _interpreted() -> bool:
    import triton

    from grace_fast.kernels import nearest as kernel

    return not isinstance(kernel.nearest_in_block, triton.JITFunction)
