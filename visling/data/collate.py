"""Examples to tensors: padding, masking, boxes in unit corners, labels side by side.

Letters  B batch rows, T tokens, R regions, S region rows, G rows per example, N = B/G examples, P slots, A answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.data.answers import SoftScores
from visling.data.masking import TokenMasking, mask_rows
from visling.data.store import gather
from visling.data.text import Tokenizer
from visling.errors import ConfigError, DataError, StoreError, nearest
from visling.types import IGNORE, Batch, Example, InputSpec, Regions, RegionStore, Slots, Targets, Text, TextRow

MIN_EXTENT = 1e-5
"""Least width and height of a unit box: a box without area (clipped away, or a line) is widened to it, within the image."""

SLOT_MULTIPLE = 4
"""Slots per row are padded to a multiple of this, so that batches come in few shapes."""

_PER_ROW = frozenset({"matched"})
"""Labels that belong to rows, not to examples."""

_LABELS = frozenset(field.name for field in dataclasses.fields(Targets)) - {"token_slots", "token_ids", "class_slots", "feature_slots"}


def collate(
    examples: Sequence[Example],
    store: RegionStore | None,
    spec: InputSpec,
    *,
    tokenizer: Tokenizer,
    masking: TokenMasking | None,
    rngs: Sequence[np.random.Generator],
    text_multiple: int = 1,
) -> tuple[Batch, Targets]:
    """One batch and its labels, on the CPU.

    Text is padded to the longest row, rounded up to `text_multiple` (never beyond `spec.max_tokens`); regions to the most of any image. An image
    shared by the G rows of an example is given once, with `regions.row`; several images of a single row are joined (`spec.pair` "sequence").

    Args:
        store: None gives a text-only batch.
        masking: None leaves the text as it is.
        rngs: one generator per example; drawn from only if `masking` is given.
    Raises:
        StoreError: an image is missing (names the example), or the store's features have another width than `spec` says.
        DataError: examples that do not fit together, or a row longer than `spec.max_tokens`.
        ConfigError: a label that `Targets` does not know, or a limit that this function does not apply.
    """
    if not examples:
        raise DataError("cannot collate zero examples.")
    group = len(examples[0].rows)
    for example in examples:
        if len(example.rows) != group or not group:
            raise DataError(f"example {example.id!r} has {len(example.rows)} rows where others have {group}: one batch holds one kind of example.")
    rows = [row for example in examples for row in example.rows]
    text, token_targets = _text(examples, rows, spec, tokenizer, masking, rngs, text_multiple)
    regions = None if store is None else _regions(examples, group, store, spec)
    return (
        Batch(text=text, regions=regions, links=_links(rows, text, regions), phrases=_phrases(rows), group=group),
        Targets(**token_targets, **_labels(examples, group)),
    )


def _text(
    examples: Sequence[Example],
    rows: Sequence[TextRow],
    spec: InputSpec,
    tokenizer: Tokenizer,
    masking: TokenMasking | None,
    rngs: Sequence[np.random.Generator],
    multiple: int,
) -> tuple[Text, dict[str, Any]]:
    lengths = np.array([len(row.ids) for row in rows])
    longest = int(lengths.max())
    if longest > spec.max_tokens:
        example = examples[int(lengths.argmax()) // len(examples[0].rows)]
        raise DataError(f"a row of example {example.id!r} has {longest} pieces, the model takes {spec.max_tokens}: lay it out with TextLayout.")
    width = max(min(-(-longest // multiple) * multiple, spec.max_tokens), longest)
    mask = np.arange(width) < lengths[:, None]
    targets: dict[str, Any] = {}
    if masking is None:
        pieces = np.concatenate([row.ids for row in rows])
    else:
        group = len(examples[0].rows)
        pieces, chosen = mask_rows(rows, masking, tokenizer, [rngs[number // group] for number in range(len(rows))])
        targets = _token_targets(rows, mask, chosen)
    ids = np.full(mask.shape, tokenizer.pad, np.int64)
    ids[mask] = pieces
    segments = np.zeros(mask.shape, np.int64)
    segments[mask] = np.concatenate([row.segments for row in rows])
    slot_at = [row.slot for row in rows if row.slot is not None]
    if slot_at and len(slot_at) != len(rows):
        raise DataError(f"{len(slot_at)} of {len(rows)} rows have an answer slot: one batch holds rows with a slot or rows without.")
    return (
        Text(
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            segments=torch.from_numpy(segments),
            slot=torch.tensor(slot_at, dtype=torch.int64) if slot_at else None,
        ),
        targets,
    )


def _regions(examples: Sequence[Example], group: int, store: RegionStore, spec: InputSpec) -> Regions:
    if store.feature_size != spec.feature_size:
        raise StoreError(
            f"the region store holds features of width {store.feature_size}, the model takes {spec.feature_size}. "
            "Use the store of the detector it was trained with, or a preset of this width."
        )
    if spec.joint_limit is not None:
        raise ConfigError(
            f"joint_limit={spec.joint_limit} is not applied by collate: use max_tokens and max_regions, which bound text and regions apart."
        )
    per_example = len(examples[0].images)
    joined = group == 1 and per_example > 1
    if joined and spec.pair != "sequence":
        raise DataError(
            f"example {examples[0].id!r} has {per_example} images for one row: give one row per image, or use a preset with pair='sequence'."
        )
    if per_example not in (1, group) and not joined:
        raise DataError(f"example {examples[0].id!r} has {per_example} images for {group} rows; expected one image in all, or one per row.")
    if odd := next((example for example in examples if len(example.images) != per_example), None):
        raise DataError(f"example {odd.id!r} has {len(odd.images)} images where others have {per_example}: one batch holds one kind of example.")
    found = _gather(examples, store, spec.max_regions)
    # Padded rows hold zeros and stay zeros; only real boxes are widened.
    real = found["mask"]
    boxes = _unit(found["boxes"], found["size"], real)
    image = None
    if joined:
        boxes, features, real, image = _join(boxes, found["features"], real, per_example)
        size = found["size"][::per_example]
    else:
        features, size = found["features"], found["size"]
    shared = group > 1 and per_example == 1
    return Regions(
        features=torch.from_numpy(features),
        boxes=torch.from_numpy(boxes),
        mask=torch.from_numpy(real),
        size=torch.from_numpy(np.ascontiguousarray(size)),
        row=torch.arange(len(examples)).repeat_interleave(group) if shared else None,
        image=None if image is None else torch.from_numpy(image),
    )


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
    """Regions of `images` consecutive region rows laid one after the other in one row, real ones first; and which image each belongs to."""
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
    slots = _slots(grid.sum(1), np.nonzero(grid)[1])
    original = np.zeros(slots.mask.shape, np.int64)
    original[slots.mask.numpy()] = np.concatenate([row.ids for row in rows])[chosen]
    return {"token_slots": slots, "token_ids": torch.from_numpy(original)}


def _slots(counts: NDArray[np.int64], positions: NDArray[np.int64]) -> Slots:
    """`counts` (B,) of the positions of all rows, one after the other, padded to a common, rounded width."""
    width = -(-max(int(counts.max()), 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE
    mask = np.arange(width) < counts[:, None]
    at = np.zeros(mask.shape, np.int64)
    at[mask] = positions
    return Slots(at=torch.from_numpy(at), mask=torch.from_numpy(mask))


def _phrases(rows: Sequence[TextRow]) -> Slots | None:
    positions = [position for row in rows for position in row.phrases]
    return _slots(np.array([len(row.phrases) for row in rows]), np.array(positions, dtype=np.int64)) if positions else None


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
            raise ConfigError(f"label {name!r} of example {examples[0].id!r} is not a field of Targets. {nearest(name, _LABELS)}")
        values = [example.labels.get(name) for example in examples]
        if name in _PER_ROW and group > 1:
            values = [item for value in values for item in (value if isinstance(value, (Sequence, np.ndarray)) else [value] * group)]
        labels[name] = _stack(name, values, examples)
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
        dense[at, np.concatenate([value.indices for value in values])] = np.concatenate([value.scores for value in values])
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
