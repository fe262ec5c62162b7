"""Writing a region store: journaled, resumable, with a digest per shard.

What lies on the disk meanwhile is described in `regions/store.py`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, Literal, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from visling import damage
from visling.errors import StoreError
from visling.feature_kinds import name_today
from visling.regions.files import (
    BOXES,
    FORMAT,
    HEADER_BYTES,
    INDEX,
    JOURNAL,
    MANIFEST,
    SCHEMA,
    Field,
    Placement,
    check_id,
    describe_file,
    describe_tensor,
    encode_entry,
    encode_header,
    explain_journal,
    part_name,
    read_header,
    read_tensors,
    recover_journal,
    shard_name,
    write_atomically,
    write_tensors,
)
from visling.regions.rows import check_arrays, choose_fields, convert_arrays
from visling.regions.store import NativeStore
from visling.regions.validating import check_count, read_fields
from visling.types import RegionArray

_COPY_BYTES = 1 << 24
"""Copied at a time when a shard is closed."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _explain_failure(
    method: Callable[Concatenate[StoreWriter, _P], _T],
) -> Callable[Concatenate[StoreWriter, _P], _T]:
    """Let a method of a writer turn errors of writing into a StoreError that says what to do."""

    @functools.wraps(method)
    def explained(self: StoreWriter, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            raise StoreError(
                f"cannot write region store {self.path}: {error}. What was committed is kept. Free space or fix "
                "permissions, then run the same command again with --resume."
            ) from error

    return explained


class StoreWriter:
    """Writes a store image by image; survives interruption.

    As a context manager it closes the store on success and leaves a resumable folder on an exception. Nothing is
    written until an image is added: a finished store stays finished, an empty folder stays empty.

    Args:
        fingerprint: identity of the detector that computed the features.
        dtype: how features are stored.
        settings: how the features were computed, kept in the manifest; plain JSON values. They must be the same when
            writing resumes.
        may_differ: names of settings that may have changed when writing resumes; the first run's values are kept.
        resume: continue an unfinished store after its last commit, or add images to a finished one.
        shard_bytes: size at which a new shard is begun.
    Raises:
        StoreError: the folder holds a store and `resume` is False, or holds one with other features; or, as from every
            method that writes, the disk is full or the folder read-only: what was committed is kept.
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
        """None until an image with regions decides them."""
        self._images: dict[str, None] = {}
        """Ids in the order of writing; a dictionary is a set that keeps it."""
        self._table = array("q")
        """Placement of every image in the same order, four numbers each: small, however many there are."""
        self._pending: list[str] = []
        """Images added since the last commit."""
        self._rows = 0
        """Regions of all images."""
        self._shard_starts: list[int] = []
        """First global row of every closed shard."""
        self._open_start = 0
        """First global row of the shard that is still growing."""
        self._files: dict[str, BinaryIO] = {}
        """Parts of that shard by field, opened for appending."""
        self._finished = False
        """Whether the folder holds a finished store to which nothing has been added yet."""
        self._begin(resume)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._images

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[str]:
        return iter(self._images)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        else:
            self.suspend()

    @_explain_failure
    def add(self, image_id: str, regions: RegionArray) -> None:
        """Append the regions of one image; durable after the next `commit`.

        Raises:
            StoreError: the image is already stored, or its arrays differ in width, length or fields from what the
                store holds.
            BoxError: a box that is not pixel corners, or an image without size.
        """
        if image_id in self._images:
            raise StoreError(f"image {image_id!r} is already in region store {self.path}; every image is stored once.")
        if not image_id or "\n" in image_id:
            raise StoreError(f"{image_id!r} cannot be an image id: it must be non-empty and without line breaks.")
        sizes = {"feature_size": self._header["feature_size"], "dtype": self._header["dtype"]}
        arrays = check_arrays(image_id, regions, **sizes)
        count = len(regions)
        fields = self._fields or choose_fields(arrays, **sizes)
        rows = convert_arrays(image_id, arrays, count, fields) if count else {}
        self._open_journal()
        if count:
            if self._fields is None:
                self._fields = fields
                self._append_journal({"fields": {name: asdict(field) for name, field in fields.items()}})
            row_bytes = sum(field.row_bytes for field in fields.values())
            in_shard = self._rows - self._open_start
            if in_shard and (in_shard + count) * row_bytes > self._shard_bytes:
                self.commit()
                self._close_shard()
            for name, numbers in rows.items():
                self._open_part(name).write(numbers.data)
        self._place(image_id, Placement(self._rows, count, *regions.size))
        self._pending.append(image_id)
        self._rows += count

    @_explain_failure
    def commit(self) -> None:
        """Make everything added so far durable: a later interruption loses none of it."""
        if not self._pending:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._append_journal(self._describe_images(self._pending, len(self) - len(self._pending)))
        self._pending = []

    @_explain_failure
    def suspend(self) -> None:
        """Commit and close the files, leaving a folder from which `resume` continues."""
        try:
            self.commit()
        finally:
            self._close_files()

    def close(self) -> NativeStore:
        """Finish the store and open it."""
        self._finish()
        return NativeStore.open(self.path)

    @_explain_failure
    def _finish(self) -> None:
        if self._finished:
            return
        self.commit()
        if self._fields is None:
            self._fields = choose_fields({}, feature_size=self._header["feature_size"], dtype=self._header["dtype"])
        if self._rows > self._open_start:
            self._close_shard()
        ids = list(self._images)
        order = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
        table = np.frombuffer(self._table, np.int64).reshape(-1, 4)
        index: dict[str, NDArray[Any]] = {
            "starts": table[order, 0],
            "counts": table[order, 1],
            "sizes": table[order, 2:].astype(np.int32),
            "ids": np.frombuffer("\n".join(ids[number] for number in order).encode("utf-8"), dtype=np.uint8),
        }
        del table  # a view of it would keep the table from growing
        write_tensors(self.path / INDEX, index)
        shards = [
            {"first_row": first, "rows": end - first, **describe_file(self.path / shard_name(number))}
            for number, (first, end) in enumerate(itertools.pairwise([*self._shard_starts, self._rows]))
        ]
        manifest = {
            **self._header,
            "boxes": BOXES,
            "images": len(ids),
            "regions": self._rows,
            "fields": {name: asdict(field) for name, field in self._fields.items()},
            "index": describe_file(self.path / INDEX),
            "shards": shards,
        }
        write_atomically(self.path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8"))
        self._journal.unlink(missing_ok=True)
        self._finished = True

    # Beginning and resuming

    @property
    def _journal(self) -> Path:
        return self.path / JOURNAL

    @_explain_failure
    def _begin(self, resume: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        finished, unfinished = (self.path / MANIFEST).exists(), self._journal.exists()
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
        """Continue a finished store, which stays finished until an image is added."""
        store = NativeStore.open(self.path)
        self._check_header({key: store.manifest.get(key) for key in self._header})
        self._fields = store.fields if store.manifest["regions"] else None
        for image_id, placement in store.placements():
            self._place(image_id, placement)
        self._rows = self._open_start = int(store.manifest["regions"])
        self._shard_starts = store.shard_starts
        self._finished = True

    def _open_journal(self) -> None:
        """Begin the journal of a new store, or turn a finished one back into an unfinished one of closed shards."""
        if self._finished:
            lines: list[dict[str, Any]] = [{"store": self._header}]
            if self._fields is not None:
                lines.append({"fields": {name: asdict(field) for name, field in self._fields.items()}})
            ids = list(self._images)
            lines.extend(self._describe_images(ids[at : at + 1000], at) for at in range(0, len(ids), 1000))
            lines.extend({"closed": first} for first in self._shard_starts)
            write_atomically(self._journal, b"".join(encode_entry(entry) for entry in lines))
            (self.path / MANIFEST).unlink()
            self._finished = False
        elif not self._journal.exists():
            self._append_journal({"store": self._header})

    def _recover(self) -> None:
        """Read the journal back and cut off what was written after the last commit."""
        try:
            self._read_journal()
        except StoreError:
            raise
        except damage.LAYOUT as error:
            raise explain_journal(self._journal, error) from error
        for number in range(len(self._shard_starts)):
            self._remove_parts(number)
        self._truncate_parts()

    def _read_journal(self) -> None:
        """What was committed.

        Raises:
            StoreError: the store cannot be resumed; or others of `damage.LAYOUT`: its journal is damaged.
        """
        entries = recover_journal(self._journal)
        first = next(entries, None)
        if first is None:  # the very first write was interrupted
            self._journal.unlink()
            return
        if "store" not in first:
            raise StoreError(
                f"{self._journal} does not begin with the store's description: the folder cannot be resumed. "
                "Delete it and start again."
            )
        self._check_header(first["store"])
        for entry in entries:
            if "fields" in entry:
                self._fields = read_fields(entry["fields"], self._header["feature_size"])
            elif "closed" in entry:
                self._shard_starts.append(check_count(entry["closed"]))
            else:
                for image_id, *placement in entry["images"]:
                    self._place(check_id(image_id), Placement(*map(check_count, placement)))
        self._rows = sum(self._table[1::4])
        # A shard may have been renamed just before the interruption, without an entry in the journal.
        renamed = self.path / shard_name(len(self._shard_starts))
        if self._fields is not None and renamed.exists():
            start = int(read_header(renamed)[0]["__metadata__"]["first_row"])
            self._append_journal({"closed": start})
            self._shard_starts.append(start)
        if self._shard_starts:
            last = self.path / shard_name(len(self._shard_starts) - 1)
            self._open_start = self._shard_starts[-1] + len(read_tensors(last)["boxes"])

    def _check_header(self, stored: Mapping[str, Any]) -> None:
        """Refuse to continue a store of other features; its settings are kept."""
        for key, expected in self._header.items():
            if key == "settings":
                self._check_settings(stored.get(key) or {}, expected)
                self._header[key] = stored.get(key)
            elif key == "fingerprint" and name_today(str(stored.get(key))) == name_today(str(expected)):
                self._header[key] = stored.get(key)
            elif stored.get(key) != expected:
                raise StoreError(
                    f"region store {self.path} cannot be resumed: its {key.replace('_', ' ')} is "
                    f"{shorten(stored.get(key))}, this run's is {shorten(expected)}. "
                    "Use the detector and settings it was begun with, or another folder."
                )

    def _check_settings(self, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        for name in sorted((stored.keys() | expected.keys()) - self._may_differ):
            if stored.get(name) != expected.get(name):
                raise StoreError(
                    f"region store {self.path} cannot be resumed: it was made with {name} "
                    f"{shorten(stored.get(name))}, this run has {shorten(expected.get(name))}. "
                    "Use the settings it was begun with, or another folder."
                )

    def _place(self, image_id: str, placement: Placement) -> None:
        self._images[image_id] = None
        self._table.extend(placement)

    def _describe_images(self, image_ids: Sequence[str], first: int) -> dict[str, Any]:
        """Entry of the journal for images that were written one after another, `first` others before them."""
        numbered = enumerate(image_ids, first)
        return {"images": [[image_id, *self._table[4 * at : 4 * at + 4]] for at, image_id in numbered]}

    def _truncate_parts(self) -> None:
        """Cut the parts of the growing shard back to the committed rows."""
        if self._fields is None:
            self._remove_parts(len(self._shard_starts))
            return
        rows = self._rows - self._open_start
        for name, field in self._fields.items():
            part = self._part_file(name)
            length = rows * field.row_bytes + (HEADER_BYTES if name == "features" else 0)
            size = part.stat().st_size if part.exists() else 0
            if rows and size < length:
                raise StoreError(
                    f"{part} is truncated: found {size} bytes, expected {length}. "
                    "The folder cannot be resumed; delete it."
                )
            if rows:
                os.truncate(part, length)
            else:
                part.unlink(missing_ok=True)

    # Shards and their parts

    def _part_file(self, name: str) -> Path:
        return self.path / part_name(len(self._shard_starts), name)

    def _open_part(self, name: str) -> BinaryIO:
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = self._part_file(name).open("ab")
            if name == "features" and file.tell() == 0:
                file.write(bytes(HEADER_BYTES))
        return file

    def _close_files(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, even if the disk has no room for what one still holds
            for file in self._files.values():
                stack.callback(file.close)
            self._files = {}

    def _remove_parts(self, number: int) -> None:
        for part in self.path.glob(part_name(number, "*")):
            part.unlink()

    def _close_shard(self) -> None:
        """Turn the parts of the growing shard into one safetensors file: append the small ones to the features, then
        fill in the header in front."""
        assert self._fields is not None
        self._close_files()
        rows, main = self._rows - self._open_start, self._part_file("features")
        header: dict[str, Any] = {"__metadata__": {"first_row": str(self._open_start)}}
        with main.open("r+b") as target:
            # An earlier attempt that failed (a full disk) may have appended something.
            features = self._fields["features"]
            length = features.row_bytes * rows
            target.truncate(HEADER_BYTES + length)
            target.seek(0, os.SEEK_END)
            header["features"] = describe_tensor(features.dtype, features.shape(rows), 0)
            if gap := -length % 8:
                # safetensors allows no holes: the gap that keeps the next tensor aligned is a tensor of its own.
                target.write(bytes(gap))
                header["padding"] = describe_tensor("uint8", (gap,), length)
                length += gap
            for name, field in self._fields.items():
                if name != "features":
                    with self._part_file(name).open("rb") as source:
                        shutil.copyfileobj(source, target, _COPY_BYTES)
                    header[name] = describe_tensor(field.dtype, field.shape(rows), length)
                    length += field.row_bytes * rows
            target.seek(0)
            target.write(encode_header(header, HEADER_BYTES))
            target.flush()
            os.fsync(target.fileno())
        number = len(self._shard_starts)
        main.rename(self.path / shard_name(number))
        self._append_journal({"closed": self._open_start})
        self._shard_starts.append(self._open_start)
        self._remove_parts(number)
        self._open_start = self._rows

    def _append_journal(self, entry: Mapping[str, Any]) -> None:
        before = self._journal.stat().st_size if self._journal.exists() else 0
        try:
            with self._journal.open("ab") as file:
                file.write(encode_entry(entry))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            # The next attempt must not follow half an entry.
            with contextlib.suppress(OSError):
                os.truncate(self._journal, before)
            raise


def shorten(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
