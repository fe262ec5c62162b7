"""A run's state as complete tensors in main memory, by the names that the model itself gives them; and back into the
run, however its model is wrapped and by however many processes.

Weights are collected and handed out by torch's own functions, which know DistributedDataParallel and FSDP2. Those for
optimisers cannot hold ours exactly. A parameter has no state before its first gradient (an unused pooler, the head of a
task that is paused), and BertAdam places each parameter in the schedule by the number of its own updates. Torch first
makes every parameter have a state, by an update with gradients of zero, which counts; it then refuses a saved state
that lacks a parameter or, with `strict=False`, keeps what that update left: one update counted instead of none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from visling import runtime
from visling.shards import complete, fill, is_spread, local
from visling.train.averaging import WeightAverage
from visling.train.exchange import from_main
from visling.train.weights import detach_alone, find_ties

_K = TypeVar("_K")

_OF_THE_MODEL = ("params", "names", "positions")
"""Entries of a group of parameters that say which ones these are, not how they are trained."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What training changes, named as in the model; on the main process alone, empty on all others."""

    weights: dict[str, Tensor]
    """Each tied tensor once, under the first of its names."""
    ties: dict[str, str]
    """Name -> the first name, for the other names of tied tensors."""
    optimizer: dict[str, Any]
    """"state": parameter -> its state, for those that have any; "groups": settings of each group of parameters, with
    their names as "params"."""
    averages: dict[str, Tensor] | None
    """Averaged weights, of a run that averages them."""


def collect_state(
    model: nn.Module, optimizer: Optimizer, average: WeightAverage | None = None, *, copied: bool = False
) -> Snapshot:
    """The state of a run. Every process must call it.

    Args:
        copied: whether the tensors must stay as they are while training continues; on a CPU they are otherwise those
            that it trains.
    """
    main, ties = runtime.is_main(), find_ties(model)
    live, torch_state = model.state_dict(keep_vars=True), _import_torch_state()
    options = torch_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = torch_state.get_model_state_dict(model, options=options)
    weights = {name: _keep(tensor, live[name], copied) for name, tensor in whole.items() if name not in ties}
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Sharded tensors are completed by all processes, in one order
            entries = {key: _complete(value, copied) for key, value in optimizer.state.get(parameter, {}).items()}
            if entries and main:
                state[names[parameter]] = entries
        settings = {key: value for key, value in group.items() if key not in _OF_THE_MODEL}
        groups.append({**settings, "params": [names[parameter] for parameter in group["params"]]})
    averages = None
    if average is not None:
        averages = {name: _complete(value, copied) for name, value in average.state_dict().items()}
    if not main:
        return Snapshot(weights={}, ties={}, optimizer={}, averages=None)
    return Snapshot(weights=weights, ties=ties, optimizer={"state": state, "groups": groups}, averages=averages)


def apply_state(
    snapshot: Snapshot, model: nn.Module, optimizer: Optimizer, average: WeightAverage | None = None
) -> None:
    """Give a run the state that the main process holds; its tensors may become those of the run. Every process must
    call it.

    Raises:
        RuntimeError, ValueError, KeyError: it is the state of another model or optimiser.
    """
    weights = {**snapshot.weights, **{name: snapshot.weights[first] for name, first in snapshot.ties.items()}}
    torch_state, several = _import_torch_state(), runtime.world_size() > 1
    options = torch_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    torch_state.set_model_state_dict(model, weights, options=options)
    _apply_optimizer(snapshot.optimizer, model, optimizer)
    if average is not None:
        own = average.state_dict()
        average.load_state_dict(_hand_out(snapshot.averages or {}, own.__getitem__))


def _apply_optimizer(saved: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {frozenset(group["params"]): group for group in from_main(saved.get("groups", []))}
    numbers: dict[str, int] = {}
    packed = []
    for group in optimizer.param_groups:
        members = [names[parameter] for parameter in group["params"]]
        if frozenset(members) not in groups:
            raise ValueError(f"no group of the saved optimiser has the parameters {', '.join(members[:3])}, ...")
        numbers.update({name: len(numbers) + at for at, name in enumerate(members)})
        packed.append({**group, **groups[frozenset(members)], "params": [numbers[name] for name in members]})
    parameters = dict(model.named_parameters())
    flat = {(name, key): value for name, entries in saved.get("state", {}).items() for key, value in entries.items()}
    state: dict[int, dict[str, Any]] = {}
    for (name, key), value in _hand_out(flat, lambda at: parameters[at[0]]).items():
        state.setdefault(numbers[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": packed})


def _import_torch_state() -> Any:
    """Torch's functions for states, imported by those that train: with DTensor it takes half a second."""
    return importlib.import_module("torch.distributed.checkpoint.state_dict")


def _complete(value: Any, copied: bool) -> Any:
    """A value of which other processes may hold parts; main memory of other processes than the main one is spared."""
    if not isinstance(value, Tensor):
        return value
    whole = complete(value)
    return _keep(whole, value, copied) if runtime.is_main() else whole


def _keep(whole: Tensor, source: Tensor, copied: bool) -> Tensor:
    """A complete tensor in main memory; if `copied`, not in the memory of its source."""
    kept = detach_alone(whole)
    shared = kept.untyped_storage().data_ptr() == local(source).untyped_storage().data_ptr()
    return kept.clone() if copied and shared else kept


@dataclass(frozen=True)
class _Announced:
    """A tensor that the main process is about to send."""

    shape: torch.Size
    dtype: torch.dtype


def _hand_out(values: Mapping[_K, Any], find_like: Callable[[_K], Tensor]) -> dict[_K, Any]:
    """The main process's values on every process; tensors on the device of the one that `find_like` names, and sharded
    as that is if they have its shape."""
    announced = from_main(
        {
            key: _Announced(value.shape, value.dtype) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
    )
    received = {}
    for key, value in announced.items():
        if isinstance(value, _Announced):
            value = _receive(values.get(key), value, find_like(key))
        received[key] = value
    return received


def _receive(own: Tensor | None, announced: _Announced, like: Tensor) -> Tensor:
    if own is None:
        whole = torch.empty(announced.shape, dtype=announced.dtype, device=like.device)
    else:
        whole = own.to(like.device)
    if runtime.world_size() > 1:
        dist.broadcast(whole, src=0)
    if whole.shape != like.shape:
        return whole
    # Laid out in memory as its parameter is: fused kernels walk through both without looking at strides
    placed = torch.empty_like(like, dtype=whole.dtype)
    if is_spread(like):
        fill(placed, whole)
    else:
        placed.copy_(whole)
    return placed
