"""Examples to tensors: padding, masking, boxes in unit corners, labels side by side.

Letters  B batch rows, T tokens, R regions, S region rows, G rows per example, N = B/G examples, P slots, A answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.data.answers import SoftScores
from visling.data.batches.masking import RegionMasking, TokenMasking, mask_rows
from visling.data.batches.pixels import BoxesAlone, Pictures, place, side_by_side
from visling.data.batches.region_order import ByConfidence
from visling.data.batches.region_targets import REGION_TARGETS, Shown, detected, hide_regions, whole_image
from visling.data.text import Tokenizer
from visling.errors import ConfigError, DataError, StoreError, nearest
from visling.regions.store import gather
from visling.types import IGNORE, Batch, Example, InputSpec, Pixels, Regions, RegionStore, Slots, Targets, Text, TextRow

MIN_EXTENT = 1e-5
"""Least width and height of a unit box: a box without area (clipped away, or a line) is widened to it, within the
image."""

SLOT_MULTIPLE = 4
"""Slots per row are padded to a multiple of this, so that batches come in few shapes."""
TAKEN_MULTIPLE = 16
"""Slots of a whole batch that are read are padded to a multiple of this, as far as there are free ones."""

_PER_ROW = frozenset({"matched"})
"""Labels that belong to rows, not to examples."""

_BY_REGION = frozenset({"region_scores", "phrase_boxes", "object_classes"})
"""Labels that count regions as the store does."""

_LABELS = frozenset(field.name for field in dataclasses.fields(Targets)) - {
    "token_slots",
    "token_ids",
    "class_slots",
    "feature_slots",
}


def collate(
    examples: Sequence[Example],
    store: RegionStore | None,
    spec: InputSpec,
    *,
    tokenizer: Tokenizer,
    masking: TokenMasking | None,
    rngs: Sequence[np.random.Generator],
    text_multiple: int = 1,
    region_masking: RegionMasking | None = None,
    needs: Collection[str] = (),
    pool: Sequence[str] = (),
    pictures: Pictures | None = None,
    flip: float = 0.0,
) -> tuple[Batch, Targets]:
    """One batch and its labels, on the CPU.

    Text is padded to the longest row, rounded up to `text_multiple` (never beyond `spec.max_tokens`); regions to the
    most of any image. An image shared by the G rows of an example is given once, with `regions.row`; several images of
    a single row are joined (`spec.pair` "sequence"). Regions come in the order that `spec.region_order` names, and so
    do targets about them. Where text and regions together are longer than `spec.joint_limit`, the longer of them loses
    its end, after masking, as VL-BERT's release does it. A question that was paired with another image (label `matched`
    0) loses its answer.

    Args:
        store: None gives a text-only batch.
        masking: None leaves the text as it is.
        rngs: one generator per example; drawn from first for its pictures, if they are read, then for its text rows and
            its images, if they are masked.
        region_masking: None leaves the regions as they are.
        needs: `Targets` fields that objectives read; those about regions are made only if they are named here.
        pool: image of every training example, for `region_masking.random`.
        pictures: of these images, for models that make features of pixels: hidden regions are cut out of them, stored
            features are not read.
        flip: share of the pictures that are mirrored, boxes and all, texts as they are.
    Raises:
        StoreError: an image is missing (names the example), the store's features have another width than `spec` says,
            or it lacks what a target is made of.
        DataError: examples that do not fit together, a row longer than `spec.max_tokens`, or a picture that is missing,
            damaged or another one.
        ConfigError: a label that `Targets` does not know, region targets or pictures of images that are joined in one
            row, region targets that are not masked, or examples that name regions by number under a preset that sorts
            them.
    """
    if not examples:
        raise DataError("cannot collate zero examples.")
    group = len(examples[0].rows)
    for example in examples:
        if len(example.rows) != group or not group:
            raise DataError(
                f"example {example.id!r} has {len(example.rows)} rows where others have {group}: one batch holds one kind of example."
            )
    rows: Sequence[TextRow] = [row for example in examples for row in example.rows]
    labels = _labels(examples, group)
    mismatched = labels["matched"].numpy() == 0 if "matched" in labels else np.zeros(len(rows), bool)
    if store is not None:
        store = _checked(store, spec) if pictures is None else BoxesAlone(store)
        store = _sorted(store, examples) if spec.region_order == "confidence" else store
    # Drawn first, as the release does it.
    mirrored = [
        pictures is not None and rng.random() < flip
        for example, rng in zip(examples, rngs, strict=True)
        for _ in example.images
    ]
    found = None if store is None else _found(examples, group, store, spec)
    # The cut is known before anything is drawn, and made after it: the releases mask first.
    kept = None if found is None or spec.joint_limit is None else _within(spec.joint_limit, rows, found["mask"].sum(1))
    text, targets, rows = _text(
        examples, rows, spec, tokenizer, masking, rngs, text_multiple, mismatched, None if kept is None else kept[0]
    )
    regions = pixels = None
    if store is not None and found is not None:
        showing = _Showing(
            masking=region_masking,
            needs=REGION_TARGETS.intersection(needs),
            pool=pool,
            pictures=pictures,
            mirrored=mirrored,
        )
        regions, pixels, about = _regions(
            examples, group, store, spec, found, showing, rngs, mismatched, None if kept is None else kept[1]
        )
        targets |= about
    return (
        Batch(
            text=text,
            regions=regions,
            links=_links(rows, text, regions),
            phrases=_phrases(rows),
            pixels=pixels,
            group=group,
        ),
        Targets(**{**targets, **labels}),
    )


def _text(
    examples: Sequence[Example],
    rows: Sequence[TextRow],
    spec: InputSpec,
    tokenizer: Tokenizer,
    masking: TokenMasking | None,
    rngs: Sequence[np.random.Generator],
    multiple: int,
    mismatched: NDArray[np.bool_],
    kept: NDArray[np.int64] | None,
) -> tuple[Text, dict[str, Any], Sequence[TextRow]]:
    """Text, its targets, and the rows as they were laid out, cut to `kept` (B,) pieces."""
    lengths = np.array([len(row.ids) for row in rows])
    longest = int(lengths.max())
    if longest > spec.max_tokens:
        example = examples[int(lengths.argmax()) // len(examples[0].rows)]
        raise DataError(
            f"a row of example {example.id!r} has {longest} pieces, the model takes {spec.max_tokens}: lay it out with TextLayout."
        )
    if masking is None:
        pieces, chosen = np.concatenate([row.ids for row in rows]), np.zeros(int(lengths.sum()), bool)
    else:
        group = len(examples[0].rows)
        pieces, chosen = mask_rows(rows, masking, tokenizer, [rngs[number // group] for number in range(len(rows))])
        if not masking.mismatched:
            chosen &= ~np.repeat(mismatched, lengths)
    if kept is not None:
        stays = np.concatenate([_stays(length, keep) for length, keep in zip(lengths, kept, strict=True)])
        rows = [_cut(row, int(keep)) for row, keep in zip(rows, kept, strict=True)]
        pieces, chosen, lengths, longest = pieces[stays], chosen[stays], kept, int(kept.max())
    width = max(min(-(-longest // multiple) * multiple, spec.max_tokens), longest)
    mask = np.arange(width) < lengths[:, None]
    targets = {} if masking is None else _token_targets(rows, mask, chosen)
    ids = np.full(mask.shape, tokenizer.pad, np.int64)
    ids[mask] = pieces
    segments = np.zeros(mask.shape, np.int64)
    segments[mask] = np.concatenate([row.segments for row in rows])
    answer_at = [row.answer_at for row in rows if row.answer_at is not None]
    if answer_at and len(answer_at) != len(rows):
        raise DataError(
            f"{len(answer_at)} of {len(rows)} rows have an answer slot: one batch holds rows with a slot or rows without."
        )
    return (
        Text(
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            segments=torch.from_numpy(segments),
            answer_at=torch.tensor(answer_at, dtype=torch.int64) if answer_at else None,
        ),
        targets,
        rows,
    )


def _within(
    limit: int, rows: Sequence[TextRow], regions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pieces and regions that each row keeps so that both, with the whole image, are at most `limit`.

    Source:
        VL-BERT release, `conceptual_captions.py`: the longer of the two loses its last element (the text if they are
        equal), text its last but one; at least two pieces and the whole image stay.
    """
    if len(regions) != len(rows):
        raise ConfigError(
            f"joint_limit={limit} bounds one text and one image; found {len(rows)} text rows for {len(regions)} images in a batch."
        )
    if any(row.answer_at is not None for row in rows):
        raise ConfigError(
            f"joint_limit={limit} would cut texts that end in an answer slot. Use a preset without a limit to answer questions."
        )
    pieces, boxes = np.array([len(row.ids) for row in rows]), regions.astype(np.int64) + 1
    for number in range(len(rows)):
        while pieces[number] + boxes[number] > limit and (pieces[number] > 2 or boxes[number] > 1):
            shorten_text = pieces[number] >= boxes[number] and pieces[number] > 2
            if shorten_text or boxes[number] == 1:
                pieces[number] -= 1
            else:
                boxes[number] -= 1
    return pieces, boxes - 1


