"""What a GPU asks of a step: that it waits for nothing, and that a compiler sees all of it. Checked on a CPU, on tiny
models of all families, with every published recipe's losses, optimiser and clipping."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from visling import models
from visling.data.batches.shapes import give_few_shapes
from visling.data.corpora.readers import find_reader
from visling.nn import attention, attention_kernels
from visling.objectives.pretrain_model import PretrainModel
from visling.objectives.region_contrast import RegionContrast
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.tables import PUBLISHED_FINETUNING, PUBLISHED_PRETRAINING
from visling.runs.estimate import loss_of
from visling.runs.pretrain import untrained_model
from visling.runs.typical_batch import typical_batch
from visling.runs.typical_task import typical_task_batch, untrained_task
from visling.train.optim import OptimConfig, apply_schedule, build_optimizer, clip_gradients
from visling.types import Batch, Slots, Targets

ROWS = 6
aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.unique_consecutive,
    aten.equal, aten.is_nonzero, aten.repeat_interleave,
}  # fmt: skip
"""Operations whose result the host needs before it can go on."""


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what would make the host wait for a GPU, or copy a constant to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, options = func.overloadpacket, kwargs or {}
        fixed = packet is aten.repeat_interleave and options.get("output_size") is not None
        assert packet not in WAITING or fixed, f"the host waits: {func}"
        assert packet not in (aten.lift_fresh, aten.lift_fresh_copy), "a constant is copied to the device"
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype not in (torch.bool, torch.uint8) for index in indices), f"the host counts: {func}"
        return func(*args, **options)


def test_the_guard_sees_what_waits() -> None:
    values = torch.arange(4.0)
    for work in (
        lambda: values.sum().item(),
        lambda: bool(values.any()),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: torch.unique_consecutive(values),
        lambda: values.clone().__setitem__(values > 1, 0.0),
        lambda: values + torch.tensor([1.0]),
        lambda: torch.repeat_interleave(values, torch.ones(4, dtype=torch.int64)),
    ):
        with pytest.raises(AssertionError, match=r"the host|a constant"), NoWaiting():  # type: ignore[no-untyped-call]
            work()
    with NoWaiting():  # type: ignore[no-untyped-call]
        values.masked_fill(values > 1, 0.0)[torch.zeros(2, dtype=torch.int64)].sum()


def ragged(batch: Batch, targets: Targets) -> tuple[Batch, Targets]:
    """The batch with texts and images of all lengths, one of a single region and one of none, in few shapes."""
    text, regions = batch.text, batch.regions
    tokens = text.ids.shape[1]
    length = torch.randint(3, tokens + 1, (len(text.ids), 1))
    mask = torch.arange(tokens) < length
    answer_at = None if text.answer_at is None else length[:, 0] - 2
    text = dataclasses.replace(text, ids=text.ids * mask, mask=mask, answer_at=answer_at)
    if regions is not None:
        count = torch.randint(2, regions.mask.shape[1] + 1, (len(regions.mask), 1))
        count[0], count[1] = 0, 1
        kept = torch.arange(regions.mask.shape[1]) < count
        regions = dataclasses.replace(regions, features=regions.features * kept[..., None], mask=kept)
    links = batch.links
    if links is not None and regions is not None:
        shown = regions.mask if regions.row is None else regions.mask[regions.row]
        links = links & mask[:, :, None] & shown[:, None, :]
    phrases = None if batch.phrases is None else among(batch.phrases, mask)
    changed: dict[str, Any] = {}
    for name in ("token_slots", "class_slots", "feature_slots"):
        slots, real = getattr(targets, name), mask if name == "token_slots" or regions is None else regions.mask
        changed[name] = None if slots is None else among(slots, real)
    if targets.phrase_boxes is not None and regions is not None:
        changed["phrase_boxes"] = targets.phrase_boxes * regions.mask[:, None]
    batch = dataclasses.replace(batch, text=text, regions=regions, links=links, phrases=phrases)
    return batch, dataclasses.replace(targets, **changed)


def among(slots: Slots, real: Tensor) -> Slots:
    """The slots at real positions."""
    return dataclasses.replace(slots, mask=slots.mask & real.gather(1, slots.at), at=slots.at)


@dataclasses.dataclass(frozen=True)
class Work:
    """A step of a recipe on a tiny model, ready to run."""

    model: nn.Module
    loss: Callable[[Batch, Targets], Tensor]
    exact: list[tuple[Batch, Targets]]
    """Padded to the longest row."""
    batches: list[tuple[Batch, Targets]]
    """The same in few shapes."""
    optim: OptimConfig


def tiny(config: Any, **changes: Any) -> Any:
    """A recipe with the tiny encoder of its family that keeps what else the recipe says of it."""
    encoder = models.spec(config.model).presets["tiny"]
    kept = {
        name: getattr(config.encoder, name)
        for name in ("answer_slot", "pair", "num_tasks", "region_order", "fusion", "masks_features", "bypass")
        if hasattr(encoder, name)
    }
    return dataclasses.replace(config, encoder=dataclasses.replace(encoder, **kept, **changes))


def pretraining(name: str) -> Work:
    torch.manual_seed(0)
    config: PretrainConfig = tiny(PUBLISHED_PRETRAINING[name](), max_regions=9)
    if config.region_losses is not None:
        losses = dataclasses.replace(config.region_losses, feature_size=config.encoder.feature_size, num_classes=7)
        config = dataclasses.replace(config, region_losses=losses)
    if "region_contrast" in config.objectives:
        settings = {**config.objective_settings["region_contrast"], "queue_size": 100, "max_regions": 9}
        config = dataclasses.replace(
            config, objective_settings={**config.objective_settings, "region_contrast": settings}
        )
    model = untrained_model(config).train()
    for objective in model.all_objectives():
        if isinstance(objective, RegionContrast):
            size = objective.queue.rows.shape
            objective.queue.push(F.normalize(torch.randn(size), dim=-1), torch.ones(size[0], dtype=torch.bool))
            assert objective.queue.full
    spec = models.spec(config.model).inputs(config.encoder)
    exact = [ragged(*typical_batch(config, find_reader(corpus.kind).typical, ROWS)) for corpus in config.corpora]
    batches = [give_few_shapes(*pair, spec) for pair in exact]
    return Work(model, functools.partial(loss_of, model), exact, batches, config.train.optim)


def finetuning(name: str) -> Work:
    torch.manual_seed(0)
    config: FinetuneConfig = tiny(PUBLISHED_FINETUNING[name](), max_regions=9)
    model, task = untrained_task(config)
    exact = ragged(*typical_task_batch(config, task, ROWS))
    pair = give_few_shapes(*exact, models.spec(config.model).inputs(config.encoder))
    return Work(
        model.train(),
        lambda batch, targets: task.loss(model(batch), targets).value,
        [exact],
        [pair],
        config.train.optim,
    )


def every() -> Iterator[Any]:
    """Published recipes whose regions have stored features."""
    for table, make in ((PUBLISHED_PRETRAINING, pretraining), (PUBLISHED_FINETUNING, finetuning)):
        for name, recipe in table.items():
            if recipe().extractor is None:
                yield pytest.param(name, make, id=f"{make.__name__}-{name}")


@pytest.mark.parametrize(("name", "make"), list(every()))
def test_a_step_never_waits_for_the_device(name: str, make: Callable[[str], Work]) -> None:
    work = make(name)
    optimizer, schedule = build_optimizer(work.model, work.optim, 100, per_epoch=10)
    for done in (20, 21):  # the first creates the moments
        apply_schedule(optimizer, schedule, done)
        with NoWaiting():  # type: ignore[no-untyped-call]
            loss = torch.stack([work.loss(batch, targets) for batch, targets in work.batches]).sum()
            torch.autograd.backward(loss)
            clip_gradients(optimizer, work.optim)
            optimizer.step()
            work.model.zero_grad(set_to_none=True)
            if isinstance(work.model, PretrainModel):
                work.model.after_update()
        assert loss.isfinite()


def count_everything(batch: Batch) -> Batch:
    """The batch with the largest counts that rounding can give."""

    def count(part: Any) -> Any:
        shared = None if part.row is None else len(part.row) * part.mask.shape[1]
        return dataclasses.replace(part, count=part.mask.numel(), shared=shared)

    regions = None if batch.regions is None else count(batch.regions)
    return dataclasses.replace(batch, text=count(batch.text), regions=regions)


@pytest.mark.parametrize("kernel", ["rows", "padded"])
@pytest.mark.parametrize(("name", "make"), list(every()))
def test_few_shapes_change_no_loss(
    name: str, make: Callable[[str], Work], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows count on real positions before what fills a packing up, as a GPU's kernel for rows of different length
    does."""
    chosen = attention_kernels.attend_by_row if kernel == "rows" else attention_kernels.attend_padded
    monkeypatch.setattr(attention, "choose_kernel", lambda *_, **__: chosen)
    work = make(name)
    work.model.eval()
    for exact, rounded in zip(work.exact, work.batches, strict=True):
        assert rounded[0].text.count is not None
        with torch.no_grad():
            expected = work.loss(*exact)
            assert_close(work.loss(*rounded), expected, atol=1e-4, rtol=1e-5)
            assert_close(work.loss(count_everything(rounded[0]), rounded[1]), expected, atol=1e-4, rtol=1e-5)


