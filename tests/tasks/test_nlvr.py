"""NLVR v1: real lines of the official file, messy ones, the official numbers, splits by presentation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from visling.data.annotations.nlvr import NlvrRecord
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.metrics.answers import nlvr_images
from visling.tasks.base import TaskSource
from visling.tasks.nlvr import NLVR, NlvrConfig
from visling.types import Batch, InputSpec, Prediction

ROOT = Path(__file__).parent / "files" / "nlvr"
GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "metrics" / "nlvr1.json").read_text(encoding="utf-8")
)
RNG = np.random.default_rng(0)
SIX = tuple(range(6))

UNREAD = cast(Batch, None)
"""The batch of a decoding that does not look at it."""


def told(record: NlvrRecord, value: str, confidence: float = 0.8) -> Prediction:
    other = "false" if value == "true" else "true"
    return Prediction(
        id=record.id, value=value, confidence=confidence, top=((value, confidence), (other, 1 - confidence))
    )


def picture(identifier: str, k: int, *, label: bool | None = True, sentence: str = "there is a box") -> NlvrRecord:
    name = f"dev-{identifier}-{k}"
    return NlvrRecord(
        id=name,
        images=(name,),
        sentence=sentence,
        label=label,
        identifier=identifier,
        presentation=identifier.split("-")[0],
        official=True,
    )


def right(record: NlvrRecord) -> Prediction:
    return told(record, "true" if record.label else "false")


def write(root: Path, lines: list[str], split: str = "dev") -> Path:
    (root / split).mkdir(parents=True)
    (root / split / f"{split}.json").write_text("\n".join(lines))
    return root


def line(**fields: Any) -> str:
    return json.dumps({"sentence": "there is a box", "label": "true", "identifier": "7-0", "directory": "0"} | fields)


def test_real_records() -> None:
    records = NLVR(NlvrConfig(pictures=SIX)).records(ROOT, "dev")
    assert len(records) == 9 * 6
    assert records[0] == NlvrRecord(
        id="dev-1572-0-0",
        images=("dev-1572-0-0",),
        sentence="Each grey box contains atleast one yellow object touching the edge",
        label=True,
        identifier="1572-0",
        presentation="1572",
        official=True,
    )
    assert [record.label for record in records if record.id.endswith("-0")] == [
        True,
        True,
        False,
        False,
        True,
        True,
        False,
        True,
        False,
    ]
    assert {record.presentation for record in records} == {"1572", "2538", "1514"}


def test_pictures_are_those_that_the_folder_holds() -> None:
    assert {record.id[-1] for record in NLVR().records(ROOT, "dev")} == {"0", "1", "5"}
    assert {record.id[-1] for record in NLVR(NlvrConfig(pictures=(2,))).records(ROOT, "dev")} == {"2"}
    found = {path.stem for path in ROOT.glob("dev/images/*/*.png")}
    assert found <= {record.images[0] for record in NLVR().records(ROOT, "dev")}
    for pictures in ((), (0, 6)):
        with pytest.raises(ConfigError, match="numbered 0 to 5"):
            NLVR(NlvrConfig(pictures=pictures)).records(ROOT, "dev")


def test_a_hidden_split_has_no_directory_and_no_label(tmp_path: Path) -> None:
    bare = json.dumps({"sentence": "there is a box", "identifier": "7-0"})
    records = NLVR().records(write(tmp_path, ["", bare, ""], "hidden"), "hidden")
    assert [record.id for record in records] == [f"hidden-7-0-{k}" for k in SIX]
    assert NLVR().example(records[0], TextLayout(Tokenizer(), InputSpec()), RNG).labels == {}
    with pytest.raises(DataError, match="has no label"):
        NLVR().report([told(record, "true") for record in records], records)
    details = NLVR().details([told(record, "true") for record in records], records)
    assert (details[0]["truth"], details[0]["score"]) == (None, None)


def test_extra_statements_are_read_beside_the_official_file(tmp_path: Path) -> None:
    write(tmp_path, [line()])
    (tmp_path / "dev" / "statements.json").write_text(line(identifier="7-0-s1", image="dev-7-0-2", label="false"))
    (tmp_path / "statements").mkdir()
    (tmp_path / "statements" / "dev.json").write_text(line(identifier="42-0", image="scene_000000000042"))
    records = NLVR().records(tmp_path, "dev")
    assert [(r.id, r.images[0], r.presentation, r.label) for r in records if not r.official] == [
        ("statement-7-0-s1", "dev-7-0-2", "7", False),
        ("statement-42-0", "scene_000000000042", "scene_000000000042", True),
    ]
    assert all(record.official for record in NLVR(NlvrConfig(statements=False)).records(tmp_path, "dev"))
    predictions = [right(record) for record in records[:-1]] + [told(records[-1], "false")]
    report = NLVR().report(predictions, records)
    assert (report.scores["accuracy"].value, report.scores["accuracy"].count) == (100 * 7 / 8, 8)
    assert (report.scores["precision"].value, report.scores["precision"].count) == (100, 6)
    assert {name: (score.value, score.count) for name, score in report.by["source"].items()} == {
        "pictures": (100, 6),
        "statements": (50, 2),
    }
    assert {name: (score.value, score.count) for name, score in report.by["label"].items()} == {
        "false": (100, 1),
        "true": (100 * 6 / 7, 7),
    }
    assert NLVR().submission(predictions).splitlines() == [f"dev-7-0-{k}.png,true" for k in SIX]


def test_statements_alone_are_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "statements").mkdir()
    (tmp_path / "statements" / "val.json").write_text(line(identifier="42-0", image="scene_000000000042"))
    records = NLVR().records(tmp_path, "val")
    assert [record.id for record in records] == ["statement-42-0"]
    assert set(NLVR().report([right(records[0])], records).scores) == {"accuracy"}


def test_official_numbers_equal_the_scripts() -> None:
    sentences = {example["identifier"]: example for example in GOLDEN["examples"]}
    records = [picture(name, k, label=example["label"] == "true") for name, example in sentences.items() for k in SIX]
    predictions = [
        Prediction(id=name.split(".")[0], value=value.lower(), confidence=1.0)
        for name, value in GOLDEN["predictions_images"]
    ]
    scores = NLVR().report(predictions, records).scores
    expected = GOLDEN["expected_images"]
    assert scores["precision"].value == 100 * expected["precision"]
    assert scores["consistency"].value == 100 * expected["consistency"]
    assert scores["accuracy"].value == pytest.approx(100 * expected["precision"])
    assert (scores["precision"].count, scores["example_accuracy"].count) == (len(records), len(sentences))
    assert scores["consistency"].count == len({record.presentation for record in records})
    for name in ("accuracy", "precision", "consistency"):
        assert scores[name].low < scores[name].value < scores[name].high
    # Read back from the submission, the official scorer gives the same.
    rows = [tuple(row.split(",")) for row in NLVR().submission(predictions).splitlines()]
    again = nlvr_images(
        [(name, value) for name, value in rows], {name: example["label"] for name, example in sentences.items()}
    )
    assert 100 * again.precision.value == scores["precision"].value


def test_intervals_are_over_presentations() -> None:
    records = [picture(f"{n}-{m}", k) for n in (7, 8) for m in range(4) for k in SIX]
    predictions = [told(record, "true" if record.presentation == "7" else "false") for record in records]
    scores = NLVR().report(predictions, records).scores
    for name in ("accuracy", "precision", "consistency"):  # of two presentations, one is often drawn twice
        assert (scores[name].low, scores[name].value, scores[name].high) == (0, 50, 100)


def test_official_numbers_need_all_six_pictures() -> None:
    records = [picture("7-0", k) for k in range(5)]
    assert "precision" not in NLVR().report([right(record) for record in records], records).scores


def test_an_example_is_judged_by_its_mean_log_odds() -> None:
    records = [picture("7-0", k) for k in SIX] + [picture("8-0", k, label=False) for k in SIX]
    task = NLVR()
    logits = torch.zeros(12, 2)
    logits[:6, 1] = torch.tensor([-1.0, -1, -1, -1, -1, 6])  # five weak errors, one strong hit: right on average
    logits[6:, 1] = torch.tensor([-1.0, -1, -1, -1, -1, 4])
    scores = task.report(task.decode({"classify": logits}, UNREAD, records), records).scores
    assert scores["precision"].value == pytest.approx(100 * 6 / 12)
    assert scores["consistency"].value == 0
    assert scores["example_accuracy"].value == 100
    assert scores["example_consistency"].value == 100
    logits[11, 1] = 6
    assert (
        task.report(task.decode({"classify": logits}, UNREAD, records), records).scores["example_accuracy"].value == 50
    )


def test_certain_predictions_have_finite_odds() -> None:
    records = [picture("7-0", k) for k in SIX]
    logits = torch.tensor([[0.0, 500.0]] * 6)
    assert (
        NLVR().report(NLVR().decode({"classify": logits}, UNREAD, records), records).scores["example_accuracy"].value
        == 100
    )


def test_class_one_is_true() -> None:
    records = [picture("7-0", 0), picture("7-0", 1)]
    predictions = NLVR().decode({"classify": torch.tensor([[0.0, 2.0], [2.0, 0.0]])}, UNREAD, records)
    assert [p.value for p in predictions] == ["true", "false"]
    assert predictions[0].confidence == pytest.approx(1 / (1 + math.exp(-2)))
    assert [name for name, _ in predictions[1].top] == ["false", "true"]
    assert sum(p for _, p in predictions[0].top) == pytest.approx(1)
    assert NLVR().heads["classify"].outputs == 2


def test_loss_reads_collated_examples() -> None:
    tokenizer, spec = Tokenizer(), InputSpec(answer_slot="same_segment")
    source = TaskSource(NLVR(), [picture("7-0", 0), picture("8-0", 0, label=False)], TextLayout(tokenizer, spec))
    examples = [source.example(index, RNG) for index in range(2)]
    assert examples[0].rows[0].answer_at is None  # statements are judged by the pooled state
    _, targets = Collator(None, spec, tokenizer)(examples, [RNG, RNG])
    logits = torch.tensor([[0.0, 1.0], [0.0, 3.0]], dtype=torch.bfloat16)
    loss = NLVR().loss({"classify": logits}, targets)
    first, second = math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))
    assert loss.value.dtype == torch.float32
    assert loss.value.item() == pytest.approx((first + second) / 2, rel=1e-5)
    assert [float(n) for n in loss.parts["answer_accuracy"]] == [1, 2]


def test_the_majority_class_is_that_of_the_training_records() -> None:
    train = [picture("1-0", 0, label=False), picture("2-0", 0, label=False), picture("3-0", 0)]
    records = [picture("4-0", k) for k in range(6)] + [picture("5-0", k, label=False) for k in range(6)]
    ((name, predictions),) = NLVR().baselines(train, records).items()
    assert name == "majority class"
    assert {prediction.value for prediction in predictions} == {"false"}
    assert NLVR().report(predictions, records).scores["precision"].value == 50.0


def test_details_have_the_written_form() -> None:
    record = picture("7-0", 0)
    row = json.loads(json.dumps(NLVR().details([told(record, "false", 0.75)], [record])))[0]
    assert row == {
        "id": "dev-7-0-0",
        "image": "dev-7-0-0",
        "text": "there is a box",
        "type": "pictures",
        "truth": "true",
        "prediction": "false",
        "confidence": 0.75,
        "top": [["false", 0.75], ["true", 0.25]],
        "score": 0.0,
    }


def test_state_restores_the_task() -> None:
    task = NLVR(NlvrConfig(pictures=(0, 3), draws=50))
    assert NLVR.from_state(json.loads(json.dumps(task.state()))).config == task.config
    assert NLVR.from_state({}).config == NlvrConfig()
