"""What an evaluation of a detector leaves: its scores as JSON, the precision-recall curve, and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from visling.analysis.charts import render_shares
from visling.analysis.drawing import draw_regions
from visling.analysis.page import replace_file
from visling.errors import RunError
from visling.metrics.detection import DetectionScores, PrecisionRecall
from visling.types import RegionArray
from visling.vision.images import read_image

_MOST_POINTS = 200
"""Most points of the curve in the files."""
_MARGIN, _CAPTION = 8, 18
"""Pixels between two pictures, and above them for a line of text."""


def write_detections(
    out: Path,
    about: Mapping[str, str],
    scores: DetectionScores,
    curve: PrecisionRecall,
    *,
    names: Sequence[str],
    attributes: Sequence[str],
    examples: Sequence[tuple[Path, RegionArray, RegionArray]],
) -> None:
    """Write `evaluation_detector.json`, `precision_recall.svg` and `pictures/NUMBER-IMAGE.png` into a folder.

    Args:
        about: what was scored on what.
        names: of the detector's classes.
        attributes: names of its attributes.
        examples: image file, its objects, and the regions found in it.
    Raises:
        RunError: a file cannot be written.
        DataError: an image cannot be read any more.
    """
    points = _thin_out(curve)
    content = {**about, **describe_scores(scores, curve, names), "curve": points}
    title = "Precision and recall of all classes at IoU 0.5"
    line = [(point["recall"], point["precision"]) for point in points]
    try:
        replace_file(out / "evaluation_detector.json", json.dumps(content, indent=2) + "\n")
        replace_file(out / "precision_recall.svg", render_shares(title, {"precision": line}, across="recall"))
        if examples:
            (out / "pictures").mkdir()
        for number, (image, truth, found) in enumerate(examples, 1):
            picture = draw_pair(Image.fromarray(read_image(image)), truth, found, names, attributes)
            picture.save(out / "pictures" / f"{number:03d}-{image.stem}.png")
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error}. Name another folder with --out.") from error


def describe_scores(scores: DetectionScores, curve: PrecisionRecall, names: Sequence[str]) -> dict[str, Any]:
    """Scores as JSON values, null where nothing could be scored; classes from the best to the worst."""
    best = curve.best
    ranked = sorted(scores.ap, key=lambda number: (-scores.ap[number], names[number]))
    return {
        "mean_ap": _round(scores.mean_ap),
        "recall": _round(scores.recall),
        "recall_any_class": _round(scores.recall_any_class),
        "attribute_accuracy": _round(scores.attribute_accuracy),
        "attribute_mean_ap": _round(scores.attribute_mean_ap),
        "objects": scores.objects,
        "detections": scores.detections,
        "best_threshold": None if best is None else _describe_point(curve, best),
        "classes": [
            {"name": names[number], "ap": _round(scores.ap[number]), "objects": scores.objects_by_class[number]}
            for number in ranked
        ],
    }


def draw_pair(
    image: Image.Image,
    truth: RegionArray,
    found: RegionArray,
    names: Sequence[str],
    attributes: Sequence[str],
) -> Image.Image:
    """One picture: the image with its objects, and next to it the image with what was found."""
    pair = [
        (f"annotated: {len(truth)}", draw_regions(image, truth, class_names=names, attribute_names=attributes)),
        (f"detected: {len(found)}", draw_regions(image, found, class_names=names, attribute_names=attributes)),
    ]
    width, height = pair[0][1].size
    sheet = Image.new("RGB", (2 * width + _MARGIN, height + _CAPTION), "white")
    canvas = ImageDraw.Draw(sheet)
    for place, (caption, picture) in enumerate(pair):
        left = place * (width + _MARGIN)
        canvas.text((left + 2, 2), caption, fill="black")
        sheet.paste(picture, (left, _CAPTION))
    return sheet


def _thin_out(curve: PrecisionRecall) -> list[dict[str, float]]:
    """Points of a curve at even distances over the detections, the last one included."""
    count = len(curve.confidence)
    at = np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).round().astype(int)) if count else ()
    return [_describe_point(curve, int(place)) for place in at]


def _describe_point(curve: PrecisionRecall, at: int) -> dict[str, float]:
    return {name: round(float(getattr(curve, name)[at]), 4) for name in ("confidence", "precision", "recall")}


def _round(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else round(score, 4)
