"""Controlled comparisons on a tiny world: equal budgets, run folders, a stop and its continuation, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from visling import config as configs
from visling.errors import ConfigError, DataError, RunError, StoreError
from visling.recipes import tables
from visling.recipes.tables import FINETUNING, PRETRAINING
from visling.regions.copying import subset
from visling.regions.store import NativeStore
from visling.runs import compare as comparison_module
from visling.runs import finetune as finetuning
from visling.runs import jobs as jobs_module
from visling.runs import pretrain as pretraining
from visling.runs.compare import FILE, Comparison, compare
from visling.runs.jobs import Places
from visling.runs.verdicts import spread

ENCODER = ("encoder.hidden_size=16", "encoder.num_heads=2", "encoder.intermediate_size=32")
BUDGET = ("batch_size=8", "train.max_steps=3", "train.precision=fp32", "train.log_every=2", "train.validate_every=100")
TINY = Comparison(
    models=("visualbert", "lxmert"),
    recipe="scenes",
    tasks=("vqa-scenes",),
    seeds=2,
    pretrain_settings=(*ENCODER, *BUDGET),
    finetune_settings=(*ENCODER, *BUDGET, "train_limit=16"),
    without_pretraining=True,
)
ONE = replace(TINY, models=("visualbert",), seeds=1, without_pretraining=False)


def make(world: Any, out: Path, comparison: Comparison = TINY, **options: Any) -> dict[str, Any]:
    return compare(comparison, out, **{"data": world.scenes, "store": world.regions, "device": "cpu", **options})


@pytest.fixture(scope="module")
def done(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison, made in this process. Tests read it; who writes, writes into a copy."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    make(world, out)
    return out


def found(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / FILE).read_text())
    return read


def runs(out: Path) -> list[str]:
    return sorted(str(file.parent.relative_to(out)) for file in out.glob("*/seed-*/*/run.json"))


def weights(out: Path) -> dict[str, dict[str, Any]]:
    """Of one run folder or a whole comparison."""
    return {str(file.relative_to(out)): load_file(file) for file in sorted(out.glob("**/model/model.safetensors"))}


def assert_same_results(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for file, tensors in ours.items():
        assert all(tensor.equal(theirs[file][name]) for name, tensor in tensors.items()), file
    for one, other in zip(found(first)["rows"], found(second)["rows"], strict=True):
        assert {start: about["score"] for start, about in one["starts"].items()} == {
            start: about["score"] for start, about in other["starts"].items()
        }


# What comes out


def test_every_run_is_an_ordinary_run_folder(world: Any, done: Path) -> None:
    each = ("pretrain", "vqa-scenes", "vqa-scenes-scratch")
    assert runs(done) == [
        f"{model}/seed-{seed}/{run}" for model in ("lxmert", "visualbert") for seed in (0, 1) for run in each
    ]
    for folder in runs(done):
        about = json.loads((done / folder / "run.json").read_text())
        assert about["status"] == "finished"
        assert about["seed"] == int(folder.split("seed-")[1][0])
        assert about["fingerprint"] == NativeStore.open(world.regions).fingerprint
        assert (done / folder / "evaluation_test.json").exists() is ("vqa" in folder)


def test_the_commands_in_the_run_folders_make_the_same_runs(world: Any, done: Path, tmp_path: Path) -> None:
    for name, verb in (("pretrain", pretraining.pretrain), ("vqa-scenes", finetuning.finetune)):
        folder = done / "lxmert" / "seed-1" / name
        program, word, *words = json.loads((folder / "run.json").read_text())["command"]
        assert (program, word) == ("visling", verb.__name__)
        given = [(option, value) for option, value in zip(words[::2], words[1::2], strict=True)]
        options, settings = dict(given), [value for option, value in given if option == "--set"]
        tables: dict[str, Any] = {**PRETRAINING, **FINETUNING}
        run = configs.override(tables[options["--recipe"]](), settings)
        data: Any = [options["--data"]] if word == "pretrain" else Path(options["--data"])
        init = {"init": Path(options["--init"])} if "--init" in options else {}
        assert options["--out"] == str(folder)
        verb(run, tmp_path / name, data=data, store=Path(options["--store"]), device=options["--device"], **init)
        ours, theirs = weights(folder), weights(tmp_path / name)
        assert all(tensor.equal(theirs[file][key]) for file, tensors in ours.items() for key, tensor in tensors.items())


def test_the_table_says_what_the_runs_say(done: Path) -> None:
    about = found(done)
    assert about["status"] == "finished"
    assert about["runs"] == {"ended": 12, "planned": 12}
    assert about["jobs"] == [1]
    assert [(row["task"], row["model"]) for row in about["rows"]] == [
        ("vqa-scenes", "visualbert"),
        ("vqa-scenes", "lxmert"),
    ]
    for row in about["rows"]:
        assert (row["metric"], row["examples"]) == ("accuracy", 12)
        scores: dict[str, list[float]] = {}
        for start, end in (("pre-trained", ""), ("from scratch", "-scratch")):
            folders = [done / row["model"] / f"seed-{seed}" / f"vqa-scenes{end}" for seed in (0, 1)]
            scores[start] = [
                json.loads((folder / "evaluation_test.json").read_text())["scores"]["accuracy"]["value"]
                for folder in folders
            ]
            shown = row["starts"][start]
            assert shown["score"] == spread(dict(enumerate(scores[start])))
            assert shown["parameters"] == json.loads((folders[0] / "run.json").read_text())["parameters"]
            assert shown["updates"]["values"] == {"0": 3, "1": 3}
            assert shown["seconds"]["mean"] > 0
        assert row["gains"]["from scratch"] == spread(
            {seed: scores["pre-trained"][seed] - scores["from scratch"][seed] for seed in (0, 1)}
        )
        assert row["pretraining"]["parameters"] > row["starts"]["pre-trained"]["parameters"] * 0.5
    assert set(about["baselines"]["vqa-scenes"]) == {"majority answer per question type"}


def test_the_plan_names_data_features_versions_and_every_setting(world: Any, done: Path) -> None:
    plan = found(done)["plan"]
    assert plan["fingerprint"] == NativeStore.open(world.regions).fingerprint
    assert plan["data"] == str(world.scenes)
    assert plan["examples"]["vqa-scenes"]["splits"] == {"train": 96, "val": 12, "test": 12}
    assert {"torch", "visling"} < set(plan["versions"])
    assert plan["configs"]["lxmert"]["vqa-scenes"]["train_limit"] == 16
    assert plan["configs"]["lxmert"]["pretrain"]["encoder"]["hidden_size"] == 16
    objectives = {
        "objectives.masked_regions",
        "objectives.image_qa",
        "min_answer_count",
        "region_losses",
        "region_masking",
    }
    assert set(plan["differences"]["pretrain"]) == {"corpora", "train.optim.decay_share", *objectives}
    assert plan["differences"]["vqa-scenes"] == {}


def test_seeds_differ_and_starts_differ(done: Path) -> None:
    heads = {
        file: tensors["encoder.embeddings.words.weight"]
        for file, tensors in weights(done).items()
        if file.startswith("visualbert") and "encoder.embeddings.words.weight" in tensors
    }
    assert len(heads) == 6
    assert all(not one.equal(other) for a, one in heads.items() for b, other in heads.items() if a != b)


def test_spread() -> None:
    assert spread({0: 1.0, 1: 2.0, 2: 6.0}) == {
        "mean": 3.0,
        "spread": pytest.approx(7**0.5),
        "values": {"0": 1.0, "1": 2.0, "2": 6.0},
    }
    assert spread({4: 1.5}) == {"mean": 1.5, "spread": None, "values": {"4": 1.5}}
    assert spread({}) == {"mean": None, "spread": None, "values": {}}


# Side by side, stopped and gone on with


def test_two_processes_make_the_same_and_add_a_text_only_row(world: Any, done: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    out = shutil.copytree(done, tmp_path / "out", ignore=shutil.ignore_patterns("lxmert", "seed-1"))
    make(world, out, replace(TINY, seeds=1, text_only=True), jobs=2, resume=True, progress=lines.append)
    each = ("pretrain", "vqa-scenes", "vqa-scenes-scratch", "vqa-scenes-text-only")
    assert runs(out) == [f"{model}/seed-0/{run}" for model in ("lxmert", "visualbert") for run in each]
    about = found(out)
    assert about["jobs"] == [1, 2]
    assert len(lines) == 8 - 3
    assert lines[-1].startswith("8 of 8: ")
    for row, before in zip(about["rows"], found(done)["rows"], strict=True):
        assert set(row["gains"]) == {"from scratch", "text only"}
        for start in ("pre-trained", "from scratch"):
            assert row["starts"][start]["score"]["values"] == {"0": before["starts"][start]["score"]["values"]["0"]}
    assert json.loads((out / "lxmert/seed-0/vqa-scenes-text-only/model/config.json").read_text())["text_only"] is True
    ours, theirs = weights(out), weights(done)
    for file in ours.keys() & theirs.keys():
        assert all(tensor.equal(theirs[file][name]) for name, tensor in ours[file].items()), file


def test_a_killed_comparison_leaves_no_process_and_goes_on(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    longer = replace(ONE, pretrain_settings=(*ONE.pretrain_settings, "train.max_steps=30", "train.save_every=1"))
    whole = replace(longer, without_pretraining=True)
    make(world, tmp_path / "whole", whole)
    settings = [word for setting in longer.pretrain_settings for word in ("--pretrain-set", setting)]
    settings += [word for setting in longer.finetune_settings for word in ("--set", setting)]
    # fmt: off
    command = [
        sys.executable, "-m", "visling", "compare", "--models", "visualbert", "--recipe", "scenes",
        "--tasks", "vqa-scenes", "--seeds", "1", "--without-pretraining", "--data", str(world.scenes),
        "--store", str(world.regions), "--out", str(out), "--jobs", "2", "--device", "cpu", *settings,
    ]
    # fmt: on
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    last = out / "visualbert" / "seed-0" / "pretrain" / "last"
    deadline = time.monotonic() + 120
    while not list(last.glob("step-????????")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # ends when every process that holds the other end of the pipe has
    before = sorted(last.rglob("*"))
    time.sleep(0.3)
    assert sorted(last.rglob("*")) == before, "a process went on training"
    assert json.loads((out / "visualbert/seed-0/pretrain/run.json").read_text())["status"] == "running"
    assert found(out)["status"] == "running"
    make(world, out, whole, resume=True)
    assert_same_results(tmp_path / "whole", out)


def test_a_finished_comparison_is_only_read(
    world: Any, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    monkeypatch.setattr(jobs_module.Job, "work", None)
    assert make(world, out, resume=True, jobs=3)["rows"] == found(done)["rows"]


def test_a_kill_before_a_run_or_the_comparison_had_begun(world: Any, done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    shutil.rmtree(out / "lxmert" / "seed-0" / "vqa-scenes")
    (out / "lxmert" / "seed-0" / "vqa-scenes").mkdir()
    (out / "lxmert" / "seed-0" / "vqa-scenes" / "run.json.part").write_text('{"sta')
    make(world, out, resume=True)
    assert_same_results(done, out)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f"{FILE}.part").write_text('{"for')
    assert make(world, tmp_path / "new", ONE)["status"] == "finished"


def test_a_torn_evaluation_is_made_again(world: Any, done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    torn = out / "lxmert" / "seed-0" / "vqa-scenes" / "evaluation_test.json"
    torn.write_text(torn.read_text()[:20])
    assert make(world, out, resume=True)["rows"] == found(done)["rows"]


def test_a_failed_run_is_named_and_the_others_stay(world: Any, tmp_path: Path) -> None:
    wild = replace(
        ONE, finetune_settings=(*ONE.finetune_settings, "train.optim.lr=1e30", "train.optim.warmup_share=0.0")
    )
    for jobs in (1, 2):
        with pytest.raises(RunError, match=r"visualbert, seed 0, vqa-scenes, pre-trained: .*loss"):
            make(world, tmp_path / str(jobs), wild, jobs=jobs)
        assert found(tmp_path / str(jobs))["runs"] == {"ended": 1, "planned": 2}


# Equal conditions


def test_models_whose_corpora_differ_get_the_same_number_of_updates(world: Any, tmp_path: Path) -> None:
    by_epochs = tuple(setting for setting in TINY.pretrain_settings if "max_steps" not in setting)
    place = Places(data=world.scenes, store=world.regions, device="cpu")
    long = replace(TINY, models=("visualbert", "vlbert"), pretrain_settings=(*by_epochs, "train.epochs=4"))
    store = NativeStore.open(world.regions)
    alone = [comparison_module._count_updates(long.pretraining(model), place, store) for model in long.models]
    assert alone == [4 * (126 // 8), 4 * (120 // 8)]  # 120 captions, 5 % of them once more with a wrong one
    equal = replace(long, pretrain_settings=(*by_epochs, "train.epochs=4", "batch_size=6"))
    alone = [comparison_module._count_updates(equal.pretraining(model), place, store) for model in equal.models]
    assert alone == [84, 80]
    prepared, plan = comparison_module._prepare(equal, place)
    assert plan["updates"] == 84
    assert [plan["configs"][model]["pretrain"]["train"]["max_steps"] for model in equal.models] == [84, 84]
    assert prepared.pretrain_settings[-1] == "train.max_steps=84"
    objectives = {"objectives.matching", "objectives.masked_regions", "region_losses", "region_masking"}
    assert set(plan["differences"]["pretrain"]) == {"corpora", "train.optim.decay_share", *objectives}
    assert plan["differences"]["pretrain"]["objectives.matching"] == {"visualbert": 0.1, "vlbert": None}


def test_unequal_budgets_are_refused(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = FINETUNING["lxmert-vqa-scenes"]
    table = {**FINETUNING, "lxmert-vqa-scenes": lambda: configs.override(recipe(), ["train.epochs=7"])}
    monkeypatch.setattr(tables, "FINETUNING", table)
    with pytest.raises(
        ConfigError,
        match=r"budgets of vqa-scenes differ: train.epochs is 6 for visualbert, 7 for lxmert. "
        r".*--set train.epochs=VALUE",
    ):
        make(world, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"pretrain_settings": (*TINY.pretrain_settings, "train.max_seconds=5.0")},
            ConfigError,
            "unequal numbers of updates. Use train.max_steps",
        ),
        (
            {"finetune_settings": (*TINY.finetune_settings, "train.seconds=5.0")},
            ConfigError,
            "train.seconds is 5: models would get unequal numbers of updates",
        ),
        (
            {"finetune_settings": BUDGET},
            ConfigError,
            r"cannot take the weights .*hidden_size 16 and 96.*--pretrain-set encoder.NAME=VALUE --set",
        ),
        ({"finetune_settings": (*ENCODER, "train.epoch=3")}, ConfigError, "Did you mean 'epochs'"),
        (
            {"pretrain_settings": ("encoder.num_layers=2",)},
            ConfigError,
            "'encoder.num_layers=2' is not a setting|num_layers",
        ),
        ({"split": "tset"}, DataError, "tset"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    world: Any, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(world, tmp_path / "out", replace(TINY, **changes))
    assert not (tmp_path / "out").exists()


def test_images_without_regions_are_refused_before_anything_is_trained(world: Any, tmp_path: Path) -> None:
    store = NativeStore.open(world.regions)
    subset(store, [image for image in store.ids if image != world.picture().stem], tmp_path / "regions")
    with pytest.raises(StoreError, match="is not in region store"):
        make(world, tmp_path / "out", store=tmp_path / "regions")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("visualbert", "lxmret")}, "lxmert"),
        ({"models": ("visualbert", "visualbert")}, "each once"),
        ({"models": ()}, "needs models"),
        ({"tasks": ()}, "needs tasks"),
        ({"seeds": 0}, "1 seed or more"),
        ({"recipe": "coco"}, "no recipe 'lxmert-coco'. Models that have it: visualbert"),
        ({"tasks": ("vqa-scene",)}, "Did you mean 'visualbert-vqa-scenes'"),
        ({"finetune_settings": ("train.seed=4",)}, "--seeds"),
    ],
)
def test_a_comparison_of_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)


# Its folder


def test_other_things_do_not_go_into_a_comparison(world: Any, done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    with pytest.raises(RunError, match="continue with --resume"):
        make(world, out)
    other = replace(TINY, finetune_settings=(*TINY.finetune_settings, "train.optim.lr=0.5"))
    with pytest.raises(RunError, match=r"comparison of other things: .*lr was 0.001, now 0.5"):
        make(world, out, other, resume=True)
    with pytest.raises(RunError, match="fingerprint was"):
        make(world, out, store=world.other_regions, resume=True)
    data = world.annotations(tmp_path / "data")
    with pytest.raises(RunError, match=f"data was '{world.scenes}'"):
        make(world, out, data=data, resume=True)
    assert found(out) == found(done)


def test_a_resumed_comparison_may_have_more_tasks_but_no_fewer(world: Any, done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    more = replace(TINY, tasks=("vqa-scenes", "nlvr2-scenes"), split="train")
    with pytest.raises(RunError, match="split was 'test', now 'train'"):
        make(world, out, more, resume=True)
    more = replace(TINY, tasks=("vqa-scenes", "gqa-scenes"))
    rows = make(world, out, more, resume=True)["rows"]
    assert [(row["task"], row["model"]) for row in rows] == [
        (task, model) for task in more.tasks for model in TINY.models
    ]
    assert rows[:2] == found(done)["rows"], "what had been trained is kept"
    with pytest.raises(RunError, match="also compares vqa-scenes: name them too"):
        make(world, out, replace(TINY, tasks=("gqa-scenes",)), resume=True)


def test_changed_annotations_are_noticed(world: Any, tmp_path: Path) -> None:
    data = world.annotations(tmp_path / "data")
    place = Places(data=data, store=world.regions, device="cpu")
    _, before = comparison_module._prepare(ONE, place)
    file = data / "annotations" / "v2_OpenEnded_scenes_test_questions.json"
    content = json.loads(file.read_text())
    content["questions"][3]["question"] += " really"
    file.write_text(json.dumps(content))
    _, after = comparison_module._prepare(ONE, place)
    assert set(configs.difference(after, before)) == {"examples.vqa-scenes.digest"}


def test_a_run_of_other_settings_in_its_place_is_noticed(world: Any, done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "out")
    file = out / "visualbert" / "seed-0" / "vqa-scenes" / "run.json"
    about = json.loads(file.read_text())
    about["config"]["train"]["optim"]["lr"] = 0.5
    file.write_text(json.dumps(about))
    with pytest.raises(
        RunError, match=r"seed-0.vqa-scenes holds a run of other settings: train.optim.lr should be 0.001, is 0.5"
    ):
        make(world, out, resume=True)


def test_places_that_cannot_be_taken(world: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to resume"):
        make(world, tmp_path / "out", ONE, resume=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        make(world, tmp_path / "file", ONE)
    with pytest.raises(RunError, match=r"holds file. Use another --out, or delete"):
        make(world, tmp_path, ONE)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / FILE).write_text('{"plan": {')
    with pytest.raises(RunError, match="damaged"):
        make(world, tmp_path / "broken", ONE, resume=True)
