"""Atomic changes of files: one is replaced whole, in one step, and is on the disk before that."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def synchronise(path: Path) -> None:
    """Put a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes, ready: Callable[[], None] = lambda: None) -> None:
    """Put a file in place in one step, and on the disk before anything refers to it.

    ready: called right before that step; what it raises prevents it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # never through a link that has its name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        ready()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    synchronise(path.parent)


@contextmanager
def removed_on_failure(*paths: Path) -> Iterator[None]:
    """Remove files that are new where what is done within a `with` block fails."""
    try:
        yield
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Have a new folder within a `with` block; unlike tempfile's, no fork that ends removes it."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def absolute(path: str | os.PathLike[str] | bytes) -> Path:
    """Return where a path leads now, for later: the working directory may be another one then.

    A `~` is the home directory; links on the way stay what they are, so that `..` behind one leads
    where the system says.
    """
    return Path(os.path.expanduser(os.fsdecode(path))).absolute()
