"""Changes of files and directories of codebooks, with the checksums that suit them.

The fuzzer, which has no pytest, uses them too.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grace_fast.codebook.mapped import BLOCK_BYTES, HEADER_BYTES
from grace_fast.store import files, manifest, tensor_files
from grace_fast.store.large import resident

# Bytes of a file


def overwrite(path, at, content):
    with path.open("r+b") as file:
        file.seek(at if at >= 0 else path.stat().st_size + at)
        file.write(content)


def flip(path, at):
    """Flip a bit of the byte at a place of a file."""
    content = path.read_bytes()
    overwrite(path, at, bytes([content[at] ^ 1]))


def flip_in_second_block(path):
    """Flip a bit of keys or values that are mapped, in their block 1."""
    flip(path, HEADER_BYTES + BLOCK_BYTES + 99)


def flip_in_column(folder, name, hmac_key=None):
    """Flip a bit of one tensor of a model's edits; its checksum is as it was."""
    path = folder / files.read_config(folder, hmac_key)["tensors"]["file"]
    column = load_file(path)[name].numpy().tobytes()
    flip(path, path.read_bytes().index(column) + 5)


def described(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_with(header, data=b"", length=None):
    """Return a safetensors file of a header, as JSON or in bytes, and of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# What a manifest or a state says


def change_config(folder, **changes):
    """Change the manifest, with the checksum that suits it."""
    config = files.read_config(folder)
    (folder / files.CONFIG).write_bytes(manifest.seal(config | changes))


def change_mapped(folder, **changes):
    mapped = files.read_config(folder)["mapped"]
    change_config(folder, mapped=mapped | {"keys": mapped["keys"] | changes})


def write_with_checksum(folder, config):
    """Write a manifest as anybody can: the checksum takes no secret."""
    rest = {name: value for name, value in config.items() if name != "checksum"}
    sealed = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    whole = rest | {"checksum": hashlib.sha256(sealed).hexdigest()}
    (folder / files.CONFIG).write_text(json.dumps(whole))


def leave_state(folder, content):
    """Leave an unfinished build that has a state and nothing else."""
    work = folder / resident.BUILDING
    work.mkdir()
    (work / "state.json").write_bytes(content)


def change_state(path, change):
    """Change a state that is kept as JSON, of a build or of an evaluation."""
    state = json.loads(path.read_bytes())
    change(state)
    path.write_text(json.dumps(state))


# Tensors


def put_tensors(folder: Path, which: str, tensors: Mapping[str, Tensor]) -> None:
    """Let a file of a directory hold some tensors, with the checksums that suit them."""
    config = files.read_config(folder)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / config[which]["file"])
    config[which]["sha256"] = {
        name: tensor_files.checksum(tensor) for name, tensor in stored.items()
    }
    (folder / files.CONFIG).write_bytes(manifest.seal(config))


def put_rows(folder: Path, name: str, at: int, content: bytes) -> None:
    """Overwrite bytes of keys or values that are mapped, with the checksums that suit them."""
    path = folder / files.read_config(folder)["mapped"][name]["file"]
    overwrite(path, HEADER_BYTES + at, content)
    rows = path.read_bytes()[HEADER_BYTES:]
    blocks = [rows[first : first + BLOCK_BYTES] for first in range(0, len(rows), BLOCK_BYTES)]
    checks = torch.tensor([list(hashlib.sha256(block).digest()) for block in blocks])
    tensors = load_file(folder / files.read_config(folder)["tensors"]["file"])
    put_tensors(folder, "tensors", tensors | {f"{name}.blocks": checks.to(torch.uint8)})


def replace_tensor(folder, which, name, change):
    """Change one tensor, with the checksum that suits it: what checksums do not see."""
    tensors = load_file(folder / files.read_config(folder)[which]["file"])
    put_tensors(folder, which, tensors | {name: change(tensors[name])})


def drop_tensor(folder, which, name):
    tensors = load_file(folder / files.read_config(folder)[which]["file"])
    del tensors[name]
    put_tensors(folder, which, tensors)


def put(row, number):
    """Return a change of a tensor: a number at the beginning of a row."""

    def change(tensor):
        changed = tensor.clone()
        changed.view(-1)[row * (tensor.numel() // len(tensor))] = number
        return changed

    return change
