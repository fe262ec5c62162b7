"""A trained model on raw images: what it answers, what it takes, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling import api
from visling import config as configs
from visling.errors import CheckpointError, ConfigError, DataError
from visling.recipes import finetuning

QUESTION = "how many objects are there?"


@pytest.fixture(scope="module")
def model(world: Any) -> api.Answerer:
    return api.load(world.vqa, device="cpu")


def test_an_answer_says_what_and_how_sure(world: Any, model: api.Answerer) -> None:
    answer = model.answer(world.picture(), QUESTION)
    assert (answer.text, answer.confidence) == answer.top[0]
    shares = [share for _, share in answer.top]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1.0001
    assert answer.question == QUESTION
    assert answer.image.size == (128, 128)
    assert 4 <= len(answer.regions) <= 8
    assert not answer.truncated
    assert "star" in model.class_names
    assert "red" in model.attribute_names


def test_raw_images_are_answered_as_in_the_evaluation(world: Any, model: api.Answerer, tmp_path: Path) -> None:
    run = shutil.copytree(world.vqa, tmp_path / "vqa")
    finetuning.evaluate(run, split="test", device="cpu")
    for row in map(json.loads, (run / "details_test.jsonl").read_text().splitlines()):
        answer = model.answer(world.scenes / "images" / "test" / f"scene_{int(row['image']):012d}.png", row["text"])
        expected = dict(row["top"])
        # the store keeps features in half precision
        for name, share in answer.top:
            assert share == pytest.approx(expected.get(name, share), abs=2e-3), name
        assert answer.confidence == pytest.approx(row["confidence"], abs=2e-3)


def test_a_path_and_its_picture_give_the_same_answer(world: Any, model: api.Answerer) -> None:
    path = world.picture()
    with Image.open(path) as picture:
        assert model.answer(picture, QUESTION).top == model.answer(str(path), QUESTION).top


def test_the_image_matters(world: Any, model: api.Answerer) -> None:
    blank = Image.new("RGB", (128, 128), "black")
    assert model.answer(blank, QUESTION).top != model.answer(world.picture(), QUESTION).top


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (2000, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1"])
def test_odd_pictures_are_answered(model: api.Answerer, size: tuple[int, int], mode: str) -> None:
    answer = model.answer(Image.new(mode, size), QUESTION)
    assert answer.text
    assert np.isfinite(answer.confidence)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n0000"])
def test_what_is_no_image_is_named(model: api.Answerer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read image .*odd.png"):
        model.answer(tmp_path / "odd.png", QUESTION)


def test_a_truncated_image_is_named(world: Any, model: api.Answerer, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(world.picture().read_bytes()[:300])
    with pytest.raises(DataError, match=r"cannot read image .*half.png \(300 bytes\)"):
        model.answer(tmp_path / "half.png", QUESTION)


def test_a_missing_image_is_named(model: api.Answerer) -> None:
    with pytest.raises(DataError, match=r"no image gone.png"):
        model.answer("gone.png", QUESTION)


@pytest.mark.parametrize("text", ["", " ", "\n", "\u200b"])
def test_an_empty_question_is_refused(world: Any, model: api.Answerer, text: str) -> None:
    with pytest.raises(DataError, match="the question is empty"):
        model.answer(world.picture(), text)


def test_a_long_question_is_cut_and_says_so(world: Any, model: api.Answerer) -> None:
    answer = model.answer(world.picture(), " ".join(["red"] * 300))
    assert answer.truncated
    # the last words that fit, before the question mark's place, the answer slot and the end
    assert answer.top == model.answer(world.picture(), " ".join(["red"] * (model.spec.max_tokens - 3))).top


def test_strange_characters_are_a_question(world: Any, model: api.Answerer) -> None:
    assert model.answer(world.picture(), "¿où 星 🙂 [MASK]?").text


def test_a_model_that_moved_brings_its_detector(world: Any, model: api.Answerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world.vqa / "model", tmp_path / "elsewhere")
    shutil.copy(world.picture(), tmp_path / "picture.png")
    loaded: list[Path] = []
    original = api.Detector.load

    def load(directory: Path, **options: Any) -> Any:
        loaded.append(directory)
        return original(directory, **options)

    monkeypatch.setattr(api.Detector, "load", load)
    monkeypatch.chdir(tmp_path)
    moved = api.load("elsewhere", device="cpu")
    assert loaded == [Path("elsewhere/detector")]
    assert moved.answer("picture.png", QUESTION).top == model.answer("picture.png", QUESTION).top


def test_another_detector_is_refused_unless_asked_for(world: Any) -> None:
    with pytest.raises(CheckpointError, match=r"was trained on region features .*--other-features"):
        api.load(world.vqa, detector=world.other_detector)
    assert api.load(world.vqa, detector=world.other_detector, other_features=True).answer(world.picture(), QUESTION).text


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("gone", "no model in"),
        ("pretrained", "without a task head. Fine-tune it first"),
        ("detector", "holds no model that pretrain or finetune wrote"),
    ],
)
def test_what_is_no_model_is_refused(world: Any, part: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        api.load(world.folder / part)


def test_a_missing_detector_is_named(world: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(world.vqa / "model", tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"gone is not a detector"):
        api.load(folder, detector=tmp_path / "gone")
    shutil.rmtree(folder / "detector")
    with pytest.raises(CheckpointError, match=r"has no detector beside it.*--detector"):
        api.load(folder)
    assert api.load(folder, detector=world.detector).answer(world.picture(), QUESTION).text


def test_an_unknown_device_is_refused(world: Any) -> None:
    with pytest.raises(ConfigError, match="unknown device 'gpu0'"):
        api.load(world.vqa, device="gpu0")


def test_a_text_only_model_answers_without_a_detector(world: Any, tmp_path: Path) -> None:
    run = configs.override(finetuning.RECIPES["visualbert-vqa-scenes"](), [*world.settings, "text_only=true"])
    finetuning.finetune(run, tmp_path / "run", data=world.scenes, store=None, device="cpu")
    model = api.load(tmp_path / "run")
    answer = model.answer(world.picture(), QUESTION)
    assert len(answer.regions) == 0
    assert answer.top == model.answer(Image.new("RGB", (9, 9)), QUESTION).top
    assert model.class_names == ()


def test_a_sentence_is_judged(world: Any, tmp_path: Path) -> None:
    run = configs.override(finetuning.RECIPES["visualbert-nlvr"](), [*world.settings, "train_split=train.train", "valid_split=train.held"])
    finetuning.finetune(run, tmp_path / "run", data=world.nlvr, store=world.regions, device="cpu", stream=io.StringIO())
    answer = api.load(tmp_path / "run").answer(next((world.nlvr / "val").rglob("*.png")), "There is a yellow item.")
    assert {name for name, _ in answer.top} == {"true", "false"}
    assert sum(share for _, share in answer.top) == pytest.approx(1)
