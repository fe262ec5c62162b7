"""Phrase grounding: which region does each phrase of a sentence name? (Flickr30K Entities; Plummer et al. 2015)

Files    Sentences/ID.txt, Annotations/ID.xml and {split}.txt (`data/annotations/entities.py`).
Official A phrase with a box is right at k if one of its k best regions overlaps with an annotated box by one half:
         recall at 1, 5 and 10. The upper bound is the share of phrases for which some region does. Phrases without any
         matching region count as misses.
Release  VisualBERT, `dataloaders/flickr_ban`: target 1/m on the m matching regions, KL divergence.
Shapes   B sentences, P phrases, R regions.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from visling import boxes as box_ops
from visling.data.annotations.entities import Box, EntitiesRecord, Phrase, parse_sentence, read_entities
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.metrics.phrases import RANKS, MatchRule, Target, first_rank, phrase_scores, right_boxes
from visling.tasks.answers import count_rows, detail_row, mean_score, mean_scores
from visling.tasks.base import Report, Score, Task, by_id
from visling.types import Batch, Example, Head, Loss, Prediction, RegionArray, Targets

HEAD = "phrases"
KEPT = max(RANKS)
"""Best regions that a prediction keeps for each phrase."""
NOT_READ = 0
"""Position, that of [CLS], of a phrase that the model does not read because its sentence was cut: it has no target and
is given no box. The release gives padded phrases the same position."""

_EXAMPLES = 1000
"""Annotated boxes that the baseline of positions is computed from, spread over the training records."""


@dataclass(frozen=True, kw_only=True)
class GroundingConfig:
    """Where phrases stand, how they are learned, and which boxes are right for them."""

    phrase_at: Literal["phrase", "release"] = "phrase"
    """Word whose last piece stands for a phrase: its own last word, or the last word of the first place in the sentence
    where the same words occur, as VisualBERT's release finds it: a repeated phrase points at its first occurrence."""
    loss_per: Literal["sentence", "phrase"] = "sentence"
    """What the summed divergence is divided by: sentences (VisualBERT's release), or phrases that some region
    matches."""
    target: Target = "any_box"
    """What a right region overlaps with where a phrase has several boxes: any of them (BAN, VisualBERT), the smallest
    box around all (the authors of the data set), or the first (ViLBERT, multi-task)."""
    inclusive: bool = False
    """Count both end pixels of a box, +1 (the authors of the data set, ViLBERT)."""
    strict: bool = False
    """The overlap must exceed one half (ViLBERT), not just reach it."""
    first_pixel: Literal[0, 1] = 1
    """Number of the first pixel in annotated boxes: 1 as in the files (BAN, VisualBERT), or 0, as the official reader
    in Python subtracts."""
    unrelated: bool = False
    """Keep the sentences that UNRELATED_CAPTIONS lists, as releases do that do not know the list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundedPhrase:
    """A phrase with the boxes predicted for it."""

    text: str
    chain: str
    """Of the record's phrase."""
    boxes: tuple[Box, ...]
    """At most `KEPT`, best first; pixel corners of the stored image. None for a phrase that was cut off."""
    reachable: bool | None = None
    """Whether any region of the image is right; None = not known."""

    def __str__(self) -> str:
        place = ", ".join(f"{side:g}" for side in self.boxes[0]) if self.boxes else "no box"
        return f"{self.text}: {place}"


@dataclass(frozen=True, slots=True)
class Grounding:
    """The phrases of a sentence, in their order, and where they are."""

    phrases: tuple[GroundedPhrase, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.phrases))


