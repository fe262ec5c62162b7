"""What a model makes of one question, with names: which word and which region each state and each map speaks of.

Letters  T tokens, R regions, M and N positions that attend and that are attended to, H heads, Dt Dr Dp widths of text,
         region and pooled states. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from visling.data.batches.shown import ShownExamples
from visling.data.text import Tokenizer
from visling.models.base import Encoder
from visling.types import Batch, Encoded, Example, Maps, RegionArray, TextRow

ATTRIBUTE_CONFIDENCE, MOST_ATTRIBUTES = 0.3, 3
"""Least confidence of an attribute in a region's name, and most attributes in it."""
_SAME_BOX = 0.51
"""Pixels by which a corner may differ from the detector's after it went through unit coordinates."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word or a special token of a row."""

    text: str
    tokens: tuple[int, ...]
    """Positions of its pieces in the row, hence in states and maps."""
    pieces: tuple[str, ...]
    """As the vocabulary writes them ("##ing")."""
    special: bool = False
    """Whether it is no word of the text: [CLS], [SEP], [MASK], a task token."""


@dataclass(frozen=True, kw_only=True)
class NamedRegion:
    """A region of a row, or what stands behind the regions."""

    name: str
    """Attributes and class ("red star"), or its number where the detector has no names."""
    box: tuple[float, float, float, float] | None
    """Corners in pixels of its image; None for what is nowhere ([END])."""
    image: int = 0
    """Which of the question's images it is in."""
    confidence: float | None = None
    """Of its class."""
    special: bool = False
    """Whether it is no detected region: the whole image, [END]."""


@dataclass(frozen=True, kw_only=True, repr=False)
class EncodedRow:
    """One row of the model's input and what the encoder returned for it."""

    words: tuple[Word, ...]
    """Of T tokens, and of what stands behind them in captured states and maps (`Encoder.behind_text`)."""
    regions: tuple[NamedRegion, ...]
    """R regions, in the order in which the model sees them; if captured, also what stands behind them
    (`Encoder.behind_regions`)."""
    text_states: Tensor
    """(T, Dt)."""
    region_states: Tensor
    """(R, Dr)."""
    pooled: Tensor
    """(Dp,)."""
    whole: Tensor | None
    """(Dr,), of models with a state of the whole image."""
    maps: Maps | None
    """(H, M, N) per layer name in each direction, what stands behind tokens and regions included; None unless
    captured."""
    states: dict[str, Tensor] | None
    """Hidden states by layer name: (T, Dt), (R, Dr), or of one stream (T + R, Dt), what stands behind included."""

    def __repr__(self) -> str:
        """One line."""
        words = " ".join(word.text for word in self.words)
        regions = ", ".join(region.name for region in self.regions[:4]) + (", ..." if len(self.regions) > 4 else "")
        layers = "" if self.states is None else f"; states and maps of {len(self.states)} layers"
        return f'EncodedRow("{words}"; {len(self.regions)} regions: {regions or "none"}{layers})'


@dataclass(frozen=True, kw_only=True, repr=False)
class Encoding:
    """A question as the model encodes it. Most tasks have one row; its fields are offered here too."""

    question: str
    images: tuple[Image.Image, ...]
    """As the detector saw them."""
    rows: tuple[EncodedRow, ...]
    """One for each image of a pair (NLVR2), one for each choice (VCR), else one."""

    def __repr__(self) -> str:
        """One line for each row."""
        return "\n".join(map(repr, self.rows))

    @property
    def words(self) -> tuple[Word, ...]:
        """Words of the first row."""
        return self.rows[0].words

    @property
    def regions(self) -> tuple[NamedRegion, ...]:
        """Regions of the first row."""
        return self.rows[0].regions

    @property
    def text_states(self) -> Tensor:
        """(T, Dt) of the first row."""
        return self.rows[0].text_states

    @property
    def region_states(self) -> Tensor:
        """(R, Dr) of the first row."""
        return self.rows[0].region_states

    @property
    def pooled(self) -> Tensor:
        """(Dp,) of the first row."""
        return self.rows[0].pooled

    @property
    def maps(self) -> Maps | None:
        """Maps of the first row."""
        return self.rows[0].maps

    @property
    def states(self) -> dict[str, Tensor] | None:
        """States of the first row."""
        return self.rows[0].states


def name_regions(
    regions: RegionArray, *, class_names: Sequence[str] = (), attribute_names: Sequence[str] = ()
) -> list[str]:
    """Name of each region: its confident attributes and its class, or its number."""
    return [_name_region(regions, number, class_names, attribute_names) for number in range(len(regions))]


