"""The papers' claims: every run of every arm can be configured, and arms differ in what the claim says and nothing
else."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from visling import config as configs
from visling import models
from visling.errors import ConfigError
from visling.recipes.changes import change_recipe
from visling.recipes.claim_configs import Arm, Training
from visling.recipes.claim_trainings import answer, estimate_minutes, pretrain, rank
from visling.recipes.claims import CLAIMS
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.recipes.single_stream_claims import SINGLE_STREAM
from visling.recipes.tables import FINETUNING, PRETRAINING
from visling.recipes.two_stream_claims import TWO_STREAMS

Config = PretrainConfig | FinetuneConfig

ARMS = [(name, arm) for name, claim in CLAIMS.items() for arm in claim.arms]

DIFFERENCES: Mapping[str, tuple[str, str, set[str]]] = {
    "visualbert-early-fusion": ("early", "late", {"encoder.bypass"}),
    "vlbert-relation": ("without", "with", {"corpora", "objectives.matching"}),
    "vlbert-text": ("without", "with", {"corpora"}),
    "vlbert-hidden-pixels": ("pixels", "features", {"region_masking.cut_pixels", "encoder.masks_features"}),
    "vilbert-data": ("100 %", "25 %", {"train_split"}),
    "vilbert-classes": ("classes", "features", {"region_losses.classes", "region_losses.features"}),
    "vilbert-depth": (
        "VQA, 3",
        "VQA, 1",
        {"encoder.text_layers_before", "encoder.region_layers_before", "encoder.num_region_layers"},
    ),
    "lxmert-qa": ("with", "without", {"objectives.image_qa"}),
    "lxmert-qa-sets": ("pre-training", "augmentation", {"objectives.image_qa"}),
    "lxmert-vision": ("with", "without", {"objectives.masked_regions", "region_losses", "region_masking"}),
    "cvlp-contrast": ("regression", "classification", {"region_losses.classes", "region_losses.features"}),
    "cvlp-queue": ("long", "short", {"objective_settings.region_contrast.queue_size"}),
    "cvlp-collapse": ("without", "with", {"encoder.key_drop_rate"}),
}
"""Claim -> two arms, and the settings in which their pre-trainings differ."""


def configure(training: Training, start: Any = None, settings: tuple[str, ...] | None = None) -> Config:
    """The config of a run, with other settings if they are given."""
    given = training.settings if settings is None else settings
    if training.recipe in PRETRAINING:
        return change_recipe(PRETRAINING[training.recipe](), given, start=start)
    return change_recipe(FINETUNING[training.recipe](), given, start=start)


def configure_arm(arm: Arm) -> Iterator[Config]:
    """The configs of an arm's runs in order, each with the encoder of the one before."""
    start = None
    for training in arm.trainings:
        config = configure(training, start)
        yield config
        start = config.encoder


def list_runs() -> Iterator[tuple[str, Training]]:
    for name, claim in CLAIMS.items():
        for arm in claim.arms.values():
            for training in arm.trainings:
                yield name, training


def test_claims_have_the_names_of_the_command() -> None:
    assert len(CLAIMS) == len(SINGLE_STREAM) + len(TWO_STREAMS)
    assert {name: claim.name for name, claim in CLAIMS.items()} == {name: name for name in CLAIMS}
    assert {claim.paper for claim in CLAIMS.values()} == {"VisualBERT", "VL-BERT", "ViLBERT", "LXMERT", "CVLP"}


@pytest.mark.parametrize(("claim", "arm"), ARMS)
def test_every_run_of_an_arm_takes_the_weights_of_the_one_before(claim: str, arm: str) -> None:
    runs = list(configure_arm(CLAIMS[claim].arms[arm]))
    for before, after in itertools.pairwise(runs):
        kept = models.spec(after.model).kept
        assert before.model == after.model
        assert configs.difference(after.encoder, before.encoder).keys() <= kept
    assert [isinstance(run, PretrainConfig) for run in runs[:-1]] == [True] * (len(runs) - 1), "fine-tuning comes last"


