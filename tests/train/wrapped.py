"""Programs of several processes that compare ways of making a module parallel: with DistributedDataParallel, and spread
over processes."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visling import config as configs
from visling import runtime
from visling.recipes.tables import PRETRAINING
from visling.runs.pretrain import Pretraining
from visling.shards import complete, is_spread
from visling.train.averaging import WeightAverage
from visling.train.config import TrainConfig
from visling.train.optim import apply_schedule, build_optimizer, clip_gradients
from visling.train.parallel import Backward
from visling.train.wrapping import wrap

UPDATES = 20


class Uneven(nn.Module):
    """Parameters of which one is trained by the second process alone, one by nobody and one is a scalar; two modules
    share one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(3, 3), nn.Linear(3, 3)
        self.shared.weight = self.first.weight
        self.of_one, self.of_nobody = nn.Linear(3, 1, bias=False), nn.Linear(3, 1)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        states = self.gain * self.shared(torch.tanh(self.first(x)))
        loss: Tensor = (self.of_one(states) if runtime.rank() == 1 else states).square().mean()
        return loss


def gradients() -> None:
    """Gradients are means over processes, in each way."""
    device = torch.device("cpu")
    inputs = torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(1))  # process, micro-batch, row
    torch.manual_seed(2)
    start = Uneven().state_dict()
    alone = Uneven()
    alone.load_state_dict(start)
    for x in inputs[runtime.rank()]:
        alone(x).backward()
    expected: dict[str, Tensor | None] = {}
    for name, parameter in alone.named_parameters():
        held = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(held)
        expected[name] = None if name.startswith("of_nobody") else held / 2

    for shard in (False, True):
        module = Uneven()
        if runtime.is_main():  # the others have what the first sends them
            module.load_state_dict(start)
        names = list(dict(module.named_parameters()))
        wrapped = wrap(module, TrainConfig(shard=shard), device)
        for _ in range(3):  # messages are laid out anew after the first
            module.zero_grad(set_to_none=True)
            for number, x in enumerate(inputs[runtime.rank()]):
                with wrapped.micro_step(last=number == 1):
                    wrapped(x).backward()
            wrapped.finish()
        found = dict(module.named_parameters())
        assert {name for name in names if is_spread(found[name])} == (set(names) - {"gain"} if shard else set())
        for name in names:
            gradient, mean = found[name].grad, expected[name]
            assert (gradient is None) == (mean is None), (shard, name)
            if gradient is not None and mean is not None:
                torch.testing.assert_close(complete(gradient), mean, msg=f"{name}: {complete(gradient)} is not {mean}")
        with wrapped.whole():
            for _ in range(runtime.rank()):  # however often a process asks, nobody else is asked
                module(inputs[0, 0])
            torch.testing.assert_close(module.state_dict(), start, rtol=0, atol=0)
            assert module.first.weight is module.shared.weight
        assert is_spread(module.first.weight) is shard
        wrapped(inputs[0, 0])
    print("means")


@dataclass(frozen=True)
class Trained:
    """What a few updates lead to."""

    losses: list[float]
    weights: Mapping[str, Tensor]
    averages: Mapping[str, Tensor]
    scores: Mapping[str, float]


def train(world: Path, recipe: str, settings: list[str]) -> Trained:
    """Some updates of a recipe, in the world of the tests."""
    config = configs.override(PRETRAINING[recipe](), settings)
    run = Pretraining(
        config, data=[str(world / "scenes")], store=world / "regions", init=None, device="cpu", other_features=False,
        images=None, backbone=None,
    )  # fmt: skip
    runtime.seed_everything(3)
    training = run.build()
    if training.begin is not None:
        training.begin()
    device = torch.device("cpu")
    backward = Backward(training.model, training.step, config.train, device, training.variant, training.count)
    optimizer, schedule = build_optimizer(training.model, config.train.optim, 100, per_epoch=10)
    average = WeightAverage(training.model, 0.9)
    runtime.seed_everything(7 + runtime.rank())
    training.model.train()
    losses, pairs = [], _forever(training.batches)
    for update in range(UPDATES):
        apply_schedule(optimizer, schedule, update)
        items = [next(pairs) for _ in range(config.train.accumulation)]
        backward.begin(items)
        for number, item in enumerate(items, 1):
            losses.append(backward(item, last=number == len(items)).value.item())
        backward.finish()
        clip_gradients(optimizer, config.train.optim)
        optimizer.step()
        average.update()
        training.model.zero_grad(set_to_none=True)
        if training.after_update is not None:
            training.after_update()
    with backward.whole():
        weights = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
        training.model.eval()
        scores = training.validate()
        with average.in_place_of_model():
            averages = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    return Trained(losses, weights, averages, scores)


def _forever(batches: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        batches.epoch = epoch
        with contextlib.closing(iter(batches)) as pairs:
            yield from pairs
        epoch += 1


def family(world: str, recipe: str, tolerance: str, *settings: str) -> None:
    """A recipe spread over processes is trained as it is with the whole model in each."""
    whole, spread = (
        train(Path(world), recipe, [*settings, f"train.shard={shard}"]) for shard in ("false", "true")
    )  # fmt: skip
    for field in dataclasses.fields(Trained):
        found, expected = getattr(spread, field.name), getattr(whole, field.name)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=float(tolerance))
    if runtime.is_main():
        print("equal")


PROGRAMS: Mapping[str, Callable[..., None]] = {"gradients": gradients, "family": family}

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with runtime.process_group(int(sys.argv[1])):
        PROGRAMS[sys.argv[2]](*sys.argv[3:])
