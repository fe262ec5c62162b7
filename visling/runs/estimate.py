"""What a recipe costs: parameters, floating-point operations, memory, hours on a GPU. Estimates, made without computing
anything.

How      One step of the recipe's own model is traced on tensors without memory, of the sizes that its data typically
         has (`typical` of its corpora's readers, `TASKS`). Every matrix product that is called is counted, with two operations for each multiplication and addition; everything else is
         left out. What autograd keeps for the backward pass is added up. Attention is counted as the fused kernels do
         it, which keep no probabilities; the products that they make again in the backward pass do not count.
         A region extractor sees pictures of 4:3 and as many regions, each image's whole among them.
Limits   Hours take a share of the GPU's peak rate (`UTILISATION`) as given; reading data, validation and saving are left out. Memory leaves out what
         the allocator loses and what kernels need for a moment. Images with fewer regions than the preset reads cost
         less than is said here.
Letters  B rows, T tokens, R regions, F feature width, P slots, C classes, H and W height and width of a picture.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from visling import models
from visling.data.batches.slots import SLOT_MULTIPLE
from visling.data.corpora.base import Typical
from visling.data.corpora.readers import find_reader
from visling.errors import ConfigError, nearest
from visling.models.cvlp import KeyNetwork
from visling.objectives.base import PretrainStep
from visling.objectives.image_qa import NUM_ANSWERS
from visling.objectives.pretrain_model import PretrainModel
from visling.objectives.region_contrast import RegionContrast
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.tables import PUBLISHED_FINETUNING, PUBLISHED_PRETRAINING
from visling.runs import pretrain as pretraining
from visling.train.optim import parameter_groups
from visling.types import Batch, InputSpec, Loss, Pixels, Regions, Slots, Targets, Text
from visling.vision.end_to_end import POOL_SIZE, RegionExtractor, fitted_size

UTILISATION = 0.4
"""Share of a GPU's peak rate that training reaches; assumed, not measured. Small batches and short texts reach less."""
WEIGHT, MOMENTS = 4, 8
"""Bytes of a weight or a gradient, and of both moments of Adam: float32."""
PICTURE = (640, 480)
"""Width and height of a typical picture before it is scaled; batches are padded to their largest, which is not
counted."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak rates of dense matrix products, in TFLOP/s, and memory in GB, from the makers' data sheets."""

    bf16: float | None
    """With float32 sums; None where there are no such units."""
    fp16: float | None = None
    """Of those without bf16: what the published runs in half precision had. Nothing here trains in it."""
    tf32: float | None
    fp32: float
    """Without tensor cores, which is what PyTorch takes for float32 unless told otherwise."""
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
"""For which hours are told unless another one is named."""


