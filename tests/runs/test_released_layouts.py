"""Every published recipe on files of the layout that its release reads: written, converted by the command, two steps;
of several tasks, a step of each.

Files have the widths and numbers of regions of the release, encoders are small. A recipe whose release computes its
features from pictures while it trains has no such file; what it does read of a store, boxes and class distributions, is
in the layout that the table names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.published_recipes import (
    IMAGES,
    Files,
    read_log,
    small_finetuning,
    small_pretraining,
    small_sizes,
    train,
    write_corpora,
    write_official,
)
from fixtures.released_layouts import LAYOUTS, detect
from PIL import Image
from typer.testing import CliRunner

from visling import config as configs
from visling.cli.app import app
from visling.data.annotations import gqa as gqa_files
from visling.data.annotations import questions as vqa_files
from visling.image_ids import canonical
from visling.recipes.multitask import PUBLISHED
from visling.recipes.multitask_configs import MultitaskConfig
from visling.recipes.tables import PUBLISHED_FINETUNING, PUBLISHED_PRETRAINING
from visling.regions.store import NativeStore
from visling.runs.finetune import finetune
from visling.runs.multitask import multitask
from visling.types import RegionArray

for_lmdb = pytest.importorskip("lmdb")
for_hdf5 = pytest.importorskip("h5py")

LXMERT, FIRST, MULTITASK = "lxmert-obj36", "vilbert-lmdb", "vilbert-multitask-lmdb"

PRETRAINED: Mapping[str, str | None] = {
    "visualbert-coco": "pythia-fc6-npy",
    "visualbert-vqa": "pythia-fc6-npy",
    "visualbert-nlvr2-coco": "visualbert-th",
    "visualbert-nlvr2": "visualbert-th",
    "visualbert-flickr30k-coco": "ban-hdf5",
    "visualbert-flickr30k": "ban-hdf5",
    "visualbert-vcr-coco": None,
    "visualbert-vcr": None,
    **dict.fromkeys(
        (
            "vlbert-base-prec",
            "vlbert-base-prec-without-text",
            "vlbert-large-prec",
            "vlbert-base-e2e",
            "vlbert-large-e2e",
        ),
        "vlbert-cc-json",
    ),
    **dict.fromkeys(
        ("vilbert-conceptual", "vilbert-multitask", "vilbert-baseline-conceptual"), "conceptual-captions-lmdb"
    ),
    **dict.fromkeys(
        ("lxmert-20epochs-qa", "lxmert-two-phase-qa", "lxmert-paper", "cvlp-release", "cvlp-from-lxmert", "cvlp-paper"),
        LXMERT,
    ),
}
"""Published pre-training -> layout of its release's files; None = the release computes features from pictures and
publishes no file."""

FINETUNED: Mapping[str, str | None] = {
    "visualbert-vqa": "pythia-fc6-npy",
    "visualbert-nlvr2": "visualbert-th",
    "visualbert-flickr30k": "ban-hdf5",
    "visualbert-vcr": None,
    "visualbert-vcr-rationale": None,
    "vlbert-base-vqa": "vlbert-json",
    "vlbert-large-vqa": "vlbert-json",
    **{
        f"vlbert-{size}-{task}": None
        for size in ("base", "large")
        for task in ("refcoco+", "refcoco+-gt", "vcr", "vcr-rationale")
    },
    **{
        f"{family}-{task}": FIRST
        for family in ("vilbert", "vilbert-baseline")
        for task in ("vqa", "vcr", "vcr-rationale", "refcoco+")
    },
    "vilbert-retrieval": FIRST,
    **{
        f"vilbert-multitask-{task}": MULTITASK
        for task in (
            "vqa", "vcr", "vcr-rationale", "retrieval-coco", "retrieval",
            "refcoco", "refcoco+", "refcocog", "nlvr2", "gqa",
        )
    },
    **{f"{family}-{task}": LXMERT for family in ("lxmert", "cvlp") for task in ("vqa", "gqa", "nlvr2")},
}  # fmt: skip
"""Published fine-tuning, in the same way."""

SEVERAL: Mapping[str, str] = {"vilbert-12in1": MULTITASK, "vilbert-vcr-joint": FIRST}
"""Published runs of several tasks, in the same way."""

Convert = Callable[[str, Mapping[str, Any]], Path]


def named(table: Mapping[str, str | None]) -> list[str]:
    return [name for name, layout in table.items() if layout is not None]


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Stores by layout, made by the command from files of the layout."""
    folder = tmp_path_factory.mktemp("layouts")

    def store(layout: str, images: Mapping[str, Any]) -> Path:
        path = folder / f"{layout}-{len(images)}"
        if not path.exists():
            files = folder / f"{layout}-{len(images)}-files"
            files.mkdir()
            written = detect(images, LAYOUTS[layout])
            source = LAYOUTS[layout].write(written, files)
            done = CliRunner().invoke(app, ["regions", "convert", str(source), "--out", str(path)])
            assert done.exit_code == 0, done.output
            assert f"  {layout}\n" in done.output, "recognised by its content"
            assert_same(NativeStore.open(path), written, layout)
        return path

    return store


