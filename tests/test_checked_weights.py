"""Weight files that know their digest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from visling.checked_weights import read_checked, write_checked
from visling.errors import CheckpointError

TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "number": torch.tensor(7),
    "nothing": torch.empty(0, 3),
}


def test_every_type_comes_back_and_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    for number in range(8):
        write_checked(TENSORS, tmp_path / f"{number}.safetensors")
    found = read_checked(tmp_path / "0.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_every_flipped_byte_of_the_numbers_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    write_checked(TENSORS, file)
    content = file.read_bytes()
    numbers = sum(value.nbytes for value in TENSORS.values())
    for at in range(len(content) - numbers, len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=r"weights.safetensors is damaged.*Copy the file again"):
            read_checked(file)


def test_files_of_elsewhere_are_read_without_a_digest(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors", metadata={"format": "pt"})
    assert torch.equal(read_checked(tmp_path / "plain.safetensors")["a"], torch.ones(2))
