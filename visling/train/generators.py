"""The state of all random generators, captured and restored."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visling import runtime


def capture_generators() -> dict[str, Any]:
    """State of the Python, NumPy and torch generators, on every device, as JSON values."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}},
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in torch.cuda.get_rng_state_all()] if _cuda_in_use() else [],
    }


def restore_generators(generators: Mapping[str, Any]) -> None:
    """Put the generators back into the state that `capture_generators` returned; those of devices that this machine
    lacks are left out."""
    version, numbers, gauss = generators["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy = generators["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], dtype=np.uint32)}})
    torch.set_rng_state(_from_hex(generators["torch"]))
    if generators["cuda"] and torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), generators["cuda"], strict=False):
            torch.cuda.set_rng_state(_from_hex(state), device)


def seed_generators(*key: int) -> None:
    """Seed the generators of this process by numbers: the seed of a run, its step, and the rank of the process."""
    runtime.seed_everything(int(runtime.generator_for(*key).integers(2**32)))


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _to_hex(state: Tensor) -> str:
    return bytes(state.numpy().tobytes()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
