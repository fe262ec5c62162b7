"""The region side of a batch: gathered from the store, hidden, cut and put into unit corners, with what is predicted
about them.

Letters  B batch rows, R regions, S region rows, F feature width, G rows per example.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.data.batches.examples import ExampleBatch, list_images, offer_any
from visling.data.batches.labels import REGION_LABELS, stack_labels
from visling.data.batches.masking import RegionMasking
from visling.data.batches.pixels import (
    BoxesAlone,
    Pictures,
    WithWholeImage,
    lay_on_canvas,
    mirror_boxes,
    pad_pictures,
    place_boxes,
    stack_objects,
)
from visling.data.batches.region_order import ByConfidence, take_regions
from visling.data.batches.region_targets import (
    REGION_TARGETS,
    Shown,
    count_averaged,
    detected,
    hide_regions,
    whole_image,
)
from visling.data.batches.sharing import Scope, number_images
from visling.data.batches.slots import slots_of_grid
from visling.data.text_arrays import Links
from visling.draws import Draws, Stream
from visling.errors import ConfigError, DataError, StoreError
from visling.regions.on_device import FeatureRows, describe_average
from visling.regions.store import Orders, gather
from visling.types import Example, InputSpec, Pixels, RegionArray, Regions, RegionStore

MIN_EXTENT = 1e-5
"""Least width and height of a unit box: a box without area (clipped away, or a line) is widened to it, within the
image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredRegions:
    """Regions of a batch as the store holds them, before any is hidden or cut."""

    store: RegionStore
    """In the order that the preset reads."""
    image_ids: Sequence[str]
    mirrored: Sequence[bool]
    """Whether each image is mirrored."""
    features: NDArray[Any]
    """(S, R, F)."""
    boxes: NDArray[np.float32]
    """(S, R, 4) pixel corners."""
    mask: NDArray[np.bool_]
    """(S, R) True = real."""
    size: NDArray[np.float32]
    """(S, 2) image width and height."""
    images: int
    """Images per example."""
    group: int
    """Rows per example."""
    shown: NDArray[np.int64]
    """(N, images) which of these images each example names."""
    row: NDArray[np.int64] | None
    """(B,) region row of each text row, where several share one; None = one to one."""
    order: Orders
    """(S) the regions that are shown of those that the preset reads, None = all."""

    @property
    def joined(self) -> bool:
        """Whether several images are joined in one row."""
        return self.group == 1 and self.images > 1


