"""Which parameters ViLBERT's published fine-tunings update, at which rate and with which decay, as both releases' own
training scripts set them up (`golden/vilbert_tasks/optimizer_groups.json`).

The recording has the published names at full depth, of every head; a model of ours has the head of its task alone.
Other schedules of both scripts: tests/parity/test_finetuning_schedules.py.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import finetuning_optimisers as optimisers
import pytest
from finetuning_optimisers import Group
from test_finetuning_schedules import read_vilbert

from visling import config as configs
from visling.recipes.configs import FinetuneConfig
from visling.recipes.vilbert import FINETUNING
from visling.recipes.vilbert_baseline import FINETUNING as BASELINE
from visling.recipes.vilbert_tasks import TASKS
from visling.train.optim import BertAdam, ReleaseAdamW, build_optimizer
from visling.train.schedule import Plateau

FIRST = {
    "vilbert-vqa": ("VQA (TASK0)", "classifier"),
    "vilbert-vcr": ("VCR Q-A + QA-R (TASK1-2)", "score"),
    "vilbert-vcr-rationale": ("VCR Q-A + QA-R (TASK1-2)", "score"),
    "vilbert-retrieval": ("RetrievalFlickr30k (TASK3)", "score"),
    "vilbert-refcoco+": ("refcoco+ (TASK4)", "regions"),
}
"""Recipe -> recorded task, and the part of the key map that its head is."""
PARTS = {"vqa": "classifier", "gqa": "classifier_gqa", "nlvr2": "pair", "referring": "regions"}
"""Task -> part of the key map, where it is not "score"."""
NOT_TRAINED = ("cls.", "vil_", "vision_logit.", "linguisic_logit.", "bert.embeddings.task_embeddings.")
"""Heads of other tasks and the vectors of task tokens, which get no gradient where one task is trained without them."""
NEVER_READ = (".biOutput.q_dense1.", ".biOutput.q_dense2.")

RECIPES = sorted(FINETUNING)


class Recorded:
    """The groups and rates of one release."""

    def __init__(self, golden: Path, name: str) -> None:
        self.first = name in FIRST
        self.layout = "first" if self.first else "multitask"
        self.config = FINETUNING[name]()
        content = json.loads((golden / "vilbert_tasks" / "optimizer_groups.json").read_text(encoding="utf-8"))
        self.content: dict[str, Any] = content["first_release" if self.first else "multi_task_release"]
        if self.first:
            title, self.part = FIRST[name]
        else:
            row = TASKS[name.removeprefix("vilbert-multitask-")]
            title = next(title for title in self.content["tasks"] if title.endswith(f"(TASK{row.number})"))
            self.part = PARTS.get(row.task, "score")
        self.task: dict[str, Any] = self.content["tasks"][title]

    def expected(self) -> dict[str, Group]:
        """Published name -> multiple of the rate, and decay."""
        groups = self.content["parameter_groups"]["groups"]
        rates = {group: rate / self.task["defaults"]["lr"] for group, rate in self.task["learning_rates"].items()}
        return {name: (rates[group], each["weight_decay"]) for group, each in groups.items() for name in each["names"]}

    def found(self, config: FinetuneConfig) -> dict[str, Group]:
        """The same of a recipe of ours."""
        parts = {f"heads.{name}": self.part for name in ("classify", "score", "regions")}
        return optimisers.groups(config, self.layout, parts)


def compare(recorded: Recorded, config: FinetuneConfig) -> None:
    ours, theirs = recorded.found(config), recorded.expected()
    assert config.train.optim.lr == pytest.approx(recorded.task["defaults"]["lr"])
    assert ours.keys() <= theirs.keys()
    left = theirs.keys() - ours.keys()
    assert all(name.startswith(NOT_TRAINED) or any(part in name for part in NEVER_READ) for name in left), sorted(left)
    for place in (0, 1):
        values = {name: group[place] for name, group in ours.items()}
        assert values == pytest.approx({name: theirs[name][place] for name in ours})


@pytest.mark.parametrize("name", RECIPES)
def test_groups_are_the_recorded_ones(golden: Path, name: str) -> None:
    recorded = Recorded(golden, name)
    assert recorded.content["parameter_groups"]["excluded_from_the_optimiser"] == []
    compare(recorded, recorded.config)


@pytest.mark.parametrize("name", RECIPES)
def test_the_optimiser_is_the_recorded_one(golden: Path, name: str) -> None:
    recorded = Recorded(golden, name)
    defaults, optim = recorded.task["defaults"], recorded.config.train.optim
    assert optim.warmup_share == 0.1
    built, _ = build_optimizer(optimisers.untrained_model(recorded.config), optim, total=100, per_epoch=5)
    if recorded.first:
        assert isinstance(built, BertAdam)
        assert [*optim.betas, optim.eps] == [defaults["b1"], defaults["b2"], defaults["e"]]
        assert built.max_grad_norm == defaults["max_grad_norm"]
        (schedule,) = {each["optimizer_arguments"]["schedule"] for each in recorded.content["schedules"].values()}
        assert optim.schedule == schedule
    else:
        assert isinstance(built, ReleaseAdamW)
        assert [*optim.betas, optim.eps] == [*defaults["betas"], defaults["eps"]]
        assert built.bias_correction is defaults["correct_bias"]
        assert optim.clip == "none"
        assert optim.schedule in recorded.task["command_arguments"]


@pytest.mark.parametrize(
    ("name", "release", "scheduler"),
    [
        ("vilbert-vqa", "first_release", "mannul"),
        ("vilbert-multitask-vqa", "multi_task_release", "warmup_linear"),
    ],
)
def test_rates_of_head_and_rest_at_every_update(golden: Path, name: str, release: str, scheduler: str) -> None:
    """In every recorded run of one task that is validated without consequences."""
    config = FINETUNING[name]()
    (factor,) = config.train.optim.rates.values()
    runs = [
        run
        for run in read_vilbert(golden).values()
        if (run.release, run.scheduler, run.accumulation) == (release, scheduler, 1)
        and len(run.values["iterations_per_epoch"]) == 1
        and "validation_scores" not in run.values
    ]
    assert runs
    for run in runs:
        updates = run.values["updates"]
        asked = configs.override(config, [f"train.epochs={run.epochs}", f"train.optim.lr={run.lr}"])
        ours = optimisers.rates(asked, updates, range(updates))
        assert ours == pytest.approx(run.values["lr_rest"], rel=1e-6, abs=1e-12)
        head = factor * config.train.optim.lr / run.lr  # its rate is the same, whatever that of the rest
        assert [head * rate for rate in ours] == pytest.approx(run.values["lr_head"], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vilbert-vqa", "train.optim.swap_decay=false"),
        ("vilbert-vqa", "train.optim.rates={}"),
        ("vilbert-vqa", "train.optim.no_decay_except=[]"),
        ("vilbert-retrieval", "train.optim.lr=2e-5"),
        ("vilbert-multitask-vqa", "train.optim.no_decay=['bias']"),
        ("vilbert-multitask-vqa", "train.optim.no_decay_except=['attention.norm.weight']"),
        ("vilbert-multitask-nlvr2", "train.optim.rates={}"),
        ("vilbert-multitask-refcoco", "train.optim.rates={'heads.' = 5.0}"),
    ],
)
def test_another_rule_is_noticed(golden: Path, name: str, change: str) -> None:
    recorded = Recorded(golden, name)
    with pytest.raises(AssertionError):
        compare(recorded, configs.override(recorded.config, [change]))


@pytest.mark.parametrize("name", BASELINE)
def test_the_baseline_has_the_rule_of_the_first_release(name: str) -> None:
    """It was not recorded; the script is the same."""
    config = BASELINE[name]()
    parts = {"heads.classify": "classifier", "heads.score": "score", "heads.regions": "regions"}
    found = optimisers.groups(config, "first", parts)
    assert found.keys() >= {"bert.image_embeddings.token_type_embeddings.weight", "bert.pooler.dense.weight"}
    for published, (rate, decay) in found.items():
        assert decay == (0.01 if any(part in published for part in ("bias", "LayerNorm.weight")) else 0.0), published
        assert rate * config.train.optim.lr == pytest.approx(
            1e-4 if "vil_prediction" in published else config.train.optim.lr
        )


DROPPING = ["train.optim.schedule=warmup_constant", "train.optim.drop_epochs=[5, 7]", "train.optim.drop_factor=0.2"]
"""The multi-task release's `--lr_scheduler mannul`."""
AUTOMATIC = ["train.optim.drop_epochs=[]", "train.optim.plateau={}"]
"""The first release's `--lr_scheduler automatic`."""
SCRATCH = (
    "train.optim.rates={'encoder.embeddings.' = 1, 'encoder.text_norm.' = 1, 'encoder.text_layers.' = 1, '' = 2.5}"
)
"""The first release's `--vision_scratch`: 1e-4 for all that does not come from BERT."""


