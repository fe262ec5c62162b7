"""A recipe as a run has it: the encoder of the model that it starts from, short options, and what `--set` decides."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from visling import config as configs
from visling import models
from visling.data.text import VOCABULARIES
from visling.errors import CheckpointError, ConfigError
from visling.pretrained.description import read_encoder_config
from visling.recipes.changes import change_recipe, describe_followed
from visling.recipes.tables import FINETUNING, PRETRAINING, PUBLISHED_FINETUNING, PUBLISHED_PRETRAINING
from visling.runs.configure import configure
from visling.runs.finetune import finetune, fit_to_family

FEW = ("train.max_steps=2", "train.precision=fp32", "batch_size=4")


@pytest.mark.parametrize("model", models.names())
def test_what_recipes_keep_are_settings_of_the_family(model: str) -> None:
    family = models.spec(model)
    assert family.kept <= {field.name for field in dataclasses.fields(family.config)}


@pytest.mark.parametrize("model", models.names())
def test_the_encoder_follows_the_model_that_a_run_starts_from(model: str) -> None:
    """Every setting that a recipe does not keep, whatever it is; those that it keeps are its own."""
    family = models.spec(model)
    start = family.presets["tiny"]
    recipe = FINETUNING[f"{model}-vqa-scenes"]()
    run = change_recipe(recipe, start=start)
    for field in dataclasses.fields(family.config):
        owner = recipe.encoder if field.name in family.kept else start
        assert getattr(run.encoder, field.name) == getattr(owner, field.name), field.name
    assert run.from_init is not None
    assert run.from_init["encoder.vocab_size"] == 318
    assert "encoder.feature_size" not in run.from_init, "the recipe leaves it to the store"
    assert not any(name.partition(".")[2] in family.kept for name in run.from_init)
    assert dataclasses.replace(run, encoder=recipe.encoder, from_init=None) == recipe


@pytest.mark.parametrize("name", sorted(PUBLISHED_FINETUNING))
def test_a_published_fine_tuning_from_its_published_start_is_as_published(name: str) -> None:
    recipe = PUBLISHED_FINETUNING[name]()
    if recipe.start not in PUBLISHED_PRETRAINING:
        return
    start = PUBLISHED_PRETRAINING[recipe.start]()
    run = change_recipe(recipe, start=start.encoder)
    assert run.from_init == {}
    assert dataclasses.replace(run, from_init=None) == recipe, configs.difference(run, recipe)


def test_settings_have_the_last_word() -> None:
    start = models.spec("visualbert").presets["tiny"]
    recipe = FINETUNING["visualbert-vqa-scenes"]()
    run = change_recipe(recipe, ["encoder.hidden_size=64", "encoder.max_tokens=20"], start=start)
    assert (run.encoder.hidden_size, run.encoder.max_tokens, run.encoder.num_layers) == (64, 20, start.num_layers)
    assert run.from_init is not None
    assert "encoder.hidden_size" not in run.from_init
    whole = change_recipe(recipe, ["encoder=vqa"], start=start)
    assert whole.encoder == models.spec("visualbert").presets["vqa"]
    assert whole.from_init == {}


def test_a_model_of_another_family_changes_nothing() -> None:
    recipe = FINETUNING["visualbert-vqa-scenes"]()
    assert change_recipe(recipe, start=models.spec("lxmert").presets["tiny"]) == recipe


def test_the_log_names_what_follows() -> None:
    recipe = FINETUNING["lxmert-vqa-scenes"]()
    start = dataclasses.replace(recipe.encoder, hidden_size=48, pooler="relu")
    (note,) = describe_followed(change_recipe(recipe, start=start), Path("start"))
    assert note == (
        "the encoder has the settings of start, unlike recipe lxmert-vqa-scenes: encoder.hidden_size 48 (recipe: 96), "
        "encoder.pooler relu (recipe: tanh)"
    )
    assert describe_followed(change_recipe(recipe, start=recipe.encoder), Path("start")) == []


def test_a_vocabulary_brings_its_size(tmp_path: Path) -> None:
    recipe = FINETUNING["visualbert-vqa-scenes"]()
    assert change_recipe(recipe, ["encoder.vocabulary=bert-base-uncased"]).encoder.vocab_size == 30522
    own = tmp_path / "vocab.txt"
    shutil.copyfile(VOCABULARIES / "scenes.txt", own)
    with own.open("a") as file:
        file.write("giraffe\n")
    assert change_recipe(recipe, [f'encoder.vocabulary="{own}"']).encoder.vocab_size == 319
    padded = change_recipe(recipe, ["encoder.vocab_size=30528", "encoder.vocabulary=bert-base-uncased"])
    assert padded.encoder.vocab_size == 30528


def test_a_vocabulary_of_ones_own_follows_as_the_file_in_the_model_folder(world: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world.pretrained / "model", folder)
    described = json.loads((folder / "config.json").read_text())
    described["config"]["vocabulary"] = "/gone/vocab.txt"
    (folder / "config.json").write_text(json.dumps(described))
    assert read_encoder_config(folder).vocabulary == str(folder / "vocab.txt")
    assert read_encoder_config(world.pretrained).vocabulary == "scenes"
    with pytest.raises(CheckpointError, match="no model in"):
        read_encoder_config(tmp_path / "nowhere")


def test_a_recipe_of_another_size_fine_tunes_what_it_starts_from(world: Any, tmp_path: Path) -> None:
    """A recipe of BERT's vocabulary, from a model with the words of the scenes and another width."""
    recipe, out = FINETUNING["visualbert-small"](), tmp_path / "run"
    finetune(
        configs.override(recipe, FEW),
        out,
        data=world.scenes,
        store=world.regions,
        init=world.pretrained,
        device="cpu",
    )
    assert json.loads((out / "model" / "config.json").read_text())["config"]["hidden_size"] == 16
    logged = [json.loads(line).get("message", "") for line in (out / "log.jsonl").read_text().splitlines()]
    (told,) = [message for message in logged if "unlike recipe visualbert-small" in message]
    assert "encoder.vocabulary scenes (recipe: bert-base-uncased)" in told
    run = json.loads((out / "run.json").read_text())["config"]
    assert run["from_init"]["encoder.hidden_size"] == 128
    as_typed = configure(recipe, FEW, options={"--epochs": None}, init=world.pretrained)
    assert run == configs.to_dict(fit_to_family(as_typed)), "the call and the command line agree"