class RegionCollator:
    """Regions of many examples as tensors; see `Collator` for its settings."""

    def __init__(
        self,
        store: RegionStore,
        spec: InputSpec,
        *,
        masking: RegionMasking | None,
        needs: Collection[str],
        pool: Sequence[str],
        pictures: Pictures | None,
        flip: float,
        shift: bool,
        share: bool,
    ) -> None:
        if pictures is None and store.feature_size != spec.feature_size:
            raise StoreError(
                f"the region store holds features of width {store.feature_size}, the model takes {spec.feature_size}. "
                "Use the store of the detector it was trained with, or a preset of this width."
            )
        if masking is not None and masking.random and not pool:
            raise ConfigError(
                "region masking takes random features from the images of other examples: "
                "give their ids as `pool`, or set random=0."
            )
        self.needs = REGION_TARGETS.intersection(needs)
        if masking is None and (unmasked := sorted(self.needs - {"region_features"})):
            raise ConfigError(
                f"targets {', '.join(unmasked)} are asked for, but no region is masked: give a RegionMasking."
            )
        self.store = store
        if pictures is not None:
            self.store = BoxesAlone(store)
            if pictures.whole_image:
                self.store = WithWholeImage(self.store)
        self.spec, self.masking, self.pool, self.pictures, self.flip = spec, masking, pool, pictures, flip
        self.share = share
        self.shift = shift and pictures is not None and pictures.canvas is not None

    def gather(self, examples: Sequence[Example], draws: Draws) -> GatheredRegions:
        """Regions of all images; whether images are mirrored is drawn here.

        Raises:
            StoreError: an image is missing.
            DataError: examples whose numbers of images do not fit together.
            ConfigError: what needs one image per row is asked of joined images, or examples name regions by number
                under a preset that sorts them.
        """
        store = self.store
        if self.spec.region_order == "confidence":
            _refuse_numbered(examples)
            store = ByConfidence(store)
        named = list_images(examples)
        mirrored = [False for own in named for _ in own]
        if self.pictures is not None or self.flip > 0:
            rngs = draws.each(Stream.MIRROR)
            mirrored = [rng.random() < self.flip for own, rng in zip(named, rngs, strict=True) for _ in own]
        _check_images(examples, named, self.spec)
        images, group = len(named[0]), len(examples[0].rows)
        image_ids, shown, row = number_images(named, group=group, scope=self._sharing_scope(examples))
        mirrored = mirrored[: len(image_ids)]  # shared images are not mirrored
        arrays, order = _gather_images(examples, image_ids, store, self.spec.max_regions)
        gathered = GatheredRegions(
            store=store,
            image_ids=image_ids,
            mirrored=mirrored,
            order=order,
            **arrays,
            images=images,
            group=group,
            shown=shown,
            row=row,
        )
        if gathered.joined and (self.masking is not None or self.needs or self.pictures is not None):
            raise ConfigError(
                "region masking, region targets and pictures need one image per row; here several are joined in one. "
                "Use a preset with pair='rows'."
            )
        return gathered

    @property
    def _same_each_time(self) -> bool:
        """Whether an image that is named twice looks the same both times: nothing is drawn for it, and no text decides
        how many of its regions are kept."""
        return self.masking is None and not self.flip and not self.shift and self.spec.joint_limit is None

    def _sharing_scope(self, examples: Sequence[Example]) -> Scope:
        """Within what the regions of an image are the same. An example may choose some of them, or know what objects
        an extractor finds in them; then they are its own."""
        if not self._same_each_time:
            return "nothing"
        extracts = self.pictures is not None
        own = offer_any(examples, "chosen_regions") or (extracts and offer_any(examples, "region_objects"))
        return "batch" if self.share and not own else "example"

    def __call__(
        self,
        gathered: GatheredRegions,
        draws: Draws,
        mismatched: NDArray[np.bool_],
        kept: NDArray[np.int64] | None,
    ) -> tuple[Regions, Pixels | None, dict[str, Any]]:
        """Regions, the pictures they are cut out of where such are read, and their targets, cut to `kept` (S,) regions.

        Changes the gathered features.
        """
        features, boxes, real, size = gathered.features, gathered.boxes, gathered.mask, gathered.size
        clean = features.copy() if "region_features" in self.needs else None
        shown = self._hide_features(gathered, draws)
        whole = pixels = None
        if self.pictures is None:
            whole = self._average_image(features, real, shown, limited=kept is not None)
            # Stored features cannot be mirrored: the release moves their boxes alone.
            boxes, frame = mirror_boxes(boxes, size, gathered.mirrored), size
        else:
            # Examples with regions of their own may still show one picture.
            scope: Scope = "batch" if self.share and self._same_each_time else "nothing"
            names, places, _ = number_images([(name,) for name in gathered.image_ids], group=1, scope=scope)
            pictures = self.pictures.read(names, gathered.mirrored[: len(names)])
            canvas, of = self.pictures.canvas, places[:, 0]
            boxes, frame = place_boxes(
                boxes, size, [pictures[at] for at in of], gathered.mirrored, gathered.image_ids,
                last_pixel=canvas is None,
            )  # fmt: skip
            # Regions that are left out below leave their hole (release).
            hidden = shown.hidden if shown is not None and self.masking and self.masking.cut_pixels else None
            if canvas is None:
                pixels = pad_pictures(pictures, boxes, hidden)
            else:
                each = None
                if self.shift:
                    each = [rng for rng in draws.generators(Stream.PLACE) for _ in range(gathered.images)]
                pixels = lay_on_canvas(pictures, canvas, boxes, hidden, each)
            pixels = replace(pixels, row=torch.from_numpy(of))
        # Padded rows hold zeros and stay zeros; only real boxes are widened.
        unit = _to_unit(boxes, frame, real)
        image = None
        if gathered.joined:
            unit, features, real, image = _join_images(unit, features, real, gathered.images)
            size = size[:: gathered.images]
        if kept is not None:
            most = max(int(kept.max()), 1)
            real = (np.arange(real.shape[1]) < kept[:, None])[:, :most]
            features, unit = (_cut_regions(array, real) for array in (features, unit))
            clean = None if clean is None else _cut_regions(clean, real)
        row = gathered.row
        regions = Regions(
            features=torch.from_numpy(features),
            boxes=torch.from_numpy(unit),
            mask=torch.from_numpy(real),
            size=torch.from_numpy(np.ascontiguousarray(size)),
            row=None if row is None else torch.from_numpy(row),
            whole=None if whole is None else torch.from_numpy(whole),
            hidden=torch.from_numpy(shown.hidden[:, : real.shape[1]] & real)
            if self.masking and self.masking.learned and shown
            else None,
            image=None if image is None else torch.from_numpy(image),
        )
        targets: dict[str, Any] = {}
        if clean is not None:
            targets["region_features"] = torch.from_numpy(clean if row is None else clean[row])
        if shown is not None:
            targets |= self._region_targets(gathered, real, shown.chosen[:, : real.shape[1]] & real, mismatched)
        return regions, pixels, targets

    def labels(
        self, examples: Sequence[Example], gathered: GatheredRegions, regions: Regions, kept: NDArray[np.int64] | None
    ) -> dict[str, Tensor]:
        """What the examples' `region_labels` say of the regions, as the model sees them."""
        if not offer_any(examples, "region_labels"):
            return {}
        labels = []
        for example, shown in zip(examples, _list_shown(gathered, kept), strict=True):
            named = {} if example.region_labels is None else example.region_labels(shown)
            if twice := sorted(named.keys() & example.labels.keys()):
                raise ConfigError(f"example {example.id!r} and its region_labels both give the label {twice[0]!r}.")
            labels.append(named)
        return stack_labels(examples, labels, gathered.group, regions=regions.mask.shape[1])

    def resolve_links(
        self,
        examples: Sequence[Example],
        links: Sequence[Links],
        gathered: GatheredRegions,
        kept: NDArray[np.int64] | None,
    ) -> Sequence[Links]:
        """Links of all rows, those to objects replaced by links to the regions that show them; links to objects that no
        region shows are left out."""
        if not offer_any(examples, "linked_regions"):
            return links
        resolved = list(links)
        for number, (example, shown) in enumerate(zip(examples, _list_shown(gathered, kept), strict=True)):
            if example.linked_regions is not None:
                regions = example.linked_regions(shown[0])
                for at in range(number * gathered.group, (number + 1) * gathered.group):
                    found = ((token, int(regions[item])) for token, item in links[at])
                    resolved[at] = tuple(link for link in found if link[1] >= 0)
        return resolved

    def add_objects(
        self,
        examples: Sequence[Example],
        gathered: GatheredRegions,
        pixels: Pixels,
        regions: Regions,
        kept: NDArray[np.int64] | None,
    ) -> Pixels:
        """The pixels with what the examples' `region_objects` say of the regions, as the model sees them; as they are,
        where the examples know nothing of objects.

        Raises:
            ConfigError: some examples of the batch know their objects, others do not, or an example has several
                images.
        """
        if not offer_any(examples, "region_objects"):
            return pixels
        sources = [example.region_objects for example in examples if example.region_objects is not None]
        if len(sources) < len(examples) or gathered.images != 1:
            raise ConfigError(
                f"{len(sources)} of {len(examples)} examples, of {gathered.images} images each, know the objects that "
                "their regions show: expected all, of one image."
            )
        assert self.pictures is not None
        grid = self.pictures.mask_grid
        objects = [
            describe(shown[0], grid) for describe, shown in zip(sources, _list_shown(gathered, kept), strict=True)
        ]
        classes, masks = stack_objects(objects, regions.mask.shape[1], grid.size, gathered.mirrored)
        return replace(pixels, classes=classes, masks=masks)

    def _hide_features(self, gathered: GatheredRegions, draws: Draws) -> Shown | None:
        """What masking does to the gathered regions; their features are changed."""
        if self.masking is None:
            return None
        return hide_regions(
            gathered.features,
            gathered.boxes,
            gathered.mask,
            self.masking,
            draws,
            store=gathered.store,
            pool=self.pool,
            max_regions=self.spec.max_regions,
        )

    def _average_image(
        self, features: NDArray[Any], real: NDArray[np.bool_], shown: Shown | None, *, limited: bool
    ) -> NDArray[np.floating[Any]] | None:
        """Whole-image features (S, F), unless they are left to the model. A limit cuts regions that the average counts,
        so it is computed here; of features that live on the device it is only described."""
        kind = "model" if self.masking is None else self.masking.whole
        if kind == "model" and not limited:
            return None
        slots = 0 if self.masking is None else self.masking.whole_slots
        how: Literal["visible", "unflagged"] = "unflagged" if kind == "unflagged" else "visible"
        if isinstance(self.store, FeatureRows):
            return describe_average(features, count_averaged(real, shown, how, slots))
        return whole_image(features, real, shown, how, slots)

    def _region_targets(
        self,
        gathered: GatheredRegions,
        real: NDArray[np.bool_],
        chosen: NDArray[np.bool_],
        mismatched: NDArray[np.bool_],
    ) -> dict[str, Any]:
        """Region targets by name, except the features.

        Args:
            real, chosen: (S, R) regions as the model sees them, and those that masking chose.
            mismatched: (B,) rows whose text belongs to another image.
        """
        assert self.masking is not None
        labelled, images, order = real if self.masking.labels == "all" else chosen, gathered.image_ids, gathered.order
        if (row := gathered.row) is not None:
            labelled, chosen, images = labelled[row], chosen[row], [images[number] for number in row]
            order = None if order is None else [order[number] for number in row]
        if not self.masking.mismatched:
            labelled, chosen = labelled & ~mismatched[:, None], chosen & ~mismatched[:, None]
        targets: dict[str, Any] = {}
        if "feature_slots" in self.needs:
            targets["feature_slots"] = slots_of_grid(chosen)
        if names := sorted(self.needs - {"feature_slots", "region_features"}):
            slots = targets["class_slots"] = slots_of_grid(labelled)
            targets |= {
                name: detected(name, gathered.store, images, order, slots) for name in names if name != "class_slots"
            }
        return targets


