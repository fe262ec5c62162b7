"""Grid features: the cells are the backbone's own, lie where the boxes say, and are kept with the backbone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.transformers_models import BACKBONES, save_backbone, save_detector
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from visling import api
from visling import config as configs
from visling.cli.app import app
from visling.errors import CheckpointError, ConfigError
from visling.recipes.tables import FINETUNING
from visling.regions.store import NativeStore
from visling.runs.finetune import finetune
from visling.vision.detectors import load_detector
from visling.vision.grid_features import GridFeatures, tile, wrap

transformers = pytest.importorskip("transformers")

KINDS = ("torchvision", *BACKBONES)


def torchvision_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet of transformers under the names of torchvision."""
    rules = [
        (r"resnet\.embedder\.embedder\.convolution", "conv1"),
        (r"resnet\.embedder\.embedder\.normalization", "bn1"),
        (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.convolution", r"layer\1.\2.downsample.0"),
        (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.normalization", r"layer\1.\2.downsample.1"),
        (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution", r"layer\1.\2.conv\3"),
        (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.normalization", r"layer\1.\2.bn\3"),
        (r"classifier\.1", "fc"),
    ]
    renamed = {}
    for name, value in weights.items():
        for pattern, target in rules:
            name = re.sub(pattern, target, name)
        # both count from 0 in transformers and from 1 in torchvision
        name = re.sub(r"^layer(\d)", lambda found: f"layer{int(found[1]) + 1}", name)
        name = re.sub(r"\.(conv|bn)(\d)\.", lambda found: f".{found[1]}{int(found[2]) + 1}.", name)
        renamed[name] = value
    return renamed


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with a small ResNet of the form of ResNet-50, and its weights as torchvision's file."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 48, 64], depths=[1, 2, 1, 3])
    model = transformers.ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder / "theirs")
    shape = {"shortest_edge": 128}
    transformers.ConvNextImageProcessorPil(size=shape, resample=2).save_pretrained(folder / "theirs")
    torch.save(torchvision_names(model.state_dict()), folder / "resnet.pth")
    return folder


@pytest.fixture(scope="module")
def sources(resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("backbones")
    return {"torchvision": resnet / "resnet.pth", **{kind: save_backbone(kind, folder / kind) for kind in BACKBONES}}


@pytest.fixture(scope="module")
def grids(sources: dict[str, Path]) -> dict[str, GridFeatures]:
    return {kind: wrap(source, side=128 if kind == "torchvision" else None) for kind, source in sources.items()}


def picture(width: int = 90, height: int = 60, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("kind", "first"), [("vit", 1), ("clip", 1), ("dinov2", 1), ("swin", 0)])
def test_cells_are_the_states_of_the_patches(sources: dict[str, Path], kind: str, first: int) -> None:
    grid = wrap(sources[kind])
    config = transformers.AutoConfig.from_pretrained(sources[kind])
    model = transformers.AutoModel.from_pretrained(sources[kind]).eval()
    model = model.vision_model if hasattr(config, "vision_config") else model
    processor = transformers.AutoImageProcessor.from_pretrained(sources[kind])
    # A square picture of the network's own size: there is nothing to scale or to crop.
    image = picture(grid.config.width, grid.config.height)
    with torch.no_grad():
        states = model(**processor(images=image, do_resize=False, return_tensors="pt")).last_hidden_state[0]
    (found,) = grid.detect([image])
    np.testing.assert_allclose(found.features, states[first:].numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_cells_are_those_of_the_map(sources: dict[str, Path], kind: str) -> None:
    grid = wrap(sources[kind])
    model = transformers.AutoModel.from_pretrained(sources[kind]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(sources[kind])
    image = picture(grid.config.width, grid.config.height)
    with torch.no_grad():
        maps = model(**processor(images=image, do_resize=False, return_tensors="pt")).last_hidden_state[0]
    (found,) = grid.detect([image])
    np.testing.assert_allclose(found.features, maps.flatten(1).T.numpy(), rtol=1e-4, atol=1e-5)


def test_a_file_of_torchvision_is_the_network_that_transformers_computes(resnet: Path) -> None:
    ours = wrap(resnet / "resnet.pth", side=128)
    model = transformers.AutoModel.from_pretrained(resnet / "theirs").eval()
    image = picture(128, 128)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        expected = model(pixel_values=(pixels - mean) / std).last_hidden_state[0].flatten(1).T
    (found,) = ours.detect([image])
    assert found.features.shape == (16, 64)
    np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_tile_the_picture_and_a_picture_does_not_depend_on_the_others(
    grids: dict[str, GridFeatures], kind: str
) -> None:
    grid = grids[kind]
    images = [picture(), picture(50, 80, 1), picture(7, 300, 2)]
    together = grid.detect(images)
    rows, columns = grid.config.cells
    for found, image in zip(together, images, strict=True):
        height, width = image.shape[:2]
        assert found.size == (width, height)
        extent = found.boxes[:, 2:] - found.boxes[:, :2]
        np.testing.assert_allclose(extent, [[width / columns, height / rows]] * (rows * columns), rtol=1e-4)
        np.testing.assert_allclose(found.boxes[0, :2], 0)
        np.testing.assert_allclose(found.boxes[-1, 2:], (width, height), rtol=1e-6)
        np.testing.assert_allclose(found.features, grid.detect([image])[0].features, rtol=1e-3, atol=1e-4)
        assert (found.classes, found.class_confidence, found.probs) == (None, None, None)
    assert grid.detect([]) == []


def test_the_boxes_are_where_the_features_come_from(grids: dict[str, GridFeatures]) -> None:
    """What is drawn into one cell changes its feature most: patches are embedded alone, and one layer mixes little."""
    grid = grids["vit"]
    (before,) = grid.detect([np.full((128, 128, 3), 127, np.uint8)])
    for number in (0, 6, 11):
        left, top, right, bottom = before.boxes[number].astype(int)
        image = np.full((128, 128, 3), 127, np.uint8)
        image[top:bottom, left:right] = 255
        (after,) = grid.detect([image])
        assert np.abs(after.features - before.features).sum(1).argmax() == number


def test_the_map_is_averaged(sources: dict[str, Path], grids: dict[str, GridFeatures]) -> None:
    image = picture()
    (native,) = grids["resnet"].detect([image])
    maps = torch.from_numpy(native.features).T.unflatten(1, (4, 4))
    for number in (1, 2, 3):
        coarse = wrap(sources["resnet"], grid=number)
        (found,) = coarse.detect([image])
        expected = functional.adaptive_avg_pool2d(maps, number).flatten(1).T
        np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.boxes, tile(number, number) * (90, 60, 90, 60), rtol=1e-6)
    np.testing.assert_allclose(wrap(sources["resnet"], grid=4).detect([image])[0].features, native.features)


def test_tiles_go_row_by_row() -> None:
    np.testing.assert_allclose(tile(1, 2), [[0, 0, 0.5, 1], [0.5, 0, 1, 1]])
    np.testing.assert_allclose(tile(2, 1), [[0, 0, 1, 0.5], [0, 0.5, 1, 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_features_at_given_boxes_are_means_of_the_cells_in_them(grids: dict[str, GridFeatures], kind: str) -> None:
    grid, images = grids[kind], [picture(), picture(50, 80, 1)]
    first, second = grid.detect(images)
    halves = np.array([[0, 0, 45, 60], [0, 0, 90, 60]], np.float32)
    at_first, at_second = grid.regions_at(images, [np.concatenate([first.boxes, halves]), np.zeros((0, 4), np.float32)])
    np.testing.assert_allclose(at_first.features[:-2], first.features, rtol=1e-3, atol=1e-5)
    cells = first.features.reshape(*grid.config.cells, -1)
    left = cells[:, : grid.config.columns // 2].mean((0, 1))
    np.testing.assert_allclose(at_first.features[-2:], [left, cells.mean((0, 1))], rtol=1e-3, atol=1e-5)
    assert at_second.features.shape == (0, second.features.shape[1])
    assert at_second.size == (50, 80)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_grid_needs_its_source_no_more(sources: dict[str, Path], tmp_path: Path, kind: str) -> None:
    source = tmp_path / sources[kind].name
    (shutil.copy if sources[kind].is_file() else shutil.copytree)(sources[kind], source)
    made = wrap(source, grid=2, side=64)
    made.save(tmp_path / "grid")
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    loaded = load_detector(tmp_path / "grid")
    assert isinstance(loaded, GridFeatures)
    assert loaded.config == made.config
    assert loaded.fingerprint == made.fingerprint
    assert (loaded.class_names, loaded.attribute_names, loaded.feature_size) == ((), (), made.feature_size)
    (first,), (second,) = (grid.detect([picture()]) for grid in (made, loaded))
    np.testing.assert_array_equal(first.features, second.features)


def test_the_fingerprint_is_that_of_the_features(sources: dict[str, Path], grids: dict[str, GridFeatures]) -> None:
    found = {grid.fingerprint for grid in grids.values()}
    found |= {wrap(sources[kind], grid=2).fingerprint for kind in ("vit", "torchvision")}
    found |= {wrap(sources[kind], side=96).fingerprint for kind in ("vit", "torchvision")}
    assert len(found) == len(KINDS) + 4
    assert wrap(sources["vit"]).fingerprint in found


def test_another_size_of_input(sources: dict[str, Path]) -> None:
    for kind, cells in {"vit": 6, "swin": 6, "dinov2": 6, "clip": 6, "convnext": 3, "torchvision": 3}.items():
        grid = wrap(sources[kind], side=96)
        assert grid.config.cells == (cells, cells), kind
        assert len(grid.detect([picture()])[0]) == cells**2
    assert wrap(sources["torchvision"]).config.cells == (14, 14)


# ------------------------------------------------------------------------------------------- from a photo to an answer


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_from_the_command_line_to_an_answer(world: Any, sources: dict[str, Path], tmp_path: Path) -> None:
    done = run("detect", "grid", sources["vit"], "--grid", 2, "--out", tmp_path / "grid", "--json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.output)
    assert (shown["feature map"], shown["regions"]) == ("4 x 4", "2 x 2")
    store = tmp_path / "regions"
    done = run("regions", "extract", world.scenes / "images", "--detector", tmp_path / "grid", "--out", store)
    assert done.exit_code == 0, done.output
    opened = NativeStore.open(store)
    assert (opened.fingerprint, opened.class_names) == (shown["fingerprint"], ())
    assert "probs" not in opened.fields
    config = configs.override(
        FINETUNING["visualbert-vqa-scenes"](), [*world.settings, "encoder.feature_size=16", "train.max_steps=1"]
    )
    finetune(config, tmp_path / "run", data=world.scenes, store=store, device="cpu")
    answer = api.load(tmp_path / "run", device="cpu").answer(world.picture(), "what colour is the star?")
    assert len(answer.regions) == 4
    target = tmp_path / "cards"
    done = run("predict", "--run", tmp_path / "run", world.picture(), "how many stars are there?", "--out", target)
    assert done.exit_code == 0, done.output
    with Image.open(next(target.glob("*.png"))) as card:
        assert card.size[0] > 0
    given = ["--boxes", world.scenes / "vcr" / "vcr1images", "--detector", tmp_path / "grid"]
    done = run("regions", "extract", world.scenes / "images", *given, "--out", tmp_path / "given")
    assert done.exit_code == 0, done.output
    assert NativeStore.open(tmp_path / "given").fingerprint == shown["fingerprint"]


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_grid_that_the_map_does_not_have(sources: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"4 x 4 cells .* a grid of 5 x 5 .* from 1 to 4"):
        wrap(sources["vit"], grid=5)
    grid = wrap(sources["vit"], grid=3)
    grid.limit_regions(least=9, most=9)
    for limits in ({"least": 10}, {"most": 8}):
        with pytest.raises(ConfigError, match="3 x 3 cells in every picture, 9 regions"):
            grid.limit_regions(**limits)


def test_a_size_that_the_backbone_cannot_read(sources: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="cannot read pictures of 8 x 8 pixels"):
        wrap(sources["vit"], side=8)


def test_what_is_no_backbone(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        wrap(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"states for a picture of .* they make no grid"):
        wrap(save_detector("yolos", tmp_path / "yolos"))
    weights = torch.load(sources["torchvision"], weights_only=True)
    basic = {name: value for name, value in weights.items() if "conv3" not in name}
    torch.save(basic, tmp_path / "resnet18.pth")
    with pytest.raises(CheckpointError, match=r"has no layer1\.0\.conv3\.weight\. Give the weights of a ResNet-50"):
        wrap(tmp_path / "resnet18.pth")
    torch.save({n: v for n, v in weights.items() if not n.startswith("layer4.2")}, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"2 bottlenecks in layer4, expected 3"):
        wrap(tmp_path / "short.pth")
    grouped = {**weights, "layer2.0.conv2.weight": weights["layer2.0.conv2.weight"][:, :2]}
    torch.save(grouped, tmp_path / "resnext.pth")
    with pytest.raises(CheckpointError, match="is no plain ResNet"):
        wrap(tmp_path / "resnext.pth")
    (tmp_path / "cut.pth").write_bytes(sources["torchvision"].read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        wrap(tmp_path / "cut.pth")


def test_a_damaged_folder(sources: dict[str, Path], tmp_path: Path) -> None:
    wrap(sources["torchvision"], side=64).save(tmp_path / "grid")
    file = tmp_path / "grid" / "model.safetensors"
    weights = load_file(file)
    save_file({name: value for name, value in weights.items() if "stem" not in name}, file)
    with pytest.raises(CheckpointError, match="is damaged or not of this network"):
        load_detector(tmp_path / "grid")
    file.write_bytes(b"\x00" * 4)
    with pytest.raises(CheckpointError, match="is damaged or not of this network"):
        load_detector(tmp_path / "grid")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_detector(tmp_path / "grid")
    content = json.loads((tmp_path / "grid" / "config.json").read_text())
    for wrong in ({**content, "config": {}}, {**content, "resnet": {"blocks": [1]}}):
        (tmp_path / "grid" / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="was written by another version"):
            load_detector(tmp_path / "grid")
