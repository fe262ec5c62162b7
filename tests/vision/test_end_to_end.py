"""VL-BERT's trainable extractor: shapes, what is frozen, pictures, names in files. Parity:
tests/parity/test_vlbert_extractor.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from visling import config as configs
from visling.boxes import to_pixels, to_unit
from visling.data.batches.masking import hide_pixels
from visling.errors import CheckpointError, ConfigError, DataError
from visling.models import vlbert
from visling.types import Batch, Regions, Text
from visling.vision.end_to_end import (
    KEYS,
    MEAN_BGR,
    PRESETS,
    ExtractorConfig,
    RegionExtractor,
    fitted_size,
    prepare_image,
)
from visling.vision.pictures import PictureFiles
from visling.vision.resnet import FrozenNorm

SMALL = ExtractorConfig(blocks=(1, 1, 1), stem_size=6, widths=(4, 5, 6, 7))
HEAD = "image_feature_extractor.roi_head_feature_extractor"


def lively(config: ExtractorConfig = SMALL) -> RegionExtractor:
    """An extractor whose norms are not the identity, as if trained."""
    extractor = RegionExtractor(config)
    with torch.no_grad():
        for module in extractor.modules():
            if isinstance(module, FrozenNorm):
                module.weight.normal_(1.0, 0.1)
                module.bias.normal_(0.2, 0.1)
                module.running_mean.normal_(0.0, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.6, 1.4)  # type: ignore[union-attr]
    return extractor


def scene() -> tuple[Tensor, Tensor, Tensor]:
    """Two images, three and one real regions."""
    boxes = torch.tensor(
        [[[0.0, 0, 79, 47], [5, 5, 30, 40], [40, 8, 41, 9]], [[3, 3, 60, 44], [0, 0, 0, 0], [0, 0, 0, 0]]]
    )
    return torch.randn(2, 3, 48, 80), boxes, torch.tensor([[True, True, True], [True, False, False]])


# Shapes


@pytest.mark.parametrize("dilated", [True, False])
def test_one_feature_per_region_and_zeros_on_padding(dilated: bool) -> None:
    config = replace(SMALL, dilated=dilated)
    images, boxes, mask = scene()
    extractor = lively(config)
    assert extractor.feature_map(images).shape == (2, 24, 3, 5)
    features = extractor(images, boxes, mask)
    assert features.shape == (2, 3, config.feature_size) == (2, 3, 28)
    assert bool((features[~mask] == 0).all())
    assert bool((features[mask] > 0).any(1).all())


def test_padding_and_neighbours_do_not_reach_a_region() -> None:
    images, boxes, mask = scene()
    extractor = lively().eval()
    whole = extractor(images, boxes, mask)
    alone = extractor(images[:1], boxes[:1, 1:2], mask[:1, 1:2])
    assert_close(alone[0, 0], whole[0, 1], atol=1e-5, rtol=1e-5)
    moved = torch.where(mask[..., None], boxes, 7.0)
    assert torch.equal(extractor(images, moved, mask), whole)


def test_images_without_regions_have_no_features() -> None:
    images, boxes, mask = scene()
    features = lively()(images, boxes, torch.zeros_like(mask))
    assert features.shape == (2, 3, 28)
    assert bool((features == 0).all())


def test_instance_masks_cover_the_last_maps() -> None:
    images, boxes, mask = scene()
    extractor = lively().eval()
    plain = extractor(images, boxes, mask)
    assert_close(extractor(images, boxes, mask, torch.ones(2, 3, 14, 14, dtype=torch.bool)), plain)
    left = torch.zeros(2, 3, 14, 14)
    left[..., :7] = 1
    halves = [extractor(images, boxes, mask, part) for part in (left, 1 - left)]
    assert not torch.allclose(halves[0], halves[1])
    assert_close(halves[0] + halves[1], plain)
    with pytest.raises(DataError, match="instance masks are 28 x 28, but the maps that they multiply are 14 x 14"):
        extractor(images, boxes, mask, torch.ones(2, 3, 28, 28))
    strided = RegionExtractor(replace(SMALL, dilated=False))
    with pytest.raises(DataError, match="7 x 7"):
        strided(images, boxes, mask, left)


@pytest.mark.parametrize(("name", "depth"), [("resnet50", 50), ("resnet101", 101), ("resnet152", 152)])
def test_presets_have_the_depths_of_their_names(name: str, depth: int) -> None:
    """Convolutions on the longest way through, and the layer of classes that a ResNet is named with."""
    with torch.device("meta"):
        extractor = RegionExtractor(PRESETS[name])
    on_the_way = [
        name for name, module in extractor.named_modules() if isinstance(module, nn.Conv2d) and "shortcut" not in name
    ]
    assert len(on_the_way) + 1 == depth
    assert extractor.config.feature_size == 2048


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"blocks": (3, 4)}, "found 2 numbers of blocks, expected 3"),
        ({"widths": (64, 128, 256)}, "and 3 widths, expected 4"),
        ({"blocks": (3, 0, 6)}, "must be at least 1"),
        ({"stem_size": 0}, "must be at least 1"),
        ({"frozen_stages": 6}, "found 6, expected 0 to 5"),
        ({"shorter_side": 1200}, "at most longer_side; found 1200 and 1000"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ExtractorConfig(**wrong)  # type: ignore[arg-type]


def test_settings_survive_as_plain_values() -> None:
    assert configs.from_dict(ExtractorConfig, json.loads(json.dumps(configs.to_dict(SMALL)))) == SMALL


# What trains


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_stages_get_no_gradient(frozen: int) -> None:
    extractor = lively(replace(SMALL, frozen_stages=frozen)).train()
    parts = ("stem.", "stages.0.", "stages.1.", "stages.2.", "head.")
    features = extractor(*scene())
    assert features.requires_grad == (frozen < 5)
    if frozen < 5:
        features.sum().backward()
    trained = {
        name
        for name, parameter in extractor.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }
    assert trained == {
        name for name, _ in extractor.named_parameters() if name.startswith(parts[frozen:]) and ".norm." not in name
    }


def test_norms_stay_while_the_rest_trains() -> None:
    extractor = lively().train()
    before = {name: tensor.clone() for name, tensor in extractor.state_dict().items()}
    optimiser = torch.optim.AdamW(extractor.parameters(), lr=1e-2, weight_decay=0.1)
    extractor(*scene()).square().mean().backward()
    optimiser.step()
    changed = {name for name, tensor in extractor.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".norm." not in name and not name.startswith(("stem.", "stages.0."))}


def test_training_and_evaluation_see_the_same() -> None:
    extractor, (images, boxes, mask) = lively(), scene()
    assert torch.equal(extractor.train()(images, boxes, mask), extractor.eval()(images, boxes, mask))
    assert extractor.train().training


def test_gradients_are_slopes() -> None:
    """The change of a number along one direction of all trained weights, in double precision but for RoIAlign, which is
    single."""
    extractor, (images, boxes, mask) = lively().double(), scene()
    direction = torch.randn(2, 3, 28, dtype=torch.float64)
    trained = [parameter for parameter in extractor.parameters() if parameter.requires_grad]
    ways = [torch.randn_like(parameter) * parameter.detach().std() for parameter in trained]

    def value() -> Tensor:
        features: Tensor = extractor(images.double(), boxes, mask)
        return (features * direction).sum()

    slope = sum(
        float((gradient * way).sum()) for gradient, way in zip(torch.autograd.grad(value(), trained), ways, strict=True)
    )
    ends = []
    for step in (1e-4, -2e-4):
        with torch.no_grad():
            for parameter, way in zip(trained, ways, strict=True):
                parameter.add_(step * way)
            ends.append(float(value()))
    assert abs(slope) > 0.1
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(slope, rel=1e-2)


def test_gradients_of_the_encoder_reach_the_extractor() -> None:
    """Pixels to the pooled state and all the way back; the whole-image feature is that of the last box."""
    extractor, (images, boxes, _) = lively().train(), scene()
    images, corners = images[:1], boxes[:1, [1, 2, 0]]
    size = torch.tensor([[80.0, 48.0]])
    config = replace(
        vlbert.PRESETS["tiny"],
        feature_size=SMALL.feature_size,
        whiten_features=False,
        masks_features=False,
        visual_scale_init=1.0,
    )
    features = extractor(images, corners, torch.ones(1, 3, dtype=torch.bool))
    regions = Regions(
        features=features[:, :2],
        whole=features[:, 2],
        boxes=to_unit(corners[:, :2], size),
        mask=torch.ones(1, 2, dtype=torch.bool),
        size=size,
    )
    ids = torch.tensor([[2, 7, 3]])
    batch = Batch(text=Text(ids=ids, mask=ids > 0, segments=torch.zeros_like(ids)), regions=regions)
    batch.validate()
    vlbert.VlBert(config).eval()(batch).pooled.square().sum().backward()
    for name, parameter in extractor.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


# Pictures


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((640, 480), (800, 600)),
        ((480, 640), (600, 800)),
        ((1000, 300), (1000, 300)),  # the longer side rules
        ((640, 300), (998, 468)),  # int(1000 * 300 / 640) = 468, int(468 * 640 / 300) = 998
        ((500, 333), (900, 600)),  # 900.9, cut
        ((333, 500), (600, 900)),
        ((50, 50), (600, 600)),
        ((5000, 1), (1000, 1)),
    ],
)
def test_images_are_scaled_to_the_sizes_of_the_release(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fitted_size(*size, 600, 1000) == fitted


def test_pictures_are_whitened_and_padded() -> None:
    extractor = RegionExtractor(replace(SMALL, shorter_side=20, longer_side=60))
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[..., 0], wide[..., 1], wide[3, 7, 2] = 200, 100, 50
    tall = np.full((60, 40, 3), 255, np.uint8)
    batch, size = extractor.prepare([wide, tall])
    assert batch.shape == (2, 3, 30, 40)
    assert size.tolist() == [[40, 20], [20, 30]]
    expected = torch.tensor([0.0, 100.0, 200.0]) - torch.tensor(MEAN_BGR)
    assert_close(batch[0, :, 5, 5], expected)
    assert_close(batch[0, :, 3, 7], expected + torch.tensor([50.0, 0.0, 0.0]))
    assert_close(batch[1, :, :30, :20], (255 - torch.tensor(MEAN_BGR))[:, None, None].expand(-1, 30, 20))
    assert bool((batch[0, :, 20:] == 0).all())
    assert bool((batch[1, :, :, 20:] == 0).all())
    assert_close(
        to_pixels(torch.tensor([[[0.25, 0.5, 1.0, 1.0]]] * 2), size)[:, 0],
        torch.tensor([[10.0, 10, 40, 20], [5, 15, 20, 30]]),
    )


def test_mirrored_pictures_are_the_same_from_the_other_side(tmp_path: Path) -> None:
    config = replace(SMALL, shorter_side=20, longer_side=60)
    pictures = [np.random.default_rng(side).integers(0, 255, (side, 40, 3)).astype(np.uint8) for side in (13, 90)]
    batch, _ = RegionExtractor(config).prepare(pictures)
    for row, picture in zip(batch, pictures, strict=True):
        alone = prepare_image(picture, config)
        assert torch.equal(row[:, : alone.shape[1], : alone.shape[2]], alone)
        assert torch.equal(prepare_image(picture, config, mirrored=True), alone.flip(2))
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    files = PictureFiles({str(number): tmp_path / f"{number}.png" for number in range(2)}, config)
    first, second = files.read(["1", "0"], [True, False])
    assert torch.equal(first, prepare_image(pictures[1], config, mirrored=True))
    assert torch.equal(second, prepare_image(pictures[0], config))


def test_hidden_pixels_change_what_is_seen_of_them_and_of_nothing_far_away() -> None:
    extractor = lively(replace(SMALL, shorter_side=64, longer_side=256)).eval()
    picture = np.random.default_rng(3).integers(0, 255, (64, 256, 3)).astype(np.uint8)
    batch, _ = extractor.prepare([picture])
    corners = np.array([[0, 0, 255, 63], [8, 8, 50, 50], [30, 20, 80, 60], [190, 4, 250, 60]], np.float32)
    boxes, mask = torch.from_numpy(corners)[None], torch.ones(1, 4, dtype=torch.bool)
    cut = hide_pixels(batch[0], corners, np.array([False, True, False, False]))[None]
    before, after = extractor(batch, boxes, mask)[0], extractor(cut, boxes, mask)[0]
    change = (after - before).abs().amax(1)
    # The whole image, the hidden region and the one that overlaps it see the hole; the last one is 140 pixels away, the
    # network sees 67 wide.
    assert bool((change[:3] > 1e-3 * before[:3].abs().amax(1)).all())
    assert torch.equal(after[3], before[3])
    assert torch.equal(extractor(hide_pixels(batch[0], corners, np.zeros(4, bool))[None], boxes, mask)[0], before)


# Names in files


def manifest(golden: Path) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = json.loads((golden / "vlbert/manifest_full.json").read_text())
    return found


def full_size(golden: Path, *, task: str = "") -> dict[str, Tensor]:
    """Every tensor of base end to end, without values; fine-tuned if a task is named."""
    described = manifest(golden)
    network = next(
        shapes for name, shapes in described.items() if name.startswith("base_e2e_pretrain_multitask__beyond_prec")
    )
    absent = described["base_e2e_pretrain_multitask__not_present_but_in_prec"]
    shapes = {
        name: shape for name, shape in described["base_prec_pretrain_multitask"].items() if name not in absent
    } | network
    shapes |= {
        name.replace("roi_head_feature_extractor", "head.0"): shape
        for name, shape in network.items()
        if name.startswith(HEAD)
    }
    if task:
        shapes |= next(extra for name, extra in described.items() if name.startswith(f"base_{task}_e2e"))
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("task", ["", "refcoco", "vcr"])
def test_released_files_cover_the_network(golden: Path, task: str) -> None:
    with torch.device("meta"):
        extractor = RegionExtractor(PRESETS["resnet101"])
    tensors = full_size(golden, task=task)
    coverage = KEYS["official"].load(tensors, {"extractor": extractor})
    assert len(coverage.mapped) == len(extractor.state_dict())
    assert len(coverage.tied) == 60
    assert len(tensors) == len(coverage.mapped) + len(coverage.tied) + len(coverage.dropped)
    assert not any(".backbone." in name or ".roi_head" in name for name in coverage.dropped)
    if not task:
        assert len(tensors) == 901
    with pytest.raises(CheckpointError, match="cover the model"), torch.device("meta"):
        KEYS["official"].load(tensors, {"extractor": RegionExtractor(PRESETS["resnet50"])})


def test_weights_go_out_under_the_names_they_came_in_with(golden: Path) -> None:
    extractor = lively()
    ours = {f"extractor.{name}": tensor for name, tensor in extractor.state_dict().items()}
    theirs = KEYS["official"].invert(ours)
    assert f"{HEAD}.2.bn3.running_var" in theirs
    assert torch.equal(
        theirs["image_feature_extractor.head.0.0.downsample.0.weight"],
        extractor.get_parameter("head.0.shortcut.convolution.weight"),
    )
    network = {
        name
        for name in full_size(golden)
        if name.startswith("image_feature_extractor.") and "obj_downsample" not in name
    }
    assert {name for name in theirs if "layer" not in name} == {name for name in network if "layer" not in name}
    assert {name for name in theirs if "layer" in name} == {
        name for name in network if ".layer" in name and name.split(".")[3] == "0"
    }
    other = lively()
    KEYS["official"].load(theirs, {"extractor": other})
    assert torch.equal(other(*(given := scene())), extractor(*given))
    theirs["image_feature_extractor.head.0.1.conv2.weight"] = (
        theirs["image_feature_extractor.head.0.1.conv2.weight"] + 1
    )
    with pytest.raises(CheckpointError, match=r"head\.0\.1\.conv2\.weight.* should be a copy"):
        KEYS["official"].load(theirs, {"extractor": other})


def test_training_starts_from_a_plain_resnet() -> None:
    extractor = lively()
    theirs = KEYS["official"].invert({f"extractor.{name}": tensor for name, tensor in extractor.state_dict().items()})
    plain = {
        name.removeprefix("image_feature_extractor.backbone.").replace(HEAD, "layer4"): tensor
        for name, tensor in theirs.items()
        if ".head.0." not in name and not name.endswith("num_batches_tracked")
    }
    assert {"conv1.weight", "layer1.0.conv1.weight", "layer4.0.downsample.1.running_mean"} <= plain.keys()
    other = RegionExtractor(SMALL)
    KEYS["resnet"].load(plain | {"fc.weight": torch.zeros(10, 28), "fc.bias": torch.zeros(10)}, {"extractor": other})
    assert torch.equal(other(*(given := scene())), extractor(*given))


def test_a_network_without_every_shortcut_goes_out_too() -> None:
    extractor = lively(replace(SMALL, widths=(4, 5, 6, 6)))
    theirs = KEYS["official"].invert({f"extractor.{name}": tensor for name, tensor in extractor.state_dict().items()})
    assert "image_feature_extractor.head.0.0.conv1.weight" in theirs
    assert not [name for name in theirs if "head.0.0.downsample" in name]
    other = RegionExtractor(extractor.config)
    KEYS["official"].load(theirs, {"extractor": other})
    assert torch.equal(other(*(given := scene())), extractor(*given))