def _choose_regions(examples: Sequence[Example], image_ids: Sequence[str], store: RegionStore, most: int) -> Orders:
    """The choice of each example for its only image, from the first regions, at most `most`."""
    if not offer_any(examples, "chosen_regions"):
        return None
    return [
        None if example.chosen_regions is None else example.chosen_regions(take_regions(store[image], slice(most)))
        for example, image in zip(examples, image_ids, strict=True)
    ]


def _list_shown(gathered: GatheredRegions, kept: NDArray[np.int64] | None) -> Iterator[list[RegionArray]]:
    """The regions of each example's images as the model sees them: in its order, cut to `kept` (S,)."""
    counts = gathered.mask.sum(1) if kept is None else kept
    for rows in gathered.shown.tolist():
        shown = []
        for at in rows:
            chosen, count = None if gathered.order is None else gathered.order[at], int(counts[at])
            kept_regions = slice(count) if chosen is None else chosen[:count]
            shown.append(take_regions(gathered.store[gathered.image_ids[at]], kept_regions))
        yield shown


def _refuse_numbered(examples: Sequence[Example]) -> None:
    """Refuse examples that name regions by their number in the store, where the most confident ones come first."""
    if (
        isinstance(examples, ExampleBatch)
        and not any(examples.rows.links)
        and REGION_LABELS.isdisjoint(examples.labels)
    ):
        return
    for example in examples:
        numbered = example.linked_regions is None and any(row.links for row in example.rows)
        if numbered or not REGION_LABELS.isdisjoint(example.labels):
            raise ConfigError(
                f"example {example.id!r} names regions by their number in the store, "
                "but the preset sorts them (region_order='confidence'). Use a preset with region_order='store'."
            )


