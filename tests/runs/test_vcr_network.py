"""VisualBERT on VCR with its own network for regions, on drawn scenes: what a batch holds, what is trained, resumed,
scored, exported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from visling import api, models
from visling import config as configs
from visling.checkpoints import files
from visling.data.annotations.vcr import VcrRecord, read_metadata
from visling.errors import CheckpointError, ConfigError
from visling.models.task_model import TaskModel
from visling.pretrained.convert import convert
from visling.pretrained.export import export
from visling.pretrained.folder import read_model_folder
from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import PUBLISHED_FINETUNING, PUBLISHED_PRETRAINING
from visling.regions.writer import StoreWriter
from visling.runs.evaluate import evaluate
from visling.runs.finetune import Finetuning, finetune
from visling.tasks.base import TaskSource
from visling.tasks.vcr import VCR
from visling.train.optim import build_optimizer
from visling.types import RegionArray
from visling.vision.vcr_network import VcrNetworkConfig, prepare_image

SMALL = VcrNetworkConfig(
    blocks=(1, 1, 1), stem_size=4, widths=(4, 4, 4, 4), mask_channels=2, num_classes=12, class_size=3, feature_size=8,
    picture_width=96, picture_height=32,
)  # fmt: skip
TINY = (
    "batch_size=4", "train.epochs=1", "train.max_steps=4", "train.log_every=1", "train.validate_every=100",
    "train.optim.lr=0.01", "valid_images=12",
)  # fmt: skip
RECIPES = ("visualbert-vcr", "visualbert-vcr-rationale")


def tiny(recipe: str = RECIPES[0], *settings: str) -> FinetuneConfig:
    """The published recipe at tiny sizes."""
    encoder = replace(
        models.spec("visualbert").presets["tiny"], feature_size=8, whiten_features=False, append_spatial=False,
        answer_slot="none", hidden_size=16, num_layers=1, intermediate_size=32,
    )  # fmt: skip
    config = replace(PUBLISHED_FINETUNING[recipe](), encoder=encoder, extractor=SMALL)
    return configs.override(config, [*TINY, *settings])


@pytest.fixture(scope="module")
def objects(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of VCR's objects; its features are never read."""
    path = tmp_path_factory.mktemp("objects") / "store"
    records = [record for split in ("train", "val") for record in VCR(tiny_task()).records(world.scenes, split)]
    with StoreWriter(path, feature_size=1, fingerprint="objects") as writer:
        for record in {record.images[0]: record for record in records}.values():
            found = read_metadata(record)
            features = np.zeros((len(found.boxes), 1), np.float16)
            writer.add(record.images[0], RegionArray(features=features, boxes=found.boxes, size=found.size))
    return path


def tiny_task() -> Any:
    return configs.from_dict(VCR.settings, tiny().task_settings)


