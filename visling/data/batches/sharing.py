"""What several rows of a batch read, once: images that examples have in common, and equal texts.

Letters  B batch rows, N examples, I images of an example, U distinct text rows, S region rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from visling.types import Text

Scope = Literal["nothing", "example", "batch"]
"""Within what an image that comes twice is read once."""


class NumberedImages(NamedTuple):
    """Which images a batch reads, and where each example finds its own."""

    ids: list[str]
    """Of the images that are read; those that are joined in one row follow one another."""
    shown: NDArray[np.int64]
    """(N, I) number in `ids` of each image that an example names."""
    row: NDArray[np.int64] | None
    """(B,) region row of each text row; None = one to one."""


def number_images(named: Sequence[tuple[str, ...]], *, group: int, scope: Scope) -> NumberedImages:
    """The images of a batch, each as often as it must be read.

    Args:
        named: of each example: one image that all of its rows share, one for each row, or several that are joined in
            its only row.
        group: rows per example.
        scope: images of joined rows are shared as the whole row.
    """
    images = len(named[0])
    joined = images if group == 1 else 1
    ids: list[str] = []
    shown: list[int] = []
    known: dict[tuple[str, ...], int] = {}
    for own in named:
        if scope != "batch":
            known = {}
        for first in range(0, images, joined):
            together = own[first : first + joined]
            at = len(ids) if scope == "nothing" else known.setdefault(together, len(ids))
            if at == len(ids):
                ids += together
            shown += range(at, at + joined)
    places = np.array(shown, np.int64).reshape(len(named), images)
    row = (places[:, ::joined] // joined).repeat(group * joined // images, axis=1).reshape(-1)
    return NumberedImages(ids, places, None if np.array_equal(row, np.arange(len(ids) // joined)) else row)


def share_texts(text: Text) -> Text:
    """The text with each of its equal rows once, and `row`; as it is, if all differ."""
    places = [at[:, None] for at in (text.answer_at, text.task) if at is not None]
    table = torch.cat([text.ids, text.segments, text.mask.long(), *places], dim=1).numpy()
    found: dict[bytes, int] = {}
    row = [found.setdefault(own.tobytes(), len(found)) for own in table]
    if len(found) == len(row):
        return text
    first = torch.from_numpy(np.unique(row, return_index=True)[1])
    return dataclasses.replace(text.map(lambda tensor: tensor[first]), row=torch.tensor(row))


def order_by_images(named: Iterable[tuple[str, ...]]) -> NDArray[np.int64]:
    """Numbers of examples in an order in which those about the same images follow one another: groups as their images
    are first named, the examples of a group as they come. Cut into batches, each splits one group at most."""
    found: dict[tuple[str, ...], int] = {}
    return np.argsort([found.setdefault(images, len(found)) for images in named], kind="stable")
