"""The native region store: detector features of many images in a few memory-mapped files.

A store is a folder:

    manifest.json               schema, detector fingerprint, widths, names, settings, counts, size and SHA-256 of files
    index.safetensors           image ids (sorted), first global row and row count of each image, image sizes
    shard-00000.safetensors     features (rows, F), boxes (rows, 4) in pixels; optional classes, attributes, confidences
                                and class distributions

While it is being written it holds `shard-N.<field>.part` files, which only grow, and `journal.jsonl`, one line per
commit: whatever an interruption leaves beyond the last commit is cut off when writing resumes.

Letters  R regions of an image, F feature width, K attributes kept per region, C detector classes, S images asked for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from visling import damage
from visling.errors import StoreError
from visling.feature_kinds import KINDS, name_today
from visling.image_ids import Aliases
from visling.regions.files import (
    DETECTOR,
    Field,
    Placement,
    decode_ids,
    explain_store,
    hash_file,
    load_rows,
    locate_file,
    read_manifest,
    read_tensors,
)
from visling.regions.validating import check_index, check_manifest, check_shards
from visling.types import RegionArray, RegionStore

Orders = Sequence[NDArray[np.int64] | None] | None
"""For each of several images, numbers of the regions that are shown, as they are shown; None = all, as they are."""

_SCAN_BYTES = 1 << 25
"""Read at a time by a scan."""


class NativeStore:
    """A finished store, memory-mapped; opening it reads the manifest and the index only. Comes from `open` or
    `StoreWriter.close`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.feature_size = int(manifest["feature_size"])
        self.fingerprint = str(manifest["fingerprint"])
        self.class_names = tuple(manifest["class_names"])
        self.attribute_names = tuple(manifest["attribute_names"])
        self.settings: Mapping[str, Any] = manifest["settings"]
        named = name_today(self.fingerprint)
        self.kind = str(self.settings.get("features", named if named in KINDS else ""))
        """Kind of the features in `feature_kinds`; empty if it is of none, or not known."""
        self.fields = {name: Field(**field) for name, field in manifest["fields"].items()}
        index = read_tensors(path / manifest["index"]["file"])
        self.ids: list[str] = decode_ids(index["ids"])
        """Sorted image ids."""
        self._starts, self._counts, self._sizes = index["starts"], index["counts"], index["sizes"]
        self.shard_starts = [int(shard["first_row"]) for shard in manifest["shards"]]
        """First global row of every shard."""
        self._shards = [read_tensors(path / shard["file"]) for shard in manifest["shards"]]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The store in a folder. Its index is compared with its digest; the shards only by `check`, which reads all of
        them.

        Raises:
            StoreError: no store there, an unfinished or damaged one, or one of another schema.
        """
        path = Path(path)
        manifest = read_manifest(path)
        try:
            check_manifest(manifest)
        except damage.LAYOUT as error:
            raise explain_store(path, error) from error
        for entry in (manifest["index"], *manifest["shards"]):
            file = locate_file(path, entry)
            if not file.is_file():
                raise StoreError(
                    f"region store {path} lacks {entry['file']}, which its manifest lists. "
                    "Copy the folder again or repeat the extraction."
                )
            if (size := file.stat().st_size) != entry["bytes"]:
                raise StoreError(
                    f"{file} is {'truncated' if size < entry['bytes'] else 'too long'}: found {size} bytes, "
                    f"expected {entry['bytes']}. Copy the file again or repeat the extraction."
                )
        if (problem := _describe_damage(path, manifest["index"])) is not None:
            raise StoreError(problem)
        try:
            store = cls(path, manifest)
            check_shards(store.fields, manifest["shards"], store._shards)
            check_index(store.ids, store._starts, store._counts, store._sizes, store.shard_starts, manifest["regions"])
        except StoreError:
            raise
        except damage.LAYOUT as error:
            raise explain_store(path, error) from error
        return store

    @cached_property
    def _position(self) -> dict[str, int]:
        """Image id -> its place in the index."""
        return {image_id: number for number, image_id in enumerate(self.ids)}

    @cached_property
    def _aliases(self) -> Aliases:
        return Aliases(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._position or (
            isinstance(image_id, (str, int)) and self._aliases.find(image_id) is not None
        )

    def __getitem__(self, image_id: str) -> RegionArray:
        """Regions of one image as views of the files, found by its exact id or by an alias that is unique here.

        Raises:
            StoreError: no such image, or an alias of several.
        """
        number = self._locate(image_id)
        start, count = int(self._starts[number]), int(self._counts[number])
        width, height = self._sizes[number]
        fields = {name: self._read_rows(name, start, count) for name in self.fields}
        return RegionArray(size=(int(width), int(height)), **fields)

    def count(self, image_id: str) -> int:
        """Number of regions of one image."""
        return int(self._counts[self._locate(image_id)])

    def resolve(self, image_id: str) -> str:
        """The id under which an image is stored, found by its exact id or by an alias that is unique here.

        Raises:
            StoreError: no such image, or an alias of several.
        """
        return self.ids[self._locate(image_id)]

    def find_detector(self) -> Path | None:
        """Folder of the detector that computed the features: the one in the store, which moves with it, or the one that
        was used; None if neither is there."""
        places = [self.path / DETECTOR]
        if (used := self.settings.get("detector")) is not None:
            places.append(Path(used))
        return next((place for place in places if place.is_dir()), None)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of regions of every image, in the order of `ids`."""
        return np.asarray(self._counts)

    def placements(self) -> Iterator[tuple[str, Placement]]:
        """Where the regions of every image lie, in the order of the rows."""
        for number in np.lexsort((self._counts, self._starts)).tolist():  # an image without regions takes no row
            width, height = self._sizes[number].tolist()
            yield self.ids[number], Placement(int(self._starts[number]), int(self._counts[number]), width, height)

    def scan(self, image_ids: Iterable[str] | None = None) -> Iterator[tuple[str, RegionArray]]:
        """Images with their regions in the order of the rows, read in large pieces: whatever the store's size, a scan
        needs little memory.

        Args:
            image_ids: exact ids; None = all.
        """
        chosen = range(len(self)) if image_ids is None else [self._position[name] for name in image_ids]
        numbers = np.array(chosen, np.int64)
        numbers = numbers[np.lexsort((self._counts[numbers], self._starts[numbers]))]
        starts, counts = self._starts[numbers], self._counts[numbers]
        shards, _ = self._place_rows(starts)
        most = max(_SCAN_BYTES // sum(field.row_bytes for field in self.fields.values()), 1)
        first = 0
        while first < len(numbers):
            last, end = first + 1, int(starts[first] + counts[first])
            while (
                last < len(numbers)
                and shards[last] == shards[first]
                and starts[last] == end
                and starts[last] + counts[last] - starts[first] <= most
            ):
                end += int(counts[last])
                last += 1
            rows = self._load_rows(int(shards[first]), int(starts[first]), end)
            for number in numbers[first:last].tolist():
                low = int(self._starts[number] - starts[first])
                high = low + int(self._counts[number])
                width, height = self._sizes[number].tolist()
                yield (
                    self.ids[number],
                    RegionArray(size=(width, height), **{name: array[low:high] for name, array in rows.items()}),
                )
            first = last

    def gather(
        self,
        image_ids: Sequence[str],
        max_regions: int | None = None,
        *,
        order: Orders = None,
        buffer: NDArray[Any] | None = None,
        numbered: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """First regions of several images, padded with zeros, each copied once out of the mapped files.

        Args:
            max_regions: most regions per image; None for all.
            order: see `gather`.
            buffer: flat array of the store's feature type that receives the features if it is large enough; its
                content is overwritten.
            numbered: leave the features where they are and return the number of each one's row in the store instead,
                (S, R, 1), counted from 1; 0 is padding.
        Returns:
            features (S, R, F); boxes (S, R, 4) in pixels; mask (S, R), True = real; size (S, 2) image width and height;
            R is the longest count, at least 1.
        Raises:
            StoreError: an image is not in the store.
        """
        numbers = self._locate_all(image_ids)
        counts = _count_shown(self._counts[numbers], max_regions, order)
        most = max(int(counts.max(initial=0)), 1)
        boxes, mask = np.empty((len(numbers), most, 4), np.float32), np.arange(most) < counts[:, None]
        self._copy_images("boxes", numbers, counts, order, boxes)
        if numbered:
            features = np.zeros((len(numbers), most, 1), np.int64)
            features[mask, 0] = self._list_rows(numbers, counts, order) + 1
        else:
            features = _fit_buffer(buffer, (len(numbers), most, self.feature_size), self.fields["features"].dtype)
            self._copy_images("features", numbers, counts, order, features)
        return {"features": features, "boxes": boxes, "mask": mask, "size": self._sizes[numbers].astype(np.float32)}

    def take(
        self, field: str, image_ids: Sequence[str], owners: NDArray[np.int64], regions: NDArray[np.int64]
    ) -> NDArray[Any] | None:
        """See `take`."""
        if field not in self.fields:
            return None
        rows = self.number_rows(image_ids, owners, regions)
        shards, first = self._place_rows(rows)
        taken = np.empty(self.fields[field].shape(len(rows)), self.fields[field].dtype)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            taken[here] = self._shards[shard][field][first[here]]
        return taken

    def number_rows(
        self, image_ids: Sequence[str], owners: NDArray[np.int64], regions: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """(N,) global row of region `regions[k]` of image `image_ids[owners[k]]`."""
        rows: NDArray[np.int64] = self._starts[self._locate_all(image_ids)][owners] + regions
        return rows

    def feature_blocks(self, most_bytes: int) -> Iterator[NDArray[Any]]:
        """The features of all regions in the order of the rows, (rows, F), read in pieces."""
        step = max(most_bytes // self.fields["features"].row_bytes, 1)
        for entry in self.manifest["shards"]:
            for first in range(0, int(entry["rows"]), step):
                yield load_rows(self.path / entry["file"], "features", first, min(step, int(entry["rows"]) - first))

    def count_regions(self, image_ids: Sequence[str]) -> NDArray[np.int64]:
        """See `count_regions`."""
        return np.asarray(self._counts[self._locate_all(image_ids)])

    def highest(self, field: str) -> tuple[str, int] | None:
        """The highest label in a field of labels (the first one of each region) and the image that has it; None
        without regions."""
        best: tuple[int, int] | None = None
        for first, shard in zip(self.shard_starts, self._shards, strict=True):
            values = shard[field] if shard[field].ndim == 1 else shard[field][:, 0]
            if len(values) and (best is None or int(values.max()) > best[1]):
                best = first + int(values.argmax()), int(values.max())
        if best is None:
            return None
        owner = np.flatnonzero((self._starts <= best[0]) & (best[0] < self._starts + self._counts))[0]
        return self.ids[int(owner)], best[1]

    def damaged_files(self) -> Iterator[tuple[str, str]]:
        """Name of every file whose SHA-256 is not that of the manifest, and what to do; reads all of them."""
        for entry in (self.manifest["index"], *self.manifest["shards"]):
            if (problem := _describe_damage(self.path, entry)) is not None:
                yield entry["file"], problem

    def check(self) -> None:
        """Read every file and compare its SHA-256 with the manifest.

        Raises:
            StoreError: a file differs; names it.
        """
        for _, what in self.damaged_files():
            raise StoreError(what)

    def _locate(self, image_id: str) -> int:
        """Position of an image in the index."""
        number = self._position.get(image_id)
        if number is None:
            stored_id = self._aliases.find(image_id)
            if stored_id is None:
                raise StoreError(self._explain_missing(image_id))
            number = self._position[stored_id]
        return number

    def _explain_missing(self, image_id: str) -> str:
        candidates = self._aliases.candidates(image_id)
        if candidates:
            return (
                f"image {image_id!r} is ambiguous in region store {self.path}: it may be "
                f"{', '.join(map(repr, candidates))}. Give the full id."
            )
        at = bisect_left(self.ids, str(image_id))
        near = ", ".join(repr(stored_id) for stored_id in self.ids[max(at - 1, 0) : at + 1])
        return (
            f"image {image_id!r} is not in region store {self.path} ({len(self)} images; "
            f"nearest ids: {near or 'none'}). "
            "Extract its regions, or check that annotations and store belong to the same data set."
        )

    def _locate_all(self, image_ids: Sequence[str]) -> NDArray[np.int64]:
        """Positions of images in the index."""
        return np.fromiter(map(self._locate, image_ids), np.int64, len(image_ids))

    def _copy_images(
        self,
        name: str,
        numbers: NDArray[np.int64],
        counts: NDArray[np.int64],
        order: Orders,
        out: NDArray[Any],
    ) -> None:
        """Copy the first `counts` regions of images, by their positions in the index, to `out` (S, R, ...), zeros
        behind them."""
        arrays = [shard[name] for shard in self._shards]
        shards, first = self._place_rows(self._starts[numbers])
        # The regions of an image lie side by side in one shard: a slice is copied faster than single rows are.
        for row, (shard, low, count) in enumerate(zip(shards.tolist(), first.tolist(), counts.tolist(), strict=True)):
            chosen = None if order is None else order[row]
            if chosen is not None and count:
                np.take(arrays[shard], low + chosen[:count], axis=0, out=out[row, :count], mode="clip")
            elif count:
                out[row, :count] = arrays[shard][low : low + count]
            if count < out.shape[1]:
                out[row, count:] = 0

    def _list_rows(self, numbers: NDArray[np.int64], counts: NDArray[np.int64], order: Orders) -> NDArray[np.int64]:
        """Global rows of the first `counts` regions of images, one image after the other."""
        if order is None:
            within = np.concatenate([np.arange(count) for count in counts.tolist()] or [np.empty(0, np.int64)])
        else:
            pairs = zip(order, counts.tolist(), strict=True)
            within = np.concatenate([np.arange(count) if own is None else own[:count] for own, count in pairs])
        rows: NDArray[np.int64] = np.repeat(self._starts[numbers], counts) + within
        return rows

    def _place_rows(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard that holds each of these global rows, and the row within it."""
        firsts = np.array(self.shard_starts or [0], np.int64)
        shards = np.searchsorted(firsts, rows, side="right") - 1
        return shards, rows - firsts[shards]

    def _read_rows(self, name: str, start: int, count: int) -> NDArray[Any]:
        """View of the global rows of one field that belong to one image."""
        if not count:
            return np.empty(self.fields[name].shape(0), self.fields[name].dtype)
        shard = bisect_right(self.shard_starts, start) - 1
        first = start - self.shard_starts[shard]
        return self._shards[shard][name][first : first + count]

    def _load_rows(self, shard: int, start: int, end: int) -> dict[str, NDArray[Any]]:
        """Global rows from `start` up to `end` of all fields, which lie in one shard."""
        if start == end:
            return {name: np.empty(field.shape(0), field.dtype) for name, field in self.fields.items()}
        file = self.path / self.manifest["shards"][shard]["file"]
        first = start - self.shard_starts[shard]
        return {name: load_rows(file, name, first, end - start) for name in self.fields}


def gather(
    store: RegionStore, image_ids: Sequence[str], max_regions: int | None = None, *, order: Orders = None
) -> dict[str, NDArray[Any]]:
    """`NativeStore.gather` for any store: by its own method if it has one, else image by image.

    Args:
        order: numbers of the regions that are shown of each image, as they are shown; None = all as they are stored.
    """
    own = getattr(store, "gather", None)
    if own is not None:
        gathered: dict[str, NDArray[Any]] = own(image_ids, max_regions, order=order)
        return gathered
    images = [store[image_id] for image_id in image_ids]
    counts = _count_shown(np.array([len(image) for image in images], np.int64), max_regions, order)
    most = max(int(counts.max(initial=0)), 1)
    dtype = images[0].features.dtype if images else np.dtype(np.float16)
    features = np.zeros((len(images), most, store.feature_size), dtype)
    boxes = np.zeros((len(images), most, 4), np.float32)
    for row, (image, count) in enumerate(zip(images, counts.tolist(), strict=True)):
        chosen = None if order is None else order[row]
        shown = slice(count) if chosen is None else chosen[:count]
        features[row, :count], boxes[row, :count] = image.features[shown], image.boxes[shown]
    size = np.array([image.size for image in images], dtype=np.float32).reshape(len(images), 2)
    return {"features": features, "boxes": boxes, "mask": np.arange(most) < counts[:, None], "size": size}


def take(
    store: RegionStore, field: str, image_ids: Sequence[str], owners: NDArray[np.int64], regions: NDArray[np.int64]
) -> NDArray[Any] | None:
    """A field of single regions: of region `regions[k]` of image `image_ids[owners[k]]`, for all k (N) at once.

    Returns:
        (N, ...) as the store has it; None if it lacks the field.
    """
    own = getattr(store, "take", None)
    if own is not None:
        taken: NDArray[Any] | None = own(field, image_ids, owners, regions)
        return taken
    arrays = [getattr(store[image_id], field) for image_id in image_ids]
    if any(array is None for array in arrays):
        return None
    values = [arrays[owner][region] for owner, region in zip(owners.tolist(), regions.tolist(), strict=True)]
    return np.stack(values) if values else np.empty((0, *arrays[0].shape[1:]), arrays[0].dtype)


def count_regions(store: RegionStore, image_ids: Sequence[str]) -> NDArray[np.int64]:
    """(N,) number of regions of each image, without reading them if the store knows it."""
    own = getattr(store, "count_regions", None)
    if own is not None:
        counts: NDArray[np.int64] = own(image_ids)
        return counts
    return np.array([len(store[image_id]) for image_id in image_ids], np.int64)


def _describe_damage(path: Path, entry: Mapping[str, Any]) -> str | None:
    """What to do about a file of the store in a folder whose SHA-256 is not that of its entry in the manifest."""
    digest = hash_file(path / entry["file"])
    if digest == entry["sha256"]:
        return None
    return (
        f"{path / entry['file']} is damaged: SHA-256 {digest[:16]}..., expected {entry['sha256'][:16]}.... Copy the "
        "file again or repeat the extraction."
    )


def _fit_buffer(buffer: NDArray[Any] | None, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """The front of a flat buffer in this shape, if it has the type and is large enough; else new memory."""
    size = int(np.prod(shape))
    if buffer is not None and buffer.dtype == dtype and buffer.size >= size:
        return buffer.reshape(-1)[:size].reshape(shape)
    return np.empty(shape, dtype)


def _count_shown(stored: NDArray[np.int64], max_regions: int | None, order: Orders) -> NDArray[np.int64]:
    """Regions that are shown of each image."""
    counts = stored
    if order is not None:
        listed = [count if own is None else len(own) for count, own in zip(stored.tolist(), order, strict=True)]
        counts = np.array(listed, np.int64)
    return counts if max_regions is None else np.minimum(counts, max_regions)
