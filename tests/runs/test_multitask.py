"""Several tasks trained in turn on a tiny world: shared heads, task tokens, exact resume, scores per task, and what is
refused."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from visling import api, models
from visling import config as configs
from visling.errors import CheckpointError, ConfigError, DataError, RunError, StoreError
from visling.pretrained.folder import read_model_folder
from visling.recipes.multitask_configs import MultitaskConfig
from visling.recipes.tables import FINETUNING, MULTITASK
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune
from visling.runs.multitask import multitask
from visling.train.log import read

TINY = (
    "train.precision=fp32", "train.log_every=1", "train.save_every=1", "train.epochs=2", "encoder.dropout_rate=0.1",
    *(f"tasks.{name}.{setting}" for name in ("vqa", "gqa", "referring", "retrieval", "vcr", "nlvr2")
      for setting in ("batch_size=12", "epochs=2", "train_limit=48")),
    "tasks.retrieval.valid_images=2", "stop_and_go.patience=0", "stop_and_go.cooldown=0",
)  # fmt: skip


def tiny(*settings: str, model: str = "vilbert") -> MultitaskConfig:
    run, encoder = MULTITASK[f"{model}-multitask-scenes"](), models.spec(model).presets["tiny"]
    encoder = replace(encoder, num_tasks=20) if model == "vilbert" else encoder
    return configs.override(replace(run, encoder=encoder), [*TINY, *settings])


def train(world: Any, out: Path, *settings: str, **changes: Any) -> Any:
    given = {"data": [str(world.scenes)], "store": [str(world.regions)], "device": "cpu", **changes}
    return multitask(tiny(*settings), out, **given)


@pytest.fixture(scope="module")
def trained(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("multitask") / "run"
    state = train(world, out)
    assert state.stopped == "finished"
    return out


def test_every_task_is_trained_and_validated_by_its_own_scores(trained: Path) -> None:
    lines = read(trained / "log.jsonl")
    tasks = ("vqa", "gqa", "referring", "retrieval", "vcr", "nlvr2")
    parts = {part.partition(".")[0] for line in lines if line["kind"] == "train" for part in line["parts"]}
    assert parts == set(tasks)
    assert all(line["utilisation"] > 0 for line in lines if line["kind"] == "train")
    scores = [line["scores"] for line in lines if line["kind"] == "valid"]
    for name in tasks:
        assert any(key.startswith(f"{name}.") for found in scores for key in found), name
    latest = {key: value for found in scores for key, value in found.items()}
    about = json.loads((trained / "run.json").read_text())
    assert about["status"] == "finished"
    assert about["examples"]["nlvr2"]["train"] > 0
    metrics = {name: task["metric"] for name, task in about["config"]["tasks"].items()}
    mean = np.mean([latest[f"{name}.{metric}"] for name, metric in metrics.items()])
    assert latest["mean"] == pytest.approx(mean)


def test_tasks_share_the_heads_that_their_recipe_names_alike(trained: Path) -> None:
    saved = read_model_folder(trained)
    heads = {name.split(".")[1] for name in saved.weights if name.startswith("heads.")}
    assert heads == {
        "vqa_classify", "gqa_classify", "pointing_regions", "choosing_score", "nlvr2_classify",
    }  # fmt: skip
    assert saved.tasks["vcr"].heads == saved.tasks["retrieval"].heads == {"score": "choosing_score"}
    assert saved.tasks["gqa"].task_token == 15
    one, other = (saved.for_task(name).weights["heads.score.linear.weight"] for name in ("vcr", "retrieval"))
    assert torch.equal(one, other)


def test_each_task_is_scored_and_can_be_asked(world: Any, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with pytest.raises(CheckpointError, match="trained on several tasks: name one of vqa, gqa"):
        evaluate(run, split="val")
    with pytest.raises(CheckpointError, match=r"not trained on a task 'vqaa'. Did you mean 'vqa'"):
        evaluate(run, split="val", task="vqaa")
    for name, split in (("vqa", "val"), ("nlvr2", "dev"), ("retrieval", "val")):
        found = evaluate(run, split=split, task=name)
        assert found["task"] == name
        assert found["scores"]
        assert found["baselines"], "the training split of the task is known"
        assert (run / "tasks" / name / f"evaluation_{split}.json").is_file()
    with pytest.raises(RunError, match="--overwrite"):
        evaluate(run, split="val", task="vqa")
    pictures = sorted((world.scenes / "images" / "test").glob("*.png"))
    answer = api.load(run, task="vqa", device="cpu").answer(pictures[0], "what colour is the star?")
    assert answer.text in read_model_folder(run).for_task("vqa").state["answers"]
    with pytest.raises(CheckpointError, match="name one of"):
        api.load(run, device="cpu")


def test_the_best_model_of_a_task_is_a_model_of_that_task_alone(world: Any, trained: Path, tmp_path: Path) -> None:
    best = {}
    for line in read(trained / "log.jsonl"):
        if line["kind"] == "valid" and "vqa.accuracy" in line["scores"]:
            best[line["step"]] = line["scores"]["vqa.accuracy"]
    shutil.copytree(trained / "models" / "vqa", tmp_path / "vqa")
    saved = read_model_folder(tmp_path / "vqa")
    assert (saved.task, saved.task_token) == ("vqa", 1)
    found = evaluate(tmp_path / "vqa", split="val", data=world.scenes, store=world.regions)
    assert found["scores"]["accuracy"]["value"] == pytest.approx(max(best.values()))
    assert {file.name for file in (trained / "models" / "vqa" / "detector").iterdir()}, "it predicts from raw images"
    in_its_run = evaluate(trained / "models" / "vqa", split="val")
    assert in_its_run == found | {"baselines": in_its_run["baselines"]}
    assert in_its_run["baselines"], "data and store are those that the run names for the task"


# Task tokens


def test_the_token_of_a_task_changes_what_the_model_says(world: Any, trained: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        shutil.copytree(trained / "models" / "vqa", place)
    file = other / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_token": 7}))
    details = []
    for place in (one, other):
        evaluate(place, split="val", data=world.scenes, store=world.regions, overwrite=True)
        details.append((place / "details_val.jsonl").read_text())
    assert details[0] != details[1]


def test_a_model_with_task_tokens_needs_one_and_another_refuses_it(world: Any, tmp_path: Path) -> None:
    alone = configs.override(FINETUNING["vilbert-vqa-scenes"](), ["batch_size=8", "train.max_steps=1"])
    for settings, message in (
        (["encoder.num_tasks=3"], "every text must name its task, and this run names none"),
        (["task_token=1"], r"the model has no task tokens \(encoder.num_tasks is 0\)"),
        (["encoder.num_tasks=3", "task_token=3"], "must be a number from 0 to 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            finetune(
                configs.override(alone, settings),
                tmp_path / "run",
                data=world.scenes,
                store=world.regions,
                device="cpu",
            )
        assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="every text must name its task"):
        train(world, tmp_path / "run", "tasks.vqa.task_token=none")


# Fine-tuning from it


def test_fine_tuning_from_it_takes_encoder_head_and_token(world: Any, trained: Path, tmp_path: Path) -> None:
    config = configs.override(
        FINETUNING["vilbert-vcr-scenes"](),
        ["encoder=tiny", "batch_size=8", "train.max_steps=1", "train.optim.lr=0", "train.precision=fp32"],
    )
    finetune(config, tmp_path / "vcr", data=world.scenes, store=world.regions, init=trained, device="cpu")
    saved, start = read_model_folder(tmp_path / "vcr"), read_model_folder(trained)
    assert saved.task_token == 5
    assert torch.equal(saved.weights["heads.score.linear.weight"], start.weights["heads.choosing_score.linear.weight"])
    assert torch.equal(saved.weights["encoder.tasks.weight"], start.weights["encoder.tasks.weight"])
    log = (tmp_path / "vcr" / "log.jsonl").read_text()
    assert "the head score starts from that of retrieval, vcr in" in log

    other = configs.override(
        FINETUNING["vilbert-classification-scenes"](),
        ["encoder=tiny", "batch_size=8", "train.max_steps=1", "task_token=0"],
    )
    finetune(other, tmp_path / "other", data=world.scenes, store=world.regions, init=trained, device="cpu")
    assert "was not trained on classification" in (tmp_path / "other" / "log.jsonl").read_text()
    assert read_model_folder(tmp_path / "other").task_token == 0


def test_it_starts_from_a_model_without_task_tokens(world: Any, tmp_path: Path) -> None:
    alone = configs.override(FINETUNING["vilbert-vqa-scenes"](), ["encoder=tiny", "batch_size=8", "train.max_steps=1"])
    finetune(alone, tmp_path / "alone", data=world.scenes, store=world.regions, device="cpu")
    train(world, tmp_path / "run", "train.max_steps=1", "train.optim.lr=0", init=tmp_path / "alone")
    start, saved = read_model_folder(tmp_path / "alone"), read_model_folder(tmp_path / "run")
    assert torch.equal(
        saved.weights["encoder.embeddings.words.weight"], start.weights["encoder.embeddings.words.weight"]
    )
    assert "the 20 task tokens are randomly initialised" in (tmp_path / "run" / "log.jsonl").read_text()


# Exact resume


class _Interrupting(io.StringIO):
    """A terminal at which Ctrl-C is pressed when a line appears."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def write(self, text: str) -> int:
        if text.startswith(f"step {self.at}/"):
            raise KeyboardInterrupt
        return super().write(text)


