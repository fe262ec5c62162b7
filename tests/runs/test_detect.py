"""Training a detector on a folder: it learns, stops on time, resumes exactly, and says what it cannot use."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.bars import SMALL
from PIL import Image

from visling import config as configs
from visling.data.annotations.instances import read_instances
from visling.errors import ConfigError, DataError, RunError
from visling.recipes.detectors import PRESETS, DetectConfig, detect_config
from visling.runs import detect as detection
from visling.runs.detect import evaluate_detector, train_detector
from visling.runs.detection_data import DetectionBatches, Samples, mirror
from visling.train.log import TIMED, read
from visling.types import Loss
from visling.vision.detector import Detector
from visling.vision.detector_losses import pad_truths
from visling.vision.region_detector import ScaledImage
from visling.vision.trainable import Truth

CONFIG = DetectConfig(detector=SMALL, batch_size=4)


TINY = (
    "batch_size=2", "detector.long_side=32", "detector.channels=[8, 12]", "detector.blocks=[0, 0]",
    "detector.anchor_sizes=[12.0]", "detector.proposal_size=8", "detector.pool_size=3", "detector.feature_size=16",
    "detector.min_regions=4",
)  # fmt: skip
"""The same size, as settings of a preset."""


def small(*settings: str) -> DetectConfig:
    """A detector that is trained in a second, by 12 updates; it is saved after each."""
    usual = ("train.max_steps=12", "train.optim.lr=0.01", "train.optim.warmup_steps=2", "train.log_every=4")
    return configs.override(CONFIG, [*usual, "train.log_seconds=none", "train.save_every=1", *settings])


def assert_same_weights(one: Detector, other: Detector) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def train_lines(run: Path) -> list[dict[str, Any]]:
    """A run's training lines without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIMED}
        for line in read(run / "log.jsonl")
        if line["kind"] == "train"
    ]


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


def test_the_first_line_says_what_is_trained_on(data: tuple[Path, Path], tmp_path: Path) -> None:
    stream = io.StringIO()
    train_detector(*data, tmp_path / "out", small("train.max_steps=2"), stream=stream, device="cpu")
    lines = stream.getvalue().splitlines()
    assert lines[0] == (
        "10 images, 10 boxes of 1 class, 2 attributes; longer side up to 32 pixels; 2 updates with 4 images each, on "
        "cpu"
    )
    assert lines[1].startswith("10 boxes are few: a detector of photographs needs thousands.")
    assert "start from a detector of photographs with --init" in lines[1]
    assert "images/s" in lines[2]
    assert "before its learning rate had risen" in stream.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_event_files_are_written_if_asked_for(data: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train_detector(*data, tmp_path / "out", small("train.max_steps=2"), device="cpu", log_to=["tensorboard"])
    assert any((tmp_path / "out" / "tensorboard").iterdir())
    train_detector(*data, tmp_path / "plain", small("train.max_steps=2"), device="cpu")
    assert not (tmp_path / "plain" / "tensorboard").exists()


def test_a_run_learns_and_leaves_a_whole_folder(data: tuple[Path, Path], tmp_path: Path) -> None:
    stream = io.StringIO()
    result = train_detector(*data, tmp_path / "out", small("train.max_steps=60"), stream=stream, device="cpu")
    assert (result.steps, result.epochs, result.stopped) == (60, 30.0, "finished")
    assert result.images == 9
    assert [path.name for path, _ in result.unreadable] == ["square_3.png"]
    assert "step 60/60  epoch 30  loss" in stream.getvalue()
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["config"]["detector"]["class_names"] == ["square"]
    assert run["parameters"] == sum(p.numel() for p in result.detector.parameters())
    lines = read(tmp_path / "out" / "log.jsonl")
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(4, 61, 4))
    assert trained[-1]["loss"] < 0.5 * trained[0]["loss"]
    assert set(trained[0]["parts"]) == {"objectness", "proposal_box", "class", "box", "attribute"}
    assert any("square_3.png" in line["message"] for line in lines if line["kind"] == "event")
    loaded = Detector.load(tmp_path / "out")
    assert loaded.fingerprint == result.detector.fingerprint
    assert loaded.config.attribute_names == ("blue", "red")
    scores = evaluate_detector(tmp_path / "out", *data, device="cpu")
    assert scores.images == 9
    assert [path.name for path, _ in scores.unreadable] == ["square_3.png"]
    assert scores.scores.recall > 0.8
    assert scores.ap["square"] == scores.scores.mean_ap > 0.5