def _name_region(regions: RegionArray, number: int, class_names: Sequence[str], attribute_names: Sequence[str]) -> str:
    parts: list[str] = []
    if regions.attributes is not None and attribute_names:
        ids = np.atleast_1d(regions.attributes[number])
        confidence = regions.attribute_confidence
        sure = np.ones(len(ids)) if confidence is None else np.atleast_1d(confidence[number])
        named = [
            attribute_names[int(i)]
            for i, share in zip(ids, sure, strict=True)
            if 0 <= i < len(attribute_names) and share >= ATTRIBUTE_CONFIDENCE
        ]
        parts += named[:MOST_ATTRIBUTES]
    if regions.classes is not None and class_names:
        number_of_class = int(regions.classes[number])
        known = 0 <= number_of_class < len(class_names)
        parts.append(class_names[number_of_class] if known else f"class {number_of_class}")
    return " ".join(parts) or f"{number + 1}"


def split_rows(
    encoder: Encoder,
    encoded: Encoded,
    batch: Batch,
    *,
    first: int,
    example: Example,
    tokenizer: Tokenizer,
    regions: Sequence[RegionArray],
    class_names: Sequence[str] = (),
    attribute_names: Sequence[str] = (),
) -> tuple[EncodedRow, ...]:
    """The rows of one example of an encoded batch, without their padding.

    Args:
        batch: with a text row and a region row for each of its rows (`Batch.unshared`).
        first: number of the example's first row.
        regions: of each image of the example, as detected.
    """
    rows = []
    for number, row in enumerate(example.rows):
        place = first + number
        shown = [0] * len(regions) if len(regions) < 2 else list(range(len(regions)))
        if len(regions) == len(example.rows) > 1:
            shown = [number]  # an image for each row
        named = _list_regions(batch, place, shown, regions, class_names, attribute_names)
        rows.append(_cut_row(encoder, encoded, batch, place, list_words(row, tokenizer), named, regions, shown))
    return tuple(rows)


def split_examples(
    encoder: Encoder,
    encoded: Encoded,
    batch: Batch,
    examples: Sequence[Example],
    *,
    tokenizer: Tokenizer,
    regions: Sequence[Sequence[RegionArray]],
    class_names: Sequence[str] = (),
    attribute_names: Sequence[str] = (),
) -> Iterator[tuple[EncodedRow, ...]]:
    """The rows of each example of an encoded batch.

    Args:
        batch: what was encoded.
        regions: of each image of each example, as detected.
    """
    rows, first = batch.unshared(), 0
    for example, seen in zip(examples, regions, strict=True):
        yield split_rows(
            encoder,
            encoded,
            rows,
            first=first,
            example=example,
            tokenizer=tokenizer,
            regions=seen,
            class_names=class_names,
            attribute_names=attribute_names,
        )
        first += len(example.rows)


def encode_shown(
    encoder: Encoder,
    shown: ShownExamples,
    *,
    tokenizer: Tokenizer,
    class_names: Sequence[str] = (),
    attribute_names: Sequence[str] = (),
) -> list[tuple[EncodedRow, ...]]:
    """The rows of each example of a batch, with maps and states of every layer, on the batch's device."""
    with torch.no_grad():
        encoded = encoder(shown.batch, capture=True)
    return list(
        split_examples(
            encoder,
            encoded,
            shown.batch,
            shown.examples,
            tokenizer=tokenizer,
            regions=shown.regions,
            class_names=class_names,
            attribute_names=attribute_names,
        )
    )


def list_words(row: TextRow, tokenizer: Tokenizer) -> list[Word]:
    """Words of a row, special tokens included."""
    numbers = row.words if row.words is not None else np.arange(len(row.ids))
    pieces = tokenizer.tokens(row.ids)
    words: list[Word] = []
    for at, (piece, number) in enumerate(zip(pieces, numbers.tolist(), strict=True)):
        if number >= 0 and at and number == numbers[at - 1]:
            last = words[-1]
            words[-1] = replace(
                last,
                text=last.text + piece.removeprefix("##"),
                tokens=(*last.tokens, at),
                pieces=(*last.pieces, piece),
            )
        else:
            words.append(Word(text=piece, tokens=(at,), pieces=(piece,), special=number < 0))
    return words


