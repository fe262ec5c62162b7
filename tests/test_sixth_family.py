"""A family that the package does not know does all that a family does, with nothing of the package edited.

`sixth_family` holds it: UNITER in two files. Contract, pre-training, fine-tuning, conversion, verification, comparison,
use.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import test_contract as contract
from safetensors.torch import load_file
from sixth_family.uniter import PRESETS, Uniter, UniterConfig
from torch import Tensor

from visling import api, models
from visling import config as configs
from visling.cli import app
from visling.errors import CheckpointError, ConfigError
from visling.pretrained import verify as verification
from visling.pretrained.convert import convert
from visling.pretrained.export import export
from visling.pretrained.folder import check_family, read_model_folder
from visling.recipes.tables import find_finetuning, find_pretraining
from visling.runs import finetune as finetuning
from visling.runs import pretrain as pretraining
from visling.runs.compare import Comparison, compare
from visling.runs.evaluate import evaluate

MODEL = "sixth_family.uniter"
RECIPES = "sixth_family.recipes"

# --------------------------------------------------------------------------------------------------------------------
# the contract: every test of every family, run on this one

globals().update({name: value for name, value in vars(contract).items() if name.startswith("test_")})
model = contract.model


@pytest.fixture
def name() -> str:
    return MODEL


# --------------------------------------------------------------------------------------------------------------------
# training, evaluation, use


@pytest.fixture(scope="module")
def pretrained(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sixth") / "pretrained"
    config = configs.override(find_pretraining(f"{RECIPES}:uniter-scenes")(), world.settings)
    pretraining.pretrain(config, folder, data=[str(world.scenes)], store=world.regions, device="cpu")
    return folder


@pytest.fixture(scope="module")
def finetuned(world: Any, pretrained: Path) -> Path:
    folder = pretrained.parent / "vqa"
    config = configs.override(find_finetuning(f"{RECIPES}:uniter-vqa-scenes")(), world.settings)
    finetuning.finetune(config, folder, data=world.scenes, store=world.regions, init=pretrained, device="cpu")
    return folder


def test_it_is_pre_trained_by_a_recipe_of_its_own(pretrained: Path) -> None:
    described = json.loads((pretrained / "run.json").read_text())
    assert (described["model"], described["recipe"], described["status"]) == (MODEL, "uniter-scenes", "finished")
    saved = read_model_folder(pretrained)
    assert isinstance(saved.config, UniterConfig)
    assert isinstance(saved.encoder(), Uniter)
    objectives = {name.split(".")[1] for name in saved.weights if name.startswith("objectives.")}
    assert objectives == {"masked_lm", "matching", "masked_regions"}


def test_it_is_fine_tuned_evaluated_and_asked(world: Any, finetuned: Path) -> None:
    scores = evaluate(finetuned, split="test", device="cpu")
    assert scores
    answer = api.load(finetuned, device="cpu").answer(world.picture(), "how many objects are there?")
    assert answer.text
    assert 0 < answer.confidence <= 1


def test_the_command_line_takes_its_recipes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["visling", "recipes", "show", f"{RECIPES}:uniter-scenes", "--json"])
    with contextlib.suppress(SystemExit):
        app.run()
    shown = json.loads(capsys.readouterr().out)
    assert shown.keys() == {"pretrain"}
    assert shown["pretrain"]["model"] == MODEL
    assert shown["pretrain"]["estimate"]["parameters"] > 0


def test_it_is_compared_with_a_family_of_the_package(world: Any, tmp_path: Path) -> None:
    settings = (
        "encoder.hidden_size=16", "encoder.num_heads=2", "encoder.intermediate_size=32", "batch_size=8",
        "train.max_steps=2", "train.precision=fp32", "train.validate_every=100",
    )  # fmt: skip
    comparison = Comparison(
        models=("visualbert", f"{RECIPES}:uniter"),
        recipe="scenes",
        tasks=("vqa-scenes",),
        seeds=1,
        pretrain_settings=settings,
        finetune_settings=(*settings, "train_limit=16"),
    )
    found = compare(comparison, tmp_path / "out", data=world.scenes, store=world.regions, device="cpu")
    assert found["status"] == "finished"
    assert [row["model"] for row in found["rows"]] == ["visualbert", f"{RECIPES}:uniter"]
    assert (tmp_path / "out" / f"{RECIPES}-uniter" / "seed-0" / "vqa-scenes" / "evaluation_test.json").exists()


# --------------------------------------------------------------------------------------------------------------------
# released files


@pytest.fixture
def released(tmp_path: Path) -> dict[str, Tensor]:
    """Weights in the family's released layout: the encoder, all pre-training heads, and what no model reads."""
    generator = torch.Generator().manual_seed(0)
    config = PRESETS["tiny"]
    width = config.hidden_size
    linear = {"matching.linear": (2, width), "region_targets.transform.dense": (width, width)}
    linear |= {"region_targets.outputs.classes": (1601, width), "vocabulary.dense": (width, width)}
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()} | {"vocabulary.bias": (config.vocab_size,)}
    norms = ("region_targets.transform.norm", "vocabulary.norm")
    shapes |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    shapes |= {f"encoder.{name}": tuple(value.shape) for name, value in models.build_tiny(MODEL).state_dict().items()}
    ours = {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    tensors = models.spec(MODEL).keys["official"].invert(ours)
    return {**tensors, "uniter.img_embeddings.mask_embedding.weight": torch.randn(2, config.feature_size)}


def convert_released(released: dict[str, Tensor], folder: Path) -> Path:
    torch.save(released, folder / "uniter.pt")
    convert(folder / "uniter.pt", folder / "model", model=MODEL)
    return folder / "model"


def test_a_released_file_goes_in_and_out_bit_for_bit(released: dict[str, Tensor], tmp_path: Path) -> None:
    folder = convert_released(released, tmp_path)
    saved = read_model_folder(folder)
    assert saved.config == PRESETS["tiny"]
    assert {about.part for about in saved.heads.values()} == {"vocabulary", "matching", "region_targets"}
    export(folder, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == released.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in released.items())


def test_a_classifier_over_answers_becomes_a_task(released: dict[str, Tensor], tmp_path: Path) -> None:
    width = PRESETS["tiny"].hidden_size
    tensors = {name: tensor for name, tensor in released.items() if name.startswith("uniter.")}
    tensors |= {"vqa_output.0.weight": torch.randn(2 * width, width), "vqa_output.0.bias": torch.randn(2 * width)}
    tensors |= {f"vqa_output.2.{part}": torch.randn(2 * width) for part in ("weight", "bias")}
    tensors |= {"vqa_output.3.weight": torch.randn(3129, 2 * width), "vqa_output.3.bias": torch.randn(3129)}
    torch.save(tensors, tmp_path / "vqa.pt")
    with pytest.raises(CheckpointError, match="the list of answers that its release was trained with"):
        convert(tmp_path / "vqa.pt", tmp_path / "vqa", model=MODEL)
    (tmp_path / "answers.json").write_text(json.dumps([f"answer {number}" for number in range(3129)]))
    convert(tmp_path / "vqa.pt", tmp_path / "vqa", model=MODEL, answers=[tmp_path / "answers.json"])
    loaded, task = read_model_folder(tmp_path / "vqa").task_model()
    assert (task.name, task.config.loss, task.heads["classify"].outputs) == ("vqa", "bce", 3129)
    assert torch.equal(loaded.heads["classify"].get_submodule("linear").weight, tensors["vqa_output.3.weight"])


def test_a_changed_weight_is_named_by_its_layer(released: dict[str, Tensor], tmp_path: Path) -> None:
    folder = convert_released(released, tmp_path)
    verification.record(folder, tmp_path / "recording")
    assert verification.verify(folder, tmp_path / "recording", atol=0, rtol=0).first is None
    released["uniter.encoder.layer.1.output.dense.bias"][0] += 1
    (tmp_path / "changed").mkdir()
    changed = convert_released(released, tmp_path / "changed")
    assert verification.verify(changed, tmp_path / "recording").first == "layers.1"


# --------------------------------------------------------------------------------------------------------------------
# what is refused


def test_names_of_modules_that_offer_nothing_are_refused(tmp_path: Path, released: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"no model 'sixth_family.unitar'.*my_package.my_module"):
        models.spec("sixth_family.unitar")
    with pytest.raises(ConfigError, match=r"module sixth_family.recipes offers no model: expected SPEC"):
        models.spec(RECIPES)
    with pytest.raises(ConfigError, match=r"there is no module sixth_family.gone"):
        find_pretraining("sixth_family.gone:uniter-scenes")
    with pytest.raises(ConfigError, match=r"module sixth_family.uniter offers no table PRETRAINING"):
        find_pretraining(f"{MODEL}:uniter-scenes")
    with pytest.raises(ConfigError, match=r"no recipe .*uniter-scene'. Did you mean 'uniter-scenes'"):
        find_pretraining(f"{RECIPES}:uniter-scene")
    with pytest.raises(ConfigError, match=r"no layout 'transformers'"):
        export(convert_released(released, tmp_path), tmp_path / "hf", layout="transformers")
    with pytest.raises(CheckpointError, match=r"holds sixth_family.uniter, but the recipe trains lxmert"):
        check_family(read_model_folder(tmp_path / "model"), "lxmert")
