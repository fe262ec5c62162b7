"""Referring expressions: targets, losses, choices, reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from visling import models
from visling.data.annotations.image_lists import without_images
from visling.data.annotations.referring import ReferringRecord
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.metrics.grounding import overlap
from visling.tasks.base import TaskSource, TextOnly
from visling.tasks.referring import SHOWN, WHOLE, Referring, ReferringConfig
from visling.types import IGNORE, Batch, InputSpec, Loss, Prediction, RegionArray, Targets

SPEC = InputSpec(feature_size=2, max_tokens=16, max_regions=4)
TOKENIZER = Tokenizer(SPEC.vocabulary)
KINDS = ("positive", "overlap", "softmax")


class Store(dict[str, RegionArray]):
    """A region store in memory."""

    feature_size = 2
    fingerprint = "x"


def image(*boxes: tuple[float, ...], size: tuple[int, int] = (100, 50)) -> RegionArray:
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    return RegionArray(features=np.zeros((len(corners), 2), np.float32), boxes=corners, size=size)


STORE = Store(
    {
        "1": image((10, 10, 29, 29), (11, 10, 30, 29), (60, 5, 90, 45)),
        "2": image((50, 10, 80, 40)),
        "3": image(),
        "4": image((0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9), (60, 0, 69, 9), (80, 0, 89, 9)),
    }
)


def record(number: int, picture: str, box: Any, text: str = "the left dog", **changes: Any) -> ReferringRecord:
    first = ReferringRecord(
        id=str(number), images=(picture,), raw=f"{text.capitalize()}.", sent=text, tokens=tuple(text.split()), box=box,
        size=STORE[picture].size, reference=number, split="testA", dataset="refcoco+",
    )  # fmt: skip
    return replace(first, **changes)


RECORDS = [
    record(1, "1", (10.0, 10.0, 19.0, 19.0)),
    record(2, "2", (0.0, 0.0, 20.0, 20.0), split="testB"),
    record(3, "3", (0.0, 0.0, 20.0, 20.0)),
]
"""The object of the second is overlapped by no region; the third image has none."""


def task(**settings: Any) -> Referring:
    return Referring(ReferringConfig(**settings))


def collate(
    which: Referring, records: list[ReferringRecord] = RECORDS, *, flip: float = 0.0, spec: InputSpec = SPEC
) -> tuple[Batch, Targets]:
    source = TaskSource(which, records, TextLayout(TOKENIZER, spec))
    rngs = [np.random.default_rng(number) for number in range(len(records))]
    collator = Collator(STORE, spec, TOKENIZER, flip=flip, swap_sides=flip > 0)
    return collator([source.example(number, rng) for number, rng in enumerate(rngs)], rngs)


def test_settings_follow_the_family() -> None:
    for family in models.names():
        settings = models.spec(family).tasks.get("referring", {})
        assert settings.keys() <= {"text", "loss", "whole_image"}
        assert task(**settings).heads["regions"].kind == "regions"
    released = {family: models.spec(family).tasks["referring"]["loss"] for family in ("vlbert", "vilbert")}
    assert released == {"vlbert": "positive", "vilbert": "overlap"}


def test_the_text_is_words_or_as_written() -> None:
    layout = TextLayout(TOKENIZER, SPEC)
    rng = np.random.default_rng(0)
    words, raw = (task(text=kind).example(RECORDS[0], layout, rng).rows[0] for kind in ("tokens", "raw"))
    assert TOKENIZER.tokens(words.ids) == ["[CLS]", "the", "left", "dog", "[SEP]"]
    assert TOKENIZER.tokens(raw.ids) == ["[CLS]", "the", "left", "dog", ".", "[SEP]"]
    assert task().example(RECORDS[0], layout, rng).rows[0].ids.tolist() == words.ids.tolist()
    bare = replace(RECORDS[0], tokens=(), raw="?!")
    assert TOKENIZER.tokens(task().example(bare, layout, rng).rows[0].ids) == ["[CLS]", "?", "!", "[SEP]"]


def test_targets_are_overlaps_with_the_whole_image_first() -> None:
    found = task().region_targets(RECORDS[0], [STORE["1"]])
    own = overlap([[0, 0, 99, 49], [10, 10, 19, 19], [11, 10, 19, 19], [60, 5, 30, 40]], RECORDS[0].box, "inclusive")  # type: ignore[arg-type]
    np.testing.assert_allclose(found["region_scores"], own, rtol=1e-6)
    assert found["object_classes"].tolist() == [0, 1, 1, 0]
    assert task().region_targets(replace(RECORDS[0], box=None), [STORE["1"]]) == {}
    # ViLBERT's whole image ends one pixel later; VL-BERT cuts all boxes at the last pixel.
    further = task(loss="overlap").region_targets(RECORDS[0], [STORE["1"]])["region_scores"]
    assert further[0] == pytest.approx(400 / (101 * 51))
    outside = replace(RECORDS[0], box=(80.0, 30.0, 40.0, 40.0))
    cut = task(loss="positive").region_targets(outside, [image((80, 30, 99, 49))])["region_scores"]
    assert cut[1] == 1
    assert task(loss="overlap").region_targets(outside, [image((80, 30, 99, 49))])["region_scores"][1] < 0.5


def test_targets_of_a_batch_say_what_is_padding() -> None:
    _, targets = collate(task())
    assert targets.object_classes is not None
    assert targets.object_classes.tolist() == [
        [0, 1, 1, 0], [0, 0, IGNORE, IGNORE], [0, IGNORE, IGNORE, IGNORE]
    ]  # fmt: skip


def test_a_mirrored_image_has_the_same_targets() -> None:
    """Words and boxes are exchanged, overlaps are not: those of the mirrored boxes with the mirrored object."""
    plain, mirrored = collate(task()), collate(task(), flip=1.0)
    for name in ("object_classes", "region_scores"):
        assert torch.equal(getattr(plain[1], name), getattr(mirrored[1], name)), name
    assert "right" in TOKENIZER.tokens(mirrored[0].text.ids[0].tolist())
    assert "left" not in TOKENIZER.tokens(mirrored[0].text.ids[0].tolist())
    regions, scores = mirrored[0].regions, mirrored[1].region_scores
    assert regions is not None
    assert scores is not None
    assert plain[0].regions is not None
    assert not torch.equal(regions.boxes, plain[0].regions.boxes)
    for row, one in enumerate(RECORDS):
        x1, y1, x2, y2 = one.corners  # type: ignore[misc]
        wide, high = one.size  # type: ignore[misc]
        turned = (wide - 1 - x2, y1, x2 - x1, y2 - y1)
        for region in range(int(regions.mask[row].sum())):
            a1, b1, a2, b2 = (regions.boxes[row, region] * torch.tensor([wide, high] * 2)).tolist()
            again = overlap((a1, b1, a2 - a1, b2 - b1), turned, "inclusive")
            assert float(again) == pytest.approx(float(scores[row, 1 + region]), abs=1e-5)


def plain_loss(kind: str, logits: list[list[float]], positive: list[list[int]], scores: list[list[float]]) -> float:
    """The three losses, one candidate after the other."""
    terms, rows = [], []
    for row, labels, overlaps in zip(logits, positive, scores, strict=True):
        values = torch.tensor(row)
        if kind == "softmax":
            chances = values.softmax(0)
            right = sum(float(chance) for chance, label in zip(chances, labels, strict=True) if label)
            rows += [-np.log(right)] if right else []
            continue
        wanted = torch.tensor(
            [float(label) for label in labels] if kind == "positive" else [o if o >= 0.5 else 0.0 for o in overlaps]
        )
        losses = F.binary_cross_entropy_with_logits(values, wanted, reduction="none").tolist()
        terms += losses
        rows.append(sum(losses))
    return float(np.mean(terms if kind == "positive" else rows))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_count_real_candidates_alone(kind: Any, whole: bool) -> None:
    which = task(loss=kind, whole_image=whole)
    records = RECORDS[:2] if not whole else RECORDS
    batch, targets = collate(which, records)
    assert batch.regions is not None
    counts = batch.regions.mask.sum(1).tolist()
    torch.manual_seed(0)
    logits = torch.randn(len(records), batch.regions.mask.shape[1] + 1)  # the whole image last
    found = which.loss({"regions": logits}, targets)
    labels = [which.region_targets(one, [STORE[one.images[0]]]) for one in records]
    first = 0 if whole else 1
    mine = [[logits[row, -1].item()] * whole + logits[row, :count].tolist() for row, count in enumerate(counts)]
    wanted = plain_loss(
        kind, mine, [label["object_classes"][first:].tolist() for label in labels],
        [label["region_scores"][first:].tolist() for label in labels],
    )  # fmt: skip
    assert float(found.value) == pytest.approx(wanted, rel=1e-5)
    noisy = logits.clone()
    for row, count in enumerate(counts):
        noisy[row, count:-1] = 50.0
    again = which.loss({"regions": noisy}, targets)
    assert_same_loss(found, again)
    if not whole:  # a family without a whole image has no logit for it
        assert_same_loss(found, which.loss({"regions": logits[:, :-1]}, targets))


def assert_same_loss(first: Loss, second: Loss) -> None:
    assert float(first.value) == pytest.approx(float(second.value), rel=1e-6)
    assert [float(value) for pair in first.parts.values() for value in pair] == pytest.approx(
        [float(value) for pair in second.parts.values() for value in pair]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_any_region(kind: Any) -> None:
    """One padded region and the whole image, if there is one."""
    batch, targets = collate(task(), [RECORDS[2]])
    assert batch.regions is not None
    assert not batch.regions.mask.any()
    for whole in (False, True):
        logits = torch.tensor([[3.0, -1.0]])[:, : 1 + whole].requires_grad_()
        loss = task(loss=kind, whole_image=whole).loss({"regions": logits}, targets)
        loss.value.backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        assert logits.grad[0, 0] == 0, "padding"
        assert torch.isfinite(loss.value)
        hits, count = loss.parts["referring_accuracy"]
        assert (float(hits), float(count)) == (0, 1), "a miss, and counted"


def test_training_accuracy_is_of_the_best_candidate() -> None:
    _, targets = collate(task())
    logits = torch.tensor([[0.0, 2, 1], [5, 9, 9], [9, 9, 9]])
    hits, count = task().loss({"regions": logits}, targets).parts["referring_accuracy"]
    assert (int(hits), int(count)) == (1, 3)


def test_words_alone_cannot_be_trained_on_and_predict_nothing() -> None:
    which = task()
    source = TextOnly(TaskSource(which, RECORDS, TextLayout(TOKENIZER, SPEC)))
    rngs = [np.random.default_rng(0)] * 3
    batch, targets = Collator(None, SPEC, TOKENIZER)([source.example(number, rngs[0]) for number in range(3)], rngs)
    logits = {"regions": torch.zeros(3, 0)}
    with pytest.raises(ConfigError, match="a model of the words alone has none to choose from"):
        which.loss(logits, targets)
    predictions = which.decode(logits, batch, RECORDS)
    assert [prediction.value for prediction in predictions] == [None] * 3
    assert which.report(predictions, RECORDS).scores["accuracy"].value == 0


def test_the_best_candidate_is_chosen_and_padding_never() -> None:
    which = task()
    batch, _ = collate(which)
    logits = {"regions": torch.tensor([[1.0, 3, 2, 99], [-4, 99, 99, 99], [99, 99, 99, 99]])}
    first, second, third = which.decode(logits, batch, RECORDS)
    assert (first.id, first.value) == ("1", (11, 10, 30, 29))
    assert [name for name, _ in first.top] == ["1", "2", "0"]
    np.testing.assert_allclose([chance for _, chance in first.top], torch.tensor([3.0, 2, 1]).softmax(0), rtol=1e-6)
    assert first.confidence == first.top[0][1]
    assert first.boxes == ((11, 10, 30, 29), (60, 5, 90, 45), (10, 10, 29, 29))
    assert (second.value, second.confidence) == ((50, 10, 80, 40), 1)
    assert (third.value, third.confidence, third.top, third.boxes) == (None, 0, (), ())


def test_the_whole_image_is_chosen_where_it_may_be() -> None:
    logits = {"regions": torch.tensor([[1.0, 3, 2, 3], [-4, 99, 99, -5], [99, 99, 99, 7]])}
    which = task(whole_image=True, loss="positive")
    batch, _ = collate(which)
    first, second, third = which.decode(logits, batch, RECORDS)
    assert (first.value, first.top[0][0], first.top[1][0]) == ((0, 0, 99, 49), WHOLE, "1"), "of equal ones it is first"
    assert first.confidence == pytest.approx(float(torch.tensor(3.0).sigmoid())), "one sigmoid each"
    assert (second.top[0][0], third.value) == ("0", (0, 0, 99, 49))
    without = {"regions": logits["regions"][:, :-1]}  # a family that has no state for it
    assert which.decode(without, batch, RECORDS)[2].value is None


def test_of_equal_regions_the_first_is_chosen() -> None:
    batch, _ = collate(task())
    found = task().decode({"regions": torch.zeros(3, 3)}, batch, RECORDS)[0]
    assert [name for name, _ in found.top] == ["0", "1", "2"]


def test_only_regions_that_the_model_reads_are_candidates() -> None:
    batch, targets = collate(task(), [record(4, "4", (80.0, 0.0, 9.0, 9.0))])
    assert targets.object_classes is not None
    assert targets.object_classes.tolist() == [[0] * 5], "the fifth region is cut off, and the object a miss"
    (found,) = task().decode({"regions": torch.zeros(1, 4)}, batch, [record(4, "4", None)])
    assert len(found.boxes) == 4


def predict() -> list[Prediction]:
    batch, _ = collate(task())
    return task().decode({"regions": torch.tensor([[1.0, 3, 2], [0, 0, 0], [0, 0, 0]])}, batch, RECORDS)


def test_report() -> None:
    predictions = predict()
    report = task().report(predictions, RECORDS)
    accuracy = report.scores["accuracy"]
    assert (accuracy.value, accuracy.count) == (pytest.approx(100 / 3), 3), "no object is left out"
    assert accuracy.low is not None
    assert {name: score.value for name, score in report.by["split"].items()} == {"testA": 50, "testB": 0}
    assert report.by["dataset"]["refcoco+"].count == 3
    assert report.scores["upper_bound"].value == pytest.approx(100 / 3)
    free = {name: round(score.value, 3) for name, score in report.by["text_free"].items()}
    assert free == {
        "random candidate": round(100 * 2 / 3 / 3, 3),
        "first region": round(100 / 3, 3),
        "largest region": 0,
    }
    assert "MAttNet" in report.variants["overlap"]
    assert "ViLBERT" in task(rule="strict").report(predictions, RECORDS).variants["overlap"]
    with pytest.raises(DataError, match="has no box"):
        task().report(predictions, [replace(RECORDS[0], box=None), *RECORDS[1:]])
    assert task().labelled(RECORDS)
    assert not task().labelled([replace(RECORDS[0], box=None)])


def test_the_rule_decides_at_one_half() -> None:
    one = record(1, "1", (0.0, 0.0, 9.0, 9.0))
    half = [Prediction(id="1", value=(0.0, 0.0, 9.0, 4.0), confidence=1.0)]
    scores = {rule: task(rule=rule).report(half, [one]).scores["accuracy"].value for rule in ("mattnet", "inclusive")}
    assert scores == {"mattnet": 0, "inclusive": 100}
    assert task(rule="strict").report(half, [one]).scores["accuracy"].value == 0


def test_boxes_at_exactly_one_half_survive_unit_coordinates() -> None:
    """10 / 100 is no number of single precision; predicted pixels are rounded to what was stored."""
    store = image((10, 10, 29, 19))
    STORE["exact"] = store
    one = record(1, "exact", (10.0, 10.0, 19.0, 19.0))
    batch, _ = collate(task(), [one])
    found = task(rule="inclusive").decode({"regions": torch.zeros(1, 1)}, batch, [one])
    assert found[0].value == (10, 10, 29, 19)
    assert task(rule="inclusive").report(found, [one]).scores["accuracy"].value == 100


def test_submission_and_details() -> None:
    predictions = predict()
    assert task().submission(predictions)[0] == {"sent_id": 1, "box": [11.0, 10.0, 19.0, 19.0]}
    assert task().submission(predictions)[2] == {"sent_id": 3, "box": None}
    first, _, third = task().details(predictions, RECORDS)
    assert (first["text"], first["type"], first["score"]) == ("The left dog.", "testA", 1.0)
    assert (first["truth"], list(first["prediction"])) == ([10, 10, 29, 29], [11, 10, 30, 29])
    assert len(first["boxes"]) == len(first["top"]) == 3 <= SHOWN
    assert (third["prediction"], third["score"], third["boxes"]) == (None, 0.0, [])
    json.dumps([first, third])
    bare = [replace(one, box=None) for one in RECORDS]
    assert task().details(predictions, bare)[0]["score"] is None


def test_baselines_read_no_text() -> None:
    train = [record(9, "1", (0.0, 0.0, 50.0, 25.0)), record(8, "2", (50.0, 25.0, 50.0, 25.0))]
    found = task().baselines(train, [*RECORDS, record(7, "1", None, size=None)])
    assert found.keys() == {"whole image", "mean box of the training objects"}
    assert found["mean box of the training objects"][0].value == (25, 12.5, 75, 37.5)
    assert found["whole image"][1].value == (0, 0, 100, 50)
    assert found["whole image"][3].value is None
    report = task().report(found["whole image"][:3], RECORDS)
    assert report.scores.keys() == {"accuracy"}, "one box is no choice among candidates"
    assert task().baselines([replace(train[0], box=None)], RECORDS).keys() == {"whole image"}


def test_a_query_has_no_object() -> None:
    asked = task().query(["The red Hat"], ["picture"])
    assert (asked.images, asked.tokens, asked.box) == (("picture",), ("The", "red", "Hat"), None)
    example = task().example(asked, TextLayout(TOKENIZER, SPEC), np.random.default_rng(0))
    assert TOKENIZER.tokens(example.rows[0].ids) == ["[CLS]", "the", "red", "hat", "[SEP]"]


def test_records_by_setting(golden: Path) -> None:
    root = golden / "vilbert_tasks" / "refer" / "data"
    with pytest.raises(DataError, match=r"task_settings\.dataset"):
        task().records(root, "train")
    records = task(dataset="refcoco+").records(root, "train")
    kept = without_images(records, root / "cache" / "coco_test_ids.npy")
    assert 0 < len(kept) < len(records)


def test_state_keeps_the_settings() -> None:
    settings = task(loss="positive", whole_image=True, dataset="refcoco+").state()
    assert Referring.from_state(json.loads(json.dumps(settings))).config == ReferringConfig(
        loss="positive", whole_image=True, dataset="refcoco+"
    )
