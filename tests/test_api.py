"""A trained model on raw images: what it answers, what it takes, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import errors
from PIL import Image

from visling import api
from visling import config as configs
from visling.api import Predictor, Question, from_pretrained
from visling.errors import CheckpointError, ConfigError, DataError
from visling.recipes.tables import FINETUNING
from visling.runs import finetune as finetuning
from visling.runs.evaluate import evaluate

QUESTION = "how many objects are there?"


@pytest.fixture(scope="module")
def model(world: Any) -> Predictor:
    return api.load(world.vqa, device="cpu")


def test_an_answer_says_what_and_how_sure(world: Any, model: Predictor) -> None:
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


def test_raw_images_are_answered_as_in_the_evaluation(world: Any, model: Predictor, tmp_path: Path) -> None:
    run = shutil.copytree(world.vqa, tmp_path / "vqa")
    evaluate(run, split="test", device="cpu")
    for row in map(json.loads, (run / "details_test.jsonl").read_text().splitlines()):
        answer = model.answer(world.scenes / "images" / "test" / f"scene_{int(row['image']):012d}.png", row["text"])
        expected = dict(row["top"])
        # the store keeps features in half precision
        for name, share in answer.top:
            assert share == pytest.approx(expected.get(name, share), abs=2e-3), name
        assert answer.confidence == pytest.approx(row["confidence"], abs=2e-3)


def test_a_path_and_its_picture_give_the_same_answer(world: Any, model: Predictor) -> None:
    path = world.picture()
    with Image.open(path) as picture:
        assert model.answer(picture, QUESTION).top == model.answer(str(path), QUESTION).top


@pytest.mark.parametrize("change", ["transparent", "turned"])
def test_a_picture_is_seen_as_its_file_is(world: Any, model: Predictor, tmp_path: Path, change: str) -> None:
    with Image.open(world.picture()) as opened:
        upright = opened.convert("RGB")
    file = tmp_path / "picture.png"
    if change == "transparent":
        layer = upright.convert("RGBA")
        layer.paste((255, 0, 0, 0), (0, 0, 128, 64))
        upright.paste("white", (0, 0, 128, 64))
        layer.save(file)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn a quarter clockwise to see it upright
        upright.crop((0, 0, 128, 96)).save(file, exif=exif)
        upright = upright.crop((0, 0, 128, 96)).transpose(Image.Transpose.ROTATE_270)
    expected = model.answer(file, QUESTION)
    with Image.open(file) as picture:
        answer = model.answer(picture, QUESTION)
        assert np.array_equal(model.detect(picture).features, expected.regions.features)
    assert answer.top == expected.top
    assert np.array_equal(answer.regions.boxes, expected.regions.boxes)
    assert answer.regions.size == upright.size
    assert np.array_equal(np.asarray(answer.image), np.asarray(upright)), "the picture shown is what was looked at"


def test_the_image_matters(world: Any, model: Predictor) -> None:
    blank = Image.new("RGB", (128, 128), "black")
    assert model.answer(blank, QUESTION).top != model.answer(world.picture(), QUESTION).top


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (2000, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1"])
def test_odd_pictures_are_answered(model: Predictor, size: tuple[int, int], mode: str) -> None:
    answer = model.answer(Image.new(mode, size), QUESTION)
    assert answer.text
    assert np.isfinite(answer.confidence)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n0000"])
def test_what_is_no_image_is_named(model: Predictor, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read image .*odd.png"):
        model.answer(tmp_path / "odd.png", QUESTION)


def test_a_truncated_image_is_named(world: Any, model: Predictor, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(world.picture().read_bytes()[:300])
    with pytest.raises(DataError, match=r"cannot read image .*half.png \(300 bytes\)"):
        model.answer(tmp_path / "half.png", QUESTION)


def test_a_missing_image_is_named(model: Predictor) -> None:
    with pytest.raises(DataError, match=r"no image gone.png"):
        model.answer("gone.png", QUESTION)


@pytest.mark.parametrize("text", ["", " ", "\n", "\u200b"])
def test_an_empty_question_is_refused(world: Any, model: Predictor, text: str) -> None:
    with pytest.raises(DataError, match="the question is empty"):
        model.answer(world.picture(), text)


def test_a_list_of_answers_is_no_state_of_a_task(world: Any, tmp_path: Path) -> None:
    shutil.copytree(world.vqa / "model", tmp_path / "model")
    (tmp_path / "model" / "answers.json").write_text('["red", "blue"]')
    with pytest.raises(CheckpointError, match=r"answers.json must hold an object .* found a list"):
        api.load(tmp_path / "model")


def test_a_long_question_is_cut_and_says_so(world: Any, model: Predictor) -> None:
    answer = model.answer(world.picture(), " ".join(["red"] * 300))
    assert answer.truncated
    # the last words that fit, before the question mark's place, the answer slot and the end
    assert answer.top == model.answer(world.picture(), " ".join(["red"] * (model.spec.max_tokens - 3))).top


def test_strange_characters_are_a_question(world: Any, model: Predictor) -> None:
    assert model.answer(world.picture(), "¿où 星 🙂 [MASK]?").text


def test_a_model_that_moved_brings_its_detector(
    world: Any, model: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.vqa / "model", tmp_path / "elsewhere")
    shutil.copy(world.picture(), tmp_path / "picture.png")
    loaded: list[Path] = []
    original = api.load_detector

    def load(directory: Path, **options: Any) -> Any:
        loaded.append(directory)
        return original(directory, **options)

    monkeypatch.setattr(api, "load_detector", load)
    monkeypatch.chdir(tmp_path)
    moved = api.load("elsewhere", device="cpu")
    assert loaded == [Path("elsewhere/detector")]
    assert moved.answer("picture.png", QUESTION).top == model.answer("picture.png", QUESTION).top


def test_another_detector_is_refused_unless_asked_for(world: Any) -> None:
    with pytest.raises(CheckpointError, match=r"was trained on region features .*--other-features"):
        api.load(world.vqa, detector=world.other_detector)
    assert (
        api.load(world.vqa, detector=world.other_detector, other_features=True).answer(world.picture(), QUESTION).text
    )


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
    with pytest.raises(CheckpointError, match=r"holds no detector.*--detector"):
        api.load(folder)
    assert api.load(folder, detector=world.detector).answer(world.picture(), QUESTION).text


def test_an_unknown_device_is_refused(world: Any) -> None:
    with pytest.raises(ConfigError, match="unknown device 'gpu0'"):
        api.load(world.vqa, device="gpu0")


def test_a_text_only_model_answers_without_a_detector(world: Any, tmp_path: Path) -> None:
    run = configs.override(FINETUNING["visualbert-vqa-scenes"](), [*world.settings, "text_only=true"])
    finetuning.finetune(run, tmp_path / "run", data=world.scenes, store=None, device="cpu")
    model = api.load(tmp_path / "run")
    answer = model.answer(world.picture(), QUESTION)
    assert len(answer.regions) == 0
    assert answer.top == model.answer(Image.new("RGB", (9, 9)), QUESTION).top
    assert answer.top == model.answer([], QUESTION).top, "it needs no image at all"
    assert model.class_names == ()


def test_an_image_file_is_looked_at_once_until_it_changes(model: api.Predictor, world: Any, tmp_path: Path) -> None:
    first, second = sorted((world.scenes / "images" / "test").glob("*.png"))[:2]
    picture = Path(shutil.copy(first, tmp_path / "a.png"))
    seen = model.answer(picture, QUESTION)
    assert model.answer(picture, "what color is it?").regions is seen.regions
    shutil.copy(second, picture)
    os.utime(picture, (1, 1))
    assert model.answer(picture, QUESTION).top == model.answer(second, QUESTION).top != seen.top


def assert_same_answers(found: list[api.Answer], expected: list[api.Answer]) -> None:
    assert [answer.question for answer in found] == [answer.question for answer in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert dict(ours.top) == pytest.approx(dict(theirs.top), abs=1e-6)
        assert np.array_equal(ours.regions.features, theirs.regions.features)
        assert (ours.truncated, ours.spelled_out, ours.notice) == (theirs.truncated, theirs.spelled_out, theirs.notice)


def test_many_questions_are_answered_as_each_alone(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, about files and open pictures, more than a batch holds; each image is looked at once."""
    files = sorted((world.scenes / "images" / "test").glob("*.png"))[:3]
    pictures = [Image.new("RGB", (60, 40), "red"), Image.open(files[0])]
    texts = [QUESTION, "what color is it?", " ".join(["red"] * 300), "qqq xyzzy"]
    asked = [Question(image, text) for text in texts for image in (*files, *pictures)] * 4
    one_by_one, model = api.load(world.vqa, device="cpu"), api.load(world.vqa, device="cpu")
    alone = [one_by_one.answer(question.images, question.text) for question in asked]
    detect, looked = Predictor._detect, []

    def note(self: Predictor, pixels: Any) -> Any:
        looked.append(pixels.shape)
        return detect(self, pixels)

    monkeypatch.setattr(Predictor, "_detect", note)
    batches: list[int] = []
    handle = model.model.encoder.register_forward_hook(lambda _, __, found: batches.append(len(found.pooled)))
    together = list(model.answer_each(asked))
    handle.remove()
    assert_same_answers(together, alone)
    assert batches == [64, 16]
    assert len(looked) == 5 + 2, "open pictures are not remembered from batch to batch"


