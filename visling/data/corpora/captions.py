"""Captions as pre-training examples: COCO, Conceptual Captions, SBU, Flickr30K, and ViLBERT's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from visling.data.annotations.captions import (
    CaptionRecord,
    Captions,
    find_coco_captions,
    find_flickr30k,
    has_coco_captions,
    has_flickr30k,
)
from visling.data.annotations.web_captions import (
    Naming,
    find_conceptual_captions,
    find_vilbert_captions,
    has_sbu,
    image_name,
    read_conceptual_captions,
    read_sbu,
    read_vilbert_captions,
    read_vlbert_captions,
)
from visling.data.corpora.base import (
    Choice,
    CorpusContext,
    CorpusReader,
    RecordSource,
    SentenceSource,
    Typical,
    can_find,
    draw_of_another_image,
    group_by_image,
    keep_with_regions,
    keep_with_regions_of_all,
    note_left_out_captions,
)
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.regions.store import NativeStore
from visling.types import IGNORE


class CaptionPairs(SentenceSource[CaptionRecord]):
    """Two captions; does the second fit the image of the first?

    Half of the time (a draw u > 0.5) the second is a random caption of another image (matched 0), else another caption
    of the same image (matched 1). An image with a single caption always gets a random second one.

    Source:
        VisualBERT release, `two_sentence`. Its label field is called `is_random_next`, yet 1 means "fits", as here.
    """

    def __init__(self, records: Sequence[CaptionRecord], layout: TextLayout) -> None:
        super().__init__(records, [record.caption for record in records], layout)
        self._others = group_by_image(records)

    def choose(self, index: int, rng: np.random.Generator) -> Choice:
        """The caption `index` and a drawn second one."""
        record = self.records[index]
        siblings = self._others[record.images[0]]
        foreign = rng.random() > 0.5 or len(siblings) == 1
        if foreign:
            second = draw_of_another_image(self.records, record, rng)
        else:
            drawn = siblings[int(rng.integers(len(siblings) - 1))]
            # The last sibling takes the place of the caption itself, so that each of the others is equally likely.
            second = siblings[-1] if drawn == index else drawn
        return Choice(index, (index, second), {"matched": int(not foreign)})


class SingleCaption(SentenceSource[CaptionRecord]):
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
        super().__init__(records, [record.caption for record in records], layout)
        self.false_caption_ratio = false_caption_ratio
        if false_caption_ratio:
            group_by_image(records)

    def choose(self, index: int, rng: np.random.Generator) -> Choice:
        """The image of caption `index` with that caption or a wrong one."""
        if self.false_caption_ratio is None:
            return Choice(index, (index,), {"matched": IGNORE})
        wrong = rng.random() < self.false_caption_ratio
        shown = draw_of_another_image(self.records, self.records[index], rng) if wrong else index
        return Choice(index, (shown,), {"matched": int(not wrong)})


class VilbertCaptions(SentenceSource[CaptionRecord]):
    """A caption, or half of the time one drawn from all captions, its own included, which then fits but is labelled as
    if it did not.

    Args:
        pool: captions in the order of the file, from which the first `len(records)` are drawn, whether their image has
            regions or not.
        keep_above: draws above one half keep the caption (first release); False keeps below (multi-task release).
        matching: False replaces none and gives no label (the multi-task release's `objective` 2).
    Source:
        ViLBERT, `concept_cap_dataset.py` of both releases. Their labels are inverted: here 1 means "fits".
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
        captions = [record.caption for record in records]
        self.keep_above, self.matching = keep_above, matching
        self._pool_from = 0 if pool is None else len(captions)
        """Number of the first text of the pool."""
        super().__init__(records, captions if pool is None else [*captions, *pool], layout)
        if pool is not None and len(pool) < len(records):
            raise DataError(
                f"{len(pool)} captions to draw from for {len(records)} images: "
                "the pool holds the captions of all of them."
            )

    def choose(self, index: int, rng: np.random.Generator) -> Choice:
        """The image of caption `index` with that caption or a drawn one."""
        kept = not self.matching or (rng.random() > 0.5) == self.keep_above
        shown = index if kept else self._pool_from + int(rng.integers(len(self.records)))
        return Choice(index, (shown,), {"matched": int(kept) if self.matching else IGNORE})


_NAMING_SAMPLE = 2000
"""Rows of Conceptual Captions from which the naming of a store's images is inferred."""


def _read_coco(root: Path, split: str, context: CorpusContext) -> Sequence[CaptionRecord]:
    captions = context.captions.get((root, split))
    if captions is None:
        captions = context.captions[root, split] = find_coco_captions(root, split)
    note_left_out_captions(captions, root, context)
    return keep_with_regions_of_all(captions.records, root, context)


def _read_true_captions(root: Path, split: str, context: CorpusContext) -> RecordSource:
    return SingleCaption(_read_coco(root, split, context), context.layout, false_caption_ratio=None)


def _read_caption_pairs(root: Path, split: str, context: CorpusContext) -> RecordSource:
    return CaptionPairs(_read_coco(root, split, context), context.layout)


def _read_single_captions(root: Path, split: str, context: CorpusContext) -> RecordSource:
    return SingleCaption(_read_coco(root, split, context), context.layout)


def read_with(
    find: Callable[[Path, str, CorpusContext], Captions],
) -> Callable[[Path, str, CorpusContext], RecordSource]:
    """How captions of a data set whose images may have vanished are read: wrong ones are mixed in if the run learns
    matching."""

    def read(root: Path, split: str, context: CorpusContext) -> RecordSource:
        captions = find(root, split, context)
        note_left_out_captions(captions, root, context)
        records = keep_with_regions(captions.records, root, context)
        return SingleCaption(records, context.layout, false_caption_ratio=0.5 if context.matching else None)

    return read


def _find_conceptual_captions(root: Path, split: str, context: CorpusContext) -> Captions:
    file = find_conceptual_captions(root, split)
    if file.suffix == ".json":
        return read_vlbert_captions(file)
    return read_conceptual_captions(file, _infer_naming(file, context.store))


def _infer_naming(file: Path, store: NativeStore) -> Naming:
    """How the store names the images of Conceptual Captions: in the way that finds more of the first rows."""
    with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        addresses = [
            (number, line.rpartition("\t")[2].strip())
            for number, line in zip(range(_NAMING_SAMPLE), lines, strict=False)
        ]
    hits: dict[Naming, int] = {
        naming: sum(image_name(address, number, naming) in store for number, address in addresses)
        for naming in ("crc32", "line")
    }
    return "line" if hits["line"] > hits["crc32"] else "crc32"


def _read_vilbert(root: Path, split: str, context: CorpusContext) -> RecordSource:
    captions = read_vilbert_captions(find_vilbert_captions(root, split))
    note_left_out_captions(captions, root, context)
    records = keep_with_regions(captions.records, root, context)
    pool = [record.caption for record in captions.records[: len(records)]]
    return VilbertCaptions(
        records, context.layout, pool=pool, keep_above=context.corpus.keep_above, matching=context.matching
    )


READERS: Mapping[str, CorpusReader] = {
    "captions": CorpusReader(
        shows="a caption of COCO, always of its image: nothing to match (VisualBERT)",
        read=_read_true_captions,
        present=has_coco_captions,
    ),
    "caption_pairs": CorpusReader(
        shows="two captions of COCO, half of the time the second of another image (VisualBERT)",
        read=_read_caption_pairs,
        present=has_coco_captions,
        # 414,113 + 202,654 captions, except about five of each of 5,000 images
        typical=Typical(tokens=25, examples=591_757),
    ),
    "single_captions": CorpusReader(
        shows="a caption of COCO, half of the time of another image (VisualBERT)",
        read=_read_single_captions,
        present=has_coco_captions,
        serves="matching",
    ),
    "conceptual_captions": CorpusReader(
        shows="a caption of Conceptual Captions (released table or VL-BERT's rows), half of the time of another image "
        "if the run learns matching",
        read=read_with(_find_conceptual_captions),
        present=lambda root, split: can_find(find_conceptual_captions, root, split),
        typical=Typical(tokens=14, examples=3_318_333),
    ),
    "vilbert_captions": CorpusReader(
        shows="a caption of Conceptual Captions from ViLBERT's table, half of the time one drawn from all captions, "
        "which may fit, if the run learns matching",
        read=_read_vilbert,
        present=lambda root, split: can_find(find_vilbert_captions, root, split),
        settings=frozenset({"keep_above"}),
        typical=Typical(tokens=14, examples=3_136_161),  # what ViLBERT could still download
    ),
    "sbu": CorpusReader(
        shows="a caption of SBU, half of the time of another image if the run learns matching",
        read=read_with(lambda root, split, context: read_sbu(root)),
        present=lambda root, split: split == "train" and has_sbu(root),
        validates=False,
    ),
    "flickr30k": CorpusReader(
        shows="a caption of Flickr30K, half of the time of another image if the run learns matching",
        read=read_with(lambda root, split, context: find_flickr30k(root, split)),
        present=has_flickr30k,
        typical=Typical(tokens=17, examples=148_915),  # 29,783 images of the Entities split, five captions each
    ),
}
