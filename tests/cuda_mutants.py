"""Synchronisation of the GPU look-up, left out one call at a time, and what a host sees of it.

    python -m cuda_mutants [WORDS ...]     with tests on the path; prints what becomes of each

Words choose the mutants whose names hold some of them; all are tried without.

Every call of a function of csrc/cuda/device.cuh that returns nothing, and every fresh load, is a
mutant; a few more put one elsewhere. All are in one build: a switch says which is chosen.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from cuda_build import CUDA, host_library, loaded
from cuda_workloads import workloads

SEEDS = 40  # orders in which every workload runs
SECONDS = 300.0  # in which a mutant has to end

# What is called later: in a file, after what follows it.
LATER = (
    (
        "the kernel before is waited for once its queries are read",
        *("indexed.cuh", "wait_for_the_kernel_before();", "take_queries();"),
    ),
)

# Each of two is enough: only where both are left out something is seen.
BOTH = (
    ("encode is_last: take_ticket 1 acquires nothing", "encode fresh: load_fresh 1"),
    ("settle is_last_block: take_ticket 1 acquires nothing", "settle seen: load_fresh 1"),
)

HEADER = f"""#pragma once
#include "{CUDA / "device.cuh"}"
namespace on_host {{
bool is_chosen(int mutant);
template <typename T>
T fresh_unless(bool plain, const T* from) {{
  return plain ? *from : grace_fast::device::load_fresh(from);
}}
inline unsigned ticket(bool releases, bool acquires, unsigned* ticket, unsigned last) {{
  if (releases && acquires) return grace_fast::device::take_ticket(ticket, last);
  Memory& memory = machine()->memory;
  maybe_step_back();
  if (releases) memory.release();
  const auto next = [last](unsigned count) {{ return count >= last ? 0 : count + 1; }};
  const unsigned before = memory.update(ticket, next);
  if (acquires) memory.acquire();
  maybe_step_back();
  return before;
}}
}}
"""
SWITCH = """namespace on_host {
static int chosen[2];
bool is_chosen(int mutant) { return chosen[0] == mutant || chosen[1] == mutant; }
}
extern "C" __attribute__((visibility("default"))) void choose(int mutant, int other) {
  on_host::chosen[0] = mutant;
  on_host::chosen[1] = other;
}
"""


@dataclass
class Call:
    """A call in a source, from its name to its last bracket."""

    name: str
    begin: int
    end: int
    argument: str


def calls_of(source: str, stem: str) -> Iterator[Call]:
    """Find what synchronises, and name it by the function it is in."""
    seen: Counter[str] = Counter()
    effects = re.findall(r"GRACE_FAST_DEVICE void (\w+)\(", (CUDA / "device.cuh").read_text())
    for called in re.finditer(
        rf"\b({'|'.join(effects)}|load_fresh|take_ticket)(?:<[^;()]*>)?\(", source
    ):
        begin, end, open_now = called.start(), called.end(), 1
        while open_now:
            open_now += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        name = f"{stem} {_function_at(source, begin)}: {called[1]}"
        seen[name] += 1
        yield Call(f"{name} {seen[name]}", begin, end, source[called.end() : end - 1])


_FUNCTION = re.compile(r"GRACE_FAST_(?:KERNEL\(\w+\)|DEVICE|COLD)\s[^;{}()]*?(\w+)\(")


def _function_at(source: str, at: int) -> str:
    return [found[1] for found in _FUNCTION.finditer(source, 0, at)][-1]


def switched() -> tuple[dict[str, str], list[str]]:
    """Return the sources with every mutant in them, and the mutants' names, from number 1 on."""
    names: list[str] = []
    sources = {}
    for path in sorted(CUDA.glob("*.cuh")):
        if path.name == "device.cuh":
            continue
        source = path.read_text()
        edits: list[tuple[int, int, str]] = []
        for call in calls_of(source, path.stem):
            names.append(call.name)
            chosen = f"on_host::is_chosen({len(names)})"
            if "load_fresh" in call.name:
                new = f"on_host::fresh_unless({chosen}, {call.argument})"
                edits.append((call.begin, call.end, new))
                continue
            if "take_ticket" in call.name:
                names[-1] += " releases nothing"
                names.append(f"{call.name} acquires nothing")
                other = f"on_host::is_chosen({len(names)})"
                new = f"on_host::ticket(!{chosen}, !{other}, {call.argument})"
                edits.append((call.begin, call.end, new))
                continue
            text = source[call.begin : call.end + 1]
            for name, file, early, after in LATER:
                if file == path.name and text == early:
                    names.append(name)
                    later = f"on_host::is_chosen({len(names)})"
                    at = source.index(after, call.end) + len(after)
                    edits.append((at, at, f" if ({later}) {early}"))
                    chosen += f" || {later}"
            edits.append((call.begin, call.end + 1, f"{{ if (!({chosen})) {text} }}"))
        for begin, end, new in sorted(edits, reverse=True):
            source = source[:begin] + new + source[end:]
        sources[path.name] = source
    return sources, names


def build() -> tuple[ModuleType, Callable[[int, int], object], list[str]]:
    """Return a module with all mutants in it, what chooses one, and their names."""
    sources, names = switched()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {**sources, "device.cuh": HEADER, "switch.cpp": SWITCH}.items():
            (Path(folder) / name).write_text(text)
        library = host_library(Path(folder))
    return loaded(library), ctypes.CDLL(str(library)).choose, names


def outcome(choose: Callable[[], object], works: dict[str, Callable[[int], None]]) -> str:
    """Return in words what the host sees of a mutant, in a process of its own."""
    context = multiprocessing.get_context("fork")
    told, tell = context.Pipe(duplex=False)

    def child() -> None:
        choose()
        for seed in range(SEEDS):
            for name, work in works.items():
                try:
                    work(seed)
                except (AssertionError, RuntimeError) as error:
                    why = "a wrong answer" if isinstance(error, AssertionError) else str(error)
                    tell.send(f"{name}: {why}")
                    return
        tell.send("survives")

    process = context.Process(target=child)
    process.start()
    tell.close()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        return "it never ends"
    try:
        return str(told.recv())
    except EOFError:
        return f"it ends with {process.exitcode}"


def main(*words: str) -> None:
    """Print a JSON object: what becomes of the mutants, and of the sources without one."""
    torch.set_num_threads(1)
    module, choose, names = build()
    works = workloads(module)
    chosen = {"no mutant": (0, 0)} | {name: (i, i) for i, name in enumerate(names, 1)}
    chosen |= {
        " + ".join(both): (chosen[both[0]][0], chosen[both[1]][0])
        for both in BOTH
        if chosen.keys() >= set(both)
    }
    found = dict.fromkeys(chosen, "not tried")
    for name, numbers in chosen.items():
        if not words or any(word in name for word in words):
            found[name] = outcome(partial(choose, *numbers), works)
            print(f"{name} -> {found[name]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
