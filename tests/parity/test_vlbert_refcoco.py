"""RefCOCO+ as VL-BERT's release reads, labels and scores it (`golden/vlbert_tasks/refcoco`; the README beside it
describes every file).

Compared for every recorded case: sentences and their order, word pieces (mirrored ones too), candidates in the frame of
the resized picture, the pixels themselves, labels, overlaps, chosen boxes and both accuracies. What is kept elsewhere
is converted: the release's first box is the whole image, which stands last in our logits and is added by the model; an
image without detections, at which the release stops, has its other candidates alone. Overlaps are ours in the pixels of
the original image and recorded in those of the resized one, where the added pixel weighs otherwise: they are compared
on the recorded boxes (labels on ours). By design, the box of the whole image stays where it is in a mirrored picture;
the release mirrors it, which moves it by at most one pixel of the original image. Where a picture is made smaller, our
model's box of the whole image ends up to one pixel behind the last one, the release's at it. Padded columns, which
compete in the release, never win here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from visling.boxes import to_pixels, whole_image
from visling.data.annotations.boxes import read_boxes
from visling.data.annotations.referring import ReferringRecord, find_refer, read_refer
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.metrics.grounding import fits, overlap
from visling.models import spec
from visling.tasks.base import TaskSource, read_records
from visling.tasks.referring import Referring, ReferringConfig
from visling.types import Batch, InputSpec, RegionArray, Targets
from visling.vision.end_to_end import ExtractorConfig
from visling.vision.pictures import PictureFiles

TASK = Referring(ReferringConfig(**spec("vlbert").tasks["referring"], rule="inclusive"))


class Boxes(dict[str, RegionArray]):
    """A region store of boxes alone."""

    feature_size = 1
    fingerprint = "boxes"


@dataclass(frozen=True)
class Recording:
    folder: Path

    def load(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def records(self, split: str) -> list[ReferringRecord]:
        return list(read_records(TASK, self.folder / "data" / "refcoco+", split))

    def store(self, case: Mapping[str, Any]) -> Boxes:
        """Candidates: proposals, then annotated boxes, as `regions extract --boxes --keep-detected` has them."""
        data = self.folder / "data"
        annotated = read_boxes(data / "annotations" / "instances_train2014.json")
        proposed = read_boxes(next((data / "refcoco+" / "proposal").glob("*_dets.json")))
        store = Boxes()
        for name, own in annotated.boxes.items():
            parts = []
            if "proposal" in case["boxes"] and case.get("proposal_source") == "vg":
                (folder,) = (data / "vgbua_res101_precomputed").iterdir()
                stored = json.loads((folder / f"{int(name.rpartition('_')[2])}.json").read_text())["boxes"]
                parts.append(np.frombuffer(base64.b64decode(stored), np.float32).reshape(-1, 4))
            elif "proposal" in case["boxes"] and (found := proposed.find(name)) is not None:
                parts.append(found[0])
            if "gt" in case["boxes"]:
                parts.append(own)
            boxes = np.concatenate([np.zeros((0, 4), np.float32), *parts])
            size = annotated.sizes[name]
            store[str(int(name.rpartition("_")[2]))] = RegionArray(
                features=np.zeros((len(boxes), 1), np.float32), boxes=boxes, size=size
            )
        return store

    def collate(
        self, records: list[ReferringRecord], case: Mapping[str, Any], *, mirrored: bool = False
    ) -> tuple[Batch, Targets, Tokenizer]:
        """A batch of pictures, as the end-to-end model reads them."""
        inputs = InputSpec(vocabulary=str(self.folder / "vocab.txt"), feature_size=1, max_tokens=512, max_regions=1000)
        tokenizer = Tokenizer(inputs.vocabulary)
        shorter, longer = case["scales"]
        files = {
            str(int(file.stem.rpartition("_")[2])): file for file in (self.folder / "data" / "train2014").iterdir()
        }
        pictures = PictureFiles(files, ExtractorConfig(shorter_side=shorter, longer_side=longer))
        collator = Collator(
            self.store(case), inputs, tokenizer, pictures=pictures, flip=float(mirrored), swap_sides=True
        )
        source = TaskSource(TASK, records, TextLayout(tokenizer, inputs))
        rngs = [np.random.default_rng(0) for _ in records]
        batch, targets = collator([source.example(number, rngs[number]) for number in range(len(records))], rngs)
        return batch, targets, tokenizer


@pytest.fixture(scope="module")
def recording(request: pytest.FixtureRequest) -> Recording:
    folder = Path(request.config.getoption("--golden")) / "vlbert_tasks" / "refcoco"
    return Recording(folder)


def frame_boxes(batch: Batch, row: int) -> NDArray[Any]:
    """The whole image, cut to the last pixel, and the real regions of a row, in pixels of its picture."""
    assert batch.regions is not None
    assert batch.pixels is not None
    size = batch.pixels.size[row].flip(0).float()[None]
    unit = torch.cat([whole_image(batch.regions.size[row : row + 1])[0], batch.regions.boxes[row][real(batch, row)]])
    boxes = to_pixels(unit[None], size)[0]
    boxes[0] = torch.minimum(boxes[0], torch.cat([size, size], 1)[0] - 1)
    return boxes.numpy()


def real(batch: Batch, row: int) -> Any:
    assert batch.regions is not None
    return batch.regions.mask[row]


def test_the_data_set_is_found_in_its_parent(recording: Recording) -> None:
    folder = find_refer(recording.folder / "data")
    assert folder == recording.folder / "data" / "refcoco+"
    assert len(read_refer(folder, "train")) == len(recording.records("train"))


def test_every_row_of_every_case(recording: Recording) -> None:
    cases = recording.load("rows.json")["cases"]
    for case in cases:
        records = recording.records(case["split"])
        assert [int(record.id) for record in records] == [row["sent_id"] for row in case["rows"]], case["name"]
        batch, targets, tokenizer = recording.collate(records, case, mirrored=case["flip_forced"])
        for number, (record, row) in enumerate(zip(records, case["rows"], strict=True)):
            where = f"{case['name']}, sentence {record.id}"
            assert (record.reference, int(record.images[0])) == (row["ref_id"], row["image_id"]), where
            if "error" in row:
                left = recording.store(case | {"boxes": case["boxes"].replace("proposal", "")})[record.images[0]]
                assert int(real(batch, number).sum()) == len(left), f"{where}: {row['error']}"
                continue
            pieces = batch.text.ids[number][batch.text.mask[number]][1:-1].tolist()
            assert (pieces, tokenizer.tokens(pieces)) == (row["ids"], row["pieces"]), where
            _check_boxes(frame_boxes(batch, number), row, case, where)
            _check_pixels(batch, number, row, where)
            if "label" in row:
                _check_labels(record, targets, number, row, case, where)


def _check_boxes(boxes: NDArray[Any], row: Mapping[str, Any], case: Mapping[str, Any], where: str) -> None:
    if not case["image_box"]:
        boxes = boxes[1:]
    elif case["flip_forced"]:
        boxes, (whole, *rest) = boxes[1:], row["boxes"]
        width, _, ratio, _ = row["im_info"]
        assert whole[0] == pytest.approx(max(0, width - 1 - (round(width / ratio) - 1) * ratio), abs=2e-3)
        row = {"boxes": rest}
    np.testing.assert_allclose(boxes, row["boxes"], atol=2e-3, err_msg=where)


def _check_pixels(batch: Batch, number: int, row: Mapping[str, Any], where: str) -> None:
    assert batch.pixels is not None
    _, height, width = row["image_shape"]
    assert batch.pixels.size[number].tolist() == [height, width], where
    places = ((0, 0), (height // 2, width // 3), (height - 1, width - 1))
    for (y, x), pixel in zip(places, row["pixels"], strict=True):
        np.testing.assert_allclose(batch.pixels.images[number, :, y, x].numpy(), pixel, atol=2, err_msg=where)


def _check_labels(
    record: ReferringRecord,
    targets: Targets,
    number: int,
    row: Mapping[str, Any],
    case: Mapping[str, Any],
    where: str,
) -> None:
    assert targets.object_classes is not None
    first = 0 if case["image_box"] else 1
    count = len(row["boxes"])
    assert targets.object_classes[number, first : first + count].tolist() == row["label"], where
    recorded = np.array(row["boxes"])
    # The release's frame: the same task on the resized picture. Its whole image ends otherwise than one resized later.
    x1, y1, x2, y2 = row["gt_box"]
    width, height = row["im_info"][:2]
    scaled = RegionArray(
        features=np.zeros((count, 1)), boxes=recorded.astype(np.float32), size=(int(width), int(height))
    )
    found = TASK.region_targets(replace(record, box=(x1, y1, x2 - x1, y2 - y1)), [scaled])
    np.testing.assert_allclose(found["region_scores"][1:], row["iou"], atol=1e-4, err_msg=where)
    assert found["object_classes"][1:].tolist() == row["label"], where


def test_padded_batches(recording: Recording) -> None:
    """Boxes, padded with -2 in the recording, and labels, padded with -1."""
    cases = {
        f"{case['mode']}_{case['split']}_{case['boxes']}": case
        for case in recording.load("evaluation.json").values()
        if isinstance(case, dict) and "rows" in case and "boxes" in case
    }
    stored = np.load(recording.folder / "batches.npz")
    assert cases.keys() == {name.rpartition(".")[0] for name in stored}
    for name, case in cases.items():
        out = case["sentences_without_detections_left_out"]
        rows = len(stored[f"{name}.boxes"])
        records = [record for record in recording.records(case["split"]) if int(record.id) not in out][:rows]
        batch, targets, _ = recording.collate(records, case)
        for row in range(rows):
            count = 1 + int(real(batch, row).sum())
            assert (stored[f"{name}.boxes"][row, count:] == -2).all()
            np.testing.assert_allclose(frame_boxes(batch, row), stored[f"{name}.boxes"][row, :count], atol=2e-3)
            words = batch.text.ids[row][batch.text.mask[row]][1:-1].tolist()
            padded = stored[f"{name}.expression"][row].tolist()
            assert padded == words + [0] * (len(padded) - len(words))
            if f"{name}.label" in stored:
                assert targets.object_classes is not None
                assert targets.object_classes[row, :count].tolist() == stored[f"{name}.label"][row, :count].tolist()


def _logits(batch: Batch, scores: list[list[float]], *, padding: float) -> dict[str, torch.Tensor]:
    """Scores recorded with the whole image first, as our heads return them."""
    assert batch.regions is not None
    full = torch.full((len(scores), batch.regions.mask.shape[1] + 1), padding, dtype=torch.float64)
    for row, values in enumerate(scores):
        full[row, : len(values) - 1] = torch.tensor(values[1:])
        full[row, -1] = values[0]
    return {"regions": full}


def test_chosen_boxes_and_accuracies(recording: Recording) -> None:
    for name, case in recording.load("evaluation.json").items():
        if name in ("padded_column_wins", "iou_pairs"):
            continue
        out = case["sentences_without_detections_left_out"]
        records = [record for record in recording.records(case["split"]) if int(record.id) not in out]
        assert [int(record.id) for record in records] == [row["sent_id"] for row in case["rows"]]
        batch, targets, _ = recording.collate(records, case)
        logits = _logits(batch, [row["scores"] for row in case["rows"]], padding=1e4)
        predictions = TASK.decode(logits, batch, records)
        for prediction, record, row in zip(predictions, records, case["rows"], strict=True):
            (width, height), (shorter, longer) = record.size, case["scales"]  # type: ignore[misc]
            scale = min(shorter / min(width, height), longer / max(width, height))
            # The release's box ends at the last pixel of the resized picture.
            np.testing.assert_allclose(prediction.value, row["predicted_box"], atol=1 / scale + 1e-2, err_msg=name)
            x1, y1, x2, y2 = row["predicted_box"]
            recorded = overlap((x1, y1, x2 - x1, y2 - y1), record.box, "inclusive")  # type: ignore[arg-type]
            assert float(recorded) == pytest.approx(row["iou"], abs=1e-4)
        accuracy = TASK.report(predictions, records).scores["accuracy"].value / 100
        assert accuracy == pytest.approx(case["test_script_accuracy"]), name
        if "validation_metric_RefAcc" in case:
            padded = _logits(batch, [row["scores"] for row in case["rows"]], padding=1e4)
            hits, count = TASK.loss(padded, targets).parts["referring_accuracy"]
            assert float(hits / count) == pytest.approx(case["validation_metric_RefAcc"]), name


def test_padding_never_wins(recording: Recording) -> None:
    """In the release a padded column does, and its box is negative."""
    case = recording.load("evaluation.json")["padded_column_wins"]
    rows = {row["sent_id"]: row for row in case["rows"]}
    records = [record for record in recording.records("train+val+test") if int(record.id) in rows]
    case = case | {"boxes": "gt", "scales": [60, 100]}
    batch, _, _ = recording.collate(records, case)
    counts = [rows[int(record.id)]["regions"] for record in records]
    assert any(rows[int(record.id)]["predicted_box"][0] < 0 for record in records)
    logits = _logits(batch, [[0.0] * count for count in counts], padding=1.0)
    for prediction, record in zip(TASK.decode(logits, batch, records), records, strict=True):
        width, height = record.size  # type: ignore[misc]
        assert prediction.value == (0, 0, width - 1, height - 1), "of equal ones the first: the whole image"


def test_overlaps_of_single_pairs(recording: Recording) -> None:
    for pair in recording.load("evaluation.json")["iou_pairs"]:
        first, second = ((x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in (pair["a"], pair["b"]))
        assert float(overlap(first, second, "inclusive")) == pytest.approx(pair["test_iou"], abs=1e-5)
        assert bool(fits(first, second, "inclusive")) == pair["hit"]
        assert bool(fits(first, second, "strict")) == bool(pair["label"]), "a label wants more than one half"
