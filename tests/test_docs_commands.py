"""Every command that README and docs print is run by a test, scaled down, or needs a file that is named here.

A page's commands run one after another in an empty folder. What a page takes for granted (a region store, a run) is a
stand-in from the tiny world of the tests. A command that reads a file in `DOWNLOADS` is not run, nor is one that reads
what such a command writes. A command that is none of these fails its page's test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fixtures.transformers_models import save_backbone, save_detector
from PIL import Image

from visling.cli import app
from visling.recipes.detectors import detect_config

ROOT = Path(__file__).parents[1]
PAGES = [str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]]

DOWNLOADS = {
    "released weights, hundreds of megabytes each (tests/pretrained converts files of the same layouts)": (
        "model_LXRT.pth", "vqa_coco_pre_trained.th", "vqa_fine_tuned.th", "nlvr2_fine_tuned.th", "vcr_pre_train.th",
        "ctrl_visualbert.bin",
        "vl-bert-base-prec.model", "vl-bert-base-e2e.model", "vqa_best.model", "refcoco_best.model", "vcr_best.model",
        "pytorch_model_9.bin", "pytorch_model_19.bin", "pretrained_model.bin", "multi_task_model.bin",
        "pytorch_ckpt_latest.tar", "BEST.pth", "bert-base-uncased.bin", "bua-caffe-frcn-r101-k10-100.pth",
    ),
    "a model on the hub": (
        "uclanlp/visualbert-vqa-coco-pre", "unc-nlp/lxmert-vqa-uncased", "unc-nlp/frcnn-vg-finetuned",
        "PekingU/rtdetr_r50vd", "openai/clip-vit-base-patch32",
    ),
    "weights of torchvision (tests/vision/test_grid_features.py reads a file of their layout)": ("resnet50.pth",),
    "what a name of the catalogue stands for (tests/pretrained/test_ready.py has files of the true names)": (
        "lxmert-vqa", "lxmert-train2014-features", "downloads", "vg-frcnn",
    ),
    "released features (tests/regions/formats reads samples of them)": (
        "train2014_obj36.tsv", "gqa_testdev_obj36.tsv", "train_obj36.tsv", "coco_trainval_resnet101.lmdb",
        "VCR_resnet101_faster_rcnn_genome.lmdb", "VCR_gt_resnet101_faster_rcnn_genome.lmdb",
        "train36.hdf5", "trainval2014_resnet101_faster_rcnn_genome.zip",
        "training_feat_part_0.lmdb", "detectron_fix_100", "features_train_150.th", "mscoco_imgfeat",
    ),
    "official images and captions (tests/data/corpora reads samples of them)": ("conceptual",),
    "LXMERT's files (tests/parity/test_lxmert_vqa.py and its neighbours read files of their layout)": ("data",),
    "captions and features of one's own (tests/runs/test_conflicts.py reads captions of the scenes so)": (
        "my_captions", "my_features",
    ),
    "official questions (tests/data/annotations/test_gqa.py reads files of their layout)": ("gqa",),
    "official sentences and photographs (tests/tasks/test_nlvr2.py reads a sample of them)": ("nlvr2",),
    "official expressions and photographs (tests/parity/test_vlbert_refcoco.py reads samples of them)": ("refer",),
    "official phrases and boxes (tests/data/annotations/test_entities.py reads such files)": ("flickr30k",),
    "official questions and stills (tests/parity/test_vlbert_vcr.py reads a sample of them)": ("vcr",),
    "drawings of others (tests/test_outside_data.py reads files of their layout)": ("shapes", "shapeworld"),
    "the folders of ViLBERT's multi-task release (tests/parity reads samples of them)": ("datasets",),
    "official captions (tests/parity/test_vilbert_retrieval.py reads files of their layout)": ("flickr30k",),
    "photographs and boxes of one's own (tests/runs/test_detect_start.py trains on drawings in each of these ways)": (
        "my_photos",
    ),
}  # fmt: skip
"""Why a command cannot be run here -> the files and folders that it reads."""

SET_UP = ("python -m venv", "pip install", "make demo", "make test", "curl -s http://127.0.0.1:8000/api/")
"""Commands that install; the Makefile's targets do the same, and tests/test_examples.py runs the demo. What curl asks
a server, tests/serve/test_page_of_the_docs.py asks it."""

SMALLER = {
    "scenes --out scenes": ["--images", "120", "--set", "questions_per_image=4"],
    "scenes": ["--panels", "48"],
    "detect train": ["--steps", "20", "--set", "detector.min_regions=4"],
    "pretrain": ["--set", "train.max_steps=4"],
    "finetune --recipe visualbert-nlvr": ["--set", "train.max_steps=4", "--set", "batch_size=8"],
    "finetune": ["--set", "train.max_steps=4"],
    "multitask": ["--set", "train.max_steps=4"],
    "serve": ["--port", "0"],
    "gallery answers": ["--examples", "4"],
    "reproduce": ["--seeds", "1", "--size", "tiny"],
    "compare": ["--seeds", "1", "--set", "train.max_steps=4", "--pretrain-set", "train.max_steps=4"],
}
"""First words of a command -> what makes it small; the first that fits is appended."""

LONG = (
    "README.md",
    "docs/claims.md",
    "docs/results/pretraining.md",
    "docs/results/finetuning.md",
    "docs/results/nlvr.md",
    "docs/results/tasks.md",
)
"""Pages whose commands train a detector and several models: minutes."""

ELSEWHERE = ("docs/own_data.md",)
"""Pages whose commands run on files of their own (tests/test_own_data.py)."""

QUICK = (
    "docs/tour.md", "docs/inspect.md", "docs/gallery.md", "docs/formats/states.md", "docs/formats/store.md",
    "docs/converting_regions.md", "docs/tasks/vqa.md", "docs/tasks/nlvr.md",
    "docs/recipes.md", "docs/corpora.md",
    "docs/checkpoints.md", "docs/tasks/gqa.md", "docs/tasks/referring.md", "docs/tasks/vcr.md",
    "docs/tasks/classification.md", "docs/tasks/nlvr2.md", "docs/tasks/retrieval.md", "docs/finetuning.md",
    "docs/detectors/own.md",
    "docs/regions.md", "docs/results/relevance.md",
    "docs/extracting.md",
    "docs/detectors/transformers.md", "docs/detectors/grid.md",
    "docs/serving.md",
    "docs/tasks/grounding.md", "docs/results/alignment.md",
)  # fmt: skip
"""Pages whose commands take seconds on the tiny world."""

PICTURE_OF_120 = "scene_000000000120.png"
"""A test picture of 120 drawn ones, in place of README's from 2,500."""


