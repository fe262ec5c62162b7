"""What a model looked at when it answered one question: the document that pages, servers and scripts read.

Letters  T tokens, R regions, H heads, M and N positions that attend and that are attended to.

`Inspection.to_json` returns plain JSON, format "visling-inspection-1":

    format       "visling-inspection-1"
    model        family, task, name (the last two parts of the run's path), checkpoint (first 12 hexadecimal digits of
                 the SHA-256 of its weights), command (that writes the page)
    question     the text, as it was asked
    choices      the answers that were given to choose from
    notice       what makes the answer doubtful, or says that there is no picture side; "" if nothing does
    images       [{width, height: pixels in which boxes are given, src: data URI, perhaps of a smaller picture}]; empty
                 for a run that reads words alone
    scale        weight that the byte 255 stands for in every map of the document
    rows         one for each row of the model's input: one per image of a pair, one per choice, else one
      label        "image 1", the text of the choice, or ""
      image        numbers of the images that the row shows
      words        [{text, tokens: positions of its pieces, pieces, special}]; the positions 0..T-1 in their order
      regions      [{name, box: [x1, y1, x2, y2] in pixels or null, image, confidence or null, special}]
      attention    {layers: [{name, directions: {DIRECTION: {heads, from, to, data}}}]} in order of computation; data is
                   the base64 of heads x from x to bytes, in C order: weight = byte / 255 * scale. A layer has the
                   directions that the model computes in it: text_to_text, text_to_regions, regions_to_text,
                   regions_to_regions
      statistics   {QUANTITY: {DIRECTION: {LAYER: [one per head, or null]}}} (analysis/head_quantities.py)
    answers_are  "alternatives", or "phrases": then each answer is the best region of a phrase of its own
    answers      [{text, probability, box: [..] or null, region: its number in the rows or null, truth: true, false or
                 null where it is not known}]
    truth        {text: [right answers], boxes: [right boxes of the first image]}, or null
    relevance    {METHOD: [per answer: [per row: {words_tokens: [T numbers], regions: [R numbers]}]]}, METHOD one of
                 analysis.relevance.METHODS; an answer without an output behind it has none
    against      [per answer: [per row: {words_tokens, regions}]]: evidence against the answer, apart
    removal      what becomes of the first answer as more is taken away, or null: {fractions, curves: [{part: "text" or
                 "regions", method, order: "most_first", "least_first" or "random", values: probabilities, area}]}
    leave_one_out  what the answers become without one word or region, or null: {values: [per answer: its probability
                 when nothing is missing], rows: [{words: [per word: {values: [per answer: its probability, 0 where it
                 is no longer listed], answer: the one that is then given} or null where it always stays], regions: [the
                 same]}]}

Special tokens and what stands behind tokens and regions (a task token, the whole image, [END]) are part of `words` and
`regions`, marked special, so that positions here are those of the maps.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visling.analysis.encoded_rows import split_rows
from visling.analysis.encoding import EncodedRow, Word
from visling.analysis.head_quantities import list_quantities
from visling.analysis.head_statistics import DIRECTIONS, maps_by_direction
from visling.analysis.inspection_page import render_still, write_page
from visling.analysis.question import Prepared, Question
from visling.analysis.relevance import ByPlace, Explanation, explain
from visling.analysis.removal import Changed, Curve, LeftOut, leave_one_out, probability, removal_curves
from visling.data.text import Tokenizer
from visling.errors import DataError
from visling.models.task_model import TaskModel
from visling.pretrained.folder import ModelFolder
from visling.tasks.base import Task
from visling.types import Prediction

FORMAT = "visling-inspection-1"
NO_PICTURE = "this run reads the words alone: it has no picture side"
_TRUNCATED = "the text was cut to what the model reads"
_LONGEST_SIDE, _LOSSLESS = 1024, 256 * 256
"""Pixels: pictures are embedded no larger than the first; up to the second in all, without loss."""
_DIGITS = 5
"""Significant digits of numbers in the document."""
_SAME_CORNER = 0.51
"""Pixels by which the corners of a candidate may differ from those of its region."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Which model was asked."""

    family: str
    task: str
    name: str
    """The last two parts of the run's path."""
    checkpoint: str
    """First 12 hexadecimal digits of the SHA-256 of its weights."""
    command: str = ""
    """That writes the page."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An answer that the model weighed, or the best region of a phrase."""

    text: str
    probability: float
    box: tuple[float, float, float, float] | None = None
    """In pixels of the first image, of tasks that point at regions."""
    region: int | None = None
    """Its number among the regions of the first row."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection:
    """One question, what the model answered, and what it looked at."""

    model: ModelFacts
    question: str
    choices: tuple[str, ...]
    notice: str
    """What makes the answer doubtful; empty if nothing does."""
    images: tuple[Image.Image, ...]
    """As the detector saw them; none for a run that reads words alone."""
    rows: tuple[EncodedRow, ...]
    """With maps captured."""
    layers: tuple[str, ...]
    """Names of all layers, in order of computation."""
    answers: tuple[Candidate, ...]
    phrases: bool
    """Whether each of `answers` is the best region of a phrase of its own."""
    explanation: Explanation
    """What each answer rests on."""
    truth: tuple[str, ...] = ()
    """Right answers, where they are known."""
    truth_boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Right boxes in pixels of the first image, where they are known."""
    curves: tuple[Curve, ...] = ()
    """What becomes of the first answer as more is taken away; empty unless asked for."""
    grounding: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Layer -> share of a data set's phrases that each head grounds (`head_quantities.read_grounding`), if measured."""
    left_out: LeftOut | None = None
    """What becomes of it without one word or region; None unless asked for."""

    def __repr__(self) -> str:
        """One line."""
        shares = ", ".join(f"{answer.text} {answer.probability:.0%}" for answer in self.answers[:3])
        return f'Inspection({shares}; "{self.question}", {self.model.name})'

    def _repr_html_(self) -> str:
        """The page's still figure, for notebooks."""
        return render_still(self.to_json())

    @property
    def layers_by_direction(self) -> dict[str, tuple[str, ...]]:
        """Direction -> layers that have maps of it, in order of computation."""
        maps = self.rows[0].maps
        assert maps is not None
        return {
            way: tuple(layers)
            for way, layers in maps_by_direction(maps).items()
            # a run that reads words alone may still attend to what stands behind its regions
            if (self.images or way == "text_to_text") and any(part.numel() for part in layers.values())
        }

    def count_heads(self, direction: str) -> int:
        """Most heads of a layer that has maps of a direction."""
        return max(len(part) for part in getattr(self.rows[0].maps, direction).values())

    def check_direction(self, direction: str | None) -> None:
        """Refuse to show a direction that the model does not have.

        Raises:
            DataError: it has no maps of it, or none at all.
        """
        known = self.layers_by_direction
        if direction in known or (direction is None and known):
            return
        if not self.images:
            why = "it reads the words alone"
        elif not any(region for row in self.rows for region in row.regions if not region.special):
            why = "the detector found no region in the image"
        else:
            why = "no layer attends that way"
        raise DataError(f"{self.model.name} has no maps {direction}: {why}. It has: {', '.join(known)}.")

    def list_reasons(self, most: int = 3) -> list[tuple[str, float]]:
        """Words and regions that counted most for the first answer, with their relevance, the largest first."""
        rows = self.explanation.scores["relevance"][:1]
        found = (
            [
                (unit.text if isinstance(unit, Word) else unit.name, score)
                for row, scores in zip(self.rows, *rows, strict=True)
                for unit, score in (
                    *((word, float(scores.text[list(word.tokens)].sum())) for word in row.words),
                    *zip(row.regions, scores.regions.tolist(), strict=True),
                )
                if not unit.special and score > 0
            ]
            if rows
            else []
        )
        return sorted(found, key=lambda pair: -pair[1])[:most]

    def to_json(self) -> dict[str, Any]:
        """The document, see the head of this module."""
        scale = max((float(part.max()) for row in self.rows for part in _list_maps(row) if part.numel()), default=0.0)
        return {
            "format": FORMAT,
            "model": dict(vars(self.model)),
            "question": self.question,
            "choices": list(self.choices),
            "notice": self.notice,
            "images": [_embed_image(image) for image in self.images],
            "scale": scale,
            "rows": [self._describe_row(number, scale) for number in range(len(self.rows))],
            "answers_are": "phrases" if self.phrases else "alternatives",
            "answers": [
                {
                    "text": answer.text,
                    "probability": shorten(answer.probability),
                    "box": None if answer.box is None else [shorten(corner) for corner in answer.box],
                    "region": answer.region,
                    "truth": answer.text in self.truth if self.truth else None,
                }
                for answer in self.answers
            ],
            "truth": {"text": list(self.truth), "boxes": [list(box) for box in self.truth_boxes]}
            if self.truth or self.truth_boxes
            else None,
            "relevance": {method: _describe_scores(scores) for method, scores in self.explanation.scores.items()},
            "against": _describe_scores(self.explanation.against),
            "removal": {
                "fractions": list(self.curves[0].fractions),
                "curves": [_describe_curve(curve) for curve in self.curves],
            }
            if self.curves
            else None,
            "leave_one_out": None if self.left_out is None else self._describe_left_out(self.left_out),
        }

    def to_html(self, path: str | Path) -> None:
        """Write a page that stands alone: it needs no network and, as a still figure, no script.

        Raises:
            RunError: it cannot be written.
        """
        write_page(Path(path), [self.to_json()])

    def _describe_left_out(self, left_out: LeftOut) -> dict[str, Any]:
        """What the answers become without each word and each region of each row."""
        before = self.explanation.prediction
        places = range(len(self.answers))

        def describe(changed: Changed | None) -> dict[str, Any] | None:
            if changed is None:
                return None
            values = [shorten(probability(before, place, changed.prediction)) for place in places]
            given = list_candidates(changed.prediction, self.choices, self.rows[0])[0]
            return {"values": values, "answer": given[0].text}

        return {
            "values": [answer.probability for answer in self.answers],
            "rows": [
                {
                    "words": [describe(words.get(word.tokens)) for word in row.words],
                    "regions": [describe(regions.get(number)) for number in range(len(row.regions))],
                }
                for row, words, regions in zip(self.rows, left_out.words, left_out.regions, strict=True)
            ],
        }

    def _describe_row(self, number: int, scale: float) -> dict[str, Any]:
        """A row of the document."""
        row, known = self.rows[number], self.layers_by_direction
        label = ""
        if len(self.rows) > 1:
            label = self.choices[number] if len(self.choices) == len(self.rows) else f"image {number + 1}"
        return {
            "label": label,
            "image": sorted({region.image for region in row.regions if region.box is not None}),
            "words": [
                {
                    "text": word.text,
                    "tokens": list(word.tokens),
                    "pieces": list(word.pieces),
                    "special": word.special,
                }
                for word in row.words
            ],
            "regions": [
                {
                    "name": region.name,
                    "box": None if region.box is None else [shorten(corner) for corner in region.box],
                    "image": region.image,
                    "confidence": None if region.confidence is None else shorten(region.confidence),
                    "special": region.special,
                }
                for region in row.regions
            ],
            "attention": {
                "layers": [
                    {"name": layer, "directions": _pack_directions(row, layer, scale, known)}
                    for layer in self.layers
                    if any(layer in layers for layers in known.values())
                ]
            },
            "statistics": list_quantities(
                row, self.explanation.heads[number] if self.explanation.heads else {}, self.grounding
            ),
        }


