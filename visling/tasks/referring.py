"""Referring expressions: which region does a phrase name? RefCOCO and RefCOCO+ (Yu et al. 2016), RefCOCOg (Mao et al.
2016).

Shapes    B rows, R regions, K = R or R + 1 candidates: the regions and, last, the whole image where a family has it.
Regions   Those of the store: a detector's, or the annotated boxes (`regions extract --boxes`). An object that no
          candidate overlaps is a miss; its sentences are counted.
Releases  VL-BERT asks of every candidate whether its overlap exceeds 0.5. ViLBERT learns the overlap itself, 0 where it
          is below 0.5. Both let the whole image compete. The softmax over the candidates is ours.
Targets   `object_classes`: 1 for what overlaps the object by more than one half, else 0; IGNORE on padding.
          `region_scores`: the overlaps. Both begin with the whole image, so that its place does not depend on padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from visling.data.annotations.referring import ReferringRecord, find_refer, read_refer, table_expressions
from visling.data.annotations.tables import Table
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.metrics.grounding import DESCRIPTIONS, THRESHOLD, Rule, fits, overlap, referring_hits
from visling.tasks.answers import count_rows, detail_row, mean_score, mean_scores
from visling.tasks.base import Report, Task, by_id
from visling.types import IGNORE, Batch, Example, Head, Loss, Prediction, RegionArray, Targets

WHOLE = "whole image"
"""Name of the candidate that is no region; the others are named by their number."""

SHOWN = 5
"""Candidates per row of details."""

_DECIMALS = 3
"""Of predicted pixels: unit coordinates in single precision hold no more, and 10.000000149 is 10."""

Corners = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class ReferringConfig:
    """Which data set is read, and how candidates are learned, chosen and scored."""

    dataset: str | None = None
    """Folder of the data set, "refcoco+", if several are in the same place."""
    by: str | None = None
    """Who split it: "unc", "umd" or "google"; None = the usual version of the data set."""
    text: Literal["tokens", "raw"] | None = None
    """The words of a sentence without punctuation (VL-BERT), or the sentence as it was written (ViLBERT). None: that of
    the model's family, else the words."""
    loss: Literal["positive", "overlap", "softmax"] | None = None
    """"positive": binary cross-entropy with overlap > 0.5, averaged over candidates (VL-BERT); "overlap": with the
    overlap itself, 0 below 0.5, summed over candidates and averaged over examples (ViLBERT); "softmax": minus log of
    the probability of the candidates with overlap > 0.5 (ours). None: that of the family, else the softmax."""
    whole_image: bool | None = None
    """Whether the whole image is a candidate, where the family has a state for it. None: as in the family's release,
    else not."""
    rule: Rule = "mattnet"
    """When a box is right: "mattnet", "inclusive" (VL-BERT's script) or "strict" (ViLBERT's)."""


