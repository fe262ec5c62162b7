"""Captions, questions and regions drawn at random, in lengths like those of the real data sets, and batches of them as
the library's loader makes them.

Captions    Random words, each one word piece: normal, mean 12, deviation 3, at least 6 pieces, about COCO's.
Questions   The same with mean 7.5, deviation 2, at least 4 pieces, about those of VQA.
Images      36 regions each (LXMERT), or 10 to 100, evenly drawn, as bottom-up features hold (VisualBERT, ViLBERT,
            VL-BERT).
Batches     Random ones: as in the releases, rows are not sorted by length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from visling import models, runtime
from visling.data.annotations.captions import CaptionRecord
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader, Source
from visling.data.corpora.captions import CaptionPairs, SingleCaption
from visling.data.text import TextLayout, Tokenizer
from visling.objectives.image_qa import NUM_ANSWERS
from visling.objectives.masked_regions import RegionLosses
from visling.recipes.configs import PretrainConfig
from visling.types import IGNORE, Batch, Example, InputSpec, RegionArray, Targets

SEED = 0
CAPTIONS_PER_IMAGE = 5
QUESTIONS_PER_IMAGE = 5


@dataclass(frozen=True, kw_only=True)
class TextLengths:
    """Word pieces of a drawn text: normal, rounded."""

    mean: float
    deviation: float
    fewest: int

    def draw(self, rng: np.random.Generator, number: int) -> NDArray[np.int64]:
        """(number,) lengths."""
        drawn = rng.normal(self.mean, self.deviation, number).round()
        return np.maximum(drawn, self.fewest).astype(np.int64)


CAPTION = TextLengths(mean=12.0, deviation=3.0, fewest=6)
QUESTION = TextLengths(mean=7.5, deviation=2.0, fewest=4)
REGIONS = {"lxmert": (36, 36), "cvlp": (36, 36)}
"""Family -> fewest and most regions of an image, where they are not 10 to the preset's number."""
FEWEST_REGIONS = 10


class DrawnStore:
    """Random regions of numbered images, drawn when they are asked for.

    Args:
        losses: of masked regions; what a detector would have predicted for each region is drawn too, as far as they
            read it.
    """

    fingerprint = "random"

    def __init__(
        self,
        num_images: int,
        feature_size: int,
        *,
        fewest: int,
        most: int,
        losses: RegionLosses | None = None,
    ) -> None:
        self.feature_size, self.losses = feature_size, losses
        drawn = runtime.generator_for(SEED, 1).integers(min(fewest, most), most + 1, num_images)
        self._counts = {image_id(number): int(count) for number, count in enumerate(drawn)}

    def __contains__(self, image: str) -> bool:
        return image in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, image: str) -> RegionArray:
        rng = runtime.generator_for(SEED, 2, int(image.rpartition("_")[2]))
        regions = draw_regions(self._counts[image], self.feature_size, rng)
        losses, number, more = self.losses, len(regions), dict[str, Any]()
        if losses is not None and losses.classes == "hard":
            more |= {
                "classes": rng.integers(losses.num_classes, size=number),
                "class_confidence": rng.random(number, np.float32),
                "attributes": rng.integers(losses.num_attributes, size=number),
                "attribute_confidence": rng.random(number, np.float32),
            }
        elif losses is not None:
            weights = rng.random((number, losses.num_classes), np.float32)
            more["probs"] = weights / weights.sum(1, keepdims=True)
        return replace(regions, **more)


def image_id(number: int) -> str:
    """Id of a drawn image."""
    return f"drawn_{number:012d}"


def draw_regions(regions: int, feature_size: int, rng: np.random.Generator) -> RegionArray:
    """Random features in [0, 1) and boxes of an image of 640 x 480 pixels."""
    corner = rng.uniform(0, (500, 350), (regions, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 120, (regions, 2))], axis=1).astype(np.float32)
    return RegionArray(features=rng.random((regions, feature_size), dtype=np.float32), boxes=boxes, size=(640, 480))