def test_a_setting_that_the_weights_do_not_fit_is_named(world: Any, tmp_path: Path) -> None:
    run = configure(FINETUNING["visualbert-vqa-scenes"](), [*FEW, "encoder.hidden_size=48"], init=world.pretrained)
    with pytest.raises(CheckpointError, match=r"do not fit.* Here encoder\.hidden_size is 48, not 16\.$"):
        finetune(run, tmp_path / "run", data=world.scenes, store=world.regions, init=world.pretrained, device="cpu")


def test_short_options() -> None:
    options = {"--epochs": 3, "--batch-size": 7, "--lr": 0.0001, "--seed": None}
    run = change_recipe(PRETRAINING["lxmert-scenes"](), ["train.epochs=3", "train.optim.lr=1e-4"], options=options)
    assert (run.train.epochs, run.batch_size, run.train.optim.lr, run.train.seed) == (3, 7, 1e-4, 0)


@pytest.mark.parametrize(
    ("option", "value", "setting", "message"),
    [
        ("--epochs", 3, "train.epochs=4", r"--epochs 3 and --set train\.epochs=4 contradict each other: give one"),
        ("--lr", 1e-3, "train.optim.lr=1e-4", r"--lr 0\.001 and --set train\.optim\.lr=1e-4 contradict"),
        ("--batch-size", 3, "batch_size=x", r"--batch-size 3 and --set batch_size=x contradict"),
        ("--seed", 1, "train.seed=2", r"--seed 1 and --set train\.seed=2 contradict"),
    ],
)
def test_an_option_that_contradicts_a_setting(option: str, value: float, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        change_recipe(PRETRAINING["lxmert-scenes"](), [setting], options={option: value})


def test_all_contradictions_are_reported_together() -> None:
    options = {"--epochs": 3, "--batch-size": 7, "--lr": 1e-3, "--seed": None}
    with pytest.raises(ConfigError, match=r"^4 problems were found:") as caught:
        change_recipe(
            PRETRAINING["lxmert-scenes"](),
            ["train.epochs=4", "batch_size=8", "train.optim.lr=1e-4", "train.epoch=1"],
            options=options,
        )
    for part in ("--epochs 3 and", "--batch-size 7 and", "--lr 0.001 and", "'train.epoch' is not a setting"):
        assert part in str(caught.value)


@pytest.mark.parametrize("field", ["max_steps", "seconds"])
def test_epochs_of_a_recipe_that_counts_otherwise(field: str) -> None:
    recipe = configs.override(PRETRAINING["lxmert-scenes"](), [f"train.{field}=60"])
    with pytest.raises(ConfigError, match=rf"train\.{field} is 60 in recipe .*--set train\.{field}=none"):
        change_recipe(recipe, options={"--epochs": 3})
    assert change_recipe(recipe, [f"train.{field}=none"], options={"--epochs": 3}).train.epochs == 3
