"""LXMERT's files and what its own code makes of them (`golden/lxmert_io`; its expected.json describes every file):
region features, merged sentences, answer table, answer head of a task, score of the pre-training questions.

Sizes, answers and images come from the files. Everything is equal to the last bit but unit boxes and scores, which are
divided in another order.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from visling import models
from visling.data.annotations.lxmert import LxmertRecord, read_lxmert
from visling.data.answer_table import listed, read_table, table_form, table_rows
from visling.data.answers import AnswerVocabulary
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.errors import VislingError
from visling.metrics.answers import source_scores
from visling.nn.head_blocks import NormedClassifier
from visling.regions.formats.base import convert_regions
from visling.regions.formats.tsv import RegionTsv
from visling.regions.store import NativeStore
from visling.runtime import generator_for
from visling.types import Example, InputSpec, RegionArray

UNIT = 1e-6
"""Absolute tolerance of unit boxes, in float32."""
FIELDS = {
    "features": "features",
    "obj_labels": "classes",
    "obj_conf": "class_confidence",
    "attr_labels": "attributes",
    "attr_conf": "attribute_confidence",
}
"""Recorded name -> ours."""


@dataclass(frozen=True)
class Recording:
    """The recorded files."""

    folder: Path

    @property
    def expected(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "expected.json").read_text())
        return found

    @property
    def table(self) -> AnswerVocabulary:
        return read_table(self.folder / "all_ans.json")

    @property
    def regions(self) -> Path:
        return self.folder / "tiny_obj.tsv"

    @property
    def records(self) -> tuple[LxmertRecord, ...]:
        return read_lxmert(self.folder / "pretrain_mscoco_train.json", self.folder / "pretrain_vgnococo.json").records

    @property
    def arrays(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Recorded arrays of every image, by recorded name."""
        found: dict[str, dict[str, NDArray[Any]]] = {}
        for name, tensor in load_file(self.folder / "tiny_obj_expected.safetensors").items():
            field, _, image = name.partition(".")
            found.setdefault(image, {})[field] = tensor.numpy()
        return found


@pytest.fixture
def recording(golden: Path) -> Recording:
    return Recording(golden / "lxmert_io")


# Region features


