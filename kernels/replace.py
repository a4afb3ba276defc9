"""The value of every query that hit, written over the layer's output where the edit says so.

One program takes one sequence and TOKENS x COLUMNS elements of it. A sequence that missed is not
read at all, and of one that hit only the masked elements are written: nothing is read back.
"""

import torch
import triton
import triton.language as tl
from grace_fast.kernels.dense import asked_for
from torch import Tensor

MODES = {"replace_all": 0, "replace_last": 1, "replace_prompt": 2}
TOKENS, COLUMNS, WARPS = 8, 512, 4  # not measured


@triton.jit
def is_replaced(token, position, MODE: tl.constexpr) -> tl.tensor:
    """Tell which tokens a hit replaces, as `semantics.replacement_mask` does."""
    if MODE == 0:
        replaced = token >= 0
    elif MODE == 1:
        replaced = token == position
    else:
        replaced = token < position
    return replaced


@triton.jit(do_not_specialize=["length"])
def write_values(
    output,  # [B, T, V], written in place
    hit,  # [B] bool
    row,  # [B] int64, the row that hit
    values,  # [slots, V]
    value_slot,  # [capacity] int64; None where row i's value is in slot i
    positions,  # [B] int64, the query token of each sequence; None where it is the last one
    batch_stride,  # elements of output from one sequence to the next
    token_stride,  # and from one token to the next
    length,  # T
    width,  # V
    MODE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write one row's value over the masked tokens of one sequence."""
    query = tl.program_id(0).to(tl.int64)
    if not asked_for(hit, query, query >= 0):
        return
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(row + query)
    if value_slot is not None:
        slot = tl.load(value_slot + slot)
    position = (query * 0 + length - 1) if positions is None else tl.load(positions + query)
    replaced = (token < length) & is_replaced(token, position, MODE)
    value = tl.load(values + slot * width + column, mask=column < width, other=0)
    to = output + query * batch_stride + token[:, None] * token_stride + column[None, :]
    whole = tl.broadcast_to(value.to(output.dtype.element_ty)[None, :], (TOKENS, COLUMNS))
    tl.store(to, whole, mask=replaced[:, None] & (column < width)[None, :])


def replace(
    output: Tensor,
    hit: Tensor,
    row: Tensor,
    values: Tensor,
    value_slot: Tensor | None,
    positions: Tensor | None,
    mode: str,
) -> Tensor:
    """Write values into output [B, T, V] where a query hit and the mode replaces; return it.

    Only the last dimension of output has to be contiguous. hit, row: [B]; positions: [B], or None
    for the last token of each; values: [slots, V]; mode: see `semantics.replacement_mask`. Autograd
    does not see the write.
    """
    batch, length, width = output.shape
    if output.stride(2) != 1:
        raise ValueError(f"output must be contiguous along V, got strides {output.stride()}")
    grid = (batch, triton.cdiv(length, TOKENS), triton.cdiv(width, COLUMNS))
    with torch.cuda.device_of(output):
        write_values[grid](
            output,
            hit,
            row,
            values,
            value_slot,
            None if positions is None else positions.contiguous(),
            output.stride(0),
            output.stride(1),
            length,
            width,
            MODE=MODES[mode],
            TOKENS=TOKENS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return output
