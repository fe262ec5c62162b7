"""Every published fine-tuning recipe, its encoder small, from files of the official layouts to an evaluated model.

The files are those of drawn scenes, under the names that the releases give their splits; LXMERT's and CVLP's are lists
as their release has them. Features are random, of the width that a recipe reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.published_recipes import read_log, small_finetuning, write_official

from visling import config as configs
from visling.data.annotations import gqa as gqa_files
from visling.data.annotations import questions as vqa_files
from visling.recipes.tables import PUBLISHED_FINETUNING
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune


@pytest.fixture(scope="module")
def official(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every task: `scenes` in the layouts of the data sets, `lxmert` in that of LXMERT's release."""
    return write_official(world.scenes, tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def regions(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Stores by feature width: the detected boxes of the scenes with random features."""
    folder, source = tmp_path_factory.mktemp("regions"), NativeStore.open(world.regions)

    def store(width: int) -> Path:
        path, rng = folder / str(width), np.random.default_rng(0)
        if not path.exists():
            with StoreWriter(path, feature_size=width, fingerprint="test") as writer:
                for image in source.ids:
                    found = source[image]
                    features = rng.normal(size=(len(found), width)).astype(np.float16)
                    writer.add(
                        image, replace(found, features=features, classes=None, class_confidence=None, probs=None)
                    )
        return path

    return store


@pytest.mark.parametrize("name", PUBLISHED_FINETUNING)
def test_a_published_recipe_trains_and_is_evaluated(
    world: Any,
    tmp_path: Path,
    official: Path,
    regions: Callable[[int], Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, constant in ((gqa_files, "NUM_MINVAL"), (vqa_files, "NUM_LAST")):
        monkeypatch.setattr(module, constant, 4)
    run = small_finetuning(name)
    if run.task_settings.get("min_count", 0) is None:
        run = configs.override(run, [f"task_settings.answers={official}/answers_{run.task}.json"])
    data = official / "lxmert" / run.task if run.model in ("lxmert", "cvlp") else official / "scenes"
    out = tmp_path / "run"
    images = None if run.extractor is None else world.scenes
    state = finetune(run, out, data=data, store=regions(run.encoder.feature_size), images=images, device="cpu")
    assert state.step == 2
    logged = read_log(out)
    assert all(np.isfinite(line["loss"]) for line in logged["train"])
    assert any(run.start in line["message"] for line in logged["event"]), "no --init: the log says what is missing"
    averaged = run.train.average is not None
    assert {run.train.metric, *([f"averaged_{run.train.metric}"] if averaged else [])} <= set(
        logged["valid"][-1]["scores"]
    )
    folders = ["model", *(["models/last"] if {"best", "last"} <= set(run.train.keep) else [])]
    folders += ["models/averaged"] if averaged else []
    assert all((out / folder / "model.safetensors").is_file() for folder in folders)
    found = evaluate(out, split=run.valid_split, batch_size=8)
    assert found["scores"][run.train.metric]["count"] > 0
    if averaged:
        second = evaluate(out / "models" / "averaged", split=run.valid_split, batch_size=8)
        assert second["scores"].keys() == found["scores"].keys()