def _check_images(examples: Sequence[Example], named: Sequence[tuple[str, ...]], spec: InputSpec) -> None:
    """Refuse examples whose images, `named` for each, and rows do not fit together."""
    first, images = examples[0], len(named[0])
    group = len(first.rows)
    joined = group == 1 and images > 1
    if joined and spec.pair != "sequence":
        raise DataError(
            f"example {first.id!r} has {images} images for one row: give one row per image, "
            "or use a preset with pair='sequence'."
        )
    if images not in (1, group) and not joined:
        raise DataError(
            f"example {first.id!r} has {images} images for {group} rows; expected one image in all, or one per row."
        )
    if (odd := next((number for number, own in enumerate(named) if len(own) != images), None)) is not None:
        raise DataError(
            f"example {examples[odd].id!r} has {len(named[odd])} images where others have {images}: "
            "one batch holds one kind of example."
        )


def _gather_images(
    examples: Sequence[Example], image_ids: Sequence[str], store: RegionStore, most: int
) -> tuple[dict[str, NDArray[Any]], Orders]:
    """Regions of the images, and which of them are shown."""
    try:
        order = _choose_regions(examples, image_ids, store, most)
        return gather(store, image_ids, most, order=order), order
    except StoreError as error:
        for example in examples:
            for image in example.images:
                if image not in store:
                    raise StoreError(f"example {example.id!r} needs image {image!r}: {error}") from error
        raise


