"""The task of caption retrieval: alternatives, loss, scores of a pair, ranks of all pairs, reports and files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from visling.data.annotations.retrieval import RetrievalRecord
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.tasks.base import load, read_records
from visling.tasks.retrieval import RankedPrediction, Retrieval, RetrievalConfig
from visling.types import InputSpec, Prediction, RegionArray, Targets

LAYOUT = TextLayout(Tokenizer(), InputSpec())
UNREAD: Any = None
"""A batch that is not looked at."""


def records(images: int = 4, each: int = 2) -> list[RetrievalRecord]:
    return [
        RetrievalRecord(id=f"{image}.{n}", images=(f"i{image}",), caption=f"caption {n} of picture {image}")
        for image in range(images)
        for n in range(each)
    ]


def ready(config: RetrievalConfig | None = None, **changes: Any) -> tuple[Retrieval, list[RetrievalRecord]]:
    task, own = Retrieval(config), records(**changes)
    task.setup(own)
    return task, own


def words(row: Any) -> str:
    return LAYOUT.tokenizer.decode(row.ids)


def test_four_alternatives_of_which_the_first_is_right() -> None:
    task, own = ready()
    record = own[2]
    seen: set[tuple[str, str]] = set()
    for seed in range(40):
        example = task.example(record, LAYOUT, np.random.default_rng(seed))
        right, wrong_caption, wrong_image, hard = example.rows
        assert words(right) == words(wrong_image) == record.caption
        assert example.images[0] == example.images[1] == example.images[3] == "i1" != example.images[2]
        assert not words(wrong_caption).endswith("picture 1")
        assert not words(hard).endswith("picture 1")
        assert example.labels == {"choice": 0}
        seen.add((words(wrong_caption), example.images[2]))
    assert len(seen) > 10
    again = [words(row) for row in task.example(record, LAYOUT, np.random.default_rng(3)).rows]
    assert again == [words(row) for row in task.example(record, LAYOUT, np.random.default_rng(3)).rows]


def test_the_hard_caption_is_of_an_image_that_looks_alike() -> None:
    task, own = ready()
    record = replace(own[0], alike=("i3", "i2"))
    hard = {words(task.example(record, LAYOUT, np.random.default_rng(seed)).rows[3])[-1] for seed in range(30)}
    assert hard == {"2", "3"}
    task, _ = ready(RetrievalConfig(negatives="random"))
    hard = {words(task.example(record, LAYOUT, np.random.default_rng(seed)).rows[3])[-1] for seed in range(40)}
    assert hard == {"1", "2", "3"}


class Store:
    """Image i3 looks like i1."""

    feature_size, fingerprint = 1, "test"
    values: dict[str, float] = {"i0": 0.0, "i1": 5.0, "i2": 9.0, "i3": 6.0}  # noqa: RUF012

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, image_id: str) -> RegionArray:
        features = np.full((2, 1), self.values[image_id], np.float16)
        return RegionArray(features=features, boxes=np.zeros((2, 4), np.float32), size=(1, 1))


def test_images_that_look_alike_are_found_where_no_file_names_them() -> None:
    task, own, store = Retrieval(), records(), Store()
    found = task.with_regions(own, store)
    assert [record.id for record in found] == [record.id for record in own]
    assert {record.images[0]: record.alike[0] for record in found} == {"i0": "i1", "i1": "i3", "i2": "i3", "i3": "i1"}
    assert all(record.images[0] not in record.alike for record in found)
    named = [replace(own[0], alike=("i2",)), *own[1:]]
    assert task.with_regions(named, store) is named, "those of a file are kept"
    assert Retrieval(RetrievalConfig(negatives="random")).with_regions(own, store) is own


def test_a_pair_that_is_asked_about_is_one_row() -> None:
    task, own = ready()
    asked = task.query(["a dog"], ["picture"])
    example = task.example(asked, LAYOUT, np.random.default_rng(0))
    assert ([words(row) for row in example.rows], example.images, example.labels) == (["a dog"], ("picture",), {})
    assert len(Retrieval().example(own[0], LAYOUT, np.random.default_rng(0)).rows) == 1, "nothing to draw from"
    scores = torch.tensor([[0.5], [-2.0]])
    answers = task.decode({"score": scores}, UNREAD, [asked, asked])
    assert [one.value for one in answers] == [0.5, -2.0]
    assert [one.confidence for one in answers] == pytest.approx(scores.sigmoid().flatten().tolist())
    classes = torch.tensor([[1.0, 3.0]])
    (answer,) = Retrieval(RetrievalConfig(head="alignment")).decode({"alignment": classes}, UNREAD, [asked])
    assert answer.value == 2.0
    assert answer.confidence == pytest.approx(classes.softmax(1)[0, 1].item())


@pytest.mark.parametrize("head", ["score", "alignment"])
def test_the_loss_is_a_choice_among_the_alternatives(head: Any) -> None:
    task = Retrieval(RetrievalConfig(head=head))
    (kind,) = [one.kind for one in task.heads.values()]
    torch.manual_seed(0)
    logits = torch.randn(3, 4) if kind == "score" else torch.randn(12, 2)
    scores = logits if kind == "score" else (logits[:, 1] - logits[:, 0]).view(3, 4)
    loss = task.loss({head: logits}, Targets(choice=torch.zeros(3, dtype=torch.int64)))
    assert loss.value == pytest.approx(F.cross_entropy(scores, torch.zeros(3, dtype=torch.int64)).item())
    assert loss.parts["retrieval_accuracy"][0] == (scores.argmax(1) == 0).sum()


SCORES = np.array(
    [
        # captions of picture 0, of 1, of 2
        [9, 1, 8, 0, 3, 2],
        [5, 7, 6, 4, 3, 1],
        [4, 3, 2, 1, 0, 8],
    ],
    np.float32,
)


def test_both_directions_are_ranked() -> None:
    task, own = Retrieval(), records(images=3)
    predictions = task.predictions(SCORES, own)
    ranked = [one for one in predictions if isinstance(one, RankedPrediction)]
    assert [(one.id, one.value, one.rank) for one in ranked if one.of == "image"] == [
        ("0.0", "i0", 0),
        ("0.1", "i1", 2),
        ("1.0", "i0", 1),
        ("1.1", "i1", 0),
        ("2.0", "i0", 2),
        ("2.1", "i2", 0),
    ]
    assert [(one.id, one.value, one.rank) for one in ranked if one.of == "text"] == [
        ("i0", "0.0", 0),
        ("i1", "0.1", 1),
        ("i2", "2.1", 0),
    ]
    assert [name for name, _ in ranked[1].top] == ["i1", "i2", "i0"]
    assert sum(share for _, share in ranked[1].top) == pytest.approx(1.0), "shares among all candidates"

    report = task.report(predictions, own)
    values = {name: score.value for name, score in report.scores.items()}
    assert values["image_r1"] == pytest.approx(50)
    assert values["text_r1"] == pytest.approx(200 / 3)
    assert values["image_r5"] == values["text_r10"] == 100
    assert values["image_median_rank"] == values["text_median_rank"] == 1
    assert values["image_mean_rank"] == pytest.approx(1 + 5 / 6)
    assert values["text_mean_rank"] == pytest.approx(4 / 3)
    assert values["rsum"] == pytest.approx(50 + 200 / 3 + 4 * 100)
    assert report.scores["image_r1"].count == 6
    assert report.scores["text_r1"].count == 3
    low, high = report.scores["text_r1"].low, report.scores["text_r1"].high
    assert low is not None
    assert high is not None
    assert low < values["text_r1"] < high
    assert report.scores["image_r1"].low == 50, "captions of an image are drawn together, and one of two is right"
    assert report.variants == {"candidates": "3 images, 6 captions", "score": "score", "ties": "stable"}
    assert not any("of_" in name for name in report.scores), "no folds"


def test_details_and_the_result_file() -> None:
    task, own = Retrieval(), records(images=3)
    predictions = task.predictions(SCORES, own)
    rows = task.details(predictions, own)
    assert [row["rank"] for row in rows] == [1, 3, 2, 1, 3, 1]
    assert [row["score"] for row in rows] == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert rows[1] | {"top": []} == {
        "id": "0.1", "image": "i0", "text": "caption 1 of picture 0", "type": "caption", "truth": "i0",
        "prediction": "i1", "confidence": rows[1]["confidence"], "top": [], "score": 0.0, "rank": 3,
    }  # fmt: skip
    submitted = json.loads(json.dumps(task.submission(predictions)))
    assert submitted["image"]["0.1"] == ["i1", "i2", "i0"]
    assert submitted["text"]["i2"] == ["2.1", "0.0", "0.1", "1.0", "1.1", "2.0"]


def test_ties_and_pairs_that_were_not_scored() -> None:
    own, level = records(images=3), np.zeros((3, 6), np.float32)
    found = {
        ties: Retrieval(RetrievalConfig(ties=ties)).predictions(level, own) for ties in ("stable", "distractors_first")
    }
    ranks = {
        ties: [one.rank for one in predictions if isinstance(one, RankedPrediction)]
        for ties, predictions in found.items()
    }
    assert ranks["stable"] == [0, 0, 1, 1, 2, 2, 0, 2, 4]
    assert ranks["distractors_first"] == [2] * 6 + [4] * 3
    part = SCORES.copy()
    part[1:, 0] = -np.inf
    predictions = Retrieval().predictions(part, own)
    assert predictions[0].confidence == 1.0
    assert predictions[0].top[1][1] == 0.0


def test_recalls_in_folds() -> None:
    """Two folds of two images: distractors of the other fold do not count."""
    task, own = Retrieval(RetrievalConfig(fold=2)), records(images=4, each=1)
    scores = np.array([[1, 0, 9, 9], [0, 1, 9, 9], [9, 9, 0, 1], [9, 9, 1, 0]], np.float32)
    report = task.report(task.predictions(scores, own), own)
    values = {name: score.value for name, score in report.scores.items()}
    assert values["image_r1"] == values["text_r1"] == 0
    assert values["image_r1_of_2"] == values["text_r1_of_2"] == 50, "100 in the first fold, 0 in the second"
    assert values["image_r5_of_2"] == 100
    uneven = Retrieval(RetrievalConfig(fold=3))
    assert not any("of_" in name for name in uneven.report(uneven.predictions(scores, own), own).scores)
    with pytest.raises(ConfigError, match="fold is a number of images; found 0"):
        RetrievalConfig(fold=0)


def test_baselines_are_chance() -> None:
    task, own = Retrieval(), records(images=200, each=5)
    found = task.baselines(own, own)
    assert found.keys() == {"random order", "same order for every query"}
    for predictions in found.values():
        values = {name: score.value for name, score in task.report(predictions, own).scores.items()}
        assert values["image_r10"] == pytest.approx(5, abs=2.5)
        assert values["text_r1"] == pytest.approx(0.5, abs=1.5)


def test_predictions_of_other_queries() -> None:
    task, own = Retrieval(), records(images=3)
    predictions = task.predictions(SCORES, own)
    with pytest.raises(DataError, match="2 images were given captions, the split has 3"):
        task.report(predictions[:-1], own)
    with pytest.raises(DataError, match="1 missing"):
        task.report(predictions[1:], own)
    with pytest.raises(DataError, match="Rank all pairs of one split"):
        task.report([*predictions, Prediction(id="9", value="i0", confidence=1.0)], own)


def test_a_single_image_has_no_wrong_alternative() -> None:
    with pytest.raises(DataError, match="2 training captions are of 1 image"):
        Retrieval().setup(records(images=1))


def test_files_notes_and_joined_splits(tmp_path: Path) -> None:
    images = [
        {"filename": f"{n}.jpg", "split": ("train", "val")[n % 2], "sentences": [{"raw": f"dog {n}", "sentid": n}]}
        for n in range(4)
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    task = load("retrieval").configured({"ties": "distractors_first"})
    own = read_records(task, tmp_path, "train+val")
    assert [record.caption for record in own] == ["dog 0", "dog 2", "dog 1", "dog 3"]
    assert task.labelled(own)
    assert task.notes(own) == [
        "train: 2 images have fewer than 5 captions",
        "val: 2 images have fewer than 5 captions",
    ]
    assert load("retrieval").from_state(task.state()).config == task.config