def test_a_batch_holds_few_images(world: Any, model: api.Predictor) -> None:
    """Pictures may be large: many of them are not held at a time."""
    asked = [Question(Image.new("RGB", (20, 20), (shade, 0, 0)), QUESTION) for shade in range(20)]
    batches: list[int] = []
    handle = model.model.encoder.register_forward_hook(lambda _, __, found: batches.append(len(found.pooled)))
    assert len(list(model.answer_each(asked))) == 20
    handle.remove()
    assert batches == [8, 8, 4]


def test_questions_before_the_one_at_fault_are_answered(world: Any, model: api.Predictor) -> None:
    questions = [(world.picture(), QUESTION), (world.picture(), "what is it?"), ("gone.png", "what?")]
    answers = model.answer_each(Question(image, text) for image, text in questions)
    assert [next(answers).question, next(answers).question] == [QUESTION, "what is it?"]
    with pytest.raises(DataError, match=r"no image gone\.png"):
        next(answers)
    assert list(model.answer_each([])) == []


def test_choices_and_rankings_belong_to_their_tasks(model: api.Predictor, world: Any) -> None:
    with pytest.raises(DataError, match="task vqa reads no answers to choose from; found 2"):
        model.answer(world.picture(), QUESTION, choices=["one", "two"])
    with pytest.raises(DataError, match="task vqa does not rank images"):
        model.rank([world.picture()], QUESTION)


