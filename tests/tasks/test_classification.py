"""Classification: labels and their order, losses, what is predicted and scored, result files, runs with and without
images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from visling import config as configs
from visling.data.annotations.classification import LabelledText
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.recipes.tables import FINETUNING
from visling.runs.evaluate import evaluate
from visling.runs.finetune import finetune
from visling.tasks.base import load
from visling.tasks.classification import Classification, ClassificationConfig
from visling.types import Batch, InputSpec, Prediction, Targets

UNREAD = cast(Batch, None)
"""The batch of a decoding that does not look at it."""
LAYOUT = TextLayout(Tokenizer(), InputSpec())
RNG = np.random.default_rng(0)


def record(number: int, *labels: str, several: bool = False, text: str = "a cat", image: bool = True) -> LabelledText:
    return LabelledText(
        id=str(number),
        images=(f"photo{number}",) if image else (),
        text=text,
        second=None,
        labels=labels if labels or several else None,
        several=several,
    )


def trained(*records: LabelledText, **settings: Any) -> Classification:
    task = Classification(ClassificationConfig(**settings))
    task.setup(records)
    return task


@pytest.mark.parametrize(
    ("labels", "order"),
    [(["10", "2", "1"], ["1", "2", "10"]), (["b", "a", "10"], ["10", "a", "b"]), (["1", "-1"], ["-1", "1"])],
)
def test_labels_are_in_order(labels: list[str], order: list[str]) -> None:
    task = trained(*(record(number, label) for number, label in enumerate(labels)))
    assert list(task.answers) == order
    assert task.heads["classify"].outputs == len(order)
    assert load("classification") is Classification


def test_labels_of_a_file(tmp_path: Path) -> None:
    listed = tmp_path / "labels.txt"
    listed.write_text("no\nyes\nunsure\n")
    task = trained(record(1, "yes"), record(2, "no"), labels=listed)
    assert list(task.answers) == ["no", "yes", "unsure"]
    with pytest.raises(DataError, match=r"label 'maybe' of the training examples is not in .*labels\.txt"):
        trained(record(1, "yes"), record(2, "maybe"), labels=listed)


def test_nothing_to_tell_apart() -> None:
    with pytest.raises(DataError, match="have 1 label: yes"):
        trained(record(1, "yes"), record(2, "yes"))
    with pytest.raises(DataError, match="1 has no label"):
        trained(record(1))
    with pytest.raises(ConfigError, match="not known yet"):
        _ = Classification().heads
    with pytest.raises(ConfigError, match="threshold is a probability"):
        ClassificationConfig(threshold=50)


def test_examples_and_their_labels() -> None:
    task = trained(record(1, "no"), record(2, "yes"))
    example = task.example(record(3, "yes", text=""), LAYOUT, RNG)
    assert example.labels == {"answer": 1}
    assert example.images == ("photo3",)
    assert LAYOUT.tokenizer.decode(example.rows[0].ids) == "picture", "what is read in place of no text"
    assert task.example(record(4, "unheard of"), LAYOUT, RNG).labels == {}
    assert task.example(record(5), LAYOUT, RNG).labels == {}
    with pytest.raises(DataError, match="it has a list of labels, the training examples have one label each"):
        task.example(record(6, "yes", several=True), LAYOUT, RNG)
    both = trained(record(1, "a", "b", several=True), record(2, several=True))
    assert both.example(record(3, "b", "unheard of", several=True), LAYOUT, RNG).labels["answer"].tolist() == [0, 1]
    second = task.query(["a premise", "a hypothesis"], ["photo"])
    (row,) = task.example(second, LAYOUT, RNG).rows
    assert LAYOUT.tokenizer.decode(row.ids) == "a premise a hypothesis"
    assert row.segments.tolist() == [0] * 4 + [1] * (len(row.segments) - 4)


def test_the_loss_of_one_label() -> None:
    logits, labels = torch.tensor([[1.0, 0.5, -1.0], [0.2, 0.1, 0.0]]), torch.tensor([0, 2])
    records = [record(1, "a"), record(2, "a"), record(3, "b"), record(4, "c")]
    plain = trained(*records).loss({"classify": logits}, Targets(answer=labels))
    assert plain.value.item() == pytest.approx(F.cross_entropy(logits, labels).item())
    assert int(plain.parts["answer_accuracy"][0]) == 1
    weighted = trained(*records, class_weights="balanced").loss({"classify": logits}, Targets(answer=labels))
    weights = [4 / (3 * 2), 4 / 3, 4 / 3]
    each = [F.cross_entropy(logits[[n]], labels[[n]]).item() * weights[int(labels[n])] for n in range(2)]
    assert weighted.value.item() == pytest.approx(sum(each) / 2)


def test_the_loss_of_several_labels() -> None:
    logits, flags = torch.tensor([[1.0, -1.0], [-0.5, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    records = [record(1, "a", several=True), record(2, "a", "b", several=True), record(3, several=True)]
    plain = trained(*records).loss({"classify": logits}, Targets(answer=flags))
    assert plain.value.item() == pytest.approx(2 * F.binary_cross_entropy_with_logits(logits, flags).item())
    assert int(plain.parts["answer_accuracy"][0]) == 1, "the second example lacks a label"
    low = trained(*records, threshold=0.3).loss({"classify": logits}, Targets(answer=flags))
    assert int(low.parts["answer_accuracy"][0]) == 2
    weighted = trained(*records, class_weights="balanced").loss({"classify": logits}, Targets(answer=flags))
    expected = F.binary_cross_entropy_with_logits(
        logits, flags, pos_weight=torch.tensor([1 / 2, 2 / 1]), reduction="sum"
    )
    assert weighted.value.item() == pytest.approx(expected.item() / 2)


def test_scores_of_two_labels() -> None:
    task = trained(record(1, "0"), record(2, "1"))
    records = [record(number, label) for number, label in enumerate("0110")]
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5], [2.0, -1.0]])
    predictions = task.decode({"classify": logits}, UNREAD, records)
    assert [prediction.value for prediction in predictions] == ["0", "1", "0", "0"]
    report = task.report(predictions, records)
    assert report.scores["accuracy"].value == 75
    assert report.scores["auroc"].value == 100, "both of label 1 score higher than both of label 0"
    assert report.variants["auroc"] == "label 1"
    assert {name: (score.value, score.count) for name, score in report.by["recall"].items()} == {
        "0": (100, 2), "1": (50, 2),
    }  # fmt: skip
    assert report.by["precision"]["0"].value == pytest.approx(100 * 2 / 3)
    assert report.scores["macro_f1"].value == pytest.approx(100 * (0.8 + 2 / 3) / 2)
    rows = task.submission(predictions).splitlines()
    assert rows[0] == "id,proba,label"
    assert [row.split(",")[2] for row in rows[1:]] == ["0", "1", "0", "0"]
    chances = [float(row.split(",")[1]) for row in rows[1:]]
    assert chances == pytest.approx(logits.softmax(1)[:, 1].tolist(), abs=1e-6)


def test_a_split_with_one_label_has_no_area() -> None:
    task = trained(record(1, "0"), record(2, "1"))
    records = [record(1, "1"), record(2, "1")]
    report = task.report(task.decode({"classify": torch.zeros(2, 2)}, UNREAD, records), records)
    assert "auroc" not in report.scores
    assert report.variants["auroc"].startswith("undefined")


def test_a_label_that_training_lacks_counts_as_missed() -> None:
    task = trained(record(1, "a"), record(2, "b"), record(3, "c"))
    records = [record(1, "a"), record(2, "new"), record(3, "b")]
    logits = 5 * F.one_hot(torch.tensor([0, 0, 1]), 3).float()
    report = task.report(task.decode({"classify": logits}, UNREAD, records), records)
    assert report.scores["accuracy"].value == pytest.approx(100 * 2 / 3)
    assert report.by["recall"]["new"].value == 0
    assert "c" not in report.by["f1"], "it neither occurs nor is predicted"
    assert report.variants["auroc"] == "mean over 2 of 3 labels, each against the rest"
    (note,) = task.notes(records)
    assert "1 of 3 examples have a label that no training example has, such as 'new'" in note
    (note,) = task.notes([record(1, "a", text="")])
    assert "1 of 1 examples have no text: the model reads 'picture'" in note


def test_scores_of_several_labels() -> None:
    task = trained(record(1, "a", "b", several=True), record(2, "c", several=True))
    records = [
        record(1, "a", "b", several=True), record(2, several=True), record(3, "c", several=True),
    ]  # fmt: skip
    logits = torch.tensor([[3.0, 1.0, -2.0], [-1.0, -1.0, -1.0], [1.0, -3.0, 2.0]])
    predictions = task.decode({"classify": logits}, UNREAD, records)
    assert [prediction.value for prediction in predictions] == ["a|b", "", "a|c"]
    assert predictions[1].confidence == pytest.approx(float((1 - logits[1].sigmoid()).prod()))
    report = task.report(predictions, records)
    assert report.scores["accuracy"].value == pytest.approx(100 * 2 / 3)
    assert report.variants["accuracy"] == "examples whose labels are all right"
    assert report.scores["micro_f1"].value == pytest.approx(100 * 2 * 3 / (3 + 4))
    assert report.scores["mean_average_precision"].value == 100
    assert task.submission(predictions) == "id,label\n1,a|b\n2,\n3,a|c\n"
    assert [row["score"] for row in task.details(predictions, records)] == [1.0, 1.0, 0.0]
    low = Classification(ClassificationConfig(threshold=0.2), list("abc"), several=True)
    assert low.decode({"classify": logits}, UNREAD, records)[1].value == "a|b|c"


def test_the_majority() -> None:
    train = [record(1, "yes"), record(2, "yes"), record(3, "no")]
    task = trained(*train)
    (predictions,) = task.baselines(train, [record(4, "no")]).values()
    assert (predictions[0].value, predictions[0].confidence) == ("yes", pytest.approx(2 / 3))
    assert task.report(predictions, [record(4, "no")]).scores["accuracy"].value == 0
    some = [record(1, "a", "b", several=True), record(2, "a", several=True), record(3, "c", several=True)]
    (predictions,) = trained(*some).baselines(some, some).values()
    assert {prediction.value for prediction in predictions} == {"a"}


def test_a_saved_task_is_the_same_task(tmp_path: Path) -> None:
    listed = tmp_path / "labels.txt"
    listed.write_text("no\nyes\n")
    task = trained(record(1, "yes"), record(2, "yes"), record(3, "no"), labels=listed, class_weights="balanced")
    state = json.loads(json.dumps(task.state()))
    listed.unlink()
    again = Classification.from_state(state)
    assert list(again.answers) == ["no", "yes"]
    logits, targets = {"classify": torch.tensor([[0.3, 0.9]])}, Targets(answer=torch.tensor([0]))
    assert again.loss(logits, targets).value == task.loss(logits, targets).value
    with pytest.raises(ConfigError, match="of another task"):
        Classification.from_state({"config": {}})


def test_predictions_of_other_examples_are_refused() -> None:
    task = trained(record(1, "a"), record(2, "b"))
    with pytest.raises(DataError, match="1 missing"):
        task.report([Prediction(id="9", value="a", confidence=1.0, top=(("a", 1.0), ("b", 0.0)))], [record(1, "a")])
    hidden = [record(1)]
    assert not task.labelled(hidden)
    predictions = task.decode({"classify": torch.zeros(1, 2)}, UNREAD, hidden)
    with pytest.raises(DataError, match="has no label"):
        task.report(predictions, hidden)
    (row,) = task.details(predictions, hidden)
    assert (row["truth"], row["score"]) == (None, None)


# Runs

TINY = (
    "encoder=tiny", "batch_size=8", "train.max_steps=2", "train.validate_every=1", "train.precision=fp32",
    "train.log_every=1",
)  # fmt: skip


def test_a_run_with_several_labels(world: Any, tmp_path: Path) -> None:
    data = world.scenes / "classification" / "multilabel"
    config = configs.override(FINETUNING["visualbert-classification-scenes"](), TINY)
    finetune(config, tmp_path / "run", data=data, store=world.regions, device="cpu")
    found = evaluate(tmp_path / "run", split="val", data=data)
    assert {"accuracy", "micro_f1", "auroc", "mean_average_precision"} <= found["scores"].keys()
    rows = (tmp_path / "run" / "predictions_val.csv").read_text().splitlines()
    assert rows[0] == "id,label"
    assert len(rows) == 1 + found["scores"]["accuracy"]["count"]


def test_texts_alone_need_a_model_of_words_alone(world: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, number in (("train", 8), ("val", 3)):
        rows = [json.dumps({"text": f"the {word} one", "label": word}) for word in ["red", "blue"] * number]
        (data / f"{split}.jsonl").write_text("\n".join(rows))
    config = configs.override(FINETUNING["visualbert-classification-scenes"](), TINY)
    with pytest.raises(DataError, match=r"example '1' has no image.*--text-only"):
        finetune(config, tmp_path / "run", data=data, store=world.regions, device="cpu")
    blind = configs.override(config, ["text_only=true"])
    finetune(blind, tmp_path / "blind", data=data, store=None, device="cpu")
    found = evaluate(tmp_path / "blind", split="val")
    assert found["text_only"]
    assert found["scores"]["accuracy"]["count"] == 6
    details = (tmp_path / "blind" / "details_val.jsonl").read_text().splitlines()
    assert all(json.loads(line)["image"] is None for line in details)
