"""What stops a run is reported together, before anything is trained; and what an objective of weight 0 takes along."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from visling import config as configs
from visling.data.corpora.base import Corpus
from visling.data.corpora.readers import without_objectives
from visling.errors import ConfigError, VislingError
from visling.recipes.configs import OBJECTIVES
from visling.recipes.tables import FINETUNING, PRETRAINING
from visling.runs.configure import configure
from visling.runs.finetune import finetune
from visling.runs.objectives import _OBJECTIVES
from visling.runs.pretrain import pretrain

FEW = ("train.max_steps=2", "train.precision=fp32", "batch_size=4")


def test_a_pre_training_names_every_file_that_is_missing(world: Any, tmp_path: Path) -> None:
    """Two corpora, two splits, features of another width, a model of other features."""
    corpora = 'corpora=[{kind = "captions"}, {kind = "answered_questions"}]'
    settings = [corpora, "any_features=false", "encoder.feature_size=20", "objectives={masked_lm=1}"]
    run = configure(PRETRAINING["visualbert-scenes"](), settings, init=world.pretrained)
    with pytest.raises(VislingError) as caught:
        pretrain(
            run, tmp_path / "run", data=[str(tmp_path)], store=world.other_regions, init=world.pretrained, device="cpu"
        )
    said = [str(error) for error in caught.value.several]
    width = "features of width 16; recipe visualbert-scenes reads 20"
    for part in ("captions_train", "captions_val", "*train*_questions", "*val*_questions", width, "trained on region"):
        assert any(part in one for one in said), (part, said)
    assert len(said) == 6
    assert not (tmp_path / "run").exists()


def test_a_fine_tuning_names_every_option_and_file_that_is_missing(world: Any, tmp_path: Path) -> None:
    run = configs.override(FINETUNING["visualbert-vqa-scenes"](), FEW)
    with pytest.raises(VislingError) as caught:
        finetune(run, tmp_path / "run", data=tmp_path, store=None, init=tmp_path / "nowhere", device="cpu")
    said = str(caught.value)
    assert said.startswith("4 problems were found:\n- a model that sees regions needs --store.")
    for part in ("no model in", "questions", "train", "val"):
        assert part in said


def test_settings_of_all_parts_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        configs.override(
            PRETRAINING["lxmert-scenes"](),
            [
                "train.epochs=0",
                "train.patience=-1",
                "train.optim.lr=-1",
                "encoder.num_heads=7",
                "flip=2",
                "batch_size=0",
            ],
        )
    assert len(caught.value.several) == 6, caught.value


# Objectives of weight 0


def test_the_names_of_objectives_are_those_that_can_be_built() -> None:
    assert set(OBJECTIVES) == set(_OBJECTIVES)


def test_weight_0_is_as_if_the_recipe_had_no_such_objective() -> None:
    recipe = PRETRAINING["lxmert-paper"]()
    run = configs.override(recipe, ["objectives.image_qa=0"])
    rest = {name: weight for name, weight in recipe.objectives.items() if name != "image_qa"}
    assert run == dataclasses.replace(recipe, objectives=rest, objective_settings={}, from_epoch={})
    assert list(run.objectives) == list(rest)


def test_masked_regions_go_with_their_losses_and_with_masking_unless_contrast_needs_it() -> None:
    run = configs.override(PRETRAINING["lxmert-20epochs-qa"](), ["objectives.masked_regions=0"])
    assert (run.region_losses, run.region_masking) == (None, None)
    contrast = PRETRAINING["cvlp-release"]()
    both = configs.override(contrast, ["objectives.masked_regions=0"])
    assert both == contrast


@pytest.mark.parametrize(
    ("kinds", "dropped", "kept"),
    [
        (["captions", "answered_questions"], {"image_qa"}, ["captions"]),
        (["captions", "single_captions"], {"matching"}, ["captions"]),
        (["conceptual_captions", "text"], {"masked_lm"}, ["conceptual_captions"]),
        (["gqa", "vg_qa", "lxmert"], {"image_qa"}, ["lxmert"]),
        (["gqa", "text"], {"image_qa"}, ["gqa", "text"]),  # its sentences are all there is
        (["captions", "text"], {"matching"}, ["captions", "text"]),
    ],
)
def test_corpora_that_serve_one_objective_go_with_it(kinds: list[str], dropped: set[str], kept: list[str]) -> None:
    corpora = [Corpus(kind=kind) for kind in kinds]
    assert [corpus.kind for corpus in without_objectives(corpora, dropped)] == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objectives.image_aq=0"], r"unknown objective 'image_aq'\. Did you mean 'image_qa'"),
        (["objectives.matching=-1"], r"objectives\.matching is a weight, 0 or more; found -1"),
        (["objectives={masked_lm=0}"], r"no objective has a weight above 0; found masked_lm"),
    ],
)
def test_weights_that_make_no_sense(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.override(PRETRAINING["visualbert-scenes"](), settings)


def test_lxmert_learns_from_captions_of_ones_own(world: Any, tmp_path: Path) -> None:
    """In one attempt: the line of docs/models/lxmert.md, at a tiny size."""
    tiny = (
        "encoder=tiny", "any_features=true", "region_losses.feature_size=16", "region_losses.num_classes=9",
        "region_losses.num_attributes=13",
    )  # fmt: skip
    settings = ["objectives.image_qa=0", 'corpora=[{kind="captions"}]']
    run = configs.override(PRETRAINING["lxmert-20epochs-qa"](), [*FEW, *tiny, *settings])
    state = pretrain(run, tmp_path / "run", data=[str(world.scenes)], store=world.regions, device="cpu")
    assert state.step == 2
    assert "image_qa" not in json.loads((tmp_path / "run" / "run.json").read_text())["config"]["objectives"]


def test_fewer_captions_than_a_batch(world: Any, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    file = data / "annotations" / "captions_train.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"annotations": content["annotations"][:5]}))
    settings = ["train.max_steps=2", 'corpora=[{kind="captions"}]', "objectives={masked_lm=1}", "batch_size=64"]
    run = configs.override(PRETRAINING["visualbert-scenes"](), settings)
    pretrain(run, tmp_path / "run", data=[str(data)], store=world.regions, device="cpu")
    assert (
        "5 training examples do not fill a batch of 64: batches of 5 are used"
        in (tmp_path / "run" / "log.jsonl").read_text()
    )