def list_commands(page: str) -> list[list[str]]:
    """The words of every command of a page; a line of a command block that is no known command is an error."""
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = []
    for language, block in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        lines = [line.removeprefix("$ ").strip() for line in block.replace("\\\n", " ").splitlines()]
        shell = language in ("bash", "sh", "console", "shell")
        if language in ("", "text") or shell:
            for line in lines:
                if line.startswith("visling "):
                    commands.append(shlex.split(line, comments=True)[1:])
                elif shell or re.match(r"(python|pip|make|git|curl|wget|export)\b", line):
                    assert line.startswith(SET_UP), f"{page}: {line!r} is neither run by a test nor listed in SET_UP"
    return commands


def list_outputs(words: Sequence[str]) -> list[str]:
    """What a command writes."""
    return [words[i + 1] for i, word in enumerate(words) if word in ("--out", "--to", "--to-layout")]


def reads(words: Sequence[str], names: Iterable[str]) -> bool:
    """Whether a word is one of these names, or a path or split in it."""
    inputs = [
        word
        for i, word in enumerate(words)
        if words[i - 1] not in ("--out", "--to", "--release", "--model", "--recipe")
    ]
    return any(name in (word, re.split(r"[/@]", word)[0], word.partition("=")[2]) for word in inputs for name in names)


