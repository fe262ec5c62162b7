"""Pre-training on text without any image, and pre-training with images that starts from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from visling import config as configs
from visling import models
from visling.errors import CheckpointError, ConfigError
from visling.pretrained.folder import read_model_folder
from visling.recipes.configs import PretrainConfig
from visling.recipes.tables import PRETRAINING, PUBLISHED_PRETRAINING
from visling.regions.store import NativeStore
from visling.runs.estimate import estimate
from visling.runs.pretrain import pretrain
from visling.train.state import State

SIZES = {
    "lxmert": ("num_text_layers=1", "num_region_layers=1", "num_cross_layers=1"),
    "cvlp": ("num_text_layers=1", "num_region_layers=1", "num_cross_layers=1"),
    "vilbert": (),
    "visualbert": ("num_layers=1",),
    "vlbert": ("num_layers=1",),
}
SHORT = ("batch_size=8", "train.precision=fp32", "train.log_every=2", "train.validate_every=100", "train.max_steps=4")
ALONE = 'corpora=[{kind = "text", special_tokens = true}]'
STILL = ("train.optim.lr=1e-12", "train.optim.weight_decay=0.0", "train.max_steps=1")
"""Settings under which weights stay as they start."""


def tiny(recipe: str, *settings: str) -> PretrainConfig:
    run = PRETRAINING[recipe]()
    sizes = [f"encoder.{size}" for size in SIZES[run.model]]
    return configs.override(run, [*sizes, *SHORT, *settings])


def alone(recipe: str = "lxmert-scenes", *settings: str) -> PretrainConfig:
    """A recipe that reads the scenes' text and nothing else."""
    zeros = [f"objectives.{name}=0" for name in PRETRAINING[recipe]().objectives if name != "masked_lm"]
    return tiny(recipe, ALONE, *zeros, *settings)


def train(run: PretrainConfig, world: Any, out: Path, **given: Any) -> State:
    return pretrain(run, out, **{"data": [str(world.scenes)], "store": None, "device": "cpu", **given})


