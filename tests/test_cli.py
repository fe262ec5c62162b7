"""The command line, from drawn pictures to a report: exit status, messages without a trace, JSON, help that is true."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import pytest
import torch
import typer
from fixtures.toy_features import write_folder
from PIL import Image
from safetensors.torch import load_file, save_file

from visling import config as configs
from visling import models, runtime
from visling.checkpoints import catalog
from visling.cli import app
from visling.cli.printing import format_rows, slugify
from visling.errors import VislingError
from visling.pretrained.folder import read_model_folder
from visling.recipes.detectors import PRESETS
from visling.recipes.listing import list_recipes
from visling.recipes.tables import FINETUNING, MULTITASK, PRETRAINING
from visling.regions.store import NativeStore
from visling.runs import demo, evaluate
from visling.runs import finetune as finetuning
from visling.runs.compare import Comparison
from visling.scenes.drawing import STYLES
from visling.tasks.gqa import GQA


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """The output as JSON, strictly."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


Call = Callable[..., Ended]


TABLES: Mapping[str, Mapping[str, Any]] = {
    "pretrain": PRETRAINING, "finetune": FINETUNING, "multitask": MULTITASK,
}  # fmt: skip
"""Command -> its recipes."""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs a command line in an empty folder; a trace would fail the test, because nothing but SystemExit is caught."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["visling", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            app.run()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Ended(status, out, err)

    return run


def refused(ended: Ended, *words: str) -> None:
    """The command ended with status 2 and one message on stderr that has the words."""
    assert (ended.status, ended.out) == (2, ""), ended
    assert ended.err.startswith("visling: "), ended.err
    for word in words:
        assert word in ended.err, ended.err


def tiny(world: Any, *settings: str) -> list[str]:
    return [word for setting in (*world.settings, *settings) for word in ("--set", setting)]


def test_the_whole_way(call: Call, world: Any) -> None:
    drawn = call(
        "scenes",
        "--out",
        "scenes",
        "--images",
        30,
        "--seed",
        1,
        "--set",
        "processes=1",
        "--set",
        "questions_per_image=4",
        "--json",
    )
    assert drawn.json()["counts"]["train"]["images"] == 24
    detector = [
        word
        for setting in (
            "detector.feature_size=16",
            "detector.channels=[8]",
            "detector.blocks=[0]",
            "detector.min_regions=4",
        )
        for word in ("--set", setting)
    ]
    boxes = ("--annotations", "scenes/annotations/instances_train.json")
    trained = call(
        "detect",
        "train",
        "scenes/images/train",
        *boxes,
        "--preset",
        "scenes",
        "--steps",
        2,
        *detector,
        "--out",
        "detector",
        "--json",
    )
    assert trained.json() | {"seconds": 0} == {
        "images": 24, "steps": 2, "epochs": 2.0, "seconds": 0, "unreadable": 0, "unreadable_images": [],
    }  # fmt: skip
    boxes = ("--annotations", "scenes/annotations/instances_val.json")
    assert call("detect", "eval", "scenes/images/val", *boxes, "--detector", "detector", "--json").json()["images"] == 3
    (Path("scenes") / "images" / "broken.png").write_bytes(b"no picture")
    extracted = call("regions", "extract", "scenes/images", "--detector", "detector", "--out", "regions", "--json")
    assert extracted.json()["images"] == 30
    assert extracted.json()["unreadable"] == 1
    assert "broken.png" in extracted.err
    data = ("--data", "scenes", "--store", "regions")
    pretrained = call("pretrain", "--recipe", "visualbert-scenes", *data, *tiny(world), "--out", "pretrained")
    assert pretrained.status == 0
    assert pretrained.out == f"Pre-trained model in {Path('pretrained/model')}\n"
    tuned = call(
        "finetune",
        "--recipe",
        "visualbert-vqa-scenes",
        *data,
        "--init",
        "pretrained",
        *tiny(world),
        "--seed",
        5,
        "--out",
        "vqa",
    )
    assert tuned.out == f"Fine-tuned model in {Path('vqa/model')}\n"
    about = json.loads(Path("vqa/run.json").read_text())
    assert about["command"][:4] == ["visling", "finetune", "--recipe", "visualbert-vqa-scenes"]
    assert about["seed"] == about["config"]["train"]["seed"] == 5
    tune_blind = (
        "finetune",
        "--recipe",
        "visualbert-vqa-scenes",
        "--data",
        "scenes",
        "--init",
        "pretrained",
        *tiny(world),
        "--text-only",
    )
    assert call(*tune_blind, "--out", "blind").status == 0
    assert call("evaluate", "vqa", "--json").json()["scores"]["accuracy"]["count"] == 12
    scored = call("evaluate", "blind", "--split", "test").out.splitlines()
    assert scored[0] == "blind, split test, task vqa, script 2021"
    assert scored[1].startswith("accuracy ")
    refused(call("evaluate", "vqa"), "vqa/evaluation_test.json exists", "--overwrite")
    lines = call("evaluate", "vqa", "--overwrite", "--compare", "blind").out.splitlines()
    assert re.fullmatch(r"accuracy +[\d.]+ +[\d.]+ to [\d.]+ +\(12\)", lines[1])
    assert lines[2] == "majority answer per question type"
    assert (lines[4], lines[5].split()[:2]) == ("blind (text only)", scored[1].split()[:2])
    refused(call("evaluate", "blind", "--overwrite", "--compare", "pretrained"), "pretrained has not been scored")
    pictures = sorted(Path("scenes/images/test").glob("*.png"))[:2]
    answered = call("predict", "--run", "vqa", *pictures, "how many objects are there?")
    assert answered.status == 0
    for picture in pictures:
        assert f"{picture}: " in answered.out
        Image.open(f"vqa/answers/{picture.stem}-how-many-objects-are-there.png").verify()
    reported = call("report", "vqa", "--compare", "blind")
    assert reported.out == f"Wrote {Path('vqa/report.html')}\n"
    page = Path("vqa/report.html").read_text()
    assert "blind" in page
    assert page.count("<img") == 12, "every question of the test split is shown with its image"
    assert "regions drawn" in page
    refused(call("report", "vqa"), "vqa/report.html exists", "--overwrite")
    elsewhere = call("report", "vqa", "--out", "page.html", "--images", "scenes/images/train", "--store", "regions")
    assert elsewhere.out == "Wrote page.html\n"
    assert Path("page.html").read_text().count("<img") == 0, "those pictures are of another split"
    assert Path("vqa/report.html").read_text() == page
    assert call("report", "vqa", "--overwrite").status == 0
    assert Path("vqa/report.html").read_text() != page, "the other run is no longer shown next to it"


def test_the_way_without_attributes(call: Call, world: Any) -> None:
    """Boxes and categories alone make a detector, regions and answers; --json names what could not be read."""
    for split in ("train", "val"):
        content = json.loads((world.scenes / "annotations" / f"instances_{split}.json").read_text())
        del content["attributes"]
        for one in content["annotations"]:
            del one["attributes"]
        Path(f"{split}.json").write_text(json.dumps(content))
    shutil.copytree(world.scenes / "images", "images")
    broken = min(Path("images/train").glob("*.png"))
    broken.write_bytes(b"no picture")
    sizes = ("feature_size=16", "channels=[8]", "blocks=[0]", "min_regions=4")
    small = [word for size in sizes for word in ("--set", f"detector.{size}")]
    train = (
        "detect",
        "train",
        "images/train",
        "--annotations",
        "train.json",
        "--preset",
        "scenes",
        "--steps",
        4,
        "--set",
        "train.log_every=2",
    )
    trained = call(*train, *small, "--out", "detector", "--json")
    left_out = [{"image": str(broken), "reason": f"cannot read image {broken} (10 bytes)"}]
    assert [
        {**one, "reason": one["reason"].partition(":")[0]} for one in trained.json()["unreadable_images"]
    ] == left_out
    assert re.search(r"^step 2/4 .* images/s  waits \d+%  [\d.]+ GB  \d s left$", trained.err, flags=re.MULTILINE), (
        trained.err
    )
    scored = call(
        "detect", "eval", "images/val", "--annotations", "val.json", "--detector", "detector", "--json"
    ).json()
    assert (scored["images"], scored["attribute accuracy"], scored["unreadable_images"]) == (3, None, [])
    extracted = call("regions", "extract", "images", "--detector", "detector", "--out", "regions", "--json").json()
    assert (extracted["images"], [one["image"] for one in extracted["unreadable_images"]]) == (29, [str(broken)])
    shown = call("regions", "inspect", "regions", "--image", world.picture(), "--json").json()
    assert (shown["classes"], shown["attributes"]) == (9, 0)
    questions = world.annotations(Path("data")) / "annotations" / "v2_OpenEnded_scenes_train_questions.json"
    content = json.loads(questions.read_text())
    content["questions"] = [
        one for one in content["questions"] if one["image_id"] != int(broken.stem.rpartition("_")[2])
    ]
    kept = {one["question_id"] for one in content["questions"]}
    questions.write_text(json.dumps(content))
    answers = questions.with_name("v2_scenes_train_annotations.json")
    content = json.loads(answers.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["question_id"] in kept]
    answers.write_text(json.dumps(content))
    tune = (
        "finetune",
        "--recipe",
        "visualbert-vqa-scenes",
        "--data",
        "data",
        "--store",
        "regions",
        *tiny(world),
        "--out",
        "vqa",
    )
    assert call(*tune).status == 0
    answered = call("predict", "--run", "vqa", world.picture(), "how many objects are there?", "--json").json()
    assert answered["regions"] >= 4
    Image.open(answered["picture"]).verify()


