"""What is done to files and directories of codebooks, and what is said of them then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from grace_fast.store import files, manifest, tensor_files


def put_tensors(folder: Path, which: str, tensors: Mapping[str, Tensor]) -> None:
    """Let a file of a directory hold some tensors, with the checksums that suit them."""
    config = files.read_config(folder)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / config[which]["file"])
    config[which]["sha256"] = {
        name: tensor_files.checksum(tensor) for name, tensor in stored.items()
    }
    (folder / files.CONFIG).write_bytes(manifest.seal(config))


def change_config(folder, **changes):
    """Change the manifest, with the checksum that suits it."""
    config = files.read_config(folder)
    (folder / files.CONFIG).write_bytes(manifest.seal(config | changes))


def change_mapped(folder, **changes):
    mapped = files.read_config(folder)["mapped"]
    change_config(folder, mapped=mapped | {"keys": mapped["keys"] | changes})


def overwrite(path, at, content):
    with path.open("r+b") as file:
        file.seek(at if at >= 0 else path.stat().st_size + at)
        file.write(content)


def replace_tensor(folder, which, name, change):
    """Change one tensor, with the checksum that suits it: what checksums do not see."""
    tensors = load_file(folder / files.read_config(folder)[which]["file"])
    put_tensors(folder, which, tensors | {name: change(tensors[name])})


def drop_tensor(folder, which, name):
    tensors = load_file(folder / files.read_config(folder)[which]["file"])
    del tensors[name]
    put_tensors(folder, which, tensors)


def put(row, number):
    def change(tensor):
        changed = tensor.clone()
        changed.view(-1)[row * (tensor.numel() // len(tensor))] = number
        return changed

    return change
