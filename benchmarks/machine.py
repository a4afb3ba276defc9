"""What the figures were taken on and from: processor, threads, versions, commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grace_fast as gf
from grace_fast.tools.timing import cpu_model

_PACKAGES = ("torch", "numpy", "faiss-cpu", "usearch", "scikit-learn", "snnpy", "hnswlib")
_FOLDERS = ("--out", "--folder")
_SIMD = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "asimd")


def describe(threads: int) -> dict[str, Any]:
    """Return the machine and the versions, as they go into a result file."""
    return {
        "device": "cpu",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": [name for name in _SIMD if name in _cpu_flags()],
        "python": platform.python_version(),
        "grace_fast": gf.__version__,
        "commit": commit(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def short_name(machine: dict[str, Any]) -> str:
    """Return the machine in a form for file names: `amd-epyc-2-cores`, or the device's name."""
    is_cpu = machine["device"] == "cpu"
    said = f"{machine['cpu']} {machine['cores']} cores" if is_cpu else machine["device"]
    return re.sub(r"[^a-z0-9]+", "-", said.lower()).strip("-")


def command(module: str, words: Sequence[str]) -> str:
    """Return how to repeat a run: without the folders that it wrote to, which are its machine's."""
    kept = []
    passed = iter(words)
    for word in passed:
        if word in _FOLDERS:
            next(passed, None)
        elif word.split("=")[0] not in _FOLDERS:
            kept.append(word)
    return " ".join([f"python -m {module}", *kept])


def heading(
    machine: dict[str, Any], module: str, words: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return what a result file says before its figures: machine, command and today's date.

    words: of the command; by default those that this process was given.
    """
    words = sys.argv[1:] if words is None else words
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"machine": machine, "command": command(module, words), "date": today}


def keep(folder: Path, name: str, found: dict[str, Any], page: str, more: str = "") -> Path:
    """Write what was found as `<name>-<machine>-<date><more>.json`, its page beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = (name, short_name(found["machine"]), found["date"])
    path = folder / f"{'-'.join(part for part in parts if part)}{more}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)
    return path


def commit() -> str:
    """Return the commit of the checkout, `+` behind it where files differ; empty without one."""
    here = Path(__file__).parent
    try:
        asked = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu_flags() -> set[str]:
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
