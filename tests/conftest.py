"""One thread: tiny models are slower on two, and the machine is shared. CI repeats itself."""

import os
import shutil
import tempfile
from pathlib import Path

import disk
import golden_codebooks
import pytest
import torch
from faults.server import Server
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile("here", deadline=None, max_examples=60)
# The same examples at every run: what is red in CI is red on a desk.
settings.register_profile(
    "ci",
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="module")
def parts():
    """Keys, values and radii."""
    return disk.some_keys()


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    """A directory that no test may change."""
    folder = tmp_path_factory.mktemp("saved")
    disk.in_memory(*parts).save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may break."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(scope="session")
def golden_edited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "edited"
    golden_codebooks.editor().save_pretrained(folder)
    return folder


@pytest.fixture
def edited(golden_edited, tmp_path):
    """A directory of a model's edits: one file of tensors."""
    return shutil.copytree(golden_edited, tmp_path / "edited")


@pytest.fixture
def journalled(tmp_path):
    """A directory whose nine edits and one undo are ten versions after an empty base."""
    golden_codebooks.editor(path=tmp_path / "journalled").unload()
    return tmp_path / "journalled"


@pytest.fixture(scope="module")
def server():
    """A process under the shim of file calls, which forks for every run."""
    started = Server()
    yield started
    started.close()


@pytest.fixture
def room():
    """A folder in memory where there is one: thousands of codebooks are opened in it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
