"""Region contrast: the streamed loss against the plain one, what is queued and when, what follows, what is saved, what
does not count."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from visling.errors import ConfigError
from visling.nn.momentum import MomentumCopy
from visling.objectives import region_contrast
from visling.objectives.base import PretrainStep
from visling.objectives.region_contrast import RegionContrast, contrast
from visling.train.optim import OptimConfig, parameter_groups
from visling.types import EVERYTHING, Batch, Dims, Encoded, Reads, Regions, Targets, Text

WIDTH, FEATURES, SIZE = 6, 5, 4
DIMS = Dims(text=WIDTH, regions=WIDTH, pooled=WIDTH)
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


class Toy(nn.Module):
    """Regions through one linear layer; the text shifts them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, WIDTH)
        self.projection = nn.Linear(FEATURES, WIDTH)

    def forward(self, batch: Batch, *, reads: Reads = EVERYTHING) -> Encoded:
        text = self.words(batch.text.ids)
        if batch.regions is None:
            regions = text[:, :0]
        else:
            regions = torch.tanh(self.projection(batch.regions.features)) + text.mean(1, keepdim=True)
        return Encoded(text=text, regions=regions, pooled=text[:, 0])


def batch_of(rows: int = 2, regions: int = 3, counts: tuple[int, ...] | None = None) -> tuple[Batch, Targets]:
    """Masked features in the batch, clean ones in the targets."""
    mask = torch.arange(regions) < torch.tensor(counts or (regions,) * rows)[:, None]
    clean = torch.randn(rows, regions, FEATURES)
    ids = torch.randint(0, 7, (rows, 4))
    batch = Batch(
        text=Text(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), segments=torch.zeros_like(ids)),
        regions=Regions(
            features=clean * (torch.rand(rows, regions, 1) > 0.5),
            boxes=torch.rand(rows, regions, 4),
            mask=mask,
            size=torch.ones(rows, 2),
        ),
    )
    return batch, Targets(region_features=clean)


def objective_of(encoder: nn.Module, **changes: Any) -> RegionContrast:
    settings: dict[str, Any] = {"projection_size": SIZE, "queue_size": 12, "momentum": 0.75, **changes}
    return RegionContrast(DIMS, "cvlp", nn.Embedding(7, WIDTH), encoder=encoder, **settings)


def step_of(encoder: nn.Module, batch: Batch, targets: Targets) -> PretrainStep:
    return PretrainStep(encoder, batch, encoder(batch), targets)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def plain(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float, clip: float | None) -> Tensor:
    """All scores at once, key first."""
    scores = torch.cat([(queries * keys).sum(-1, keepdim=True), queries @ negatives.T], dim=1) / temperature
    scores = scores if clip is None else clip * torch.tanh(scores / clip)
    return F.cross_entropy(scores, torch.zeros(len(queries), dtype=torch.int64), reduction="none")


@pytest.mark.parametrize("block", [1, 30, 300, 2**24])
@pytest.mark.parametrize(("temperature", "clip"), [(0.07, 10.0), (0.07, None), (0.001, None), (0.5, 2.0)])
def test_streamed_equals_plain_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, block: int, temperature: float, clip: float | None
) -> None:
    monkeypatch.setattr(region_contrast, "BLOCK", block)
    queries, keys, negatives = unit(30, SIZE), unit(30, SIZE), unit(101, SIZE)
    streamed, whole = queries.clone().requires_grad_(), queries.double().requires_grad_()
    weights = torch.rand(30)
    values, _ = contrast(streamed, keys, negatives, temperature=temperature, clip=clip)
    expected = plain(whole, keys.double(), negatives.double(), temperature, clip)
    assert_close(values, expected.float(), **CLOSE)
    torch.autograd.backward((values * weights).sum())
    torch.autograd.backward((expected * weights).sum())
    assert streamed.grad is not None
    assert whole.grad is not None
    assert_close(streamed.grad, whole.grad.float(), atol=1e-5 / temperature * 0.07, rtol=1e-4)


