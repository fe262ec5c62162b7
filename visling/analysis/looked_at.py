"""What a model looked at for the answer that it gave: relevance of each word and each region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from visling.analysis.ask_again import AskAgain
from visling.analysis.encoded_rows import split_rows
from visling.analysis.encoding import EncodedRow, NamedRegion
from visling.analysis.examples import Row
from visling.analysis.relevance import Scores, explain

_SAME_CORNER = 0.51
"""Pixels by which corners of a box may differ after they went through unit coordinates."""
_TOGETHER = 8
"""Examples of a batch."""


@dataclass(frozen=True, kw_only=True)
class WeighedWord:
    """A word of the text and what the answer takes from it."""

    text: str
    weight: float
    """Its share of the relevance of all words and regions of the example."""


@dataclass(frozen=True, kw_only=True)
class WeighedRegion:
    """A region and what the answer takes from it."""

    region: NamedRegion
    weight: float
    """As that of a word."""


@dataclass(frozen=True, kw_only=True)
class LookedAt:
    """Words and regions of one example, without special tokens and what stands behind the regions."""

    answer: str
    """The one that is explained: the model's."""
    words: tuple[WeighedWord, ...]
    regions: tuple[WeighedRegion, ...]

    @property
    def strongest(self) -> float:
        """Weight of the heaviest word or region; 0 where the answer takes nothing from any."""
        weights = [word.weight for word in self.words] + [region.weight for region in self.regions]
        return max(weights, default=0.0)

    @property
    def image_share(self) -> float:
        """Share of the regions in the relevance of all words and regions."""
        return sum(one.weight for one in self.regions)

    def heaviest(self, most: int = 3) -> list[WeighedRegion]:
        """Regions that the answer takes most from, those that it takes nothing from left out."""
        return sorted((one for one in self.regions if one.weight > 0), key=lambda one: -one.weight)[:most]

    def name_box(self, box: Sequence[float]) -> str | None:
        """Name of the region of the first image that has these corners; None if there is none."""
        for region in (one.region for one in self.regions):
            if region.box is None or region.image != 0:
                continue
            if max(abs(a - b) for a, b in zip(region.box, box, strict=True)) <= _SAME_CORNER:
                return region.name
        return None

    def weigh_boxes(self, boxes: Sequence[Sequence[float]], image: int) -> list[float]:
        """Weight of each box of an image of the example; of one that the model does not read, 0."""
        weights: dict[tuple[float, ...], float] = {}
        for one in self.regions:
            if one.region.box is not None and one.region.image == image:
                weights[one.region.box] = max(one.weight, weights.get(one.region.box, 0.0))
        return [weights.get(tuple(box), 0.0) for box in boxes]


def look_again(run: AskAgain, rows: Sequence[Row]) -> list[LookedAt]:
    """What the model looked at in the examples of some rows of the details, in their order.

    Of an example with several rows (a choice each, or an image each), the row of the chosen answer counts, or all do.

    Raises:
        ConfigError: the task does not define which output speaks for an answer.
        DataError: the annotations do not have one of the examples.
    """
    found: list[LookedAt] = []
    for first in range(0, len(rows), _TOGETHER):
        found += _look_together(run, rows[first : first + _TOGETHER])
    return found


def _look_together(run: AskAgain, rows: Sequence[Row]) -> list[LookedAt]:
    asked = run.ask(rows)
    explanations = explain(run.model, run.task, asked.batch, asked.records, methods=("relevance",), most=1)
    with torch.no_grad():
        encoded = run.model.encoder(asked.batch, capture=True).to("cpu")
    batch, at, found = asked.batch.to("cpu"), 0, []
    for example, explanation in zip(asked.examples, explanations, strict=True):
        named = split_rows(
            run.model.encoder,
            encoded,
            batch,
            first=at,
            example=example,
            tokenizer=run.tokenizer,
            regions=[] if run.store is None else [run.store[image] for image in example.images],
            class_names=run.class_names,
            attribute_names=run.attribute_names,
        )
        at += len(example.rows)
        scores = explanation.scores["relevance"][0] if explanation.scores["relevance"] else ()
        pairs = list(zip(named, scores, strict=False))
        value = str(explanation.prediction.value)
        if len(pairs) > 1 and run.task.choices and value.isdecimal():
            pairs = pairs[int(value) : int(value) + 1]
        found.append(_join_rows(value, pairs))
    return found


def _join_rows(answer: str, rows: Sequence[tuple[EncodedRow, Scores]]) -> LookedAt:
    """Words and regions of the rows of an example; a text that several rows read, and a region, are given once."""
    words: dict[tuple[int, str], float] = {}
    regions: dict[NamedRegion, float] = {}
    for row, scores in rows:
        for number, word in enumerate(word for word in row.words if not word.special):
            weight = float(scores.text[list(word.tokens)].sum())
            words[number, word.text] = words.get((number, word.text), 0.0) + weight
        for region, weight in zip(row.regions, scores.regions.tolist(), strict=True):
            if not region.special:
                regions[region] = regions.get(region, 0.0) + weight
    total = sum(max(weight, 0.0) for weight in (*words.values(), *regions.values())) or 1.0
    return LookedAt(
        answer=answer,
        words=tuple(WeighedWord(text=text, weight=max(weight, 0.0) / total) for (_, text), weight in words.items()),
        regions=tuple(
            WeighedRegion(region=region, weight=max(weight, 0.0) / total) for region, weight in regions.items()
        ),
    )