def freeze(last: int) -> str:
    """The first release's `--freeze`: the number of the last text layer that is left as it is."""
    layers = ", ".join(f"'text_layers.{number}.'" for number in range(last + 1))
    return f"train.optim.exclude=['encoder.embeddings.', 'encoder.text_norm.', {layers}]"


def test_vision_from_scratch(golden: Path) -> None:
    """BERT's tensors have the rate of the command, as many as recorded, and all others that of the head."""
    recorded = Recorded(golden, "vilbert-vqa")
    tensors = recorded.content["vision_scratch"]["wrapped"]["tensors_per_learning_rate"]
    (slow, number), (fast, _) = sorted(tensors.items(), key=lambda item: float(item[0]))
    config = configs.override(recorded.config, [SCRATCH])
    found = Counter(rate for rate, _ in recorded.found(config).values())
    assert found.keys() == {1.0, float(fast) / config.train.optim.lr}
    assert found[1.0] == number
    assert float(slow) < float(fast)


def test_frozen_text_layers(golden: Path) -> None:
    recorded = Recorded(golden, "vilbert-vqa")
    whole = recorded.found(recorded.config)
    options = [name for name in recorded.content if name.startswith("freeze_")]
    assert options
    for option in options:
        change = freeze(int(option.removeprefix("freeze_")))
        rest = recorded.found(configs.override(recorded.config, [change]))
        frozen = recorded.content[option]["wrapped"]["frozen"]
        assert whole.keys() - rest.keys() == {name.removeprefix("module.") for name in frozen}


def test_the_page_has_the_options_as_settings() -> None:
    """They are settings of the recipes, and amount to what the releases' options do."""
    page = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    for setting in (SCRATCH, freeze(2), *DROPPING, *AUTOMATIC):
        assert f"--set {setting}" in page or f'--set "{setting}"' in page, setting
    dropping = configs.override(FINETUNING["vilbert-multitask-vqa"](), DROPPING).train.optim
    assert (dropping.schedule, dropping.drop_epochs, dropping.drop_factor) == ("warmup_constant", (5, 7), 0.2)
    assert configs.override(FINETUNING["vilbert-vqa"](), AUTOMATIC).train.optim.plateau == Plateau(
        factor=0.2, patience=1, cooldown=1, threshold=0.001
    )