def _stays(length: int, kept: int) -> NDArray[np.bool_]:
    """(length) which positions of a text are kept: the first ones and the last, its [SEP]."""
    stays = np.arange(length) < kept - 1
    stays[-1] = True
    return stays


def _cut(row: TextRow, kept: int) -> TextRow:
    """The row with its first pieces and its last."""
    if kept == len(row.ids):
        return row
    stays = _stays(len(row.ids), kept)
    return dataclasses.replace(
        row,
        ids=row.ids[stays],
        segments=row.segments[stays],
        words=None if row.words is None else row.words[stays],
        links=tuple(link for link in row.links if link[0] < kept - 1),
        phrases=tuple(at for at in row.phrases if at < kept - 1),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Showing:
    """How regions are shown and what is asked about them."""

    masking: RegionMasking | None
    needs: frozenset[str]
    pool: Sequence[str]
    pictures: Pictures | None
    mirrored: Sequence[bool]
    """Of every image."""


def _checked(store: RegionStore, spec: InputSpec) -> RegionStore:
    """The store, if its features have the width that the model reads."""
    if store.feature_size != spec.feature_size:
        raise StoreError(
            f"the region store holds features of width {store.feature_size}, the model takes {spec.feature_size}. "
            "Use the store of the detector it was trained with, or a preset of this width."
        )
    return store


def _sorted(store: RegionStore, examples: Sequence[Example]) -> RegionStore:
    """The store with the most confident regions first."""
    for example in examples:
        if any(row.links for row in example.rows) or not _BY_REGION.isdisjoint(example.labels):
            raise ConfigError(
                f"example {example.id!r} names regions by their number in the store, but the preset sorts them (region_order='confidence'). "
                "Use a preset with region_order='store'."
            )
    return ByConfidence(store)


def _found(examples: Sequence[Example], group: int, store: RegionStore, spec: InputSpec) -> dict[str, NDArray[Any]]:
    """Regions of all images as `gather` returns them."""
    per_example = len(examples[0].images)
    joined = group == 1 and per_example > 1
    if joined and spec.pair != "sequence":
        raise DataError(
            f"example {examples[0].id!r} has {per_example} images for one row: give one row per image, or use a preset with pair='sequence'."
        )
    if per_example not in (1, group) and not joined:
        raise DataError(
            f"example {examples[0].id!r} has {per_example} images for {group} rows; expected one image in all, or one per row."
        )
    if odd := next((example for example in examples if len(example.images) != per_example), None):
        raise DataError(
            f"example {odd.id!r} has {len(odd.images)} images where others have {per_example}: one batch holds one kind of example."
        )
    return _gather(examples, store, spec.max_regions)


def _regions(
    examples: Sequence[Example],
    group: int,
    store: RegionStore,
    spec: InputSpec,
    found: dict[str, NDArray[Any]],
    showing: _Showing,
    rngs: Sequence[np.random.Generator],
    mismatched: NDArray[np.bool_],
    kept: NDArray[np.int64] | None,
) -> tuple[Regions, Pixels | None, dict[str, Any]]:
    """Regions, what they are cut out of where pictures are read, and their targets, cut to `kept` (S,) regions."""
    per_example = len(examples[0].images)
    joined, shared = group == 1 and per_example > 1, group > 1 and per_example == 1
    if joined and (showing.masking is not None or showing.needs or showing.pictures is not None):
        raise ConfigError(
            "region masking, region targets and pictures need one image per row; here several are joined in one. Use a preset with pair='rows'."
        )
    if showing.masking is None and (asked := sorted(showing.needs - {"region_features"})):
        raise ConfigError(f"targets {', '.join(asked)} are asked for, but no region is masked: give a RegionMasking.")
    features, boxes, real, size = found["features"], found["boxes"], found["mask"], found["size"]
    clean = features.copy() if "region_features" in showing.needs else None
    shown = None
    if showing.masking is not None:
        owners = [rng for rng in rngs for _ in range(per_example)]
        shown = hide_regions(
            features, boxes, real, showing.masking, owners, store=store, pool=showing.pool, max_regions=spec.max_regions
        )
    names = [name for example in examples for name in example.images]
    whole = pixels = None
    if showing.pictures is None:
        whole = _whole(features, real, shown, showing.masking, limited=kept is not None)
        frame = size
    else:
        read = showing.pictures.read(names, showing.mirrored)
        boxes, frame = place(boxes, size, read, showing.mirrored, names)
        # Regions that are left out below leave their hole (release).
        pixels = side_by_side(read, boxes, None if shown is None else shown.hidden)
    # Padded rows hold zeros and stay zeros; only real boxes are widened.
    unit = _unit(boxes, frame, real)
    image = None
    if joined:
        unit, features, real, image = _join(unit, features, real, per_example)
        size = size[::per_example]
    if kept is not None:
        most = max(int(kept.max()), 1)
        real = (np.arange(real.shape[1]) < kept[:, None])[:, :most]
        features, unit = (np.where(real[..., None], array[:, :most], array.dtype.type(0)) for array in (features, unit))
        clean = None if clean is None else np.where(real[..., None], clean[:, :most], clean.dtype.type(0))
    row = np.arange(len(examples)).repeat(group) if shared else None
    regions = Regions(
        features=torch.from_numpy(features),
        boxes=torch.from_numpy(unit),
        mask=torch.from_numpy(real),
        size=torch.from_numpy(np.ascontiguousarray(size)),
        row=None if row is None else torch.from_numpy(row),
        whole=None if whole is None else torch.from_numpy(whole),
        hidden=torch.from_numpy(shown.hidden[:, : real.shape[1]] & real)
        if showing.masking and showing.masking.learned and shown
        else None,
        image=None if image is None else torch.from_numpy(image),
    )
    targets: dict[str, Any] = {}
    if clean is not None:
        targets["region_features"] = torch.from_numpy(clean if row is None else clean[row])
    if shown is not None and showing.masking is not None:
        told = np.ones(len(mismatched), bool) if showing.masking.mismatched else ~mismatched
        chosen = shown.chosen[:, : real.shape[1]] & real
        labelled = real if showing.masking.labels == "all" else chosen
        targets |= _about(showing.needs, store, names, labelled, chosen, told, row)
    return regions, pixels, targets


def _whole(
    features: NDArray[Any],
    real: NDArray[np.bool_],
    shown: Shown | None,
    masking: RegionMasking | None,
    *,
    limited: bool,
) -> NDArray[np.float32] | None:
    """Whole-image features (S, F), unless they are left to the model. A limit cuts regions that the average counts, so
    it is made here."""
    kind = "model" if masking is None else masking.whole
    if kind == "model" and not limited:
        return None
    return whole_image(
        features,
        real,
        shown,
        "unflagged" if kind == "unflagged" else "visible",
        0 if masking is None else masking.whole_slots,
    )


def _about(
    needs: frozenset[str],
    store: RegionStore,
    images: Sequence[str],
    labelled: NDArray[np.bool_],
    chosen: NDArray[np.bool_],
    told: NDArray[np.bool_],
    row: NDArray[np.int64] | None,
) -> dict[str, Any]:
    """Region targets by name, but for the features: `labelled` and `chosen` (S, R) of the rows `told` (B,)."""
    if row is not None:
        labelled, chosen, images = labelled[row], chosen[row], [images[number] for number in row]
    targets: dict[str, Any] = {}
    if "feature_slots" in needs:
        targets["feature_slots"] = _grid_slots(chosen & told[:, None])
    if asked := sorted(needs - {"feature_slots", "region_features"}):
        slots = targets["class_slots"] = _grid_slots(labelled & told[:, None])
        arrays = [store[image] for image in images]
        targets |= {name: detected(name, arrays, slots) for name in asked if name != "class_slots"}
    return targets


def _grid_slots(chosen: NDArray[np.bool_]) -> Slots:
    """Slots of the True positions of (B, N)."""
    return _slots(chosen.sum(1), np.nonzero(chosen)[1])


def _gather(examples: Sequence[Example], store: RegionStore, most: int) -> dict[str, NDArray[Any]]:
    try:
        return gather(store, [image for example in examples for image in example.images], most)
    except StoreError as error:
        for example in examples:
            for image in example.images:
                if image not in store:
                    raise StoreError(f"example {example.id!r} needs image {image!r}: {error}") from error
        raise


def _unit(boxes: NDArray[np.float32], size: NDArray[np.float32], real: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Pixel corners (S, R, 4) of images of `size` (S, 2) as unit corners of positive area; zeros where not real."""
    unit = np.clip(boxes / np.concatenate([size, size], axis=1)[:, None], 0.0, 1.0)
    low = np.minimum(unit[..., :2], np.float32(1 - MIN_EXTENT))
    high = np.maximum(unit[..., 2:], low + np.float32(MIN_EXTENT))
    result: NDArray[np.float32] = np.where(real[..., None], np.concatenate([low, high], axis=-1), np.float32(0))
    return result


def _join(
    boxes: NDArray[Any], features: NDArray[Any], real: NDArray[np.bool_], images: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.int64]]:
    """Regions of `images` consecutive region rows laid one after the other in one row, real ones first; and which image
    each belongs to."""
    counts = real.sum(1).reshape(-1, images)
    most = max(int(counts.sum(1).max()), 1)
    joined_mask = np.arange(most) < counts.sum(1)[:, None]
    joined = []
    for array in (boxes, features, np.broadcast_to((np.arange(len(real)) % images)[:, None], real.shape)):
        # Boolean indexing reads row by row, so the regions of an example arrive in the order of its images.
        target = np.zeros((*joined_mask.shape, *array.shape[2:]), array.dtype)
        target[joined_mask] = array[real]
        joined.append(target)
    return joined[0], joined[1], joined_mask, joined[2].astype(np.int64)


def _token_targets(rows: Sequence[TextRow], mask: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """Slots of the chosen pieces and what stood there; `chosen` runs over the real pieces of (B, T)."""
    grid = np.zeros(mask.shape, bool)
    grid[mask] = chosen
    slots = _grid_slots(grid)
    original = np.zeros(slots.mask.shape, np.int64)
    original[slots.mask.numpy()] = np.concatenate([row.ids for row in rows])[chosen]
    return {"token_slots": slots, "token_ids": torch.from_numpy(original)}


def _slots(counts: NDArray[np.int64], positions: NDArray[np.int64]) -> Slots:
    """`counts` (B,) of the positions of all rows, one after the other, padded to a common, rounded width."""
    width = -(-max(int(counts.max()), 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE
    mask = np.arange(width) < counts[:, None]
    at = np.zeros(mask.shape, np.int64)
    at[mask] = positions
    most = -(-max(int(counts.sum()), 1) // TAKEN_MULTIPLE) * TAKEN_MULTIPLE
    taken = np.concatenate([np.flatnonzero(mask), np.flatnonzero(~mask)])[:most]
    return Slots(at=torch.from_numpy(at), mask=torch.from_numpy(mask), taken=torch.from_numpy(taken))


def _phrases(rows: Sequence[TextRow]) -> Slots | None:
    positions = [position for row in rows for position in row.phrases]
    return (
        _slots(np.array([len(row.phrases) for row in rows]), np.array(positions, dtype=np.int64)) if positions else None
    )


def _links(rows: Sequence[TextRow], text: Text, regions: Regions | None) -> Tensor | None:
    """(B, T, R); links to regions beyond those of the batch are left out."""
    if regions is None or not any(row.links for row in rows):
        return None
    mask = regions.mask if regions.row is None else regions.mask[regions.row]
    links = torch.zeros((*text.mask.shape, mask.shape[1]), dtype=torch.bool)
    for number, row in enumerate(rows):
        for token, region in row.links:
            if token < len(row.ids) and region < mask.shape[1]:
                links[number, token, region] = mask[number, region]
    return links


def _labels(examples: Sequence[Example], group: int) -> dict[str, Any]:
    """Labels by `Targets` name; an integer label that some examples lack is IGNORE there."""
    names = dict.fromkeys(name for example in examples for name in example.labels)
    labels = {}
    for name in names:
        if name not in _LABELS:
            raise ConfigError(
                f"label {name!r} of example {examples[0].id!r} is not a field of Targets. {nearest(name, _LABELS)}"
            )
        values = [example.labels.get(name) for example in examples]
        if name in _PER_ROW and group > 1:
            values = [
                item
                for value in values
                for item in (value if isinstance(value, (Sequence, np.ndarray)) else [value] * group)
            ]
        labels[name] = _stack(name, values, examples)
    if group == 1 and "matched" in labels and "answer" in labels and labels["answer"].dim() == 1:
        labels["answer"] = labels["answer"].masked_fill(labels["matched"] == 0, IGNORE)
    return labels


def _stack(name: str, values: Sequence[Any], examples: Sequence[Example]) -> Tensor:
    given = next(value for value in values if value is not None)
    if isinstance(given, (int, np.integer, np.bool_)):
        return torch.tensor([IGNORE if value is None else int(value) for value in values], dtype=torch.int64)
    if lacking := [number for number, value in enumerate(values) if value is None]:
        raise DataError(
            f"example {examples[lacking[0]].id!r} lacks the label {name!r} that others of its batch have; only integer labels may be left out."
        )
    if isinstance(given, (float, np.floating)):
        return torch.tensor(values, dtype=torch.float32)
    if isinstance(given, SoftScores):
        dense = np.zeros((len(values), given.size), np.float32)
        at = np.repeat(np.arange(len(values)), [len(value.indices) for value in values])
        dense[at, np.concatenate([value.indices for value in values])] = np.concatenate(
            [value.scores for value in values]
        )
        return torch.from_numpy(dense)
    return _stack_arrays([np.asarray(value) for value in values])


def _stack_arrays(arrays: Sequence[NDArray[Any]]) -> Tensor:
    """Arrays side by side, the shorter padded: integers with IGNORE, others with zero."""
    integers = np.issubdtype(arrays[0].dtype, np.integer)
    shape = np.max([array.shape for array in arrays], axis=0)
    full = np.full((len(arrays), *shape), IGNORE if integers else 0, np.int64 if integers else np.float32)
    for number, array in enumerate(arrays):
        full[number][tuple(slice(length) for length in array.shape)] = array
    return torch.from_numpy(full)
