"""No matrix product is computed for padding or for a state that nobody reads: the operations of every family and mode,
counted while it runs, against those computed from lengths and settings.

Letters  B batch rows, U text rows, S region rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visling import models
from visling.data.annotations.retrieval import RetrievalRecord
from visling.data.batches.slots import SLOT_MULTIPLE, slots_of_grid
from visling.models.base import Encoder
from visling.models.task_model import TaskModel
from visling.nn import attention_kernels
from visling.nn.momentum import DependsOnValues
from visling.objectives.pretrain_model import PretrainModel
from visling.recipes.configs import PretrainConfig
from visling.recipes.cvlp import cvlp_paper
from visling.recipes.lxmert import lxmert_20epochs_qa
from visling.recipes.vilbert import vilbert_conceptual
from visling.recipes.vilbert_baseline import baseline_conceptual
from visling.recipes.visualbert import visualbert_coco
from visling.recipes.vlbert import vlbert_base_prec_without_text
from visling.runs.count_products import MatrixProducts
from visling.runs.inputs import Inputs
from visling.runs.layer_products import Needed, Products
from visling.runs.needed_products import (
    Reading,
    are_known,
    encoder_products,
    pretraining_products,
    task_products,
)
from visling.runs.pretrain import untrained_model
from visling.runs.retrieve import score_pairs
from visling.runs.validate import text_loss
from visling.tasks.retrieval import Retrieval
from visling.types import IGNORE, Batch, Encoded, Head, RegionArray, Regions, Targets, Text

FAMILIES = (*models.names(), "vilbert-baseline")
TOKENS, REGIONS = 7, 9
BESIDE_REGIONS = {"vilbert-baseline": 1, "vlbert": 2}
"""The whole image; and [END], whose state is computed in the last layer only where all are."""
TOLERANCE = 1.02
"""Slots are rounded up to a few more than are chosen."""
RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "visualbert": visualbert_coco,
    "lxmert": lxmert_20epochs_qa,
    "cvlp": cvlp_paper,
    "vlbert": vlbert_base_prec_without_text,
    "vilbert": vilbert_conceptual,
    "vilbert-baseline": baseline_conceptual,
}
CLASSES, ATTRIBUTES, ANSWERS, QUEUE = 20, 10, 30, 64


@pytest.fixture(params=["rows", "padded"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Attention row by row, as it is computed at base size, or over padded rows, as in tiny models."""
    name: str = request.param
    monkeypatch.setattr(attention_kernels, "WORK_OF_A_ROW", 0 if name == "rows" else 2**60)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # of one thread the work decides alone
    return name


def tiny_config(name: str) -> Any:
    """The tiny preset with a small vocabulary: else that head would outweigh the layers."""
    return dataclasses.replace(models.spec(name).presets["tiny"], vocabulary="scenes", vocab_size=318)


def build_tiny(name: str) -> Encoder:
    torch.manual_seed(0)
    return models.build(name, tiny_config(name))


def make_batch(
    config: Any,
    tokens: Sequence[int],
    regions: Sequence[int],
    *,
    text_row: Sequence[int] | None = None,
    region_row: Sequence[int] | None = None,
    group: int = 1,
) -> Batch:
    """Random rows of these lengths, padded to the longest.

    Args:
        tokens: (U); answers are read from the last token but one where the model has a slot for them.
        regions: (S).
        text_row, region_row: (B) rows that are shared; None = one to one.
    """
    corners = torch.rand(len(regions), max(regions), 2) * 0.5
    text_mask = torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]
    region_mask = torch.arange(max(regions)) < torch.tensor(regions)[:, None]
    return Batch(
        text=Text(
            ids=torch.randint(5, 300, text_mask.shape) * text_mask,
            mask=text_mask,
            segments=torch.zeros(text_mask.shape, dtype=torch.int64),
            answer_at=torch.tensor(tokens) - 2 if getattr(config, "answer_slot", "none") != "none" else None,
            row=None if text_row is None else torch.tensor(text_row),
        ),
        regions=Regions(
            features=torch.rand(*region_mask.shape, config.feature_size) * region_mask[..., None],
            boxes=torch.cat([corners, corners + 0.3], dim=-1),
            mask=region_mask,
            size=torch.full((len(regions), 2), 500.0),
            row=None if region_row is None else torch.tensor(region_row),
        ),
        group=group,
    )