def test_a_task_derived_from_vqa_is_asked_in_its_layout(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_api_task"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "questions.py").write_text(
        "from visling.tasks.vqa import VQA\nclass Own(VQA):\n    name = 'own_api_task.questions'\nTASK = Own\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    answers = []
    for name, task in (("own", "own_api_task.questions"), ("plain", "vqa")):
        run = configs.override(
            FINETUNING["visualbert-vqa-scenes"](), [*world.settings, f"task={task}", "train.max_steps=2"]
        )
        finetuning.finetune(run, tmp_path / name, data=world.scenes, store=world.regions, device="cpu")
        model = api.load(tmp_path / name, device="cpu")
        asked: list[Any] = []
        kept = model.task.example
        monkeypatch.setattr(
            model.task, "example", lambda *a, kept=kept, asked=asked: asked.append(kept(*a)) or asked[-1]
        )
        answers.append(model.answer(world.picture(), QUESTION).top)
        (row,) = asked[-1].rows
        assert row.answer_at is not None, "the answer is read from its own slot"
    assert answers[0] == answers[1]


def test_a_sentence_is_judged(world: Any, tmp_path: Path) -> None:
    run = configs.override(
        FINETUNING["visualbert-nlvr"](), [*world.settings, "train_split=train.train", "valid_split=train.held"]
    )
    finetuning.finetune(run, tmp_path / "run", data=world.nlvr, store=world.regions, device="cpu", stream=io.StringIO())
    answer = api.load(tmp_path / "run").answer(next((world.nlvr / "val").rglob("*.png")), "There is a yellow item.")
    assert {name for name, _ in answer.top} == {"true", "false"}
    assert sum(share for _, share in answer.top) == pytest.approx(1)


# ----------------------------------------------------------------------------------------------------------------
# folders and the hub


def test_a_model_folder_is_read_copied_and_used_elsewhere(world: Any, model: Predictor, tmp_path: Path) -> None:
    saved = from_pretrained(world.vqa)
    assert (saved.model, saved.task) == ("visualbert", "vqa")
    assert saved.fingerprint in (saved.path / "README.md").read_text()
    assert set(saved.state["answers"]) >= {"yes", "no"}
    saved.save_pretrained(tmp_path / "copy")
    copied = {file.relative_to(tmp_path / "copy") for file in (tmp_path / "copy").rglob("*") if file.is_file()}
    assert {
        Path(name) for name in ("config.json", "model.safetensors", "vocab.txt", "answers.json", "README.md")
    } < copied
    assert any(file.parts[0] == "detector" for file in copied)
    answer = api.load(tmp_path / "copy", device="cpu").answer(world.picture(), QUESTION)
    assert answer.top == model.answer(world.picture(), QUESTION).top
    with pytest.raises(CheckpointError, match=r"copy exists and is not empty.*nothing is overwritten"):
        saved.save_pretrained(tmp_path / "copy")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        saved.save_pretrained(tmp_path / "file" / "below")
    encoder = from_pretrained(world.pretrained).encoder()
    assert encoder.config == saved.config


def test_a_model_on_the_hub_is_fetched(world: Any, model: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(world.vqa / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    answer = api.load("owner/name", device="cpu").answer(world.picture(), QUESTION)
    assert answer.top == model.answer(world.picture(), QUESTION).top
    from_pretrained("owner/name", revision="v1", offline=True)
    (_, first), (repository, second) = asked
    assert repository == "owner/name"
    assert (first["local_files_only"], second["local_files_only"], second["revision"]) == (False, True, "v1")
    assert not any(name.endswith((".bin", ".pth", ".pkl", ".py")) for name in first["allow_patterns"])


def test_the_hub_is_not_asked_while_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = r"owner/name is neither a folder here nor in the hub's cache.*not asked while offline \(HF_HUB_OFFLINE"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained("owner/name", offline=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=message):
        api.load("owner/name")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("no route"), "the hub cannot be reached: no route"),
        (errors.HFValidationError("bad name"), "cannot fetch owner/name from the hub: bad name"),
        (OSError("disk full"), "cannot fetch owner/name from the hub: disk full"),
    ],
)
def test_what_goes_wrong_on_the_hub_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def download(repository: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained("owner/name")


def test_a_repository_of_another_library_says_how_to_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lxmert"}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **options: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"holds no model that pretrain or finetune wrote.*visling convert"):
        from_pretrained("unc-nlp/lxmert-base-uncased")


def test_a_model_is_uploaded_without_anything_else(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", {"token": token}))

        def create_repo(self, repository: str, **options: Any) -> None:
            calls.append((repository, options))

        def upload_folder(self, **options: Any) -> str:
            calls.append(("upload", options))
            return "https://huggingface.co/owner/name/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    saved = from_pretrained(world.vqa)
    assert saved.push_to_hub("owner/name").endswith("/commit/1")
    assert calls[1] == ("owner/name", {"private": True, "exist_ok": True})
    upload = calls[2][1]
    assert (upload["repo_id"], upload["folder_path"]) == ("owner/name", world.vqa / "model")
    assert "config.json" in upload["allow_patterns"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"cannot upload .* while offline"):
        saved.push_to_hub("owner/name")