def test_hits_are_keys_that_score_above_all_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_contrast, "BLOCK", 60)
    queries, keys, negatives = unit(30, SIZE), unit(30, SIZE), unit(3, SIZE)
    _, hits = contrast(queries, keys, negatives, temperature=0.07, clip=10.0)
    expected = (queries * keys).sum(-1) > (queries @ negatives.T).amax(1)
    assert 0 < int(expected.sum()) < 30
    assert torch.equal(hits, expected)


def test_half_precision_queue_and_autocast_change_little() -> None:
    queries, keys, negatives = unit(30, SIZE), unit(30, SIZE), unit(101, SIZE)
    exact, _ = contrast(queries, keys, negatives, temperature=0.07, clip=10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unmoved, _ = contrast(queries, keys, negatives, temperature=0.07, clip=10.0)
        assert torch.equal(unmoved, exact)
    rough, _ = contrast(queries, keys, negatives.half(), temperature=0.07, clip=10.0)
    assert_close(rough, exact, atol=2e-2, rtol=0)
    assert not torch.equal(rough, exact)


def test_no_gradient_is_gathered_where_none_is_asked_for() -> None:
    queries, keys, negatives = unit(5, SIZE), unit(5, SIZE).requires_grad_(), unit(9, SIZE).requires_grad_()
    values, _ = contrast(queries, keys, negatives, temperature=0.07, clip=10.0)
    assert not values.requires_grad
    with torch.inference_mode():
        assert_close(contrast(queries, keys, negatives, temperature=0.07, clip=10.0)[0], values)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_scores_never_exist_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_contrast, "BLOCK", 4000)
    queries, keys, negatives = unit(100, SIZE).requires_grad_(), unit(100, SIZE), unit(900, SIZE)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        torch.autograd.backward(contrast(queries, keys, negatives, temperature=0.07, clip=10.0)[0].sum())
    assert largest.elements == 4000


_FULL_SIZE = """
import torch
from torch.nn import functional as F
from visling.objectives.region_contrast import contrast
from visling.train.memory import take_peak_memory
torch.set_num_threads(2)
queries = F.normalize(torch.randn(256 * 36, 128), dim=-1).requires_grad_()
keys = F.normalize(torch.randn(256 * 36, 128), dim=-1)
negatives = F.normalize(torch.randn(30 * 256 * 36, 128), dim=-1)
before = take_peak_memory(queries.device)
contrast(queries, keys, negatives, temperature=0.07, clip=10.0)[0].mean().backward()
assert queries.grad.isfinite().all()
print(before, take_peak_memory(queries.device))
"""


