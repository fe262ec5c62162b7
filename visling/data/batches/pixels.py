"""Pictures of a batch for a region extractor that is trained jointly: boxes in their frame, hidden regions cut out,
one padded block, and the objects that the regions show.

Letters  S region rows, one picture each, R regions, H and W height and width of a picture, M side of a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.data.batches.masking import hide_pixels
from visling.data.named_objects import shows_whole_image
from visling.errors import DataError
from visling.types import Canvas, MaskGrid, Pixels, RegionArray, RegionObjects, RegionStore

MAX_DISTORTION = 0.05
"""Share by which width over height of a picture may differ from that of the image whose regions are stored; scaled
copies are rounded."""


class Pictures(Protocol):
    """Pictures by image id as a region extractor reads them."""

    mask_grid: MaskGrid
    """How the masks of objects are drawn that the extractor reads, where a task knows them."""
    whole_image: bool
    """Whether the image itself is the first region of each; a store need not hold it."""
    canvas: Canvas | None
    """What pictures are laid on; None = they are padded on the right and below to the largest of a batch."""

    def read(self, image_ids: Sequence[str], mirrored: Sequence[bool]) -> Sequence[Tensor]:
        """Each picture, (3, H, W) float32 of its own size: scaled, mirrored where asked, normalised so that 0 is the
        mean colour."""
        ...


class BoxesAlone:
    """A view of a region store whose features are 0 wide, for models that compute their own: the stored ones are not
    read."""

    feature_size = 0

    def __init__(self, store: RegionStore) -> None:
        self.store, self.fingerprint = store, store.fingerprint

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, image_id: str) -> RegionArray:
        image = self.store[image_id]
        return dataclasses.replace(image, features=image.features[:, :0])


class WithWholeImage:
    """A view of a region store without features, in which the regions of every image begin with the image itself. What
    a detector says of regions is left out."""

    feature_size = 0

    def __init__(self, store: BoxesAlone) -> None:
        self.store, self.fingerprint = store, store.fingerprint

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, image_id: str) -> RegionArray:
        image = self.store[image_id]
        boxes = image.boxes
        if not shows_whole_image(boxes[:1], image.size).any():
            boxes = np.concatenate([np.array([[0, 0, *image.size]], np.float32), boxes])
        return RegionArray(features=np.zeros((len(boxes), 0), np.float16), boxes=boxes, size=image.size)


def mirror_boxes(
    boxes: NDArray[np.float32], size: NDArray[np.float32], mirrored: Sequence[bool]
) -> NDArray[np.float32]:
    """Boxes of mirrored images as those images show them: x becomes w - 1 - x. The boxes of all others stay.

    Args:
        boxes: (S, R, 4) pixel corners in images of width and height `size` (S, 2).
    Source:
        VL-BERT release, `RandomHorizontalFlip` of `data/transforms`.
    """
    flipped = np.array(mirrored, bool)
    if not flipped.any():
        return boxes
    placed = boxes.copy()
    placed[flipped, :, 0::2] = size[flipped, None, :1] - 1 - boxes[flipped, :, 2::-2]
    return placed


def place_boxes(
    boxes: NDArray[np.float32],
    size: NDArray[np.float32],
    pictures: Sequence[Tensor],
    mirrored: Sequence[bool],
    image_ids: Sequence[str],
    *,
    last_pixel: bool = True,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes in pixels of the pictures, and width and height (S, 2) of these.

    Args:
        boxes: (S, R, 4) pixel corners in the images as they were stored, of `size` (S, 2).
        last_pixel: cut boxes to the last pixel of a picture (VL-BERT), not to its edge.
    Raises:
        DataError: a picture differs in shape from the image whose regions are stored.
    Source:
        VL-BERT release, `data/transforms` and `conceptual_captions.py`: scaled, mirrored to w - 1 - x, cut to the last
        pixel.
    """
    frame = np.array([(picture.shape[2], picture.shape[1]) for picture in pictures], np.float32)
    for image_id, (wide, high), stored in zip(image_ids, frame, size, strict=True):
        if abs(wide * stored[1] - high * stored[0]) > MAX_DISTORTION * high * stored[0] + max(stored):
            raise DataError(
                f"the picture of {image_id!r} is shaped like {wide:.0f} x {high:.0f}, "
                f"but the regions stored for it are of an image of {stored[0]:.0f} x {stored[1]:.0f} pixels "
                "(width x height). It was rotated or cropped, or is another one: "
                "give the pictures from which the regions were extracted."
            )
    placed = mirror_boxes(boxes * np.tile(frame / size, 2)[:, None], frame, mirrored)
    return np.clip(placed, 0, np.tile(frame, 2)[:, None] - last_pixel), frame


def pad_pictures(pictures: Sequence[Tensor], boxes: NDArray[np.float32], hidden: NDArray[np.bool_] | None) -> Pixels:
    """The pictures, hidden regions cut out, in one block padded with 0 on the right and below.

    Args:
        boxes: (S, R, 4) of `place_boxes`.
        hidden: (S, R).
    """
    size = torch.tensor([picture.shape[1:] for picture in pictures])
    high, wide = size.amax(0).tolist()
    images = torch.zeros(len(pictures), 3, high, wide)
    for row, picture in enumerate(pictures):
        shown = picture if hidden is None else hide_pixels(picture, boxes[row], hidden[row])
        images[row, :, : picture.shape[1], : picture.shape[2]] = shown
    return Pixels(images=images, size=size, row=torch.arange(len(pictures)))


def lay_on_canvas(
    pictures: Sequence[Tensor],
    canvas: Canvas,
    boxes: NDArray[np.float32],
    hidden: NDArray[np.bool_] | None,
    rngs: Sequence[np.random.Generator] | None,
) -> Pixels:
    """The pictures, hidden regions cut out, each on a canvas that it fits on.

    Args:
        boxes: (S, R, 4) of `place_boxes`.
        hidden: (S, R).
        rngs: (S) generators that draw where each picture lies; None = in the middle.
    Source:
        VisualBERT release, `resize_image` of `dataloaders/box_utils.py`.
    """
    images = torch.tensor(canvas.colour)[:, None, None].repeat(len(pictures), 1, canvas.height, canvas.width)
    corners = []
    for row, picture in enumerate(pictures):
        high, wide = picture.shape[1:]
        free = (canvas.width - wide, canvas.height - high)
        if rngs is None:
            left, top = (pixels // 2 for pixels in free)
        else:
            left, top = (int(rngs[row].integers(pixels + 1)) for pixels in free)
        shown = picture if hidden is None else hide_pixels(picture, boxes[row], hidden[row])
        images[row, :, top : top + high, left : left + wide] = shown
        corners.append((left, top))
    return Pixels(
        images=images,
        size=torch.tensor([picture.shape[1:] for picture in pictures]),
        row=torch.arange(len(pictures)),
        corner=torch.tensor(corners),
    )


def stack_objects(
    objects: Sequence[RegionObjects], regions: int, mask_size: int, mirrored: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Classes (S, R) and masks (S, R, M, M) of the objects of all rows, for `Pixels`; 0 and all cells on padding.

    Args:
        regions: R.
        mirrored: (S) whether the picture is.
    """
    classes = np.zeros((len(objects), regions), np.int64)
    masks = np.ones((len(objects), regions, mask_size, mask_size), bool)
    for row, (one, turned) in enumerate(zip(objects, mirrored, strict=True)):
        classes[row, : len(one.classes)] = one.classes
        masks[row, : len(one.masks)] = one.masks[..., ::-1] if turned else one.masks
    return torch.from_numpy(classes), torch.from_numpy(masks)