def inspect(
    model: TaskModel,
    task: Task[Any, Any],
    asked: Prepared,
    *,
    folder: ModelFolder,
    tokenizer: Tokenizer,
    class_names: Sequence[str] = (),
    attribute_names: Sequence[str] = (),
    notices: Sequence[str] = (),
    most: int = 10,
    removal: bool = True,
) -> Inspection:
    """What a model answers to one question, and what it looks at.

    Args:
        folder: the model's.
        notices: what makes the answer doubtful; empty ones are left out.
        most: answers that are explained.
        removal: also ask again without parts of the question.
    """
    notices = (*notices, _TRUNCATED if asked.truncated else "", NO_PICTURE if folder.text_only else "")
    question, batch, record = asked.question, asked.batch, asked.record
    regions = () if folder.text_only else asked.regions
    with torch.enable_grad():
        encoded = model.encoder(batch, capture=True)
    assert encoded.attention is not None
    layers = dict.fromkeys(key.rpartition("/")[0] for key in encoded.attention)
    rows = split_rows(
        model.encoder,
        encoded.map(lambda tensor: tensor.detach().cpu()),
        batch.to("cpu"),
        first=0,
        example=asked.example,
        tokenizer=tokenizer,
        regions=regions,
        class_names=class_names,
        attribute_names=attribute_names,
    )
    whole = (model, task, batch, asked.example, record)
    (explanation,) = explain(model, task, batch, [record], most=most, encoded=encoded)
    answers, phrases = list_candidates(explanation.prediction, question.choices, rows[0])
    return Inspection(
        model=describe_model(folder, question),
        question=question.text,
        choices=tuple(question.choices),
        notice="; ".join(filter(None, notices)),
        images=() if folder.text_only else asked.images,
        rows=rows,
        layers=tuple(layers),
        answers=answers[:most],
        phrases=phrases,
        explanation=explanation,
        curves=removal_curves(*whole, explanation) if removal and answers else (),
        left_out=leave_one_out(*whole, explanation.prediction) if removal and answers else None,
    )


