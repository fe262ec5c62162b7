"""A joint extractor that sees the pictures whole: masked regions are hidden in the features alone, and what is hidden
shows in those of the whole image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from visling import config as configs
from visling.pretrained.folder import read_model_folder
from visling.recipes.configs import PretrainConfig
from visling.recipes.tables import FINETUNING, PRETRAINING
from visling.runs import finetune as finetuning
from visling.runs.configure import configure
from visling.runs.pretrain import Pretraining, pretrain
from visling.types import Batch, Targets

EXTRACTOR = (
    "extractor={blocks = [1, 1, 1], stem_size = 4, widths = [4, 4, 6, 4], shorter_side = 32, longer_side = 64}",
    "encoder.feature_size=16", "encoder.whiten_features=false", "encoder.visual_size=16", "region_masking.rate=0.3",
)  # fmt: skip
CUT = (*EXTRACTOR, "encoder.masks_features=false")
WHOLE = (*EXTRACTOR, "encoder.masks_features=true", "region_masking.cut_pixels=false")


def configured(world: Any, *settings: str) -> PretrainConfig:
    return configs.override(PRETRAINING["vlbert-scenes"](), [*world.settings, *settings])


def first_batch(world: Any, *settings: str) -> tuple[Any, Batch, Targets]:
    """A run's model with its first training batch."""
    run = Pretraining(
        configured(world, *settings), data=[str(world.scenes)], store=world.regions, init=None, device="cpu",
        other_features=False, images=world.scenes, backbone=None,
    )  # fmt: skip
    training = run.build()
    batch, targets = next(iter(training.batches))
    return training.model.eval(), batch, targets


def read_projected(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The features (K, F) that the encoder projects, of all regions and whole images, and the states (B, R, D)."""
    projected: list[Tensor] = []
    handle = model.encoder.projection.register_forward_pre_hook(lambda _, given: projected.append(given[0]))
    with torch.no_grad():
        described, _ = model.extractor.describe(batch.regions, batch.pixels)
        encoded = model.encoder(Batch(text=batch.text, regions=described))
    handle.remove()
    return projected[0], encoded.regions


def test_the_pictures_stay_whole_and_the_features_are_hidden(world: Any) -> None:
    _, cut, cut_targets = first_batch(world, *CUT)
    model, whole, targets = first_batch(world, *WHOLE)
    assert cut.pixels is not None
    assert whole.pixels is not None
    assert whole.regions is not None
    hidden = whole.regions.hidden
    assert hidden is not None
    assert hidden.any()
    assert cut.regions is not None
    assert torch.equal(hidden, cut.regions.hidden), "the same regions are hidden"
    assert_close(targets.region_probs, cut_targets.region_probs, rtol=0, atol=0)
    holes = cut.pixels.images != whole.pixels.images
    assert holes.any()
    assert not cut.pixels.images[holes].any(), "they differ in what is cut out alone"
    boxes = torch.cat([whole.regions.mask, torch.ones(len(hidden), 1) > 0], 1)
    placed = torch.cat([hidden, torch.zeros(len(hidden), 1) > 0], 1)[boxes]
    model.encoder.mask_feature.data.fill_(7.0)
    projected, _ = read_projected(model, whole)
    assert bool((projected[placed] == 7).all())
    assert not bool((projected[~placed] == 7).any())


def test_what_is_hidden_shows_in_the_features_around_it(world: Any) -> None:
    """The leak: states of hidden regions depend on the pixels of these regions, unless the pixels are cut out."""
    _, cut, _ = first_batch(world, *CUT)
    model, whole, _ = first_batch(world, *WHOLE)
    assert whole.regions is not None
    hidden = whole.regions.hidden
    assert hidden is not None
    assert whole.pixels is not None
    assert cut.pixels is not None
    seen = [read_projected(model, batch) for batch in (whole, cut)]
    real = torch.cat([whole.regions.mask, torch.ones(len(hidden), 1) > 0], 1)
    last = torch.zeros_like(real)
    last[:, -1] = hidden.any(1)
    features = [projected[last[real]] for projected, _ in seen]
    assert bool((features[0] != features[1]).any(1).all()), "of every whole image with a hidden region"
    states = [encoded[hidden] for _, encoded in seen]
    assert float((states[0] - states[1]).abs().max()) > 1e-4


def test_such_a_run_trains_what_stands_for_hidden_features_and_is_fine_tuned(world: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"store": world.regions, "images": world.scenes, "device": "cpu"}
    pretrain(configured(world, *WHOLE), tmp_path / "run", data=[str(world.scenes)], **given)
    weights = read_model_folder(tmp_path / "run").weights
    assert bool(weights["encoder.mask_feature"].any())
    run = configure(
        FINETUNING["vlbert-vqa-scenes-e2e"](),
        ["batch_size=4", "train.max_steps=2", "train.precision=fp32", *EXTRACTOR[:1]],
        init=tmp_path / "run",
    )
    finetuning.finetune(run, tmp_path / "vqa", data=world.scenes, init=tmp_path / "run", **given)
    found = read_model_folder(tmp_path / "vqa")
    assert found.config.masks_features
    assert json.loads((tmp_path / "vqa" / "run.json").read_text())["status"] == "finished"
