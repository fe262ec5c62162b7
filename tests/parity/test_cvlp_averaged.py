"""The second, averaged model of CVLP's official fine-tunings, followed by our engine update by update: VQA, GQA and
NLVR2 (`golden/cvlp_tasks/*/training_run*`), and VQA with a small momentum, whose average moves far
(`vqa/training_strong*`).

Compared are the averaged weights after every update and at the end, the scores of both models after every epoch, which
weights are kept as the best of each, and the answers of both at the end. The release keeps a best file only for a score
above 0, ours whatever the score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuning_runs import Recorded, Replayed, read_data, replay
from parity_support import labelled
from safetensors.torch import load_file
from test_lxmert_training import is_drifting
from torch.testing import assert_close

from visling.train.averaging import WeightAverage
from visling.train.state import RunFolder

CASES = [("vqa", "training_run"), ("gqa", "training_run"), ("nlvr2", "training_run"), ("vqa", "training_strong")]
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
"""Of weights after several updates at an enlarged rate."""


def repeat(
    golden: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, task: str, name: str
) -> tuple[Recorded, dict[str, Any], Replayed, RunFolder]:
    recorded = Recorded(golden / "cvlp_tasks", "cvlp", task)
    run = recorded.read(name)
    settings = run["settings"]
    train = read_data(recorded, settings, settings["train"], folder / "train")
    valid = read_data(recorded, settings, settings["valid"], folder / "valid")
    kept = RunFolder.create(folder / "run")
    found = replay(recorded, train, run, monkeypatch, valid=valid, run_folder=kept, average=settings["momentum_used"])
    return recorded, run, found, kept


def compare_weights(recorded: Recorded, name: str, found: Replayed) -> None:
    names = recorded.read("training_run")["parameter_names"]
    kept = [number for number, parameter in enumerate(names) if not is_drifting(parameter)]
    sums = np.array(
        [[(float(each[name].norm()), float(each[name].sum())) for name in names] for each in found.averaged]
    )
    expected = recorded.arrays(f"{name}_norm_and_sum")["averaged"]
    np.testing.assert_allclose(sums[:, kept], expected[:, kept], rtol=1e-4, atol=1e-4)
    for parameter, tensor in recorded.weights(f"{name}_end_averaged").items():
        if not is_drifting(parameter):
            assert_close(found.averaged[-1][parameter], tensor, **CLOSE, msg=labelled(parameter))


def best_updates(run: dict[str, Any], scores: list[float], which: int) -> list[int]:
    """Number of updates at each new best score above 0 of the model (0) or of the average (1)."""
    best, found = 0.0, []
    for evaluation, score in zip(run["evaluations"], scores[which::2], strict=True):
        if score > best:
            best = score
            found.append(evaluation["after_updates"])
    return found


def compare_validations(recorded: Recorded, run: dict[str, Any], name: str, found: Replayed) -> None:
    pairs = np.array(found.scores).reshape(-1, 2)
    np.testing.assert_allclose(pairs, [each["result"] for each in run["evaluations"]], atol=1e-6)
    for which, file in enumerate(("BEST.pth", "BEST_siam.pth")):
        saved = [each["after_updates"] for each in run["saves"] if each["file"] == file]
        assert best_updates(run, found.scores, which) == saved
    dumped = recorded.read(f"{name}_dump")
    answers = [0, 1] if recorded.task == "nlvr2" else list(recorded.answers)
    for predicted, kind in zip(found.predicted[-2:], ("model", "averaged"), strict=True):
        assert [answers[number] for number in predicted] == [answer for _, answer in dumped[f"{kind}_predictions"]]


@pytest.mark.parametrize(("task", "name"), CASES)
def test_the_averaged_model_is_that_of_the_release(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, name: str
) -> None:
    recorded, run, found, folder = repeat(golden, tmp_path, monkeypatch, task, name)
    compare_weights(recorded, name, found)
    compare_validations(recorded, run, name, found)

    best = max(range(len(run["evaluations"])), key=lambda number: found.scores[1::2][number])
    expected = found.averaged[run["evaluations"][best]["after_updates"] - 1]
    model = recorded.build_model(recorded.build_task(), run["settings"], "training_run_start")
    left = model.load_state_dict(load_file(folder.averaged / "model.safetensors"), strict=False)
    assert not left.unexpected_keys
    assert all(torch.equal(tensor, expected[parameter]) for parameter, tensor in recorded.official(model).items())


@pytest.mark.parametrize("mistake", ["momentum", "every second update", "model instead"])
def test_another_average_is_noticed(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    update, calls = WeightAverage.update, 0
    weight = 1 - Recorded(golden / "cvlp_tasks", "cvlp", "vqa").read("training_strong")["settings"]["momentum_used"]

    def wrong(average: WeightAverage) -> None:
        nonlocal calls
        calls += 1
        if mistake == "momentum":
            average._weight = 0.9 * weight
        elif mistake == "model instead":
            average._weight = 1.0
        elif calls % 2:
            return
        update(average)

    monkeypatch.setattr(WeightAverage, "update", wrong)
    recorded, _, found, _ = repeat(golden, tmp_path, monkeypatch, "vqa", "training_strong")
    with pytest.raises(AssertionError):
        compare_weights(recorded, "training_strong", found)