@pytest.mark.slow
def test_the_release_s_sizes_fit_in_two_gigabytes() -> None:
    """256 images of 36 regions against 276480 keys, forward and backward, torch itself included; one array of the plain
    loss takes 10 GB."""
    done = subprocess.run([sys.executable, "-c", _FULL_SIZE], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    assert peak < 2e9, f"peak {peak / 1e9:.2f} GB, of which {before / 1e9:.2f} GB before the loss"


def test_nothing_is_learnt_until_the_queue_is_full_and_then_from_earlier_batches_alone() -> None:
    encoder = Toy()
    objective = objective_of(encoder, queue_size=12).train()
    seen: list[Tensor] = []
    for number in range(4):
        batch, targets = batch_of()
        encoder.zero_grad()
        keys = objective.keys(batch, targets).flatten(0, 1)
        queued = objective.queue.rows.clone()
        step = step_of(encoder, batch, targets)
        loss = objective(step)
        torch.autograd.backward(loss.value)
        assert encoder.projection.weight.grad is not None
        if number < 2:  # 6 rows a batch
            assert loss.value.item() == 0
            assert not encoder.projection.weight.grad.any()
            assert {name: int(count) for name, (_, count) in loss.parts.items()} == {
                "region_contrast": 0,
                "region_contrast_accuracy": 0,
            }
        else:
            assert torch.equal(queued, torch.cat(seen[-2:]).roll(0 if number % 2 == 0 else 6, 0))
            queries = F.normalize(objective.head(step.encoded.regions), dim=-1).flatten(0, 1)
            assert_close(loss.value, plain(queries, keys, queued, 0.07, 10.0).mean(), **CLOSE)
            assert encoder.projection.weight.grad.any()
            assert int(loss.parts["region_contrast"][1]) == 6
        assert torch.equal(objective.queue.rows, queued)  # backward may still come
        objective.after_update()
        seen.append(keys)


def test_keys_come_from_clean_regions_by_the_key_network() -> None:
    encoder = Toy()
    objective = objective_of(encoder)
    batch, targets = batch_of()
    assert batch.regions is not None
    assert targets.region_features is not None
    with torch.no_grad():
        encoder.projection.weight.add_(1.0)  # the query network moves, the key network has not followed yet
        for parameter in objective.head.parameters():
            parameter.add_(1.0)
    clean = replace(batch, regions=replace(batch.regions, features=targets.region_features))
    key, head = objective.key.network, objective.key_head.network
    assert_close(objective.keys(batch, targets), F.normalize(head(key(clean).regions), dim=-1))
    keys = objective.keys(batch, targets)
    assert not keys.requires_grad
    assert_close(keys.norm(dim=-1), torch.ones(2, 3))


def test_both_networks_start_alike_and_the_keys_follow_after_the_update() -> None:
    encoder = Toy()
    objective = objective_of(encoder)
    for name, own in objective.key.network.named_parameters():
        assert torch.equal(own, encoder.get_parameter(name))
    head = {name: value.clone() for name, value in objective.head.named_parameters()}
    before = encoder.projection.weight.detach().clone()
    with torch.no_grad():
        encoder.projection.weight.add_(1.0)
        for value in objective.head.parameters():
            value.add_(2.0)
    objective.after_update()
    assert_close(objective.key.network.get_parameter("projection.weight"), before + 0.25)
    for name, own in objective.key_head.network.named_parameters():
        assert_close(own, head[name] + 0.5)


def test_the_key_network_may_start_from_another_model() -> None:
    encoder, other = Toy(), Toy()
    objective = objective_of(encoder, key_start="init", key_encoder=other)
    assert torch.equal(objective.key.network.projection.weight, other.projection.weight)
    assert other.projection.weight.requires_grad, "it is a copy"
    before = other.projection.weight.detach().clone()
    objective.after_update()
    followed = 0.75 * before + 0.25 * encoder.projection.weight
    assert_close(objective.key.network.projection.weight, followed.detach())
    assert torch.equal(objective_of(encoder, key_start="init").key.network.projection.weight, encoder.projection.weight)


def test_heads_start_alike_or_apart() -> None:
    alike, apart = objective_of(Toy()), objective_of(Toy(), independent_heads=True)
    weights = [(each.head.dense.weight, each.key_head.network.dense.weight) for each in (alike, apart)]
    assert torch.equal(*weights[0])
    assert not torch.equal(*weights[1])
    assert not weights[1][1].requires_grad
    apart.follow_head()
    assert torch.equal(*weights[1])


def test_padded_regions_are_neither_queued_nor_counted() -> None:
    encoder = Toy()
    objective = objective_of(encoder, queue_size=6).train()
    expected = []
    for _ in range(2):
        batch, targets = batch_of(counts=(2, 1))
        expected.append(objective.keys(batch, targets)[_mask(batch)])
        objective.fill((batch, targets))
    assert objective.queue.full
    assert torch.equal(objective.queue.rows, torch.cat(expected))
    batch, targets = batch_of(regions=3, counts=(3, 0))
    loss = objective(step_of(encoder, batch, targets))
    assert int(loss.parts["region_contrast"][1]) == 3
    queries, keys = F.normalize(objective.head(encoder(batch).regions), dim=-1), objective.keys(batch, targets)
    assert_close(
        loss.value, plain(queries[_mask(batch)], keys[_mask(batch)], torch.cat(expected), 0.07, 10.0).mean(), **CLOSE
    )
    torch.autograd.backward(loss.value)
    objective.after_update()
    assert torch.equal(objective.queue.rows, torch.cat([keys[0], expected[1]]))


def _mask(batch: Batch) -> Tensor:
    assert batch.regions is not None
    return batch.regions.mask


def _clean(targets: Targets) -> Tensor:
    assert targets.region_features is not None
    return targets.region_features


@pytest.mark.parametrize(("regions", "counts"), [(1, (1, 1)), (3, (0, 0)), (0, (0, 0)), (3, (3, 0))])
@pytest.mark.parametrize("full", [True, False])
def test_rows_of_one_region_and_of_none(regions: int, counts: tuple[int, ...], full: bool) -> None:
    encoder = Toy()
    objective = objective_of(encoder).train()
    if full:
        objective.fill(batch_of(rows=4))
    assert objective.queue.full == full
    batch, targets = batch_of(regions=regions, counts=counts)
    loss = objective(step_of(encoder, batch, targets))
    torch.autograd.backward(loss.value)
    objective.after_update()
    assert loss.value.isfinite()
    assert (loss.value.item() != 0) == (full and sum(counts) > 0)
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all()
        for parameter in [*encoder.parameters(), *objective.parameters()]
    )
    assert objective.queue.rows.isfinite().all()


