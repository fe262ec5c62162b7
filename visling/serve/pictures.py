"""The pictures that can be asked about: uploads, held in memory, and the files of one folder. Nothing else on the
machine has a name here, so nothing else can be reached."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from visling.errors import DataError
from visling.serve.cache import ByteCache
from visling.serve.settings import ServeSettings
from visling.vision.image_files import is_image_name
from visling.vision.images import decode_image, fit, read_header

MEDIA_TYPES: Mapping[str, str] = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
    "AVIF": "image/avif",
    "PPM": "image/x-portable-anymap",
}
"""Formats that are taken. Pillow reads others by programs of their own (EPS) or by rarely used code, which strangers'
files should not reach."""


_SHOWN = frozenset({"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "AVIF"})
"""Those of them that browsers show."""
_DRAWN = frozenset({"PNG", "GIF", "BMP", "TIFF", "PPM"})
"""Formats without losses: a smaller picture has none either, beyond its size."""


class UnknownPicture(DataError):
    """No picture has this id, or it is no longer held."""


@dataclass(frozen=True, slots=True)
class Content:
    """An image file."""

    data: bytes
    format: str
    size: tuple[int, int]
    """Width and height in pixels, see `Header`."""

    @property
    def media_type(self) -> str:
        """As HTTP names the format."""
        return MEDIA_TYPES[self.format]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A picture of the folder."""

    id: str
    path: Path
    """Without links."""
    size: tuple[int, int]
    """Width and height in pixels, see `Header`."""
    searched: bool
    """Whether it is of the folder that is searched by a caption; else it belongs to an offered question only."""


class Pictures:
    """Uploads and examples by id."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self._uploads: ByteCache[Content] = ByteCache(settings.upload_bytes)
        self.examples: dict[str, Example] = {}
        """By id; those of the folder first, by name."""
        if settings.examples is not None:
            self._list_examples(settings.examples)

    @property
    def searched(self) -> list[str]:
        """Ids of the pictures that a caption is compared with."""
        return [one.id for one in self.examples.values() if one.searched]

    def offer(self, path: Path) -> str:
        """Make a file an example, unless it is one. Returns its id.

        Raises:
            DataError: it is no image within the limits.
        """
        whole = path.resolve()
        for known in self.examples.values():
            if known.path == whole:
                return known.id
        return self._add_example(whole, path.stem, searched=False)

    def add(self, data: bytes) -> tuple[str, tuple[int, int]]:
        """Hold an uploaded file. Returns its id and its width and height, upright.

        Raises:
            DataError: it is no image of a format that is taken, has too many pixels, or is damaged.
        """
        content = self._check(data, "upload")
        height, width = decode_image(BytesIO(data), "upload").pixels.shape[:2]
        name = "upload-" + hashlib.sha256(data).hexdigest()[:32]
        self._uploads.put(name, content, len(data))
        return name, (width, height)

    def find(self, name: str) -> Content:
        """The file of an upload or of an example.

        Raises:
            UnknownPicture: there is none of this id.
        """
        example = self.examples.get(name)
        if example is not None:
            return self._read_example(example)
        content = self._uploads.get(name)
        if content is None:
            raise UnknownPicture(f"no image {name!r} is held: uploads are dropped after a while. Upload it again.")
        return content

    def shrink(self, name: str, side: int) -> Content:
        """An example that a page can show in little space: no side is longer than this, and every browser knows its
        format; as it is if that is so already.

        Raises:
            DataError: there is none of this id, or it is damaged.
        """
        content = self.find(name)
        if max(content.size) <= side and content.format in _SHOWN:
            return content
        pixels = decode_image(BytesIO(content.data), name).pixels
        small = Image.fromarray(fit(pixels, min(side, max(pixels.shape[:2]))))
        file = BytesIO()
        form = "PNG" if content.format in _DRAWN else "JPEG"
        small.save(file, form, quality=85)
        return Content(file.getvalue(), form, small.size)

    def count_pixels(self, name: str) -> int:
        """Pixels of an upload or of an example.

        Raises:
            UnknownPicture: there is none of this id.
        """
        example = self.examples.get(name)
        width, height = self.find(name).size if example is None else example.size
        return width * height

    def _read_example(self, example: Example) -> Content:
        """The file as it is now: it may have been replaced since it was listed, even by a link to elsewhere."""
        try:
            same = example.path.resolve() == example.path
            data = example.path.read_bytes() if same and self._has_fitting_length(example.path) else None
        except OSError:
            data = None
        if data is None:
            raise UnknownPicture(f"the example {example.id!r} is no longer in its folder. Start the server again.")
        return self._check(data, example.path.name)

    def _check(self, data: bytes, name: str) -> Content:
        """A file whose beginning is that of an image within the limits; nothing of it is decoded."""
        header = read_header(BytesIO(data), name)
        self._check_header(header.format, header.size, name)
        return Content(data, header.format, header.size)

    def _check_header(self, form: str, size: tuple[int, int], name: str) -> None:
        settings, (width, height) = self.settings, size
        if form not in MEDIA_TYPES:
            raise DataError(
                f"cannot take image {name}: it is {form}; taken are {', '.join(MEDIA_TYPES)}. Save it as PNG."
            )
        if width * height > settings.most_pixels or max(size) > settings.longest_side:
            raise DataError(
                f"image {name} has {width:,} x {height:,} pixels; at most {settings.most_pixels:,} in all and "
                f"{settings.longest_side:,} on a side are taken. Scale it down."
            )

    def _list_examples(self, folder: Path) -> None:
        """Take the first pictures below a folder by name. Links to folders are not followed, and links to files only
        within the folder; what is no image by its content is left out."""
        if not folder.is_dir():
            raise DataError(f"no folder of examples {folder}. Check --examples.")
        root = folder.resolve()
        files = sorted(Path(base) / name for base, _, names in os.walk(root) for name in names if is_image_name(name))
        for path in files:
            if len(self.examples) == self.settings.most_examples:
                break
            whole = path.resolve()
            if whole.is_relative_to(root):
                with contextlib.suppress(DataError):
                    self._add_example(whole, path.stem, searched=True)
        if not self.examples:
            raise DataError(
                f"no picture in {folder} that can be offered: {len(files)} files are named like images, none of them "
                "is one within the limits. Name another folder with --examples."
            )

    def _add_example(self, path: Path, stem: str, *, searched: bool) -> str:
        if not self._has_fitting_length(path):
            raise DataError(f"image {path} has more than {self.settings.most_upload_bytes:,} bytes. Scale it down.")
        header = read_header(path)
        self._check_header(header.format, header.size, path.name)
        name = _free_name(stem, self.examples)
        self.examples[name] = Example(id=name, path=path, size=header.size, searched=searched)
        return name

    def _has_fitting_length(self, path: Path) -> bool:
        return path.stat().st_size <= self.settings.most_upload_bytes


def _free_name(stem: str, taken: Collection[str]) -> str:
    """An id for a file, of letters that need no quoting in an address."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", stem)
    names = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)