@pytest.mark.parametrize("at", [1, 8, 11])
def test_an_interrupted_run_resumes_to_the_same_weights(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    config = small("flip_rate=0.5")
    whole = train_detector(*data, tmp_path / "whole", config, device="cpu")
    losses, original = [0], Detector.losses_scaled

    def failing(self: Detector, *arguments: object) -> Loss:
        losses[0] += 1
        if losses[0] == at:
            raise KeyboardInterrupt
        return original(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "losses_scaled", failing)
        with pytest.raises(KeyboardInterrupt):
            train_detector(*data, tmp_path / "cut", config, device="cpu")
    assert not (tmp_path / "cut" / "model").exists()
    resumed = train_detector(*data, tmp_path / "cut", config, device="cpu", resume=True)
    assert resumed.steps == 12
    assert_same_weights(whole.detector, resumed.detector)
    assert train_lines(tmp_path / "cut") == train_lines(tmp_path / "whole")


PROGRAM = """
import os, signal, sys
from pathlib import Path
from visling import config as configs
from visling.recipes.detectors import DetectConfig
from visling.runs.detect import train_detector
from visling.vision.detector import Detector

losses, original = [0], Detector.losses_scaled

def kill(self, *arguments):
    losses[0] += 1
    if losses[0] == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)

Detector.losses_scaled = kill
config = configs.from_dict(DetectConfig, eval(sys.argv[4]))
train_detector(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), config, device="cpu")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_resumes_to_the_same_weights(data: tuple[Path, Path], tmp_path: Path) -> None:
    """Saved after every third update, killed in the ninth."""
    config = small("train.save_every=3")
    whole = train_detector(*data, tmp_path / "whole", config, device="cpu")
    words = [*data, tmp_path / "cut", repr(configs.to_dict(config))]
    killed = subprocess.run([sys.executable, "-c", PROGRAM, *words], check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    newest = max(state.name for state in (tmp_path / "cut" / "last").glob("step-????????"))
    assert newest in ("step-00000003", "step-00000006"), "the last one may not have been written yet"
    resumed = train_detector(*data, tmp_path / "cut", config, device="cpu", resume=True)
    assert_same_weights(whole.detector, resumed.detector)
    assert train_lines(tmp_path / "cut") == train_lines(tmp_path / "whole")


def test_a_paused_run_stays_open_and_resumes_to_the_same_weights(data: tuple[Path, Path], tmp_path: Path) -> None:
    whole = train_detector(*data, tmp_path / "whole", small(), device="cpu")
    paused = train_detector(*data, tmp_path / "cut", small("train.max_seconds=0.05"), device="cpu")
    assert paused.stopped == "max_seconds"
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["status"] == "running"
    resumed = train_detector(*data, tmp_path / "cut", small(), device="cpu", resume=True)
    assert resumed.stopped == "finished"
    assert_same_weights(whole.detector, resumed.detector)


def test_other_settings_cannot_resume(data: tuple[Path, Path], tmp_path: Path) -> None:
    train_detector(*data, tmp_path / "out", small(), device="cpu")
    with pytest.raises(RunError, match=r"train.optim.lr was 0\.01, now 0\.02"):
        train_detector(*data, tmp_path / "out", small("train.optim.lr=0.02"), device="cpu", resume=True)
    with pytest.raises(RunError, match="is not empty"):
        train_detector(*data, tmp_path / "out", small(), device="cpu")


def test_time_bounds_a_run_and_the_rate_falls(data: tuple[Path, Path], tmp_path: Path) -> None:
    stream = io.StringIO()
    timed = small("train.max_steps=none", "train.seconds=1.0", "train.log_every=1", "train.save_every=100")
    result = train_detector(*data, tmp_path / "out", timed, device="cpu", stream=stream)
    assert 1.0 <= result.seconds < 5.0
    rates = [line["lr"] for line in train_lines(tmp_path / "out")]
    assert result.steps == len(rates) > 3
    assert rates[-1] < 0.5 * max(rates)
    assert max(rates) <= 0.01
    assert f"100%  step {result.steps}  epoch" in stream.getvalue()


def test_two_processes_train_one_detector(data: tuple[Path, Path], tmp_path: Path) -> None:
    settings = [word for setting in TINY for word in ("--set", setting)]
    command = [
        sys.executable, "-m", "visling", "detect", "train", data[0], "--annotations", data[1],
        "--out", tmp_path / "two", "--device", "cpu", "--threads", "1", "--processes", "2", "--preset",
        "scenes", "--steps", "4", *settings,
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Wrote") == 1
    assert ended.stderr.count("left out") == 2  # once in the log, once at the end
    state = json.loads((max((tmp_path / "two" / "last").glob("step-*")) / "state.json").read_text())
    assert len(state["generators"]) == 2
    assert state["position"]["global_batch"] == 4
    assert Detector.load(tmp_path / "two").config.class_names == ("square",)


def test_mirroring_moves_the_boxes_with_the_pixels() -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    truth = Truth(
        boxes=np.array([[0, 0, 1, 2], [1, 0, 4, 1]], np.float32),
        classes=np.zeros(2, int),
        attributes=np.zeros((2, 0), bool),
        has_attributes=np.zeros(2, bool),
    )
    mirrored, moved = mirror(ScaledImage(pixels=picture, size=(8, 4)), truth)
    assert moved.boxes.tolist() == [[7, 0, 8, 2], [4, 0, 7, 1]]
    assert (mirrored.pixels[:, 3] == picture[:, 0]).all()


def test_images_of_other_sizes_are_scaled_with_their_boxes(tmp_path: Path) -> None:
    """A picture of 64 x 16 is halved for a detector of long side 32, and so are its boxes."""
    Image.new("RGB", (64, 16)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 16}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 4, 20, 8]}],
        "categories": [{"id": 1, "name": "object"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    detector = Detector(CONFIG.detector)
    samples = Samples(tmp_path, read_instances(tmp_path / "a.json"), detector, cache_bytes=10**6)
    (((image,), (truth,)),) = DetectionBatches(samples, batch_size=1, seed=0)
    assert image.pixels.shape == (8, 32, 3)
    assert image.size == (64, 16)
    _, _, scale = detector._prepare_images([image])
    padded = pad_truths([truth], scale, num_attributes=0)
    assert padded.boxes.tolist() == [[[5, 2, 15, 6]]]


def test_annotations_are_recognised_by_their_content(
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
    with pytest.raises(ConfigError, match="seed must be 0 or more; found -1"):
        small("train.seed=-1")
    with pytest.raises(DataError, match="none of the 10 annotated images is in"):
        train_detector(tmp_path, annotations, tmp_path / "out", small(), device="cpu")
    assert not (tmp_path / "out").exists()
    content = json.loads(annotations.read_text())
    (tmp_path / "b.json").write_text(json.dumps({**content, "images": [], "annotations": []}))
    with pytest.raises(DataError, match="list no image"):
        train_detector(images, tmp_path / "b.json", tmp_path / "out", small(), device="cpu")
    detector = Detector(replace(CONFIG.detector, class_names=("sphere",)))
    with pytest.raises(DataError, match="class 'square', unknown to the detector"):
        evaluate_detector(detector, images, annotations, device="cpu")
    for path in images.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"none of the 10 images .* can be read"):
        train_detector(images, annotations, tmp_path / "out2", small(), device="cpu")
    assert not (tmp_path / "out2").exists(), "the corrected command can use the same folder"


def test_a_picture_of_another_size_than_annotated_is_left_out(data: tuple[Path, Path], tmp_path: Path) -> None:
    Image.new("RGB", (31, 32)).save(data[0] / "square_0.png")
    result = train_detector(*data, tmp_path / "out", small("train.max_steps=6"), device="cpu")
    assert any("31 x 32 pixels, but annotated as 32 x 32" in reason for _, reason in result.unreadable)


def test_presets_count_updates_and_give_way_to_seconds_that_are_asked_for() -> None:
    trains = {name: detect_config([], name).train for name in PRESETS}
    assert {name: (train.max_steps, train.seconds) for name, train in trains.items()} == {
        "scenes": (450, None), "nlvr": (750, None), "default": (900, None), "resnet50": (5000, None),
    }  # fmt: skip
    timed = detect_config(["train.seconds=30"], "scenes").train
    assert (timed.max_steps, timed.seconds) == (None, 30)
    both = detect_config(["train.seconds=30", "train.max_steps=5"], "scenes").train
    assert (both.max_steps, both.seconds) == (5, 30), "TrainConfig: updates replace seconds"


def test_presets_build_and_settings_are_checked() -> None:
    for name in PRESETS:
        detector = Detector(PRESETS[name]().detector)
        assert detector.config == PRESETS[name]().detector
    named = replace(PRESETS["scenes"]().detector, class_names=tuple("abcdef"))
    assert sum(p.numel() for p in Detector(named).parameters()) < 1_000_000
    assert detect_config(["detector.proposals=40", "train.max_steps=3"], "scenes").detector.proposals == 40
    with pytest.raises(ConfigError, match="Did you mean 'scenes'"):
        detect_config([], "scene")
    with pytest.raises(ConfigError, match=r"train\.max_steps must be 1 or more; found 0"):
        small("train.max_steps=0")
    with pytest.raises(ConfigError, match=r"train\.seconds must be more than 0; found 0"):
        small("train.seconds=0")
    with pytest.raises(ConfigError, match="batch_size must be 1 or more; found 0"):
        small("batch_size=0")
    with pytest.raises(ConfigError, match="flip_rate is a probability from 0 to 1; found 2"):
        small("flip_rate=2")


@pytest.fixture
def samples(data: tuple[Path, Path]) -> Samples:
    named = replace(CONFIG.detector, class_names=("square",), attribute_names=("blue", "red"))
    return Samples(data[0], read_instances(data[1]), Detector(named), cache_bytes=10**6)


def read_rest(batches: DetectionBatches) -> list[bytes]:
    """The pixels of the epoch's remaining batches."""
    return [b"".join(image.pixels.tobytes() for image in images) for images, _ in batches]


def test_batches_resume_at_any_position(samples: Samples) -> None:
    batches = DetectionBatches(samples, batch_size=2, seed=3, flip_rate=0.5)
    batches.epoch = 1
    whole = read_rest(batches)
    assert len(whole) == len(batches) == 5
    for taken in range(5):
        batches.epoch = 1
        iterator = iter(batches)
        for _ in range(taken):
            next(iterator)
        position = json.loads(json.dumps(batches.state_dict()))
        resumed = DetectionBatches(samples, batch_size=2, seed=3, flip_rate=0.5)
        resumed.load_state_dict(position)
        assert read_rest(resumed) == whole[taken:]
    batches.epoch = 2
    assert read_rest(batches) != whole
    other = DetectionBatches(samples, batch_size=2, seed=4)
    with pytest.raises(ConfigError, match="cannot resume the images: seed was 3, now it is 4"):
        other.load_state_dict(batches.state_dict())


def test_processes_share_every_batch(samples: Samples) -> None:
    whole = DetectionBatches(samples, batch_size=4, seed=3)._group_images()
    shares = [
        DetectionBatches(samples, batch_size=2, seed=3, rank=rank, world_size=2)._group_images() for rank in range(2)
    ]
    assert [sorted(first + second) for first, second in zip(*shares, strict=True)] == [sorted(one) for one in whole]
    assert DetectionBatches(samples, batch_size=40, seed=3, rank=1, world_size=4).batch_size == 2
    with pytest.raises(ConfigError, match="10 images for 11 processes"):
        DetectionBatches(samples, batch_size=4, seed=3, rank=0, world_size=11)


def test_a_batch_without_a_readable_image_is_replaced(samples: Samples) -> None:
    batches = DetectionBatches(samples, batch_size=1, seed=3)
    iterator = iter(batches)
    pictures, positions = [], []
    for (image,), _ in iterator:
        pictures.append(image.pixels.tobytes())
        positions.append(batches.state_dict())
    assert len(pictures) == len(batches) == 10  # nine can be read, so the first comes twice
    assert pictures[-1] == pictures[0]
    assert len(set(pictures)) == 9
    for taken, position in enumerate(positions[:-1], 1):
        batches.load_state_dict(position)
        assert read_rest(batches) == pictures[taken:]