@pytest.mark.parametrize("at", [9, 31])
def test_an_interrupted_run_goes_on_bit_for_bit(world: Any, trained: Path, tmp_path: Path, at: int) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(world, out, stream=_Interrupting(at))
    assert json.loads((max((out / "last").glob("step-*")) / "state.json").read_text())["state"]["step"] == at - 1
    assert train(world, out, resume=True).stopped == "finished"
    for one in (trained / "model" / "model.safetensors", *sorted((trained / "models").glob("*/model.safetensors"))):
        a, b = load_file(one), load_file(out / one.relative_to(trained))
        assert a.keys() == b.keys()
        assert all(torch.equal(tensor, b[name]) for name, tensor in a.items()), one
    kept, again = (max((run / "last").glob("step-*/optimizer.pt")) for run in (trained, out))
    assert str(torch.load(kept)) == str(torch.load(again))
    scores = [[line for line in read(run / "log.jsonl") if line["kind"] == "valid"] for run in (trained, out)]
    assert scores[0] == scores[1]
    states = [json.loads((max((run / "last").glob("step-*")) / "state.json").read_text()) for run in (trained, out)]
    assert states[0]["position"] == states[1]["position"]


def test_a_resumed_run_has_the_same_tasks(world: Any, tmp_path: Path) -> None:
    train(world, tmp_path / "run", "train.max_seconds=0.01")
    with pytest.raises(RunError, match=r"was started with other settings: tasks.vqa.loss_scale"):
        train(world, tmp_path / "run", "tasks.vqa.loss_scale=2.0", resume=True)


