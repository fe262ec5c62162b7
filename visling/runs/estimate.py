"""What a recipe costs: parameters, floating-point operations, memory, hours on a GPU; estimated without computing it.

How      One step of the recipe's own model is traced on tensors without memory, of the sizes that its data typically
         has (`runs/typical_batch.py`), and its matrix products and kept states are counted (`runs/count_products.py`).
         A region extractor sees pictures of 4:3 and as many regions as the model reads, plus the whole image.
Limits   Hours take a share of the GPU's peak rate (`UTILISATION`) as given, without reading data, validating and
         saving. Memory leaves out what the allocator loses and what kernels need for a moment. Images with fewer
         regions than the preset reads cost less than estimated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from visling import models
from visling.errors import ConfigError, nearest
from visling.nn.momentum import DependsOnValues
from visling.objectives.pretrain_model import PretrainModel
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.tables import PUBLISHED_PRETRAINING
from visling.runs.count_products import trace
from visling.runs.pretrain import untrained_model
from visling.runs.typical_batch import count_regions, scaled_picture, typical_batch, typical_sizes
from visling.runs.typical_task import count_examples as count_task_examples
from visling.runs.typical_task import count_regions as count_task_regions
from visling.runs.typical_task import typical_size, typical_task_batch, untrained_task
from visling.runs.validate import text_loss
from visling.tasks.base import load as load_task
from visling.tasks.base import names as task_names
from visling.train.optim import parameter_groups
from visling.types import Batch, Encoded, Loss, Targets
from visling.vision import end_to_end, vcr_network
from visling.vision.end_to_end import RegionExtractor
from visling.vision.resnet import feature_map
from visling.vision.vcr_network import VcrNetwork

UTILISATION = 0.4
"""Share of a GPU's peak rate that training reaches; assumed, not measured. Small batches and short texts reach less."""
WEIGHT = 4
"""Bytes of a weight, a gradient or a moment: float32."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak rates of dense matrix products, in TFLOP/s, and memory in GB, from the makers' data sheets."""

    bf16: float | None
    """Summed in float32; None where there are no such units."""
    fp16: float | None = None
    """Of GPUs without bf16; the published runs in half precision used it, no run here does."""
    tf32: float | None
    fp32: float
    """Without tensor cores, PyTorch's default for float32."""
    memory: int


GPUS: Mapping[str, Gpu] = {
    "A100": Gpu(bf16=312.0, tf32=156.0, fp32=19.5, memory=80),
    "H100": Gpu(bf16=989.0, tf32=494.0, fp32=67.0, memory=80),
    "H200": Gpu(bf16=989.0, tf32=494.0, fp32=67.0, memory=141),
    "L4": Gpu(bf16=121.0, tf32=60.0, fp32=30.3, memory=24),
    "RTX 4090": Gpu(bf16=165.2, tf32=82.6, fp32=82.6, memory=24),
    "RTX 3090": Gpu(bf16=71.0, tf32=35.6, fp32=35.6, memory=24),
    "V100": Gpu(bf16=None, fp16=125.0, tf32=None, fp32=15.7, memory=16),
    "T4": Gpu(bf16=None, fp16=65.0, tf32=None, fp32=8.1, memory=16),
}
DEFAULT_GPU = "A100"
"""The one whose hours are shown unless another is named."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    weights: int
    """All parameters, momentum copies and averages included."""
    gradients: int
    optimiser: int
    activations: int
    """What one batch keeps for its backward pass; in bf16 also the converted weights."""
    buffers: int
    """Queues of features."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.buffers


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run costs, as far as that can be estimated."""

    parameters: int
    """Of encoder, heads and region extractor, without momentum copies."""
    trained: int
    """Of these, those that the optimiser updates."""
    flops_per_update: int
    """Of matrix products, forward and backward, all micro-batches of an update."""
    updates: int | None
    """Of the whole run; None where the amount of data is not known."""
    memory: Memory
    assumed: Mapping[str, Any] = field(default_factory=dict)
    """Sizes that were assumed."""

    @property
    def flops(self) -> int | None:
        """Of the whole run."""
        return None if self.updates is None else self.updates * self.flops_per_update

    def hours(self, gpu: str) -> dict[str, float]:
        """Hours of the whole run on one GPU by precision of its matrix products; empty where the amount of data is not
        known.

        Raises:
            ConfigError: no such GPU.
        """
        rates = dataclasses.asdict(find_gpu(gpu))
        del rates["memory"]
        return (
            {}
            if self.flops is None
            else {name: self.flops / (rate * 1e12 * UTILISATION) / 3600 for name, rate in rates.items() if rate}
        )

    def described(self, gpus: tuple[str, ...] = tuple(GPUS)) -> dict[str, Any]:
        """The estimate in round numbers with their units."""
        memory = {**dataclasses.asdict(self.memory), "total": self.memory.total}
        fits = {name: self.memory.total <= find_gpu(name).memory * 1e9 for name in gpus}
        hours = {name: {precision: _round(value) for precision, value in self.hours(name).items()} for name in gpus}
        return {
            "note": (
                f"An estimate, not a measurement: matrix products alone, on one GPU at {UTILISATION:.0%} of its peak "
                "rate."
            ),
            "assumed": dict(self.assumed),
            "parameters": self.parameters,
            "trained parameters": self.trained,
            "TFLOP per update": _round(self.flops_per_update / 1e12),
            "updates": self.updates,
            "EFLOP": None if self.flops is None else _round(self.flops / 1e18),
            "GB": {name: _round(size / 1e9) for name, size in memory.items()},
            "fits": fits,
            "hours": {name: found for name, found in hours.items() if found},
        }


def find_gpu(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        ConfigError: no such GPU.
    """
    if name not in GPUS:
        raise ConfigError(f"no GPU {name!r} in the table. {nearest(name, GPUS)}")
    return GPUS[name]