def compare_regions(found: Mapping[str, RegionArray], expected: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
    assert found.keys() == expected.keys()
    for image, regions in found.items():
        for recorded, ours in FIELDS.items():
            array = getattr(regions, ours)
            np.testing.assert_array_equal(
                array if array.ndim == 1 or ours == "features" else array[:, 0],
                expected[image][recorded],
                err_msg=recorded,
            )
        unit = regions.boxes / np.array(regions.size * 2, np.float32)
        np.testing.assert_allclose(unit, expected[image]["boxes_normalised"], rtol=0, atol=UNIT)


def decoded(file: Path) -> dict[str, RegionArray]:
    return {name: regions for name, regions, *_ in RegionTsv(file).images() if regions is not None}


def test_region_files_are_decoded_as_in_the_release(recording: Recording) -> None:
    compare_regions(decoded(recording.regions), recording.arrays)


def test_a_store_made_of_them_gives_the_model_what_the_release_gives_it(recording: Recording, tmp_path: Path) -> None:
    expected = recording.arrays
    convert_regions([RegionTsv(recording.regions)], tmp_path / "store", dtype="float32")
    store = NativeStore.open(tmp_path / "store")
    for image in expected:
        kept = store[image]
        half = {name: getattr(kept, name) for name in ("class_confidence", "attribute_confidence")}
        for name, array in half.items():  # stored in 16 bits
            recorded = next(key for key, ours in FIELDS.items() if ours == name)
            np.testing.assert_array_equal(array.reshape(-1), expected[image][recorded].astype(np.float16))
        exact = {ours: expected[image][key] for key, ours in FIELDS.items() if ours in half}
        compare_regions({image: replace(kept, **exact)}, {image: expected[image]})
    spec = InputSpec(feature_size=store.feature_size, max_regions=36, max_tokens=20)
    row = TextLayout(Tokenizer(), spec).row("a cat")
    examples = [Example(id=image, rows=(row,), images=(image,)) for image in expected]
    batch, _ = Collator(store, spec, Tokenizer())(examples, [generator_for(0)] * len(examples))
    batch.validate()
    assert batch.regions is not None
    for number, arrays in enumerate(expected.values()):
        real = batch.regions.mask[number]
        assert_close(batch.regions.features[number][real], torch.from_numpy(arrays["features"]), rtol=0, atol=0)
        assert_close(batch.regions.boxes[number][real], torch.from_numpy(arrays["boxes_normalised"]), rtol=0, atol=UNIT)


COLUMNS = (
    "img_id",
    "img_h",
    "img_w",
    "objects_id",
    "objects_conf",
    "attrs_id",
    "attrs_conf",
    "num_boxes",
    "boxes",
    "features",
)


def spoilt(line: bytes, column: str, change: Callable[[bytes], bytes]) -> bytes:
    fields = line.split(b"\t")
    at = COLUMNS.index(column)
    return b"\t".join([*fields[:at], change(fields[at]), *fields[at + 1 :]])


def nudged(content: bytes) -> bytes:
    """Base64 of the same bytes but for the third of the first number: a small change in a float, a large one in an
    integer."""
    found = bytearray(base64.b64decode(content))
    found[2] ^= 0x10
    return base64.b64encode(bytes(found))


@pytest.mark.parametrize("column", [name for name in COLUMNS if name != "num_boxes"])
def test_a_changed_column_is_noticed(recording: Recording, tmp_path: Path, column: str) -> None:
    changes: dict[str, Callable[[bytes], bytes]] = {
        "img_id": lambda text: text + b"1",
        "img_h": lambda text: b"%d" % (int(text) + 1),
    }
    changes["img_w"] = changes["img_h"]
    first, *rest = recording.regions.read_bytes().splitlines(keepends=True)
    file = tmp_path / "spoilt.tsv"
    file.write_bytes(first + b"".join(rest))
    compare_regions(decoded(file), recording.arrays)
    file.write_bytes(spoilt(first.rstrip(b"\r\n"), column, changes.get(column, nudged)) + b"\n" + b"".join(rest))
    with pytest.raises((AssertionError, VislingError)):
        compare_regions(decoded(file), recording.arrays)


# Sentences


def flattened(records: tuple[LxmertRecord, ...], table: AnswerVocabulary) -> list[dict[str, Any]]:
    return [
        {
            "uid": record.id,
            "img_id": record.images[0],
            "sent": record.sentence,
            "is_matched": 1,
            "label_id_to_score": None
            if record.scores is None
            else {str(table.index(answer)): score for answer, score in listed(record.scores, table).items()},
        }
        for record in records
    ]


def test_sentences_are_flattened_as_in_the_release(recording: Recording, tmp_path: Path) -> None:
    convert_regions([RegionTsv(recording.regions)], tmp_path / "store")
    store = NativeStore.open(tmp_path / "store")
    kept = tuple(
        record for record in recording.records if record.images[0] in store
    )  # the release drops sentences about images without features
    assert len(kept) < len(recording.records)
    assert flattened(kept, recording.table) == recording.expected["flattened_examples"]


def test_a_changed_sentence_is_noticed(recording: Recording) -> None:
    expected = recording.expected["flattened_examples"]
    images = {entry["img_id"] for entry in expected}
    kept = [record for record in recording.records if record.images[0] in images]
    asked = next(
        number for number, record in enumerate(kept) if record.scores and listed(record.scores, recording.table)
    )
    respelt = next(
        record for record in kept if record.scores and any(table_form(answer) != answer for answer in record.scores)
    )
    for change in (
        {asked: replace(kept[asked], scores={})},
        {asked: replace(kept[asked], scores={**(kept[asked].scores or {}), "silver": 1.0, "yes": 0.9})},
        {asked: replace(kept[asked], sentence="?")},
        {
            kept.index(respelt): replace(
                respelt,
                scores=dict(reversed(list((respelt.scores or {}).items()))) if len(respelt.scores or {}) > 1 else None,
            )
        },
    ):
        assert (
            flattened(tuple(change.get(number, record) for number, record in enumerate(kept)), recording.table)
            != expected
        )


# Answer table


def test_answers_are_spelled_as_in_the_release(recording: Recording) -> None:
    recorded = recording.expected["convert_answer"]
    assert {answer: table_form(answer) for answer in recorded} == recorded
    for other in (str.lower, str.strip, lambda answer: answer.lower().removesuffix(".").removeprefix("the ")):
        assert {answer: other(answer) for answer in recorded} != recorded


def test_tables_of_some_data_sets(recording: Recording) -> None:
    file, expected = recording.folder / "all_ans.json", recording.expected
    assert {
        name: len(read_table(file, None if name == "all" else [name])) for name in expected["num_answers"]
    } == expected["num_answers"]
    assert {answer: number for number, answer in enumerate(read_table(file, ["gqa"]))} == expected[
        "id_by_answer_when_only_gqa"
    ]


# Answer head of a task


def head_of(tensors: Mapping[str, Tensor], prefix: str) -> NormedClassifier:
    given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    (outputs, hidden), size = given["3.weight"].shape, given["0.weight"].shape[1]
    head = NormedClassifier(size, hidden, outputs)
    models.spec("lxmert").keys["official_finetuned"].load(
        {f"logit_fc.{name}": tensor for name, tensor in given.items()}, {"classifier": head}
    )
    return head


def compare_heads(found: NormedClassifier, expected: NormedClassifier) -> None:
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def started(recording: Recording, rows: list[int | None]) -> tuple[NormedClassifier, NormedClassifier]:
    """A task's head started from that of pre-training, and the recorded one."""
    recorded = load_file(recording.folder / "answer_head_transfer.safetensors")
    head, trained = head_of(recorded, "task_head_before."), head_of(recorded, "checkpoint.module.answer_head.logit_fc.")
    head.start_from(trained, rows)
    with torch.no_grad():
        trained.linear.weight += 1  # what was carried over is a copy
    return head, head_of(recorded, "task_head_after.")


def rows_of(recording: Recording) -> list[int | None]:
    return list(table_rows(recording.expected["task_label2ans"], list(recording.table)))


def test_rows_of_the_answers(recording: Recording) -> None:
    expected = load_file(recording.folder / "answer_head_transfer.safetensors")["row_map"].tolist()
    assert [-1 if row is None else row for row in rows_of(recording)] == expected


def test_a_task_head_starts_from_the_answer_table(recording: Recording) -> None:
    rows = rows_of(recording)
    head, expected = started(recording, rows)
    compare_heads(head, expected)
    assert not head.linear.weight[rows.index(None)].any()  # zeros, not random


def test_a_head_that_starts_otherwise_is_noticed(recording: Recording) -> None:
    rows = rows_of(recording)
    known = [number for number, row in enumerate(rows) if row is not None]
    swapped = list(rows)
    swapped[known[0]], swapped[known[1]] = rows[known[1]], rows[known[0]]
    guessed = [0 if row is None else row for row in rows]
    for other in (swapped, guessed):
        with pytest.raises(AssertionError, match=r"linear\.weight"):
            compare_heads(*started(recording, other))
    for name in ("dense.bias", "norm.weight", "linear.bias"):
        head, expected = started(recording, rows)
        with torch.no_grad():
            head.get_parameter(name)[0] += 1e-6
        with pytest.raises(AssertionError, match=name):
            compare_heads(head, expected)


# Score of the questions


def scored(recording: Recording, predictions: Mapping[str, str], *, prune: bool = True) -> dict[str, Any]:
    table = recording.table
    answered = [
        (
            predictions[record.id],
            replace(record, scores=listed(record.scores, table)) if prune and record.scores is not None else record,
        )
        for record in recording.records
        if record.id in predictions
    ]
    found = source_scores(answered)
    return {"overall": found.overall.value, "per_dataset": {name: score.value for name, score in found.sources.items()}}


def test_questions_are_scored_as_in_the_release(recording: Recording) -> None:
    expected = recording.expected["evaluator"]
    found = scored(recording, expected["predictions"])
    assert found["overall"] == pytest.approx(expected["overall"], abs=1e-12)
    assert found["per_dataset"] == pytest.approx(expected["per_dataset"], abs=1e-12)


def test_other_answers_and_other_questions_are_noticed(recording: Recording) -> None:
    expected = recording.expected["evaluator"]
    predictions = expected["predictions"]
    asked = {
        record.id: listed(record.scores, recording.table) for record in recording.records if record.scores is not None
    }
    asked = {name: scores for name, scores in asked.items() if name in predictions}
    right = next(name for name, scores in asked.items() if predictions[name] in scores)
    unlisted = next(name for name, scores in asked.items() if not scores)
    for other in (
        {**predictions, right: "never an answer"},
        {name: answer for name, answer in predictions.items() if name != unlisted},
        {name: answer for name, answer in predictions.items() if name != right},
    ):
        assert scored(recording, other)["overall"] != pytest.approx(expected["overall"], abs=1e-6)
        assert scored(recording, other)["per_dataset"] != pytest.approx(expected["per_dataset"], abs=1e-6)
    assert scored(recording, predictions, prune=False)["per_dataset"] != pytest.approx(
        expected["per_dataset"], abs=1e-6
    )