def _list_regions(
    batch: Batch,
    place: int,
    shown: Sequence[int],
    regions: Sequence[RegionArray],
    class_names: Sequence[str],
    attribute_names: Sequence[str],
) -> list[NamedRegion]:
    """Regions of a row of the batch, each with the name of the detected region whose box it has: presets may sort
    regions, cut them, or put the whole image before them."""
    if batch.regions is None or not shown:
        return []
    seen = batch.regions
    count = int(seen.mask[place].sum())
    owners = [shown[0]] * count if seen.image is None else [shown[int(i)] for i in seen.image[place, :count]]
    names = {
        image: name_regions(regions[image], class_names=class_names, attribute_names=attribute_names) for image in shown
    }
    free = {image: np.ones(len(regions[image]), bool) for image in shown}
    found = []
    for number, image in enumerate(owners):
        array = regions[image]
        box = seen.boxes[place, number].double().cpu().numpy() * np.array(array.size * 2, np.float64)
        match = _match_box(box, array.boxes, free[image])
        if match is None:
            found.append(NamedRegion(name="whole image", box=_corners(box), image=image, special=True))
            continue
        free[image][match] = False
        confidence = None if array.class_confidence is None else float(array.class_confidence[match])
        found.append(
            NamedRegion(name=names[image][match], box=_corners(array.boxes[match]), image=image, confidence=confidence)
        )
    return found


def _match_box(box: NDArray[np.float64], boxes: NDArray[np.float32], free: NDArray[np.bool_]) -> int | None:
    """The first free box with the same corners."""
    if not len(boxes):
        return None
    same = (np.abs(boxes - box).max(1) <= _SAME_BOX) & free
    return int(same.argmax()) if same.any() else None


def _corners(box: NDArray[np.float64] | NDArray[np.float32]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box.tolist()
    return x1, y1, x2, y2


def _cut_row(
    encoder: Encoder,
    encoded: Encoded,
    batch: Batch,
    place: int,
    words: list[Word],
    named: list[NamedRegion],
    regions: Sequence[RegionArray],
    shown: Sequence[int],
) -> EncodedRow:
    """A row of the encoded batch without padding, with names for what stands behind its tokens and regions."""
    num_tokens, num_regions = sum(len(word.tokens) for word in words), len(named)
    maps, states = encoded.maps, encoded.states
    if maps is not None and states is not None:
        longest = batch.text.ids.shape[1]
        most = 0 if batch.regions is None else batch.regions.mask.shape[1]
        behind_text, behind_regions = list(encoder.behind_text), list(encoder.behind_regions)
        if batch.regions is None:
            behind_regions = behind_regions[len(behind_regions) - _count_regions(maps) :]
        words += [
            Word(text=name, tokens=(num_tokens + k,), pieces=(name,), special=True)
            for k, name in enumerate(behind_text)
        ]
        named += [_name_behind(name, regions, shown) for name in behind_regions]
        text_at = torch.cat([torch.arange(num_tokens), longest + torch.arange(len(behind_text))])
        region_at = torch.cat([torch.arange(num_regions), most + torch.arange(len(behind_regions))])
        joint_at = torch.cat([text_at, longest + len(behind_text) + region_at])
        whole_row = longest + len(behind_text) + most + len(behind_regions)
        maps = Maps(
            text_to_text=_cut_maps(maps.text_to_text, place, text_at, text_at),
            text_to_regions=_cut_maps(maps.text_to_regions, place, text_at, region_at),
            regions_to_text=_cut_maps(maps.regions_to_text, place, region_at, text_at),
            regions_to_regions=_cut_maps(maps.regions_to_regions, place, region_at, region_at),
        )
        states = {
            name: values[place][
                joint_at if values.shape[1] == whole_row else region_at if "region" in name else text_at
            ]
            for name, values in states.items()
        }
    return EncodedRow(
        words=tuple(words),
        regions=tuple(named),
        text_states=encoded.text[place, :num_tokens],
        region_states=encoded.regions[place, :num_regions],
        pooled=encoded.pooled[place],
        whole=None if encoded.whole is None else encoded.whole[place],
        maps=maps,
        states=states,
    )


def _count_regions(maps: Maps) -> int:
    """Length of the regions' axis of captured maps."""
    lengths = [probs.shape[-1] for probs in (*maps.text_to_regions.values(), *maps.regions_to_regions.values())]
    return lengths[0] if lengths else 0


def _name_behind(name: str, regions: Sequence[RegionArray], shown: Sequence[int]) -> NamedRegion:
    """What stands behind the regions; the whole image has a box, [END] has none."""
    if name != "whole image" or not shown:
        return NamedRegion(name=name, box=None, special=True)
    width, height = regions[shown[0]].size
    return NamedRegion(name=name, box=(0.0, 0.0, float(width), float(height)), image=shown[0], special=True)


def _cut_maps(maps: dict[str, Tensor], place: int, queries: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """(H, M, N) of one row from (B, H, from, to) by layer name; a layer over the text alone has no regions."""
    return {name: probs[place][:, queries][:, :, keys] for name, probs in maps.items() if 0 not in probs.shape[2:]}
