"""Fine-tuning with a jointly trained region extractor: what it learns, keeps, resumes, scores and predicts, and what is
refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from typer.testing import CliRunner

from visling import api
from visling import config as configs
from visling.cli.app import app
from visling.data.annotations.boxes import read_boxes
from visling.errors import ConfigError, DataError, RunError, StoreError
from visling.models.task_model import TaskModel
from visling.pretrained.export import export
from visling.pretrained.folder import read_model_folder
from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import FINETUNING, PRETRAINING
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs.evaluate import evaluate
from visling.runs.finetune import Finetuning, finetune
from visling.runs.pretrain import pretrain
from visling.train.optim import build_optimizer
from visling.types import Loss, Pixels, RegionArray, Regions
from visling.vision.end_to_end import ExtractorConfig, RegionExtractor
from visling.vision.extractors import read_settings

SMALL = ExtractorConfig(blocks=(1, 1, 1), stem_size=4, widths=(4, 4, 6, 4), shorter_side=32, longer_side=64)
TINY = (
    "extractor={blocks = [1, 1, 1], stem_size = 4, widths = [4, 4, 6, 4], shorter_side = 32, longer_side = 64}",
    "encoder.feature_size=16", "encoder.whiten_features=false", "encoder.masks_features=false",
    "encoder.hidden_size=16", "encoder.visual_size=16", "encoder.num_layers=1", "encoder.num_heads=2",
    "encoder.intermediate_size=32", "encoder.visual_scale_init=1.0", "encoder.text_visual_scale_init=1.0", "flip=0.5",
    "batch_size=4", "train.max_steps=4", "train.precision=fp32", "train.log_every=1", "train.validate_every=100",
)  # fmt: skip
TASKS = {"referring": ("task_settings.loss=positive", "task_settings.whole_image=true"), "vcr": ()}
"""With the losses of the release."""


def tiny(task: str, *settings: str) -> FinetuneConfig:
    """VL-BERT's recipe on scenes with a tiny extractor."""
    return configs.override(FINETUNING[f"vlbert-{task}-scenes"](), [*TINY, *TASKS[task], *settings])


