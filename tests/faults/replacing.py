"""A process under the shim that puts one file in place, and says which package does so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grace_fast as gf
from faults import shim, workload
from grace_fast.store import atomic


def perform(request: dict[str, Any]) -> None:
    """Replace one file of a folder."""
    shim.watch(request["folder"])
    shim.log_to(request.get("log"))
    atomic.replace(Path(request["folder"]) / "file", b"content")
    workload.say("package", Path(gf.__file__).resolve())


if __name__ == "__main__":
    workload.serve(perform)
