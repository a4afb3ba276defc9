"""Lifelong evaluation: edits streamed into a model, and everything they should have kept, measured.

`facts`, `labels` and `fabrications` run offline, on models trained here; `zsre`, `scotus` and
`hallucination` are the paper's tasks, on its models and data. Importing this raises
ModuleNotFoundError where the extra `evaluate` is not installed.
"""

from importlib.util import find_spec

for _name in ("babel", "matplotlib", "rich", "tqdm", "transformers"):
    if find_spec(_name) is None:
        raise ModuleNotFoundError(
            f"the evaluation needs {_name}, which is not installed: "
            "pip install 'grace_fast[evaluate]'",
            name=_name,
        )

from grace_fast.evaluate import given  # noqa: E402  (after the check, for its message)
from grace_fast.evaluate.running import OFFLINE, PAPER, load, run  # noqa: E402

__all__ = ["OFFLINE", "PAPER", "given", "load", "run"]