def list_candidates(
    prediction: Prediction, choices: Sequence[str], row: EncodedRow
) -> tuple[tuple[Candidate, ...], bool]:
    """What a prediction weighed, and whether each is the best region of a phrase of its own."""
    boxes = prediction.boxes
    # An expression has one box among candidates that have numbers; phrases have a box each.
    phrases = bool(boxes) and prediction.value != boxes[0]
    found = []
    for place, (name, share) in enumerate(prediction.top or _list_only(prediction)):
        box = boxes[place] if place < len(boxes) else None
        at = None if box is None else _find_region(box, row)
        text = name
        if choices and name.isdecimal():
            text = choices[int(name)]
        elif at is not None and not phrases:
            text = row.regions[at].name
        found.append(Candidate(text=text, probability=share, box=box, region=at))
    return tuple(found), phrases


def _list_only(prediction: Prediction) -> list[tuple[str, float]]:
    """The candidate of a prediction that lists none: how well a text fits an image, or nothing."""
    if not prediction.confidence:
        return []
    value = prediction.value
    return [(f"score {value:.2f}" if isinstance(value, float) else str(value), prediction.confidence)]


def _find_region(box: Sequence[float], row: EncodedRow) -> int | None:
    """Number of the region of the first image with the corners of a candidate; the whole image ends a pixel earlier in
    some releases."""
    for number, region in enumerate(row.regions):
        reach = 1 + _SAME_CORNER if region.special else _SAME_CORNER
        if region.box is not None and region.image == 0:
            gaps = [abs(a - b) for a, b in zip(region.box, box, strict=True)]
            if max(gaps) <= reach:
                return number
    return None


