"""Captions as pre-training examples: COCO, Conceptual Captions, SBU, Flickr30K."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from visling.data.annotations.captions import CaptionRecord, Captions, find_coco_captions
from visling.data.annotations.web_captions import (
    Naming,
    find_conceptual_captions,
    find_vilbert_captions,
    has_sbu,
    image_name,
    read_conceptual_captions,
    read_vilbert_captions,
    read_vlbert_captions,
)
from visling.data.corpora.base import (
    CorpusContext,
    RecordSource,
    can_find,
    draw_of_another_image,
    group_by_image,
    note_left_out_captions,
    with_all_regions,
    with_regions,
)
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.regions.store import NativeStore
from visling.types import IGNORE, Example


class CaptionPairs:
    """Two captions; does the second fit the image of the first?

    Half of the time (a draw u > 0.5) the second is a random caption of another image (matched 0), else another caption
    of the same image (matched 1). An image with a single caption always gets a random second one.

    Source:
        VisualBERT release, `two_sentence`. Its label field is called `is_random_next`, yet 1 means "fits", as here.
    """

    def __init__(self, records: Sequence[CaptionRecord], layout: TextLayout) -> None:
        self.records, self.layout = records, layout
        self._others = group_by_image(records)

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The caption `index` and a drawn second one."""
        record = self.records[index]
        siblings = self._others[record.images[0]]
        foreign = rng.random() > 0.5 or len(siblings) == 1
        if foreign:
            second = draw_of_another_image(self.records, record, rng)
        else:
            drawn = siblings[int(rng.integers(len(siblings) - 1))]
            # The last sibling stands in for the caption itself, so that each of the others is equally likely.
            second = self.records[siblings[-1] if drawn == index else drawn]
        row = self.layout.row(record.caption, second.caption)
        return Example(id=record.id, rows=(row,), images=record.images, labels={"matched": int(not foreign)})