def tune(world: Any, store: Path, out: Path, config: FinetuneConfig, **options: Any) -> list[dict[str, Any]]:
    """Run it; what it logged."""
    finetune(config, out, **{"data": world.scenes, "store": store, "images": world.scenes, "device": "cpu", **options})
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def prepared(world: Any, store: Path, *settings: str) -> Finetuning:
    return Finetuning(
        tiny(RECIPES[0], *settings), data=world.scenes, store=store, init=None, device="cpu", other_features=False,
        images=world.scenes, backbone=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(world: Any, objects: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each recipe."""
    folder = tmp_path_factory.mktemp("vcr-network")
    for recipe in RECIPES:
        tune(world, objects, folder / recipe, tiny(recipe))
    return {recipe: folder / recipe for recipe in RECIPES}


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(max((run / "last").glob("step-*")) / "model.safetensors")


# ------------------------------------------------------------------------------------------------------ what a batch is


@pytest.mark.parametrize("training", [True, False])
def test_pictures_boxes_classes_and_masks_are_those_of_the_release(world: Any, objects: Path, training: bool) -> None:
    run = prepared(world, objects)
    task, records = cast(VCR, run.task), cast(Sequence[VcrRecord], run.train_records)
    source = TaskSource(task, records, run.inputs.layout)
    loader = run.inputs.loader(source, batch_size=3, seed=1, training=training)
    places = set()
    for number, (indices, batch, _) in enumerate(loader.batches_with_index()):
        batch.validate()
        pixels, regions = batch.pixels, batch.regions
        assert pixels is not None
        assert regions is not None
        assert pixels.corner is not None
        assert pixels.classes is not None
        assert pixels.masks is not None
        shown_images = {records[int(index)].images for index in indices}  # outside training a picture is read once
        assert pixels.images.shape == (3 if training else len(shown_images), 3, 32, 96)
        for row, (index, at) in enumerate(zip(map(int, indices), pixels.row.tolist(), strict=True)):
            record = records[index]
            picture = np.array(Image.open(next(world.scenes.rglob(f"{record.images[0]}.png"))).convert("RGB"))
            pad_x, pad_y = pixels.corner[at].tolist()
            places.add((pad_x, pad_y))
            shown = prepare_image(picture, SMALL)
            high, wide = shown.shape[1:]
            canvas = prepare_image(np.zeros((32, 96, 3), np.uint8), SMALL)
            canvas[:, pad_y : pad_y + high, pad_x : pad_x + wide] = shown
            assert_close(pixels.images[at], canvas)
            described, relevant = read_metadata(record), task.shown_objects(record)
            scale = wide / described.size[0]
            window = [pad_x, pad_y, pad_x + wide, pad_y + high]
            corners = [window, *(described.boxes[relevant] * scale + np.array([pad_x, pad_y] * 2)).tolist()]
            count = len(corners)
            assert regions.mask[row].sum() == count
            placed = regions.boxes[row, :count] * torch.tensor([wide, high] * 2) + torch.tensor([pad_x, pad_y] * 2)
            assert_close(placed, torch.tensor(corners, dtype=torch.float32), rtol=0, atol=1e-4)
            kinds = [0, *(1 + task.classes.index(record.objects[item]) for item in relevant)]
            assert pixels.classes[row, :count].tolist() == kinds
            assert bool(pixels.masks[row].all()), "drawn outlines are their boxes"
        if number == 4:
            break
    if training:
        assert len({x for x, _ in places}) > 5
        assert {y for _, y in places} == {0}, "square pictures fill the height"
    else:
        assert places == {(32, 0)}


def test_an_example_depends_on_seed_epoch_and_index_alone(world: Any, objects: Path) -> None:
    run = prepared(world, objects)
    source = TaskSource(run.task, run.train_records, run.inputs.layout)

    def corners(epoch: int, size: int) -> dict[int, list[int]]:
        loader = run.inputs.loader(source, batch_size=size, seed=1, training=True)
        loader.epoch = epoch
        return {
            int(index): batch.pixels.corner[row].tolist()
            for indices, batch, _ in loader.batches_with_index()
            for row, index in enumerate(indices)
            if batch.pixels is not None and batch.pixels.corner is not None
        }

    once, again = corners(0, 4), corners(0, 2)
    assert all(again[index] == place for index, place in once.items())
    assert corners(1, 4) != once


# ------------------------------------------------------------------------------------------------- training and scoring


def test_the_whole_network_is_trained_but_its_classifier(world: Any, objects: Path) -> None:
    run = prepared(world, objects)
    training = run.build()
    model, (batch, targets) = training.model, next(iter(training.batches))
    assert isinstance(model, TaskModel)
    model.train()
    training.step(batch, targets).value.backward()  # type: ignore[no-untyped-call]
    network = {name for name, _ in model.named_parameters() if name.startswith("extractor.")}
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert network - trained == {"extractor.classifier.weight", "extractor.classifier.bias"}
    optimiser, _ = build_optimizer(model, run.config.train.optim, 10)
    decayed = {group["weight_decay"]: set(group["names"]) for group in optimiser.param_groups}
    assert network <= decayed[0.01] | decayed[0.0]
    assert {name for name in network if name in decayed[0.0]} == {name for name in network if name.endswith("bias")}
    assert "encoder.norm.weight" in decayed[0.0]


def test_a_run_learns_weights_and_statistics(runs: dict[str, Path], world: Any, objects: Path) -> None:
    log = [json.loads(line) for line in (runs["visualbert-vcr"] / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if line["kind"] == "train"]
    assert len(steps) == 4
    assert all(np.isfinite(line["loss"]) for line in steps)
    assert any("randomly initialised" in line.get("message", "") for line in log)
    trained = weights(runs["visualbert-vcr"])
    norm = "extractor.stages.2.0.expand.norm"
    assert int(trained[f"{norm}.num_batches_tracked"]) == 4
    assert float((trained[f"{norm}.running_var"] - 1).abs().min()) > 0
    assert float((trained[f"{norm}.weight"] - 1).abs().max()) > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stopped_run_resumes_bit_by_bit(
    world: Any, objects: Path, runs: dict[str, Path], tmp_path: Path, recipe: str
) -> None:
    tune(world, objects, tmp_path / "parts", tiny(recipe, "train.max_seconds=0.01"))
    state = max((tmp_path / "parts" / "last").glob("step-*")) / "state.json"
    assert json.loads(state.read_text())["state"]["step"] < 4
    tune(world, objects, tmp_path / "parts", tiny(recipe), resume=True)
    whole, parts = weights(runs[recipe]), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_both_phases_are_scored_together_with_their_networks(runs: dict[str, Path]) -> None:
    for recipe in RECIPES:
        saved = read_model_folder(runs[recipe])
        assert isinstance(saved.extractor, VcrNetworkConfig)
        evaluate(runs[recipe], split="val", batch_size=16, overwrite=True)
    hits = [
        [json.loads(line)["score"] for line in (runs[recipe] / "details_val.jsonl").read_text().splitlines()]
        for recipe in RECIPES
    ]
    joint = evaluate(runs[RECIPES[1]], split="val", batch_size=7, joint=runs[RECIPES[0]], overwrite=True)["joint"]
    found = [joint["scores"][name]["value"] for name in ("answer", "rationale", "joint")]
    expected = [*hits, [one * other for one, other in zip(*hits, strict=True)]]
    assert found == pytest.approx([100 * float(np.mean(each)) for each in expected])


def test_scores_do_not_depend_on_the_batch(runs: dict[str, Path]) -> None:
    """Norms read their statistics when a model is evaluated."""
    rows = []
    for size in (16, 3):
        evaluate(runs[RECIPES[0]], split="val", batch_size=size, overwrite=True)
        lines = (runs[RECIPES[0]] / "details_val.jsonl").read_text().splitlines()
        rows.append([json.loads(line)["confidence"] for line in lines])
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)


def test_the_loss_of_classes_trains_the_classifier(world: Any, objects: Path, tmp_path: Path) -> None:
    log = tune(world, objects, tmp_path / "run", tiny(RECIPES[0], "extractor.class_weight=0.5", "train.max_steps=1"))
    (step,) = [line for line in log if line["kind"] == "train"]
    parts = step["parts"]
    assert step["loss"] == pytest.approx(parts["answer"] + 0.5 * parts["extractor_classes"], rel=1e-4)


def test_pre_training_refuses_the_network() -> None:
    config = PUBLISHED_PRETRAINING["visualbert-vcr"]()
    with pytest.raises(ConfigError, match="the class and the outline of every object, which examples of pre-training"):
        replace(config, extractor=VcrNetworkConfig(frozen_stages=4))


def test_frozen_stages_leave_the_optimiser(world: Any, objects: Path) -> None:
    run = prepared(world, objects, "extractor.frozen_stages=4")
    model = run.build().model
    optimiser, _ = build_optimizer(model, run.config.train.optim, 10)
    moved = {name for group in optimiser.param_groups for name in group["names"] if name.startswith("extractor.")}
    assert not {name for name in moved if name.startswith(("extractor.stem.", "extractor.stages."))}
    assert any(name.startswith("extractor.head.") and ".norm." in name for name in moved)


def test_a_question_about_a_raw_picture_shows_all_regions(world: Any, tmp_path: Path) -> None:
    tune(world, world.regions, tmp_path / "run", tiny(RECIPES[0], "train.max_steps=1"))
    model = api.load(tmp_path / "run", device="cpu")
    answer = model.answer(world.picture(), "how does it look?", ["red", "blue"])
    assert answer.text in ("red", "blue")
    assert answer == model.answer(world.picture(), "how does it look?", ["red", "blue"])


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_model_goes_out_under_the_names_of_the_release_and_starts_another(
    world: Any, objects: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    exported = export(runs[RECIPES[0]], tmp_path / "vcr.safetensors")
    theirs = files.read(tmp_path / "vcr.safetensors")
    assert not exported.left_out
    assert {name.split(".")[0] for name in theirs} == {"bert", "detector"}
    trained = weights(runs[RECIPES[0]])
    assert torch.equal(
        theirs["detector.after_roi_align.0.0.bn3.running_var"],
        trained["extractor.head.0.expand.norm.running_var"],
    )
    out = tmp_path / "run"
    log = tune(world, objects, out, tiny(RECIPES[0], "train.max_steps=1", "train.optim.lr=0"),
               backbone=tmp_path / "vcr.safetensors")  # fmt: skip
    assert any("(official)" in line.get("message", "") for line in log)
    assert torch.equal(weights(out)["extractor.projection.weight"], trained["extractor.projection.weight"])
    other = "extractor.blocks=[1, 2, 1]"
    with pytest.raises(CheckpointError, match="read as a VisualBERT for VCR"):
        tune(world, objects, tmp_path / "other", tiny(RECIPES[0], other), backbone=tmp_path / "vcr.safetensors")


def test_a_released_file_starts_the_encoder_and_the_network(
    world: Any, objects: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Converted for `--init`, and as it is for `--backbone`."""
    file, config = tmp_path / "vcr.safetensors", tiny(RECIPES[0], "train.max_steps=1", "train.optim.lr=0")
    export(runs[RECIPES[0]], file)
    convert(file, tmp_path / "start", layout="official", model="visualbert", config=config.encoder)
    with pytest.raises(CheckpointError, match="name it with --backbone"):
        tune(world, objects, tmp_path / "run", config, init=tmp_path / "start", backbone=file)
    tune(world, objects, tmp_path / "run", config, init=tmp_path / "start", backbone=file, other_features=True)
    started, trained = weights(tmp_path / "run"), weights(runs[RECIPES[0]])
    parts = [name for name in trained if name.startswith(("encoder.", "extractor.")) and "running" not in name]
    assert len(parts) > 50
    assert all(torch.equal(started[name], trained[name]) for name in parts if "num_batches" not in name)


def test_a_run_starts_from_the_network_of_its_model(
    world: Any, objects: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny(RECIPES[1], "train.max_steps=1", "train.optim.lr=0")
    tune(world, objects, tmp_path / "run", config, init=runs[RECIPES[0]])
    started, trained = weights(tmp_path / "run"), weights(runs[RECIPES[0]])
    for name in ("extractor.stem.convolution.weight", "extractor.classes.weight", "encoder.projection.weight"):
        assert torch.equal(started[name], trained[name])