def draw_captions(
    num_images: int, tokenizer: Tokenizer, *, lengths: TextLengths = CAPTION, each: int = CAPTIONS_PER_IMAGE
) -> list[CaptionRecord]:
    """Texts of random words, `each` of them of an image."""
    rng = runtime.generator_for(SEED, 0)
    words = [word for word in tokenizer.tokens(range(tokenizer.size)) if word.isascii() and word.isalpha()]
    return [
        CaptionRecord(
            id=str(number),
            images=(image_id(number // each),),
            caption=" ".join(words[at] for at in rng.integers(len(words), size=length)),
        )
        for number, length in enumerate(lengths.draw(rng, num_images * each))
    ]


class WithAnswers:
    """Captions of which those that fit their image have an answer too, as LXMERT's questions have.

    Args:
        source: captions with the label `matched`.
    """

    def __init__(self, source: Source, num_answers: int) -> None:
        self.source, self.num_answers = source, num_answers

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The caption `index`, with an answer of the table or without a label."""
        example = self.source.example(index, rng)
        answer = int(rng.integers(self.num_answers)) if example.labels["matched"] else IGNORE
        return replace(example, labels={**example.labels, "answer": answer})


class Questions:
    """Questions with soft scores of a few answers.

    Args:
        num_answers: A.
    """

    def __init__(self, records: Sequence[CaptionRecord], layout: TextLayout, num_answers: int) -> None:
        self.records, self.layout, self.num_answers = records, layout, num_answers

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The question `index` about its image, with the model's answer slot, if it has one."""
        record = self.records[index]
        scores = np.zeros(self.num_answers, np.float32)
        scores[rng.integers(self.num_answers, size=3)] = (1.0, 0.6, 0.3)
        row = self.layout.row(record.caption, answer=True)
        return Example(id=record.id, rows=(row,), images=record.images, labels={"answer": scores})


def draw_store(model: str, spec: InputSpec, num_images: int, losses: RegionLosses | None = None) -> DrawnStore:
    """Images with as many regions as a family's features have."""
    fewest, most = REGIONS.get(model, (FEWEST_REGIONS, spec.max_regions))
    most = min(most, spec.max_regions)
    return DrawnStore(num_images, spec.feature_size, fewest=fewest, most=most, losses=losses)


def draw_pretraining(
    config: PretrainConfig, batch_size: int, number: int, device: torch.device, *, needs: Collection[str]
) -> list[tuple[Batch, Targets]]:
    """Random batches of a recipe's examples: masked as it masks, with what its objectives predict, features in float32.

    Args:
        needs: `Targets` fields that the objectives read.
    """
    spec = models.spec(config.model).inputs(config.encoder)
    tokenizer = Tokenizer(spec.vocabulary)
    num_images = count_images(number, batch_size, CAPTIONS_PER_IMAGE)
    store = draw_store(config.model, spec, num_images, config.region_losses)
    layout, records = TextLayout(tokenizer, spec), draw_captions(num_images, tokenizer)
    source: Source
    if config.corpora[0].kind == "caption_pairs":
        source = CaptionPairs(records, layout)
    else:
        source = SingleCaption(records, layout, false_caption_ratio=0.5 if "matching" in config.objectives else None)
    if "image_qa" in config.objectives:
        source = WithAnswers(source, config.objective_settings.get("image_qa", {}).get("num_answers", NUM_ANSWERS))
    collator = Collator(
        store,
        spec,
        tokenizer,
        masking=config.masking,
        region_masking=config.region_masking,
        needs=needs,
        pool=[image_id(at) for at in range(num_images)],
    )
    return take_batches(source, collator, batch_size, number, device)


def draw_questions(
    model: str, spec: InputSpec, batch_size: int, number: int, device: torch.device, *, num_answers: int
) -> list[tuple[Batch, Targets]]:
    """Random batches of questions, each with its image."""
    tokenizer = Tokenizer(spec.vocabulary)
    num_images = count_images(number, batch_size, QUESTIONS_PER_IMAGE)
    records = draw_captions(num_images, tokenizer, lengths=QUESTION, each=QUESTIONS_PER_IMAGE)
    source = Questions(records, TextLayout(tokenizer, spec), num_answers)
    collator = Collator(draw_store(model, spec, num_images), spec, tokenizer)
    return take_batches(source, collator, batch_size, number, device)


def count_images(batches: int, batch_size: int, texts_per_image: int) -> int:
    """Images whose texts fill so many batches."""
    return max(-(-batches * batch_size // texts_per_image), 2)


def take_batches(
    source: Source, collator: Collator, batch_size: int, number: int, device: torch.device
) -> list[tuple[Batch, Targets]]:
    """The first random batches of an epoch."""
    loader = Loader(source, collator, batch_size=batch_size, seed=SEED, bucket=1, prefetch=0)
    with contextlib.closing(iter(loader)) as made:  # type: ignore[type-var]
        drawn = list(islice(made, number))
    return [
        (batch.map(lambda t: t.float() if t.is_floating_point() else t).to(device), targets.to(device))
        for batch, targets in drawn
    ]


def describe_batches(batches: Sequence[Batch]) -> dict[str, Any]:
    """How long the rows are, and how much of a batch is padding."""
    tokens = np.concatenate([batch.text.mask.sum(1).cpu().numpy() for batch in batches])
    masks = [batch.regions.mask for batch in batches if batch.regions is not None]
    real = np.concatenate([mask.sum(1).cpu().numpy() for mask in masks])
    positions = sum(batch.text.mask.numel() for batch in batches) + sum(mask.numel() for mask in masks)
    return {
        "batches": len(batches),
        "tokens_per_row": {"mean": float(tokens.mean()), "min": int(tokens.min()), "max": int(tokens.max())},
        "regions_per_image": {"mean": float(real.mean()), "min": int(real.min()), "max": int(real.max())},
        "padding_share": 1 - float(tokens.sum() + real.sum()) / positions,
        "positions_per_batch": positions / len(batches),
    }
