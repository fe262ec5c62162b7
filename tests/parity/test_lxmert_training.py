"""Whole fine-tuning runs recorded from the official code of LXMERT and CVLP, repeated by our engine on the same files:
VQA, GQA and NLVR2 (`golden/{lxmert,cvlp}_tasks/*/training_run*`).

Compared are the logits, loss, gradient norm and rate of every update, the weights after it, the training accuracy of
every epoch and the score at the end. Keys have biases whose true gradient is zero: they drift by rounding, and are left
out. GQA is read as questions of VQA with one answer, since LXMERT's files give both the same layout. Not compared:
files that the release writes. CVLP's averaged model: test_cvlp_averaged.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuning_runs import Recorded, Replayed, read_data, replay
from parity_support import labelled
from torch.testing import assert_close

CASES = [(family, task) for family in ("lxmert", "cvlp") for task in ("vqa", "gqa", "nlvr2")]
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
"""After several updates at an enlarged rate, rounding has grown."""


def is_drifting(name: str) -> bool:
    return name.endswith(("self.key.bias", "att.key.bias"))


def compare(recorded: Recorded, run: dict[str, Any], found: Replayed) -> None:
    for number, (step, logits) in enumerate(zip(run["steps"], found.logits, strict=True)):
        assert_close(logits, torch.tensor(step["logits"]), **CLOSE, msg=labelled(f"update {number}"))
    for name, ours in (("loss", found.losses), ("grad_norm", found.norms), ("lr", found.rates)):
        np.testing.assert_allclose(ours, [step[name] for step in run["steps"]], rtol=1e-4, atol=1e-7, err_msg=name)
    compare_accuracies(run, found)
    assert found.without_gradient == set(run["parameters_without_gradient"])
    kept = [number for number, name in enumerate(run["parameter_names"]) if not is_drifting(name)]
    sums = np.array(
        [
            [(float(each[name].norm()), float(each[name].sum())) for name in run["parameter_names"]]
            for each in found.weights
        ]
    )
    np.testing.assert_allclose(
        sums[:, kept], recorded.arrays("training_run_norm_and_sum")["weights"][:, kept], rtol=1e-4, atol=1e-4
    )
    end = recorded.weights("training_run_end")
    assert end.keys() == found.weights[-1].keys()
    for name, tensor in found.weights[-1].items():
        if not is_drifting(name):
            assert_close(tensor, end[name], atol=1e-4, rtol=1e-4, msg=labelled(name))


def compare_accuracies(run: dict[str, Any], found: Replayed) -> None:
    """Training accuracy of each epoch, as its line in the release's log has it."""
    logged = [float(value) for value in re.findall(r"Epoch \d+: Train ([\d.]+)", run["log"])]
    assert len(logged) == run["settings"]["epochs"]
    ours = np.array(found.accuracies).reshape(len(logged), -1).mean(1)
    np.testing.assert_allclose(100 * ours, logged, atol=0.005)


def compare_validation(recorded: Recorded, run: dict[str, Any], store: Path) -> None:
    """Logits and score of the recorded end weights on the validation records that the release keeps. Of our own end
    weights they would differ by what rounding has grown to."""
    valid = run["settings"]["valid"]
    data = read_data(recorded, run["settings"], valid, store)
    batch, targets = data.collate([str(name) for name in recorded.read(f"rows_{valid}")["kept_ids"]])
    model = recorded.build_model(data.task, run["settings"], "training_run_end").eval()
    with torch.inference_mode():
        found = model(batch)
        reached, count = data.task.loss(found, targets).parts["answer_accuracy"]
    (logits,) = found.values()
    assert_close(logits, torch.tensor(run["validation_logits_of_the_model_at_the_end"]), **CLOSE)
    last = run["evaluations"][-1]
    assert last["after_updates"] == len(run["steps"])
    score = last["result"][0] if isinstance(last["result"], list) else last["result"]  # CVLP: of both models
    assert float(reached / count) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_run_is_repeated(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, task: str
) -> None:
    recorded = Recorded(golden / f"{family}_tasks", family, task)
    run = recorded.read("training_run")
    data = read_data(recorded, run["settings"], run["settings"]["train"], tmp_path / "train")
    compare(recorded, run, replay(recorded, data, run, monkeypatch))
    compare_validation(recorded, run, tmp_path / "valid")


@pytest.mark.parametrize(
    "change",
    [
        {"clip_norm": 4.9},
        {"weight_decay": 0.0},
        {"no_decay": ("bias",)},
        {"warmup_share": 0.5},
        {"evaluate": "after"},
        {"betas": (0.9, 0.99)},
        {"name": "adamw"},
        {"clip": "per_tensor"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_rule_is_noticed(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    recorded = Recorded(golden / "lxmert_tasks", "lxmert", "vqa")
    run = recorded.read("training_run")
    data = read_data(recorded, run["settings"], run["settings"]["train"], tmp_path / "train")
    found = replay(recorded, data, run, monkeypatch, **change)
    with pytest.raises(AssertionError):
        compare(recorded, run, found)
