"""Examples to tensors: text, regions and labels side by side, padded and masked.

Letters  B batch rows, T tokens, R regions, G rows per example.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.data.batches.collate_regions import RegionCollator
from visling.data.batches.collate_text import TextCollator
from visling.data.batches.examples import ExampleBatch
from visling.data.batches.labels import drop_mismatched_answers, stack_labels
from visling.data.batches.masking import RegionMasking, TokenMasking
from visling.data.batches.pixels import Pictures
from visling.data.batches.shapes import give_few_shapes
from visling.data.batches.sharing import share_texts
from visling.data.batches.slots import slots_of_counts
from visling.data.text import Tokenizer, swap_sides
from visling.data.text_arrays import Links, TextRows
from visling.draws import Draws, as_draws
from visling.errors import ConfigError, DataError
from visling.types import Batch, Example, InputSpec, Regions, RegionStore, Slots, Targets, Text


class Collator:
    """Makes one batch and its labels of many examples, on the CPU: `collator(examples, draws)`.

    Text is padded to the longest row, regions to the most of any image, or both further (`few_shapes`). An image shared
    by rows of an example is given once, with `regions.row`; several images of a single row are joined (`spec.pair`
    "sequence"). Regions come in the order that `spec.region_order` names, and so do targets about them. Where text and
    regions together are longer than `spec.joint_limit`, the longer of them loses its end, after masking, as VL-BERT's
    release does it. A question that was paired with another image (label `matched` 0) loses its answer.

    Args:
        store: None gives text-only batches; settings about regions are then not read.
        masking: which word pieces are hidden; None leaves the text as it is.
        region_masking: which regions are hidden; None leaves them as they are.
        needs: `Targets` fields that objectives read; those about regions are computed only if they are named here.
        pool: image of every training example, where `region_masking.random` takes features from.
        pictures: of these images, for models that compute features from pixels: hidden regions are cut out of them,
            stored features are not read.
        flip: share of the images that are mirrored: boxes, and pictures if they are read. Stored features stay as they
            are.
        shift: lay each picture at a random place of its canvas, if the pictures have one; else in the middle.
        swap_sides: exchange "left" and "right" in the texts of mirrored images (VL-BERT's referring expressions); the
            labels of an example stay as they are.
        few_shapes: round sizes up and give counts, so that batches come in few shapes (`data.batches.shapes`).
        share: give what several rows of the batch read once, an image with `regions.row` and a text with `text.row`:
            for evaluation. In training each row of the releases has dropout noise of its own, so only rows of one
            example share their image there.
    Raises:
        StoreError: the store's features have another width than `spec` says.
        ConfigError: random features without a pool, or targets about masked regions without a region masking.
    """

    def __init__(
        self,
        store: RegionStore | None,
        spec: InputSpec,
        tokenizer: Tokenizer,
        *,
        masking: TokenMasking | None = None,
        region_masking: RegionMasking | None = None,
        needs: Collection[str] = (),
        pool: Sequence[str] = (),
        pictures: Pictures | None = None,
        flip: float = 0.0,
        shift: bool = False,
        swap_sides: bool = False,
        few_shapes: bool = False,
        share: bool = False,
    ) -> None:
        self.spec, self.tokenizer, self.swap_sides = spec, tokenizer, swap_sides
        self.few_shapes, self.share = few_shapes, share
        self.text = TextCollator(spec, tokenizer, masking)
        self.regions: RegionCollator | None = None
        if store is not None:
            self.regions = RegionCollator(
                store, spec, masking=region_masking, needs=needs, pool=pool, pictures=pictures, flip=flip, shift=shift,
                share=share,
            )  # fmt: skip

    def __call__(
        self, examples: Sequence[Example], draws: Draws | Sequence[np.random.Generator]
    ) -> tuple[Batch, Targets]:
        """One batch.

        Args:
            draws: random numbers of the examples. Of a generator that is given for each, those for mirroring come
                first, if there is any, then those for its text rows and its images, if they are masked.
        Raises:
            StoreError: an image is missing (names the example), or the store lacks what a target is computed from.
            DataError: examples that do not fit together, a row longer than `spec.max_tokens`, or a picture that is
                missing, damaged or another one.
            ConfigError: a label that `Targets` does not know, region targets or pictures of images that are joined in
                one row, or examples that name regions by number under a preset that sorts them.
        """
        group, draws = _count_rows(examples), as_draws(draws)
        # Mirroring is drawn first, as the release does it. The cut is known before anything else is drawn, and made
        # after it: the releases mask first.
        gathered = None if self.regions is None else self.regions.gather(examples, draws)
        if gathered is not None and any(gathered.mirrored) and self.swap_sides:
            examples = _swap_mirrored(examples, gathered.mirrored, self.tokenizer)
        rows, labels = _stack_examples(examples, group)
        matched = labels.get("matched")
        mismatched = np.zeros(len(rows), bool) if matched is None else matched.numpy() == 0
        kept_text = kept_regions = None
        if gathered is not None and self.spec.joint_limit is not None:
            kept_text, kept_regions = _fit_joint_limit(self.spec.joint_limit, rows, gathered.mask.sum(1))
        text, targets, rows = self.text(rows, examples, draws, mismatched, kept_text)
        if self.share:
            text = share_texts(text)
        links, regions, pixels = rows.links, None, None
        if self.regions is not None and gathered is not None:
            regions, pixels, region_targets = self.regions(gathered, draws, mismatched, kept_regions)
            targets |= region_targets
            labels |= self.regions.labels(examples, gathered, regions, kept_regions)
            links = self.regions.resolve_links(examples, links, gathered, kept_regions)
            if pixels is not None:
                pixels = self.regions.add_objects(examples, gathered, pixels, regions, kept_regions)
        batch = Batch(
            text=text,
            regions=regions,
            links=_mark_links(links, text, regions),
            phrases=_phrase_slots(rows.phrases),
            pixels=pixels,
            group=group,
        )
        labelled = Targets(**{**targets, **drop_mismatched_answers(labels, group)})
        return give_few_shapes(batch, labelled, self.spec) if self.few_shapes else (batch, labelled)


def _count_rows(examples: Sequence[Example]) -> int:
    """Rows per example."""
    if not examples:
        raise DataError("cannot collate zero examples.")
    if isinstance(examples, ExampleBatch):
        return 1
    group = len(examples[0].rows)
    for example in examples:
        if len(example.rows) != group or not group:
            raise DataError(
                f"example {example.id!r} has {len(example.rows)} rows where others have {group}: "
                "one batch holds one kind of example."
            )
    return group


def _stack_examples(examples: Sequence[Example], group: int) -> tuple[TextRows, dict[str, Tensor]]:
    """Rows and labels of the examples side by side."""
    if isinstance(examples, ExampleBatch):
        return examples.rows, {name: torch.from_numpy(values) for name, values in examples.labels.items()}
    rows = TextRows.pack([row for example in examples for row in example.rows])
    return rows, stack_labels(examples, [example.labels for example in examples], group)


def _swap_mirrored(examples: Sequence[Example], mirrored: Sequence[bool], tokenizer: Tokenizer) -> Sequence[Example]:
    """The examples, left and right exchanged in rows and labels whose image is mirrored; `mirrored` goes through all
    images."""
    if len(mirrored) not in (len(examples), len(examples) * len(examples[0].rows)):
        raise ConfigError("swap_sides needs one image per row; here several are joined in one. Set it to False.")
    each = iter(mirrored)
    swapped = []
    for example in examples:
        own = [next(each) for _ in example.images]
        own = own * len(example.rows) if len(own) == 1 else own
        rows = (swap_sides(row, tokenizer) if turned else row for row, turned in zip(example.rows, own, strict=True))
        labels = {**example.labels, **example.mirrored_labels} if any(own) else example.labels
        swapped.append(replace(example, rows=tuple(rows), labels=labels))
    return swapped


def _fit_joint_limit(
    limit: int, rows: TextRows, regions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pieces and regions that each row keeps so that both, with the whole image, are at most `limit`.

    Source:
        VL-BERT release, `conceptual_captions.py`: the longer of the two loses its last element (the text if they are
        equal), text its last but one; at least two pieces and the whole image stay.
    """
    if len(regions) != len(rows):
        raise ConfigError(
            f"joint_limit={limit} bounds one text and one image; "
            f"found {len(rows)} text rows for {len(regions)} images in a batch."
        )
    if any(slot is not None for slot in rows.answer_at):
        raise ConfigError(
            f"joint_limit={limit} would cut texts that end in an answer slot. "
            "Use a preset without a limit to answer questions."
        )
    pieces, boxes = rows.lengths.copy(), regions.astype(np.int64) + 1
    while (long := (pieces + boxes > limit) & ((pieces > 2) | (boxes > 1))).any():
        shorten_text = ((pieces >= boxes) & (pieces > 2)) | (boxes == 1)
        pieces -= long & shorten_text
        boxes -= long & ~shorten_text
    return pieces, boxes - 1


def _phrase_slots(phrases: Sequence[tuple[int, ...]]) -> Slots | None:
    counts = np.array([len(positions) for positions in phrases], np.int64)
    if not counts.any():
        return None
    return slots_of_counts(counts, np.array([at for positions in phrases for at in positions], np.int64))


def _mark_links(links: Sequence[Links], text: Text, regions: Regions | None) -> Tensor | None:
    """(B, T, R); links to regions beyond those of the batch are left out."""
    if regions is None or not any(links):
        return None
    real = regions.mask if regions.row is None else regions.mask[regions.row]
    tokens = text.mask if text.row is None else text.mask[text.row]
    marked = torch.zeros((*tokens.shape, real.shape[1]), dtype=torch.bool)
    for number, own in enumerate(links):
        for token, region in own:
            if token < tokens.shape[1] and region < real.shape[1]:
                marked[number, token, region] = real[number, region] & tokens[number, token]
    return marked
