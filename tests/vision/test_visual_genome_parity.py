"""The Visual Genome detector against a recording of the transformers port: every stage of every case."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.vision import visual_genome_images
from visling.vision.visual_genome import Backbone, VisualGenomeDetector
from visling.vision.visual_genome_config import VisualGenomeConfig, read_config
from visling.vision.visual_genome_weights import KEYS, load_weights

TOLERANCE = 1e-4
"""Largest difference of a stage, as a share of its largest value, as the recording promises. Measured: 2e-6, from the
folded norms; 2e-5 where random shifts move boxes by thirty times their size."""


@pytest.fixture(scope="module")
def recorded(golden: Path) -> Path:
    """The folder with `tiny` and `manifest_full.json`: `frcnn` in the folder of recordings, or that folder itself."""
    return golden / "frcnn" if (golden / "frcnn").is_dir() else golden


@pytest.fixture(scope="module")
def cases(recorded: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """Case -> stage -> values."""
    with np.load(recorded / "tiny/cases.npz") as file:
        found: dict[str, dict[str, NDArray[Any]]] = {}
        for name in file.files:
            case, _, stage = name.partition("/")
            found.setdefault(case, {})[stage] = file[name]
    return found


def build(recorded: Path) -> VisualGenomeDetector:
    with np.load(recorded / "tiny/weights.npz") as file:
        weights = {name: torch.from_numpy(file[name]) for name in file.files}
    classes = len(weights["roi_heads.box_predictor.cls_score.bias"]) - 1
    attributes = len(weights["roi_heads.box_predictor.attr_score.bias"]) - 1
    names = tuple(map("class {}".format, range(classes))), tuple(map("attribute {}".format, range(attributes)))
    detector = VisualGenomeDetector(read_config(recorded / "tiny/config.json", *names).config).eval()
    coverage = load_weights(detector, weights)
    assert len(coverage.mapped) == len(weights)
    assert not coverage.fresh
    return detector


def count_images(case: Mapping[str, NDArray[Any]]) -> int:
    return len(case["image_sizes_hw"])


@torch.no_grad()
def run_stages(detector: VisualGenomeDetector, case: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """What the recording holds, by its names, up to the selection of regions."""
    images = [detector.scale(case[f"image{row}_rgb_uint8"]) for row in range(count_images(case))]
    size = visual_genome_images.scaled_sizes(images)
    to_original = visual_genome_images.boxes_to_original(images, detector.config)
    backbone = detector.fold()
    pixels = detector.prepare(images)
    features = detector.run_trunk(backbone, pixels)
    output = detector.propose(features)
    proposals = detector.select_proposals(output, size, to_original)
    heads = [detector.run_head(backbone, features[row], boxes) for row, (boxes, _) in enumerate(proposals)]
    stages = {
        "pixel_values": pixels,
        "image_sizes_hw": size[:, [1, 0]].long(),
        "scales_yx": to_original[:, [1, 0]],
        "res4": features,
        "rpn_objectness": output.logits,
        "rpn_deltas": output.shifts,
        "roi_pooled_first4": detector.pool(features[0], proposals[0][0])[:4],
        "feature_pooled": torch.cat([head.features for head in heads]),
        "obj_logits": torch.cat([head.classes for head in heads]),
        "attr_logits": torch.cat([head.attributes for head in heads]),
        "box_deltas": torch.cat([head.shifts.flatten(1) for head in heads]),
    }
    for row, (boxes, logits) in enumerate(proposals):
        stages |= {f"proposals{row}": boxes, f"proposal_logits{row}": logits}
    return stages


def differing_stages(detector: VisualGenomeDetector, case: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Stage -> how it differs from the recording."""
    found = {}
    for name, values in run_stages(detector, case).items():
        expected = torch.from_numpy(case[name])
        if values.shape != expected.shape:
            found[name] = f"shape {tuple(values.shape)}, recorded {tuple(expected.shape)}"
        elif (error := (values - expected).abs().max() / expected.abs().max()) > TOLERANCE:
            found[name] = f"differs by {error:.1e} of its largest value"
    return found


def test_every_stage_equals_the_recording(recorded: Path, cases: Mapping[str, dict[str, NDArray[Any]]]) -> None:
    detector = build(recorded)
    for name, case in cases.items():
        assert differing_stages(detector, case) == {}, name
        unseen = set(case) - set(run_stages(detector, case))
        assert {stage for stage in unseen if not stage.startswith(("out_", "image"))} == set()


