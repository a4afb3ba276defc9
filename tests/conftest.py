"""One thread: tiny models are slower on two, and the machine is shared. CI repeats itself."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile("here", deadline=None, max_examples=60)
# The same examples at every run: what is red in CI is red on a desk.
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "here")
