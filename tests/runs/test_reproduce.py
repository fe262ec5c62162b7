"""Claims on tiny worlds: a known answer, runs that claims share, a stop and its continuation, budgets, refusals."""

from __future__ import annotations

import fcntl
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

from visling import config as configs
from visling.errors import ConfigError, RunError
from visling.recipes.claim_configs import Arm, Claim, Contrast, Measure, Training, World, read_claim
from visling.runs import worlds as worlds_module
from visling.runs.claim_runs import MEASURED, place_arm, plan_runs
from visling.runs.reproduce import FILE, FOLDER_FILE, Reproduction
from visling.runs.worlds import SIZES
from visling.tasks.base import load as load_task
from visling.tasks.base import read_records

EXAMPLE = Path(__file__).parents[2] / "examples" / "claims" / "shuffled_answers.toml"
SMALL = ("encoder.hidden_size=16", "encoder.num_heads=2", "encoder.intermediate_size=32")
PRETRAINED = Training(recipe="visualbert-scenes", settings=SMALL)
VQA = Training(recipe="visualbert-vqa-scenes", settings=("train_limit=16",))
WITH = Arm(about="pre-trained", trainings=(PRETRAINED, VQA))
WITHOUT = Arm(about="from scratch", trainings=(replace(VQA, settings=(*VQA.settings, *SMALL)),))
CLAIM = Claim(
    name="pre-training",
    paper="None",
    section="tests",
    statement="Pre-training helps.",
    differs="what fine-tuning starts from",
    arms={"with": WITH, "without": WITHOUT},
    contrasts={"with - without": Contrast(weights={"with": 1, "without": -1}, size=2)},
    seeds=3,
    minutes=1.0,
)
LOSSES = replace(
    CLAIM,
    name="words",
    measure=Measure(kind="validation", name="masked_lm_accuracy"),
    arms={
        "all": replace(WITH, trainings=(PRETRAINED,)),
        "half": replace(WITH, trainings=(replace(PRETRAINED, world="half"),)),
    },
    contrasts={"all - half": Contrast(weights={"all": 1, "half": -1}, size=2)},
    worlds={"half": World(shares={"half": 0.5})},
)


