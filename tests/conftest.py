"""One thread: tiny models are slower on two, and the machine is shared."""

import torch

torch.set_num_threads(1)