class SingleCaption:
    """One caption, replaced by a random one of another image with a given probability.

    Args:
        false_caption_ratio: probability of a wrong caption (matched 0); None gives no label, for masked language
            modelling alone.
    Source:
        VisualBERT release without `two_sentence` (0.5).
    """

    def __init__(
        self, records: Sequence[CaptionRecord], layout: TextLayout, *, false_caption_ratio: float | None = 0.5
    ) -> None:
        if false_caption_ratio is not None and not 0 <= false_caption_ratio <= 1:
            raise ConfigError(f"false_caption_ratio must lie in [0, 1]; found {false_caption_ratio:g}.")
        self.records, self.layout, self.false_caption_ratio = records, layout, false_caption_ratio
        if false_caption_ratio:
            group_by_image(records)

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The image of caption `index` with that caption or a wrong one."""
        record = self.records[index]
        if self.false_caption_ratio is None:
            return Example(
                id=record.id, rows=(self.layout.row(record.caption),), images=record.images, labels={"matched": IGNORE}
            )
        wrong = rng.random() < self.false_caption_ratio
        shown = draw_of_another_image(self.records, record, rng) if wrong else record
        return Example(
            id=record.id,
            rows=(self.layout.row(shown.caption),),
            images=record.images,
            labels={"matched": int(not wrong)},
        )


class VilbertCaptions:
    """A caption, or half of the time one drawn from all captions, its own included: then it fits and is labelled as if
    it did not.

    Args:
        pool: captions in the order of the file, from which the first `len(records)` are drawn, whether their image has
            regions or not.
        keep_above: draws above one half keep the caption (first release); False keeps below (multi-task release).
        matching: False replaces none and gives no label (the multi-task release's `objective` 2).
    Source:
        ViLBERT, `concept_cap_dataset.py` of both releases. Their labels are turned round: here 1 means "fits".
    """

    def __init__(
        self,
        records: Sequence[CaptionRecord],
        layout: TextLayout,
        *,
        pool: Sequence[str] | None = None,
        keep_above: bool = True,
        matching: bool = True,
    ) -> None:
        self.records, self.layout, self.keep_above, self.matching = records, layout, keep_above, matching
        self.pool = [record.caption for record in records] if pool is None else pool
        if len(self.pool) < len(records):
            raise DataError(
                f"{len(self.pool)} captions to draw from for {len(records)} images: the pool holds the captions of all of them."
            )

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """The image of caption `index` with that caption or a drawn one."""
        record = self.records[index]
        kept = not self.matching or (rng.random() > 0.5) == self.keep_above
        caption = record.caption if kept else self.pool[int(rng.integers(len(self.records)))]
        return Example(
            id=record.id,
            rows=(self.layout.row(caption),),
            images=record.images,
            labels={"matched": int(kept) if self.matching else IGNORE},
        )


_NAMING_SAMPLE = 2000
"""Rows of Conceptual Captions by which the naming of a store's images is found out."""


def _read_coco(root: Path, split: str, reading: CorpusContext) -> Sequence[CaptionRecord]:
    found = find_coco_captions(root, split)
    note_left_out_captions(found, root, reading)
    return with_all_regions(found.records, root, reading)


def read_only_captions(root: Path, split: str, reading: CorpusContext) -> RecordSource:
    return SingleCaption(_read_coco(root, split, reading), reading.layout, false_caption_ratio=None)


def read_caption_pairs(root: Path, split: str, reading: CorpusContext) -> RecordSource:
    return CaptionPairs(_read_coco(root, split, reading), reading.layout)


def read_single_captions(root: Path, split: str, reading: CorpusContext) -> RecordSource:
    return SingleCaption(_read_coco(root, split, reading), reading.layout)


# Captions of data sets whose images may be gone: wrong ones are mixed in where the run learns matching.


def caption_reader(
    find: Callable[[Path, str, CorpusContext], Captions], *, numbered: Callable[[str], bool] = lambda image: False
) -> Callable[[Path, str, CorpusContext], RecordSource]:
    def source(root: Path, split: str, reading: CorpusContext) -> RecordSource:
        found = find(root, split, reading)
        note_left_out_captions(found, root, reading)
        records = with_regions(found.records, root, reading, numbered=numbered)
        return SingleCaption(records, reading.layout, false_caption_ratio=0.5 if reading.matching else None)

    return source


def conceptual_captions(root: Path, split: str, reading: CorpusContext) -> Captions:
    file = find_conceptual_captions(root, split)
    return (
        read_vlbert_captions(file)
        if file.suffix == ".json"
        else read_conceptual_captions(file, _naming(file, reading.store))
    )


def _naming(file: Path, store: NativeStore) -> Naming:
    """How the store names the images of Conceptual Captions: as more of the first rows are found."""
    with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        addresses = [
            (number, line.rpartition("\t")[2].strip())
            for number, line in zip(range(_NAMING_SAMPLE), lines, strict=False)
        ]
    found: dict[Naming, int] = {
        naming: sum(image_name(address, number, naming) in store for number, address in addresses)
        for naming in ("crc32", "line")
    }
    return "line" if found["line"] > found["crc32"] else "crc32"


def read_captions_of_vilbert(root: Path, split: str, reading: CorpusContext) -> RecordSource:
    found = read_vilbert_captions(find_vilbert_captions(root, split))
    note_left_out_captions(found, root, reading)
    records = with_regions(found.records, root, reading)
    pool = [record.caption for record in found.records[: len(records)]]
    return VilbertCaptions(
        records, reading.layout, pool=pool, keep_above=reading.corpus.keep_above, matching=reading.matching
    )


def sbu_present(root: Path, split: str) -> bool:
    return split == "train" and has_sbu(root)


def has_conceptual_captions(root: Path, split: str) -> bool:
    return can_find(find_conceptual_captions, root, split)


def has_vilbert_captions(root: Path, split: str) -> bool:
    return can_find(find_vilbert_captions, root, split)
