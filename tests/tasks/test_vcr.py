"""VCR as a task: rows of both phases, objects bound to regions of any store, losses, reports and what is refused. What
the releases do is in `tests/parity/test_*_vcr.py`."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from visling import models
from visling.data.annotations.vcr import VcrRecord
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.errors import DataError
from visling.metrics.vcr import read_submission, submission_scores
from visling.recipes.tables import FINETUNING
from visling.runs.finetune import fit_to_family
from visling.tasks.answers import read_predictions
from visling.tasks.base import TaskSource, TextOnly
from visling.tasks.vcr import VCR, VcrConfig, joint_report, joint_submission
from visling.types import IGNORE, Batch, InputSpec, Prediction, RegionArray, Targets

TOKENIZER = Tokenizer()
BOXES = [[0.0, 0, 30, 30, 0.9], [10, 10, 50, 40, 0.8], [40, 0, 60, 60, 0.7]]
OBJECTS = np.array(BOXES, np.float32)[:, :4]


def line(number: int = 0, **changed: Any) -> dict[str, Any]:
    """A line of the official layout; `changed` fields of None are left out."""
    full = {
        "movie": "m",
        "objects": ["person", "dog", "person"],
        "img_fn": f"m/{number}@0.jpg",
        "metadata_fn": f"m/{number}@0.json",
        "question": ["Does", [2], "see", [1], "?"],
        "answer_choices": [["Yes", "."], [[0], "does", "."], ["No", "."], [[0, 1], "bark", "."]],
        "answer_label": 1,
        "rationale_choices": [["Look", "."], [[2], "smiles", "."], ["Hm", "."], ["Oh", "."]],
        "rationale_label": 3,
        "question_number": number,
        "annot_id": f"val-{number}",
    }
    return {name: value for name, value in (full | changed).items() if value is not None}


def write(root: Path, *lines: dict[str, Any], split: str = "val", **metadata: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    for one in lines:
        path = root / "vcr1images" / one["metadata_fn"]
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"boxes": BOXES, "segms": [[], [], []], "names": one["objects"], "width": 64, "height": 64}
        path.write_text(json.dumps(content | metadata), encoding="utf-8")
    return root


def read(root: Path, task: VCR, *lines: dict[str, Any]) -> list[VcrRecord]:
    return task.records(write(root, *(lines or (line(),))), "val")


def family(model: str, **changed: Any) -> VCR:
    return VCR(VcrConfig(**{**models.spec(model).tasks["vcr"], **changed}))


def texts(task: VCR, record: VcrRecord, most: int = 60) -> list[str]:
    layout = TextLayout(TOKENIZER, InputSpec(max_tokens=most))
    rows = task.example(record, layout, np.random.default_rng(0)).rows
    return [" ".join(TOKENIZER.tokens(row.ids)) for row in rows]


class Store:
    """One set of regions for every image."""

    feature_size, fingerprint = 2, "test"

    def __init__(self, boxes: Any, *, size: tuple[int, int] = (64, 64)) -> None:
        self.boxes, self.size = np.array(boxes, np.float32), size

    def __contains__(self, image_id: str) -> bool:
        return True

    def __len__(self) -> int:
        return 1

    def __getitem__(self, image_id: str) -> RegionArray:
        count = len(self.boxes)
        return RegionArray(
            features=np.arange(2 * count, dtype=np.float32).reshape(count, 2),
            boxes=self.boxes,
            size=self.size,
            class_confidence=np.linspace(0.1, 0.9, count),  # the last region is the most confident
        )


def collate(task: VCR, records: list[VcrRecord], store: Any, **spec: Any) -> tuple[Batch, Targets]:
    inputs = InputSpec(max_tokens=60, feature_size=2, **spec)
    source = TaskSource(task, records, TextLayout(TOKENIZER, inputs))
    rng = np.random.default_rng(0)
    examples = [source.example(number, rng) for number in range(len(records))]
    batch, targets = Collator(store, inputs, TOKENIZER)(examples, [rng] * len(examples))
    batch.validate()
    return batch, targets


def linked(batch: Batch, row: int) -> list[tuple[str, list[float]]]:
    """Each linked piece of a row with the box that it is linked to, in pixels of a picture of 64."""
    assert batch.regions is not None
    boxes = batch.regions.boxes[0 if batch.regions.row is None else batch.regions.row[row]] * 64
    links = [] if batch.links is None else batch.links[row].nonzero().tolist()
    return [
        (TOKENIZER.tokens([int(batch.text.ids[row, at])])[0], boxes[region].round().tolist()) for at, region in links
    ]


# Texts


def test_a_row_for_each_answer(tmp_path: Path) -> None:
    task = VCR()
    (record,) = read(tmp_path, task)
    example = task.example(record, TextLayout(TOKENIZER, InputSpec()), np.random.default_rng(0))
    assert texts(task, record) == [
        "[CLS] does casey see dog ? [SEP] yes . [SEP]",
        "[CLS] does casey see dog ? [SEP] casey does . [SEP]",
        "[CLS] does casey see dog ? [SEP] no . [SEP]",
        "[CLS] does casey see dog ? [SEP] casey dog bark . [SEP]",
    ]
    assert (example.images, dict(example.labels), example.linked_regions) == (("0@0",), {"choice": 1}, None)


def test_each_family_words_rationales_in_its_own_way(tmp_path: Path) -> None:
    (record,) = read(tmp_path, VCR())
    second = {name: texts(family(name, phase="rationale"), record)[1] for name in ("visualbert", "vlbert", "vilbert")}
    assert second["visualbert"] == "[CLS] does casey see dog ? riley does . [SEP] casey smiles . [SEP]"
    assert second["vlbert"] == "[CLS] does riley see dog ? casey does . [SEP] riley smiles . [SEP]"
    before, asked, answer, chosen, after = second["vilbert"].replace("[CLS]", "[SEP]").split("[SEP]")
    assert (before, after) == ("", "")
    assert asked.startswith(" does ")
    assert (answer.endswith(" does . "), chosen.endswith(" smiles . ")) == (True, True)
    assert texts(family("vlbert", phase="rationale", with_question=False), record)[0].startswith("[CLS] casey does .")
    assert "casey and dog bark" in texts(family("vlbert"), record)[3]


def test_rationales_of_a_split_without_labels_are_chosen_for_every_answer(tmp_path: Path) -> None:
    task = VCR(VcrConfig(phase="rationale"))
    (record,) = read(tmp_path, task, line(answer_label=None, rationale_label=None))
    found = texts(task, record)
    assert len(found) == 16
    assert [text.split(" ? ")[1].split(" [SEP] ")[0] for text in found[::4]] == [
        "yes .", "riley does .", "no .", "riley dog bark .",
    ]  # fmt: skip
    assert not task.labelled([record])


def test_a_family_of_no_release_words_them_as_visualbert_without_links(tmp_path: Path) -> None:
    (record,) = read(tmp_path, VCR())
    assert texts(VCR(), record) == texts(family("visualbert"), record)
    for model in ("lxmert", "cvlp"):
        settings = fit_to_family(FINETUNING[f"{model}-vcr-scenes"]()).task_settings
        assert VCR.configured(settings).config == VcrConfig()
    settings = fit_to_family(FINETUNING["vlbert-vcr-rationale-scenes"]()).task_settings
    assert VCR.configured(settings).config == family("vlbert", phase="rationale").config


def test_names_change_from_visit_to_visit_only_if_they_are_to(tmp_path: Path) -> None:
    (record,) = read(tmp_path, VCR())
    layout = TextLayout(TOKENIZER, InputSpec())

    def visits(task: VCR) -> int:
        rng = np.random.default_rng(0)
        return len({tuple(task.example(record, layout, rng).rows[0].ids.tolist()) for _ in range(20)})

    assert visits(family("vlbert")) == 1
    assert visits(family("vlbert", new_names=True)) > 5


def test_rows_that_are_too_long_are_cut_and_counted(tmp_path: Path) -> None:
    (record,) = read(tmp_path, VCR())
    for task in (VCR(), family("vlbert"), family("vilbert"), VCR(VcrConfig(cut="second"))):
        layout = TextLayout(TOKENIZER, InputSpec(max_tokens=9))
        rows = task.example(record, layout, np.random.default_rng(0)).rows
        assert max(len(row.ids) for row in rows) == 9
        assert layout.truncated >= 1


def test_one_question_of_ones_own(tmp_path: Path) -> None:
    for phase, count in (("answer", 2), ("rationale", 5)):
        task = VCR(VcrConfig(phase=cast(Any, phase)))
        record = task.query(["who is it ?", *(f"choice {number}" for number in range(count))], ["7"])
        found = texts(task, record)
        assert found[-1] == f"[CLS] who is it ? [SEP] choice {count - 1} [SEP]"
        logits = {"score": torch.arange(float(count))[None]}
        (prediction,) = task.decode(logits, cast(Batch, None), [record])
        assert (prediction.value, len(prediction.top), len(found)) == (str(count - 1), count, count)
    with pytest.raises(DataError, match="a question and at least two choices; found 1 text"):
        VCR().query(["who ?"], ["7"])


# Objects and regions


def test_links_follow_the_objects_in_any_store(tmp_path: Path) -> None:
    task = family("vlbert")
    (record,) = read(tmp_path, task)
    expected = [("riley", OBJECTS[2].tolist()), ("dog", OBJECTS[1].tolist()), ("casey", OBJECTS[0].tolist())]
    whole = [0, 0, 64, 64]
    for boxes in (OBJECTS, [whole, *OBJECTS], OBJECTS[::-1], [whole, *OBJECTS[::-1], whole]):
        assert linked(collate(task, [record], Store(boxes))[0], 1) == expected


def test_links_are_right_in_another_order_and_after_a_cut(tmp_path: Path) -> None:
    task = family("vlbert")
    (record,) = read(tmp_path, task)
    casey, dog, riley = OBJECTS.tolist()
    for order, count, expected in (
        ("confidence", 9, [("riley", riley), ("dog", dog), ("casey", casey)]),
        ("confidence", 2, [("riley", riley), ("dog", dog)]),
        ("store", 2, [("dog", dog), ("casey", casey)]),
    ):
        batch, targets = collate(task, [record], Store(OBJECTS), region_order=order, max_regions=count)
        assert linked(batch, 1) == expected
        assert sorted(cast(Tensor, targets.object_classes)[0].tolist()) == sorted([1, 17, 1])[-count:] or count < 3


def test_an_object_is_bound_to_a_region_that_overlaps_it_by_half(tmp_path: Path) -> None:
    (record,) = read(tmp_path, VCR())
    near, far = [3.0, 0, 30, 30], [20.0, 0, 30, 30]
    store = Store([far, near, [42, 2, 60, 58]])
    found = [family("vlbert", least_overlap=least).bind(record, store["x"]).tolist() for least in (0.5, 0.95, 0.01)]
    assert found == [[1, -1, 2], [-1, -1, -1], [1, 1, 2]]
    assert family("vlbert").bind(record, Store(OBJECTS * 2, size=(128, 128))["x"]).tolist() == [0, 1, 2], "scaled"
    assert family("vlbert").bind(record, Store(np.zeros((0, 4)))["x"]).tolist() == [-1, -1, -1]


def test_equal_boxes_in_their_order_keep_their_objects(tmp_path: Path) -> None:
    twins = [BOXES[0], BOXES[0], BOXES[2]]
    (record,) = VCR().records(write(tmp_path, line(), boxes=twins), "val")
    assert family("vlbert").bind(record, Store(np.array(twins)[:, :4])["x"]).tolist() == [0, 1, 2]


def test_rows_of_an_example_share_its_regions(tmp_path: Path) -> None:
    task = family("vlbert")
    records = read(tmp_path, task, line(0), line(1))
    batch, _ = collate(task, records, Store(OBJECTS))
    assert batch.regions is not None
    assert batch.regions.row is not None
    assert (batch.group, batch.regions.features.shape[0]) == (4, 2)
    assert batch.regions.row.tolist() == [0] * 4 + [1] * 4


def test_classes_of_regions(tmp_path: Path) -> None:
    task = family("vlbert")
    (record,) = read(tmp_path, task)
    for boxes, expected in (
        (OBJECTS, [1, 17, 1]),
        ([[0, 0, 64, 64], *OBJECTS], [0, 1, 17, 1]),
        ([*OBJECTS[::-1], [0, 40, 9, 60]], [1, 17, 1, IGNORE]),
    ):
        _, targets = collate(task, [record], Store(boxes))
        assert cast(Tensor, targets.object_classes).tolist() == [expected] * 4
    assert "objects" not in family("visualbert").heads
    assert family("visualbert").region_targets(record, [Store(OBJECTS)["x"]]) == {}


def test_only_relevant_regions_are_shown(tmp_path: Path) -> None:
    """In the order of their mention, after the whole image; texts, links, classes and names follow."""
    task = family("vlbert", only_relevant=True)
    silent = line(question=["Is", [2], "here", "?"], answer_choices=[["Yes"], ["No"], [[1]], ["Why"]], answer_label=0)
    records = read(tmp_path, task, silent, line(1))
    assert [task.shown_objects(record) for record in records] == [[2, 1], [2, 1, 0]]
    batch, targets = collate(task, records, Store([[0, 0, 64, 64], *OBJECTS, [0, 40, 9, 60]][:4]))
    assert batch.regions is not None
    assert batch.regions.mask.sum(1).tolist() == [3, 4]
    assert (batch.regions.boxes[0, 1:3] * 64).tolist() == OBJECTS[[2, 1]].tolist()
    assert batch.regions.features[0].tolist() == [[0, 1], [6, 7], [4, 5], [0, 0]]
    assert linked(batch, 0) == [("casey", OBJECTS[2].tolist())], "only shown people use up names"
    assert cast(Tensor, targets.object_classes)[[0, 4]].tolist() == [[0, 1, 17, IGNORE], [0, 1, 17, 1]]


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({}, [0, 1, 2]),  # [2] and [1] in the question, [0] in an answer
        ({"answer_choices": [["Yes"]] * 4, "question": ["Does", [2], "bark", "?"]}, [2]),
        ({"answer_choices": [["Yes"]] * 4, "question": ["Is", [1], "here", "?"]}, [1, 2]),  # a rationale names [2]
        ({"answer_choices": [["Yes"]] * 4, "question": ["Is", [1], "like", "Everyone", "?"]}, [0, 1, 2]),
        ({"answer_choices": [["Yes"]] * 4, "question": ["Why", "?"], "rationale_choices": [["Hm"]] * 4}, [0, 2]),
    ],
)
@pytest.mark.parametrize("phase", ["answer", "rationale"])
def test_relevant_to_all_texts_as_in_visualbert(
    tmp_path: Path, phase: str, changed: dict[str, Any], shown: list[int]
) -> None:
    """In both phases, in the order of the objects, after the whole image."""
    task = family("visualbert", only_relevant=True, relevance="all_texts", phase=phase)
    (record,) = read(tmp_path, task, line(**changed))
    assert task.shown_objects(record) == shown
    batch, _ = collate(task, [record], Store([[0, 0, 64, 64], *OBJECTS]))
    assert batch.regions is not None
    boxes = batch.regions.boxes[0][batch.regions.mask[0]] * 64
    assert boxes.tolist() == [[0, 0, 64, 64], *OBJECTS[shown].tolist()]


def test_classes_of_ones_own_data_are_listed_and_kept(tmp_path: Path) -> None:
    task = family("vlbert")
    records = read(tmp_path, task, line(objects=["star", "dog", "moon"]))
    task.setup(records)
    assert task.classes == ("dog", "moon", "star")
    assert VCR.from_state(task.state()).heads == task.heads
    assert task.heads["objects"].outputs == 4
    _, targets = collate(task, records, Store(OBJECTS))
    assert cast(Tensor, targets.object_classes)[0].tolist() == [3, 1, 2]


def test_a_model_of_the_words_alone_needs_no_region(tmp_path: Path) -> None:
    task = family("vlbert")
    records = read(tmp_path, task)
    source = TextOnly(TaskSource(task, records, TextLayout(TOKENIZER, InputSpec())))
    rng = np.random.default_rng(0)
    batch, targets = Collator(None, InputSpec(), TOKENIZER)([source.example(0, rng)], [rng])
    assert (batch.regions, batch.links, targets.object_classes) == (None, None, None)
    loss = task.loss({"score": torch.zeros(1, 4)}, targets)
    assert float(loss.value) == pytest.approx(np.log(2))


# Losses, predictions, scores


def test_losses() -> None:
    scores, choice = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1])
    targets = Targets(choice=choice)
    assert_close(VCR().loss({"score": scores}, targets).value, F.cross_entropy(scores, choice))
    one = F.binary_cross_entropy_with_logits(scores, F.one_hot(choice, 4).float(), reduction="none")
    sigmoid = family("vlbert", class_weight=0.0)
    assert_close(sigmoid.loss({"score": scores}, targets).value, one.mean())
    classes = torch.tensor([[1, IGNORE, 2]] * 12)
    logits = torch.randn(12, 4, 82, generator=torch.Generator().manual_seed(1))
    both = family("vlbert", class_weight=0.5).loss(
        {"score": scores, "objects.classes": logits}, Targets(choice=choice, object_classes=classes)
    )
    padded = F.pad(classes, (0, 1)).flatten()
    expected = F.cross_entropy(logits.flatten(0, 1), padded, ignore_index=IGNORE)
    assert_close(both.value, one.mean() + 0.5 * expected)
    assert int(both.parts["object_classes"][1]) == 12 * 3


def predicted(task: VCR, records: list[VcrRecord], scores: NDArray[Any]) -> list[Prediction]:
    return task.decode({"score": torch.tensor(scores, dtype=torch.float32)}, cast(Batch, None), records)


def test_report_details_and_baseline(tmp_path: Path) -> None:
    task = VCR()
    records = read(tmp_path, task, line(0), line(1, answer_label=2))
    predictions = predicted(task, records, np.array([[0, 3, 1, 0], [0, 3, 1, 0]]))
    assert [one.value for one in predictions] == ["1", "1"]
    report = task.report(predictions, records)
    assert (report.scores["accuracy"].value, report.variants) == (50.0, {"phase": "answer"})
    first, second = task.details(predictions, records)
    assert (first["truth"], first["score"], second["truth"], second["score"]) == ("1", 1.0, "2", 0.0)
    assert first["text"] == (
        "Does [person3] see [dog2] ? | 0: Yes . | 1: [person1] does . | 2: No . | 3: [person1, dog2] bark ."
    )
    (majority,) = task.baselines([records[1]], records).values()
    assert [one.value for one in majority] == ["2", "2"]


def test_joint_report_and_submission(tmp_path: Path) -> None:
    lines = [line(0), line(1, rationale_label=0), line(2, answer_label=0)]
    answers, reasons = VCR(), VCR(VcrConfig(phase="rationale"))
    records = read(tmp_path, answers, *lines)
    hidden = [replace(record, answer_label=None, rationale_label=None) for record in records]
    chosen = predicted(answers, records, np.array([[0, 9, 0, 0]] * 3))
    given = predicted(reasons, records, np.array([[0, 0, 0, 9]] * 3))
    scores = joint_report(chosen, given, records).scores
    assert {name: round(score.value, 2) for name, score in scores.items()} == {
        "answer": 66.67, "rationale": 66.67, "joint": 33.33,
    }  # fmt: skip

    # for every answer: rationale 3 given answer 1, else rationale 1
    every = predicted(reasons, hidden, np.array([[0, 9, 0, 0] + [0, 0, 0, 9] + [0, 9, 0, 0] * 2] * 3))
    assert every[0].value == "1 3 1 1"
    all_given = joint_report(chosen, every, records).scores
    assert round(all_given["rationale"].value, 2) == 33.33, "given the right answers 1, 1, 0"

    file = joint_submission(chosen, every)
    labels = {record.id: (cast(int, record.answer_label), cast(int, record.rationale_label)) for record in records}
    official = submission_scores(file, labels)
    assert official.joint.value == pytest.approx(all_given["joint"].value / 100)
    np.testing.assert_allclose(read_submission(file)["val-0"][1].sum(1), 1)
    with pytest.raises(DataError, match="'val-0' were chosen given the right answer only"):
        joint_submission(chosen, given)
    with pytest.raises(DataError, match="1 questions have predictions of one phase only, first 'val-2'"):
        joint_submission(chosen[:2], every)


def test_predictions_are_read_back_from_details(tmp_path: Path) -> None:
    task = VCR()
    records = read(tmp_path, task, line(0), line(1))
    predictions = predicted(task, records, np.array([[0, 3, 1, 0], [1, 0, 0, 0]]))
    file = tmp_path / "details_val.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in task.details(predictions, records)))
    assert read_predictions(file) == predictions
    file.write_text('{"id": "val-0"}\n')
    with pytest.raises(DataError, match="line 1 is not a row of details"):
        read_predictions(file)


def test_submissions_of_one_phase(tmp_path: Path) -> None:
    task, reasons = VCR(), VCR(VcrConfig(phase="rationale"))
    (record,) = read(tmp_path, task)
    hidden = replace(record, answer_label=None, rationale_label=None)
    for text, columns in (
        (task.submission(predicted(task, [record], np.array([[2, 0, 1, 0]]))), ["answer_0", "answer_3"]),
        (reasons.submission(predicted(reasons, [record], np.array([[2, 0, 1, 0]]))), ["rationale_0", "rationale_3"]),
        (
            reasons.submission(predicted(reasons, [hidden], np.arange(16)[None])),
            ["rationale_conditioned_on_a0_0", "rationale_conditioned_on_a3_3"],
        ),
    ):
        header, row = csv.reader(io.StringIO(text))
        assert (header[0], header[1], header[-1], row[0]) == ("annot_id", *columns, "val-0")
        assert len(row) == len(header)


# What is refused


def test_what_is_refused(tmp_path: Path) -> None:
    task, linking = VCR(), family("vlbert")
    with pytest.raises(DataError, match=r"no spring\.jsonl of VCR"):
        task.records(write(tmp_path, line()), "spring")
    with pytest.raises(DataError, match="names object 3, but 3 are listed"):
        read(tmp_path, task, line(question=["Is", [3], "?"]))
    with pytest.raises(DataError, match="answer_choices must be a list of 4 sentences; found 3"):
        read(tmp_path, task, line(answer_choices=[["a"], ["b"], ["c"]]))
    with pytest.raises(DataError, match="1 questions have the annot_id of an earlier one"):
        read(tmp_path, task, line(), line(0))
    (unlabelled,) = read(tmp_path, task, line(answer_label=None))
    with pytest.raises(DataError, match="'val-0' has no label of phase 'answer'"):
        task.setup([unlabelled])
    with pytest.raises(DataError, match="val-0 has no label, so nothing can be scored"):
        task.report(predicted(task, [unlabelled], np.zeros((1, 4))), [unlabelled])
    (record,) = linking.records(write(tmp_path, line(), boxes=[BOXES[0], BOXES[1], [70, 0, 90, 60, 1]]), "val")
    with pytest.raises(DataError, match=r"the box of object 2, \[70.0, 0.0, 90.0, 60.0\], has no part of the image"):
        linking.bind(record, Store(OBJECTS)["x"])
    (tmp_path / "vcr1images" / "m" / "0@0.json").unlink()
    assert task.records(tmp_path, "val"), "objects are not needed without links"
    with pytest.raises(DataError, match=r"question 'val-0' of VCR has no metadata .*0@0\.json"):
        linking.records(tmp_path, "val")


def test_questions_without_a_word_are_left_out_and_said(tmp_path: Path) -> None:
    task = VCR()
    records = read(tmp_path, task, line(0), line(1, question=[" "]))
    assert len(records) == 1
    (note,) = task.notes(records)
    assert note.endswith("left out 1 questions with a sentence without a word")
