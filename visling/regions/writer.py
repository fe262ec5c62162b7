"""Writing a region store: journaled, resumable, with a digest per shard; subsets and merged stores."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np
from numpy.typing import NDArray

from visling.errors import BoxError, StoreError
from visling.regions.files import (
    BOXES,
    CHUNK,
    FORMAT,
    HEADER,
    SCHEMA,
    Field,
    describe_file,
    journal_line,
    plain_field,
    read_journal,
    read_tensors,
    tensor_entry,
    tensor_metadata,
    write_tensor_file,
    write_whole,
)
from visling.regions.store import NativeStore
from visling.types import RegionArray

_OPTIONAL = {
    "classes": "int16",
    "class_confidence": "float16",
    "attributes": "int16",
    "attribute_confidence": "float16",
    "probs": "float16",
}
"""Optional fields and how they are stored."""


class StoreWriter:
    """Writes a store image by image; survives interruption.

    Used as a context manager it closes the store on success and leaves a resumable folder on an exception. Until an
    image is added nothing is written: a finished store stays finished, an empty folder stays empty.

    Args:
        fingerprint: identity of the detector that makes the features.
        dtype: how features are stored.
        settings: how the features were made, for a reader of the manifest; plain JSON values. They must be the same on
            resuming.
        may_differ: names of settings that may be others on resuming; those of the first run stay.
        resume: go on after the last committed batch of an unfinished store, or add images to a finished one.
        shard_bytes: size at which a new shard is begun.
    Raises:
        StoreError: the folder holds a store and `resume` is False, or holds one of other features.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        feature_size: int,
        fingerprint: str,
        class_names: Sequence[str] = (),
        attribute_names: Sequence[str] = (),
        dtype: Literal["float16", "float32"] = "float16",
        settings: Mapping[str, Any] | None = None,
        may_differ: Sequence[str] = (),
        resume: bool = False,
        shard_bytes: int = 2_000_000_000,
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise StoreError(f"features are stored as float16 or float32; found {dtype!r}.")
        self.path = Path(path)
        self._shard_bytes = shard_bytes
        self._may_differ = frozenset(may_differ)
        self._header: dict[str, Any] = {
            "format": FORMAT,
            "schema": SCHEMA,
            "fingerprint": fingerprint,
            "feature_size": feature_size,
            "dtype": dtype,
            "class_names": list(class_names),
            "attribute_names": list(attribute_names),
            "settings": json.loads(json.dumps(dict(settings or {}))),
        }
        self._fields: dict[str, Field] | None = None
        self._images: dict[str, tuple[int, int, int, int]] = {}
        """Image id -> first global row, count, width, height, in the order of writing."""
        self._pending: list[str] = []
        self._rows = 0
        self._closed_shards: list[int] = []
        """First global row of every closed shard."""
        self._shard_start = 0
        self._files: dict[str, BinaryIO] = {}
        self._finished = False
        """Whether the folder holds a finished store to which nothing has been added yet."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._begin(resume)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._images

    def __len__(self) -> int:
        return len(self._images)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.suspend()

    def add(self, image_id: str, regions: RegionArray) -> None:
        """Append the regions of one image; durable after the next `commit`.

        Raises:
            StoreError: the image is there already, or its arrays differ in width, length or fields from what the store
                holds.
            BoxError: a box that is not pixel corners, or an image without size.
        """
        if image_id in self._images:
            raise StoreError(f"image {image_id!r} is already in region store {self.path}; every image is stored once.")
        if not image_id or "\n" in image_id:
            raise StoreError(f"{image_id!r} cannot be an image id: it must be non-empty and without line breaks.")
        arrays = self._arrays(image_id, regions)
        count = len(regions)
        fields = self._fields or self._layout(arrays)
        rows = to_stored(image_id, arrays, count, fields) if count else {}
        self._open_journal()
        if count:
            if self._fields is None:
                self._fields = fields
                self._append_journal({"fields": {name: plain_field(field) for name, field in fields.items()}})
            if (
                self._rows > self._shard_start
                and (self._rows + count - self._shard_start) * self._bytes_per_row() > self._shard_bytes
            ):
                self.commit()
                self._close_shard()
            for name, array in rows.items():
                self._part(name).write(array.tobytes())
        self._images[image_id] = (self._rows, count, *regions.size)
        self._pending.append(image_id)
        self._rows += count

    def commit(self) -> None:
        """Make everything added so far durable: an interruption from here on loses nothing of it."""
        if not self._pending:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._append_journal({"images": [[image_id, *self._images[image_id]] for image_id in self._pending]})
        self._pending = []

    def suspend(self) -> None:
        """Commit and let go of the files, leaving a folder that `resume` takes up again."""
        self.commit()
        self._close_files()

    def close(self) -> NativeStore:
        """Finish the store and open it."""
        if self._finished:
            return NativeStore.open(self.path)
        self.commit()
        if self._fields is None:
            self._fields = self._layout({})
        if self._rows > self._shard_start:
            self._close_shard()
        ids = sorted(self._images)
        table = np.array([self._images[image_id] for image_id in ids], dtype=np.int64).reshape(len(ids), 4)
        index: dict[str, NDArray[Any]] = {
            "starts": table[:, 0],
            "counts": table[:, 1],
            "sizes": table[:, 2:].astype(np.int32),
            "ids": np.frombuffer("\n".join(ids).encode("utf-8"), dtype=np.uint8),
        }
        write_tensor_file(self.path / "index.safetensors", index)
        shards = []
        for number, first in enumerate(self._closed_shards):
            end = self._closed_shards[number + 1] if number + 1 < len(self._closed_shards) else self._rows
            shards.append({"first_row": first, "rows": end - first, **describe_file(self._shard_file(number))})
        manifest = {
            **self._header,
            "boxes": BOXES,
            "images": len(ids),
            "regions": self._rows,
            "fields": {name: plain_field(field) for name, field in self._fields.items()},
            "index": describe_file(self.path / "index.safetensors"),
            "shards": shards,
        }
        write_whole(self.path / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8"))
        self._journal.unlink(missing_ok=True)
        return NativeStore.open(self.path)

    # Beginning and resuming

    @property
    def _journal(self) -> Path:
        return self.path / "journal.jsonl"

    def _begin(self, resume: bool) -> None:
        finished, unfinished = (self.path / "manifest.json").exists(), self._journal.exists()
        if (finished or unfinished) and not resume:
            state = "a finished region store" if finished else "an unfinished region store"
            raise StoreError(
                f"{self.path} already holds {state}. Choose another folder, delete it, or resume it (resume=True)."
            )
        if finished:
            self._reopen()
        elif unfinished:
            self._recover()

    def _reopen(self) -> None:
        """Take up a finished store, which stays finished until an image is added."""
        store = NativeStore.open(self.path)
        self._match({key: store.manifest.get(key) for key in self._header})
        self._fields = store.fields if store.manifest["regions"] else None
        order = sorted(store.ids, key=lambda image_id: int(store._starts[store._position[image_id]]))
        for image_id in order:
            at = store._position[image_id]
            width, height = store._sizes[at]
            self._images[image_id] = (int(store._starts[at]), int(store._counts[at]), int(width), int(height))
        self._rows = self._shard_start = int(store.manifest["regions"])
        self._closed_shards = [int(first) for first in store._first_rows]
        self._finished = True

    def _open_journal(self) -> None:
        """Begin the journal of a new store, or turn a finished one back into an unfinished one of closed shards."""
        if self._finished:
            lines: list[dict[str, Any]] = [{"store": self._header}]
            if self._fields is not None:
                lines.append({"fields": {name: plain_field(field) for name, field in self._fields.items()}})
            lines.append({"images": [[image_id, *row] for image_id, row in self._images.items()]})
            lines.extend({"closed": first} for first in self._closed_shards)
            write_whole(self._journal, b"".join(journal_line(entry) for entry in lines))
            (self.path / "manifest.json").unlink()
            self._finished = False
        elif not self._journal.exists():
            self._append_journal({"store": self._header})

    def _recover(self) -> None:
        """Read the journal back and cut what lies behind the last commit."""
        entries = read_journal(self._journal)
        if not entries or "store" not in entries[0]:
            raise StoreError(
                f"{self._journal} does not begin with the store's description: the folder cannot be resumed. Delete it and start again."
            )
        self._match(entries[0]["store"])
        for entry in entries[1:]:
            if "fields" in entry:
                self._fields = {name: Field(**field) for name, field in entry["fields"].items()}
            elif "closed" in entry:
                self._closed_shards.append(int(entry["closed"]))
            else:
                self._images.update(
                    (image_id, (start, count, width, height))
                    for image_id, start, count, width, height in entry["images"]
                )
        self._rows = sum(count for _, count, _, _ in self._images.values())
        # A shard may have been renamed before the journal learnt of it.
        if self._fields is not None and self._shard_file(len(self._closed_shards)).exists():
            first = int(tensor_metadata(self._shard_file(len(self._closed_shards)))["first_row"])
            self._append_journal({"closed": first})
            self._closed_shards.append(first)
        if self._closed_shards:
            last = len(self._closed_shards) - 1
            self._shard_start = self._closed_shards[last] + len(read_tensors(self._shard_file(last))["boxes"])
        for number in range(len(self._closed_shards)):
            self._remove_parts(number)
        self._cut_parts()

    def _match(self, found: Mapping[str, Any]) -> None:
        for key, expected in self._header.items():
            if key == "settings":
                self._match_settings(found.get(key) or {}, expected)
                self._header[key] = found.get(key)
            elif found.get(key) != expected:
                raise StoreError(
                    f"region store {self.path} cannot be resumed: its {key.replace('_', ' ')} is {shorten(found.get(key))}, this run's is "
                    f"{shorten(expected)}. Use the detector and settings it was begun with, or another folder."
                )

    def _match_settings(self, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        for name in sorted((found.keys() | expected.keys()) - self._may_differ):
            if found.get(name) != expected.get(name):
                raise StoreError(
                    f"region store {self.path} cannot be resumed: it was made with {name} {shorten(found.get(name))}, this run has "
                    f"{shorten(expected.get(name))}. Use the settings it was begun with, or another folder."
                )

    def _cut_parts(self) -> None:
        if self._fields is None:
            self._remove_parts(len(self._closed_shards))
            return
        rows = self._rows - self._shard_start
        for name, field in self._fields.items():
            part = self._part_file(name)
            length = rows * field.row_bytes + (HEADER if name == "features" else 0)
            found = part.stat().st_size if part.exists() else 0
            if rows and found < length:
                raise StoreError(
                    f"{part} is truncated: found {found} bytes, expected {length}. The folder cannot be resumed; delete it."
                )
            if rows:
                os.truncate(part, length)
            else:
                part.unlink(missing_ok=True)

    # Rows

    def _arrays(self, image_id: str, regions: RegionArray) -> dict[str, NDArray[Any]]:
        """Arrays of one image by field, checked."""
        count, width = len(regions), self._header["feature_size"]
        if regions.features.shape != (count, width):
            raise StoreError(f"features of image {image_id!r} must be (R, {width}); found {regions.features.shape}.")
        if regions.boxes.shape != (count, 4):
            raise StoreError(
                f"boxes of image {image_id!r} must be ({count}, 4), one per feature row; found {regions.boxes.shape}."
            )
        _check_boxes(image_id, regions.boxes, regions.size)
        if not np.isfinite(regions.features).all():
            raise StoreError(f"features of image {image_id!r} hold numbers that are not finite. Extract them again.")
        if self._header["dtype"] == "float16" and count and np.abs(regions.features).max() > np.finfo(np.float16).max:
            raise StoreError(
                f"features of image {image_id!r} exceed the range of float16 (65504). Store them as float32 (--dtype float32)."
            )
        arrays: dict[str, NDArray[Any]] = {"features": regions.features, "boxes": regions.boxes}
        for name in _OPTIONAL:
            array = getattr(regions, name)
            if array is None:
                continue
            if len(array) != count:
                raise StoreError(
                    f"{name} of image {image_id!r} must have {count} rows, one per region; found {len(array)}."
                )
            arrays[name] = array[:, None] if name.startswith("attribute") and array.ndim == 1 else array
        return arrays

    def _layout(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Field]:
        """Fields of the store, decided by the first image that has regions."""
        fields = {
            "features": Field(dtype=self._header["dtype"], width=self._header["feature_size"]),
            "boxes": Field(dtype="float32", width=4),
        }
        for name, dtype in _OPTIONAL.items():
            if name in arrays:
                fields[name] = Field(dtype=dtype, width=max(arrays[name].shape[1], 1) if arrays[name].ndim == 2 else 0)
        return fields

    def _bytes_per_row(self) -> int:
        assert self._fields is not None
        return sum(field.row_bytes for field in self._fields.values())

    # Files

    def _shard_file(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"

    def _part_file(self, name: str, number: int | None = None) -> Path:
        return self.path / f"shard-{len(self._closed_shards) if number is None else number:05d}.{name}.part"

    def _part(self, name: str) -> BinaryIO:
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = self._part_file(name).open("ab")
            if name == "features" and file.tell() == 0:
                file.write(bytes(HEADER))
        return file

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def _remove_parts(self, number: int) -> None:
        for part in self.path.glob(f"shard-{number:05d}.*.part"):
            part.unlink()

    def _close_shard(self) -> None:
        """Turn the parts of the current shard into one safetensors file: append the small ones to the features, write
        the header in front."""
        assert self._fields is not None
        self._close_files()
        rows, main = self._rows - self._shard_start, self._part_file("features")
        header: dict[str, Any] = {"__metadata__": {"first_row": str(self._shard_start)}}
        with main.open("r+b") as target:
            # A closing that failed (a full disk) may have appended already.
            length = self._fields["features"].row_bytes * rows
            target.truncate(HEADER + length)
            target.seek(0, os.SEEK_END)
            header["features"] = tensor_entry(self._fields["features"], rows, 0)
            if gap := -length % 8:
                # safetensors allows no holes: the gap that keeps the next tensor aligned is a tensor of its own.
                target.write(bytes(gap))
                header["padding"] = {"dtype": "U8", "shape": [gap], "data_offsets": [length, length + gap]}
                length += gap
            for name, field in self._fields.items():
                if name != "features":
                    with self._part_file(name).open("rb") as source:
                        shutil.copyfileobj(source, target, CHUNK)
                    header[name] = tensor_entry(field, rows, length)
                    length += field.row_bytes * rows
            text = json.dumps(header, separators=(",", ":")).encode("utf-8")
            target.seek(0)
            target.write((HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8))
            target.flush()
            os.fsync(target.fileno())
        number = len(self._closed_shards)
        main.rename(self._shard_file(number))
        self._append_journal({"closed": self._shard_start})
        self._closed_shards.append(self._shard_start)
        self._remove_parts(number)
        self._shard_start = self._rows

    def _append_journal(self, entry: Mapping[str, Any]) -> None:
        with self._journal.open("ab") as file:
            file.write(journal_line(entry))
            file.flush()
            os.fsync(file.fileno())


def subset(store: NativeStore, image_ids: Iterable[str], path: str | Path) -> NativeStore:
    """A new store with some images of another, under the ids they have there.

    Raises:
        StoreError: an image is missing, or `path` already holds a store.
    """
    with _copy_of(store, path) as writer:
        for number in sorted({store._locate(image_id) for image_id in image_ids}):
            writer.add(store.ids[number], store[store.ids[number]])
    return NativeStore.open(path)


def merge(stores: Sequence[NativeStore], path: str | Path) -> NativeStore:
    """A new store with the images of several.

    Raises:
        StoreError: no store, stores of different features, an image in two of them, or `path` already holds a store.
    """
    if not stores:
        raise StoreError("nothing to merge: give at least one region store.")
    for other in stores[1:]:
        for key in ("fingerprint", "feature_size", "dtype", "class_names", "attribute_names", "fields"):
            if other.manifest[key] != stores[0].manifest[key]:
                raise StoreError(
                    f"stores {stores[0].path} and {other.path} cannot be merged: {key.replace('_', ' ')} {shorten(stores[0].manifest[key])} "
                    f"and {shorten(other.manifest[key])} differ. Extract both with the same detector and settings."
                )
        if (first := stores[0].settings.get("precision")) != (second := other.settings.get("precision")):
            raise StoreError(
                f"stores {stores[0].path} and {other.path} cannot be merged: their features were computed in {first} and {second}. "
                "Extract both with the same --precision."
            )
    with _copy_of(stores[0], path) as writer:
        for store in stores:
            for image_id in store.ids:
                writer.add(image_id, store[image_id])
    return NativeStore.open(path)


def _copy_of(store: NativeStore, path: str | Path) -> StoreWriter:
    return StoreWriter(
        path,
        feature_size=store.feature_size,
        fingerprint=store.fingerprint,
        class_names=store.class_names,
        attribute_names=store.attribute_names,
        dtype=store.manifest["dtype"],
        settings=store.settings,
    )


def to_stored(
    image_id: str, arrays: Mapping[str, NDArray[Any]], count: int, fields: Mapping[str, Field]
) -> dict[str, NDArray[Any]]:
    """The arrays in the store's types and widths."""
    if arrays.keys() != fields.keys():
        raise StoreError(
            f"image {image_id!r} brings the fields {', '.join(sorted(arrays))}; this store holds {', '.join(sorted(fields))}. "
            "All images of a store have the same fields."
        )
    stored = {}
    for name, field in fields.items():
        array = arrays[name]
        if name.startswith("attribute") and array.shape[1] < field.width:
            missing = np.full((count, field.width - array.shape[1]), -1 if name == "attributes" else 0, array.dtype)
            array = np.concatenate([array, missing], axis=1)
        if array.shape != field.shape(count):
            raise StoreError(f"{name} of image {image_id!r} must be {field.shape(count)}; found {array.shape}.")
        stored[name] = np.ascontiguousarray(array, dtype=field.dtype)
    return stored


def _check_boxes(image_id: str, boxes: NDArray[Any], size: tuple[int, int]) -> None:
    if min(size) <= 0:
        raise BoxError(
            f"image {image_id!r} must have a positive width and height in pixels; found {size[0]} x {size[1]}."
        )
    if not len(boxes):
        return
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise BoxError(
            f"boxes of image {image_id!r} must be finite corners x1, y1, x2, y2 with x2 >= x1 and y2 >= y1. Is the form x, y, width, height?"
        )
    # One box within the first pixel may be a poor detection; several are unit corners.
    if len(boxes) > 1 and boxes.max() <= 1.0 and min(size) > 2:
        raise BoxError(
            f"boxes of image {image_id!r} must be pixel corners; found maximum {boxes.max():.3f} in an image of {size[0]} x {size[1]}. "
            "They look like unit corners: use boxes.to_pixels(boxes, size)."
        )


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
