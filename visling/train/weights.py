"""A module's weights as a safetensors file, which holds each tied tensor once."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from visling.checked_weights import write_checked


def save_weights(folder: Path, model: nn.Module) -> None:
    """Write a module's weights to model.safetensors in a folder, each tied tensor once."""
    ties = find_ties(model)
    kept = {name: detach_alone(tensor) for name, tensor in model.state_dict().items() if name not in ties}
    write_checked(kept, folder / "model.safetensors")


def find_ties(model: nn.Module) -> dict[str, str]:
    """Name -> first name of the same tensor, for every further name that a tensor has in a module's state."""
    first: dict[int, str] = {}
    named = model.state_dict(keep_vars=True)  # the module's own objects: shards have no address to compare
    return {name: kept for name, tensor in named.items() if (kept := first.setdefault(id(tensor), name)) != name}


def detach_alone(tensor: Tensor) -> Tensor:
    """A complete tensor in main memory that shares no larger storage: safetensors refuses those that do."""
    value = tensor.detach().cpu().contiguous()
    alone = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if alone else value.clone()
