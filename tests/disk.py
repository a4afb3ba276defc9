"""Keys, questions and comparisons for codebooks on the disk."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import grace_fast as gf
from grace_fast import _native

compiled = pytest.mark.skipif(_native.cpu is None, reason="grace_fast._cpu was not built")
ROWS, WIDTH = 9000, 40  # two pages and a part of one, enough keys for an order


def some_keys(rows=ROWS, width=WIDTH, dtype=torch.float32, seed=0):
    """Clustered keys, values that tell their row, and radii of which one is large, one dead."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(rows // 12 + 1, width, generator=generator)
    at = torch.randint(len(centres), (rows,), generator=generator)
    keys = centres[at] + 0.05 * torch.randn(rows, width, generator=generator)
    number = torch.arange(rows, dtype=torch.float32)
    radii = 0.1 + 0.2 * torch.rand(rows, generator=generator)
    if rows > 70:
        radii[50], radii[60] = 3.0, -1.0
    return keys.to(dtype), torch.stack((number % 512, -(number // 512)), dim=1).to(dtype), radii


def questions(keys, count=120, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(keys), (count,), generator=generator)
    asked = keys[rows].float()
    return asked + 0.04 * torch.randn(count, keys.shape[1], generator=generator)


def in_memory(keys, values, radii):
    book = gf.Codebook(
        keys.shape[1], values.shape[1], keys.dtype, reserve_rows=4 * len(keys) + 9000
    )
    book.append(keys, values, radii)
    return book


def blocks(parts, size=1000):
    for first in range(0, len(parts[0]), size):
        yield tuple(part[first : first + size] for part in parts)


def assert_same_book(book, wanted):
    for name in ("keys", "values", "radii", "ids", "live"):
        assert torch.equal(getattr(book, name), getattr(wanted, name)), name
    for label, other in zip(book.labels, wanted.labels, strict=True):
        assert (label is None and other is None) or torch.equal(label, other)


def assert_same_answers(book, wanted, queries):
    found, expected = gf.find(queries, book), gf.find(queries, wanted)
    for name in ("hit", "row", "squared_distance"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    near, expected_near = gf.nearest(queries, book), gf.nearest(queries, wanted)
    assert torch.equal(near.row, expected_near.row)
    assert torch.equal(near.squared_distance, expected_near.squared_distance)
    rows = found.row[found.hit]
    assert torch.equal(book.snapshot().values_of(rows), wanted.snapshot().values_of(rows))
    assert book.snapshot().key_file is not None


def run_python(script):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def file_of(folder, stem):
    return next(folder.glob(f"{stem}-*.safetensors"))