@pytest.mark.parametrize(
    "words",
    [
        ("detect", "train", "i", "--annotations", "a.json", "--out", "new", "--seed", -1),
        ("scenes", "--out", "new", "--seed", -1),
        ("pretrain", "--recipe", "visualbert-scenes", "--data", "d", "--store", "s", "--out", "new", "--seed", -1),
        ("finetune", "--recipe", "visualbert-vqa-scenes", "--data", "d", "--store", "s", "--out", "new", "--seed", -1),
        ("convert", "w.pth", "--to", "new", "--seed", -1),
        ("verify", "m", "new", "--record", "--seed", -1),
    ],
)
def test_a_negative_seed_is_refused(call: Call, words: tuple[object, ...]) -> None:
    ended = call(*words)
    assert ended.status == 2
    assert re.search(r"Invalid value for '?--seed", ended.err), ended.err
    assert not Path("new").exists()


@pytest.fixture
def training(world: Any) -> list[object]:
    """A fine-tuning command without --out."""
    return [
        "finetune",
        "--recipe",
        "visualbert-vqa-scenes",
        "--data",
        world.scenes,
        "--store",
        world.regions,
        *tiny(world),
    ]


def test_a_model_is_fine_tuned_at_its_size_with_short_options(call: Call, world: Any) -> None:
    """BERT's vocabulary in pre-training, and not a word of it afterwards."""
    few = [*tiny(world), "--store", world.regions, "--data", world.scenes]
    recipe = ("--recipe", "visualbert-scenes", "--set", "encoder.vocabulary=bert-base-uncased")
    assert call("pretrain", *recipe, *few, "--lr", 0.01, "--out", "pretrained").status == 0
    started = ("finetune", "--recipe", "visualbert-vqa-scenes", "--store", world.regions, "--data", world.scenes)
    short = ("--init", "pretrained", "--epochs", 1, "--batch-size", 40, "--lr", 0.02, "--out", "run")
    assert call(*started, *short).status == 0
    config = json.loads(Path("run/run.json").read_text())["config"]
    assert (config["encoder"]["vocab_size"], config["encoder"]["hidden_size"]) == (30522, 16)
    assert (config["train"]["epochs"], config["batch_size"], config["train"]["optim"]["lr"]) == (1, 40, 0.02)
    assert (
        "unlike recipe visualbert-vqa-scenes: encoder.hidden_size 16 (recipe: 96)"
        in (Path("run") / "log.jsonl").read_text()
    )
    wrong = ("--init", "gone", "--set", "train.epoch=1", "--lr", 1, "--set", "flip=no", "--out", "new")
    refused(call(*started, *wrong), "3 problems were found", "no model in gone", "'epochs'", "'flip'")


def test_a_taken_folder_is_refused_and_unchanged(
    call: Call, world: Any, training: list[object], tmp_path: Path
) -> None:
    run = shutil.copytree(world.vqa, tmp_path / "vqa")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(call(*training, "--out", run), "is not empty", "--resume")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert call(*training, "--init", world.pretrained, "--out", run, "--resume").status == 0


def test_a_time_limit_says_that_the_run_is_not_finished(call: Call, training: list[object]) -> None:
    longer = [*training, "--set", "train.max_steps=40", "--out", "run"]
    stopped = call(*longer, "--set", "train.max_seconds=0.001")
    assert stopped.status == 0
    assert "Stopped by train.max_seconds" in stopped.out
    assert "--resume" in stopped.out
    assert call(*longer, "--resume").out.startswith("Fine-tuned model in")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "train.epoch=3"], ["'train.epoch'", "'epochs'"]),
        (["--set", "epochs"], ["expected name=value"]),
        (["--set", "train.epochs=many"], ["must be of type int; found 'many'"]),
        (["--set", "encoder=tinny"], ["'tinny'", "'tiny'"]),
        (["--set", "task=vqaa"], ["no task 'vqaa'", "'vqa'"]),
        (["--set", "train_split=trian"], ["trian", "train_questions.json"]),
        (["--recipe", "visualbert-vqa-scene"], ["no recipe 'visualbert-vqa-scene'", "'visualbert-vqa-scenes'"]),
        (["--recipe", "visualbert-scenes"], ["is a recipe of pretrain", "'visualbert-vqa-scenes'"]),
        (["--data", "gone"], ["under gone"]),
        (["--store", "gone"], ["no region store at gone"]),
        (["--init", "gone"], ["no model in gone"]),
        (["--device", "cuda:99"], ["'cuda:99'"]),
        (["--device", "gpu"], ["unknown device 'gpu'"]),
        (["--resume"], ["nothing to resume"]),
        (["--set", "train.seed=-1"], ["train.seed must be 0 or more; found -1"]),
        (["--out", "file"], ["file is a file"]),
        (["--out", "file/run"], ["cannot write to file/run"]),
        (["--set", "train.accumulation=100000"], ["Use smaller batches or less accumulation"]),
    ],
)
def test_mistakes_in_training_end_with_a_message(
    call: Call, training: list[object], words: list[str], message: list[str]
) -> None:
    Path("file").write_text("x")
    refused(call(*training, "--out", "run", *words), *message)
    assert not Path("run").exists()


def test_a_recipe_of_the_other_verb_is_named(call: Call, world: Any) -> None:
    words = ("--data", world.scenes, "--store", world.regions, "--out", "run")
    refused(
        call("pretrain", "--recipe", "visualbert-vqa-scenes", *words), "is a recipe of finetune", "visling finetune"
    )


