"""What every launch shares: how many programs a device runs at once, and where arguments begin.

Triton compiles a kernel anew for every pattern of what it takes for constant: an integer that is 1
or a multiple of 16, a pointer that is one. What differs from call to call must not be of those, or
a look-up would wait for the compiler: integers that follow B and N are never specialised, and every
pointer begins at a multiple of 16.
"""

import torch
from torch import Tensor


def processors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor that begins at a multiple of 16 bytes: itself, or a copy.

    A slice of a batch begins anywhere if its rows are of an odd width.
    """
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