def lines_of(run: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, (run / "log.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def text_run(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LXMERT, trained on text alone; its width of features is that of the world's store."""
    out = tmp_path_factory.mktemp("text") / "run"
    train(alone(), world, out, store=world.regions)
    return out


@pytest.mark.parametrize("model", SIZES)
def test_every_family_learns_words_of_text_alone(world: Any, tmp_path: Path, model: str) -> None:
    train(alone(f"{model}-scenes", "train.metric=masked_lm_accuracy", "train.direction=max"), world, tmp_path / "run")
    lines = list(lines_of(tmp_path / "run"))
    parts = next(line["parts"] for line in lines if line["kind"] == "train")
    assert parts.keys() == {"masked_lm", "masked_lm_accuracy"}
    scores = next(line["scores"] for line in lines if line["kind"] == "valid")
    assert scores["loss"] == scores["masked_lm"]
    assert 0 < scores["masked_lm"] < 1.5 * math.log(318), "its vocabulary has 318 entries"
    saved = read_model_folder(tmp_path / "run")
    assert (saved.text_only, saved.fingerprint) == (True, "")
    assert {name.split(".")[1] for name in saved.weights if name.startswith("objectives.")} == {"masked_lm"}
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["status"] == "finished"
    assert (about["store"], about["global_batch"]) == (None, {"text": 8})
    assert (about["config"]["region_losses"], about["config"]["region_masking"]) == (None, None)
    width = PRETRAINING[f"{model}-scenes"]().encoder.feature_size
    assert any(f"reads features of width {width}" in line.get("message", "") for line in lines)
    assert "trained without regions" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_text_alone_moves_only_what_reads_text(world: Any, text_run: Path) -> None:
    saved = read_model_folder(text_run)
    assert saved.config.feature_size == NativeStore.open(world.regions).feature_size
    torch.manual_seed(0)
    fresh = models.build("lxmert", saved.config).state_dict()
    moved = {name for name, tensor in saved.encoder().state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert any(name.startswith("text_layers") for name in moved)
    assert not any(name.startswith("region_features") for name in moved)


def test_text_alone_resumes_bit_by_bit(world: Any, tmp_path: Path) -> None:
    run, stopping = (alone("lxmert-scenes", "train.max_steps=30", *more) for more in ((), ("train.max_seconds=0.02",)))
    assert train(run, world, tmp_path / "whole").stopped == "finished"
    assert train(stopping, world, tmp_path / "parts").stopped == "max_seconds"
    assert train(run, world, tmp_path / "parts", resume=True).stopped == "finished"
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_an_estimate_of_text_alone_counts_no_region() -> None:
    found = estimate(alone())
    assert found.assumed["regions"] == {"text": 0}
    assert 0 < found.flops_per_update < estimate(tiny("lxmert-scenes")).flops_per_update


@pytest.mark.parametrize("whitens", [True, False])
def test_a_run_with_images_starts_from_text(world: Any, text_run: Path, tmp_path: Path, whitens: bool) -> None:
    start, settings = text_run, [*STILL, f"encoder.whiten_features={str(whitens).lower()}"]
    if not whitens:
        start = tmp_path / "text"
        train(alone("lxmert-scenes", "encoder.whiten_features=false"), world, start, store=world.regions)
    run = tiny("lxmert-scenes", *settings, 'region_losses.classes="hard"')
    train(run, world, tmp_path / "scratch", store=world.regions)
    train(run, world, tmp_path / "run", store=world.regions, init=start)
    text, scratch, found = (read_model_folder(path).weights for path in (start, tmp_path / "scratch", tmp_path / "run"))
    statistics = {name for name in scratch if ".whiten." in name}
    assert bool(statistics) == whitens
    for name in statistics:
        assert torch.equal(found[name], scratch[name]), "measured on the store"
        assert not torch.equal(found[name], text[name])
    for name in text.keys() - statistics:
        torch.testing.assert_close(found[name], text[name], rtol=0, atol=1e-6, msg=name)
    saved = read_model_folder(tmp_path / "run")
    assert (saved.text_only, saved.fingerprint) == (False, NativeStore.open(world.regions).fingerprint)
    messages = [line.get("message", "") for line in lines_of(tmp_path / "run")]
    taken = f"all weights of the encoder are those of {start / 'model'}, which has seen no region"
    if whitens:
        taken += f"; statistics of features are those of {world.regions}"
    assert taken in messages
    assert any("has no head for matching, masked_regions: randomly" in message for message in messages)


def test_features_of_another_detector_are_as_good_for_a_model_of_text(
    world: Any, text_run: Path, tmp_path: Path
) -> None:
    run = tiny("lxmert-scenes", *STILL, 'region_losses.classes="hard"')
    train(run, world, tmp_path / "run", store=world.other_regions, init=text_run)
    fingerprint = NativeStore.open(world.other_regions).fingerprint
    assert read_model_folder(tmp_path / "run").fingerprint == fingerprint


def test_a_model_of_regions_stays_one_on_text_alone(world: Any, tmp_path: Path) -> None:
    run = alone("visualbert-scenes", *STILL)
    with pytest.raises(ConfigError, match=r"pretrained.* was trained on regions.*--store"):
        train(run, world, tmp_path / "run", init=world.pretrained)
    with pytest.raises(CheckpointError, match="--other-features"):
        train(run, world, tmp_path / "run", init=world.pretrained, store=world.other_regions)
    assert not (tmp_path / "run").exists()
    train(run, world, tmp_path / "run", init=world.pretrained, store=world.regions)
    before, after = read_model_folder(world.pretrained), read_model_folder(tmp_path / "run")
    assert (after.text_only, after.fingerprint) == (False, before.fingerprint)
    for name in (name for name in before.weights if ".whiten." in name):
        assert torch.equal(after.weights[name], before.weights[name])


def test_a_run_with_images_needs_a_store(world: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a model that sees regions needs --store"):
        train(tiny("visualbert-scenes"), world, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [ALONE],
            r"objectives matching, masked_regions, image_qa need images.*--set objectives.matching=0 "
            r"--set objectives.masked_regions=0 --set objectives.image_qa=0, or add a corpus",
        ),
        ([ALONE, "objectives={matching = 1.0}"], "text without images trains only masked_lm"),
        (
            ['corpora=[{kind = "single_captions"}, {kind = "text"}]', "objectives={matching = 1.0}"],
            "text without images trains only masked_lm",
        ),
        ([ALONE, "objectives={masked_lm = 1.0}", "store_on_device=true"], "it sees the words alone"),
        (['corpora=[{kind = "captions", special_tokens = true}]'], "special_tokens is a setting of text"),
    ],
)
def test_what_text_cannot_train_is_refused_before_data_is_read(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny("lxmert-scenes", *settings)


def test_text_alone_has_nothing_to_extract() -> None:
    with pytest.raises(ConfigError, match=r"text alone shows no region.*--set extractor=none"):
        configs.override(
            PUBLISHED_PRETRAINING["vlbert-base-e2e"](), ['corpora=[{kind = "text"}]', "objectives={masked_lm = 1.0}"]
        )
