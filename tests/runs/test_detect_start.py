"""Training that starts from a detector or a ResNet: what it takes, that it resumes, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.bars import SMALL
from PIL import Image
from safetensors.torch import save_file

from visling import config as configs
from visling.errors import CheckpointError, ConfigError
from visling.recipes.detectors import PRESETS, DetectConfig, detect_config
from visling.runs.detect import evaluate_detector, train_detector
from visling.train.log import read
from visling.vision.detector import Detector
from visling.vision.detector_config import DetectorConfig, ResNetConfig
from visling.vision.detector_start import read_trainable
from visling.vision.visual_genome import VisualGenomeDetector
from visling.vision.visual_genome_config import VisualGenomeConfig


def few(*settings: str, detector: DetectorConfig | VisualGenomeConfig = SMALL) -> DetectConfig:
    usual = ("train.max_steps=4", "train.optim.lr=0.01", "train.optim.warmup_steps=1", "train.save_every=1")
    return configs.override(DetectConfig(detector=detector, batch_size=4), [*usual, *settings])


def draw(folder: Path, colours: dict[str, tuple[int, int, int]], *, images: int = 8) -> tuple[Path, Path]:
    """Squares of some colours, whose names are the classes."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    listed, annotations = [], []
    for number in range(images):
        pixels = np.full((32, 32, 3), 235, np.uint8)
        x, y = (int(v) for v in rng.integers(0, 18, 2))
        name = list(colours)[number % len(colours)]
        pixels[y : y + 14, x : x + 14] = colours[name]
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        listed.append({"id": number, "file_name": f"{number}.png", "width": 32, "height": 32})
        category = list(colours).index(name)
        annotations.append({"id": number, "image_id": number, "category_id": category, "bbox": [x, y, 14, 14]})
    categories = [{"id": number, "name": name} for number, name in enumerate(colours)]
    content = {"images": listed, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "images", folder / "instances.json"


def _last_parts(run: Path) -> dict[str, float]:
    """Mean losses of the last training line."""
    parts: dict[str, float] = [line for line in read(run / "log.jsonl") if line["kind"] == "train"][-1]["parts"]
    return parts


@pytest.fixture
def first(tmp_path: Path) -> tuple[Path, Path]:
    return draw(tmp_path / "first", {"red": (220, 30, 30), "blue": (30, 30, 220)})


@pytest.fixture
def second(tmp_path: Path) -> tuple[Path, Path]:
    return draw(tmp_path / "second", {"blue": (30, 30, 220), "green": (30, 220, 30)})


def test_a_trained_detector_is_ahead_on_other_classes(
    first: tuple[Path, Path], second: tuple[Path, Path], tmp_path: Path
) -> None:
    train_detector(*first, tmp_path / "old", few("train.max_steps=50"), device="cpu")
    stream = io.StringIO()
    start = read_trainable(tmp_path / "old").config
    assert start.class_names == ("red", "blue")
    tuned = train_detector(
        *second, tmp_path / "new", few(detector=start), init=tmp_path / "old", device="cpu",
        stream=stream,
    )  # fmt: skip
    assert tuned.detector.class_names == ("blue", "green")
    said = stream.getvalue()
    assert f"starts from {tmp_path / 'old'}" in said
    assert "1 classes and attributes of the same name: blue" in said
    assert "--init" not in said.splitlines()[-1]
    run = json.loads((tmp_path / "new" / "run.json").read_text())
    assert (run["init"], run["backbone"]) == (str(tmp_path / "old"), None)
    train_detector(*second, tmp_path / "fresh", few(), device="cpu")
    parts = [_last_parts(tmp_path / name) for name in ("new", "fresh")]
    assert parts[0]["objectness"] < 0.5 * parts[1]["objectness"], "it has known squares before"


def test_a_started_run_resumes_to_the_same_weights_without_its_start(
    first: tuple[Path, Path], second: tuple[Path, Path], tmp_path: Path
) -> None:
    train_detector(*first, tmp_path / "old", few(), device="cpu")
    whole = train_detector(*second, tmp_path / "whole", few(), init=tmp_path / "old", device="cpu")
    paused = few("train.max_seconds=0.001")
    train_detector(*second, tmp_path / "cut", paused, init=tmp_path / "old", device="cpu")
    shutil.rmtree(tmp_path / "old")
    resumed = train_detector(*second, tmp_path / "cut", few(), init=tmp_path / "old", device="cpu", resume=True)
    assert resumed.stopped == "finished"
    for (name, one), other in zip(
        whole.detector.state_dict().items(), resumed.detector.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_frozen_stages_keep_what_they_start_from(
    first: tuple[Path, Path], second: tuple[Path, Path], tmp_path: Path
) -> None:
    old = train_detector(*first, tmp_path / "old", few(), device="cpu").detector.state_dict()
    new = train_detector(*second, tmp_path / "new", few("frozen_stages=1"), init=tmp_path / "old", device="cpu")
    frozen = {name for name in old if name.startswith("backbone.levels.0.")}
    tensors = new.detector.state_dict()
    assert frozen
    assert all(torch.equal(tensors[name], old[name]) for name in frozen)
    assert not torch.equal(tensors["backbone.levels.1.0.0.weight"], old["backbone.levels.1.0.0.weight"])
    with pytest.raises(ConfigError, match="found 3, expected 0 to 2"):
        train_detector(*second, tmp_path / "none", few("frozen_stages=3"), device="cpu")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="frozen_stages must be 0 or more; found -1"):
        few("frozen_stages=-1")


def test_a_resnet_is_trained_from_a_file(first: tuple[Path, Path], tmp_path: Path) -> None:
    small = ResNetConfig(blocks=(1, 1, 1), stem_size=4, widths=(2, 3, 4, 5))
    sizes = replace(SMALL, resnet=small, stride=16)
    config = few("frozen_stages=2", detector=sizes)
    source = Detector(sizes).backbone.state_dict()
    layers = {"stages.0": "layer1", "stages.1": "layer2", "stages.2": "layer3", "head": "layer4"}
    names = {"reduce": "1", "convolve": "2", "expand": "3"}
    file = {}
    for name, tensor in source.items():
        plain = name.replace("stem.convolution", "conv1").replace("stem.norm", "bn1")
        for ours, theirs in layers.items():
            plain = plain.replace(f"{ours}.", f"{theirs}.") if plain.startswith(ours) else plain
        for ours, number in names.items():
            plain = plain.replace(f"{ours}.convolution", f"conv{number}").replace(f"{ours}.norm", f"bn{number}")
        plain = plain.replace("shortcut.convolution", "downsample.0").replace("shortcut.norm", "downsample.1")
        file[plain] = tensor.contiguous()
    save_file(file, tmp_path / "resnet.safetensors")
    trained = train_detector(*first, tmp_path / "out", config, backbone=tmp_path / "resnet.safetensors", device="cpu")
    tensors = trained.detector.state_dict()
    kept = {name for name in source if torch.equal(tensors[f"backbone.{name}"], source[name])}
    assert {name for name in source if name.startswith(("stem.", "stages.0."))} <= kept
    assert "stages.2.0.reduce.convolution.weight" not in kept
    assert {name for name in source if ".norm." in name} <= kept, "norms are frozen everywhere"
    assert Detector.load(tmp_path / "out").config.resnet == small


def test_what_cannot_start_is_refused_before_anything_is_written(first: tuple[Path, Path], tmp_path: Path) -> None:
    on_resnet = few(detector=replace(SMALL, resnet=ResNetConfig(), stride=16))
    out, gone = tmp_path / "out", tmp_path / "gone"
    with pytest.raises(ConfigError, match="learns nothing from random weights: name torchvision's file"):
        train_detector(*first, out, on_resnet, device="cpu")
    with pytest.raises(ConfigError, match="give --init or --backbone"):
        train_detector(*first, out, few(), init=gone, backbone=gone, device="cpu")
    with pytest.raises(ConfigError, match="--preset resnet50"):
        train_detector(*first, out, few(), backbone=gone, device="cpu")
    with pytest.raises(CheckpointError, match="is not a detector"):
        train_detector(*first, out, few(), init=gone, device="cpu")
    assert not out.exists()


def test_a_start_brings_its_size_and_settings_still_win() -> None:
    start = replace(SMALL, class_names=("red",), min_regions=3)
    config = detect_config(["detector.min_confidence=0.5"], "scenes", start)
    assert config.detector == replace(start, min_confidence=0.5)
    assert config.train == PRESETS["scenes"]().train
    assert detect_config([], "resnet50").frozen_stages == 2


def test_the_visual_genome_detector_is_fine_tuned_on_ones_own_boxes(second: tuple[Path, Path], tmp_path: Path) -> None:
    released = VisualGenomeDetector(
        VisualGenomeConfig(
            class_names=("blue", "tree"), attribute_names=("wet",), depth=50, stem_size=4, width=2, proposal_size=6,
            anchor_sizes=(16.0,), pool_size=4, proposals=12, candidates=40, short_side=64, long_side=64, min_regions=2,
            max_regions=8,
        )
    )  # fmt: skip
    released.save(tmp_path / "vg")
    start = read_trainable(tmp_path / "vg").config
    config = detect_config(["train.max_steps=3", "batch_size=2", "train.save_every=1"], "default", start)
    trained = train_detector(*second, tmp_path / "out", config, init=tmp_path / "vg", device="cpu")
    loaded = read_trainable(tmp_path / "out")
    assert isinstance(loaded, VisualGenomeDetector)
    assert loaded.class_names == ("blue", "green")
    assert loaded.fingerprint == trained.detector.fingerprint != released.fingerprint
    assert torch.equal(loaded.state_dict()["stem.convolution.weight"], released.stem.convolution.weight)
    assert evaluate_detector(tmp_path / "out", *second, device="cpu").images == 8