@pytest.mark.parametrize(("claim", "arm"), ARMS)
def test_the_last_run_has_what_is_measured(claim: str, arm: str) -> None:
    *_, last = configure_arm(CLAIMS[claim].arms[arm])
    measure = CLAIMS[claim].measure_of(arm)
    if measure.kind == "score":
        assert isinstance(last, FinetuneConfig)
        assert measure.split == ("test1" if last.task == "nlvr2" else "test"), "the scenes' name of the split"
    elif measure.kind == "validation" and isinstance(last, FinetuneConfig):
        assert (last.task, measure.name) == ("retrieval", "image_r1")
    else:
        assert isinstance(last, PretrainConfig)
        assert measure.name == "accuracy" or measure.name.removesuffix("_accuracy") in last.objectives
        assert measure.kind != "unread" or (last.region_losses is not None and last.region_losses.classes != "none")


@pytest.mark.parametrize("claim", DIFFERENCES)
def test_pre_trainings_differ_in_what_the_claim_says(claim: str) -> None:
    first, second, expected = DIFFERENCES[claim]
    arms = CLAIMS[claim].arms
    assert configs.difference(*(next(configure_arm(arms[arm])) for arm in (first, second))).keys() == expected
    if claim != "lxmert-qa-sets":  # the other half of that claim
        after = [arms[arm].trainings[1:] for arm in (first, second)]
        assert after[0] == after[1], "what follows is the same run"


def test_what_replaces_contrast_has_its_weight() -> None:
    arms = CLAIMS["cvlp-contrast"].arms
    weights = {name: next(configure_arm(arm)) for name, arm in arms.items()}
    learnt = {name: run.objectives for name, run in weights.items() if isinstance(run, PretrainConfig)}
    words = {"masked_lm": 1.0, "matching": 0.1}
    assert learnt == {
        "contrast": {**words, "region_contrast": 0.1},
        "regression": {**words, "masked_regions": 0.1},
        "classification": {**words, "masked_regions": 0.1},
    }
    assert len({run.region_masking for run in weights.values() if isinstance(run, PretrainConfig)}) == 1


def test_the_baseline_is_trained_as_vilbert_and_of_its_size() -> None:
    arms = CLAIMS["vilbert-two-streams"].arms
    runs = [list(configure_arm(arms[name])) for name in ("two", "one")]
    for two, one in zip(*runs, strict=True):
        differing = {name for name in configs.difference(two, one) if not name.startswith(("encoder.", "from_init"))}
        assert differing == {"model", "recipe"}
    two, one = (models.build(run.model, dataclasses.replace(run.encoder, feature_size=128)) for run, *_ in runs)
    sizes = [sum(parameter.numel() for parameter in encoder.parameters()) for encoder in (two, one)]
    assert sizes == [691_104, 625_056]


def test_no_setting_is_idle() -> None:
    for claim, training in list_runs():
        for setting in training.settings:
            others = tuple(other for other in training.settings if other != setting)
            try:
                without = configure(training, settings=others)
            except ConfigError:
                continue  # the others need it
            assert without != configure(training), f"{claim}: {setting} changes nothing"


def test_claims_share_the_runs_that_are_the_same() -> None:
    spelled = defaultdict(set)
    for _, training in list_runs():
        known = configs.to_dict(configure(training))
        spelled[repr((known, training.world))].add(training)
    assert [spellings for spellings in spelled.values() if len(spellings) > 1] == []
    users = {claim for claim, training in list_runs() if training == pretrain("cvlp")}
    assert users == {"cvlp-contrast", "cvlp-noise", "cvlp-gap", "cvlp-queue"}


def test_minutes_count_a_shared_run_once() -> None:
    shared, other = pretrain("visualbert", updates=4800), pretrain("visualbert", "encoder.bypass=true", updates=2400)
    arms = {
        "answers": Arm(about="100 s and 13 s", trainings=(shared, answer("visualbert"))),
        "ranks": Arm(about="50 s more: four captions an example", trainings=(shared, rank("visualbert"))),
        "late": Arm(
            about="50 s and 13 s: the fine-tuning starts from another run", trainings=(other, answer("visualbert"))
        ),
    }
    assert estimate_minutes(arms) == round((100 + 50 + 50 + 2 * 625 / 48) / 60, 1)
