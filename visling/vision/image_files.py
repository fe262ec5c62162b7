"""Where images come from: files, folders, lists, patterns and zip archives, each image with its id.

A suffix matters only where a folder, a pattern or an archive is searched: what a file holds is decided by its content.
Archives are read in place; nothing is unpacked.
"""

from __future__ import annotations

import glob
import io
import os
import threading
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal, Self

from visling import damage
from visling.errors import DataError
from visling.vision.images import SUFFIXES, Picture, decode_image

Ids = Literal["name", "path"]
"""What an image is stored under: its file name without folder and suffix, or its path below the folder, pattern, list
or archive that was named, without suffix."""

MEMBER = "@/"
"""Between an archive and the image in it, as in VL-BERT's files: photos.zip@/holiday/1.jpg."""

_MOST_BYTES = 1 << 29
"""Size of the largest image that is read from an archive: it is held in memory while it is decoded."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image and the id under which its regions are stored."""

    id: str
    path: Path
    """The image, or the zip archive that holds it."""
    member: str = ""
    """Its name in the archive."""

    def __str__(self) -> str:
        return f"{self.path}{MEMBER}{self.member}" if self.member else str(self.path)


class ImageReader:
    """Reads images, those in archives too; may be called by several threads. A context manager, which closes the
    archives."""

    def __init__(self) -> None:
        self._archives: dict[Path, zipfile.ZipFile] = {}
        self._lock = threading.Lock()

    def read(self, image: ImageFile) -> Picture:
        """The image, as `images.decode_image` returns it.

        Raises:
            DataError: it is missing, empty, truncated, encrypted, or not an image.
        """
        if not image.member:
            return decode_image(image.path)
        return decode_image(io.BytesIO(self._read_member(image)), name=str(image))

    def _read_member(self, image: ImageFile) -> bytes:
        with self._lock:
            archive = self._archives.get(image.path)
            if archive is None:
                archive = self._archives[image.path] = _open_archive(image.path)
        try:
            about = archive.getinfo(image.member)
            if about.flag_bits & 1:
                raise DataError(f"cannot read image {image}: it is encrypted. Unpack the archive with its password.")
            if about.file_size > _MOST_BYTES:
                raise DataError(
                    f"cannot read image {image}: {about.file_size:,} bytes, more than {_MOST_BYTES:,}. "
                    "Unpack the archive, or remove the file."
                )
            return archive.read(about)
        except DataError:
            raise
        # zipfile raises BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ... on damaged members
        except Exception as error:
            raise DataError(
                f"cannot read image {image}: {error or type(error).__name__}. Copy the archive again, or unpack it."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for archive in self._archives.values():
            archive.close()


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image; hidden files do not count."""
    return not name.startswith(".") and PurePath(name).suffix.lower() in SUFFIXES


def find_images(folder: Path) -> list[Path]:
    """All files below a folder whose names end like images, sorted.

    Raises:
        DataError: the folder does not exist or holds none.
    """
    if not folder.is_dir():
        raise DataError(f"no image folder {folder}, nor a file of that name. Check the path.")
    # os.walk, unlike Path.rglob in Python 3.11 and 3.12, follows links to folders; data sets on shared disks often have
    # them.
    files = sorted(
        Path(base) / name
        for base, _, names in os.walk(folder, followlinks=True)
        for name in names
        if is_image_name(name)
    )
    if not files:
        raise DataError(f"no image in {folder} or below it; {_endings()}")
    return files


def list_images(
    places: Iterable[str | Path], *, lists: Iterable[Path] = (), base: Path | None = None, ids: Ids = "name"
) -> list[ImageFile]:
    """Images at all places, in the order given; a file that is named twice counts once.

    Args:
        places: image files, folders, zip archives, single images or folders in one (`photos.zip@/holiday`), patterns
            with `*`, `?` or `**`, and lists (`@list.txt`).
        lists: files that name an image in each line.
        base: folder that the lines of lists are relative to; the list's own by default.
        ids: what images are stored under.
    Raises:
        DataError: a place does not exist or has no image, none was given, a list names what does not exist, or two
            images have the same id.
    """
    found: dict[tuple[Path, str], ImageFile] = {}
    texts = [*map(str, places), *(f"@{file}" for file in lists)]
    for text in texts:
        for path, member, name in _expand(text, base):
            found.setdefault((path, member), ImageFile(_make_id(name, ids), path, member))
    images = list(found.values())
    check_ids(images)
    return images


def as_images(paths: Iterable[Path | ImageFile]) -> list[ImageFile]:
    """Images of which some are paths, which get their file names as ids."""
    return [path if isinstance(path, ImageFile) else ImageFile(Path(path).stem, Path(path)) for path in paths]


def check_ids(images: Iterable[ImageFile]) -> None:
    """Check that every image has an id of its own, which a store can hold.

    Raises:
        DataError: there is no image, two have one id, or a name has a line break or is not UTF-8.
    """
    by_id: dict[str, list[ImageFile]] = defaultdict(list)
    for image in images:
        by_id[image.id].append(image)
    if not by_id:
        raise DataError("no image was given to extract regions from.")
    repeated = [same for same in by_id.values() if len(same) > 1]
    if repeated:
        first, second = repeated[0][:2]
        raise DataError(
            f"{len(repeated)} image names occur more than once, for example {first} and {second}, which would both be "
            f"stored as {first.id!r}. Store them under their path below the folder that you name (--ids path; name the "
            "folder above both), rename the files, or extract the folders into separate stores."
        )
    for image_id, (image, *_) in by_id.items():
        if "\n" in image_id or not (image_id.isprintable() or _is_utf8(image_id)):
            raise DataError(f"the name of image {str(image)!r} has a line break or is not UTF-8. Rename the file.")


def _is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: what Python makes of file names in other encodings cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _make_id(name: PurePath, ids: Ids) -> str:
    """The id of an image by its path below what was named."""
    if ids == "name":
        return name.stem
    folders = [part for part in name.parts[:-1] if part not in (name.anchor, "..")]
    return "/".join([*folders, name.stem])


_Place = tuple[Path, str, PurePath]
"""File or archive, member, and the path below what was named."""


def _expand(text: str, base: Path | None) -> Iterator[_Place]:
    """The images at one place."""
    path = Path(text)
    if text.startswith("@"):
        yield from _read_list(Path(text[1:]), base)
    elif path.is_dir():
        yield from ((file, "", file.relative_to(path)) for file in find_images(path))
    elif (single := _find_single(text, path)) is not None:
        yield from single
    elif glob.has_magic(text):
        yield from _match(text)
    else:
        find_images(path)  # says that it is missing


def _find_single(text: str, path: Path) -> Iterable[_Place] | None:
    """The image of a file or of a member of an archive, or all images of an archive; None if there is no such file."""
    if path.is_file():
        return _list_archive(path) if path.suffix.lower() == ".zip" else [(path, "", PurePath(text))]
    archive, found, member = text.partition(MEMBER)
    return _list_archive(Path(archive), member) if found and Path(archive).is_file() else None


def _match(pattern: str) -> Iterator[_Place]:
    """Images, archives and folders of images that a pattern fits."""
    parts = Path(pattern).parts
    fixed = Path(*parts[: next(at for at, part in enumerate(parts) if glob.has_magic(part))])
    count = 0
    for name in sorted(glob.glob(pattern, recursive=True)):
        path = Path(name)
        if path.suffix.lower() == ".zip":
            inside: Iterable[_Place] = _list_archive(path)
        elif path.is_dir():
            files = (Path(at) / file for at, _, names in os.walk(path, followlinks=True) for file in names)
            inside = ((file, "", file.relative_to(fixed)) for file in sorted(files) if is_image_name(file.name))
        else:
            inside = [(path, "", path.relative_to(fixed))] if is_image_name(path.name) else []
        for place in inside:
            count += 1
            yield place
    if not count:
        raise DataError(f"no image fits the pattern {pattern!r}; {_endings()}")


def _read_list(file: Path, base: Path | None) -> Iterator[_Place]:
    """Images of a list, a path in each line; empty lines do not count."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except IsADirectoryError as error:
        raise DataError(f"{file} is a folder, not a list. Name it without @ or --list to take its images.") from error
    except OSError as error:
        raise DataError(f"cannot read the list of images {file}: {error}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not a list of images: expected UTF-8 text with a path in each line.") from error
    folder = file.parent if base is None else base
    named = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not named:
        raise DataError(f"the list of images {file} is empty: expected a path in each line.")
    found: list[_Place] = []
    missing: list[tuple[int, str]] = []
    for number, line in named:
        path = folder / line
        places = _find_single(str(path), path)
        if places is None:
            missing.append((number, line))
        elif path.suffix.lower() == ".zip":
            found.extend(places)
        else:
            found.extend((path, member, PurePosixPath(member or line)) for path, member, _ in places)
    if missing:
        number, line = missing[0]
        what = "is a folder" if (folder / line).is_dir() else "does not exist"
        raise DataError(
            f"{len(missing)} of {len(named)} lines of {file} name no image file: line {number}, {line!r}, {what} "
            f"in {folder.absolute()}. Name the folder that the lines are relative to with --base, or mend the list."
        )
    yield from found


def _open_archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except damage.ZIP as error:
        raise DataError(f"cannot read the archive {path}: {error}. Copy or download it again.") from error


def _list_archive(path: Path, below: str = "") -> list[_Place]:
    """Images in a zip archive, all or those below a folder of it, sorted.

    Raises:
        DataError: it is damaged or no archive, or has no image there.
    """
    inside: Callable[[str], bool] = lambda name: name == below or name.startswith(below.rstrip("/") + "/")  # noqa: E731
    with _open_archive(path) as archive:
        names = sorted(
            about.filename
            for about in archive.infolist()
            if about.filename.strip("/\0")
            and not about.is_dir()  # a name may be empty
            and (about.filename == below or is_image_name(PurePosixPath(about.filename).name))
            and (not below or inside(about.filename))
        )
    if not names:
        where = f"{path}{MEMBER}{below}" if below else str(path)
        raise DataError(f"no image in the archive {where}; {_endings()}")
    return [(path, name, PurePosixPath(name)) for name in names]


def _endings() -> str:
    return f"image names end in {', '.join(sorted(SUFFIXES))}."