def test_a_batch_without_regions_gives_nothing() -> None:
    encoder = Toy()
    objective = objective_of(encoder).train()
    objective.fill(batch_of(rows=4))
    batch, targets = batch_of()
    before = objective.queue.rows.clone()
    loss = objective(
        step_of(encoder, replace(batch, regions=None), replace(targets, region_features=torch.zeros(2, 0, FEATURES)))
    )
    torch.autograd.backward(loss.value)
    objective.after_update()
    assert loss.value.item() == 0
    assert torch.equal(objective.queue.rows, before)


def test_shared_region_rows_are_told_apart_for_the_keys() -> None:
    encoder = Toy()
    objective = objective_of(encoder)
    batch, targets = batch_of()
    assert batch.regions is not None
    row = torch.tensor([1, 0])
    shared = replace(batch, regions=replace(batch.regions, row=row))
    keys = objective.keys(shared, Targets(region_features=_clean(targets)[row]))
    assert_close(keys, objective.keys(batch, Targets(region_features=_clean(targets)[row])))


def test_evaluation_reads_the_queue_and_leaves_it() -> None:
    encoder = Toy()
    objective = objective_of(encoder)
    objective.fill(batch_of(rows=4))
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.eval()
    batch, targets = batch_of()
    with torch.inference_mode():
        first, second = (objective(step_of(encoder, batch, targets)) for _ in range(2))
    assert first.value.item() != 0
    assert torch.equal(first.value, second.value)
    objective.after_update()  # nothing waits; an unmoved encoder is followed nowhere
    for name, value in objective.state_dict().items():
        assert_close(value, before[name])


def test_accumulated_batches_all_join_the_queue_in_the_order_of_their_examples() -> None:
    encoder = Toy()
    objective, other = (objective_of(encoder) for _ in range(2))
    other.load_state_dict(objective.state_dict())
    pairs = [batch_of(), batch_of()]
    for pair in pairs:
        objective(step_of(encoder, *pair))
        assert not int(objective.queue.filled)
    other.fill(*pairs)
    keys = torch.stack([objective.keys(*pair) for pair in pairs], dim=1)  # example 0 of each, then example 1
    objective.after_update()
    assert objective.queue.full
    assert torch.equal(objective.queue.rows, keys.flatten(0, 2))
    assert torch.equal(objective.queue.rows, other.queue.rows)
    assert int(objective.pushed) == int(other.pushed) == 1


