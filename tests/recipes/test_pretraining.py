"""Pre-training runs on a tiny world: what a run folder holds, which corpora are read, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from visling import config as configs
from visling import models
from visling.data.store import NativeStore, subset
from visling.data.text import TextLayout
from visling.errors import CheckpointError, ConfigError, DataError, RunError, StoreError
from visling.recipes import assembly
from visling.recipes.pretraining import RECIPES, Pretraining, corpus, pretrain


def tiny(world: Any, *settings: str, recipe: str = "visualbert-scenes") -> Pretraining:
    return configs.override(RECIPES[recipe](), [*world.settings, *settings])


def test_a_run_folder_says_all_about_its_run(world: Any) -> None:
    about = json.loads((world.pretrained / "run.json").read_text())
    store = NativeStore.open(world.regions)
    assert about["status"] == "finished"
    assert about["recipe"] == "visualbert-scenes"
    assert about["task"] is None
    assert about["images"] == str(world.scenes)
    assert about["store"] == str(world.regions)
    assert about["fingerprint"] == store.fingerprint
    assert about["inputs"]["feature_size"] == store.feature_size
    assert set(about["versions"]) == {"python", "visling", "torch", "numpy", "tokenizers"}
    weights = load_file(world.pretrained / "model" / "model.safetensors")
    assert about["parameters"] == sum(tensor.numel() for name, tensor in weights.items() if ".whiten." not in name)
    assert {"encoder", "objectives"} == {name.split(".")[0] for name in weights}
    lines = [json.loads(line) for line in (world.pretrained / "log.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [2, 4]
    assert set(train[0]["parts"]) == {"masked_lm", "masked_lm_accuracy", "matching", "matching_accuracy"}
    (valid,) = [line for line in lines if line["kind"] == "valid"]
    assert valid["scores"]["loss"] == pytest.approx(valid["scores"]["masked_lm"] + valid["scores"]["matching"])


def test_training_moves_the_encoder(world: Any) -> None:
    run = assembly.fit_to_store(tiny(world), NativeStore.open(world.regions))
    torch.manual_seed(run.train.seed)
    fresh = models.build(run.model, run.encoder).state_dict()
    trained = assembly.read(world.pretrained).encoder().state_dict()
    assert not torch.equal(fresh["projection.weight"], trained["projection.weight"])
    assert (fresh["projection.weight"] - trained["projection.weight"]).abs().max() < 0.1  # it started from this seed


def test_a_run_goes_on_from_another_run(world: Any, tmp_path: Path) -> None:
    run = tiny(world, "train.max_steps=1", "train.optim.lr=1e-12", "train.optim.weight_decay=0.0")
    pretrain(run, tmp_path / "run", data=[str(world.scenes)], store=world.regions, init=world.pretrained, device="cpu")
    before, after = assembly.read(world.pretrained).encoder().state_dict(), assembly.read(tmp_path / "run").encoder().state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_every_corpus_of_every_folder_is_read_by_weight(world: Any) -> None:
    run = tiny(world, 'corpora=[{kind = "captions"}, {kind = "single_captions", weight = 0.5}]')
    store = NativeStore.open(world.regions)
    layout = TextLayout(assembly.tokenizer(run), models.spec(run.model).inputs(run.encoder))
    captions = {
        split: len(json.loads((world.scenes / "annotations" / f"captions_{split}.json").read_text())["annotations"]) for split in ("train", "val")
    }
    data = [str(world.scenes), f"{world.scenes}@val"]
    assert captions == {"train": 120, "val": 15}
    assert len(corpus(run, data, layout, store, valid=False)) == 120 + 60 + 15 + 8
    assert len(corpus(run, data, layout, store, valid=True)) == 15 + 8
    with pytest.raises(DataError, match="give one without @SPLIT"):
        corpus(run, data[1:], layout, store, valid=True)


def test_resuming_with_other_settings_is_refused(world: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(world.pretrained, tmp_path / "run")
    with pytest.raises(RunError, match=r"train.optim.lr was 0.0015, now 0.5"):
        pretrain(tiny(world, "train.optim.lr=0.5"), folder, data=[str(world.scenes)], store=world.regions, device="cpu", resume=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (['corpora=[{kind = "pictures"}]'], ConfigError, r"'corpora\[0\].kind' is 'pictures'"),
        (["objectives={masked_lmm = 1.0}"], ConfigError, r"unknown objectives \['masked_lmm'\]; known: masked_lm, matching"),
        (["valid_split=vall"], DataError, r"captions_vall\*.json.*captions_val.json"),
        (["train_split=trian"], DataError, r"captions_trian\*.json.*captions_train.json"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_no_folder(
    world: Any, tmp_path: Path, settings: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pretrain(tiny(world, *settings), tmp_path / "run", data=[str(world.scenes)], store=world.regions, device="cpu")
    assert not (tmp_path / "run").exists()


def test_an_empty_validation_split_is_refused(world: Any, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    file = data / "annotations" / "captions_val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    run = tiny(world, 'corpora=[{kind = "captions"}]', "objectives={masked_lm = 1.0}")
    with pytest.raises(DataError, match=r"split 'val' of .* holds no example to validate on"):
        pretrain(run, tmp_path / "run", data=[str(data)], store=world.regions, device="cpu")


def test_a_store_without_an_image_of_the_captions_is_refused_at_once(world: Any, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    subset(store, [image for image in store.ids if image != "scene_000000000003"], tmp_path / "regions")
    with pytest.raises(StoreError, match=r"example '300' needs image 'scene_000000000003'"):
        pretrain(tiny(world), tmp_path / "run", data=[str(world.scenes)], store=tmp_path / "regions", device="cpu")
    assert not (tmp_path / "run").exists()


def test_going_on_with_features_of_another_detector_needs_consent(world: Any, tmp_path: Path) -> None:
    def go_on(**options: Any) -> None:
        run = tiny(world, "train.max_steps=1")
        pretrain(run, tmp_path / "run", data=[str(world.scenes)], store=world.other_regions, init=world.pretrained, device="cpu", **options)

    with pytest.raises(CheckpointError, match="--other-features"):
        go_on()
    assert not (tmp_path / "run").exists()
    go_on(other_features=True)
    assert assembly.read(tmp_path / "run").fingerprint == NativeStore.open(world.other_regions).fingerprint


@pytest.mark.parametrize("content", ['{"images": [], "annotations": [', "", '{"annotations": []}'])
def test_truncated_captions_name_the_file(world: Any, tmp_path: Path, content: str) -> None:
    data = world.annotations(tmp_path / "data")
    (data / "annotations" / "captions_train.json").write_text(content)
    with pytest.raises(DataError, match=r"captions_train.json (is truncated or not JSON|must be an object)"):
        pretrain(tiny(world), tmp_path / "run", data=[str(data)], store=world.regions, device="cpu")