def test_mistakes_elsewhere_end_with_a_message(call: Call, world: Any, tmp_path: Path) -> None:
    picture, scenes, detector = world.picture(), world.scenes, world.detector
    Path("file").write_text("x")
    Path("text.png").write_text("x")
    boxes = scenes / "annotations" / "instances_train.json"
    vqa = shutil.copytree(world.vqa, tmp_path / "vqa")
    predict = ("predict", "--run", vqa)
    Path("empty").mkdir()
    asked = {"image": str(picture), "question": "how many?"}
    for name, rows in {
        "good": [asked],
        "odd": [asked, {"picture": "a.png", "question": "how many?"}],
        "missing": [{**asked, "image": "gone.png"}],
        "two": [{"images": [str(picture)] * 2, "text": "how many?"}],
    }.items():
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    inspect = ("regions", "inspect", world.regions)
    extract = ("regions", "extract", picture, "--detector", detector)
    cases: list[tuple[tuple[object, ...], list[str]]] = [
        ((*predict, picture, ""), ["the question is empty"]),
        ((*predict, "text.png", "how many?"), ["cannot read image text.png"]),
        ((*predict, "gone.png", "how many?"), ["no image gone.png", "quotes"]),
        ((*predict, picture, "what", "color", "is", "it"), ["no image what", "put the text into quotes"]),
        ((*predict, "https://example.com/x.png", "how many?"), ["https://example.com/x.png is an address"]),
        ((*predict, "empty", "how many?"), ["no image in empty"]),
        ((*predict, "--input", "gone.jsonl"), ["cannot read the questions gone.jsonl"]),
        ((*predict, "--input", "file"), ["file, line 1 is not JSON"]),
        ((*predict, "--input", "odd.jsonl"), ["odd.jsonl, line 2 is not a question", '"picture"']),
        ((*predict, "--input", "missing.jsonl"), ["missing.jsonl, line 1: no image gone.png"]),
        ((*predict, "--input", "two.jsonl"), ["two.jsonl, line 1: the task vqa reads 1 image at a time; found 2"]),
        ((*predict, "--input", "two.jsonl", "--out", "file"), ["file exists"]),
        ((*predict, "--input", "good.jsonl", "--out", "file/a.jsonl"), ["cannot write the answers file/a.jsonl"]),
        ((*predict, picture, "how many?", "--out", "file"), ["cannot write to file", "--out"]),
        ((*predict, picture, "how many?", "--detector", "gone"), ["gone is not a detector"]),
        ((*predict, picture, "how many?", "--detector", world.other_detector), ["--other-features"]),
        (("predict", "--run", detector, picture, "how many?"), ["holds no model"]),
        (("evaluate", "gone"), ["no model in gone"]),
        (("evaluate", world.pretrained), ["without a task head"]),
        (("evaluate", vqa, "--split", "tst"), ["tst", "test_questions.json"]),
        (("evaluate", vqa, "--store", world.other_regions), ["--other-features"]),
        (("report", "gone"), ["no run folder gone"]),
        (("report", vqa, "--images", "gone"), ["no image folder gone"]),
        (("report", vqa, "--store", "gone"), ["no region store at gone"]),
        (("report", vqa, "--out", "gone/page.html"), ["cannot write the report gone/page.html"]),
        ((*inspect, "--image", "gone.png"), ["no image gone.png"]),
        ((*inspect, "--image", picture, "--out", "file"), ["file exists"]),
        ((*inspect, "--image", picture, "--out", "drawing.odd"), ["cannot write the picture", ".png"]),
        (
            (*inspect, "--image", picture, "--out", "gone/drawing.png"),
            ["cannot write the picture", "a folder that exists"],
        ),
        (("regions", "inspect", "gone"), ["no region store at gone"]),
        ((*extract, "--out", "file"), ["file is a file"]),
        ((*extract, "--out", "file/regions"), ["cannot make the folder file/regions"]),
        ((*extract, "--out", scenes), ["is not empty: it holds annotations"]),
        ((*extract, "--out", world.regions), ["is not empty", "add to it with --resume"]),
        ((*extract, "--out", "new", "--detector", world.pretrained), ["does not describe a detector"]),
        (("regions", "extract", "gone", "--detector", detector, "--out", "new"), ["no image folder gone"]),
        (
            ("detect", "train", scenes, "--annotations", boxes, "--set", "batch=3", "--out", "new"),
            ["'batch'", "'batch_size'"],
        ),
        (("detect", "train", scenes, "--annotations", "gone.json", "--out", "new"), ["no annotation file gone.json"]),
        (("detect", "eval", "gone", "--annotations", boxes, "--detector", detector), ["annotated images is in gone"]),
        (("scenes", "--out", scenes), ["is not empty"]),
        (("scenes", "--out", "file/scenes"), ["Choose a folder that you may write to"]),
        (("scenes", "--out", "new", "--set", "imags=3"), ["'imags'", "'images'"]),
        (("recipes", "show", "visualbert-vqs"), ["no recipe 'visualbert-vqs'", "'visualbert-vqa'"]),
        (("recipes", "show", "visualbert-scenes", "--set", "train.epoch=3"), ["'epochs'"]),
        (
            ("recipes", "show", "visualbert-coco", "--set", "objectives={masked_lmm = 1.0}"),
            ["unknown objective 'masked_lmm'", "'masked_lm'"],
        ),
        (("recipes", "show", "visualbert-coco", "--gpu", "A1000"), ["no GPU 'A1000'", "'A100'"]),
    ]
    for words, message in cases:
        refused(call(*words), *message)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["evaluate"],
        ["predict", "--run", "vqa", "how many?"],
        ["scenes", "--out", "new", "--images", "many"],
        ["regions", "extract", "a.png", "--detector", "d", "--out", "new", "--batch-size", "0"],
        ["report", "vqa", "--examples", "-1"],
    ],
)
def test_a_wrong_command_line_shows_its_use(call: Call, words: list[str]) -> None:
    ended = call(*words)
    assert ended.status == 2
    assert "Usage: " in ended.err


@pytest.mark.parametrize(
    ("words", "wrong", "choices"),
    [
        (("evaluate", "vqa", "--precision"), "fp64", get_args(runtime.Precision)),
        (
            ("detect", "train", "i", "--annotations", "a", "--out", "new", "--precision"),
            "fp64",
            get_args(runtime.Precision),
        ),
        (("detect", "train", "i", "--annotations", "a", "--out", "new", "--preset"), "scene", PRESETS),
        (("regions", "extract", "i", "--detector", "d", "--out", "new", "--dtype"), "float64", ("float16", "float32")),
        (
            ("regions", "extract", "i", "--detector", "d", "--out", "new", "--precision"),
            "fp64",
            get_args(runtime.Precision),
        ),
        (("scenes", "--out", "new", "--style"), "oil", STYLES),
        (("demo", "--out", "new", "--size"), "huge", demo.SIZES),
        (("demo", "--out", "new", "--model"), "bert", models.names()),
    ],
)  # fmt: skip
def test_a_wrong_choice_lists_the_choices(
    call: Call, words: tuple[str, ...], wrong: str, choices: Sequence[str]
) -> None:
    ended = call(*words, wrong)
    assert ended.status == 2
    message = " ".join(ended.err.replace("│", " ").split())
    assert f"Invalid value for '{words[-1]}'" in message
    assert f"{wrong!r} is not one of " in message
    listed = message.partition("is not one of ")[2].partition(".")[0]
    assert set(re.findall(r"'(\w+)'", listed)) == set(choices)
    assert not Path("new").exists()