def test_the_key_network_is_saved_once_and_never_optimised() -> None:
    encoder = Toy()
    whole = nn.ModuleDict({"encoder": encoder, "contrast": objective_of(encoder)})
    pointers = [tensor.data_ptr() for tensor in whole.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    names = {name for group in parameter_groups(whole, OptimConfig()) for name in group["names"]}
    assert {name.split(".")[0] for name in names} == {"encoder", "contrast"}
    assert not any(".key" in name for name in names)
    assert sum(name.startswith("contrast.key.network.") for name in whole.state_dict()) == len(encoder.state_dict())


def test_saved_and_restored_it_goes_on_exactly() -> None:
    def trained(whole: nn.ModuleDict, pairs: list[tuple[Batch, Targets]]) -> list[float]:
        values, optimizer = [], torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.1)
        encoder, objective = whole["encoder"], whole["contrast"]
        assert isinstance(objective, RegionContrast)
        for pair in pairs:
            loss = objective(step_of(encoder, *pair))
            torch.autograd.backward(loss.value)
            optimizer.step()
            optimizer.zero_grad()
            objective.after_update()
            values.append(loss.value.item())
        return values

    def fresh() -> nn.ModuleDict:
        encoder = Toy()
        return nn.ModuleDict({"encoder": encoder, "contrast": objective_of(encoder)})

    pairs = [batch_of() for _ in range(7)]
    whole, twin = fresh(), fresh()
    trained(whole, pairs[:4])
    twin.load_state_dict(copy.deepcopy(whole.state_dict()))
    rest = trained(whole, pairs[4:])
    assert all(rest)
    assert trained(twin, pairs[4:]) == rest
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_network_may_say_what_follows_it() -> None:
    class Own(Toy):
        def momentum_copy(self, momentum: float) -> MomentumCopy:
            return MomentumCopy(
                nn.Sequential(copy.deepcopy(self)), momentum=momentum, source_name=lambda name: name.removeprefix("0.")
            )

    objective, encoder = objective_of(Own()), Own()
    assert isinstance(objective.key.network, nn.Sequential)
    assert isinstance(objective_of(Toy()).key.network, Toy)
    objective.key.update(encoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature and clip"),
        ({"clip": 0.0}, "clip = None"),
        ({"queue_size": 0}, "capacity of 0"),
        ({"key_start": "bert"}, "key_start must be query or init; found 'bert'"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective_of(Toy(), **changes)


def test_missing_clean_features_are_named() -> None:
    encoder = Toy()
    batch, _ = batch_of()
    with pytest.raises(ConfigError, match="needs the targets region_features"):
        objective_of(encoder)(step_of(encoder, batch, Targets()))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch.compile, where it hands states past the key pass
def test_a_compiled_step_equals_the_eager_one() -> None:
    encoder = Toy()
    objective = objective_of(encoder).train()
    objective.fill(batch_of(rows=4))
    batch, targets = batch_of()

    def step(batch: Batch, targets: Targets) -> Tensor:
        value: Tensor = objective(step_of(encoder, batch, targets)).value
        return value

    expected = step(batch, targets)
    compiled = torch.compile(step, backend="aot_eager")(batch, targets)
    assert_close(compiled, expected, **CLOSE)
    (gradient,) = torch.autograd.grad(compiled, encoder.projection.weight)
    assert_close(gradient, torch.autograd.grad(expected, encoder.projection.weight)[0], **CLOSE)
    assert len(objective._waiting) == 2


def test_keys_of_an_update_that_is_left_out_join_nothing() -> None:
    encoder = Toy()
    objective = objective_of(encoder, queue_size=8).train()
    batch, targets = batch_of()
    objective(step_of(encoder, batch, targets))
    key = [parameter.clone() for parameter in objective.key.parameters()]
    objective.after_skip()
    assert int(objective.queue.filled) == 0
    assert all(map(torch.equal, key, objective.key.parameters()))
    objective(step_of(encoder, batch, targets))
    objective.after_update()
    assert int(objective.queue.filled) == 6, "of the second update alone"


@pytest.fixture
def alone_in_a_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
def test_processes_pad_their_keys_to_one_size() -> None:
    objective = objective_of(Toy(), max_regions=4, queue_size=8)
    objective.fill(batch_of())
    assert int(objective.queue.filled) == 6
    with pytest.raises(ConfigError, match="5 regions an image, more than the 4 of region contrast"):
        objective.fill(batch_of(rows=1, regions=5))