def split_runnable(commands: Sequence[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Commands that can be run, and those that need a download or what such a command leaves."""
    absent = {name for names in DOWNLOADS.values() for name in names}
    runnable: list[list[str]] = []
    needing: list[list[str]] = []
    for words in commands:
        needs = words[0] not in ("catalog", "recipes") and reads(words, absent)
        (needing if needs else runnable).append(words)
        absent |= set(list_outputs(words)) if needs else set()
    return runnable, needing


def shrink(words: Sequence[str]) -> list[str]:
    """A command with what makes it small."""
    line = " ".join(words)
    more = next((more for start, more in SMALLER.items() if line.startswith(start)), [])
    return [*words, *more]


def make_nlvr(target: Path, panels: Path) -> None:
    """Drawn panels under the names of the official folders `dev` and `test`."""
    for split, source in (("dev", "train"), ("test", "test")):
        for image in sorted((panels / source / "images").rglob("*.png")):
            copy = target / split / "images" / image.parent.name / image.name.replace(f"{source}-", f"{split}-", 1)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, copy)
        shutil.copy(panels / source / f"{source}.json", target / split / f"{split}.json")


def make_stand_ins(world: Any, folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """What the commands of a page read and none of them writes."""
    sources: dict[str, Callable[[Path], Any]] = {
        "scenes": lambda target: target.symlink_to(world.scenes),
        "vqa": lambda target: _make_vqa(world, target),
        "answers_vqa.txt": lambda target: target.write_text("<unk>\nyes\nno\nred\nblue\n"),
        "images": lambda target: shutil.copytree(world.picture().parent, target),
        "detector": lambda target: target.symlink_to(world.detector),
        "regions": lambda target: target.symlink_to(world.regions),
        "pretrained": lambda target: shutil.copytree(world.pretrained, target),
        "demo": lambda target: _make_demo(world, target),
        "NLVR": lambda target: make_nlvr(target, world.nlvr),
        "photos": lambda target: shutil.copytree(world.picture().parent, target),
        "train.csv": lambda target: _make_table(world, target),
        "valid.csv": lambda target: _make_table(world, target),
        "my_detr": lambda target: save_detector("detr", target),
        "my_vit": lambda target: save_backbone("vit", target),
        "examples": lambda target: target.symlink_to(ROOT / "examples"),
        "photo.jpg": lambda target: Image.open(world.picture()).convert("RGB").save(target),
    }
    written = {name for words in commands for name in list_outputs(words)}
    for name, make in sources.items():
        if name not in written and any(reads(words, [name]) for words in commands):
            make(folder / name)
            if name in ("images", "photos"):
                Image.open(world.picture()).convert("RGB").save(folder / name / "photo.jpg")


def _make_vqa(world: Any, target: Path) -> None:
    """VQA's files with the list of minival's images."""
    shutil.copytree(world.scenes / "annotations", target / "annotations")
    content = json.loads((target / "annotations" / "v2_OpenEnded_scenes_val_questions.json").read_text())
    images = sorted({question["image_id"] for question in content["questions"]})
    (target / "annotations" / "minival.txt").write_text("\n".join(map(str, images)))


def _make_demo(world: Any, target: Path) -> None:
    """What `make demo` leaves."""
    for name in ("visualbert/vqa", "visualbert/question-only", "lxmert/vqa"):
        shutil.copytree(world.vqa, target / "small" / name)
    shutil.copytree(world.pretrained, target / "small" / "visualbert" / "pretrain")
    pictures = target / "small" / "scenes" / "images" / "test"
    pictures.mkdir(parents=True)
    shutil.copy(world.picture(), pictures / PICTURE_OF_120)


def _make_table(world: Any, target: Path) -> None:
    """A table of one's own about pictures of the test split."""
    names = sorted(path.name for path in world.picture().parent.glob("*.png"))
    rows = [f"{name},is it red?,{answer}" for name in names for answer in ("yes", "no")]
    target.write_text("\n".join(["image,question,answer", *rows]) + "\n")


def settings_of(world: Any) -> list[str]:
    """Settings that give a recipe of visualbert the encoder of the stand-in `pretrained`."""
    encoder = json.loads((world.pretrained / "run.json").read_text())["config"]["encoder"]
    encoder.pop("feature_size", None)
    values = {key: value for key, value in encoder.items() if isinstance(value, (bool, int, float, str))}
    pairs = [f"encoder.{key}={json.dumps(value).strip(chr(34))}" for key, value in values.items()]
    return [word for pair in (*pairs, "any_features=true", "batch_size=8") for word in ("--set", pair)]


def run_in_this_process(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["visling", *words])
    status = None
    try:
        app.run()
    except SystemExit as end:
        status = end.code
    assert not status, f"visling {shlex.join(words)} ended with status {status}"


def serve_until_ready(line: Sequence[str], folder: Path) -> None:
    """Start a server, wait for its address, and stop it as Ctrl-C does."""
    with subprocess.Popen(
        [sys.executable, "-m", "visling", *line], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        ready = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert "http://" in ready, f"visling {shlex.join(line)} did not start: {err}"
    assert process.returncode == 0, f"visling {shlex.join(line)} ended with status {process.returncode}: {err}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_needs_a_named_download(page: str) -> None:
    commands = list_commands(page)
    runnable, _ = split_runnable(commands)
    assert not runnable or page in (*LONG, *QUICK, *ELSEWHERE), (
        f"{page}: no test runs {[shlex.join(w) for w in runnable]}"
    )
    for row in re.findall(r"^\|.*`visling [^`]* --out [^`]*`.*$", (ROOT / page).read_text(), flags=re.MULTILINE):
        pytest.fail(f"{page}: a command in a table is not run by any test; put it into a block: {row}")


@pytest.mark.parametrize("page", QUICK)
def test_the_commands_of_a_page_run(
    page: str, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runnable, _ = split_runnable(list_commands(page))
    assert runnable, f"{page} has no command that can be run: take it out of QUICK"
    make_stand_ins(world, tmp_path, runnable)
    monkeypatch.chdir(tmp_path)
    several = {name for words in runnable if words[0] == "multitask" for name in list_outputs(words)}
    for words in runnable:
        smaller = [re.sub(r"(demo/.*/)scene_\d+\.png", rf"\1{PICTURE_OF_120}", word) for word in shrink(words)]
        if words[0] in ("pretrain", "finetune") and not several & set(words):  # else it has the encoder of that run
            own = "visualbert-vqa" in words
            smaller += settings_of(world) if own else [w for s in world.settings for w in ("--set", s)]
        if words[:2] == ["detect", "train"]:
            smaller += ["--set", "detector.channels=[8, 12]", "--set", "detector.feature_size=16"]
        if words[0] == "serve":
            serve_until_ready([word for word in smaller if word != "--open"], tmp_path)
            continue
        run_in_this_process(smaller, monkeypatch)
        for name in list_outputs(words):
            assert (tmp_path / name).exists(), f"visling {shlex.join(words)} wrote no {name}"


@pytest.mark.slow
@pytest.mark.parametrize("page", LONG)
def test_the_commands_of_a_long_page_run(page: str, world: Any, tmp_path: Path) -> None:
    runnable, _ = split_runnable(list_commands(page))
    make_stand_ins(world, tmp_path, runnable)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for words in runnable:
        line = [re.sub(r"scene_\d+\.png", PICTURE_OF_120, word) for word in shrink(words)]
        if words[0] == "serve":
            serve_until_ready([word for word in line if word != "--open"], tmp_path)
            continue
        ended = subprocess.run(
            [sys.executable, "-m", "visling", *line],
            cwd=tmp_path, capture_output=True, text=True, timeout=900, env=environment, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, f"visling {shlex.join(line)}\n{ended.stdout}{ended.stderr}"
        for name in list_outputs(words):
            assert (tmp_path / name).exists(), f"visling {shlex.join(words)} wrote no {name}"
    if page == "README.md":
        for name in (
            "regions/manifest.json", "vqa/evaluation_test.json", "vqa/report.html", "comparison/comparison.html",
            PICTURE_OF_120.replace(".png", "-regions.png"),
        ):  # fmt: skip
            assert (tmp_path / name).is_file(), name


def test_the_list_by_hand_makes_what_the_demo_makes() -> None:
    recorded = (ROOT / "docs" / "results" / "runs" / "demo-visualbert.txt").read_text(encoding="utf-8")
    demo = [shlex.split(line)[2:] for line in recorded.splitlines() if line.startswith("$ visling ")]
    by_hand = list_commands("README.md")
    for verb in ("scenes", "pretrain", "finetune"):
        ours, theirs = (next(words for words in some if words[0] == verb) for some in (by_hand, demo))
        assert _without_paths(ours) == _without_paths(theirs), f"README's `visling {verb}` is not the demo's"
    # the preset trains as many updates as the demo asked for
    detecting = next(words for words in by_hand if words[:2] == ["detect", "train"])
    assert "--preset scenes" in shlex.join(detecting)
    assert "--steps" not in detecting
    assert detect_config([], "scenes").train.max_steps == 450
    assert "--steps 450" in recorded


def _without_paths(words: Sequence[str]) -> list[str]:
    """Settings of a command, sorted: no folders, and no threads, which change no result."""
    skipped = ("--out", "--data", "--store", "--init", "--threads")
    kept = [(a, b) for a, b in pairwise(words) if a.startswith("--") and a not in skipped]
    return sorted(f"{option} {value}" for option, value in kept)


def test_the_rules_can_fail(tmp_path: Path) -> None:
    commands = [
        ["convert", "model_LXRT.pth", "--release", "model_LXRT", "--to", "lxmert"],
        ["verify", "lxmert", "recording"],
        ["convert", "unheard_of.pth", "--to", "new"],
        ["pretrain", "--data", "conceptual/train", "--out", "run"],
    ]
    runnable, needing = split_runnable(commands)
    assert runnable == [commands[2]], "a command with an unlisted file must be run"
    assert needing == [commands[0], commands[1], commands[3]]
    page = tmp_path / "page.md"
    page.write_text("```bash\nvisling doctor\nrm -rf everything\n```\n")
    with pytest.raises(AssertionError, match="rm -rf everything"):
        list_commands(os.path.relpath(page, ROOT))
    assert shrink(["scenes", "--out", "people"]) == ["scenes", "--out", "people", "--panels", "48"]