def draw_lengths(rows: int, low: int, high: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(low, high, rows).tolist()
    return found


def everything(encoded: Encoded) -> Tensor:
    """A number into which all states enter."""
    states = [encoded.text, encoded.regions, encoded.pooled]
    states += [] if encoded.whole is None else [encoded.whole]
    return torch.stack([state.sum() for state in states]).sum()


def require_no_more(products: MatrixProducts, needed: Products, padded: Products | None) -> None:
    """Fail if more was counted than is needed.

    Args:
        padded: what is needed if padding is real and all of it read: attention over padded rows may compute that.
    """
    assert 0.5 * needed.linear < products.linear <= TOLERANCE * needed.linear
    allowed = needed.attention if padded is None else padded.attention
    assert 0.5 * needed.attention < products.attention <= TOLERANCE * allowed


def pad(name: str, config: Any, batch: Batch, kernel: str) -> Needed | None:
    """What everything of a batch needs if its padding is real; None where attention does not pad."""
    if kernel == "rows":
        return None
    regions, text = batch.regions, batch.text
    assert regions is not None
    real = dataclasses.replace(
        batch,
        text=dataclasses.replace(text, mask=torch.ones_like(text.mask)),
        regions=dataclasses.replace(regions, mask=torch.ones_like(regions.mask)),
    )
    rows = len(text.mask if text.row is None else text.row)
    shown = regions.mask.shape[1] + BESIDE_REGIONS.get(name, 0)
    return encoder_products(
        config, real, Reading(tokens=np.full(rows, text.mask.shape[1] - 1), regions=np.full(rows, shown))
    )


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_formulas_are_exact_where_nothing_can_be_spared(name: str, share: bool, kernel: str) -> None:
    encoder = build_tiny(name).train()
    config = dataclasses.replace(encoder.config, attention_dropout_rate=0.0)
    encoder = models.build(name, config)
    rows = [(text, image) for text in range(3) for image in range(2)]
    batch = make_batch(
        config, [TOKENS] * (3 if share else 6), [REGIONS] * (2 if share else 6),
        text_row=[text for text, _ in rows] if share else None,
        region_row=[image for _, image in rows] if share else None,
    )  # fmt: skip
    batch = dataclasses.replace(batch, text=dataclasses.replace(batch.text, answer_at=None))
    # The summary reads the first token, and in ViLBERT the whole image.
    reading = Reading(tokens=np.full(6, TOKENS - 1), regions=np.full(6, REGIONS + BESIDE_REGIONS.get(name, 0)))
    needed = encoder_products(config, batch, reading)
    with MatrixProducts() as products:
        loss = everything(encoder(batch))
        forward = products.linear, products.attention
        loss.backward()  # type: ignore[no-untyped-call]
    if kernel == "rows":
        assert forward == (needed.forward.linear, needed.forward.attention)
        assert (products.linear, products.attention) == (needed.step.linear, needed.step.attention)
    else:
        assert products.linear == needed.step.linear


def make_pretraining(name: str, rows: int, *, padded: bool = True) -> tuple[PretrainModel, Batch, Targets]:
    """A recipe's objectives on a tiny encoder, and a batch with labels for all of them.

    Args:
        padded: rows of different lengths, of which different numbers of positions are to be predicted.
    """
    run = RECIPES[name]()
    run = dataclasses.replace(run, encoder=tiny_config(name))
    losses = run.region_losses
    if losses is not None:
        losses = dataclasses.replace(
            losses, num_classes=CLASSES, num_attributes=ATTRIBUTES, feature_size=run.encoder.feature_size
        )
    settings = {"image_qa": {"num_answers": ANSWERS}, "region_contrast": {"queue_size": QUEUE, "projection_size": 8}}
    run = dataclasses.replace(
        run,
        region_losses=losses,
        objective_settings={objective: settings[objective] for objective in settings if objective in run.objectives},
    )
    torch.manual_seed(0)
    model = untrained_model(run).train()
    for module in model.modules():
        if isinstance(module, DependsOnValues):
            module.use_typical_path()
    tokens, regions = draw_lengths(rows, 5, 20, 0), draw_lengths(rows, 3, 30, 1)
    if not padded:  # nor free slots where every region is to be predicted
        tokens, regions = [TOKENS] * rows, [2 * SLOT_MULTIPLE] * rows
    batch = make_batch(run.encoder, tokens, regions)
    batch = dataclasses.replace(batch, text=dataclasses.replace(batch.text, answer_at=None))
    assert batch.regions is not None
    rng = np.random.default_rng(2)
    real, text = batch.regions.mask.numpy(), batch.text.mask.numpy().copy()
    text[:, 0] = False  # [CLS] is never hidden
    named, chosen = rng.random(text.shape) < 0.15, rng.random(real.shape) < 0.15
    if not padded:  # no free slot either
        named[:], chosen[:] = np.arange(text.shape[1]) <= SLOT_MULTIPLE, np.arange(real.shape[1]) < SLOT_MULTIPLE
    token_slots, chosen = slots_of_grid(text & named), real & chosen
    every = run.region_masking is not None and run.region_masking.labels == "all"
    class_slots, feature_slots = slots_of_grid(real if every else chosen), slots_of_grid(chosen)
    shape = class_slots.at.shape
    targets = Targets(
        token_slots=token_slots,
        token_ids=torch.randint(5, 300, token_slots.at.shape),
        class_slots=class_slots,
        feature_slots=feature_slots,
        region_probs=torch.rand(*shape, CLASSES).softmax(-1),
        region_classes=torch.randint(0, CLASSES, shape),
        region_attributes=torch.randint(0, ATTRIBUTES, shape),
        region_weights=torch.rand(shape),
        attribute_weights=torch.rand(shape),
        region_features=batch.regions.features,
        matched=torch.randint(0, 2, (rows,)),
        answer=torch.where(torch.rand(rows) < 0.5, torch.randint(0, ANSWERS, (rows,)), IGNORE),
    )
    return model, batch, targets


@pytest.mark.parametrize("name", FAMILIES)
def test_pretraining_computes_what_its_objectives_read(name: str, kernel: str) -> None:
    model, batch, targets = make_pretraining(name, 40)
    needed, padded = pretraining_products(model, batch, targets), pad(name, tiny_config(name), batch, kernel)
    with MatrixProducts() as products:
        model(batch, targets).value.backward()
    # CVLP's key network runs forward.
    require_no_more(products, needed.step, None if padded is None else padded.step + padded.forward)


@pytest.mark.parametrize("name", FAMILIES)
def test_pytorchs_own_counter_agrees_where_nothing_is_padded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "WORK_OF_A_ROW", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model, batch, targets = make_pretraining(name, 24, padded=False)
    with FlopCounterMode(display=False) as counter:
        model(batch, targets).value.backward()
    # It does not know `addmm_`, by which CVLP sums up gradients of its keys; and LXMERT's head transforms those regions
    # twice of which it predicts both the class and the feature.
    allowed = {"cvlp": 0.003, "lxmert": 0.006}.get(name, 0.0)
    assert pretraining_products(model, batch, targets).step.total == pytest.approx(
        counter.get_total_flops(), rel=allowed, abs=0
    )
    task, batch = make_task(name, CLASSIFY), make_batch(tiny_config(name), [TOKENS] * 24, [REGIONS] * 24)
    with FlopCounterMode(display=False) as counter:
        task.train()(batch)["only"].sum().backward()
    assert task_products(task, batch).step.total == counter.get_total_flops()


def test_text_without_images_needs_its_masked_words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As VL-BERT reads passages next to captions; the other objectives are not computed."""
    monkeypatch.setattr(attention_kernels, "WORK_OF_A_ROW", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model, batch, targets = make_pretraining("vlbert", 24)
    passages = dataclasses.replace(batch, regions=None)
    needed = pretraining_products(model, passages, targets, only=["masked_lm"]).step
    with FlopCounterMode(display=False) as counter:
        text_loss(model, passages, targets).value.backward()  # type: ignore[no-untyped-call]
    assert needed.total == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert needed.total < pretraining_products(model, batch, targets, only=["masked_lm"]).step.total


def test_an_objective_of_weight_zero_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "WORK_OF_A_ROW", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model, batch, targets = make_pretraining("lxmert", 24, padded=False)
    model.weights = {name: float(name != "masked_regions") for name in model.weights}
    with FlopCounterMode(display=False) as counter:
        model(batch, targets).value.backward()
    computed = [name for name, weight in model.weights.items() if weight]
    assert pretraining_products(model, batch, targets, only=computed).step.total == counter.get_total_flops()
    assert pretraining_products(model, batch, targets).step.total > counter.get_total_flops()


def test_what_is_known() -> None:
    """Models of our families, unless a network in front of them is trained too."""
    assert are_known(tiny_config("cvlp"))
    assert not are_known(tiny_config("cvlp"), torch.nn.Linear(1, 1))
    assert not are_known(object())


def make_task(name: str, head: Head, group: int = 1) -> TaskModel:
    return TaskModel(build_tiny(name), {"only": head}, models.head_styles(name), group=group)


CLASSIFY = Head(kind="classify", outputs=ANSWERS)


def five_questions(name: str) -> tuple[TaskModel, Batch]:
    """Five questions about each of four images."""
    model = make_task(name, CLASSIFY)
    row = [image for image in range(4) for _ in range(5)]
    return model, make_batch(
        model.encoder.config, draw_lengths(20, 5, 14, 0), draw_lengths(4, 3, 30, 1), region_row=row
    )


def vqa(name: str) -> tuple[TaskModel, Batch]:
    """Questions, each with an image of its own."""
    model = make_task(name, CLASSIFY)
    return model, make_batch(model.encoder.config, draw_lengths(20, 5, 14, 0), draw_lengths(20, 3, 30, 1))


def nlvr2(name: str) -> tuple[TaskModel, Batch]:
    """A sentence about two images: two rows that share it, or one row with the regions of both."""
    if models.spec(name).inputs(tiny_config(name)).pair == "sequence":
        model = make_task(name, Head(kind="pair", outputs=2))
        batch = make_batch(model.encoder.config, draw_lengths(10, 8, 24, 0), draw_lengths(10, 8, 36, 1))
        assert batch.regions is not None
        image = torch.arange(batch.regions.mask.shape[1]).expand_as(batch.regions.mask) % 2
        return model, dataclasses.replace(batch, regions=dataclasses.replace(batch.regions, image=image))
    model = make_task(name, Head(kind="pair", outputs=2), group=2)
    row = [text for text in range(10) for _ in range(2)]
    return model, make_batch(
        model.encoder.config, draw_lengths(10, 8, 24, 0), draw_lengths(20, 3, 30, 1), text_row=row, group=2
    )


def vcr(name: str) -> tuple[TaskModel, Batch]:
    """Four choices about an image."""
    model = make_task(name, Head(kind="score", outputs=1), group=4)
    row = [image for image in range(6) for _ in range(4)]
    return model, make_batch(
        model.encoder.config, draw_lengths(24, 8, 40, 0), draw_lengths(6, 3, 30, 1), region_row=row, group=4
    )


@pytest.mark.parametrize("mode", [vqa, nlvr2, vcr])
@pytest.mark.parametrize("name", FAMILIES)
def test_fine_tuning_computes_what_its_head_reads(
    name: str, mode: Callable[[str], tuple[TaskModel, Batch]], kernel: str
) -> None:
    model, batch = mode(name)
    needed, padded = task_products(model.train(), batch), pad(name, model.encoder.config, batch, kernel)
    with MatrixProducts() as products:
        model(batch)["only"].sum().backward()
    require_no_more(products, needed.step, None if padded is None else padded.step)


@pytest.mark.parametrize("mode", [vqa, five_questions, nlvr2, vcr])
@pytest.mark.parametrize("name", FAMILIES)
def test_inference_computes_what_rows_share_once(
    name: str, mode: Callable[[str], tuple[TaskModel, Batch]], kernel: str
) -> None:
    model, batch = mode(name)
    needed, padded = task_products(model.eval(), batch), pad(name, model.encoder.config, batch, kernel)
    with MatrixProducts() as products, torch.inference_mode():
        model(batch)
    require_no_more(products, needed.forward, None if padded is None else padded.forward)


class Store:
    """Random regions of numbered images."""

    fingerprint = "random"

    def __init__(self, counts: Sequence[int], feature_size: int) -> None:
        self.counts, self.feature_size = counts, feature_size

    def __contains__(self, image_id: str) -> bool:
        return int(image_id) < len(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, image_id: str) -> RegionArray:
        rng, number = np.random.default_rng(int(image_id)), self.counts[int(image_id)]
        low = rng.random((number, 2), np.float32) * 300
        return RegionArray(
            features=rng.random((number, self.feature_size), np.float32),
            boxes=np.concatenate([low, low + 50], axis=1),
            size=(400, 400),
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tile_of_retrieval_computes_texts_and_images_once(name: str, kernel: str) -> None:
    task, counts, words = Retrieval(), draw_lengths(6, 3, 30, 1), draw_lengths(6, 4, 18, 0)
    model = make_task(name, task.heads[next(iter(task.heads))])
    model = TaskModel(model.encoder, task.heads, models.head_styles(name))
    config = model.encoder.config
    inputs = Inputs(name, config, Store(counts, config.feature_size), "cpu")
    records = [
        RetrievalRecord(id=str(number), images=(str(number),), caption=" ".join(["red"] * length))
        for number, length in enumerate(words)
    ]
    texts = [len(task.text(record, inputs.layout).ids) for record in records]
    pairs = [(text, image) for text in range(6) for image in range(6)]
    batch = make_batch(
        config, texts, counts, text_row=[text for text, _ in pairs], region_row=[image for _, image in pairs]
    )
    batch = dataclasses.replace(batch, text=dataclasses.replace(batch.text, answer_at=None))
    needed, padded = task_products(model, batch), pad(name, config, batch, kernel)
    with MatrixProducts() as products:
        score_pairs(model, task, inputs, records, batch_size=36, precision="fp32")
    require_no_more(products, needed.forward, None if padded is None else padded.forward)


def test_the_guard_sees_padding_and_states_that_nobody_reads() -> None:
    model, batch = vqa("visualbert")
    config, rows = model.encoder.config, 20
    needed = task_products(model, batch).forward.linear
    padded = make_batch(config, [batch.text.mask.shape[1]] * rows, [30] * rows)
    assert task_products(model, padded).forward.linear > 1.2 * TOLERANCE * needed
    all_tokens = Reading(tokens=batch.text.mask.sum(1).numpy() - 1)
    assert encoder_products(config, batch, all_tokens).forward.linear > 1.05 * TOLERANCE * needed
