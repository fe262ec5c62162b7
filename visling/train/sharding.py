"""Parameters, gradients and moments spread over processes: PyTorch's fully sharded data parallelism (FSDP2).

Groups   The parameters of a group arrive together, by one message, just before they are needed. Each layer of the
         streams is a group, gone again after its forward and after its backward; everything else is the group of the
         whole step, which stays from the beginning of forward to the end of backward: embeddings, heads, momentum
         copies, whatever a step reads outside a layer's own call.
Order    All processes must ask for the groups in one order. So a layer is no group if a process may leave it out: the
         last of LXMERT's cross-modality layers, of which only what is read is computed, and those of CVLP's key
         network, which are skipped at random.
Numbers  Each process computes with the values that it would have without sharding; sums over processes are those of
         DistributedDataParallel up to rounding.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from visling import runtime
from visling.errors import ConfigError
from visling.nn.coattention import CoAttentionLayer, CrossModalityLayer, GatedLayer
from visling.nn.layers import TransformerLayer
from visling.nn.momentum import MomentumCopy
from visling.shards import complete

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")
"""Where FSDP2 attaches what it does around `forward` and `state_dict`."""


class Sharded:
    """A module whose parameters are spread over all processes; see `wrapping.Wrapped`.

    Gradients are sent after every micro-batch, not once per update as DistributedDataParallel does: kept back, they
    would need the memory that sharding saves.

    Args:
        unused: some parameters receive no gradient in some steps, perhaps on some processes only.
    Raises:
        ConfigError: this PyTorch cannot do it.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, unused: bool) -> None:
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ConfigError(
                f"train.shard needs PyTorch 2.13 or newer, whose processes may train different parameters in a step; "
                f"found {torch.__version__}. Update it, or use train.shard=false."
            )
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        self._module = module
        self._scalars = [parameter for parameter in module.parameters() if parameter.dim() == 0]
        """They cannot be cut into pieces; every process has them."""
        mesh, alone = init_device_mesh(device.type, (runtime.world_size(),)), set(self._scalars)
        for layer in find_layers(module):
            fully_shard(layer, mesh=mesh, ignored_params=alone)
        fully_shard(module, mesh=mesh, ignored_params=alone)
        self._parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self._unused = unused
        self._received: set[str] = set()
        """Names of the parameters that received a gradient in this update, on this process."""
        self._control = dist.new_group(backend="gloo") if device.type == "cuda" else None
        if unused:
            for part in self._parts:
                part.set_reduce_scatter_unused_params(True)
            self._watch_gradients()

    def __call__(self, *item: Any) -> Any:
        return self._module(*item)

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Average the gradients of scalars, and drop those that no process has: FSDP2 counts a missing one as zero, by
        which an optimiser would still decay the weight."""
        self._average_scalars()
        if not self._unused:
            return
        trained = [(name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad]
        received = torch.tensor([int(name in self._received) for name, _ in trained])
        self._received.clear()
        dist.all_reduce(received, group=self._control)  # on the host: no device is waited for
        for (_, parameter), owners in zip(trained, received.tolist(), strict=True):
            if not owners:
                parameter.grad = None

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """The module as if it had never been sharded: complete parameters in the places of the spread ones, and nothing
        attached to `forward` and `state_dict`. What is written into the parameters is lost at the end."""
        with contextlib.ExitStack() as stack:
            copies: dict[nn.Parameter, nn.Parameter] = {}
            for part in self._module.modules():
                for kind in _HOOKS:
                    stack.enter_context(_without_own_hooks(getattr(part, kind)))
                for name, parameter in part._parameters.items():
                    if parameter is not None:
                        if parameter not in copies:
                            copies[parameter] = _complete_copy(parameter)
                        part._parameters[name] = copies[parameter]
                        stack.callback(part._parameters.__setitem__, name, parameter)
            yield

    def _watch_gradients(self) -> None:
        """Note which parameters receive a gradient. Those in use are not those that are spread, but the same at each
        step: what a group becomes once it has arrived."""
        for part in self._parts:
            part.unshard()
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                note = functools.partial(self._note_gradient, name)
                parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
        for part in self._parts:
            part.reshard()

    def _note_gradient(self, name: str, _: Tensor) -> None:
        self._received.add(name)

    def _average_scalars(self) -> None:
        trained = [parameter for parameter in self._scalars if parameter.requires_grad]
        if not trained:
            return
        means = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in trained])
        dist.all_reduce(means)
        for parameter, mean in zip(trained, (means / runtime.world_size()).unbind(), strict=True):
            parameter.grad = mean.clone()


def find_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model that every process runs in every step, and whose parameters are read in their own call
    alone."""
    if isinstance(module, MomentumCopy):
        return
    if isinstance(module, (TransformerLayer, GatedLayer, CoAttentionLayer)):
        yield module
        return
    children = list(module.children())
    if isinstance(module, nn.ModuleList) and children and isinstance(children[-1], CrossModalityLayer):
        yield from children[:-1]
        return
    for child in children:
        yield from find_layers(child)


def _complete_copy(parameter: nn.Parameter) -> nn.Parameter:
    with torch.no_grad():
        return nn.Parameter(complete(parameter), requires_grad=parameter.requires_grad)


@contextlib.contextmanager
def _without_own_hooks(hooks: OrderedDict[int, Any]) -> Iterator[None]:
    """Take FSDP2's hooks out of a module's, and put all back in their order."""
    before = OrderedDict(hooks)
    for key, hook in before.items():
        if hook.__module__.startswith("torch.distributed."):
            del hooks[key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)
