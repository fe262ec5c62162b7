"""Weight files that know their own digest: the header of the safetensors file holds the SHA-256 of its tensors, so that
a byte that flips on a disk or on the way is noticed when they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from visling.errors import CheckpointError

_KEY = "sha256"
"""Of the header's metadata; the only one, since safetensors writes several in any order."""


def write_checked(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file of contiguous tensors in main memory that share no storage."""
    save_file(dict(tensors), path, metadata={_KEY: _hash_tensors(tensors)})


def read_checked(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; one without a digest, from elsewhere, is read as it is.

    Raises:
        CheckpointError: the tensors are not those that were written.
        SafetensorError, OSError: it is truncated, of another format, or cannot be read.
    """
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        expected = (file.metadata() or {}).get(_KEY)
    if expected is not None and (found := _hash_tensors(tensors)) != expected:
        raise CheckpointError(
            f"{path} is damaged: its tensors have the SHA-256 {found[:16]}..., expected {expected[:16]}.... Copy the "
            "file again, or train the model again."
        )
    return tensors


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the order of the names."""
    hashed = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        hashed.update(value.detach().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
