"""A process that gets no more memory says so, answers as before and loses nothing.

Address space is reserved long before it is used: the data is limited (`RLIMIT_DATA`).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from disk import run_python

SCRIPT = """
import collections, ctypes, gc, re, resource, shutil, sys
from pathlib import Path
import torch
sys.path.append({tests!r})
from faults import workload
import grace_fast as gf
from grace_fast.store.tensor_files import checksum
torch.set_num_threads(1)
M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed is gone, not kept for later
workload.warm_up()
room, ROWS = Path({room!r}), 50_000

def limit(more=None):
    taken = re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    most = resource.RLIM_INFINITY if more is None else (int(taken[1]) << 10) + more
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))

def open_a_copy():
    workload.attach(copy, read_only=True).unload()

def held(grace):
    book = grace.codebook.snapshot()
    edits = [(edit.id, edit.row, edit.radius, edit.outcome) for edit in grace.edits()]
    return book.version, len(book), edits, *map(checksum, (book.keys, book.values, book.radii))

folder, copy = room / "book", room / "copy"
grace = workload.attach(folder)
for operation in workload.operations(10):
    workload.do(grace, operation)
book = grace.codebook
generator = torch.Generator().manual_seed(0)
many = (torch.randn(ROWS, workload.WIDTH, generator=generator), torch.zeros(ROWS, workload.CLASSES),
        torch.ones(ROWS))
acts = {{
    "append": lambda: book.append(*many),
    "save": lambda: grace.save_pretrained(room / "saved"),
    "compact": grace.compact,
    "open": open_a_copy,
}}
shutil.copytree(folder, copy)
told = collections.Counter()
for turn in ("few rows", "many rows"):
    asked = book.keys[:6].clone()
    known, answers = held(grace), gf.find(asked, book).row.tolist()
    for name, act in acts.items():
        for more in (0, *(1 << bits for bits in range(16, 25, 2))):
            if name == "append" and (turn == "many rows" or more >= many[0].nbytes):
                break
            gc.collect()
            limit(more)
            try:
                act()
                result = "done"
            except MemoryError:
                result = "MemoryError"
            finally:
                limit()
            told[name, result] += 1
            if name == "append" and result == "done":
                raise SystemExit("append had room enough")
            assert gf.find(asked, book).row.tolist() == answers
            assert held(grace) == known, (turn, name, more)
    if turn == "few rows":
        book.append(*many)  # the same process goes on once there is memory
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)  # many rows in the journal, to be replayed
known = held(grace)
grace.unload()
again = workload.attach(folder)
assert held(again) == known
again.unload()
print(dict(told))
for name in acts:
    assert told[name, "MemoryError"] > 0, (name, told)
"""


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="the address sanitizer needs more memory than the test leaves",
)
def test_where_memory_ends_the_old_version_still_answers_and_is_found_again(tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), room=str(tmp_path))
    ran = run_python(script)
    print(f"N4: {ran.stdout.strip()}")
    assert ran.returncode == 0, ran.stderr