UNKNOWN = Typical()
"""Of tasks that no published run learns."""
TASKS: Mapping[str, Typical] = {
    "vqa": Typical(tokens=10, examples=658_111),
    "nlvr2": Typical(tokens=22, examples=86_373, images=2),
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    weights: int
    """Everything that is a parameter, slowly following copies included."""
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
    """What a run costs, as far as it can be told beforehand."""

    parameters: int
    """Of encoder, heads and region extractor, without slowly following copies."""
    trained: int
    """Of these, moved by the optimiser."""
    flops_per_update: int
    """Of matrix products, forward and backward, all micro-batches of an update."""
    updates: int | None
    """Of the whole run; None where the amount of data is not known."""
    memory: Memory
    assumed: Mapping[str, Any] = field(default_factory=dict)
    """Sizes that were taken for granted."""

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
            "note": f"An estimate, not a measurement: matrix products alone, on one GPU at {UTILISATION:.0%} of its peak rate.",
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


def estimate(run: PretrainConfig | FinetuneConfig) -> Estimate:
    """What a recipe costs as it stands; a fine-tuning run without its head."""
    run = _with_own_features(run)
    sizes = _sizes(run)
    with torch.device("meta"):
        model, step = _pretraining(run) if isinstance(run, PretrainConfig) else _encoder_alone(run)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(
            device="cpu"
        )  # built elsewhere: CVLP copies networks, which tensors without memory do not survive
        batches = [typical_batch(run, size, run.batch_size) for size in sizes.values()]
        traced = trace(model, step, batches, precision=run.train.precision)
    kept = [p for p in model.parameters() if p.requires_grad]
    moved = sum(p.numel() for group in parameter_groups(model, run.train.optim) for p in group["params"])
    everything = sum(p.numel() for p in model.parameters())
    followers = sum(
        p.numel() for name, p in model.named_parameters() if not p.requires_grad and not name.startswith("extractor.")
    )
    return Estimate(
        parameters=everything - followers,
        trained=moved,
        flops_per_update=traced.flops * run.train.accumulation,
        updates=updates(run),
        memory=Memory(
            weights=WEIGHT * everything,
            gradients=WEIGHT * sum(p.numel() for p in kept),
            optimiser=MOMENTS * moved,
            activations=traced.kept,
            buffers=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        ),
        assumed={
            "examples per update": run.batch_size * run.train.accumulation,
            "tokens": {name: size.tokens for name, size in sizes.items()},
            "regions": {name: _regions(run, size) for name, size in sizes.items()},
            "examples per epoch": _examples(run),
            **({} if (picture := _picture(run)) is None else {"picture": list(picture)}),
            "precision": "bf16" if run.train.precision == "auto" else run.train.precision,
        },
    )


def _with_own_features(run: PretrainConfig | FinetuneConfig) -> PretrainConfig | FinetuneConfig:
    """A recipe for features of any width predicts those that its encoder reads, as every store has one width."""
    if not isinstance(run, PretrainConfig) or run.region_losses is None or not run.any_features:
        return run
    losses = dataclasses.replace(run.region_losses, feature_size=run.encoder.feature_size)
    return dataclasses.replace(run, region_losses=losses)


def updates(run: PretrainConfig | FinetuneConfig) -> int | None:
    """Updates of a whole run; None where neither it nor a published run on its data says how many."""
    examples = _examples(run)
    if run.train.max_steps is not None or run.train.seconds is not None or examples is None:
        return run.train.max_steps
    return examples // run.batch_size // run.train.accumulation * run.train.epochs


def _examples(run: PretrainConfig | FinetuneConfig) -> int | None:
    """Examples of an epoch of a published run; its first corpus says when one ends."""
    published = run.recipe in (*PUBLISHED_PRETRAINING, *PUBLISHED_FINETUNING)
    return next(iter(_sizes(run).values())).examples if published else None


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One step, counted."""

    flops: int
    kept: int
    """Bytes of what the forward pass keeps for the backward pass, parameters apart."""


def trace(
    model: nn.Module,
    step: Callable[[Batch, Targets], Tensor],
    batches: list[tuple[Batch, Targets]],
    *,
    precision: str = "fp32",
) -> Traced:
    """Count forward and backward of one micro-step, which may hold several batches.

    Args:
        step: loss of a batch.
        precision: fp32, or bf16 (or auto) as autocast keeps it on a CPU.
    """
    own = {parameter.untyped_storage()._cdata for parameter in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (
                tensor,
                storage.nbytes(),
            )  # the tensor too: a freed storage's place may be taken by another one
        return tensor

    with MatrixProducts() as products:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"),
        ):
            loss = torch.stack([step(batch, targets) for batch, targets in batches]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return Traced(flops=products.flops, kept=sum(size for _, size in kept.values()))


class MatrixProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations of all matrix products that are called under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = _PRODUCTS.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args)
        return func(*args, **(kwargs or {}))


def _product(a: Tensor, b: Tensor, *_: Any) -> int:
    """(..., M, K) times (..., K, N)."""
    return 2 * a.numel() * b.shape[-1]


def _added_product(_: Tensor, a: Tensor, b: Tensor, *__: Any) -> int:
    return _product(a, b)


def _convolution(
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *_: Any,
) -> int:
    """(B, C, H, W) with (O, C / groups, K, L): each output sums over a window."""
    sides = zip(given.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    places = math.prod(
        (side + 2 * border - apart * (kernel - 1) - 1) // step + 1 for side, kernel, step, border, apart in sides
    )
    return 2 * len(given) * places * weight.numel()


def _convolution_backward(grad: Tensor, given: Tensor, weight: Tensor, *others: Any) -> int:
    """The forward product once for each of the gradients of input and weight that is asked for."""
    asked: list[bool] = others[-1]
    return sum(asked[:2]) * 2 * grad.numel() // grad.shape[1] * weight.numel()


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """(..., M, E) with (..., N, E), then with (..., N, V)."""
    return 2 * query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> int:
    return 2 * _attention(query, key, value)


_aten = torch.ops.aten
_PRODUCTS: Mapping[Any, Callable[..., int]] = {
    _aten.mm: _product,
    _aten.bmm: _product,
    _aten.addmm: _added_product,
    _aten.addmm_: _added_product,
    _aten.baddbmm: _added_product,
    _aten.convolution: _convolution,
    _aten.convolution_backward: _convolution_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def typical_batch(run: PretrainConfig | FinetuneConfig, size: Typical, rows: int) -> tuple[Batch, Targets]:
    """Random inputs and labels of the shapes that a run's typical examples have."""
    spec = models.spec(run.model).inputs(run.encoder)
    tokens, regions = min(size.tokens, spec.max_tokens), _regions(run, size)
    text = Text(
        ids=torch.randint(1, run.encoder.vocab_size, (rows, tokens)),
        mask=torch.ones(rows, tokens, dtype=torch.bool),
        segments=torch.zeros(rows, tokens, dtype=torch.int64),
        answer_at=torch.full((rows,), tokens - 2)
        if spec.answer_slot != "none" and isinstance(run, FinetuneConfig)
        else None,
        task=torch.zeros(rows, dtype=torch.int64) if spec.num_tasks else None,
    )
    if isinstance(run, FinetuneConfig):
        return Batch(text=text, regions=_random_regions(rows, regions, spec, images=size.images)), Targets()
    masking = run.region_masking
    hidden = masking.rate * masking.hide if masking is not None and masking.learned else 0.0
    shown, picture = (
        _random_regions(rows, regions, spec, images=size.images, hidden=hidden) if size.images else None,
        _picture(run),
    )
    pixels = None
    if shown is not None and picture is not None:
        wide, high = picture
        shown = dataclasses.replace(shown, features=shown.features[..., :0])
        pixels = Pixels(
            images=torch.randn(rows, 3, high, wide),
            size=torch.tensor([[high, wide]]).expand(rows, -1),
            row=torch.arange(rows),
        )
    batch = Batch(text=text, regions=shown, pixels=pixels)
    return batch, _random_targets(run, batch, regions)


def _picture(run: PretrainConfig | FinetuneConfig) -> tuple[int, int] | None:
    """Width and height of a typical picture as the run's extractor sees it; None where it has none."""
    extractor = getattr(run, "extractor", None)
    return None if extractor is None else fitted_size(*PICTURE, extractor.shorter_side, extractor.longer_side)


def _random_regions(rows: int, number: int, spec: InputSpec, *, images: int, hidden: float = 0.0) -> Regions:
    """Regions of (B) rows; a share of them `hidden`, if it is not 0."""
    corners = torch.rand(rows, number, 2) * 0.5
    return Regions(
        features=torch.rand(rows, number, spec.feature_size),
        boxes=torch.cat([corners, corners + 0.1 + torch.rand(rows, number, 2) * 0.4], dim=-1),
        mask=torch.ones(rows, number, dtype=torch.bool),
        size=torch.full((rows, 2), 500.0),
        hidden=torch.rand(rows, number) < hidden if hidden else None,
        image=(torch.arange(number) * images // number).expand(rows, -1) if images > 1 else None,
    )


def _random_targets(run: PretrainConfig, batch: Batch, regions: int) -> Targets:
    """Labels for every objective of the run; nothing about regions where the batch has none."""
    rows, tokens = batch.text.ids.shape
    words = _random_slots(rows, tokens, run.masking.rate)
    given: dict[str, Any] = {
        "token_slots": words,
        "token_ids": torch.randint(1, run.encoder.vocab_size, words.at.shape),
        "matched": torch.randint(0, 2, (rows,)),
    }
    if "image_qa" in run.objectives:
        given["answer"] = torch.randint(
            0, run.objective_settings.get("image_qa", {}).get("num_answers", NUM_ANSWERS), (rows,)
        )
    if batch.regions is None:
        return Targets(**given)
    losses, masking = run.region_losses, run.region_masking
    if "region_contrast" in run.objectives or losses is not None:
        given["region_features"] = batch.regions.features
    if losses is not None and masking is not None:
        labelled = _random_slots(rows, regions, 1.0 if masking.labels == "all" else masking.rate)
        shape = labelled.at.shape
        given |= {
            "class_slots": labelled,
            "feature_slots": _random_slots(rows, regions, masking.rate),
            "region_probs": torch.rand(*shape, losses.num_classes).softmax(-1)
            if losses.classes in ("kl", "cross_entropy")
            else None,
            "region_classes": torch.randint(0, losses.num_classes, shape),
            "region_weights": torch.rand(shape),
            "region_attributes": torch.randint(0, losses.num_attributes, shape),
            "attribute_weights": torch.rand(shape),
        }
    return Targets(**given)


def _random_slots(rows: int, length: int, rate: float) -> Slots:
    """As many slots as the row with most chosen positions has, about two standard deviations above the mean."""
    most = length * rate + 2 * math.sqrt(length * rate * (1 - rate))
    number = min(math.ceil(max(most, 1) / SLOT_MULTIPLE) * SLOT_MULTIPLE, length)
    return Slots(at=torch.rand(rows, length).argsort(1)[:, :number], mask=torch.ones(rows, number, dtype=torch.bool))


def _sizes(run: PretrainConfig | FinetuneConfig) -> dict[str, Typical]:
    if isinstance(run, FinetuneConfig):
        return {run.task: TASKS.get(run.task, UNKNOWN)}
    return {corpus.kind: find_reader(corpus.kind).typical for corpus in run.corpora}


def _regions(run: PretrainConfig | FinetuneConfig, size: Typical) -> int:
    """Regions of a row: as many as the preset reads."""
    spec = models.spec(run.model).inputs(run.encoder)
    if spec.joint_limit is not None and size.images:
        return min(spec.max_regions, spec.joint_limit - min(size.tokens, spec.max_tokens) - 1)  # the whole image counts
    return spec.max_regions * size.images


def _without_attention_dropout(config: Any) -> Any:
    """The kernel that is traced drops nothing; dropping costs no product and, in fused kernels, no memory."""
    return dataclasses.replace(config, attention_dropout_rate=0.0)


def _encoder_alone(run: FinetuneConfig) -> tuple[nn.Module, Callable[[Batch, Targets], Tensor]]:
    encoder = models.build(run.model, _without_attention_dropout(run.encoder))
    return encoder, lambda batch, _: encoder(batch).pooled.float().sum()


def _pretraining(run: PretrainConfig) -> tuple[nn.Module, Callable[[Batch, Targets], Tensor]]:
    model = pretraining.untrained_model(dataclasses.replace(run, encoder=_without_attention_dropout(run.encoder)))
    for objective in model.objectives.children():
        if isinstance(objective, RegionContrast):
            objective.queue._full = True  # asking it would need a value
            choose_half(objective.key.network)
    if isinstance(model.extractor, RegionExtractor):
        pool_everything(model.extractor)
    return model, functools.partial(loss_of, model)


def loss_of(model: PretrainModel, batch: Batch, targets: Targets) -> Tensor:
    """Loss of a batch; text without images teaches masked words alone."""
    if batch.regions is not None:
        loss: Loss = model(batch, targets)
    else:
        loss = model.objectives["masked_lm"](
            PretrainStep(model=model.encoder, batch=batch, encoded=model.encoder(batch), targets=targets)
        )
    return loss.value


def choose_half(network: nn.Module) -> None:
    """Let CVLP's key network leave out every other layer that it may leave out, as many as it does on average, without
    drawing."""
    if isinstance(network, KeyNetwork):
        chosen = [bool(number % 2) for number in range(len(network.pairs))]
        setattr(network, "forward", functools.partial(network.forward, chosen=chosen))  # noqa: B010  (mypy knows methods as fixed)


def pool_everything(extractor: RegionExtractor) -> None:
    """Let an extractor take every region for real and lay the same grid over each, which needs no values; the products
    are the same."""

    def forward(images: Tensor, boxes: Tensor, mask: Tensor, *, image: Tensor) -> Tensor:
        features = extractor.feature_map(images)
        rows, regions = mask.shape
        grid = features.new_zeros(rows, regions * POOL_SIZE, POOL_SIZE, 2, dtype=torch.float32)
        places = functional.grid_sample(features.float(), grid, align_corners=False)  # (B, C, N * 14, 14)
        pooled = torch.unflatten(places, 2, (regions, POOL_SIZE)).transpose(1, 2).flatten(0, 1)
        maps: Tensor = extractor.head(pooled.to(features.dtype))
        return torch.unflatten(maps.mean((2, 3)), 0, (rows, regions))

    setattr(extractor, "forward", forward)  # noqa: B010  (mypy knows methods as fixed)


def _round(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")
