"""A fine-tuning that averages its weights: both models are validated, the averaged one is a model folder like any."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from visling import api
from visling import config as configs
from visling.pretrained.folder import read_model_folder
from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import FINETUNING
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune
from visling.train.log import read


def averaged(world: Any, *settings: str) -> FinetuneConfig:
    return configs.override(
        FINETUNING["visualbert-vqa-scenes"](),
        [*world.settings, "train.average=0.5", "train.validate_every=1", *settings],
    )


@pytest.fixture(scope="module")
def run(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run folder, and what was said."""
    out, stream = tmp_path_factory.mktemp("averaged") / "run", io.StringIO()
    finetune(averaged(world), out, data=world.scenes, store=world.regions, device="cpu", stream=stream)
    return out, stream.getvalue()


def test_both_models_are_scored_by_the_task(run: tuple[Path, str]) -> None:
    lines = [line for line in read(run[0] / "log.jsonl") if line["kind"] == "valid"]
    assert lines
    for line in lines:
        own = {name for name in line["scores"] if not name.startswith("averaged_")}
        assert own
        assert line["scores"].keys() == own | {f"averaged_{name}" for name in own}


def test_the_log_and_run_json_say_where_the_averaged_weights_are(run: tuple[Path, str]) -> None:
    folder, said = run
    known = json.loads((folder / "run.json").read_text())["averaged"]
    lines = [line for line in read(folder / "log.jsonl") if line["kind"] == "valid"]
    best = max(line["scores"]["averaged_accuracy"] for line in lines)
    assert known["model"] == "models/averaged"
    assert known["accuracy"] == best
    assert known["step"] in {line["step"] for line in lines if line["scores"]["averaged_accuracy"] == best}
    assert f"models/averaged holds the best averaged weights: accuracy {best:.4f} at step {known['step']}" in said


def test_the_averaged_weights_are_a_model_folder(world: Any, run: tuple[Path, str], tmp_path: Path) -> None:
    """With the same score as in its validation, a detector of its own, and a start for another run."""
    folder = run[0] / "models" / "averaged"
    own, other = read_model_folder(run[0]), read_model_folder(folder)
    assert own.weights.keys() == other.weights.keys()
    assert any(not own.weights[name].equal(other.weights[name]) for name in own.weights)
    assert (folder / "detector").is_dir()
    known = json.loads((run[0] / "run.json").read_text())
    scored = evaluate(folder, split=known["config"]["valid_split"], device="cpu")
    assert scored["scores"]["accuracy"]["value"] == pytest.approx(known["averaged"]["accuracy"])
    assert scored["baselines"], "its training examples are those of the run"
    assert (folder / "evaluation_val.json").is_file()
    assert not (run[0] / "evaluation_val.json").exists()
    picture = next((world.scenes / "images" / "test").glob("*.png"))
    assert api.load(folder, device="cpu").answer(picture, "what colour is the star?").text in own.state["answers"]
    state = finetune(
        averaged(world, "train.max_steps=1"),
        tmp_path / "next",
        data=world.scenes,
        store=world.regions,
        init=folder,
        device="cpu",
    )
    assert state.averaged_best is not None
