"""Fine-tuning the Visual Genome detector: every part learns, in all its variants, and other classes take its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.bars import draw_bars

from visling.recipes.detectors import detect_config
from visling.types import IGNORE
from visling.vision import ops
from visling.vision.detector_losses import RegionTargets, exclusive_attribute_loss
from visling.vision.detector_start import build_detector, read_trainable, start_from_detector
from visling.vision.visual_genome import VisualGenomeDetector
from visling.vision.visual_genome_config import VisualGenomeConfig, original_settings

SMALL_INPUT = {"short_side": 96, "long_side": 96, "proposals": 20, "candidates": 60}


def tiny(**changes: Any) -> VisualGenomeConfig:
    sizes: dict[str, Any] = {
        "class_names": ("wide", "tall"), "attribute_names": ("red", "blue", "bright"), "depth": 50, "stem_size": 8,
        "width": 4, "proposal_size": 16, "anchor_sizes": (16.0, 32.0), "pool_size": 4, "min_regions": 1,
        "max_regions": 8, **SMALL_INPUT,
    }  # fmt: skip
    return VisualGenomeConfig(**{**sizes, **changes})


SCENES = [draw_bars(seed, 20) for seed in range(4)]
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "port": {},
    "original": {**original_settings(1, 8), **SMALL_INPUT, "min_side": 4.0},
    "one box for all classes": {
        "class_specific_boxes": False,
        "attribute_names": (),
        "box_scale": (1.0, 1.0, 1.0, 1.0),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_learns(variant: str) -> None:
    torch.manual_seed(0)
    detector = VisualGenomeDetector(tiny(**VARIANTS[variant])).train()
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    values: list[float] = []
    known = len(detector.attribute_names)
    truths = [replace(truth, attributes=truth.attributes[:, :known]) for _, truth in SCENES]
    for _ in range(25):
        loss = detector.losses([image for image, _ in SCENES], truths)
        optimizer.zero_grad()
        loss.value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        values.append(float(loss.value.detach()))
    silent = [
        name
        for name, parameter in detector.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().any())
    ]
    assert silent == []
    assert np.isfinite(values).all()
    assert np.mean(values[-3:]) < 0.75 * np.mean(values[:3]), values[::6]
    parts = {"objectness", "proposal_box", "class", "box"} | ({"attribute"} if detector.attribute_names else set())
    assert set(loss.parts) == parts


@pytest.mark.parametrize("inclusive", [False, True])
def test_perfect_outputs_have_no_loss_of_boxes(inclusive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where anchors and sampled regions are the objects themselves, shifts of zero are right, to the pixel."""
    torch.manual_seed(0)
    settings = VARIANTS["original"] if inclusive else {}
    detector = VisualGenomeDetector(tiny(**{**settings, "short_side": 48, "long_side": 48})).train()
    image, truth = SCENES[0]
    with torch.no_grad():
        for layer in (detector.propose.shift, detector.predict.refine):
            for parameter in layer.parameters():
                parameter.zero_()
    end = torch.tensor([0.0, 0.0, 1.0, 1.0]) * float(inclusive)
    boxes = torch.from_numpy(truth.boxes) - end
    logits = torch.zeros(1, 2)
    monkeypatch.setattr(detector, "list_anchors", lambda output: (boxes, logits.requires_grad_(), torch.zeros(1, 2, 4)))
    monkeypatch.setattr(detector, "select_proposals", lambda *inputs: [(boxes, logits[0])])
    parts = detector.losses([image], [truth]).parts
    for name in ("proposal_box", "box"):
        total, count = parts[name]
        assert int(count) >= 2
        assert float(total) == pytest.approx(0, abs=1e-6), name


def test_pooling_passes_gradients_to_the_largest_cells() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 3, 9, 11, requires_grad=True)
    boxes = torch.tensor([[0.0, 0.0, 170.0, 140.0], [20.0, 30.0, 60.0, 64.0], [90.0, 0.0, 100.0, 9.0]])
    image = torch.tensor([0, 1, 1])
    pooled = ops.roi_pool(features, boxes, image, output_size=3, scale=1 / 16)
    weights = torch.randn_like(pooled)
    (pooled * weights).sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.zeros_like(features)
    for region, own in enumerate(image.tolist()):
        for channel in range(3):
            values = features[own, channel].detach()
            for value, weight in zip(
                pooled[region, channel].detach().flatten(), weights[region, channel].flatten(), strict=True
            ):
                expected[own, channel] += (values == value) * weight
    assert features.grad is not None
    torch.testing.assert_close(features.grad, expected)


def test_attributes_of_an_object_share_its_loss() -> None:
    logits = torch.randn(3, 4)
    targets = RegionTargets(
        regions=torch.zeros(3, 4),
        image=torch.zeros(3, dtype=torch.int64),
        label=torch.tensor([0, 0, IGNORE]),
        has_object=torch.tensor([True, True, False]),
        shift=torch.zeros(3, 4),
        attributes=torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]),
        annotated=torch.tensor([True, True, False]),
    )
    loss = exclusive_attribute_loss(logits, targets)
    assert int(loss.parts["attribute"][1]) == 1, "the second has none, the third is padding"
    torch.testing.assert_close(loss.value, -logits[0].log_softmax(-1)[:2].mean())


def test_other_classes_take_the_rows_of_the_same_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    VisualGenomeDetector(tiny()).save(tmp_path)
    trained = read_trainable(tmp_path)
    new = build_detector(tiny(class_names=("square", "tall"), attribute_names=("blue",)))
    report = start_from_detector(new, trained, "released")
    own, theirs = new.state_dict(), trained.state_dict()
    assert torch.equal(own["predict.classify.weight"][1:], theirs["predict.classify.weight"][1:])
    assert torch.equal(own["predict.refine.bias"][4:], theirs["predict.refine.bias"][4:])
    assert torch.equal(own["predict.class_embedding.weight"][2], theirs["predict.class_embedding.weight"][2])
    assert torch.equal(own["predict.attribute.weight"], theirs["predict.attribute.weight"][[1, 3]])
    assert torch.equal(own["base_anchors"], theirs["base_anchors"])
    assert (report.rows, report.new_rows, report.random) == (("tall", "blue"), ("square",), ())
    without = build_detector(tiny(attribute_names=()))
    dropped = start_from_detector(without, trained, "released").dropped
    assert {"predict.describe.weight", "predict.attribute.bias", "red"} <= set(dropped)
    config = detect_config(["detector.max_regions=7"], "default", trained.config)
    assert config.detector == tiny(max_regions=7)
    assert (config.frozen_stages, config.train.optim.lr) == (2, 1e-4), "trained as a ResNet is"


def test_frozen_stages_get_no_gradient() -> None:
    detector = VisualGenomeDetector(tiny())
    detector.freeze(2)
    detector.losses([SCENES[0][0]], [SCENES[0][1]]).value.backward()  # type: ignore[no-untyped-call]
    learning = {name.partition(".")[0] for name, value in detector.named_parameters() if value.grad is not None}
    assert "stem" not in learning
    assert all(value.grad is None for value in detector.stages[0].parameters())
    assert any(value.grad is not None for value in detector.stages[1].parameters())
