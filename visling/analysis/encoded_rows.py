"""From an encoded batch to rows with names: each example's rows without their padding, and what stands behind tokens
and regions.

Letters  H heads, M and N positions that attend and that are attended to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.analysis.encoding import EncodedRow, NamedRegion, Word
from visling.analysis.region_names import name_regions
from visling.data.batches.shown import ShownExamples
from visling.data.text import Tokenizer
from visling.models.base import Encoder
from visling.types import Batch, Encoded, Example, Maps, RegionArray, TextRow

_WHOLE = "whole image"
_SAME_BOX, _LAST_PIXEL = 0.51, 0.01
"""A corner may differ from the detector's by so many pixels after it went through unit coordinates, and by this share
of the image where boxes are cut to the last pixel of a picture that may be smaller."""


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
    capture: bool = True,
) -> list[tuple[EncodedRow, ...]]:
    """The rows of each example of a batch, on the batch's device.

    Args:
        capture: also maps and states of every layer.
    """
    with torch.no_grad():
        encoded = encoder(shown.batch, capture=capture)
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
    sources: dict[int, int | None] = {}
    for image in shown:
        own = [number for number, owner in enumerate(owners) if owner == image]
        boxes = seen.boxes[place, own].double().cpu().numpy() * np.array(regions[image].size * 2, np.float64)
        sources |= zip(own, _match_boxes(boxes, regions[image]), strict=True)
    classes = {image: name_regions(regions[image], class_names=class_names) for image in shown if class_names}
    found = []
    for number, image in enumerate(owners):
        array, source = regions[image], sources[number]
        if source is None:
            found.append(_name_whole(number, image, array))
            continue
        confidence = None if array.class_confidence is None else float(array.class_confidence[source])
        box = _corners(array.boxes[source])
        found.append(
            NamedRegion(
                at=number,
                name=names[image][source],
                box=box,
                image=image,
                confidence=confidence,
                class_name=classes[image][source] if image in classes else "",
            )
        )
    return found


def _match_boxes(boxes: NDArray[np.float64], regions: RegionArray) -> list[int | None]:
    """Number of the detected region that each box (N, 4) in pixels stands for, nearest pairs first; None for the whole
    image that a preset adds. Presets cut boxes to the image or to its last pixel."""
    width, height = regions.size
    detected = np.clip(regions.boxes, 0, [width, height] * 2)
    gaps = np.abs(boxes[:, None] - detected[None]).max(2)
    matches: list[int | None] = [None] * len(boxes)
    free = np.ones(len(detected), bool)
    for pair in np.argsort(gaps, axis=None, kind="stable"):
        box, region = divmod(int(pair), len(detected))
        if gaps[box, region] > _SAME_BOX + _LAST_PIXEL * max(width, height):
            break
        if matches[box] is None and free[region]:
            matches[box], free[region] = region, False
    return matches


def _corners(box: NDArray[np.float32]) -> tuple[float, float, float, float]:
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
        named += [_name_behind(name, num_regions + k, regions, shown) for k, name in enumerate(behind_regions)]
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


def _name_behind(name: str, at: int, regions: Sequence[RegionArray], shown: Sequence[int]) -> NamedRegion:
    """What stands behind the regions; the whole image has a box, [END] has none."""
    if name != _WHOLE or not shown:
        return NamedRegion(at=at, name=name, box=None, special=True)
    return _name_whole(at, shown[0], regions[shown[0]])


def _name_whole(at: int, image: int, regions: RegionArray) -> NamedRegion:
    """An image as a region of itself."""
    width, height = regions.size
    return NamedRegion(at=at, name=_WHOLE, box=(0.0, 0.0, float(width), float(height)), image=image, special=True)


def _cut_maps(maps: dict[str, Tensor], place: int, queries: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """(H, M, N) of one row from (B, H, from, to) by layer name; a layer over the text alone has no regions."""
    return {name: probs[place][:, queries][:, :, keys] for name, probs in maps.items() if 0 not in probs.shape[2:]}