class PhraseGrounding(Task[EntitiesRecord, GroundingConfig]):
    """Find the region that each phrase of a sentence names."""

    name: ClassVar[str] = "grounding"
    metric: ClassVar[str] = "recall_at_1"
    files: ClassVar[str] = "sentences, boxes and lists of images of Flickr30K Entities (docs/tasks/grounding.md)"
    settings: ClassVar[type[GroundingConfig]] = GroundingConfig

    @cached_property
    def rule(self) -> MatchRule:
        """When a region is right, in training and evaluation alike."""
        config = self.config
        return MatchRule(target=config.target, inclusive=config.inclusive, strict=config.strict)

    @property
    def heads(self) -> Mapping[str, Head]:
        """One score for each phrase and region."""
        return {HEAD: Head(kind="slots_regions", outputs=1)}

    def records(self, root: Path, split: str) -> list[EntitiesRecord]:
        """Sentences with at least one boxed phrase, in the order of the split's list of images."""
        config = self.config
        return list(read_entities(root, split, first_pixel=config.first_pixel, unrelated=config.unrelated).records)

    def query(self, texts: Sequence[str], images: Sequence[str]) -> EntitiesRecord:
        """A sentence with its phrases in brackets, "[a man] holds [a red kite]"; without any, it is one phrase.

        Raises:
            DataError: no text, brackets that do not pair, or a phrase without words.
        """
        (text,), (image,) = texts, images
        if not text.strip():
            raise DataError(f"the text is empty: found {text!r}, expected a sentence or a phrase. Fill it in.")
        if "[" not in text and "]" not in text:
            text = f"[{text}]"
        numbers = itertools.count(1)
        marked = re.sub(r"\[(?!/EN#)", lambda _: f"[/EN#{next(numbers)} ", text)
        try:
            sentence = parse_sentence(marked, "the text")
        except DataError as error:
            raise DataError(
                f"the brackets in {text!r} do not mark phrases: each is closed before the next begins and holds "
                'words, as in "[a man] holds [a red kite]". Correct them.'
            ) from error
        return EntitiesRecord(id=image, images=(image,), sentence=sentence.text, phrases=sentence.phrases)

    def example(self, record: EntitiesRecord, layout: TextLayout, rng: np.random.Generator) -> Example:
        """The sentence with the position of each phrase; phrases that are cut off are `NOT_READ` and have no target.

        Raises:
            ConfigError: the preset cuts rows once more, where their phrases are no longer known.
        """
        if layout.spec.joint_limit is not None:
            raise ConfigError(
                f"joint_limit={layout.spec.joint_limit} would cut phrases off unseen. Use a preset without a limit to "
                "ground phrases."
            )
        row = layout.row(record.sentence)
        positions = [self._place_phrase(record.sentence, phrase, layout.tokenizer) for phrase in record.phrases]
        at = tuple(position if position < len(row.ids) - 1 else NOT_READ for position in positions)
        example = Example(id=record.id, rows=(replace(row, phrases=at),), images=record.images)
        if NOT_READ not in at:
            return example
        read = tuple(
            phrase if position != NOT_READ or phrase.boxes is None else replace(phrase, boxes=())
            for phrase, position in zip(record.phrases, at, strict=True)
        )
        return replace(example, region_labels=partial(self.region_targets, replace(record, phrases=read)))

    def _place_phrase(self, sentence: str, phrase: Phrase, tokenizer: Tokenizer) -> int:
        """Position of a phrase in the uncut row of its sentence; `NOT_READ` if no piece is left of its words."""
        if not len(tokenizer.pieces(phrase.text)[0]):
            return NOT_READ
        stop = phrase.stop
        if self.config.phrase_at == "release":
            words, wanted = sentence.split(" "), phrase.text.split(" ")
            length = len(wanted)
            # The release stops where a phrase is not found as whole words ("[a girl]'s"): it stays at its own place.
            at = next((k for k in range(len(words)) if words[k : k + length] == wanted), None)
            stop = stop if at is None else len(" ".join(words[: at + length]))
        return 1 + _last_piece(sentence, stop, tokenizer)

    def region_targets(self, record: EntitiesRecord, regions: Sequence[RegionArray]) -> Mapping[str, Any]:
        """`phrase_boxes` (P, R): 1/m on each of the m regions that are right for a phrase, all zero where none is."""
        if not self.labelled([record]):
            return {}
        shares = np.zeros((len(record.phrases), len(regions[0])), np.float32)
        for phrase, share in zip(record.phrases, shares, strict=True):
            if phrase.boxes:
                right = right_boxes(regions[0].boxes, phrase.boxes, self.rule)
                share[right] = 1 / max(right.sum(), 1)
        return {"phrase_boxes": shares}

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Loss:
        """KL divergence from the softmax over regions to the targets, in float32, summed over the phrases; part
        "grounding_accuracy" counts the phrases that some region matches.

        Raises:
            ConfigError: a model of the words alone.
        """
        shares = _require_shares(targets)
        # Slots are padded to a multiple of four, labels are not.
        scores = logits[HEAD].float()[:, : shares.shape[1]]
        values = F.kl_div(scores.log_softmax(-1), shares, reduction="none").sum(-1)  # (B, P)
        matched = _match(shares)
        if self.config.loss_per == "sentence":
            loss = Loss.mean("grounding", values.sum(1))
        else:
            loss = Loss.mean("grounding", values, matched)
        best = scores.detach().argmax(-1, keepdim=True)
        hits = (shares.gather(2, best) > 0).sum()
        return loss.reporting({"grounding_accuracy": (hits, matched.sum())})

    def count(self, targets: Targets, *, whole: bool) -> Mapping[str, Tensor]:
        shares = _require_shares(targets)
        return {"grounding": count_rows(shares) if self.config.loss_per == "sentence" else _match(shares).sum()}

    def decode(self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[EntitiesRecord]) -> list[Prediction]:
        """The best regions of each phrase; `top` and `boxes` hold the best one of each phrase that was read."""
        regions, slots = batch.regions, batch.phrases
        if regions is None or slots is None:
            return [self._predict(record, [()] * len(record.phrases), None) for record in records]
        scores = logits[HEAD].detach().float().masked_fill(~regions.mask[:, None], -torch.inf)
        best = scores.softmax(-1).topk(min(KEPT, scores.shape[-1]), dim=-1)
        ranked, chances, at = best.indices.cpu(), best.values[..., 0].cpu(), slots.at.cpu()
        corners = box_ops.to_pixels(regions.boxes.cpu().double(), regions.size.cpu()).numpy()
        predictions = []
        for row, record in enumerate(records):
            # Unit corners have the precision of float32: hundredths of a pixel keep an overlap of exactly one half.
            own = corners[row, : int(regions.mask[row].sum())].round(2)
            chosen = []
            for slot in range(len(record.phrases)):
                order = ranked[row, slot].tolist() if at[row, slot] != NOT_READ else []
                chosen.append(tuple(_box(own[k]) for k in order if k < len(own)))
            predictions.append(self._predict(record, chosen, own, chances[row].tolist()[: len(chosen)]))
        return predictions

    def logit(
        self, logits: Mapping[str, Tensor], batch: Batch, number: int, prediction: Prediction, place: int
    ) -> Tensor:
        """The logit of a phrase's best region."""
        assert batch.regions is not None
        assert isinstance(prediction.value, Grounding)
        slots = [slot for slot, phrase in enumerate(prediction.value.phrases) if phrase.boxes]
        scores = logits[HEAD][number, slots[place]]
        return scores[scores.detach().masked_fill(~batch.regions.mask[number], -torch.inf).argmax()]

    def _predict(
        self,
        record: EntitiesRecord,
        chosen: Sequence[tuple[Box, ...]],
        regions: NDArray[np.float64] | None,
        chances: Sequence[float] | None = None,
    ) -> Prediction:
        """A prediction of the boxes chosen for each phrase; its confidence is the probability that all best ones are
        right.

        Args:
            regions: all boxes (R, 4) that could be chosen; None = not known.
            chances: probability of the best box of each phrase; None = no phrase has one.
        """
        phrases = tuple(
            GroundedPhrase(
                text=phrase.text,
                chain=phrase.chain,
                boxes=boxes,
                reachable=bool(right_boxes(regions, phrase.boxes, self.rule).any())
                if phrase.boxes and regions is not None
                else None,
            )
            for phrase, boxes in zip(record.phrases, chosen, strict=True)
        )
        read = [] if chances is None else list(zip(phrases, chances, strict=True))
        read = [(phrase, chance) for phrase, chance in read if phrase.boxes]
        return Prediction(
            id=record.id,
            value=Grounding(phrases),
            confidence=math.prod(chance for _, chance in read) if read else 0.0,
            top=tuple((phrase.text, chance) for phrase, chance in read),
            boxes=tuple(phrase.boxes[0] for phrase, _ in read),
        )

    def report(self, predictions: Sequence[Prediction], records: Sequence[EntitiesRecord]) -> Report:
        """Recall at 1, 5 and 10 and their upper bound; recall at 1 by type, where a phrase of several types counts in
        each. `cut_off` is there if phrases were not read: the share of phrases that miss for this reason."""
        pairs = [
            (record.images[0], phrase, grounded)
            for prediction, record in by_id(predictions, records)
            for phrase, grounded in zip(record.phrases, prediction.value.phrases, strict=True)
        ]
        ranks = [self._rank(phrase, grounded) for _, phrase, grounded in pairs]
        found = phrase_scores(ranks, [bool(grounded.reachable) for _, _, grounded in pairs])
        images = [image for image, _, _ in pairs]
        scores = {}
        for most in RANKS:
            hits = [float(rank is not None and rank <= most) for rank in ranks]
            scores[f"recall_at_{most}"] = replace(mean_score(hits, images), value=100 * found.recall[most])
        if all(grounded.reachable is not None for _, _, grounded in pairs):
            scores["upper_bound"] = Score(100 * found.upper_bound, found.phrases)
        if cut := sum(not grounded.boxes for _, _, grounded in pairs):
            scores["cut_off"] = Score(100 * cut / found.phrases, found.phrases)
        typed = [
            (float(rank == 1), kind) for (_, phrase, _), rank in zip(pairs, ranks, strict=True) for kind in phrase.types
        ]
        return Report(
            scores=scores,
            by={"type": mean_scores([hit for hit, _ in typed], [kind for _, kind in typed])},
            variants={
                "right": str(self.rule),
                "first_pixel": str(self.config.first_pixel),
                "phrase_at": self.config.phrase_at,
            },
        )

    def _rank(self, phrase: Phrase, grounded: GroundedPhrase) -> int | None:
        """Rank of the first right box of a phrase; None if there is none."""
        return first_rank(right_boxes(grounded.boxes, phrase.boxes or (), self.rule)) if grounded.boxes else None

    def labelled(self, records: Sequence[EntitiesRecord]) -> bool:
        """Whether the boxes of every phrase are known."""
        return all(phrase.boxes is not None for record in records for phrase in record.phrases)

    def notes(self, records: Sequence[EntitiesRecord]) -> list[str]:
        """What was left out of the sentences, as the official protocol does."""
        unboxed = sum(record.unboxed for record in records)
        left_out = sum({record.images[0]: record.left_out for record in records}.values())
        found = []
        if unboxed:
            found.append(f"phrases without a box, which are not asked about: {unboxed}")
        if left_out:
            found.append(f"further sentences of these images, none of whose phrases has a box, left out: {left_out}")
        return found

    def submission(self, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
        """Ours, since the authors have no server: a row for each phrase, with the number of its sentence from 0 and the
        best box; `box` is null for a phrase that was cut off."""
        return [
            {
                "image": prediction.id.rpartition("#")[0],
                "sentence": int(prediction.id.rpartition("#")[2]),
                "phrase_id": phrase.chain,
                "phrase": phrase.text,
                "box": list(phrase.boxes[0]) if phrase.boxes else None,
            }
            for prediction in predictions
            for phrase in prediction.value.phrases
        ]

    def details(self, predictions: Sequence[Prediction], records: Sequence[EntitiesRecord]) -> list[dict[str, Any]]:
        """One row per sentence; `score` is the share of its phrases that are right, `phrases` has each of them."""
        rows = []
        for prediction, record in by_id(predictions, records):
            pairs = list(zip(record.phrases, prediction.value.phrases, strict=True))
            ranks = [self._rank(phrase, grounded) for phrase, grounded in pairs]
            known = self.labelled([record])
            truth = Grounding(
                tuple(
                    GroundedPhrase(text=phrase.text, chain=phrase.chain, boxes=phrase.boxes or ())
                    for phrase in record.phrases
                )
            )
            row = detail_row(
                replace(prediction, value=str(prediction.value)),
                record,
                text=record.sentence,
                kind="1 phrase" if len(pairs) == 1 else f"{len(pairs)} phrases",
                truth=str(truth) if known else None,
                score=sum(rank == 1 for rank in ranks) / len(pairs) if known else None,
            )
            row["phrases"] = [
                {
                    "phrase": phrase.text,
                    "phrase_id": phrase.chain,
                    "types": list(phrase.types),
                    "annotated": phrase.boxes,
                    "boxes": grounded.boxes,
                    "rank": rank,
                }
                for (phrase, grounded), rank in zip(pairs, ranks, strict=True)
            ]
            rows.append(row)
        return rows

    def baselines(
        self, train: Sequence[EntitiesRecord], records: Sequence[EntitiesRecord]
    ) -> Mapping[str, list[Prediction]]:
        """The whole image as one box, and the places where training boxes are most often."""
        whole, share = np.array([[0.0, 0.0, 1.0, 1.0]]), 1.0
        return {
            "whole image": [self._predict_places(record, whole, share) for record in records],
            "most frequent positions": [
                self._predict_places(record, *places) for places in [frequent_places(train)] for record in records
            ],
        }

    def _predict_places(self, record: EntitiesRecord, places: NDArray[np.float64], share: float) -> Prediction:
        """The same boxes, in unit corners, for every phrase."""
        width, height = record.size or (1, 1)
        boxes = tuple(_box(place) for place in places * [width, height, width, height])
        number = len(record.phrases)
        return self._predict(record, [boxes] * number, None, [share] * number)


def _last_piece(sentence: str, stop: int, tokenizer: Tokenizer) -> int:
    """Number, among all pieces of a sentence, of the last piece of the word that ends at character `stop`, or of the
    word before it if it has none.

    Where only the beginning of a word between blanks is meant ("girl" of "girl's"), it is that of this part; a part
    that is no word of its own ("motor" of "motorcycles") stands for the whole.
    """
    words = sentence.split(" ")
    last = sentence[:stop].count(" ")
    before = sum(len(tokenizer.pieces(word)[0]) for word in words[:last])
    part = tokenizer.pieces(sentence[:stop].rpartition(" ")[2])[1]
    if not len(part):
        return before - 1
    return before + int(np.flatnonzero(tokenizer.pieces(words[last])[1] == part[-1])[-1])


def _box(corners: NDArray[np.float64]) -> Box:
    x1, y1, x2, y2 = corners.tolist()
    return x1, y1, x2, y2


def frequent_places(train: Sequence[EntitiesRecord]) -> tuple[NDArray[np.float64], float]:
    """At most `KEPT` training boxes (K, 4) in unit corners that together are right for the most training boxes, the
    best first; and the share that the best one is right for."""
    units = np.array(
        [
            np.array(box) / (*record.size, *record.size)
            for record in train
            if record.size is not None
            for phrase in record.phrases
            for box in phrase.boxes or ()
        ]
    ).reshape(-1, 4)
    units = units[:: max(1, math.ceil(len(units) / _EXAMPLES))]
    tensor = torch.from_numpy(units)
    right = (box_ops.iou(tensor, tensor) >= MatchRule().threshold).numpy()
    share = float(right.mean(1).max(initial=0.0))
    places: list[NDArray[np.float64]] = []
    while len(places) < KEPT and right.any():
        best = int(right.sum(1).argmax())
        places.append(units[best])
        right = right & ~right[best]  # what it covers needs no other
    return np.array(places).reshape(-1, 4), share


TASK = PhraseGrounding


def _require_shares(targets: Targets) -> Tensor:
    if targets.phrase_boxes is None:
        raise ConfigError(
            "phrases are grounded in regions, which a text-only model does not see: leave --text-only out."
        )
    return targets.phrase_boxes


def _match(shares: Tensor) -> Tensor:
    """(B, P) bool: the phrases that some region matches, of shares (B, P, R)."""
    return shares.sum(-1) > 0