def _to_unit(boxes: NDArray[np.float32], size: NDArray[np.float32], real: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Pixel corners (S, R, 4) of images of `size` (S, 2) as unit corners of positive area; zeros where not real."""
    unit = boxes / np.tile(size, 2)[:, None]
    np.clip(unit, 0.0, 1.0, out=unit)
    low, high = unit[..., :2], unit[..., 2:]
    np.minimum(low, np.float32(1 - MIN_EXTENT), out=low)
    np.maximum(high, low + np.float32(MIN_EXTENT), out=high)
    unit[~real] = 0
    return unit


def _cut_regions(array: NDArray[Any], real: NDArray[np.bool_]) -> NDArray[Any]:
    """A view of the first regions of (S, R, F), as many as `real` has; those that are not real become zeros."""
    cut = array[:, : real.shape[1]]
    cut[~real] = 0
    return cut


def _join_images(
    boxes: NDArray[Any], features: NDArray[Any], real: NDArray[np.bool_], images: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.int64]]:
    """Regions of `images` consecutive region rows laid one after the other in one row, real ones first; and which image
    each belongs to."""
    counts = real.sum(1).reshape(-1, images)
    ends = counts.cumsum(1)
    most = max(int(ends[:, -1].max()), 1)
    joined_mask = np.arange(most) < ends[:, -1:]
    joined = [np.zeros((len(counts), most, array.shape[2]), array.dtype) for array in (boxes, features)]
    owner = np.zeros(joined_mask.shape, np.int64)
    for row, (own, stops) in enumerate(zip(counts.tolist(), ends.tolist(), strict=True)):
        for image, (count, stop) in enumerate(zip(own, stops, strict=True)):
            for target, array in zip(joined, (boxes, features), strict=True):
                target[row, stop - count : stop] = array[row * images + image, :count]
            owner[row, stop - count : stop] = image
    return joined[0], joined[1], joined_mask, owner