# A run that ends by its number of updates


TASKS = {"vqa", "gqa", "referring", "retrieval", "vcr", "nlvr2"}


def list_validations(run: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and scores of each."""
    return [(line["step"], line["scores"]) for line in read(run / "log.jsonl") if line["kind"] == "valid"]


def scores_all(scores: dict[str, float]) -> bool:
    return {name.partition(".")[0] for name in scores} == {*TASKS, "mean"}


def test_the_end_of_a_run_validates_every_task(world: Any, trained: Path, tmp_path: Path) -> None:
    """Where it is between two validations, and where only some tasks are due."""
    some = next(step for step, scores in list_validations(trained) if not scores_all(scores))
    for steps in (some - 1, some):
        out = tmp_path / str(steps)
        train(world, out, f"train.max_steps={steps}")
        step, scores = (validations := list_validations(out))[-1]
        assert step == steps
        assert scores_all(scores)
        assert {folder.name for folder in (out / "models").iterdir()} == TASKS
        train(world, out, f"train.max_steps={steps}", resume=True)
        assert list_validations(out) == validations, "a finished run is not validated again"


def test_a_run_may_make_more_updates_than_its_epochs(world: Any, tmp_path: Path) -> None:
    train(world, tmp_path / "whole", "stop_and_go=none")
    whole, _ = list_validations(tmp_path / "whole")[-1]
    state = train(world, tmp_path / "longer", "stop_and_go=none", f"train.max_steps={whole + 5}")
    assert state.step == whole + 5
    step, scores = list_validations(tmp_path / "longer")[-1]
    assert step == whole + 5
    assert scores_all(scores)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tasks.gqa.task_token=1"], "the tasks vqa and gqa have the same task token, 1"),
        (["tasks.vqa.task=vqaa"], "no task 'vqaa'. Did you mean 'vqa'"),
        (["tasks.vqb.batch_size=8"], "needs 'tasks.vqb.task'"),
        (["train.accumulation=2"], "train.accumulation: every task makes updates of its own"),
        (["train.metric=vqa.accuracy"], 'use "mean"'),
        (["train.optim.drop_epochs=[1]"], "train.optim.drop_epochs"),
        (["train.patience=3"], "train.patience: a task that has stopped improving pauses by itself"),
        (["tasks.nlvr2.shares=vqa"], "the tasks vqa and nlvr2 cannot share the head vqa_classify"),
        (["tasks.gqa.shares=vqa"], "the tasks vqa and gqa cannot share the head vqa_classify"),
        (["stop_and_go.every=0"], "stop_and_go.every must be 1 or more"),
        (["train.epochs=1000"], "an epoch of the run has no iteration"),
        (["tasks.vqa.metric=f1"], "tasks.vqa.metric is 'f1'"),
    ],
)
def test_settings_that_contradict_each_other(world: Any, tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(world, tmp_path / "run", *settings)


def test_a_task_without_its_data(world: Any, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the task gqa has no folder .*absent. Name its annotations with --data gqa=DIR"
    ):
        train(world, tmp_path / "run", data=[str(world.scenes), f"gqa={tmp_path / 'absent'}"])
    with pytest.raises(ConfigError, match=r"--data gpa=x: the recipe has no task 'gpa'. Did you mean 'gqa'"):
        train(world, tmp_path / "run", data=[str(world.scenes), "gpa=x"])
    with pytest.raises(ConfigError, match="the task vqa has no --store"):
        train(world, tmp_path / "run", store=[f"gqa={world.regions}"])
    with pytest.raises(ConfigError, match="--data was given twice for all tasks"):
        train(world, tmp_path / "run", data=["a", "b"])
    data = tmp_path / "empty"
    shutil.copytree(world.scenes / "vcr", data / "vcr")
    (data / "vcr" / "val.jsonl").write_text("")
    with pytest.raises(DataError):
        train(world, tmp_path / "run", data=[str(world.scenes), f"vcr={data}"])
    assert not (tmp_path / "run").exists()


def test_stores_of_other_features(world: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the store of gqa, holds features of another detector"):
        train(world, tmp_path / "run", store=[str(world.regions), f"gqa={world.other_regions}"])
    train(
        world, tmp_path / "run", "train.max_steps=1", store=[str(world.regions), f"gqa={world.other_regions}"],
        other_features=True,
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "run.json").read_text())["tasks"]["gqa"]["store"] == str(world.other_regions)


def test_a_store_of_another_width(world: Any, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    with StoreWriter(tmp_path / "wide", feature_size=20, fingerprint=store.fingerprint) as writer:
        for image in store.ids:
            writer.add(image, replace(store[image], features=np.zeros((len(store[image]), 20), np.float32)))
    with pytest.raises(StoreError, match=r"the store of gqa, holds features of width 20; those of .* are 16 wide"):
        train(world, tmp_path / "run", store=[str(world.regions), f"gqa={tmp_path / 'wide'}"])
    assert not (tmp_path / "run").exists()


# Every family


@pytest.mark.parametrize("model", ["visualbert", "vlbert", "lxmert", "cvlp"])
def test_every_family_is_trained_on_several_tasks(world: Any, tmp_path: Path, model: str) -> None:
    config = tiny("train.max_steps=8", model=model)
    state = multitask(config, tmp_path / "run", data=[str(world.scenes)], store=[str(world.regions)], device="cpu")
    assert state.step == 8
    assert evaluate(tmp_path / "run", split="val", task="referring")["scores"]
