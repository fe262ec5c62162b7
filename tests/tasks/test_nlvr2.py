"""NLVR2: real lines of the official file, messy ones, the official numbers, one row or two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from visling import models
from visling.data.annotations.statements import find_nlvr2, nlvr2_group
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.metrics.answers import nlvr2_scores
from visling.models import head_styles
from visling.models.task_model import TaskModel
from visling.recipes.tables import FINETUNING
from visling.runs.finetune import fit_to_family
from visling.tasks.base import load
from visling.tasks.nlvr import NLVR
from visling.tasks.nlvr2 import NLVR2, Nlvr2Config, Nlvr2Record
from visling.types import Batch, InputSpec, Prediction, Targets

ROOT = Path(__file__).parent / "files" / "nlvr2"
GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "metrics" / "nlvr2.json").read_text(encoding="utf-8")
)
RNG = np.random.default_rng(0)
LABELS = {row["identifier"]: row["label"] for row in GOLDEN["examples"]}
GROUPS = {name: nlvr2_group(name) for name in LABELS}

UNREAD = cast(Batch, None)
"""The batch of a decoding that does not look at it."""


def line(**fields: Any) -> str:
    return json.dumps(
        {"sentence": "there is a dog", "label": "True", "identifier": "dev-7-0-0", "left_url": "a", "right_url": "b"}
        | fields
    )


def write(root: Path, *lines: str, split: str = "dev") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}.json").write_text("\n".join(lines))
    return root


def test_real_records() -> None:
    records = NLVR2().records(ROOT, "dev")
    assert len(records) == 15
    assert records[0].id == "dev-951-1-0"
    assert records[0].images == ("dev-951-1-img0", "dev-951-1-img1"), "left, right"
    assert records[0].label is True
    assert records[0].sentence.startswith("In the image on the right, the dog's body is facing")
    assert sum(bool(record.label) for record in records) == 7
    assert len({nlvr2_group(record.id) for record in records}) == 6
    assert load("nlvr2") is NLVR2


@pytest.mark.parametrize("folder", [".", "data", "data/balanced"])
def test_where_the_file_may_lie(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder, line(), split="balanced_dev")
    assert find_nlvr2(tmp_path, "balanced_dev") == tmp_path / folder / "balanced_dev.json"
    assert find_nlvr2(tmp_path, "dev") is None
    with pytest.raises(DataError, match=r"no statements of split 'dev'.*data/dev\.json"):
        NLVR2().records(tmp_path, "dev")


def test_hidden_labels_blank_lines_and_lower_case(tmp_path: Path) -> None:
    bare = {name: value for name, value in json.loads(line(identifier="test1-2-3-1")).items() if name != "label"}
    write(tmp_path, line(label="false"), "", json.dumps(bare))
    records = NLVR2().records(tmp_path, "dev")
    assert [record.label for record in records] == [False, None]
    assert records[1].images == ("test1-2-3-img0", "test1-2-3-img1")
    assert not NLVR2().labelled(records)
    with pytest.raises(DataError, match="has no label"):
        NLVR2().report([Prediction(id=record.id, value="True", confidence=1.0) for record in records], records)


def test_files_of_nlvr2_are_not_read_as_nlvr(tmp_path: Path) -> None:
    write(tmp_path / "dev", line())
    with pytest.raises(DataError, match="use the task nlvr2"):
        NLVR().records(tmp_path, "dev")


@pytest.mark.parametrize("kind", ["", "_with_invalid_and_extra"])
def test_scores_equal_the_official_script(kind: str) -> None:
    found = nlvr2_scores(dict(GOLDEN[f"predictions{kind}"]), LABELS, GROUPS)
    expected = GOLDEN[f"expected{kind}"]
    assert found.accuracy.value == pytest.approx(expected["accuracy"], abs=1e-12)
    assert found.consistency.value == pytest.approx(expected["consistency"], abs=1e-12)
    assert (found.accuracy.count, found.consistency.count) == (406, len(set(GROUPS.values())))


@pytest.mark.parametrize("subset", ["balanced", "unbalanced"])
def test_a_subset_is_scored_like_the_whole(subset: str) -> None:
    names = GOLDEN["subsets"][subset]["identifiers"]
    found = nlvr2_scores(dict(GOLDEN["predictions"]), {name: LABELS[name] for name in names}, GROUPS)
    assert 100 * found.accuracy.value == pytest.approx(GOLDEN["subsets"][subset]["accuracy_percent"], abs=1e-9)


def test_every_example_needs_a_prediction() -> None:
    given = dict(GOLDEN["predictions"])
    gone = min(LABELS)
    del given[gone]
    with pytest.raises(DataError, match=rf"1 of 406 examples have no prediction, first '{gone}'"):
        nlvr2_scores(given, LABELS, GROUPS)


def test_a_report_in_the_official_numbers() -> None:
    task, records = NLVR2(), NLVR2().records(ROOT, "dev")
    logits = {"classify": torch.tensor([[-1.0, 1.0] if record.label else [1.0, -1.0] for record in records])}
    logits["classify"][0] = 0  # a tie is False, which is wrong
    predictions = task.decode(logits, UNREAD, records)
    report = task.report(predictions, records)
    assert report.scores["accuracy"].value == pytest.approx(100 * 14 / 15)
    assert report.scores["consistency"].value == pytest.approx(100 * 5 / 6)
    assert [report.scores[name].count for name in ("accuracy", "consistency")] == [15, 6]
    assert {name: score.value for name, score in report.by["label"].items()} == {
        "False": 100,
        "True": pytest.approx(100 * 6 / 7),
    }
    assert task.submission(predictions).splitlines()[:2] == ["dev-951-1-0,False", "dev-951-2-1,True"]
    first, second = task.details(predictions, records)[:2]
    assert (first["image"], first["images"], first["score"]) == (
        "dev-951-1-img0",
        ["dev-951-1-img0", "dev-951-1-img1"],
        0.0,
    )
    assert (second["truth"], second["prediction"], second["score"]) == ("True", "True", 1.0)


def test_the_losses_of_the_releases() -> None:
    logits, targets = {"classify": torch.tensor([[0.3, -0.2], [1.0, 2.0]])}, Targets(answer=torch.tensor([0, 1]))
    scores, labels = logits["classify"], cast(torch.Tensor, targets.answer)
    softmax = NLVR2(Nlvr2Config(loss="cross_entropy")).loss(logits, targets)
    assert softmax.value.item() == pytest.approx(F.cross_entropy(scores, labels).item())
    both = NLVR2(Nlvr2Config(loss="bce")).loss(logits, targets)
    one_hot = F.one_hot(labels, 2).float()
    assert both.value.item() == pytest.approx(F.binary_cross_entropy_with_logits(scores, one_hot).item())
    assert both.parts.keys() == softmax.parts.keys()
    assert NLVR2().loss(logits, targets).value == softmax.value


@pytest.mark.parametrize(("model", "loss"), [("vilbert", "bce"), ("lxmert", None), ("cvlp", None), ("vlbert", None)])
def test_a_fine_tuning_has_the_loss_of_its_release(model: str, loss: str | None) -> None:
    scenes = FINETUNING[f"{model}-nlvr2-scenes"]()
    assert fit_to_family(scenes).task_settings["loss"] == "cross_entropy", "on scenes all families have the same"
    own = replace(scenes, task_settings={"joined": False})
    assert fit_to_family(own).task_settings.get("loss") == loss


def test_the_more_frequent_label() -> None:
    task, records = NLVR2(), NLVR2().records(ROOT, "dev")
    (predictions,) = task.baselines(records, records).values()
    assert {prediction.value for prediction in predictions} == {"False"}
    assert task.report(predictions, records).scores["accuracy"].value == pytest.approx(100 * 8 / 15)


@pytest.mark.parametrize("joined", [True, False])
def test_one_row_or_one_for_each_image(joined: bool) -> None:
    task = NLVR2(Nlvr2Config(joined=joined))
    record = Nlvr2Record(id="dev-7-0-0", images=("dev-7-0-img0", "dev-7-0-img1"), sentence="there is a dog", label=True)
    layouts = {pair: TextLayout(Tokenizer(), InputSpec(pair=pair)) for pair in ("rows", "sequence")}  # type: ignore[arg-type]
    example = task.example(record, layouts["sequence" if joined else "rows"], RNG)
    assert len(example.rows) == task.group == (1 if joined else 2)
    assert example.images == record.images
    assert example.labels == {"answer": 1}
    with pytest.raises(ConfigError, match=rf"joined = {str(not joined).lower()}"):
        task.example(record, layouts["rows" if joined else "sequence"], RNG)


@pytest.mark.parametrize(("model", "joined"), [("visualbert", True), ("lxmert", False), ("vilbert", False)])
def test_the_head_sees_both_images(model: str, joined: bool) -> None:
    task = NLVR2(Nlvr2Config(joined=joined))
    built = TaskModel(models.build_tiny(model), task.heads, head_styles(model), group=task.group).eval()
    pooled = torch.randn(2 * task.group, built.encoder.dims.pooled)
    logits = built.heads["classify"](pooled)
    assert logits.shape == (2, 2)
    loss = task.loss({"classify": logits}, Targets(answer=torch.tensor([0, 1])))
    assert loss.value.isfinite()
    assert int(loss.parts["answer_accuracy"][1]) == 2