def estimate(config: PretrainConfig | FinetuneConfig) -> Estimate:
    """What training by a config costs; of a fine-tuning whose task is of another package, its encoder alone."""
    with torch.device("meta"):
        traced_run = _prepare_pretraining(config) if isinstance(config, PretrainConfig) else _prepare_finetuning(config)
    model, optim = traced_run.model, config.train.optim
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # built on meta: CVLP copies networks, and fake tensors cannot be copied
        traced = trace(model, traced_run.step, traced_run.draw_batches(), precision=config.train.precision)
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moved = sum(p.numel() for group in parameter_groups(model, optim) for p in group["params"])
    everything = sum(p.numel() for p in model.parameters())
    followers = sum(
        p.numel() for name, p in model.named_parameters() if not p.requires_grad and not name.startswith("extractor.")
    )
    return Estimate(
        parameters=everything - followers,
        trained=moved,
        flops_per_update=traced.flops * config.train.accumulation,
        updates=updates(config),
        memory=Memory(
            weights=WEIGHT * (everything + (gradients if config.train.average is not None else 0)),
            gradients=WEIGHT * gradients,
            optimiser=WEIGHT * moved * (2 if optim.name != "sgd" else 1 if optim.momentum else 0),
            activations=traced.kept,
            buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        ),
        assumed={
            "examples per update": config.batch_size * config.train.accumulation,
            "tokens": traced_run.tokens,
            "regions": traced_run.regions,
            "examples per epoch": _count_examples(config),
            **({} if (picture := scaled_picture(config)) is None else {"picture": list(picture)}),
            "precision": "bf16" if config.train.precision == "auto" else config.train.precision,
        },
    )


@dataclass(frozen=True, kw_only=True)
class _TracedRun:
    """What is traced of a run."""

    model: nn.Module
    step: Callable[[Batch, Targets], Tensor]
    """Value to minimise."""
    draw_batches: Callable[[], list[tuple[Batch, Targets]]]
    """A batch of each of its corpora, or of its task."""
    tokens: Mapping[str, int]
    """Corpus or task -> assumed word pieces of a row."""
    regions: Mapping[str, int]
    """Corpus or task -> assumed regions of a row."""


def _prepare_pretraining(config: PretrainConfig) -> _TracedRun:
    config = _with_own_features(config)
    model = untrained_model(dataclasses.replace(config, encoder=_remove_attention_dropout(config.encoder)))
    for module in model.modules():
        if isinstance(module, DependsOnValues):
            module.use_typical_path()
    pool_everything(model.extractor)
    sizes = typical_sizes(config)
    return _TracedRun(
        model=model,
        step=functools.partial(loss_of, model),
        draw_batches=lambda: [typical_batch(config, size, config.batch_size) for size in sizes.values()],
        tokens={name: size.tokens for name, size in sizes.items()},
        regions={name: count_regions(config, size) for name, size in sizes.items()},
    )