def test_the_regions_equal_the_recording(recorded: Path, cases: Mapping[str, dict[str, NDArray[Any]]]) -> None:
    """All of it but `out_normalized_boxes` of several pictures, in which the port mixes up their sizes."""
    detector = build(recorded)
    for name, case in cases.items():
        images = [case[f"image{row}_rgb_uint8"] for row in range(count_images(case))]
        for row, found in enumerate(detector.detect(images)):
            expected = {stage.removeprefix("out_"): values[row] for stage, values in case.items() if "out_" in stage}
            count = int(expected["preds_per_image"])
            assert len(found) == count, name
            assert found.size == images[row].shape[1::-1]
            np.testing.assert_array_equal(found.classes, expected["obj_ids"][:count])
            np.testing.assert_array_equal(found.attributes, expected["attr_ids"][:count, None])
            close: dict[str, Any] = {"rtol": TOLERANCE, "atol": TOLERANCE * max(found.size)}
            np.testing.assert_allclose(found.boxes, expected["boxes"][:count], **close)
            for values, stage in (
                (found.class_confidence, "obj_probs"),
                (np.ravel(np.asarray(found.attribute_confidence)), "attr_probs"),
                (found.features, "roi_features"),
            ):
                np.testing.assert_allclose(np.asarray(values), expected[stage][:count], rtol=1e-4, atol=1e-6)
            for stage, values in expected.items():  # the rest is padding, which we do not have
                if values.ndim and stage != "sizes":
                    assert not values[count:].any(), stage
            if len(images) == 1:
                unit = found.boxes / np.array(found.size * 2, np.float32)
                np.testing.assert_allclose(unit, expected["normalized_boxes"][:count], rtol=0, atol=1e-5)


def swap_colours(detector: VisualGenomeDetector) -> None:
    detector.config = VisualGenomeConfig(**{**vars(detector.config), "channel_order": "RGB"})


def pool_from_before_the_border(detector: VisualGenomeDetector) -> None:
    detector.config = VisualGenomeConfig(**{**vars(detector.config), "caffe_pool": False})


def use_the_formulas_anchors(detector: VisualGenomeDetector) -> None:
    detector.base_anchors = VisualGenomeDetector(detector.config).base_anchors


def scale_proposals_shifts(detector: VisualGenomeDetector) -> None:
    detector.config = VisualGenomeConfig(**{**vars(detector.config), "proposal_box_scale": (2.0, 2.0, 2.0, 2.0)})


def forget_the_dilation(detector: VisualGenomeDetector) -> None:
    for module in detector.head.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation, module.padding = (1, 1), (1, 1)


def embed_the_class_before(detector: VisualGenomeDetector) -> None:
    weight = detector.predict.class_embedding.weight
    with torch.no_grad():
        weight.copy_(weight.roll(1, dims=0))


def nudge(name: str) -> Callable[[VisualGenomeDetector], None]:
    def change(detector: VisualGenomeDetector) -> None:
        detector.state_dict()[name].mul_(1.01)

    return change


@pytest.mark.parametrize(
    ("deviate", "first"),
    [
        (swap_colours, "pixel_values"),
        (pool_from_before_the_border, "res4"),
        (nudge("stages.2.1.convolve.convolution.weight"), "res4"),
        (nudge("stages.0.0.shortcut.norm.running_var"), "res4"),
        (nudge("propose.objectness.weight"), "rpn_objectness"),
        (nudge("propose.shift.weight"), "rpn_deltas"),
        (use_the_formulas_anchors, "proposals0"),
        (scale_proposals_shifts, "proposals0"),
        (forget_the_dilation, "feature_pooled"),
        (nudge("predict.classify.weight"), "obj_logits"),
        (embed_the_class_before, "attr_logits"),
        (nudge("predict.refine.weight"), "box_deltas"),
    ],
)
def test_a_stage_that_deviates_is_named(
    recorded: Path,
    cases: Mapping[str, dict[str, NDArray[Any]]],
    deviate: Callable[[VisualGenomeDetector], None],
    first: str,
) -> None:
    detector = build(recorded)
    deviate(detector)
    order = [
        "pixel_values", "res4", "rpn_objectness", "rpn_deltas", "proposals0", "feature_pooled", "obj_logits",
        "attr_logits", "box_deltas",
    ]  # fmt: skip
    found = differing_stages(detector, next(iter(cases.values())))
    assert next((stage for stage in order if stage in found), None) == first, found


def test_folded_norms_are_the_same_function(recorded: Path) -> None:
    detector = build(recorded)
    plain = Backbone(detector.stem, detector.stages, detector.head)
    images = torch.rand(2, 3, 70, 90) * 255
    with torch.no_grad():
        expected = detector.run_trunk(plain, images)
        found = detector.run_trunk(detector.fold(), images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
        regions = expected[0].repeat(1, 3, 3)[None, :, :14, :14]
        states = detector.head(regions)
        torch.testing.assert_close(detector.fold().head(regions), states, rtol=1e-4, atol=1e-5 * float(states.max()))
    assert {"stem.norm.running_var", "head.2.expand.norm.weight"} <= detector.state_dict().keys()


def test_the_full_size_has_the_keys_and_shapes_of_the_released_file(recorded: Path) -> None:
    manifest = json.loads((recorded / "manifest_full.json").read_text())
    names = tuple(map(str, range(1600))), tuple(map(str, range(400)))
    with torch.device("meta"):
        detector = VisualGenomeDetector(VisualGenomeConfig(class_names=names[0], attribute_names=names[1]))
    theirs = KEYS.invert({f"detector.{name}": value for name, value in detector.state_dict().items()})
    assert {name: list(value.shape) for name, value in theirs.items()} == manifest
    assert sum(value.numel() for name, value in theirs.items() if "num_batches" not in name) == 65_545_214