def tune(world: Any, out: Path, task: str, *settings: str, **options: Any) -> list[dict[str, Any]]:
    """Run it; what it logged."""
    where = {"data": world.scenes, "store": world.regions, "images": world.scenes, "device": "cpu", **options}
    finetune(tiny(task, *settings), out, **where)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def prepared(world: Any, task: str, *, store: Path | None = None) -> Finetuning:
    """A run before its first update."""
    return Finetuning(
        tiny(task), data=world.scenes, store=store or world.regions, init=None, device="cpu", other_features=False,
        images=world.scenes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each task."""
    folder = tmp_path_factory.mktemp("tuned")
    for task in TASKS:
        tune(world, folder / task, task)
    return {task: folder / task for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_losses_reach_the_later_stages_and_nothing_else_of_the_network(world: Any, task: str) -> None:
    training = prepared(world, task).build()
    model, (batch, targets) = training.model, next(iter(training.batches))
    assert isinstance(model, TaskModel)
    model.train()
    training.step(batch, targets).value.backward()
    trained = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }
    behind = ("extractor.stages.1.", "extractor.stages.2.", "extractor.head.")
    network = {name for name, _ in model.named_parameters() if name.startswith("extractor.")}
    later = {name for name in network if name.startswith(behind) and ".norm." not in name}
    assert {name for name in trained if name.startswith("extractor.")} == later
    optimiser, _ = build_optimizer(model, tiny(task).train.optim, 10)
    moved = {name for group in optimiser.param_groups for name in group["names"]}
    assert moved & network == later


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_resumes_bit_by_bit(world: Any, runs: dict[str, Path], tmp_path: Path, task: str) -> None:
    tune(world, tmp_path / "parts", task, "train.max_seconds=0.01")
    state = json.loads((max((tmp_path / "parts" / "last").glob("step-*")) / "state.json").read_text())["state"]
    assert state["step"] < 4
    tune(world, tmp_path / "parts", task, resume=True)
    whole, parts = (
        load_file(max((run / "last").glob("step-*")) / "model.safetensors") for run in (runs[task], tmp_path / "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("task", TASKS)
def test_the_model_folder_has_the_network_and_is_scored_with_it(
    world: Any, runs: dict[str, Path], tmp_path: Path, task: str
) -> None:
    saved = read_model_folder(runs[task])
    assert saved.extractor == SMALL
    assert json.loads((runs[task] / "run.json").read_text())["images"] == str(world.scenes)
    run = shutil.copytree(runs[task], tmp_path / "run")
    found = evaluate(run, split="val", batch_size=3)
    last = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    valid = [line["scores"] for line in last if line["kind"] == "valid"][-1]
    assert found["scores"]["accuracy"]["value"] == pytest.approx(valid["accuracy"])
    details = (run / "details_val.jsonl").read_text()

    # The features are those of the network: without it, predictions are others.
    weights = load_file(run / "model" / "model.safetensors")
    blind = {name: torch.zeros_like(t) if name.startswith("extractor.head") else t for name, t in weights.items()}
    save_file(blind, run / "model" / "model.safetensors")
    evaluate(run, split="val", batch_size=3, overwrite=True)
    assert (run / "details_val.jsonl").read_text() != details


def test_a_prediction_from_a_raw_picture_is_that_of_the_evaluation(
    world: Any, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(runs["referring"], tmp_path / "run")
    evaluate(run, split="val", batch_size=3)
    rows = [json.loads(line) for line in (run / "details_val.jsonl").read_text().splitlines()]
    model = api.load(run, device="cpu")
    for row in rows[:3]:
        (picture,) = (world.scenes / "images").rglob(f"*{int(row['image']):012d}.png")
        answer = model.answer(picture, row["text"])
        assert answer.confidence == pytest.approx(row["confidence"], abs=1e-4)
        np.testing.assert_allclose(answer.boxes[0], row["boxes"][0], atol=0.02)


def test_a_question_about_a_raw_picture_knows_no_object(world: Any, runs: dict[str, Path]) -> None:
    answer = api.load(runs["vcr"], device="cpu").answer(world.picture(), "how does it look?", ["red", "blue"])
    assert answer.text in ("red", "blue")


@pytest.fixture(scope="module")
def objects(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose regions are the objects of VCR's metadata."""
    path, source = tmp_path_factory.mktemp("objects") / "regions", NativeStore.open(world.regions)
    given = read_boxes(world.scenes / "vcr" / "vcr1images")
    with StoreWriter(path, feature_size=1, fingerprint=source.fingerprint) as writer:
        for image, boxes in given.boxes.items():
            features = np.zeros((len(boxes), 1), np.float16)
            writer.add(image, RegionArray(features=features, boxes=boxes, size=given.sizes[image]))
    return path


def test_masks_of_objects_change_what_is_learned(world: Any, objects: Path) -> None:
    training = prepared(world, "vcr", store=objects).build()
    batch, targets = next(iter(training.batches))
    assert batch.pixels is not None
    assert batch.pixels.masks is not None
    assert batch.pixels.classes is not None
    assert batch.regions is not None
    assert bool((batch.pixels.classes[batch.regions.mask] > 0).all()), "every region shows an object"
    assert bool(batch.pixels.masks.all()), "the outline of a drawn object is its box"
    training.model.eval()
    upper = batch.pixels.masks.clone()
    upper[:, :, 7:] = False
    with torch.no_grad():
        seen, halved = (
            training.step(replace(batch, pixels=replace(batch.pixels, masks=masks)), targets).value
            for masks in (batch.pixels.masks, upper)
        )
    assert not torch.allclose(seen, halved)


def test_a_loss_of_the_extractor_is_added(world: Any) -> None:
    training = prepared(world, "referring").build()
    batch, targets = next(iter(training.batches))
    assert isinstance(training.model, TaskModel)
    network = training.model.eval().extractor
    assert isinstance(network, RegionExtractor)
    before, describe = training.step(batch, targets), network.describe

    def with_loss(regions: Regions, pixels: Pixels) -> tuple[Regions, Loss]:
        return describe(regions, pixels)[0], Loss.mean("of_its_own", torch.full((2,), 3.0))

    setattr(network, "describe", with_loss)  # noqa: B010  (mypy knows methods as fixed)
    after = training.step(batch, targets)
    assert_close(after.value, before.value + 3)
    assert after.parts["of_its_own"][1] == 2


def test_retrieval_ranks_with_the_network(world: Any, tmp_path: Path) -> None:
    config = configs.override(FINETUNING["vlbert-retrieval-scenes"](), [*TINY, "train.max_steps=1"])
    finetune(config, tmp_path / "run", data=world.scenes, store=world.regions, images=world.scenes, device="cpu")
    found = evaluate(tmp_path / "run", split="val", batch_size=4)
    valid = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    scores = next(line["scores"] for line in valid if line["kind"] == "valid")
    assert {name: score["value"] for name, score in found["scores"].items()} == pytest.approx(scores)


# -------------------------------------------------------------------------------------------- what it starts from


@pytest.fixture(scope="module")
def pretrained(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model pre-trained end to end."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    settings = [setting for setting in TINY if not setting.startswith("train.validate")]
    config = configs.override(PRETRAINING["vlbert-scenes"](), [*settings, "train.max_steps=1"])
    pretrain(config, out, data=[str(world.scenes)], store=world.regions, images=world.scenes, device="cpu")
    return out


STILL = ("train.max_steps=1", "train.optim.lr=1e-12", "train.optim.weight_decay=0.0")


@pytest.mark.parametrize("task", TASKS)
def test_it_starts_from_a_model_trained_end_to_end(world: Any, pretrained: Path, tmp_path: Path, task: str) -> None:
    lines = tune(world, tmp_path / "run", task, *STILL, init=pretrained)
    before, after = read_model_folder(pretrained).weights, read_model_folder(tmp_path / "run").weights
    network = [name for name in before if name.startswith("extractor.")]
    assert network
    for name in network:
        assert_close(after[name], before[name], rtol=0, atol=1e-6, msg=name)
    assert not any("randomly initialised" in line.get("message", "") for line in lines)


def test_it_starts_from_a_file(world: Any, pretrained: Path, tmp_path: Path) -> None:
    file = tmp_path / "vl-bert.safetensors"
    export(pretrained, file)
    lines = tune(world, tmp_path / "run", "referring", *STILL, backbone=file)
    before, after = read_model_folder(pretrained).weights, read_model_folder(tmp_path / "run").weights
    name = "extractor.head.0.convolve.convolution.weight"
    assert_close(after[name], before[name], rtol=0, atol=1e-6)
    assert any(line.get("message") == f"the region extractor starts from {file} (official)" for line in lines)
    with pytest.raises(ConfigError, match="give --init or --backbone"):
        tune(world, tmp_path / "both", "referring", backbone=file, init=pretrained)


# --------------------------------------------------------------------------------- other regions in validation


@pytest.fixture(scope="module")
def fewer(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the first region of each image."""
    path, source = tmp_path_factory.mktemp("fewer") / "regions", NativeStore.open(world.regions)
    with StoreWriter(path, feature_size=source.feature_size, fingerprint=source.fingerprint) as writer:
        for image in source.ids:
            found = source[image]
            writer.add(image, RegionArray(features=found.features[:1], boxes=found.boxes[:1], size=found.size))
    return path


def test_validation_and_evaluation_read_their_own_store(world: Any, fewer: Path, tmp_path: Path) -> None:
    lines = tune(world, tmp_path / "run", "referring", valid_store=fewer)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["valid_store"] == str(fewer)
    found = evaluate(tmp_path / "run", split="val", batch_size=3)
    details = [json.loads(line) for line in (tmp_path / "run" / "details_val.jsonl").read_text().splitlines()]
    assert {len(row["top"]) for row in details} == {2}, "a region and the whole image"
    valid = next(line["scores"] for line in lines if line["kind"] == "valid")
    assert found["scores"]["accuracy"]["value"] == pytest.approx(valid["accuracy"])
    other = evaluate(tmp_path / "run", split="val", batch_size=3, store=world.regions, overwrite=True)
    assert other["scores"]["upper_bound"]["value"] >= found["scores"]["upper_bound"]["value"]
    training = prepared(world, "referring")
    batch, _ = next(iter(training.build().batches))
    assert batch.regions is not None
    assert int(batch.regions.mask.sum(1).max()) > 1


def test_a_store_for_validation_fits_that_of_training(world: Any, fewer: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"regions of another detector than .* pass --other-features"):
        tune(world, tmp_path / "run", "referring", valid_store=world.other_regions)
    stored = configs.override(FINETUNING["vlbert-vqa-scenes"](), world.settings)
    blind = configs.override(stored, ["text_only=true"])
    with pytest.raises(ConfigError, match="leave out --valid-store"):
        finetune(blind, tmp_path / "run", data=world.scenes, store=None, valid_store=fewer, device="cpu")
    wide, source = tmp_path / "wide", NativeStore.open(world.regions)
    with StoreWriter(wide, feature_size=3, fingerprint=source.fingerprint) as writer:
        for image in source.ids:
            found = source[image]
            writer.add(image, RegionArray(features=found.features[:, :3], boxes=found.boxes, size=found.size))
    with pytest.raises(StoreError, match=r"features of width 3, .* of width 16: a model reads one width"):
        finetune(stored, tmp_path / "run", data=world.scenes, store=world.regions, valid_store=wide, device="cpu")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ what is refused


def test_pictures_and_extractors_come_together(world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="computes region features from pixels: name the folder of the images"):
        tune(world, tmp_path / "run", "vcr", images=None)
    for option in ("images", "backbone"):
        with pytest.raises(ConfigError, match=rf"reads the features of the store and no image: leave out --{option}"):
            tune(world, tmp_path / "run", "vcr", "extractor=none", **{"images": None, option: world.scenes})
    with pytest.raises(ConfigError, match=r"text_only shows no region.*--set extractor=none"):
        tiny("vcr", "text_only=true")
    with pytest.raises(ConfigError, match="the extractor makes features of width 16"):
        tiny("vcr", "encoder.feature_size=32")
    assert not (tmp_path / "run").exists()


def test_a_missing_picture_is_named(world: Any, runs: dict[str, Path], tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shutil.copy(world.picture("train"), pictures)
    with pytest.raises(DataError, match=rf"{pictures} lacks \d+ of the \d+ pictures that the run reads, such as '\d+'"):
        tune(world, tmp_path / "run", "referring", images=pictures)
    assert not (tmp_path / "run").exists()
    run = shutil.copytree(runs["referring"], tmp_path / "done")
    with pytest.raises(DataError, match=rf"{pictures} lacks"):
        evaluate(run, split="val", images=pictures)
    (run / "run.json").unlink()
    with pytest.raises(RunError, match="computes the features of regions from pixels: name the folder"):
        evaluate(run, split="val", data=world.scenes, store=world.regions)
    evaluate(run, split="val", data=world.scenes, store=world.regions, images=world.scenes)


def test_the_command_line_trains_and_scores_it(world: Any, tmp_path: Path) -> None:
    settings = [part for setting in (*TINY, *TASKS["referring"], *STILL) for part in ("--set", setting)]
    files = ["--data", str(world.scenes), "--store", str(world.regions), "--images", str(world.scenes)]
    command = ["finetune", "--recipe", "vlbert-referring-scenes", *files, "--out", str(tmp_path / "run"), *settings]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--split", "val", "--images", str(world.scenes)])
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output
    shown = CliRunner().invoke(app, ["recipes", "show", "vlbert-base-refcoco+", "--no-estimate"]).output
    assert "computed from the pictures (--images) by a network that is trained jointly" in shown


def test_a_kind_of_network_that_does_not_exist() -> None:
    assert read_settings(configs.to_dict(SMALL)) == SMALL
    with pytest.raises(ConfigError, match="no region extractor 'resnext'"):
        read_settings({"kind": "resnext"})