def test_only_errors_of_the_user_hide_the_trace(call: Call, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise VislingError("what, found, expected, how to mend")

    def break_(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(evaluate, "evaluate", fail)
    assert call("evaluate", world.vqa) == Ended(2, "", "visling: what, found, expected, how to mend\n")
    monkeypatch.setattr(evaluate, "evaluate", break_)
    with pytest.raises(ZeroDivisionError):
        call("evaluate", world.vqa)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_is_an_option_and_leaves_nothing_behind(call: Call, world: Any, training: list[object]) -> None:
    pytest.importorskip("tensorboard")
    ended = call(*training, "--log-to", "tensorboard", "--set", "train.metric=acc", "--out", "run")
    assert (ended.status, ended.err.splitlines()[-1].partition(", but")[0]) == (2, "visling: train.metric is 'acc'")
    assert not Path("run").exists()
    assert call(*training, "--log-to", "tensorboard", "--out", "run").status == 0
    assert any(file.stat().st_size > 100 for file in Path("run/tensorboard").iterdir())
    words = ("--data", world.scenes, "--store", world.regions, *tiny(world), "--out", "pretrained")
    assert call("pretrain", "--recipe", "visualbert-scenes", *words, "--log-to", "tensorboard").status == 0
    assert any(Path("pretrained/tensorboard").iterdir())


def test_ctrl_c_says_how_to_resume(call: Call, training: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "finetune", interrupted)
    ended = call(*training, "--out", "run")
    assert ended.status == 130
    assert "--resume" in ended.err


def test_predict_says_what_it_saw_and_what_it_cut(call: Call, world: Any) -> None:
    ask = ("predict", "--run", world.vqa, world.picture(), " ".join(["red"] * 300), "--out", "answers")
    text = call(*ask)
    assert "the text was cut to 64 word pieces" in text.out
    found = call(*ask, "--json").json()
    assert found["truncated"] is True
    assert found["picture"] == str(
        Path("answers") / f"{world.picture().stem}-{'-'.join(['red'] * 12)}-2.png"
    )  # the first is kept
    assert found["answer"] == found["top"][0][0]
    Image.open(found["picture"]).verify()


def test_a_file_of_questions_is_answered(call: Call, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file or stdin to a file or stdout; each answer stands with its question, and is that of asking alone."""
    pictures = sorted((world.scenes / "images" / "test").glob("*.png"))[:2]
    asked = [
        {"id": number, "image": str(picture), "question": text}
        for number, (picture, text) in enumerate(
            zip(pictures * 2, ["how many objects are there?", "what color is it?"] * 2, strict=True)
        )
    ]
    lines = "".join(json.dumps(row) + "\n\n" for row in asked)
    Path("questions.jsonl").write_text(lines)
    predict = ("predict", "--run", world.vqa)
    ended = call(*predict, "--input", "questions.jsonl", "--out", "answers.jsonl")
    assert ended.out == "Wrote answers.jsonl: 4 answers\n"
    written = Path("answers.jsonl").read_text()
    found = [json.loads(line) for line in written.splitlines()]
    assert [{name: row[name] for name in ("id", "image", "question")} for row in found] == asked
    alone = call(*predict, pictures[0], "how many objects are there?", "--out", "drawn", "--json").json()
    assert found[0]["answer"] == alone["answer"]
    assert dict(found[0]["top"]) == pytest.approx(dict(alone["top"]), abs=1e-6)
    assert found[0]["regions"] == [alone["regions"]]
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert call(*predict, "--input", "-").out == written
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"images": [], "question": "how many?"}'))
    refused(call(*predict, "--input", "-"), "-, line 1: the task vqa reads 1 image at a time; found 0")
    wrong = call(*predict, "--input", "questions.jsonl", pictures[0], "how many?")
    assert (wrong.status, "not both" in wrong.err) == (2, True)


def test_a_folder_of_images_is_asked(call: Call, world: Any) -> None:
    pictures = sorted((world.scenes / "images" / "test").glob("*.png"))
    ended = call("predict", "--run", world.vqa, world.scenes / "images" / "test", "how many?", "--out", "drawn")
    assert re.findall(r"^(\S+\.png): ", ended.out, flags=re.MULTILINE) == list(map(str, pictures))
    assert len(list(Path("drawn").iterdir())) == len(pictures)


def test_all_images_are_checked_before_the_first_answer(call: Call, world: Any) -> None:
    Path("text.png").write_text("x")
    predict = ("predict", "--run", world.vqa, world.picture())
    for image in ("gone.png", "text.png"):
        refused(call(*predict, image, "how many?", "--out", "drawn"), image)
        assert not Path("drawn").exists()


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("What color is the cross?", "what-color-is-the-cross"),
        ("??", ""),
        ("a" * 99, "a" * 48),
        ("ein Bär/..", "ein-bär"),
    ],
)
def test_file_names_tell_the_question(text: str, slug: str) -> None:
    assert slugify(text) == slug


def test_a_model_on_the_hub_leaves_its_name_free(call: Call, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **_: str(world.vqa / "model"))
    for number in (1, 2):
        found = call("predict", "--run", "owner/name", world.picture(), "how many objects are there?", "--json").json()
        assert found["picture"] == str(
            Path("answers") / f"{world.picture().stem}-how-many-objects-are-there{'-2' * (number - 1)}.png"
        )
        assert not Path("owner").exists()


def test_evaluate_says_what_it_cut(call: Call, world: Any, tmp_path: Path) -> None:
    run, data = shutil.copytree(world.vqa, tmp_path / "vqa"), world.annotations(tmp_path / "data")
    file = data / "annotations" / "v2_OpenEnded_scenes_test_questions.json"
    content = json.loads(file.read_text())
    content["questions"][3]["question"] = " ".join(["red"] * 300)
    file.write_text(json.dumps(content))
    assert "1 texts were longer than the model reads and were cut" in call("evaluate", run, "--data", data).out
    assert "were cut" not in call("evaluate", run, "--overwrite").out


def test_regions_can_be_looked_at(call: Call, world: Any) -> None:
    store = NativeStore.open(world.regions)
    found = call("regions", "inspect", world.regions, "--image", world.picture(), "--json").json()
    assert found["images"] == len(store)
    assert found["fingerprint"] == store.fingerprint
    assert (found["classes"], found["attributes"]) == (len(store.class_names), len(store.attribute_names))
    assert found["drawing"] == f"{world.picture().stem}-regions.png"
    with Image.open(found["drawing"]) as drawing, Image.open(world.picture()) as picture:
        assert drawing.size[0] >= picture.size[0]
    refused(call("regions", "inspect", world.regions, "--image", world.picture()), "exists", "--out")


def test_check_finds_a_flipped_bit(call: Call, world: Any, tmp_path: Path) -> None:
    store = shutil.copytree(world.regions, tmp_path / "regions")
    sound = call("regions", "check", store)
    assert (sound.status, re.findall("problems +([0-9]+)", sound.out)) == (0, ["0"])
    (shard,) = store.glob("shard-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    assert call("regions", "inspect", store).status == 0
    damaged = call("regions", "check", store)
    assert damaged.status == 1
    assert f"{shard.name} is damaged" in damaged.out
    listed = call("regions", "check", store, "--json")
    assert (listed.status, listed.json()["found"][0]["kind"]) == (1, "digest")


def test_stores_are_cut_and_joined(call: Call, world: Any) -> None:
    ids = NativeStore.open(world.regions).ids
    Path("half.txt").write_text("\n".join(ids[: len(ids) // 2]))
    take = ("regions", "subset", world.regions, "--json")
    assert call(*take, "--images", "half.txt", "--out", "half").json()["images"] == len(ids) // 2
    assert call(*take, "--images", ids[-1], "--images", ids[-2], "--out", "two").json()["images"] == 2
    joined = call("regions", "merge", "half", "two", "--out", "joined", "--json").json()
    assert joined["images"] == len(ids) // 2 + 2
    assert NativeStore.open("joined").ids == [*ids[: len(ids) // 2], *ids[-2:]]
    refused(call(*take, "--images", "gone.txt", "--out", "new"), "gone.txt is neither an image of", "nor a file")
    Path("other.txt").write_text(f"{ids[0]}\nnobody\n")
    refused(call(*take, "--images", "other.txt", "--out", "new"), "1 of 2 images are not in", "nobody")
    refused(call("regions", "merge", "half", world.regions, "--out", "new"), f"image {ids[0]!r} is in half and")
    refused(call("regions", "merge", "half", "two", "--out", "joined"), "joined is not empty", "--resume")
    assert not Path("new").is_dir() or not list(Path("new").iterdir())


def test_extraction_resumes_and_adds(call: Call, world: Any) -> None:
    extract = ("regions", "extract", "--detector", world.detector, "--out", "regions", "--json")
    first, second = sorted((world.scenes / "images" / "train").glob("*.png"))[:2]
    assert call(*extract, first).json()["images"] == 1
    found = call(*extract, first, second, "--resume").json()
    assert (found["images"], found["found already"]) == (1, 1)
    assert NativeStore.open(Path("regions")).ids == [first.stem, second.stem]


def test_regions_are_taken_at_given_boxes(call: Call, world: Any) -> None:
    boxes = json.loads((world.scenes / "refcoco" / "instances.json").read_text())
    listed = {image["id"] for image in boxes["images"]}
    asked = ("regions", "extract", world.scenes / "images", "--detector", world.detector, "--json")
    given = call(*asked, "--boxes", world.scenes / "refcoco" / "instances.json", "--out", "given").json()
    assert (given["images"], given["regions"]) == (len(listed), len(boxes["annotations"]))
    assert given["images without annotation"] == 30 - len(listed)
    Path("boxes.json").write_text(json.dumps(boxes))
    joined = call(*asked, "--boxes", "boxes.json", "--keep-detected", "--out", "joined").json()
    detected, alone, both = (NativeStore.open(Path(path)) for path in (world.regions, "given", "joined"))
    assert alone.fingerprint == both.fingerprint == detected.fingerprint, "a model of one can be scored on the other"
    assert joined["regions"] == given["regions"] + sum(detected.count(image_id) for image_id in alone.ids)
    image_id = alone.ids[0]
    own = [entry["bbox"] for entry in boxes["annotations"] if entry["image_id"] == boxes["images"][0]["id"]]
    assert alone[image_id].boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in own]
    assert both[image_id].boxes[-len(own) :].tolist() == alone[image_id].boxes.tolist()
    # The same boxes from another place are added to, other ones are not.
    assert call(*asked, "--boxes", "boxes.json", "--out", "given", "--resume").json()["found already"] == len(listed)
    boxes["annotations"][0]["bbox"] = [1, 1, 8, 8]
    Path("boxes.json").write_text(json.dumps(boxes))
    refused(call(*asked[:-1], "--boxes", "boxes.json", "--out", "given", "--resume"), "boxes_digest")
    refused(call(*asked[:-1], "--keep-detected", "--out", "new"), "--keep-detected", "name their file too")


def test_released_region_files_become_a_store(call: Call, golden: Path) -> None:
    file = golden / "lxmert_io" / "tiny_obj.tsv"
    Path("objects.txt").write_text("".join(f"thing {number},object\n" for number in range(1600)))
    asked = ("regions", "convert", file, "--out", "regions", "--json")
    found = call(*asked, "--classes", "objects.txt", "--dtype", "float32").json()
    assert (found["images"], found["regions"], found["found already"], found["repeated entries"]) == (3, 11, 0, 0)
    assert (found["layout"], found["feature width"], found["boxes"], found["image sizes"]) == (
        "lxmert-obj36", 8, True, True
    )  # fmt: skip
    assert (found["fields"], found["missing"]) == (
        ["features", "boxes", "classes", "class_confidence", "attributes", "attribute_confidence"],
        ["probs"],
    )
    store = NativeStore.open(Path("regions"))
    assert (store.fingerprint, store.class_names[1599], store.fields["features"].dtype) == (
        "lxmert-obj36",
        "thing 1599",
        "float32",
    )
    inspected = call("regions", "inspect", "regions").out
    assert re.search(r"^  classes +1600$", inspected, flags=re.MULTILINE)
    assert re.search(r"^  attributes +no names$", inspected, flags=re.MULTILINE)
    assert call("regions", "inspect", "regions", "--json").json()["attributes"] == 0
    refused(call(*asked), "--resume")
    again = call(*asked, "--classes", "objects.txt", "--dtype", "float32", "--resume").json()
    assert (again["images"], again["found already"]) == (0, 3)
    Path("cut.tsv").write_bytes(file.read_bytes()[:-40])
    refused(call("regions", "convert", "cut.tsv", "--out", "other"), "cut.tsv, line 3", "truncated")
    refused(call("regions", "convert", "gone.tsv", "--out", "other", "--resume"), "no file gone.tsv")
    refused(call("regions", "convert", "objects.txt", "--out", "other"), "not a known file", "lxmert-obj36", "--layout")


def test_region_files_of_ones_own_layout_become_a_store(call: Call, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy", 2)
    asked = ("regions", "convert", folder, "--layout", "fixtures.toy_features", "--out", "regions", "--json")
    assert call(*asked).json()["images"] == 2
    store = NativeStore.open(Path("regions"))
    assert (store.ids, store.fingerprint, store.class_names) == (["0", "1"], "toy", ("cat", "dog"))


def test_images_of_one_name_leave_the_store_as_it_was(call: Call, world: Any) -> None:
    extract = ("regions", "extract", "--detector", world.detector, "--out", "regions")
    first = world.picture()
    Path("copy").mkdir()
    shutil.copy(first, "copy")
    refused(call(*extract, first, "copy"), "1 image names occur more than once", first.name)
    assert not Path("regions").exists()
    assert call(*extract, first).status == 0
    before = {path: path.read_bytes() for path in Path("regions").iterdir()}
    refused(call(*extract, first, "copy", "--resume"), "1 image names occur more than once")
    assert {path: path.read_bytes() for path in Path("regions").iterdir()} == before
    refused(call(*extract, "copy", "--resume", "--precision", "bf16"), "made with precision 'fp32'", "'bf16'")
    refused(call(*extract, "copy", "--resume", "--dtype", "float32"), "its dtype is 'float16'")
    assert {path: path.read_bytes() for path in Path("regions").iterdir()} == before


def test_features_are_stored_in_full_precision_if_asked_for(call: Call, world: Any) -> None:
    extract = ("regions", "extract", world.picture(), "--detector", world.detector, "--out")
    assert call(*extract, "half").status == 0
    assert call(*extract, "full", "--dtype", "float32", "--precision", "auto").status == 0
    half, full = (NativeStore.open(Path(name))[world.picture().stem].features for name in ("half", "full"))
    assert (half.dtype, full.dtype) == ("float16", "float32")
    assert NativeStore.open(Path("full")).settings["precision"] in ("fp32", "bf16"), "what auto came to"


def test_scores_without_objects_are_valid_json(call: Call, world: Any) -> None:
    file = world.scenes / "annotations" / "instances_val.json"
    Path("empty.json").write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    found = call(
        "detect",
        "eval",
        world.scenes / "images" / "val",
        "--annotations",
        "empty.json",
        "--detector",
        world.detector,
        "--json",
    )
    assert found.json()["recall at IoU 0.5"] is None


def test_the_doctor_and_the_recipes_speak_json(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VISLING_HOME", str(tmp_path / "not" / "yet"))
    found = call("doctor", "--json").json()
    assert found["data folder (VISLING_HOME)"] == str(tmp_path / "not" / "yet")
    assert found["threads"] == 1
    assert [value > 1e-4 for name, value in found.items() if name.startswith("matrix products in ")] == [True]
    assert "torch" in call("doctor").out
    listed = call("recipes", "list", "--json").json()
    assert set(listed) == {f"{verb} {name}" for verb, table in TABLES.items() for name in table}
    plain = call("recipes", "list").out
    for heading in ("Small, for visling", "Published, for visling"):
        assert [plain.count(f"{heading} {verb}\n") for verb in TABLES] == [1, 1, 1]
    shown = re.findall(r"^  (\S+)  ", plain, flags=re.MULTILINE)
    assert {name.replace("FAMILY", family) for name in shown for family in models.names()} == {
        name for table in TABLES.values() for name in table
    }
    joined = [name for name in shown if name.startswith("FAMILY-")]
    assert "FAMILY-vqa-scenes" in joined
    assert len(shown) + len(joined) * (len(models.names()) - 1) == len(listed), "one row for what all families have"
    assert call("recipes").out == plain
    assert all(about.endswith((".", ":")) for about in listed.values()), listed


@pytest.mark.parametrize("name", sorted({*PRETRAINING, *FINETUNING}))
def test_every_recipe_is_shown_as_one_object(call: Call, name: str) -> None:
    found = call("recipes", "show", name, "--no-estimate", "--set", "train.seed=41", "--json").json()
    assert set(found) == {
        verb for verb, table in (("pretrain", PRETRAINING), ("finetune", FINETUNING)) if name in table
    }
    assert all(recipe["train"]["seed"] == 41 for recipe in found.values())


def test_a_published_recipe_is_shown_with_its_start_and_what_its_release_does_in_all_runs(call: Call) -> None:
    def shown(name: str) -> dict[str, Any]:
        found: dict[str, Any] = call("recipes", "show", name, "--no-estimate", "--json").json()
        return found

    found = shown("visualbert-vqa")
    assert found["pretrain"]["init"].startswith("the published run starts from visualbert-coco: name such a model with")
    assert "starts from random weights, and its log says so" in shown("vlbert-base-prec")["pretrain"]["init"]
    for verb in ("pretrain", "finetune"):
        assert "rate of 0" in found[verb]["release_in_all_runs"]["last batch of an epoch"]
        assert found[verb]["train"]["keep"] == ["best", "epochs"]
        assert found[verb]["sort_by_length"] == 1
    assert "init" not in shown("lxmert-paper")["pretrain"]
    assert not {"init", "release_in_all_runs"} & set(shown("visualbert-scenes")["pretrain"])


@pytest.mark.parametrize("name", sorted({*PRETRAINING, *FINETUNING}))
def test_every_recipe_is_shown_as_a_short_text(call: Call, name: str) -> None:
    shown = call("recipes", "show", name, "--no-estimate").out
    tables = {"pretrain": PRETRAINING, "finetune": FINETUNING}
    verbs = [verb for verb, table in tables.items() if name in table]
    texts = re.split(r"\n(?=\S+, for visling)", shown)
    assert len(texts) == len(verbs)
    for verb, text in zip(verbs, texts, strict=True):
        config = tables[verb][name]()
        assert text.startswith(f"{name}, for visling {verb}\n{list_recipes()[verb][name]}\n")
        for part in (config.model, f"lr {config.train.optim.lr:g}", f"batches of {config.batch_size}"):
            assert part in text
        assert len(text.splitlines()) < 40
        for word in ("{", "None", "True", "bias_correction"):
            assert word not in text, text


def test_the_text_of_a_recipe_says_what_differs(call: Call) -> None:
    shown = call("recipes", "show", "lxmert-20epochs-qa", "--no-estimate", "--set", "train.epochs=12").out
    for line in (
        "LXMERT as released: from scratch, question answering from the first epoch on, batch 256, 1e-4, 20 epochs.",
        "  train.epochs: 12 here, 20 in the recipe",
        "  region_masking.hide: 0.8 here, 1 in the paper",
        "  from_epoch.image_qa: not set here, 10 in the paper",
    ):
        assert line in shown.splitlines(), shown
    assert "bias correction" not in shown, "BertAdam has none, whatever the setting says"
    tiny_lxmert = ("--set", "encoder=tiny", "--set", "region_losses.feature_size=16", "--gpu", "H100")
    assert re.search(
        r"^  hours on H100 +bf16 [\d.e-]+, .*\(an estimate\)$",
        call("recipes", "show", "lxmert-paper", *tiny_lxmert).out,
        re.MULTILINE,
    )


def test_the_help_of_fine_tuning_fits_80_columns_under_headings(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("finetune", "--help").out.splitlines()
    assert max(map(len, lines)) == 80
    assert len(lines) < 100, "a narrow column of help makes it long"
    headings = re.findall(r"─ ([A-Z][a-z ]+) ─", "\n".join(lines))
    assert headings == ["Options", "Your own files", "Images and regions", "Settings", "Machine"]


def test_rows_are_wrapped_to_the_terminal_and_to_nothing_else() -> None:
    rows = {"a-name": "word " * 20 + "last", "b": "short"}
    assert [line.count("word") for line in format_rows(rows, None)] == [20, 0]
    lines = format_rows(rows, 60)
    assert len(lines) == 4
    assert all(len(line) < 60 for line in lines)
    assert [line.index("word") for line in lines[:2]] == [10, 10]
    assert " ".join(" ".join(lines).split()) == f"a-name {rows['a-name']} b short"


def test_the_text_of_a_fine_tuning_says_what_it_needs_and_keeps(call: Call) -> None:
    shown = call("recipes", "show", "cvlp-gqa", "--set", "encoder.num_heads=6").out
    for words in (
        "files +the official questions, LXMERT's lists, or ViLBERT's caches .docs.tasks.gqa.md.",
        "answers +data/.*trainval_label2ans.json.*name it with --set task_settings.answers=FILE",
        "trains on +train.valid, 1,075,062 examples",
        "validates +on testdev, where the highest accuracy is the best",
        "starts from +cvlp-release, which --init has to name; without it from random weights",
        "length +6 epochs, batches of 32",
        "optimiser +bert_adam, lr 1e-05, .*all gradients together clipped to a norm of 5",
        "parameters +weight decay 0.01 on all parameters",
        "rate +rises over 0.1 of the run, then falls linearly to 0",
        "keeps +the best weights, the last, the best of a second model, .*momentum 0.99997",
        "updates +201,570",
        "seed +9595",
        "source +run/gqa_finetune.bash; src/tasks/gqa.py. The paper's numbers could not be read.",
        "stored regions: float32; .*",
    ):
        assert re.search(f"^  {words}$", shown, re.MULTILINE), (words, shown)
    assert "After each update the averaged model keeps 0.99997 of itself" in shown, "the docstring's second paragraph"
    assert "by rsum\n" in call("recipes", "show", "vilbert-retrieval", "--no-estimate").out, "it keeps no best model"
    named = call("recipes", "show", "cvlp-gqa", "--no-estimate", "--set", "task_settings.min_count=1", "--json").json()
    assert "answers" not in named["finetune"]
    assert named["finetune"]["files"] == GQA.files


def test_the_text_of_a_recipe_says_how_the_rate_changes(call: Call) -> None:
    def rate(*settings: str) -> str:
        words = [word for setting in settings for word in ("--set", f"train.optim.{setting}")]
        shown = call("recipes", "show", "lxmert-nlvr2", "--no-estimate", *words).out
        found = re.search("^  rate +(.*)$", shown, re.MULTILINE)
        assert found is not None
        return found[1]

    assert rate("schedule=constant") == "constant"
    assert (
        rate("schedule=warmup_constant", "warmup_steps=1000", "drop_epochs=[14.0, 18.0]")
        == "rises over 1,000 updates, then stays, times 0.1 after epoch 14 and 18"
    )
    assert (
        rate("schedule=warmup_cosine", "restarts=2", "plateau={factor = 0.5}")
        == "rises over 0.1 of the run, then falls by half a cosine, 2 times from the peak again, times 0.5 where the "
        "validation score stops improving"
    )
    shown = call(
        "recipes", "show", "lxmert-nlvr2", "--no-estimate", "--set", "train.optim.name=sgd", "--set", "flip=0.5",
        "--set", "train.optim.rates={heads = 2.5}", "--set", "train.optim.no_decay=[\"bias\"]",
        "--set", "valid_images=7",
    ).out  # fmt: skip
    assert "sgd, lr 5e-05, momentum 0.9, all gradients" in shown
    assert "weight decay 0.01 on all parameters but bias; heads at 2.5 times the rate" in shown
    assert "50% of the training images" in shown
    assert "on valid (the first 7 images), where the highest accuracy is the best" in shown


def test_a_setting_of_one_verb_shows_that_verb(call: Call) -> None:
    assert set(
        call("recipes", "show", "visualbert-vqa", "--no-estimate", "--set", "masking.rate=0.2", "--json").json()
    ) == {"pretrain"}


# Checkpoints


def official_file(world: Any, folder: Path) -> tuple[Path, list[str]]:
    """Weights under released names, and the options that say what they are."""
    saved = read_model_folder(world.pretrained)
    parts = {
        "encoder.": "encoder.",
        "objectives.masked_lm.head.": "vocabulary.",
        "objectives.matching.head.": "matching.",
    }
    ours = {
        part + name.removeprefix(place): tensor
        for name, tensor in saved.weights.items()
        for place, part in parts.items()
        if name.startswith(place) and ".whiten." not in name
    }
    torch.save(models.spec("visualbert").keys["official"].invert(ours), folder / "weights.th")
    settings = [
        f"{name}={json.dumps(value)}"
        for name, value in configs.to_dict(saved.config).items()
        if name not in ("whiten_features", "vocabulary")
    ]
    settings += ["whiten_features=false", f"vocabulary={saved.path / 'vocab.txt'}"]
    return folder / "weights.th", ["--preset", "scenes", *(word for setting in settings for word in ("--set", setting))]


def test_weights_go_in_and_out_and_are_verified(call: Call, world: Any, tmp_path: Path) -> None:
    weights, size = official_file(world, tmp_path)
    made = call("convert", weights, "--from", "official", "--model", "visualbert", *size, "--to", "model")
    assert made.status == 0, made
    for words in (
        "Read",
        "model ",
        "visualbert",
        "objectives.masked_lm.head",
        "vocabulary, 318 outputs",
        "mapped",
        "unexpected",
        f"Model in {Path('model')}",
    ):
        assert words in made.out
    found = call("convert", weights, *size, "--to", "again", "--json").json()
    assert (found["model"], found["layout"], found["task"], found["coverage"]["missing"]) == (
        "visualbert",
        "official",
        None,
        [],
    )
    assert call("convert", "model", "--to-layout", "official", "--to", "back.safetensors").out.startswith(
        "Wrote back.safetensors\n  layout   official"
    )
    assert (
        call("convert", "model", "--to-layout", "transformers", "--to", "hf", "--json").json()["layout"]
        == "transformers"
    )
    assert json.loads(Path("hf/config.json").read_text())["architectures"] == ["VisualBertForPreTraining"]

    assert call("verify", "model", "recording", "--record").out.startswith("Recorded in recording")
    agreed = call("verify", "again", "recording")
    assert agreed.status == 0
    assert agreed.out.endswith("all agree (tolerance 5e-05 + 1e-05 of the value)\n")
    spoilt = load_file("again/model.safetensors")
    spoilt["encoder.layers.0.self_attention.output.bias"][0] += 1  # one entry: a norm takes back what is added to all
    save_file(spoilt, "again/model.safetensors")
    differing = call("verify", "again", "recording")
    assert differing.status == 1
    assert "first to differ: layers.0 " in differing.out
    ended = call("verify", "again", "recording", "--json")
    assert (ended.status, ended.json()["first"], ended.json()["layers"]["embeddings"]["agrees"]) == (
        1,
        "layers.0",
        True,
    )
    assert call("verify", "again", "recording", "--tolerance", 1000).status == 0


def test_mistakes_with_weights_end_with_a_message(call: Call, world: Any, tmp_path: Path) -> None:
    weights, size = official_file(world, tmp_path)
    Path("half.th").write_bytes(weights.read_bytes()[:1000])
    Path("taken").mkdir()
    Path("taken/file").write_text("x")
    assert call("convert", weights, *size, "--to", "model").status == 0
    cases: list[tuple[tuple[object, ...], list[str]]] = [
        (
            ("convert", "gone.th", "--to", "new"),
            ["no weight file gone.th", "need the file that `visling catalog` names"],
        ),
        (("convert", "half.th", "--to", "new"), ["half.th", "truncated"]),
        (("convert", weights, *size, "--to", "taken"), ["taken exists", "nothing is overwritten"]),
        (
            ("convert", weights, "--from", "transformers", "--model", "visualbert", *size, "--to", "new"),
            ["The names fit --model visualbert --from official"],
        ),
        (("convert", weights, "--model", "vilbart", *size, "--to", "new"), ["no model 'vilbart'", "'vilbert'"]),
        (("convert", weights, "--model", "vilbert", *size, "--to", "new"), ["fit no family with --model 'vilbert'"]),
        (("convert", weights, *size, "--answers", "gone.json", "--to", "new"), ["has none, only: "]),
        (
            ("convert", "owner/name", "--offline", "--to", "new"),
            ["is neither a folder here", "HF_HUB_OFFLINE"],
        ),
        (("convert", "vqa_fine_tuned", "--to", "new"), ["published at https://"]),
        (("convert", "model", "--to-layout", "oficial", "--to", "new"), ["no layout 'oficial'", "'official'"]),
        (
            ("convert", "model", "--to-layout", "official", "--from", "official", "--to", "new"),
            ["give only SOURCE, --to and --to-layout"],
        ),
        (
            ("convert", world.pretrained, "--to-layout", "official", "--to", "new.th"),
            ["encoder.region_features.whiten", "train the model with --set encoder.whiten_features=false"],
        ),
        (("verify", "gone", "recording"), ["no model in gone", "needs the file that `visling catalog` names"]),
        (("verify", "model", "gone"), ["no recording in gone", "--record"]),
        (("verify", "model", "taken", "--record"), ["taken exists"]),
        (("catalog", "--model", "vilbart"), ["no such file", "--model vilbert"]),
    ]
    for words, message in cases:
        refused(call(*words), *message)
        assert not Path("new").exists()


def test_the_catalogue_is_listed(call: Call) -> None:
    everything = call("catalog")
    for name in ("lxmert-vqa", "vqa_fine_tuned", "vg-frcnn", "lxmert-vqa-answers", "lxmert-train2014-features"):
        assert re.search(rf"^  {name} ", everything.out, flags=re.MULTILINE), name
    for words in ("vg-frcnn comes near bottom-up-36", "trouble reported with vg-frcnn", "nothing here makes detectron"):
        assert words in everything.out
    weights = call("catalog", "--model", "visualbert", "--layout", "official")
    for words in (
        "vqa_fine_tuned",
        "visualbert, preset vqa, layout official",
        "classifier 3129",
        "licence",
        "detectron-100 (Pythia's",
        "unknown",
        "known dead",
        "nothing known",
    ):
        assert words in weights.out
    assert "about 870 MB" in call("catalog", "model_LXRT").out
    chosen = call("catalog", "--model", "lxmert", "--layout", "transformers", "--json").json()
    assert {entry["name"] for entry in chosen} == {"lxmert-base-uncased", "lxmert-vqa-uncased", "lxmert-gqa-uncased"}
    assert all(entry["sha256"] is None for entry in chosen)


def test_one_entry_of_the_catalogue_is_shown_whole(call: Call) -> None:
    shown = call("catalog", "lxmert-vqa").out
    for words in (
        "lxmert-vqa-uncased",
        "lxmert-vqa-answers",
        "detector  vg-frcnn",
        "near: the weights, sizes of images",
    ):
        assert words in shown
    assert "on the hub in May 2025" in call("catalog", "vg-frcnn").out
    assert "measured 40 to 46 %" in call("catalog", "visualbert-vqa").out
    assert call("catalog", "lxmert-vqa-answers", "--json").json()["reach"] == "address"
    groups = call("catalog", "--json").json()
    assert {"ready", "weights", "detectors", "answers", "features"} == set(groups)
    refused(call("catalog", "lxmert-vqb"), "nothing is called 'lxmert-vqb'", "Did you mean 'lxmert-vqa'")
    refused(call("catalog", "lxmert-vqa", "--model", "lxmert"), "leave them out where NAME is given")


def test_a_model_is_looked_into(call: Call, world: Any) -> None:
    shown = call("analysis", "heads", world.vqa, "--split", "val", "--out", "heads.json", "--page", "heads.html")
    assert shown.status == 0, shown
    assert f"{world.vqa}, val, 12 examples" in shown.out
    assert re.search(r"^  layers\.0  0\.\d{3} \(0\.\d{3} to 0\.\d{3}\) ", shown.out, flags=re.MULTILINE)
    assert shown.out.endswith("Wrote heads.json\nWrote heads.html\n")
    again = call("analysis", "heads", world.vqa, "--split", "val", "--json", "--batch-size", 3).json()
    written = json.loads(Path("heads.json").read_text())
    assert again["directions"] == written["directions"]
    mass = [found["statistics"]["mass"]["text_to_regions"]["layers.0"] for found in (again, written)]
    assert mass[0] == pytest.approx(mass[1], abs=1e-6)
    assert "<h1>What the heads attend to</h1>" in Path("heads.html").read_text()
    refused(call("analysis", "heads", world.vqa, "--split", "val", "--out", "heads.json"), "heads.json exists")
    captions = call("analysis", "heads", world.pretrained, "--split", "val", "--examples", 2, "--json").json()
    assert captions["questions"] == 2

    export = ("analysis", "states", world.vqa, "--split", "val", "--out", "states")
    assert call(*export, "--json").json() == {
        "examples": 12, "rows": 12, "layers": ["embeddings", "layers.0"], "pooled": 16, "dtype": "float32",
        "out": "states",
    }  # fmt: skip
    refused(call(*export), "states is not empty", "--resume")
    refused(call(*export, "--resume"), "complete: there is nothing to resume")
    pooled = call("analysis", "states", world.vqa, "--split", "val", "--only-pooled", "--out", "pooled")
    assert "layers    none\n" in pooled.out
    refused(
        call("analysis", "states", world.vqa, "--split", "val", "--layer", "layer.0", "--out", "one"),
        "no layer 'layer.0'", "Did you mean 'layers.0'",
    )  # fmt: skip
    refused(
        call("analysis", "states", world.vqa, "--only-pooled", "--layer", "layers.0", "--out", "one"),
        "--only-pooled keeps no layer",
    )
    drawn = call("analysis", "project", "states", "--points", 20, "--out", "map.html", "--json").json()
    assert (drawn["layer"], drawn["out"], drawn["json"]) == ("layers.0", "map.html", "map.json")
    assert len(json.loads(Path("map.json").read_text())["points"]) == drawn["points"] <= 20
    assert "<h1>Words and regions in layers.0</h1>" in Path("map.html").read_text()
    refused(call("analysis", "project", "states", "--out", "map.html"), "map.html exists")
    refused(call("analysis", "project", "pooled", "--out", "new.html"), "pooled states alone")
    refused(call("analysis", "project", "heads.json", "--out", "new.html"), "no hidden states in heads.json")
    refused(call("analysis", "project", "states", "--out", "map.json"), "name of a page")
    refused(
        call("analysis", "project", "states", "--out", "gone/map.html"), "cannot write gone/map.html", "Make its folder"
    )
    refused(call("analysis", "heads", world.vqa, "--page", "gone/heads.html"), "cannot write gone/heads.html")
    assert not list(Path().glob("*.part"))


def test_explanations_are_judged(call: Call, world: Any) -> None:
    judge = ("analysis", "relevance", world.vqa, "--split", "val", "--orders", 2)
    shown = call(*judge, "--examples", 6, "--out", "relevance.json")
    assert shown.status == 0, shown
    assert re.search(r"^    relevance +\d+\.\d \(\d+\.\d to \d+\.\d\) ", shown.out, flags=re.MULTILINE)
    assert shown.out.endswith("Wrote relevance.json\n")
    written = json.loads(Path("relevance.json").read_text())
    assert (written["examples"], written["seed"], written["questions"]["text"]) == (6, 0, 6)
    assert call(*judge, "--examples", 6, "--json").json() == written
    assert call(*judge, "--examples", 6, "--seed", 1, "--json").json() != written
    whole = call(*judge, "--json", "--batch-size", 3).json()
    assert (whole["examples"], whole["seed"]) == (12, None)
    refused(call(*judge, "--out", "relevance.json"), "relevance.json exists")
    refused(call("analysis", "relevance", world.pretrained), "is a pre-trained model", "give a run that finetune")
    refused(call(*judge, "--data", "gone"), "gone")


def test_models_are_compared(call: Call, world: Any) -> None:
    sizes = (
        "encoder.hidden_size=16",
        "encoder.num_heads=2",
        "encoder.intermediate_size=32",
        "train.max_steps=2",
        "train.precision=fp32",
    )
    settings = [word for setting in sizes for option in ("--set", "--pretrain-set") for word in (option, setting)]
    asked = (
        "compare",
        "--recipe",
        "scenes",
        "--tasks",
        "vqa-scenes",
        "--data",
        world.scenes,
        "--store",
        world.regions,
        "--seeds",
        1,
        *settings,
    )
    ended = call(*asked, "--models", "visualbert", "--out", "comparison")
    assert ended.status == 0
    assert ended.out.startswith("# visualbert on vqa-scenes\n")
    assert "2 of 2: visualbert, seed 0, vqa-scenes, pre-trained\n" in ended.err
    assert "<h1>visualbert on vqa-scenes</h1>" in Path("comparison/comparison.html").read_text()
    again = call(*asked, "--models", "visualbert", "--out", "comparison", "--resume", "--json").json()
    assert again["runs"] == {"ended": 2, "planned": 2}
    assert again == json.loads(Path("comparison/comparison.json").read_text())
    refused(call(*asked, "--models", "visualbert", "--out", "comparison"), "continue with --resume")
    refused(call(*asked, "--models", "visualbert, lxmret", "--out", "other"), "Did you mean 'lxmert'")
    assert not Path("other").exists()


def test_the_comparisons_in_help_and_pages_are_true() -> None:
    files = [Path(__file__).parents[1] / name for name in ("README.md", "docs/results/pretraining.md")]
    for page in (VERBS["compare",].help, *(file.read_text(encoding="utf-8") for file in files)):
        (line,) = re.findall(r"visling compare (--models [^`\n]+(?:\n--[^`\n]+)*)", page.replace("\\\n", " "))
        given = VERBS["compare",].make_context("visling", shlex.split(line)).params
        asked = Comparison(
            models=tuple(given["families"].split(",")),
            recipe=given["phase"],
            tasks=tuple(given["tasks"].split(",")),
            pretrain_settings=tuple(given["pretrain_set"] or ()),
            finetune_settings=tuple(given["set_"] or ()),
        )
        for model in asked.models:
            asked.pretraining(model)
            for task in asked.tasks:
                asked.finetuning(model, task)


# Help and start


def start(*words: str) -> tuple[str, float, str]:
    """Output, processor seconds and imported modules of a command in a process of its own."""
    program = (
        "import resource, sys\n"
        "from visling.__main__ import main\n"
        "status = 0\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    status = end.code or 0\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, *sys.modules, file=sys.stderr)\n"
        "sys.exit(status)"
    )
    ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    seconds, _, modules = ended.stderr.splitlines()[-1].partition(" ")
    return ended.stdout, float(seconds), modules


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "catalog --json",
        "recipes list",
        "recipes --help",
        "detect train --help",
        "regions convert -h",
        "pretrain --help",
        "finetune --help",
        "evaluate --help",
        "predict --help",
        "serve --help",
        "convert --help",
        "scenes --help",
        "doctor --help",
        "demo --help",
    ],
)
def test_help_and_lists_answer_at_once(words: str) -> None:
    out, seconds, modules = start(*words.split())
    assert out.strip()
    assert not {"torch", "numpy", "PIL", "tokenizers"} & set(modules.split()), f"visling {words} imports what is heavy"
    assert seconds < 1.0, f"visling {words} took {seconds:.2f} s of processor time"


def test_the_version_and_short_options(call: Call) -> None:
    assert call("--version").out == f"visling {runtime.versions()['visling']}\n"
    for path in [(), ("detect",), ("recipes",), *VERBS]:
        assert call(*path, "-h").out == call(*path, "--help").out
    assert "--install-completion" in call("-h").out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(shell: str) -> None:
    words = {"COMP_WORDS": "visling pre", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "visling pre"}
    environment = (
        os.environ | words | {"_VISLING_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    )
    program = "import sys; sys.argv[0] = 'visling'; from visling.__main__ import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert "pretrain" in ended.stdout
    assert "finetune" not in ended.stdout


def test_flags_show_no_type(call: Call) -> None:
    for path in [(), ("detect",), ("recipes",), *VERBS]:
        assert "<bool>" not in call(*path, "--help").out


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb with its command."""
    command = typer.main.get_command(app.app) if command is None else command
    if not hasattr(command, "commands"):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


VERBS = dict(commands())


def test_help_lists_the_commands_in_groups(call: Call) -> None:
    shown = call("--help").out
    headings = ("First steps", "Data", "Training", "Results", "Inspection", "Weights", "This machine")
    places = [re.search(rf"─ {heading} ─", shown) for heading in headings]
    assert all(places)
    assert [place.start() for place in places if place] == sorted(place.start() for place in places if place)
    names = re.findall(r"^│ ([a-z]+) ", shown, flags=re.MULTILINE)
    assert sorted(names) == sorted({path[0] for path in VERBS})
    assert names[:7] == ["demo", "scenes", "detect", "regions", "recipes", "pretrain", "finetune"]


def test_the_verbs_are_those_of_the_design() -> None:
    assert {" ".join(path) for path in VERBS} == {
        "demo", "scenes", "detect train", "detect eval", "detect wrap", "detect grid", "detect convert",
        "regions extract", "regions convert", "regions inspect", "regions merge", "regions subset", "regions check",
        "recipes list",
        "recipes show", "pretrain", "finetune", "multitask", "evaluate", "predict", "report", "doctor", "convert",
        "verify", "catalog", "fetch", "compare", "reproduce", "inspect", "gallery", "serve",
        "analysis alignment", "analysis relevance", "analysis heads", "analysis states", "analysis project",
    }  # fmt: skip


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_help_shows_an_example_that_parses(call: Call, path: tuple[str, ...]) -> None:
    shown = call(*path, "--help")
    assert shown.status == 0
    assert "Example: visling" in shown.out
    for example in re.findall(r"Example: visling ((?:.+\n?)+)", VERBS[path].help):
        words = shlex.split(example)
        assert tuple(words[: len(path)]) == path, "the example is of another verb"
        # raises on an unknown option or a missing value
        context = VERBS[path].make_context("visling", words[len(path) :])
        recipe = context.params.get("recipe")
        assert recipe is None or recipe in TABLES[path[0]]


def test_the_commands_of_the_checkpoints_page_parse() -> None:
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    lines = page.replace("\\\n", " ").splitlines()
    commands_ = [shlex.split(line.removeprefix("visling ")) for line in lines if line.startswith("visling ")]
    assert len(commands_) > 25
    for words in commands_:
        (path,) = (path for path in VERBS if tuple(words[: len(path)]) == path)
        given = VERBS[path].make_context("visling", words[len(path) :]).params
        if path == ("convert",):
            release = given["release"] or (
                Path(given["source"]).stem if not given["to_layout"] and not given["from_"] else None
            )
            if release is not None:
                known = catalog.find(release)
                needed, tables = (
                    sum(head.outputs in sizes for head in known.heads.values())
                    for sizes in ((3129, 1842, 1533), (9500,))
                )
                assert needed <= len(given["answers"] or ()) <= needed + tables, words
            if given["model"] is not None:
                family = models.spec(given["model"])
                assert given["preset"] in family.presets
                assert given["from_"] in family.keys
        elif path == ("catalog",) and given["model"] is not None:
            assert any(entry.family == given["model"] for entry in catalog.RELEASED_FILES)
        elif path in (("catalog",), ("fetch",)):
            for name in given.get("names") or [given["name"]]:
                assert catalog.find_entry(name).name == name


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_every_option_is_explained(path: tuple[str, ...]) -> None:
    for parameter in VERBS[path].params:
        assert getattr(parameter, "help", None) or parameter.name == "help", f"{' '.join(path)}: {parameter.name}"