def lean(name: str, make: Callable[[str], Work], monkeypatch: pytest.MonkeyPatch) -> Work:
    """A step without dropout, whose draws a compiler orders in its own way, and with one layer of each kind."""
    spec = models.spec((PUBLISHED_PRETRAINING if make is pretraining else PUBLISHED_FINETUNING)[name]().model)
    preset = spec.presets["tiny"]
    zeros = {field.name: 0.0 for field in dataclasses.fields(preset) if field.name.endswith("dropout_rate")}
    layers = {
        field.name: 1
        for field in dataclasses.fields(preset)
        if field.name in ("num_layers", "num_text_layers", "num_region_layers", "num_cross_layers")
        and not hasattr(preset, "text_layers_before")
    }
    monkeypatch.setitem(spec.presets, "tiny", dataclasses.replace(preset, **zeros, **layers))
    work = make(name)
    for module in work.model.modules():
        if isinstance(module, nn.Dropout):  # of the heads
            module.p = 0.0
    return work


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("visualbert-coco", pretraining),
        pytest.param("vlbert-base-prec-without-text", pretraining, marks=pytest.mark.slow),
        pytest.param("vilbert-conceptual", pretraining, marks=pytest.mark.slow),
        ("lxmert-20epochs-qa", pretraining),
        pytest.param("visualbert-vqa", finetuning, marks=pytest.mark.slow),
        pytest.param("vlbert-base-vqa", finetuning, marks=pytest.mark.slow),
        pytest.param("vilbert-vqa", finetuning, marks=pytest.mark.slow),
        pytest.param("lxmert-vqa", finetuning, marks=pytest.mark.slow),
        pytest.param("cvlp-vqa", finetuning, marks=pytest.mark.slow),
    ],
)
def test_a_compiler_sees_a_whole_step(name: str, make: Callable[[str], Work], monkeypatch: pytest.MonkeyPatch) -> None:
    """Region contrast, of CVLP's pre-training, alone leaves parts of itself out."""
    work = lean(name, make, monkeypatch)
    compiled = torch.compile(work.loss, backend="aot_eager", fullgraph=True, dynamic=False)
    found = []
    for loss in (work.loss, compiled):
        work.model.zero_grad(set_to_none=True)
        value = torch.stack([loss(batch, targets) for batch, targets in work.batches]).sum()
        torch.autograd.backward(value)
        found.append((value.detach(), {key: p.grad for key, p in work.model.named_parameters() if p.grad is not None}))
    (expected, gradients), (value, others) = found
    assert_close(value, expected, atol=1e-5, rtol=1e-5)
    assert others.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert_close(others[key], gradient, atol=1e-4, rtol=1e-4, msg=f"the gradients of {key} differ")