def assert_same(store: NativeStore, written: Mapping[str, RegionArray], layout: str) -> None:
    """The store holds all that the files of this layout hold, and nothing else."""
    assert len(store) == len(written)
    width, fields = LAYOUTS[layout].width, LAYOUTS[layout].fields
    for image_id, expected in written.items():
        found = store[image_id]
        assert found.features.shape == (len(expected), width)
        order = np.arange(len(expected))
        if layout == "vlbert-cc-json":  # the release sorts regions by the largest probability when it reads them
            assert expected.probs is not None
            order = np.argsort(-expected.probs.max(axis=1))
        for name in ("features", *fields):
            values = getattr(expected, name)[order]
            np.testing.assert_allclose(getattr(found, name).reshape(values.shape), values, rtol=1e-3, atol=1e-6)
        others = {"classes", "class_confidence", "attributes", "attribute_confidence", "probs"} - {*fields}
        assert [name for name in others if getattr(found, name) is not None] == []
        if "boxes" not in fields:
            np.testing.assert_array_equal(found.boxes, np.tile([0, 0, *found.size], (len(found), 1)))


@pytest.fixture(scope="module")
def data(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with everything that published pre-training reads."""
    return write_corpora(files, tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def official(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every task that is fine-tuned."""
    return write_official(world.scenes, tmp_path_factory.mktemp("official"))


def test_every_published_recipe_is_in_the_table() -> None:
    assert PRETRAINED.keys() == PUBLISHED_PRETRAINING.keys()
    assert FINETUNED.keys() == PUBLISHED_FINETUNING.keys()
    assert {*PRETRAINED.values(), *FINETUNED.values()} == {*LAYOUTS, None}
    assert SEVERAL.keys() == PUBLISHED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", named(PRETRAINED))
def test_a_recipe_pretrains_on_the_files_of_its_release(
    tmp_path: Path,
    data: Path,
    convert: Convert,
    name: str,
) -> None:
    layout = PRETRAINED[name]
    assert layout is not None
    ids = [image_id for image_id in IMAGES if canonical(image_id).isdecimal() or not LAYOUTS[layout].numbers]
    if layout == "vlbert-cc-json":
        ids = [f"{line:08d}" for line in range(2)]  # the lines of the captions
    boxes = np.array([[0, 0, 30, 30], [10, 10, 50, 40], [40, 0, 60, 60], [0, 0, 63, 63]], np.float32)
    store = convert(layout, dict.fromkeys(ids, ((64, 64), boxes)))
    run = small_pretraining(name)
    if run.model == "cvlp":
        contrast = run.objective_settings["region_contrast"]
        run = replace(run, objective_settings={"region_contrast": {**contrast, "queue_size": 2 * 36 * 4}})
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for image_id in ids if run.extractor is not None else ():
        Image.new("RGB", (64, 64)).save(pictures / f"{image_id}.jpg")
    lines = train(run, tmp_path / "run", data, store, pictures)
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", named(FINETUNED))
def test_a_recipe_is_finetuned_on_the_files_of_its_release(
    world: Any,
    tmp_path: Path,
    official: Path,
    convert: Convert,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, constant in ((gqa_files, "NUM_MINVAL"), (vqa_files, "NUM_LAST")):
        monkeypatch.setattr(module, constant, 4)
    layout, scenes = FINETUNED[name], NativeStore.open(world.regions)
    assert layout is not None
    found = {image_id: (scenes[image_id].size, scenes[image_id].boxes) for image_id in scenes.ids}
    numbered = LAYOUTS[layout].numbers
    found = {
        image_id: (size, boxes)
        for image_id, (size, boxes) in found.items()
        if len(boxes) and (canonical(image_id).isdecimal() or not numbered)
    }
    run = small_finetuning(name)
    if run.task_settings.get("min_count", 0) is None:
        run = configs.override(run, [f"task_settings.answers={official}/answers_{run.task}.json"])
    files = official / "lxmert" / run.task if run.model in ("lxmert", "cvlp") else official / "scenes"
    state = finetune(run, tmp_path / "run", data=files, store=convert(layout, found), device="cpu")
    assert state.step == 2
    assert all(np.isfinite(line["loss"]) for line in read_log(tmp_path / "run")["train"])


def small_multitask(name: str) -> MultitaskConfig:
    """A published recipe of several tasks with a small encoder, for an update of two examples of each task."""
    run = PUBLISHED[name]()
    tasks = {task: replace(settings, batch_size=2, folder=".") for task, settings in run.tasks.items()}
    train = replace(run.train, max_steps=len(tasks), accumulation=1, log_every=1)
    return replace(run, encoder=replace(run.encoder, **small_sizes(run.model)), tasks=tasks, train=train)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), SEVERAL.items())