class Referring(Task[ReferringRecord, ReferringConfig]):
    """Find the object that a phrase refers to."""

    name: ClassVar[str] = "referring"
    metric: ClassVar[str] = "accuracy"
    files: ClassVar[str] = "instances.json and refs of RefCOCO, RefCOCO+ or RefCOCOg (docs/tasks/referring.md)"
    settings: ClassVar[type[ReferringConfig]] = ReferringConfig

    @property
    def heads(self) -> Mapping[str, Head]:
        """One number per candidate."""
        return {"regions": Head(kind="regions", outputs=1)}

    def records(self, root: Path, split: str) -> list[ReferringRecord]:
        """Sentences of a split; see `read_refer` for its names.

        Raises:
            DataError: see `find_refer` and `read_refer`.
        """
        return read_refer(find_refer(root, self.config.dataset), split, by=self.config.by)

    def read_table(self, table: Table) -> list[ReferringRecord]:
        """Expressions of a file of one's own: `image`, `text`, and the corners `x1`, `y1`, `x2`, `y2` in pixels."""
        return table_expressions(table)

    def query(self, texts: Sequence[str], images: Sequence[str]) -> ReferringRecord:
        """A phrase about one image whose object is not known."""
        (text,), (image,) = texts, images
        return ReferringRecord(
            id=image, images=(image,), raw=text, sent=text.lower(), tokens=tuple(text.split()), box=None
        )

    def example(self, record: ReferringRecord, layout: TextLayout, rng: np.random.Generator) -> Example:
        """The phrase and its image; the labels come with the regions."""
        words = " ".join(record.tokens)
        text = record.raw if self.config.text == "raw" or not words else words
        return Example(id=record.id, rows=(layout.row(text),), images=record.images)

    def region_targets(self, record: ReferringRecord, regions: Sequence[RegionArray]) -> Mapping[str, Any]:
        """Overlaps of the whole image and of the regions with the object, by inclusive pixels, and which exceed 0.5.

        Those of a mirrored image are the same.
        """
        if record.box is None:
            return {}
        (shown,) = regions
        corners = np.concatenate([[self._whole_box(*shown.size)], shown.boxes])
        truth = np.array(record.corners)
        if self.config.loss == "positive":  # release, `clip_boxes`: both end at the last pixel
            last = np.array([*shown.size, *shown.size]) - 1
            corners, truth = corners.clip(0, last), truth.clip(0, last)
        overlaps = overlap(_to_xywh(corners), _to_xywh(truth), "inclusive")
        return {
            "object_classes": (overlaps > THRESHOLD).astype(np.int64),
            "region_scores": overlaps.astype(np.float32),
        }

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Loss:
        """Loss over (B, K) logits, in float32; part "referring_accuracy" is the share of rows whose best candidate
        overlaps the object by more than one half.

        Raises:
            ConfigError: a model that sees no regions.
        """
        scores = logits["regions"].float()
        labels, overlaps = _pad_targets(targets)
        whole = self._has_whole(scores, labels.shape[1] - 1)
        positive, overlaps = (_pick_candidates(each, whole=whole) for each in (labels, overlaps))
        scores = scores[:, : positive.shape[1]]
        real = positive != IGNORE
        kind = self.config.loss or "softmax"
        if kind == "positive":
            loss = Loss.mean(
                "referring",
                F.binary_cross_entropy_with_logits(scores, positive.clamp(min=0).float(), reduction="none"),
                real,
            )
        elif kind == "overlap":
            soft = overlaps * (overlaps >= THRESHOLD)
            values = F.binary_cross_entropy_with_logits(scores, soft, reduction="none")
            loss = Loss.mean("referring", values.masked_fill(~real, 0.0).sum(1))
        else:
            lowest = torch.finfo(scores.dtype).min
            all_of_them, right = (scores.masked_fill(~mask, lowest).logsumexp(1) for mask in (real, positive == 1))
            loss = Loss.mean("referring", all_of_them - right, (positive == 1).any(1))
        best = scores.detach().masked_fill(~real, -torch.inf).argmax(1, keepdim=True)
        hits = (positive.gather(1, best) == 1).sum()
        return loss.reporting({"referring_accuracy": (hits, count_rows(scores))})

    def count(self, targets: Targets, *, whole: bool) -> Mapping[str, Tensor]:
        labels, _ = _pad_targets(targets)
        positive = _pick_candidates(labels, whole=whole and bool(self.config.whole_image))
        kind = self.config.loss or "softmax"
        if kind == "overlap":
            return {"referring": count_rows(positive)}
        return {"referring": ((positive != IGNORE) if kind == "positive" else (positive == 1).any(1)).sum()}

    def decode(
        self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[ReferringRecord]
    ) -> list[Prediction]:
        """The box of the best candidate; of equal ones the whole image, then the first region.

        `top` and `boxes` have every candidate, best first. An image without candidates gives no box: None.
        Probabilities are a softmax, or with the releases' losses one sigmoid each.
        """
        if batch.regions is None:
            return [Prediction(id=record.id, value=None, confidence=0.0) for record in records]
        scores = logits["regions"].detach().double().cpu()
        regions = batch.regions
        mask, boxes, size = (each.cpu() for each in (regions.mask, regions.boxes, regions.size))
        whole = self._has_whole(scores, mask.shape[1])
        predictions = []
        for number, record in enumerate(records):
            count = int(mask[number].sum())
            wide, high = size[number].tolist()
            corners = boxes[number, :count].double() * torch.tensor([wide, high] * 2, dtype=torch.float64)
            values, names = scores[number, :count], [str(region) for region in range(count)]
            if whole:
                corners = torch.cat([torch.tensor([self._whole_box(wide, high)], dtype=torch.float64), corners])
                values, names = torch.cat([scores[number, -1:], values]), [WHOLE, *names]
            predictions.append(self._rank(record, values, names, corners))
        return predictions

    def logit(
        self, logits: Mapping[str, Tensor], batch: Batch, number: int, prediction: Prediction, place: int
    ) -> Tensor:
        """The logit of a candidate."""
        name = prediction.top[place][0]
        return logits["regions"][number, -1 if name == WHOLE else int(name)]

    def _rank(self, record: ReferringRecord, values: Tensor, names: Sequence[str], corners: Tensor) -> Prediction:
        """The candidates of one image, (K,) values and (K, 4) pixel corners, best first."""
        if not names:
            return Prediction(id=record.id, value=None, confidence=0.0)
        chances = values.softmax(0) if self.config.loss in (None, "softmax") else values.sigmoid()
        order = values.sort(descending=True, stable=True).indices.tolist()
        listed = corners.numpy().round(_DECIMALS).tolist()
        boxes = tuple(tuple(listed[place]) for place in order)
        top = tuple((names[place], float(chances[place])) for place in order)
        return Prediction(id=record.id, value=boxes[0], confidence=top[0][1], top=top, boxes=boxes)

    def _has_whole(self, scores: Tensor, regions: int) -> bool:
        """Whether the last of the logits is the whole image's, and a candidate."""
        return bool(self.config.whole_image) and scores.shape[1] > regions

    def _whole_box(self, width: float, height: float) -> Corners:
        """Corners of the whole image: they end at the last pixel, in ViLBERT's release one further."""
        past = 0 if self.config.loss == "overlap" else 1
        return (0.0, 0.0, width - past, height - past)

    def report(self, predictions: Sequence[Prediction], records: Sequence[ReferringRecord]) -> Report:
        """Share of sentences whose box is right, whole, per split and per data set.

        Where predictions list their candidates, `upper_bound` is the share of sentences that one of them fits, and
        `text_free` has the scores of choices among them that read no sentence: any, the first or the largest region.
        """
        pairs = by_id(predictions, records)
        truths = [_truth(record) for record in records]
        hits = referring_hits([_box_of(prediction) for prediction, _ in pairs], truths, self.config.rule)
        images = [record.images[0] for record in records]
        scores = {"accuracy": mean_score(hits, images)}
        by = {
            "split": mean_scores(hits, [record.split for record in records]),
            "dataset": mean_scores(hits, [record.dataset for record in records]),
        }
        if any(len(prediction.boxes) > 1 for prediction in predictions):
            choices = [self._judge(prediction, truth) for (prediction, _), truth in zip(pairs, truths, strict=True)]
            scores["upper_bound"] = mean_score([choice.pop("any") for choice in choices], images)
            flat = [(share, name) for choice in choices for name, share in choice.items()]
            by["text_free"] = mean_scores([share for share, _ in flat], [name for _, name in flat])
        return Report(scores=scores, by=by, variants={"overlap": DESCRIPTIONS[self.config.rule]})

    def _judge(self, prediction: Prediction, truth: Sequence[float]) -> dict[str, float]:
        """Of the candidates of a prediction: whether any is right, the share of them that is, and whether the first and
        the largest region are."""
        if not prediction.boxes:
            return dict.fromkeys(("any", "random candidate", "first region", "largest region"), 0.0)
        boxes = _to_xywh(np.array(prediction.boxes))
        right = fits(boxes, truth, self.config.rule)
        numbers = [-1 if name == WHOLE else int(name) for name, _ in prediction.top]
        regions = [place for place, number in enumerate(numbers) if number >= 0] or [0]
        first = min(regions, key=lambda place: numbers[place])
        largest = max(regions, key=lambda place: (boxes[place, 2] * boxes[place, 3], -numbers[place]))
        return {
            "any": float(right.any()),
            "random candidate": float(right.mean()),
            "first region": float(right[first]),
            "largest region": float(right[largest]),
        }

    def labelled(self, records: Sequence[ReferringRecord]) -> bool:
        """Whether the object of every sentence is known."""
        return all(record.box is not None for record in records)

    def submission(self, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
        """One entry per sentence, its box as x, y, w, h, None where there was no candidate. There is no official
        server; the refer API reads such lists."""
        return [
            {"sent_id": int(prediction.id), "box": None if (box := _box_of(prediction)) is None else list(box)}
            for prediction in predictions
        ]

    def baselines(
        self, train: Sequence[ReferringRecord], records: Sequence[ReferringRecord]
    ) -> Mapping[str, list[Prediction]]:
        """The box that training objects have on average, in shares of the image; and the whole image."""
        placed = [
            np.array(record.corners) / np.array([*record.size, *record.size])
            for record in train
            if record.corners is not None and record.size is not None
        ]
        boxes = {"whole image": np.array([0.0, 0.0, 1.0, 1.0])}
        if placed:
            boxes["mean box of the training objects"] = np.mean(placed, axis=0)
        return {name: [_place(record, box) for record in records] for name, box in boxes.items()}

    def details(self, predictions: Sequence[Prediction], records: Sequence[ReferringRecord]) -> list[dict[str, Any]]:
        """One row per sentence, with its best candidates; boxes are pixel corners."""
        rows = []
        for prediction, record in by_id(predictions, records):
            hit = None
            if record.box is not None:
                (hit,) = referring_hits([_box_of(prediction)], [record.box], self.config.rule)
            best = replace(prediction, top=prediction.top[:SHOWN])
            row = detail_row(best, record, text=record.raw, kind=record.split, truth=None, score=hit)
            row["truth"] = None if record.corners is None else list(record.corners)
            rows.append(row | {"boxes": [list(box) for box in prediction.boxes[:SHOWN]]})
        return rows


def _pad_targets(targets: Targets) -> tuple[Tensor, Tensor]:
    """`object_classes` and `region_scores`, (B, 1 + R) each, of the whole image and then of the regions.

    Raises:
        ConfigError: a model that sees no regions.
    """
    if targets.object_classes is None or targets.region_scores is None:
        raise ConfigError(
            "referring expressions are answered with a region: a model of the words alone has none to choose from. "
            "Train without text_only."
        )
    # A batch without any region has one, which is padding, and its targets are of the whole image alone.
    short = max(0, 2 - targets.object_classes.shape[1])
    return F.pad(targets.object_classes, (0, short), value=IGNORE), F.pad(targets.region_scores, (0, short))


def _pick_candidates(values: Tensor, *, whole: bool) -> Tensor:
    """Values of the candidates in the order of their logits, of those of the whole image and then of the regions."""
    return values.roll(-1, dims=1)[:, : values.shape[1] - (not whole)]


def _to_xywh(corners: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([corners[..., :2], corners[..., 2:] - corners[..., :2]], axis=-1)


def _box_of(prediction: Prediction) -> Corners | None:
    """Predicted box as x, y, w, h."""
    if prediction.value is None:
        return None
    x1, y1, x2, y2 = prediction.value
    return (x1, y1, round(x2 - x1, _DECIMALS), round(y2 - y1, _DECIMALS))


def _truth(record: ReferringRecord) -> Corners:
    if record.box is None:
        raise DataError(f"{record.id} has no box, so nothing can be scored. Write the submission file instead.")
    return record.box


def _place(record: ReferringRecord, box: NDArray[np.float64]) -> Prediction:
    """A box (4,) in shares of the image as the prediction; none where the size of the image is not known."""
    if record.size is None:
        return Prediction(id=record.id, value=None, confidence=0.0)
    x1, y1, x2, y2 = (box * np.array([*record.size, *record.size])).round(_DECIMALS).tolist()
    return Prediction(id=record.id, value=(x1, y1, x2, y2), confidence=1.0)


TASK = Referring