def _describe_scores(scores: ByPlace) -> list[list[dict[str, list[float]]]]:
    """Scores per answer and row as plain numbers."""
    return [
        [
            {"words_tokens": list(map(shorten, row.text.tolist())), "regions": list(map(shorten, row.regions.tolist()))}
            for row in rows
        ]
        for rows in scores
    ]


def _describe_curve(curve: Curve) -> dict[str, Any]:
    return {
        "part": curve.part,
        "method": curve.method,
        "order": curve.order,
        "values": list(map(shorten, curve.values)),
        "area": shorten(curve.area),
    }


def _list_maps(row: EncodedRow) -> list[Tensor]:
    assert row.maps is not None
    return [probs for direction in DIRECTIONS for probs in getattr(row.maps, direction).values()]


def _pack_directions(
    row: EncodedRow, layer: str, scale: float, known: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """The maps of a layer as bytes, by direction."""
    packed = {}
    for direction in known:
        probs = getattr(row.maps, direction).get(layer)
        if probs is None:
            continue
        heads, from_, to = probs.shape
        levels = (probs.float() / scale * 255).round().to(torch.uint8).numpy()
        data = base64.b64encode(np.ascontiguousarray(levels).tobytes()).decode("ascii")
        packed[direction] = {"heads": heads, "from": from_, "to": to, "data": data}
    return packed


def _embed_image(image: Image.Image) -> dict[str, Any]:
    """Size of an image and a data URI of it, small enough to travel in a page."""
    seen = image.convert("RGB")
    seen.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    lossless = seen.width * seen.height <= _LOSSLESS
    if lossless:
        seen.save(file, "PNG", optimize=True)
    else:
        seen.save(file, "JPEG", quality=87)
    kind = "png" if lossless else "jpeg"
    src = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    return {"width": image.width, "height": image.height, "src": src}


def shorten(value: float) -> float:
    """A number with as many digits as the document needs."""
    return float(f"{value:.{_DIGITS}g}")


def describe_model(folder: ModelFolder, question: Question) -> ModelFacts:
    """Which model was asked, and the command that writes the page, with the last parts of paths only."""
    path = folder.path.parent if folder.path.name == "model" else folder.path
    name = "/".join(path.absolute().parts[-2:])
    files = [Path(image).name if isinstance(image, (str, Path)) else "IMAGE" for image in question.images]
    options = [word for choice in question.choices for word in ("--choice", choice)]
    return ModelFacts(
        family=folder.model,
        task=str(folder.task),
        name=name,
        checkpoint=fingerprint_weights(folder.path),
        command=shlex.join(["visling", "inspect", name, *files, question.text, *options]),
    )


def fingerprint_weights(folder: Path) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the weights of a model folder."""
    file = folder / "model.safetensors"
    about = file.stat()
    return _digest(file, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=32)
def _digest(file: Path, changed: int, size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