@pytest.fixture(scope="module")
def drawn(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose plain world is drawn and whose detector is trained. Tests copy it."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    (out / "worlds" / "plain").mkdir(parents=True)
    shutil.copytree(world.scenes, out / "worlds" / "plain" / "scenes")
    shutil.copytree(world.regions, out / "worlds" / "plain" / "regions")
    shutil.copytree(world.detector, out / "worlds" / "detector")
    (out / FOLDER_FILE).write_text(json.dumps({"format": 1, "size": "tiny"}))
    return out


@pytest.fixture
def out(drawn: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn, tmp_path / "out")


def reproduce(out: Path, *claims: Claim, size: str = "tiny", jobs: int = 1, **options: Any) -> list[dict[str, Any]]:
    return Reproduction(out, size=size, device="cpu", jobs=jobs).run(claims, **options)


def status(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


# A known answer


def test_the_arm_with_shuffled_answers_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = replace(SIZES["tiny"], settings=("train.max_steps=100", "train.validate_every=100"))
    monkeypatch.setitem(SIZES, "toy", toy)
    (found,) = reproduce(tmp_path / "out", read_claim(EXAMPLE), size="toy")
    contrast = found["contrasts"]["own - shuffled"]
    assert found["verdict"] == contrast["verdict"] == "agrees"
    assert contrast["low"] > 0
    assert list(contrast["values"]) == ["0", "1", "2"]
    # The other way round the same runs say the opposite, and nothing is trained again
    before = sorted((tmp_path / "out" / "runs").rglob("run.json"))
    reverse = replace(
        read_claim(EXAMPLE), contrasts={"shuffled - own": Contrast(weights={"shuffled": 1, "own": -1}, size=5.0)}
    )
    (found,) = reproduce(tmp_path / "out", reverse, size="toy")
    assert found["verdict"] == "disagrees"
    assert found["contrasts"]["shuffled - own"]["high"] < 0
    assert sorted((tmp_path / "out" / "runs").rglob("run.json")) == before


# What comes out


def test_a_claim_leaves_its_runs_their_values_and_the_commands_that_made_them(out: Path) -> None:
    (found,) = reproduce(out, CLAIM, seeds=2)
    assert json.loads((out / "claims" / CLAIM.name / FILE).read_text()) == found
    assert (found["status"], found["planned_seeds"], found["verdict"]) == ("finished", 2, "undecided")
    for name, arm in found["arms"].items():
        for seed, folders in enumerate(arm["runs"]):
            about = json.loads((out / folders[-1] / "run.json").read_text())
            assert about["seed"] == seed
            scores = json.loads((out / folders[-1] / "evaluation_test.json").read_text())["scores"]
            assert arm["values"][str(seed)] == scores["accuracy"]["value"], name
            assert arm["examples"] == scores["accuracy"]["count"]
        assert arm["updates"] == [3] * len(claim_trainings(name))
        assert [words[:2] for words in arm["commands"]] == [
            ["visling", "pretrain" if "vqa" not in training.recipe else "finetune"]
            for training in claim_trainings(name)
        ]
    values = [found["arms"][name]["values"] for name in ("with", "without")]
    for seed, difference in found["contrasts"]["with - without"]["values"].items():
        assert difference == pytest.approx(values[0][seed] - values[1][seed])
    assert set(found["curves"]) == {"pre-training: masked_lm_accuracy", "fine-tuning: accuracy"}
    assert configs.from_dict(Claim, found["claim"]) == CLAIM


def claim_trainings(arm: str) -> tuple[Training, ...]:
    return CLAIM.arms[arm].trainings


def test_claims_share_runs_and_seeds_are_added(out: Path) -> None:
    reproduce(out, CLAIM, seeds=1)
    first = {run: run.stat().st_mtime_ns for run in (out / "runs").rglob("model.safetensors")}
    (found,) = reproduce(out, LOSSES, seeds=2)
    assert {run: run.stat().st_mtime_ns for run in first} == first
    assert len(list((out / "runs").glob("*"))) == 4  # its own half, and three of the first claim
    assert len(list((out / "runs").glob("*/seed-1"))) == 2
    captions = out / "worlds" / "plain" / "scenes" / "annotations"
    half, whole = (json.loads((captions / f"captions_{name}.json").read_text()) for name in ("half", "train"))
    assert len(half["images"]) == round(len(whole["images"]) / 2)
    assert {one["image_id"] for one in half["annotations"]} == {image["id"] for image in half["images"]}
    assert all(0 <= value <= 100 for arm in found["arms"].values() for value in arm["values"].values())


def test_the_order_of_seeds_is_seed_by_seed(out: Path) -> None:
    place = Reproduction(out, size="tiny", device="cpu")
    planned = plan_runs(CLAIM, range(2), out, place.worlds)
    assert [run.folder.name for run in planned] == ["seed-0"] * 3 + ["seed-1"] * 3
    assert [len(run.measures) for run in planned] == [0, 1, 1] * 2


def test_noise_and_other_scenes_are_worlds_of_their_own(out: Path) -> None:
    place = Reproduction(out, size="tiny", device="cpu").worlds
    plain, noisy, sketch = (
        place.find(one) for one in (World(), World(label_noise=0.2), World(scenes={"style": "sketch"}))
    )
    assert noisy.data == plain.data
    assert noisy.store == plain.store.with_name("regions-noise-20")
    assert sketch.data.parent != plain.data.parent
    claim = replace(CLAIM, worlds={"noise": World(label_noise=0.2)})
    arms = {name: replace(WITH, trainings=(replace(PRETRAINED, world=name), VQA)) for name in ("plain", "noise")}
    claim = replace(claim, arms=arms, contrasts={"-": Contrast(weights={"plain": 1, "noise": -1}, size=1)})
    clean, wrong = (place_arm(claim, name, 0, out, place) for name in arms)
    assert [run.place.store for run in wrong.runs] == [noisy.store, plain.store]
    # Runs that start from different ones are different, though all their own settings are the same
    assert wrong.runs[1].folder != clean.runs[1].folder


def test_other_questions_and_answers_are_splits_of_vqa(out: Path) -> None:
    Reproduction(out, size="tiny", device="cpu").worlds.prepare(World(questions={"gqa": "gqa", "shuffled": "shuffled"}))
    scenes = out / "worlds" / "plain" / "scenes"
    task = load_task("vqa").configured({})
    splits = ("train", "gqa", "train+gqa", "shuffled")
    vqa, gqa, both, shuffled = (read_records(task, scenes, split) for split in splits)
    asked = json.loads((scenes / "gqa" / "train_balanced_questions.json").read_text())
    assert len(gqa) == len(asked) > 0
    assert len({record.id for record in both}) == len(vqa) + len(gqa)
    assert {image for record in gqa for image in record.images} <= {image for record in vqa for image in record.images}
    assert [record.question for record in shuffled] == [record.question for record in vqa]
    answers = [[tuple(record.answers) for record in records] for records in (vqa, shuffled)]
    assert sorted(answers[0]) == sorted(answers[1])
    assert answers[0] != answers[1]


# Stops


@pytest.mark.slow
def test_a_killed_claim_continues_with_the_same_result(out: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(out, tmp_path / "whole")
    (expected,) = reproduce(whole, CLAIM, seeds=2)
    file = tmp_path / "claim.json"
    file.write_text(json.dumps(configs.to_dict(CLAIM)))
    code = (
        "import json, sys; from visling import config; from visling.recipes.claim_configs import Claim;"
        "from visling.runs.reproduce import Reproduction; from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    claim = config.from_dict(Claim, json.loads(open({str(file)!r}).read()))\n"
        f"    Reproduction(Path({str(out)!r}), size='tiny', device='cpu', jobs=2).run([claim], seeds=2)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((out / "runs").glob("*/seed-0/last/step-????????")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (found,) = reproduce(out, CLAIM, seeds=2)
    assert {name: arm["values"] for name, arm in found["arms"].items()} == {
        name: arm["values"] for name, arm in expected["arms"].items()
    }


def test_what_was_measured_and_is_torn_is_measured_again(out: Path) -> None:
    (before,) = reproduce(out, CLAIM, seeds=1)
    torn = next((out / "runs").rglob(MEASURED))
    torn.write_text(torn.read_text()[:20])
    (after,) = reproduce(out, CLAIM, seeds=1)
    assert after["arms"]["with"]["values"] == before["arms"]["with"]["values"]
    assert after["arms"]["without"]["values"] == before["arms"]["without"]["values"]


# Budgets


def test_a_claim_that_needs_more_than_the_budget_is_marked_and_not_begun(out: Path) -> None:
    known = replace(CLAIM, spread=4.0)
    (found,) = reproduce(out, known, budget=5.0)
    assert (found["status"], found["verdict"]) == ("not run", "undecided")
    assert found["power"]["fits"] is False
    assert found["power"]["seeds_needed"] == 34  # printed tables for a paired t test, effect 0.5: 34
    assert found["power"]["minutes"] == pytest.approx(34.0)
    assert found["minutes"] is None
    assert not (out / "runs").exists()


def test_the_time_is_over_before_anything_is_begun(out: Path) -> None:
    (found,) = reproduce(out, CLAIM, seeds=3, budget=0.0)
    assert found["status"] == "not run"
    assert not (out / "runs").exists()


def test_what_the_seeds_can_decide_is_said_before_they_run(out: Path) -> None:
    lines: list[str] = []
    reproduce(out, replace(CLAIM, spread=4.0), seeds=1, progress=lines.append)
    assert lines[0].startswith("pre-training: it takes 34 seeds to decide 2 points at a spread of 4.0")
    assert lines[0].endswith("1 are planned")
    assert lines[1].startswith("1 of 3: pre-training, with, seed 0")


def test_the_spread_of_earlier_seeds_is_used(out: Path) -> None:
    place = Reproduction(out, size="tiny", device="cpu")
    assert place.estimate(CLAIM).spread is None
    assert place.estimate(replace(CLAIM, spread=1.0)).seeds_needed == 5
    assert place.estimate(replace(CLAIM, spread=200.0)).seeds_needed is None
    assert place.estimate(replace(CLAIM, spread=200.0)).fits is False


# Refusals


def test_a_folder_of_something_else_or_of_another_size_is_refused(out: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(RunError, match="holds other files"):
        Reproduction(tmp_path / "photos", size="tiny")
    with pytest.raises(RunError, match="size tiny; found --size small"):
        Reproduction(out, size="small")
    (out / FOLDER_FILE).write_text('{"form')
    with pytest.raises(RunError, match="damaged"):
        Reproduction(out, size="tiny")


def test_a_folder_that_another_process_uses_is_refused(out: Path) -> None:
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="is in use"):
            reproduce(out, CLAIM, seeds=1)
    assert not (out / "runs").exists()


def test_a_share_under_the_name_of_another_is_refused(out: Path) -> None:
    reproduce(out, LOSSES, seeds=1)
    other = replace(LOSSES, name="other", worlds={"half": World(shares={"half": 0.25})})
    with pytest.raises(RunError, match="another name"):
        reproduce(out, other, seeds=1)


def test_a_wrong_setting_is_refused_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds_module, "stage", None)
    wrong = replace(WITH, trainings=(replace(PRETRAINED, settings=("train.epoch=3",)),))
    with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
        reproduce(tmp_path / "out", replace(CLAIM, arms={"with": wrong, "without": WITHOUT}))
    assert not (tmp_path / "out").exists()
