"""Fine-tuning and evaluation on a tiny world: exact resume, scores and files, what is refused and how it says so."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from visling import config as configs
from visling.data.answers import AnswerVocabulary
from visling.data.text import Tokenizer
from visling.errors import CheckpointError, ConfigError, DataError, RunError, StoreError
from visling.pretrained import convert as conversion
from visling.pretrained.folder import read_model_folder
from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import FINETUNING, PRETRAINING
from visling.regions.copying import subset
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs import pretrain as pretraining
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune, fit_to_family
from visling.types import RegionArray

LONG = " ".join(["how many stars are there and"] * 50)  # 300 words


def tiny(world: Any, *settings: str) -> FinetuneConfig:
    return configs.override(FINETUNING["visualbert-vqa-scenes"](), [*world.settings, *settings])


@pytest.fixture
def vqa(world: Any, tmp_path: Path) -> Path:
    """A run that may be written to."""
    return Path(shutil.copytree(world.vqa, tmp_path / "vqa"))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_weights(first: Path, second: Path) -> None:
    last = max((first / "last").glob("step-*")).name
    for part in ("model", f"last/{last}"):
        a, b = (load_file(run / part / "model.safetensors") for run in (first, second))
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name]), f"{part}: {name} differs by up to {(tensor - b[name]).abs().max():.3g}"


# Exact resume

LONGER = ("train.max_steps=14", "encoder.dropout_rate=0.1", "train.save_every=1", "train.validate_every=1")


@pytest.fixture(scope="module")
def uninterrupted(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    finetune(tiny(world, *LONGER), out, data=world.scenes, store=world.regions, init=world.pretrained, device="cpu")
    return out


def resume(world: Any, out: Path, *settings: str) -> Any:
    return finetune(
        tiny(world, *LONGER, *settings),
        out,
        data=world.scenes,
        store=world.regions,
        init=world.pretrained,
        device="cpu",
        resume=True,
    )


def test_a_run_stopped_by_its_time_limit_goes_on_bit_for_bit(world: Any, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    limited = tiny(world, *LONGER, "train.max_seconds=0.005")
    state = finetune(limited, out, data=world.scenes, store=world.regions, init=world.pretrained, device="cpu")
    assert state.stopped == "max_seconds"
    assert state.step < 14
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert "resume with --resume" in (out / "log.jsonl").read_text()
    assert resume(world, out).stopped == "finished"
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert_same_weights(uninterrupted, out)


def test_a_run_killed_after_its_last_update_still_gets_its_detector(
    world: Any, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(
                tiny(world, *LONGER), out, data=world.scenes, store=world.regions, init=world.pretrained, device="cpu"
            )
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    assert not (out / "model" / "detector").exists()
    assert resume(world, out).stopped == "finished"
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    kept, expected = (
        {file.name for file in (folder / "model" / "detector").rglob("*")} for folder in (out, uninterrupted)
    )
    assert kept == expected
    assert "model.safetensors" in kept
    assert_same_weights(uninterrupted, out)


class _Interrupting(io.StringIO):
    """A terminal at which Ctrl-C is pressed when a line appears."""

    def write(self, text: str) -> int:
        if text.startswith("step 6/"):
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interrupted_run_goes_on_bit_for_bit(world: Any, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        finetune(
            tiny(world, *LONGER),
            out,
            data=world.scenes,
            store=world.regions,
            init=world.pretrained,
            device="cpu",
            stream=_Interrupting(),
        )
    assert json.loads((max((out / "last").glob("step-*")) / "state.json").read_text())["state"]["step"] == 5
    resume(world, out, "train.log_every=1")
    assert_same_weights(uninterrupted, out)
    steps = [
        line["step"]
        for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if line["kind"] == "train"
    ]
    assert steps == sorted(set(steps))


def test_a_killed_process_goes_on_bit_for_bit(world: Any, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [
        "finetune",
        "--recipe",
        "visualbert-vqa-scenes",
        "--data",
        world.scenes,
        "--store",
        world.regions,
        "--init",
        world.pretrained,
    ]
    settings = [word for setting in (*world.settings, *LONGER, "train.log_every=1") for word in ("--set", setting)]
    command = [sys.executable, "-m", "visling", *map(str, words), *settings, "--device", "cpu", "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list((out / "last").glob("step-????????")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait(timeout=60)
    assert list((out / "last").glob("step-????????"))
    resume(world, out)
    assert_same_weights(uninterrupted, out)


def test_resuming_a_finished_run_changes_no_weight(world: Any, uninterrupted: Path, tmp_path: Path) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    state = resume(world, out)
    assert (state.step, state.stopped) == (14, "finished")
    assert_same_weights(uninterrupted, out)


def test_a_second_run_into_the_same_folder_changes_nothing(world: Any, vqa: Path) -> None:
    before = everything(vqa)
    with pytest.raises(RunError, match=r"is not empty.*Use another --out, continue it with --resume, or delete"):
        finetune(tiny(world), vqa, data=world.scenes, store=world.regions, device="cpu")
    assert everything(vqa) == before


def test_resuming_nothing_or_with_other_settings_is_refused(world: Any, vqa: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to resume"):
        resume(world, tmp_path / "new")
    before = everything(vqa)
    with pytest.raises(RunError, match=r"train.max_steps was 4, now 14"):
        resume(world, vqa)
    assert everything(vqa) == before


# What is trained


def test_weights_come_from_the_pretrained_encoder(world: Any, tmp_path: Path) -> None:
    run = tiny(world, "train.max_steps=1", "train.optim.lr=1e-12", "train.optim.weight_decay=0.0")
    finetune(run, tmp_path / "run", data=world.scenes, store=world.regions, init=world.pretrained, device="cpu")
    before, after = (
        read_model_folder(world.pretrained).encoder().state_dict(),
        read_model_folder(tmp_path / "run").encoder().state_dict(),
    )
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_the_answer_head_starts_from_that_of_pretraining(world: Any, tmp_path: Path) -> None:
    size = [
        "batch_size=8",
        "train.max_steps=1",
        "train.precision=fp32",
        "train.optim.lr=1e-12",
        "train.optim.weight_decay=0.0",
    ]
    asked = configs.override(PRETRAINING["lxmert-scenes"](), [*size, "min_answer_count=3"])
    pretraining.pretrain(asked, tmp_path / "pretrained", data=[str(world.scenes)], store=world.regions, device="cpu")
    before = read_model_folder(tmp_path / "pretrained")
    table = before.state["answers"]

    def tuned(name: str, init: Path, *settings: str) -> tuple[list[str], list[str], Any]:
        out = tmp_path / name
        run = configs.override(FINETUNING["lxmert-vqa-scenes"](), [*size, *settings])
        finetune(run, out, data=world.scenes, store=world.regions, init=init, device="cpu")
        saved = read_model_folder(out)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [line["message"] for line in lines if line["kind"] == "event"], saved.state["answers"], saved.weights

    events, answers, after = tuned("tuned", tmp_path / "pretrained")
    shared = [answer for answer in answers if answer in table]
    assert 0 < len(shared) < len(answers)
    assert (
        f"the answer head starts from that of pre-training: {len(shared)} of {len(answers)} answers carried over"
        in events
    )
    for name in ("dense.weight", "norm.bias"):
        torch.testing.assert_close(
            after[f"heads.classify.{name}"], before.weights[f"objectives.image_qa.head.{name}"], rtol=0, atol=1e-6
        )
    rows, known = after["heads.classify.linear.weight"], before.weights["objectives.image_qa.head.linear.weight"]
    for number, answer in enumerate(answers):
        expected = known[table.index(answer)] if answer in table else torch.zeros_like(known[0])
        torch.testing.assert_close(rows[number], expected, rtol=0, atol=1e-6, msg=answer)

    events, _, after = tuned("off", tmp_path / "pretrained", "carry_answers=false")
    assert not any("answer head" in event for event in events)
    assert after["heads.classify.linear.weight"].any(dim=1).all(), "random weights, no zeros"
    assert not torch.allclose(
        after["heads.classify.dense.weight"], before.weights["objectives.image_qa.head.dense.weight"], atol=1e-3
    )
    name = next(name for name in after if name.startswith("encoder.pooler."))
    torch.testing.assert_close(after[name], before.weights[name], rtol=0, atol=1e-6)

    nameless = shutil.copytree(tmp_path / "pretrained" / "model", tmp_path / "nameless")
    (nameless / "answers.json").unlink()
    events, _, after = tuned("fresh", nameless)
    assert any("does not say which answers its outputs stand for" in event for event in events)
    assert after["heads.classify.linear.weight"].any(dim=1).all()


def test_vlbert_starts_a_task_as_its_release_does(world: Any, tmp_path: Path) -> None:
    still = [
        "encoder=tiny",
        "any_features=true",
        "batch_size=8",
        "train.max_steps=1",
        "train.precision=fp32",
        "train.optim.lr=1e-12",
        "train.optim.weight_decay=0.0",
    ]
    run = configs.override(PRETRAINING["vlbert-scenes"](), still)
    pretraining.pretrain(run, tmp_path / "pretrained", data=[str(world.scenes)], store=world.regions, device="cpu")
    before = read_model_folder(tmp_path / "pretrained").weights

    def tuned(name: str, *settings: str) -> tuple[list[str], Any, Any]:
        tuning = configs.override(FINETUNING["vlbert-vqa-scenes"](), [*still, *settings])
        out = tmp_path / name
        finetune(tuning, out, data=world.scenes, store=world.regions, init=tmp_path / "pretrained", device="cpu")
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        saved = read_model_folder(out)
        return [line["message"] for line in lines if line["kind"] == "event"], saved.state.get("answers"), saved.weights

    events, answers, after = tuned("vqa")
    assert f"the {len(answers)} answers of head classify start from their word vectors" in events
    assert "the transform of head classify starts from that of masked words" in events
    words, tokenizer = before["encoder.embeddings.words.weight"], Tokenizer()
    for row, answer in zip(after["heads.classify.linear.weight"], answers, strict=True):
        torch.testing.assert_close(row, words[tokenizer.encode(answer)].mean(0), rtol=0, atol=1e-6, msg=answer)
    for name in ("dense.weight", "norm.bias"):
        learnt = before[f"objectives.masked_lm.head.{name}"]
        torch.testing.assert_close(after[f"heads.classify.transform.{name}"], learnt, rtol=0, atol=1e-6)
    segments = [f"encoder.embeddings.segments.{number}" for number in (0, 1)]
    torch.testing.assert_close(after[segments[1]], before[segments[1]], rtol=0, atol=1e-6)

    events, _, after = tuned("off", "release_start=false")
    assert not any("word vectors" in event for event in events)
    assert not torch.allclose(after["heads.classify.linear.weight"][0], words[tokenizer.encode(answers[0])].mean(0))

    toy = ['task="fixtures.toy_tasks"', "train.validate_every=1"]
    events, _, after = tuned("score", *toy, 'task_settings={kind = "score"}')
    assert "segment B, which pre-training never uses, starts as a copy of A" in events
    torch.testing.assert_close(after[segments[1]], before[segments[0]], rtol=0, atol=1e-6)
    events, _, after = tuned("regions", *toy, 'task_settings={kind = "regions"}')
    learnt = before["objectives.masked_regions.head.transform.dense.weight"]
    (name,) = [name for name in after if name.startswith("heads.") and name.endswith("transform.dense.weight")]
    torch.testing.assert_close(after[name], learnt, rtol=0, atol=1e-6)


def test_part_of_the_examples_is_the_same_part_every_time(world: Any, tmp_path: Path) -> None:
    run = tiny(world, "train_limit=8", "train.max_steps=2")
    for name in ("one", "other"):
        finetune(run, tmp_path / name, data=world.scenes, store=world.regions, device="cpu")
    assert json.loads((tmp_path / "one" / "run.json").read_text())["examples"]["train"] == 8
    assert_same_weights(tmp_path / "one", tmp_path / "other")


def test_images_that_other_tasks_test_on_are_left_out_of_training(world: Any, tmp_path: Path) -> None:
    whole = json.loads((world.vqa / "run.json").read_text())["examples"]
    with (world.scenes / "annotations" / "v2_OpenEnded_scenes_train_questions.json").open() as file:
        questions = json.load(file)["questions"]
    removed = questions[0]["image_id"]
    (tmp_path / "images.txt").write_text(f"{removed}\n")
    run = tiny(world, f"without_images={tmp_path / 'images.txt'}", "train.max_steps=2")
    stream = io.StringIO()
    out = tmp_path / "run"
    finetune(run, out, data=world.scenes, store=world.regions, device="cpu", stream=stream)
    left_out = sum(question["image_id"] == removed for question in questions)
    said = f"{left_out} training examples of the images in {tmp_path / 'images.txt'} are left out"
    assert said in stream.getvalue()
    trained = json.loads((out / "run.json").read_text())["examples"]
    assert trained == {"train": whole["train"] - left_out, "valid": whole["valid"]}
    (tmp_path / "images.txt").unlink()
    assert evaluate(out, split="test", device="cpu")["scores"]  # the list is for training alone


def test_the_detector_is_kept_beside_the_model(world: Any) -> None:
    kept = world.vqa / "model" / "detector" / "model"
    for name in ("config.json", "model.safetensors"):
        assert (kept / name).read_bytes() == (world.detector / "model" / name).read_bytes()
    assert not list((world.vqa / "model" / "detector").rglob("*.jsonl"))


def test_text_only_needs_neither_store_nor_images(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", opened)
    data = world.annotations(tmp_path / "data")
    out = tmp_path / "run"
    finetune(tiny(world, "text_only=true"), out, data=data, store=None, init=world.pretrained, device="cpu")
    about = json.loads((out / "run.json").read_text())
    assert about["store"] is None
    assert about["config"]["encoder"]["feature_size"] == 16  # of the pre-trained model, whose weights it holds
    found = evaluate(out, split="test", device="cpu")
    assert found["text_only"] is True
    assert found["scores"]["accuracy"]["count"] == 12
    assert not (out / "model" / "detector").exists()


def test_text_only_answers_do_not_depend_on_the_image(world: Any, tmp_path: Path) -> None:
    out, data = tmp_path / "run", world.annotations(tmp_path / "data")
    finetune(tiny(world, "text_only=true"), out, data=data, store=world.regions, device="cpu")
    evaluate(out, split="test", device="cpu")
    first = (out / "details_test.jsonl").read_text()
    for kind, name in (
        ("questions", "v2_OpenEnded_scenes_test_questions.json"),
        ("annotations", "v2_scenes_test_annotations.json"),
    ):
        file = data / "annotations" / name
        content = json.loads(file.read_text())
        for entry in content[kind]:
            entry["image_id"] = 58 - entry["image_id"]  # 28, 29, 30 backwards
        file.write_text(json.dumps(content))
    evaluate(out, split="test", device="cpu", overwrite=True)
    answers = [
        [json.loads(line)["top"] for line in text.splitlines()]
        for text in (first, (out / "details_test.jsonl").read_text())
    ]
    assert answers[0] == answers[1]


def test_a_model_that_sees_needs_a_store(world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs --store.*--text-only"):
        finetune(tiny(world), tmp_path / "run", data=world.scenes, store=None, device="cpu")


def change_question(data: Path, split: str, text: str | None) -> str:
    """Replace the first question of a split; its id."""
    file = data / "annotations" / f"v2_OpenEnded_scenes_{split}_questions.json"
    content = json.loads(file.read_text())
    content["questions"][0]["question"] = text
    file.write_text(json.dumps(content))
    return str(content["questions"][0]["question_id"])


def test_long_questions_are_cut_counted_and_reported(world: Any, tmp_path: Path) -> None:
    data, out = world.annotations(tmp_path / "data"), tmp_path / "run"
    change_question(data, "val", LONG)
    change_question(data, "test", LONG)
    finetune(tiny(world), out, data=data, store=world.regions, device="cpu")
    events = [
        line["message"]
        for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if line["kind"] == "event"
    ]
    assert [event for event in events if "longer than" in event] == [
        "1 times, counted over all epochs, a text was longer than 64 word pieces and was cut"
    ]
    assert evaluate(out, split="test", device="cpu")["truncated"] == 1
    assert evaluate(out, split="train", device="cpu")["truncated"] == 0


@pytest.mark.parametrize(("split", "text"), [("train", " "), ("val", None), ("train", "\u0301\u200b")])
def test_an_empty_question_is_refused_before_training(world: Any, tmp_path: Path, split: str, text: str | None) -> None:
    data = world.annotations(tmp_path / "data")
    number = change_question(data, split, text)
    with pytest.raises(DataError, match=rf"OpenEnded_scenes_{split}_questions.json: question {number} is empty"):
        finetune(tiny(world), tmp_path / "run", data=data, store=world.regions, device="cpu")
    assert not (tmp_path / "run").exists(), "nothing has been trained"


def test_an_empty_question_is_refused_before_scoring(world: Any, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    number = change_question(data, "test", " ")
    with pytest.raises(DataError, match=rf"OpenEnded_scenes_test_questions.json: question {number} is empty"):
        evaluate(world.vqa, split="test", data=data, device="cpu")
    assert not (world.vqa / "evaluation_test.json").exists()


@pytest.mark.parametrize("name", ["v2_OpenEnded_scenes_train_questions.json", "v2_scenes_train_annotations.json"])
def test_truncated_annotations_name_the_file(world: Any, tmp_path: Path, name: str) -> None:
    data = world.annotations(tmp_path / "data")
    file = data / "annotations" / name
    file.write_text(file.read_text()[:-50])
    with pytest.raises(DataError, match=f"{name} is truncated or not JSON"):
        finetune(tiny(world), tmp_path / "run", data=data, store=world.regions, device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_missing_image_is_named_with_its_example_before_training(world: Any, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    last = max(image for image in store.ids if image.startswith("scene") and int(image[-12:]) <= 24)
    subset(store, [image for image in store.ids if image != last], tmp_path / "regions")
    with pytest.raises(
        StoreError, match=rf"example '{int(last[-12:])}\d\d\d' needs image '{int(last[-12:])}'.*nearest ids"
    ):
        finetune(tiny(world), tmp_path / "run", data=world.scenes, store=tmp_path / "regions", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["task=vqaa"], ConfigError, "no task 'vqaa'. Did you mean 'vqa'"),
        (["task=no_such.module"], ConfigError, "no task 'no_such.module'"),
        (["train_split=trian"], DataError, "found .*scenes_train_questions.json"),
        (["task_settings={min_cout = 1}"], ConfigError, "'min_cout'.*'min_count'"),
        (["task_settings={min_count = 1000}"], DataError, "no answer occurs 1000 times"),
        (["train.metric=acuracy"], ConfigError, "'acuracy'.*'accuracy'"),
        (["encoder.hidden_size=18", "encoder.num_heads=4"], ConfigError, "multiple of num_heads"),
    ],
)
def test_what_cannot_be_trained_says_why(
    world: Any, tmp_path: Path, settings: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        finetune(tiny(world, *settings), tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")


def test_starting_from_features_of_another_detector_needs_consent(world: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": world.scenes,
        "store": world.other_regions,
        "init": world.pretrained,
        "device": "cpu",
    }
    with pytest.raises(CheckpointError, match="--other-features"):
        finetune(tiny(world), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    finetune(tiny(world, "train.max_steps=1"), tmp_path / "run", other_features=True, **options)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(world: Any, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(RunError, match="fix permissions"):
        finetune(tiny(world), tmp_path / "closed" / "run", data=world.scenes, store=world.regions, device="cpu")


def test_a_file_where_the_folder_should_be_is_refused(world: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="file"):
            finetune(tiny(world), out, data=world.scenes, store=world.regions, device="cpu")
    assert (tmp_path / "file").read_text() == "x"


# Evaluation


def test_an_evaluation_leaves_scores_details_and_the_official_file(world: Any, vqa: Path) -> None:
    found = evaluate(vqa, split="test", device="cpu")
    assert found == json.loads((vqa / "evaluation_test.json").read_text())
    questions = json.loads((world.scenes / "annotations" / "v2_OpenEnded_scenes_test_questions.json").read_text())[
        "questions"
    ]
    details = [json.loads(line) for line in (vqa / "details_test.jsonl").read_text().splitlines()]
    assert [row["id"] for row in details] == [str(question["question_id"]) for question in questions]
    assert found["scores"]["accuracy"]["value"] == pytest.approx(
        100 * sum(row["score"] for row in details) / len(details), abs=0.01
    )
    assert sum(part["count"] for part in found["by"]["question_type"].values()) == len(questions)
    submission = json.loads((vqa / "predictions_test.json").read_text())
    assert submission == [{"question_id": int(row["id"]), "answer": row["prediction"]} for row in details]
    baseline = found["baselines"]["majority answer per question type"]
    assert baseline["scores"]["accuracy"]["count"] == len(questions)
    assert (found["task"], found["split"], found["truncated"], found["text_only"]) == ("vqa", "test", 0, False)


def test_a_second_evaluation_needs_consent(vqa: Path) -> None:
    evaluate(vqa, split="test", device="cpu")
    (vqa / "evaluation_test.json").write_text("{}")
    with pytest.raises(RunError, match=r"has been scored on 'test'. Use --overwrite"):
        evaluate(vqa, split="test", device="cpu")
    assert (vqa / "evaluation_test.json").read_text() == "{}"
    evaluate(vqa, split="val", device="cpu")
    evaluate(vqa, split="test", device="cpu", overwrite=True)
    assert json.loads((vqa / "evaluation_test.json").read_text())["scores"]


def test_questions_without_answers_give_a_submission_without_scores(world: Any, vqa: Path, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    (data / "annotations" / "v2_scenes_test_annotations.json").unlink()
    found = evaluate(vqa, split="test", data=data, device="cpu")
    assert found["scores"] == {}
    assert len(json.loads((vqa / "predictions_test.json").read_text())) == 12


def test_another_data_folder_need_not_hold_the_training_split(world: Any, vqa: Path, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    for file in (data / "annotations").glob("*_train_*"):
        file.unlink()
    assert evaluate(vqa, split="test", data=data, device="cpu")["baselines"]


def test_baselines_are_left_out_where_the_training_data_is_gone(world: Any, vqa: Path) -> None:
    about = json.loads((vqa / "run.json").read_text())
    (vqa / "run.json").write_text(json.dumps(about | {"data": ["/no/such/folder"]}))
    assert evaluate(vqa, split="test", data=world.scenes, device="cpu")["baselines"] == {}


def test_features_of_another_detector_are_refused_unless_asked_for(world: Any, vqa: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was trained on region features .* pass --other-features"):
        evaluate(vqa, split="test", store=world.other_regions, device="cpu")
    assert not (vqa / "evaluation_test.json").exists()
    assert evaluate(vqa, split="test", store=world.other_regions, other_features=True, device="cpu")["scores"]


def test_features_of_another_width_are_refused_all_the_same(world: Any, vqa: Path, tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "wide", feature_size=20, fingerprint="wide") as writer:
        for image in NativeStore.open(world.regions).ids:
            writer.add(
                image,
                RegionArray(
                    features=np.zeros((1, 20), np.float32), boxes=np.array([[0, 0, 9, 9]], np.float32), size=(128, 128)
                ),
            )
    with pytest.raises(StoreError, match="features of width 20, the model takes 16"):
        evaluate(vqa, split="test", store=tmp_path / "wide", other_features=True, device="cpu")


def test_a_store_without_an_image_of_the_split_is_refused(world: Any, vqa: Path, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    subset(store, store.ids[:5], tmp_path / "regions")
    with pytest.raises(StoreError, match=r"example '28\d\d\d' needs image '28'.*In all, 3 annotated images"):
        evaluate(vqa, split="test", store=tmp_path / "regions", device="cpu")


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ("nothing", CheckpointError, "no model in"),
        ("pretrained", CheckpointError, "without a task head"),
        ("detector", CheckpointError, "holds no model that pretrain or finetune wrote"),
    ],
)
def test_what_is_no_fine_tuned_run_is_refused(world: Any, part: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(world.folder / part, split="test", device="cpu")


def test_a_model_folder_is_scored_on_the_data_and_regions_given(world: Any, vqa: Path, tmp_path: Path) -> None:
    expected = evaluate(vqa, split="test", device="cpu")
    model = tmp_path / "copy"
    shutil.copytree(vqa / "model", model)
    with pytest.raises(RunError, match=r"is not a run folder, nor in one.*Give --data and --store, or the folder that"):
        evaluate(model, split="test", device="cpu")
    with pytest.raises(RunError, match=r"Give --store, or"):
        evaluate(model, split="test", data=world.scenes, device="cpu")
    found = evaluate(model, split="test", data=world.scenes, store=world.regions, device="cpu")
    assert found == expected | {"baselines": {}}
    assert (model / "details_test.jsonl").read_bytes() == (vqa / "details_test.jsonl").read_bytes()


def test_the_model_of_a_run_is_scored_on_what_its_run_names(vqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(vqa, split="test", device="cpu")
    monkeypatch.chdir(vqa)
    assert evaluate(Path("model"), split="test", device="cpu") == expected


def test_converted_weights_are_scored(recorded: Any, world: Any, tmp_path: Path) -> None:
    source = recorded("lxmert vqa")
    AnswerVocabulary([f"a{number}" for number in range(source.answers)]).save(tmp_path / "answers.json")
    given = {
        "layout": source.layout,
        "model": source.model,
        "config": source.config,
        "answers": [tmp_path / "answers.json"],
    }
    width = source.config.feature_size
    with StoreWriter(tmp_path / "regions", feature_size=width, fingerprint="theirs") as writer:
        for image in NativeStore.open(world.regions).ids:
            writer.add(
                image,
                RegionArray(
                    features=np.ones((2, width), np.float32),
                    boxes=np.array([[0, 0, 9, 9]] * 2, np.float32),
                    size=(128, 128),
                ),
            )
    converted = conversion.convert(
        source.save(tmp_path / "weights.pth"), tmp_path / "model", features=tmp_path / "regions", **given
    )
    with pytest.raises(RunError, match=r"Give --data and --store, or"):
        evaluate(converted.path, split="test", device="cpu")
    found = evaluate(converted.path, split="test", data=world.scenes, store=tmp_path / "regions", device="cpu")
    none = {"value": 0.0, "count": 12, "low": 0.0, "high": 0.0}
    assert found["scores"]["accuracy"] == none, "its answers are none of these"


def test_a_blind_model_folder_needs_no_regions(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "blind"
    finetune(tiny(world, "text_only=true"), out, data=world.scenes, store=None, init=world.pretrained, device="cpu")
    model = shutil.copytree(out / "model", tmp_path / "model")  # in no run that would know its data
    with pytest.raises(RunError, match=r"Give --data, or"):
        evaluate(model, split="test", device="cpu")
    assert evaluate(model, split="test", data=world.scenes, device="cpu")["text_only"]


def test_an_unknown_split_lists_what_is_there(world: Any) -> None:
    with pytest.raises(DataError, match=r"tst.*found .*scenes_test_questions.json"):
        evaluate(world.vqa, split="tst", device="cpu")


def test_results_that_cannot_be_written_are_an_error_with_a_way_out(vqa: Path) -> None:
    (vqa / "details_test.jsonl").mkdir()
    with pytest.raises(RunError, match=r"cannot write the results to .* --overwrite"):
        evaluate(vqa, split="test", device="cpu")
    assert not (vqa / "evaluation_test.json").exists()


def test_nlvr_writes_its_official_file(world: Any, tmp_path: Path) -> None:
    run = configs.override(
        FINETUNING["visualbert-nlvr"](), [*world.settings, "train_split=train.train", "valid_split=train.held"]
    )
    finetune(run, tmp_path / "run", data=world.nlvr, store=world.regions, device="cpu")
    found = evaluate(tmp_path / "run", split="val", device="cpu")
    rows = (tmp_path / "run" / "predictions_val.csv").read_text().splitlines()
    assert rows
    assert all(row.startswith("val-") and row.endswith((".png,true", ".png,false")) for row in rows)
    assert found["scores"]["accuracy"]["count"] >= len(rows)


# One's own data: a few questions with one answer each


def test_a_few_questions_with_one_answer_each_are_learnt_and_scored(world: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val", "test"):
        (source,) = (world.scenes / "annotations").glob(f"v2_OpenEnded_*{split}_questions.json")
        (answers,) = (world.scenes / "annotations").glob(f"v2_*_{split}_annotations.json")
        asked = json.loads(source.read_text()) | {"questions": json.loads(source.read_text())["questions"][:5]}
        given = [
            {
                "question_id": entry["question_id"],
                "image_id": entry["image_id"],
                "answers": [{"answer": entry["multiple_choice_answer"]}],
            }
            for entry in json.loads(answers.read_text())["annotations"]
        ]
        (data / f"v2_OpenEnded_own_{split}_questions.json").write_text(json.dumps(asked))
        (data / f"v2_own_{split}_annotations.json").write_text(json.dumps({"annotations": given}))
    run = tiny(world, "batch_size=32", "train.max_steps=3", "train.log_every=1")
    finetune(run, tmp_path / "run", data=data, store=world.regions, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    events = [line["message"] for line in lines if line["kind"] == "event"]
    assert "5 training examples do not fill a batch of 32: batches of 5 are used" in events
    assert sum("10 of 10 questions have fewer than 4 answers" in event for event in events) == 1
    assert all(line["loss"] >= 0 for line in lines if line["kind"] == "train")
    told = evaluate(tmp_path / "run", split="test", device="cpu")["notes"]
    assert "5 of 5 questions have fewer than 4 answers" in told[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "details_test.jsonl").read_text().splitlines()]
    assert all(row["score"] == (row["prediction"] == row["truth"]) for row in rows)


# Several splits, and settings that follow the family


def test_train_and_the_rest_of_val_are_trained_on_and_minival_validates(world: Any, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    (questions,) = (data / "annotations").glob("v2_OpenEnded_*val_questions.json")
    images = sorted({entry["image_id"] for entry in json.loads(questions.read_text())["questions"]})
    (data / "annotations" / "minival.txt").write_text(f"{images[0]}\n")
    run = tiny(world, "train_split=train+nominival", "valid_split=minival", "train.max_steps=2")
    finetune(run, tmp_path / "run", data=data, store=world.regions, device="cpu")
    counts = json.loads((tmp_path / "run" / "run.json").read_text())["examples"]
    plain = json.loads((world.vqa / "run.json").read_text())["examples"]
    assert 0 < counts["valid"] < plain["valid"]
    assert counts["train"] + counts["valid"] == plain["train"] + plain["valid"]
    found = evaluate(tmp_path / "run", split="minival", device="cpu")
    assert found["baselines"], "the majority is that of both training splits"
    assert found["scores"]["accuracy"]["count"] == counts["valid"]


@pytest.mark.parametrize(("model", "loss"), [("visualbert", "kl"), ("lxmert", "bce"), ("vlbert", "bce")])
def test_the_loss_follows_the_family(model: str, loss: str) -> None:
    config = configs.override(
        FINETUNING["visualbert-vqa"](), [f"model={model}", "encoder=tiny", "task_settings.answers=answers.txt"]
    )
    assert fit_to_family(config).task_settings["loss"] == loss
    other = configs.override(config, ["task_settings.loss=kl", "task_settings.mask_unknown=true"])
    assert fit_to_family(other) == other
    assert all(FINETUNING[f"{name}-vqa-scenes"]().task_settings["loss"] == "kl" for name in ("visualbert", model))


def test_a_published_recipe_asks_for_the_answers_of_its_release(world: Any, tmp_path: Path) -> None:
    run = configs.override(
        FINETUNING["visualbert-vqa"](),
        [*world.settings, "any_features=true", "train_split=train", "valid_split=val"],
    )
    message = r"visualbert-vqa trains on the answers of its release.*task_settings.answers=FILE.*answers_vqa.txt"
    with pytest.raises(ConfigError, match=message):
        finetune(run, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")
    (tmp_path / "answers.txt").write_text("<unk>\nyes\nno\n2\n")
    run = configs.override(run, [f"task_settings.answers={tmp_path / 'answers.txt'}", "train.max_steps=1"])
    finetune(run, tmp_path / "run", data=world.scenes, store=world.regions, device="cpu")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["config"]["task_settings"]["loss"] == "kl"
    assert FINETUNING["visualbert-vqa"]().train_split == "train+val", "as released"
    assert read_model_folder(tmp_path / "run").state["answers"] == ["<unk>", "yes", "no", "2"]


def test_mirrored_boxes_are_trained_on_and_never_validated_on(world: Any, tmp_path: Path) -> None:
    """The first update sees other boxes; with a rate of 0 the validation scores stay."""
    lines = []
    for flip in (0.0, 1.0):
        run = tiny(world, f"flip={flip}", "train.optim.lr=0.0", "train.max_steps=1", "train.log_every=1")
        finetune(run, tmp_path / str(flip), data=world.scenes, store=world.regions, device="cpu")
        lines.append([json.loads(line) for line in (tmp_path / str(flip) / "log.jsonl").read_text().splitlines()])
    trained, scored = ([[row for row in log if row["kind"] == kind] for log in lines] for kind in ("train", "valid"))
    assert trained[0][0]["loss"] != trained[1][0]["loss"]
    assert scored[0][0]["scores"] == scored[1][0]["scores"]
    with pytest.raises(ConfigError, match="flip is a share of the images"):
        tiny(world, "flip=2.0")