def test_a_recipe_of_several_tasks_runs_on_the_files_of_its_release(
    world: Any,
    tmp_path: Path,
    official: Path,
    convert: Convert,
    name: str,
    layout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, constant in ((gqa_files, "NUM_MINVAL"), (vqa_files, "NUM_LAST")):
        monkeypatch.setattr(module, constant, 4)
    data = shutil.copytree(official / "scenes", tmp_path / "data")
    for folder in (tmp_path, data / "karpathy", data / "gqa" / "cache"):
        folder.mkdir(exist_ok=True)
        for dataset in ("coco", "flickr", "genome"):
            np.save(folder / f"{dataset}_test_ids.npy", np.array([10**9]))  # no image of these files
    monkeypatch.chdir(tmp_path)
    scenes = NativeStore.open(world.regions)
    found = {image_id: (scenes[image_id].size, scenes[image_id].boxes) for image_id in scenes.ids}
    found = {image_id: (size, boxes) for image_id, (size, boxes) in found.items() if len(boxes)}
    labels = ("entailment", "neutral", "contradiction")
    pairs = [{"sentence2": "a star", "Flikr30kID": image, "gold_label": label} for image in found for label in labels]
    for split in ("train", "dev"):
        (data / f"snli_ve_{split}.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    run = small_multitask(name)
    for task, settings in run.tasks.items():
        if settings.task_settings.get("min_count", 0) is None:
            answers = f"tasks.{task}.task_settings.answers={official}/answers_{settings.task}.json"
            run = configs.override(run, [answers])
    state = multitask(run, tmp_path / "run", data=[str(data)], store=[str(convert(layout, found))], device="cpu")
    assert state.step == len(run.tasks)
    lines = read_log(tmp_path / "run")["train"]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert {part.partition(".")[0] for line in lines for part in line["parts"]} == run.tasks.keys()
