"""Training a detector on a folder: it learns, stops on time, resumes exactly, and says what it cannot use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visling.data.annotations.instances import read_instances
from visling.errors import ConfigError, DataError, RunError
from visling.recipes.detectors import PRESETS, DetectConfig, detect_config
from visling.runs import detect as detection
from visling.runs.detect import DetectionProgress, evaluate_detector, train_detector
from visling.runs.detection_data import Samples, _mirrored
from visling.train.log import read
from visling.types import Loss
from visling.vision.detector import Detector, DetectorConfig, Truth

TRAINING = DetectConfig(
    detector=DetectorConfig(
        long_side=32,
        channels=(8, 12),
        blocks=(0, 0),
        anchor_sizes=(12.0,),
        proposal_size=8,
        pool_size=3,
        feature_size=16,
        anchor_samples=16,
        region_samples=12,
        candidates=32,
        proposals=12,
        max_regions=8,
        min_confidence=0.05,
    ),
    steps=12,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=2,
    log_every=4,
    save_every=0.0,
)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """Ten images of a red or a blue square, one of them unreadable."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    for number in range(10):
        pixels = np.full((32, 32, 3), 235, np.uint8)
        x, y = (int(v) for v in rng.integers(0, 18, 2))
        blue = number % 2 == 1
        pixels[y : y + 14, x : x + 14] = (30, 30, 220) if blue else (220, 30, 30)
        Image.fromarray(pixels).save(tmp_path / "images" / f"square_{number}.png")
        images.append({"id": number, "file_name": f"square_{number}.png", "width": 32, "height": 32})
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 5,
                "bbox": [x, y, 14, 14],
                "attributes": ["blue" if blue else "red"],
            }
        )
    (tmp_path / "images" / "square_3.png").write_bytes(b"")
    content = {"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "square"}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path / "images", tmp_path / "instances.json"


def test_a_run_learns_and_leaves_a_whole_folder(data: tuple[Path, Path], tmp_path: Path) -> None:
    reports: list[DetectionProgress] = []
    result = train_detector(*data, tmp_path / "out", replace(TRAINING, steps=60), progress=reports.append, device="cpu")
    assert result.steps == 60
    assert result.images == 9
    assert [path.name for path, _ in result.unreadable] == ["square_3.png"]
    assert reports[-1].loss < 0.5 * reports[0].loss
    assert reports[-1].share == 1
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["config"]["detector"]["class_names"] == ["square"]
    assert run["parameters"] == sum(p.numel() for p in result.detector.parameters())
    lines = read(tmp_path / "out" / "log.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(4, 61, 4))
    assert any("square_3.png" in line["message"] for line in lines if line["kind"] == "event")
    loaded = Detector.load(tmp_path / "out")
    assert loaded.fingerprint == result.detector.fingerprint
    assert loaded.config.attribute_names == ("blue", "red")
    scores = evaluate_detector(tmp_path / "out", *data, device="cpu")
    assert scores.images == 9
    assert [path.name for path, _ in scores.unreadable] == ["square_3.png"]
    assert scores.scores.recall > 0.8
    assert scores.ap["square"] == scores.scores.mean_ap > 0.5


def test_a_killed_run_resumes_to_the_same_weights(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_detector(*data, tmp_path / "whole", TRAINING, device="cpu")
    losses, original = [0], Detector.losses

    def failing(self: Detector, *arguments: object) -> Loss:
        losses[0] += 1
        if losses[0] == 8:
            raise KeyboardInterrupt
        return original(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "losses", failing)
        with pytest.raises(KeyboardInterrupt):
            train_detector(*data, tmp_path / "cut", TRAINING, device="cpu")
    assert not (tmp_path / "cut" / "model").exists()
    resumed = train_detector(*data, tmp_path / "cut", TRAINING, device="cpu", resume=True)
    assert resumed.steps == 12
    for (name, a), b in zip(whole.detector.state_dict().items(), resumed.detector.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_other_settings_cannot_resume(data: tuple[Path, Path], tmp_path: Path) -> None:
    train_detector(*data, tmp_path / "out", TRAINING, device="cpu")
    with pytest.raises(RunError, match=r"learning_rate was 0\.01, now 0\.02"):
        train_detector(*data, tmp_path / "out", replace(TRAINING, learning_rate=0.02), device="cpu", resume=True)
    with pytest.raises(RunError, match="is not empty"):
        train_detector(*data, tmp_path / "out", TRAINING, device="cpu")


def test_time_bounds_a_run_and_the_rate_falls(data: tuple[Path, Path], tmp_path: Path) -> None:
    rates = []
    timed = replace(TRAINING, steps=None, seconds=1.0, log_every=1, save_every=100.0)
    result = train_detector(
        *data, tmp_path / "out", timed, device="cpu", progress=lambda report: rates.append(report.learning_rate)
    )
    assert 1.0 <= result.seconds < 5.0
    assert result.steps == len(rates) > 3
    assert rates[-1] < 0.5 * max(rates)
    assert max(rates) <= 0.01


def test_mirroring_moves_the_boxes_with_the_pixels() -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    truth = Truth(
        boxes=np.array([[0, 0, 1, 2], [1, 0, 4, 1]], np.float32),
        classes=np.zeros(2, int),
        attributes=np.zeros((2, 0), bool),
        has_attributes=np.zeros(2, bool),
    )
    mirrored, moved = _mirrored(picture, truth)
    assert moved.boxes.tolist() == [[3, 0, 4, 2], [0, 0, 3, 1]]
    assert (mirrored[:, 3] == picture[:, 0]).all()


def test_images_of_other_sizes_are_scaled_with_their_boxes(tmp_path: Path) -> None:
    """A picture of 64 x 16 is halved for a detector of long side 32, and so are its boxes."""
    Image.new("RGB", (64, 16)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 16}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 4, 20, 8]}],
        "categories": [{"id": 1, "name": "object"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    samples = Samples(tmp_path, read_instances(tmp_path / "a.json"), TRAINING.detector, cache_bytes=10**6)
    ((picture, truth),) = samples.load((0, 0, [0]), 0, 0.0)
    assert picture.shape == (8, 32, 3)
    assert truth.boxes.tolist() == [[5, 2, 15, 6]]


def test_annotations_are_told_by_their_content(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(data[1].read_text())
    folder = tmp_path / "train"
    (folder / "images" / "0").mkdir(parents=True)
    file = folder / "train.json"
    for indent in (None, 1):  # COCO's files are one line; others spread theirs over many
        file.write_text(json.dumps(content, indent=indent))
        assert [record.file_name for record in detection.read_annotations(file).records] == [
            image["file_name"] for image in content["images"]
        ]
    item = {"x_loc": 5, "y_loc": 7, "size": 20, "type": "circle", "color": "Yellow"}
    file.write_text(json.dumps({"identifier": "1-0", "directory": "0", "structured_rep": [[item], [], []]}) + "\n")
    Image.new("RGB", (400, 100)).save(folder / "images" / "0" / "train-1-0-0.png")
    assert detection.read_annotations(file).category_names == ("circle", "square", "triangle")
    monkeypatch.chdir(folder)
    assert len(detection.read_annotations(Path("train.json")).records) == 1
    file.rename(folder / "other.json")
    with pytest.raises(DataError, match=r"other.json is of NLVR's layout: its name must be that of its folder"):
        detection.read_annotations(folder / "other.json")
    file.write_text("{")
    with pytest.raises(DataError, match=r"train.json is truncated or not JSON"):
        detection.read_annotations(file)
    with pytest.raises(DataError, match="no annotation file"):
        detection.read_annotations(folder / "gone.json")


def test_unusable_data_is_refused(data: tuple[Path, Path], tmp_path: Path) -> None:
    images, annotations = data
    with pytest.raises(ConfigError, match="the seed is -1"):
        train_detector(*data, tmp_path / "out", TRAINING, seed=-1, device="cpu")
    with pytest.raises(DataError, match="none of the 10 annotated images is in"):
        train_detector(tmp_path, annotations, tmp_path / "out", TRAINING, device="cpu")
    assert not (tmp_path / "out").exists()
    content = json.loads(annotations.read_text())
    (tmp_path / "b.json").write_text(json.dumps({**content, "images": [], "annotations": []}))
    with pytest.raises(DataError, match="list no image"):
        train_detector(images, tmp_path / "b.json", tmp_path / "out", TRAINING, device="cpu")
    detector = Detector(replace(TRAINING.detector, class_names=("sphere",)))
    with pytest.raises(DataError, match="class 'square', unknown to the detector"):
        evaluate_detector(detector, images, annotations, device="cpu")
    for path in images.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"none of the 10 images .* can be read"):
        train_detector(images, annotations, tmp_path / "out2", TRAINING, device="cpu")


def test_a_picture_of_another_size_than_annotated_is_left_out(data: tuple[Path, Path], tmp_path: Path) -> None:
    Image.new("RGB", (31, 32)).save(data[0] / "square_0.png")
    result = train_detector(*data, tmp_path / "out", replace(TRAINING, steps=6), device="cpu")
    assert any("31 x 32 pixels, but annotated as 32 x 32" in reason for _, reason in result.unreadable)


def test_presets_build_and_settings_are_checked() -> None:
    for name in PRESETS:
        detector = Detector(PRESETS[name].detector)
        assert detector.config == PRESETS[name].detector
    assert (
        sum(p.numel() for p in Detector(replace(PRESETS["scenes"].detector, class_names=tuple("abcdef"))).parameters())
        < 1_000_000
    )
    assert detect_config(["detector.proposals=40", "steps=3"], "scenes").detector.proposals == 40
    with pytest.raises(ConfigError, match="Did you mean 'scenes'"):
        detect_config([], "scene")
    with pytest.raises(ConfigError, match="steps is 0"):
        replace(TRAINING, steps=0)
    with pytest.raises(ConfigError, match="flip_rate is 2"):
        replace(TRAINING, flip_rate=2.0)
