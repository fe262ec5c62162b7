"""The published fine-tuning recipes: every number that papers and releases state, literally; every recipe at full
size."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from visling import config as configs
from visling import models
from visling.recipes.configs import BERT_BASE, BERT_LARGE, FinetuneConfig, PretrainConfig, differences
from visling.recipes.tables import (
    FINETUNING,
    MULTITASK,
    PRETRAINING,
    PUBLISHED_FINETUNING,
    PUBLISHED_PRETRAINING,
    common_differences,
)
from visling.runs import estimate as estimates
from visling.runs.typical_task import typical_task_batch, untrained_task
from visling.train.optim import apply_schedule, build_optimizer, clip_gradients

NAMES = sorted(PUBLISHED_FINETUNING)
PAGE = Path(__file__).parents[2] / "docs" / "finetuning.md"

# ------------------------------------------------------------------------------------------------------ literal numbers

NEEDED = (
    "batch_size", "train_split", "valid_split", "start", "train.epochs", "train.metric", "train.direction",
    "train.keep", "train.optim.name", "train.optim.lr", "train.optim.weight_decay", "train.optim.no_decay",
    "train.optim.clip", "train.optim.schedule",
)  # fmt: skip
"""What the entry of every recipe states at least."""

_VISUALBERT_TRAINING = {
    "train.patience": 3,
    "train.direction": "max",
    "train.keep": ["best", "epochs"],
    "train.average": None,
    "train.optim.name": "bert_adam",
    "train.optim.lr": 2e-5,
    "train.optim.betas": [0.9, 0.999],
    "train.optim.eps": 1e-6,
    "train.optim.weight_decay": 0.01,
    "train.optim.no_decay": ["bias", "norm"],
    "train.optim.exclude": ["pooler"],
    "train.optim.clip": "per_tensor",
    "train.optim.clip_norm": 1.0,
    "train.optim.schedule": "warmup_linear",
    "train.optim.warmup_share": 0.1,
}
_VISUALBERT_VCR = {
    **_VISUALBERT_TRAINING,
    "batch_size": 32,
    "start": "visualbert-vcr",
    "train_split": "train",
    "valid_split": "val",
    "train.metric": "accuracy",
    "train.optim.no_decay": ["bias", "encoder.norm", "self_attention.norm", "feed_forward.norm", "transform.norm"],
    "task_settings.only_relevant": True,
    "task_settings.relevance": "all_texts",
    "encoder.feature_size": 512,
    "encoder.max_tokens": 128,
    "encoder.append_spatial": False,
    "extractor.kind": "visualbert",
    "extractor.blocks": [3, 4, 6],
    "extractor.widths": [64, 128, 256, 512],
    "extractor.frozen_stages": 0,
    "extractor.mask_channels": 32,
    "extractor.num_classes": 81,
    "extractor.class_size": 128,
    "extractor.feature_size": 512,
    "extractor.dropout_rate": 0.1,
    "extractor.class_weight": 0.0,
    "extractor.picture_width": 768,
    "extractor.picture_height": 384,
}
VISUALBERT: Mapping[str, Mapping[str, Any]] = {
    "visualbert-vqa": {
        **_VISUALBERT_TRAINING, "batch_size": 64, "train.epochs": 10, "train.metric": "accuracy",
        "start": "visualbert-vqa", "train_split": "train+val", "valid_split": "minival",
        "task_settings.min_count": None, "task_settings.question_text": "release",
        "encoder.answer_slot": "same_segment", "encoder.max_regions": 100, "encoder.feature_size": 2048,
    },
    "visualbert-nlvr2": {
        **_VISUALBERT_TRAINING, "batch_size": 64, "train.epochs": 10, "train.metric": "accuracy",
        "start": "visualbert-nlvr2", "train_split": "train", "valid_split": "dev", "task_settings.joined": True,
        "encoder.pair": "sequence", "encoder.max_regions": 144, "encoder.feature_size": 1024,
    },
    "visualbert-flickr30k": {
        **_VISUALBERT_TRAINING, "batch_size": 32, "train.epochs": 5, "train.metric": "recall_at_1",
        "start": "visualbert-flickr30k", "train_split": "train", "valid_split": "val",
        "task_settings.phrase_at": "release", "encoder.append_spatial": True, "encoder.max_regions": 100,
        "encoder.feature_size": 2048,
    },
    "visualbert-vcr": {**_VISUALBERT_VCR, "train.epochs": 8, "task_settings.phase": "answer"},
    "visualbert-vcr-rationale": {**_VISUALBERT_VCR, "train.epochs": 12, "task_settings.phase": "rationale"},
}  # fmt: skip

_VLBERT_TRAINING = {
    "flip": 0.5,
    "swap_sides": True,
    "release_start": True,
    "train.seed": 12345,
    "train.precision": "fp32",
    "train.metric": "accuracy",
    "train.direction": "max",
    "train.keep": ["best", "epochs"],
    "train.patience": None,
    "train.average": None,
    "train.optim.weight_decay": 1e-4,
    "train.optim.no_decay": [],
    "train.optim.exclude": [],
    "train.optim.rates": {},
    "train.optim.clip": "global",
    "train.optim.evaluate": "after",
    "encoder.feature_size": 2048,
}
_VLBERT_ADAMW = {
    **_VLBERT_TRAINING,
    "train.optim.name": "release_adamw",
    "train.optim.betas": [0.9, 0.999],
    "train.optim.eps": 1e-6,
    "train.optim.bias_correction": True,
    "train.optim.clip_norm": 1.0,
    "train.optim.schedule": "triangle",
    "train.optim.drop_epochs": [],
}
_VLBERT_NETWORK = {
    "extractor.blocks": [3, 4, 23],
    "extractor.widths": [64, 128, 256, 512],
    "extractor.dilated": True,
    "extractor.frozen_stages": 2,
    "extractor.shorter_side": 600,
    "encoder.masks_features": False,
}
_VLBERT_VQA = {
    **_VLBERT_ADAMW,
    "task_settings": {"min_count": None},
    "train_split": "train+val",
    "valid_split": "val",
    "extractor": None,
    "train.epochs": 5,
    "train.optim.lr": pytest.approx(1.6e-4),
    "train.optim.warmup_steps": 500,
    "encoder.answer_slot": "second_segment",
}
_VLBERT_REFCOCO = {
    **_VLBERT_ADAMW,
    **_VLBERT_NETWORK,
    "task_settings": {"dataset": "refcoco+", "rule": "inclusive"},
    "train_split": "train",
    "valid_split": "val",
    "extractor.longer_side": 1000,
    "train.epochs": 20,
    "train.optim.lr": pytest.approx(2.56e-5),
    "train.optim.warmup_steps": 3750,
}
_VLBERT_VCR = {
    **_VLBERT_TRAINING,
    **_VLBERT_NETWORK,
    "swap_sides": False,
    "train_split": "train",
    "valid_split": "val",
    "extractor.longer_side": 1200,
    "train.epochs": 20,
    "train.optim.name": "sgd",
    "train.optim.momentum": 0.9,
    "train.optim.lr": pytest.approx(4.48e-3),
    "train.optim.clip_norm": 10.0,
    "train.optim.schedule": "warmup_constant",
    "train.optim.warmup_steps": 1000,
    "train.optim.drop_epochs": [14.0, 18.0],
    "train.optim.drop_factor": 0.1,
    "encoder.max_tokens": 67,
}
_VLBERT_BASE = {
    "encoder.hidden_size": 768, "encoder.visual_size": 768, "encoder.num_layers": 12, "encoder.num_heads": 12,
    "encoder.intermediate_size": 3072,
}  # fmt: skip
_VLBERT_LARGE = {
    "encoder.hidden_size": 1024, "encoder.visual_size": 1024, "encoder.num_layers": 24, "encoder.num_heads": 16,
    "encoder.intermediate_size": 4096,
}  # fmt: skip
_BASE_E2E, _LARGE_E2E = ({**size, "start": start} for size, start in (
    (_VLBERT_BASE, "vlbert-base-e2e"), (_VLBERT_LARGE, "vlbert-large-e2e"),
))  # fmt: skip
_MEANS = {"train.normalise": "micro_steps"}
_TWICE, _FOUR_TIMES = ({"batch_size": size, "train.accumulation": parts, **_MEANS} for size, parts in ((16, 2), (8, 4)))
_FP16 = {"batch_size": 64, "train.accumulation": 1, "train.precision": "bf16"}
_ANSWER, _RATIONALE = ({"task_settings": {"phase": phase}} for phase in ("answer", "rationale"))
VLBERT: Mapping[str, Mapping[str, Any]] = {
    "vlbert-base-vqa": {
        **_VLBERT_VQA, **_VLBERT_BASE, "start": "vlbert-base-prec", "batch_size": 256, "train.accumulation": 1,
    },
    "vlbert-large-vqa": {
        **_VLBERT_VQA, **_VLBERT_LARGE, **_MEANS, "start": "vlbert-large-prec", "batch_size": 64,
        "train.accumulation": 4,
    },
    "vlbert-base-refcoco+": {**_VLBERT_REFCOCO, **_BASE_E2E, **_TWICE},
    "vlbert-base-refcoco+-gt": {**_VLBERT_REFCOCO, **_BASE_E2E, **_TWICE},
    "vlbert-large-refcoco+": {**_VLBERT_REFCOCO, **_LARGE_E2E, **_FOUR_TIMES},
    "vlbert-large-refcoco+-gt": {**_VLBERT_REFCOCO, **_LARGE_E2E, **_FOUR_TIMES},
    "vlbert-base-vcr": {**_VLBERT_VCR, **_BASE_E2E, **_ANSWER, "batch_size": 16, "train.accumulation": 4, **_MEANS},
    "vlbert-base-vcr-rationale": {
        **_VLBERT_VCR, **_BASE_E2E, **_RATIONALE, **_MEANS, "batch_size": 16, "train.accumulation": 4,
    },
    "vlbert-large-vcr": {**_VLBERT_VCR, **_LARGE_E2E, **_ANSWER, **_FP16},
    "vlbert-large-vcr-rationale": {**_VLBERT_VCR, **_LARGE_E2E, **_RATIONALE, **_FP16},
}  # fmt: skip

_VILBERT_FIRST = {
    "head_layout": "first",
    "start": "vilbert-conceptual",
    "train_split": "train",
    "valid_split": "val",
    "flip": 0.0,
    "train.epochs": 20,
    "train.metric": "accuracy",
    "train.direction": "max",
    "train.keep": ["last", "epochs"],
    "train.patience": None,
    "train.precision": "fp32",
    "train.optim.name": "bert_adam",
    "train.optim.betas": [0.9, 0.999],
    "train.optim.eps": 1e-6,
    "train.optim.weight_decay": 0.01,
    "train.optim.no_decay": ["bias", "norm"],
    "train.optim.swap_decay": True,
    "train.optim.exclude": [],
    "train.optim.rates": {},
    "train.optim.clip": "per_tensor",
    "train.optim.clip_norm": 1.0,
    "train.optim.schedule": "warmup_constant",
    "train.optim.warmup_share": 0.1,
    "train.optim.evaluate": "before",
    "train.optim.drop_epochs": [12, 16],
    "train.optim.drop_factor": 0.1,
    "train.optim.plateau": None,
    "encoder.text_layers_before": [6, 7, 8, 9, 10, 11],
    "encoder.region_layers_before": [0, 1, 2, 3, 4, 5],
    "encoder.hidden_size": 768,
    "encoder.region_hidden_size": 1024,
    "encoder.num_tasks": 0,
    "encoder.feature_size": 2048,
    "encoder.max_regions": 99,
}
_STREAMS = ("encoder.text_layers_before", "encoder.region_layers_before", "encoder.region_hidden_size")
_VILBERT_BASELINE = {
    **{name: value for name, value in _VILBERT_FIRST.items() if name not in (*_STREAMS, "encoder.num_tasks")},
    "head_layout": None,
    "start": "vilbert-baseline-conceptual",
    "encoder.num_layers": 12,
}
_VILBERT_MULTITASK = {
    **_VILBERT_FIRST,
    "head_layout": None,
    "start": "vilbert-multitask",
    "train.optim.name": "release_adamw",
    "train.optim.bias_correction": False,
    "train.optim.swap_decay": False,
    "train.optim.rates": {"heads.": 5.0},
    "train.optim.clip": "none",
    "train.optim.schedule": "warmup_linear",
    "train.optim.drop_epochs": [],
    "encoder.max_regions": 100,
}
_MINVAL = {"train_split": "train+nominval", "valid_split": "minval", "task_settings": {"min_count": None}}
_ANSWER_RATE = {"train.optim.lr": 4e-5, "train.optim.rates": {"heads.": 2.5}}
_PAIRS = {"batch_size": 128, "train.optim.lr": 2e-5, "encoder.max_tokens": 30, "train.metric": "rsum"}
_BOXES = {"batch_size": 256, "train.optim.lr": 2e-5, "encoder.max_tokens": 20, "train.optim.rates": {}}
_VCR = {"batch_size": 64, "train.optim.lr": 2e-5}
VILBERT: Mapping[str, Mapping[str, Any]] = {
    "vilbert-vqa": {
        **_VILBERT_FIRST, **_MINVAL, "batch_size": 256, "train.optim.lr": 4e-5, "encoder.max_tokens": 16,
        "train.optim.rates": {"heads.classify.": 2.5},
    },
    "vilbert-vcr": {**_VILBERT_FIRST, **_VCR, "encoder.max_tokens": 60, "task_settings": {"phase": "answer"}},
    "vilbert-vcr-rationale": {
        **_VILBERT_FIRST, **_VCR, "encoder.max_tokens": 80, "task_settings": {"phase": "rationale"},
    },
    "vilbert-refcoco+": {
        **_VILBERT_FIRST, "batch_size": 256, "train.optim.lr": 4e-5, "encoder.max_tokens": 20,
        "task_settings": {"dataset": "refcoco+"},
    },
    "vilbert-retrieval": {
        **_VILBERT_FIRST, "batch_size": 64, "train.optim.lr": 4e-5, "encoder.max_tokens": 30, "train.metric": "rsum",
        "task_settings": {},
    },
    "vilbert-baseline-vqa": {
        **_VILBERT_BASELINE, **_MINVAL, "batch_size": 256, "train.optim.lr": 4e-5, "encoder.max_tokens": 16,
        "train.optim.rates": {"heads.classify.": 2.5},
    },
    "vilbert-baseline-vcr": {
        **_VILBERT_BASELINE, **_VCR, "encoder.max_tokens": 60, "task_settings": {"phase": "answer"},
    },
    "vilbert-baseline-vcr-rationale": {
        **_VILBERT_BASELINE, **_VCR, "encoder.max_tokens": 80, "task_settings": {"phase": "rationale"},
    },
    "vilbert-baseline-refcoco+": {
        **_VILBERT_BASELINE, "batch_size": 256, "train.optim.lr": 4e-5, "encoder.max_tokens": 20,
        "task_settings": {"dataset": "refcoco+"},
    },
    "vilbert-multitask-vqa": {
        **_VILBERT_MULTITASK, **_MINVAL, **_ANSWER_RATE, "batch_size": 128, "encoder.max_tokens": 23,
    },
    "vilbert-multitask-gqa": {
        **_VILBERT_MULTITASK, **_MINVAL, **_ANSWER_RATE, "batch_size": 128, "encoder.max_tokens": 26,
        "train_split": "trainval",
    },
    "vilbert-multitask-nlvr2": {
        **_VILBERT_MULTITASK, "batch_size": 64, "train.optim.lr": 2e-5, "encoder.max_tokens": 40, "valid_split": "dev",
    },
    "vilbert-multitask-retrieval": {**_VILBERT_MULTITASK, **_PAIRS, "task_settings": {}},
    "vilbert-multitask-retrieval-coco": {**_VILBERT_MULTITASK, **_PAIRS, "task_settings": {"image_field": "id"}},
    **{
        f"vilbert-multitask-{name}": {**_VILBERT_MULTITASK, **_BOXES, "task_settings": {"dataset": name}}
        for name in ("refcoco", "refcoco+", "refcocog")
    },
    "vilbert-multitask-vcr": {
        **_VILBERT_MULTITASK, **_VCR, "encoder.max_tokens": 60, "train.epochs": 10, "task_settings": {"cut": "second"},
    },
    "vilbert-multitask-vcr-rationale": {
        **_VILBERT_MULTITASK, **_VCR, "encoder.max_tokens": 80, "train.epochs": 10,
        "task_settings": {"phase": "rationale", "cut": "second"},
    },
}  # fmt: skip

_LXMERT_TRAINING = {
    "batch_size": 32,
    "flip": 0.0,
    "carry_answers": True,
    "train.accumulation": 1,
    "train.epochs": 4,
    "train.seed": 9595,
    "train.precision": "fp32",
    "train.metric": "accuracy",
    "train.direction": "max",
    "train.keep": ["best", "last"],
    "train.patience": None,
    "train.validate_every": 1,
    "train.validate_unit": "epochs",
    "train.average": None,
    "train.optim.name": "bert_adam",
    "train.optim.betas": [0.9, 0.999],
    "train.optim.eps": 1e-6,
    "train.optim.weight_decay": 0.01,
    "train.optim.no_decay": [],
    "train.optim.exclude": [],
    "train.optim.rates": {},
    "train.optim.clip": "global",
    "train.optim.clip_norm": 5.0,
    "train.optim.schedule": "warmup_linear",
    "train.optim.warmup_share": 0.1,
    "train.optim.warmup_steps": None,
    "train.optim.evaluate": "before",
    "encoder.num_text_layers": 9,
    "encoder.num_region_layers": 5,
    "encoder.num_cross_layers": 5,
    "encoder.hidden_size": 768,
    "encoder.dropout_rate": 0.1,
    "encoder.max_tokens": 20,
    "encoder.max_regions": 36,
    "encoder.feature_size": 2048,
}
_LXMERT_VQA = {
    **_LXMERT_TRAINING,
    "train.optim.lr": 5e-5,
    "train_split": "train+nominival",
    "valid_split": "minival",
    "task_settings": {"loss": "bce", "min_count": None, "layout": "lxmert"},
}
_LXMERT_GQA = {
    **_LXMERT_TRAINING,
    "train.optim.lr": 1e-5,
    "train_split": "train+valid",
    "valid_split": "testdev",
    "task_settings": {"loss": "bce", "min_count": None},
}
_LXMERT_NLVR2 = {
    **_LXMERT_TRAINING,
    "train.optim.lr": 5e-5,
    "train_split": "train",
    "valid_split": "valid",
    "task_settings": {"joined": False, "loss": "cross_entropy"},
}
_LXMERT_START, _CVLP_START = {"start": "lxmert-20epochs-qa"}, {"start": "cvlp-release"}
LXMERT: Mapping[str, Mapping[str, Any]] = {
    "lxmert-vqa": {**_LXMERT_VQA, **_LXMERT_START},
    "lxmert-gqa": {**_LXMERT_GQA, **_LXMERT_START},
    "lxmert-nlvr2": {**_LXMERT_NLVR2, **_LXMERT_START},
}
CVLP: Mapping[str, Mapping[str, Any]] = {
    "cvlp-vqa": {**_LXMERT_VQA, **_CVLP_START, "train.epochs": 5, "train.average": 0.99995},
    "cvlp-gqa": {**_LXMERT_GQA, **_CVLP_START, "train.epochs": 6, "train.average": 0.99997},
    "cvlp-nlvr2": {**_LXMERT_NLVR2, **_CVLP_START, "train.epochs": 5, "train.average": 0.9995},
}

STATED: Mapping[str, Mapping[str, Any]] = {**VISUALBERT, **VLBERT, **VILBERT, **LXMERT, **CVLP}
"""Recipe -> setting -> what the configuration file or script of the release says."""


def value(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings[part]
    return settings


def test_every_recipe_is_stated() -> None:
    assert sorted(STATED) == NAMES
    assert set(PUBLISHED_FINETUNING) <= set(FINETUNING)


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_the_release(name: str) -> None:
    settings = configs.to_dict(PUBLISHED_FINETUNING[name]())
    assert settings["recipe"] == name
    assert {setting: value(settings, setting) for setting in STATED[name]} == STATED[name]
    assert not set(NEEDED) - set(STATED[name])


@pytest.mark.parametrize("name", NAMES)
def test_means_of_micro_batches_are_averaged_as_in_the_release(name: str) -> None:
    train = PUBLISHED_FINETUNING[name]().train
    assert (train.normalise == "micro_steps") == (train.accumulation > 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_survives_plain_values(name: str) -> None:
    run = PUBLISHED_FINETUNING[name]()
    assert configs.from_dict(FinetuneConfig, configs.to_dict(run)) == run


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_from_a_published_run_of_its_family(name: str) -> None:
    """Or from BERT; a name may be one of pre-training and of fine-tuning."""
    run = PUBLISHED_FINETUNING[name]()
    if run.start in (BERT_BASE, BERT_LARGE):
        return
    tables: tuple[Mapping[str, Any], ...] = (PUBLISHED_PRETRAINING, PUBLISHED_FINETUNING)
    starts: list[PretrainConfig | FinetuneConfig] = [table[run.start]() for table in tables if run.start in table]
    assert any(start.model in (run.model, *models.spec(run.model).loads_from) for start in starts), run.start


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_what_it_is_and_where_its_numbers_come_from(name: str) -> None:
    doc = PUBLISHED_FINETUNING[name].__doc__ or ""
    assert doc.splitlines()[0].endswith(".")
    assert "Source:" in doc


def test_our_own_recipes_keep_the_best_model() -> None:
    ours = [*(PRETRAINING.keys() - PUBLISHED_PRETRAINING), *(FINETUNING.keys() - PUBLISHED_FINETUNING)]
    tables: Mapping[str, Any] = {**PRETRAINING, **FINETUNING}
    assert {name: tables[name]().train.keep for name in ours} == dict.fromkeys(ours, ("best",))


# ------------------------------------------------------------------------------------------------- differences, as data


@pytest.mark.parametrize("name", NAMES)
def test_differences_are_differences(name: str) -> None:
    run = PUBLISHED_FINETUNING[name]()
    found = differences(run, run)
    settings = configs.to_dict(run)
    for source in ("paper", "release"):
        assert set(found[source]) == set(settings[source]), "an entry says what the recipe does anyway"
        for setting, told in found[source].items():
            assert told[source] == settings[source][setting]
            if setting.partition(".")[0] in settings:
                assert told["here"] == value(settings, setting)


def test_what_a_release_does_in_all_runs_holds_for_its_fine_tuning() -> None:
    """LXMERT and CVLP are fine-tuned on one device."""
    assert "losses" in common_differences(PUBLISHED_FINETUNING["visualbert-vqa"]())
    for name in ("lxmert-vqa", "cvlp-nlvr2"):
        assert set(common_differences(PUBLISHED_FINETUNING[name]())) == {"stored regions"}
    for config in (PUBLISHED_FINETUNING["vilbert-vqa"](), MULTITASK["vilbert-12in1"]()):
        assert set(common_differences(config)) == {"stored regions", "losses", "last batch of an epoch"}
    assert common_differences(MULTITASK["vilbert-multitask-scenes"]()) == {}


@pytest.mark.parametrize("name", NAMES)
def test_the_page_lists_the_recipe_with_its_numbers(name: str) -> None:
    page, run = PAGE.read_text(encoding="utf-8"), PUBLISHED_FINETUNING[name]()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` | {run.task} |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert int(cells[2].split()[0]) == run.batch_size * run.train.accumulation
    assert float(cells[3].split()[0].strip(",")) == pytest.approx(run.train.optim.lr)
    assert str(run.train.epochs) in cells
    for source in ("paper", "release"):
        for setting, there in getattr(run, source).items():
            shown = f"`{setting}`" if "." in setting or hasattr(run, setting) else setting
            assert f"| `{name}` | {source} | {shown} | {there} |" in page


# ------------------------------------------------------------------------------------------------- full size, for real


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_updates_at_full_size(name: str, record_property: Any) -> None:
    began = time.monotonic()
    run = PUBLISHED_FINETUNING[name]()
    if run.extractor is not None:  # its last stage runs on every region: minutes for a hundred
        run = replace(run, encoder=replace(run.encoder, max_regions=8))
    model, task = untrained_task(run)
    model.train()
    total = estimates.updates(run)
    assert total is not None, "the size of its training splits is in runs/typical_task.py"
    optimizer, schedule = build_optimizer(model, run.train.optim, total, per_epoch=total / run.train.epochs)
    # Biases are 0 at first: the smallest rate moves them.
    biases = [
        parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if name.endswith("bias") and not parameter.any()
    ]
    with_gradient = [False] * len(biases)  # in some update: moments carry a gradient of the first into the second
    for done in range(2):
        batch, targets = typical_task_batch(run, task, 2)
        batch.validate()
        loss = task.loss(model(batch), targets).value
        loss.backward()
        assert loss.isfinite()
        has_gradient = [p.grad is not None and bool(p.grad.any()) for p in biases]
        with_gradient = [any(pair) for pair in zip(with_gradient, has_gradient, strict=True)]
        apply_schedule(optimizer, schedule, done)
        clip_gradients(optimizer, run.train.optim)
        optimizer.step()
        model.zero_grad(set_to_none=True)
    assert sum(with_gradient) > 0.9 * len(biases)
    assert [bool(p.any()) for p in biases] == with_gradient
    assert all(p.isfinite().all() for p in model.parameters())
    del model, optimizer, biases  # before the next one is built
    gc.collect()
    record_property("seconds", round(time.monotonic() - began, 1))