def _prepare_finetuning(config: FinetuneConfig) -> _TracedRun:
    config = dataclasses.replace(config, encoder=_remove_attention_dropout(config.encoder))
    model: nn.Module
    if config.task in task_names():
        model, task = untrained_task(config)
        pool_everything(model.extractor)
    else:
        model, task = (
            models.build(config.model, config.encoder),
            load_task(config.task).configured(config.task_settings),
        )

    def step(batch: Batch, targets: Targets) -> Tensor:
        found = model(batch)
        return found.pooled.float().sum() if isinstance(found, Encoded) else task.loss(found, targets).value

    return _TracedRun(
        model=model,
        step=step,
        draw_batches=lambda: [typical_task_batch(config, task, config.batch_size)],
        tokens={config.task: typical_size(config).tokens},
        regions={config.task: count_task_regions(config, task)},
    )


def _with_own_features(config: PretrainConfig) -> PretrainConfig:
    """A recipe for features of any width predicts those that its encoder reads, as every store has one width."""
    if config.region_losses is None or not config.any_features:
        return config
    losses = dataclasses.replace(config.region_losses, feature_size=config.encoder.feature_size)
    return dataclasses.replace(config, region_losses=losses)


def updates(config: PretrainConfig | FinetuneConfig) -> int | None:
    """Updates of a whole run; None where neither the config nor a published run on the same data says how many."""
    examples = _count_examples(config)
    if config.train.max_steps is not None or config.train.seconds is not None or examples is None:
        return config.train.max_steps
    return examples // config.batch_size // config.train.accumulation * config.train.epochs


def _count_examples(config: PretrainConfig | FinetuneConfig) -> int | None:
    """Examples of an epoch of a published run, which ends with its first corpus; None for other runs."""
    if isinstance(config, FinetuneConfig):
        return count_task_examples(config)
    published = config.recipe in PUBLISHED_PRETRAINING
    return next(iter(typical_sizes(config).values())).examples if published else None


def _remove_attention_dropout(config: Any) -> Any:
    """The config without attention dropout, which the traced kernel lacks; it costs no product and, in fused kernels,
    no memory."""
    return dataclasses.replace(config, attention_dropout_rate=0.0)


def loss_of(model: PretrainModel, batch: Batch, targets: Targets) -> Tensor:
    """Loss of a batch; of text without images that of the masked words alone."""
    loss: Loss = text_loss(model, batch, targets) if batch.regions is None else model(batch, targets)
    return loss.value


def pool_everything(extractor: nn.Module | None) -> None:
    """Make a network that pools regions treat every one as real and lay the same grid over each: that needs no values,
    and the products are the same. Others, and None, stay as they are."""

    def pool(features: Tensor, mask: Tensor, side: int) -> Tensor:
        rows, regions = mask.shape
        grid = features.new_zeros(rows, regions * side, side, 2, dtype=torch.float32)
        places = functional.grid_sample(features.float(), grid, align_corners=False)  # (B, C, N * side, side)
        return torch.unflatten(places, 2, (regions, side)).transpose(1, 2).flatten(0, 1).to(features.dtype)

    def forward(images: Tensor, boxes: Tensor, mask: Tensor, instances: None, *, image: Tensor) -> Tensor:
        assert isinstance(extractor, RegionExtractor)
        maps: Tensor = extractor.head(pool(extractor.feature_map(images), mask, end_to_end.POOL_SIZE))
        return torch.unflatten(maps.mean((2, 3)), 0, tuple(mask.shape))

    def forward_with_objects(
        images: Tensor, boxes: Tensor, mask: Tensor, classes: Tensor, instances: Tensor, *, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(extractor, VcrNetwork)
        pooled = pool(feature_map(extractor.stem, extractor.stages, images), mask, vcr_network.POOL_SIZE)
        features, maps = extractor.project(pooled, classes.flatten(), instances.flatten(0, 1))
        return torch.unflatten(features, 0, tuple(mask.shape)), maps

    if isinstance(extractor, RegionExtractor):
        setattr(extractor, "forward", forward)  # noqa: B010  (mypy knows methods as fixed)
    elif isinstance(extractor, VcrNetwork):
        extractor.config = dataclasses.replace(extractor.config, class_weight=0.0)  # its product is negligible
        setattr(extractor, "forward", forward_with_objects)  # noqa: B010


def _round(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")
