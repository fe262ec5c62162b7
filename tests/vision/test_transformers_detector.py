"""Detectors of the transformers package as detectors of ours: equal to the package's own results, kept in a folder of
their own, and refused where they cannot serve."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.transformers_models import DETECTORS, save_backbone, save_detector
from numpy.typing import NDArray
from torch import nn
from typer.testing import CliRunner

from visling import api
from visling import config as configs
from visling.cli.app import app
from visling.errors import CheckpointError, ConfigError, RunError, VislingError
from visling.recipes.tables import FINETUNING
from visling.regions.store import NativeStore
from visling.runs.finetune import finetune
from visling.vision import transformers_detector
from visling.vision.detectors import load_detector
from visling.vision.transformers_detector import TransformersDetector, logits_to_scores, wrap
from visling.vision.transformers_files import Source

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What transformers wrote."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_detector(kind, folder / kind) for kind in DETECTORS}


@pytest.fixture(scope="module")
def detectors(folders: dict[str, Path]) -> dict[str, TransformersDetector]:
    return {kind: wrap(folder) for kind, folder in folders.items()}


def picture(width: int = 90, height: int = 60, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", DETECTORS)
def test_regions_are_those_of_the_package(
    folders: dict[str, Path], detectors: dict[str, TransformersDetector], kind: str
) -> None:
    image = picture()
    model = transformers.AutoModelForObjectDetection.from_pretrained(folders[kind]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folders[kind])
    with torch.no_grad():
        output = model(**processor(images=image, return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[image.shape[:2]])
    (found,) = detectors[kind].detect([image])
    assert found.class_confidence is not None
    assert found.classes is not None
    # Of networks with sigmoids the package lists the best pairs of query and class; our regions are among these.
    listed = found.class_confidence >= float(expected["scores"].min()) - 1e-6
    assert listed.sum() >= 4
    for box, score, label in zip(
        found.boxes[listed], found.class_confidence[listed], found.classes[listed], strict=True
    ):
        same = (expected["scores"] - float(score)).abs() < 1e-6
        same &= expected["labels"] == int(label)
        assert same.any()
        within = expected["boxes"][same].clamp(min=0).minimum(torch.tensor([90.0, 60.0] * 2))
        assert (within - torch.from_numpy(box)).abs().max(1).values.min() < 1e-3
    queries = output.logits.shape[1]
    states = output.last_hidden_state[0, -queries:].numpy()
    distances = np.abs(found.features[:, None] - states[None]).max(-1)
    assert distances.min(1).max() < 1e-5
    assert len(set(distances.argmin(1))) == len(found) == queries, "each query is one region"
    assert (np.diff(found.class_confidence) <= 0).all()


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_picture_does_not_depend_on_the_others(detectors: dict[str, TransformersDetector], kind: str) -> None:
    images = [picture(), picture(50, 80, 1), picture(90, 60, 2)]
    together, alone = detectors[kind].detect(images), [detectors[kind].detect([image])[0] for image in images]
    for first, second, image in zip(together, alone, images, strict=True):
        assert first.size == second.size == (image.shape[1], image.shape[0])
        np.testing.assert_allclose(first.boxes, second.boxes, atol=1e-3)
        np.testing.assert_allclose(first.features, second.features, atol=1e-4)
        assert (first.boxes[:, 2:] > first.boxes[:, :2]).all()
        assert (first.boxes >= 0).all()
        assert (first.boxes[:, 2:] <= first.size).all()
    assert detectors[kind].detect([]) == []


@pytest.mark.parametrize("kind", DETECTORS)
def test_pictures_are_scaled_by_many_threads_at_once(detectors: dict[str, TransformersDetector], kind: str) -> None:
    images = [picture(20 + 5 * number, 90 - 5 * number, number) for number in range(12)]
    alone = [detectors[kind].scale(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for first, second in zip(alone, pool.map(detectors[kind].scale, images), strict=True):
            assert first.size == second.size
            assert first.pixels.dtype == np.uint8
            np.testing.assert_array_equal(first.pixels, second.pixels)


def test_distributions_sum_to_one_and_name_the_best_class(detectors: dict[str, TransformersDetector]) -> None:
    for detector in detectors.values():
        (found,) = detector.detect([picture()])
        assert found.probs is not None
        assert found.probs.shape == (len(found), len(detector.class_names) + 1)
        np.testing.assert_allclose(found.probs.sum(1), 1, atol=1e-6)
        assert found.classes is not None
        np.testing.assert_array_equal(found.probs[:, :-1].argmax(1), found.classes)


def test_a_softmax_is_the_distribution_and_sigmoids_are_shared_out() -> None:
    scores, probs = logits_to_scores(torch.tensor([[1.0, 2.0, 3.0]]), has_background=True)
    torch.testing.assert_close(probs, torch.tensor([[1.0, 2.0, 3.0]]).softmax(-1))
    torch.testing.assert_close(scores, probs[:, :2])
    scores, probs = logits_to_scores(torch.tensor([[0.6, 0.2]]).logit(), has_background=False)
    torch.testing.assert_close(scores, torch.tensor([[0.6, 0.2]]))
    torch.testing.assert_close(probs, torch.tensor([[0.45, 0.15, 0.4]]))


def test_thresholds_and_limits(folders: dict[str, Path], detectors: dict[str, TransformersDetector]) -> None:
    image = picture()
    confidence = detectors["rt_detr"].detect([image])[0].class_confidence
    assert confidence is not None
    between = float(confidence[3] + confidence[4]) / 2
    strict = wrap(folders["rt_detr"], min_confidence=between, min_regions=0)
    assert len(strict.detect([image])[0]) == 4
    strict.limit_regions(least=6)
    assert len(strict.detect([image])[0]) == 6
    strict.limit_regions(least=0, most=2)
    np.testing.assert_allclose(strict.detect([image])[0].class_confidence, confidence[:2], atol=1e-5)
    assert len(wrap(folders["rt_detr"], min_confidence=1.0, min_regions=0).detect([image])[0]) == 0
    with pytest.raises(ConfigError, match="between 1 and the network's 10 queries; found 36"):
        strict.limit_regions(most=36)
    with pytest.raises(ConfigError, match=r"between 0 and max_regions \(2\); found 3"):
        strict.limit_regions(least=3)
    with pytest.raises(ConfigError, match=r"a probability, from 0 to 1; found 1\.5"):
        wrap(folders["rt_detr"], min_confidence=1.5)


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_saved_detector_needs_its_source_no_more(tmp_path: Path, kind: str) -> None:
    made = wrap(save_detector(kind, tmp_path / "source"))
    made.save(tmp_path / "detector")
    shutil.rmtree(tmp_path / "source")
    content = json.loads((tmp_path / "detector" / "config.json").read_text())
    assert content["source"] == str(tmp_path / "source")
    loaded = load_detector(tmp_path / "detector")
    assert loaded.fingerprint == made.fingerprint == content["fingerprint"]
    assert (loaded.class_names, loaded.attribute_names) == (made.class_names, ())
    assert loaded.feature_size == made.feature_size == loaded.detect([picture()])[0].features.shape[1]
    assert loaded.device == torch.device("cpu")
    (first,), (second,) = (detector.detect([picture()]) for detector in (made, loaded))
    np.testing.assert_array_equal(first.features, second.features)
    np.testing.assert_array_equal(first.boxes, second.boxes)
    loaded.save(tmp_path / "again")
    assert load_detector(tmp_path / "again").fingerprint == made.fingerprint


def test_the_fingerprint_is_that_of_the_features(folders: dict[str, Path], tmp_path: Path) -> None:
    found = {wrap(folder).fingerprint for folder in folders.values()}
    found.add(wrap(folders["detr"], min_confidence=0.5).fingerprint)
    limited = wrap(folders["detr"])
    limited.limit_regions(most=5, least=2)
    found.add(limited.fingerprint)
    other = wrap(folders["detr"])
    with torch.no_grad():
        next(other.network.parameters()).flatten()[0] += 1
    found.add(other.fingerprint)
    scaled = shutil.copytree(folders["detr"], tmp_path / "scaled")
    preparation = json.loads((scaled / "preprocessor_config.json").read_text())
    preparation["size"]["shortest_edge"] = 32
    (scaled / "preprocessor_config.json").write_text(json.dumps(preparation))
    found.add(wrap(scaled).fingerprint)
    assert len(found) == len(DETECTORS) + 4
    assert wrap(folders["detr"]).fingerprint in found


# ------------------------------------------------------------------------------------------- from a photo to an answer


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_from_the_command_line_to_an_answer(world: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    done = run("detect", "wrap", folders["rt_detr"], "--out", tmp_path / "detector", "--max-regions", 8, "--json")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.output)
    assert shown["network"] == "RTDetrForObjectDetection"
    assert (shown["queries"], shown["regions"]) == (10, "8 to 8")
    store = tmp_path / "regions"
    done = run("regions", "extract", world.scenes / "images", "--detector", tmp_path / "detector", "--out", store)
    assert done.exit_code == 0, done.output
    opened = NativeStore.open(store)
    assert opened.fingerprint == shown["fingerprint"]
    assert opened.class_names == ("cat", "dog", "bird")
    assert opened.fields["probs"].width == 4
    config = configs.override(
        FINETUNING["visualbert-vqa-scenes"](), [*world.settings, "encoder.feature_size=16", "train.max_steps=1"]
    )
    finetune(config, tmp_path / "run", data=world.scenes, store=store, device="cpu")
    answer = api.load(tmp_path / "run", device="cpu").answer(world.picture(), "what colour is the star?")
    assert len(answer.regions) == 8
    done = run("predict", "--run", tmp_path / "run", world.picture(), "how many stars are there?")
    assert done.exit_code == 0, done.output
    with pytest.raises(VislingError, match="Features of another detector"):
        api.load(tmp_path / "run", detector=world.detector, device="cpu")


# ------------------------------------------------------------------------------------------------------ what is refused


def test_given_boxes_are_refused_before_anything_is_written(
    world: Any, detectors: dict[str, TransformersDetector], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="a query chooses its own box"):
        detectors["detr"].regions_at([picture()], [np.array([[0, 0, 9, 9]], np.float32)])
    detectors["detr"].save(tmp_path / "detector")
    boxes = world.scenes / "vcr" / "vcr1images"
    words = ["--detector", tmp_path / "detector", "--boxes", boxes, "--out", tmp_path / "store"]
    done = run("regions", "extract", world.scenes / "images", *words)
    assert isinstance(done.exception, ConfigError)
    assert "visling detect grid" in str(done.exception)
    assert not (tmp_path / "store").exists()


def test_what_is_no_detector(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere.*save_pretrained"):
        wrap(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        wrap(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a vit, which is no object detector.*visling detect grid"):
        wrap(save_backbone("vit", tmp_path / "vit"))
    headless = tmp_path / "headless"
    model = transformers.AutoModelForObjectDetection.from_pretrained(folders["detr"])
    model.model.save_pretrained(headless)
    shutil.copy(folders["detr"] / "preprocessor_config.json", headless)
    with pytest.raises(CheckpointError, match=r"lacks \d+ weights of DetrForObjectDetection.*stay random"):
        wrap(headless)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the hub is not asked while offline"):
        wrap("nobody/nothing")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("preprocessor_config.json", None, r"has no preprocessor_config.json \(settings of an image processor"),
        ("preprocessor_config.json", "{", "is damaged"),
        ("preprocessor_config.json", "[]", "holds list, expected an object"),
        ("config.json", '{"format": "visling detector 1"}', "has no model_type"),
        ("config.json", '{"model_type": "nothing_known"}', "nothing_known"),
        ("config.json", b"\xff\xfe", "is damaged"),
        ("model.safetensors", None, "cannot load"),
        ("model.safetensors", b"\x10", "cannot load"),
        ("model.safetensors", "cut", "cannot load"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(
    folders: dict[str, Path], tmp_path: Path, file: str, content: str | bytes | None, message: str
) -> None:
    folder = shutil.copytree(folders["detr"], tmp_path / "source")
    if content == "cut":
        content = (folder / file).read_bytes()[:-100]
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        wrap(folder)


def test_a_damaged_detector_folder(detectors: dict[str, TransformersDetector], tmp_path: Path) -> None:
    detectors["yolos"].save(tmp_path / "detector")
    content = json.loads((tmp_path / "detector" / "config.json").read_text())
    for wrong in (
        {**content, "config": {**content["config"], "unknown": 1}},
        {**content, "network": None},
        {key: value for key, value in content.items() if key != "source"},
    ):
        (tmp_path / "detector" / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="was written by another version"):
            load_detector(tmp_path / "detector")


def test_without_transformers(
    folders: dict[str, Path],
    detectors: dict[str, TransformersDetector],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detectors["detr"].save(tmp_path / "detector")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for start in (lambda: wrap(folders["detr"]), lambda: load_detector(tmp_path / "detector")):
        with pytest.raises(ConfigError, match=r"not installed. Install it with: pip install 'visling\[hf\]'"):
            start()


def test_a_taken_folder_is_refused_before_the_network_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    done = run("detect", "wrap", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert isinstance(done.exception, RunError)


def test_a_folder_that_cannot_be_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", fail)
    done = run("detect", "wrap", folders["detr"], "--out", tmp_path / "out")
    assert isinstance(done.exception, RunError)
    assert "Permission denied" in str(done.exception)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="does not describe a detector: format is None"):
        load_detector(tmp_path / "out")  # half-written: weights, and the network's own settings


RETURNED = {"logits": 9, "pred_boxes": 4, "last_hidden_state": 2}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"logits": torch.zeros(1, 4, 3)}, "returns no pred_boxes and no last_hidden_state"),
        (
            {
                "logits": torch.zeros(1, 4, 9),
                "pred_boxes": torch.zeros(1, 4, 4),
                "last_hidden_state": torch.zeros(1, 4, 2),
            },
            "scores 9 classes, but id2label in its config.json names 2",
        ),
    ],
)
def test_a_network_that_returns_something_else(output: dict[str, Any], message: str) -> None:
    class Other(nn.Module):
        config = SimpleNamespace(id2label={0: "cat", 1: "dog"})

        def forward(self, **_: Any) -> Any:
            return SimpleNamespace(**output)

    source = Source(network=Other(), processor=lambda **_: {}, network_config={}, processor_config={})
    with pytest.raises(CheckpointError, match=message):
        transformers_detector._probe(source, "theirs")
