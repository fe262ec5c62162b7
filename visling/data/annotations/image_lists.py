"""Lists of images that are kept out of training, because other data sets test on them.

Source   ViLBERT's multi-task release: `cache/coco_test_ids.npy` and `cache/flickr_test_ids.npy`, of which it calls data
         sets "cleaned".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from visling.data.annotations.files import Layout, read_ids, read_json
from visling.errors import DataError
from visling.image_ids import canonical, from_file_name
from visling.pickles import read_array
from visling.types import Record

R = TypeVar("R", bound=Record)


def read_image_list(path: str | Path) -> frozenset[str]:
    """Images of a list, in canonical spelling: a numpy array of names or numbers (`.npy`), a JSON list (`.json`), or a
    text with one per line. Names of files are accepted too.

    Raises:
        DataError: the file is missing or empty, or holds something else.
    """
    path = Path(path)
    names: Sequence[object]
    if path.suffix == ".npy":
        names = _read_array(path)
    elif path.suffix == ".json":
        content = read_json(path)
        if not isinstance(content, list):
            raise DataError(f"{path} must be a JSON list of image ids; found a {type(content).__name__}.")
        names = content
    else:
        names = sorted(read_ids(path))
    with Layout(path):
        return _spell_images(names, path)


def _spell_images(names: Sequence[object], path: Path) -> frozenset[str]:
    """See `read_image_list`."""
    if wrong := next((name for name in names if isinstance(name, bool) or not isinstance(name, str | int)), None):
        raise DataError(f"{path} must list image ids: names or whole numbers; found {wrong!r}.")
    if not names:
        raise DataError(f"{path} lists no image. Was it written in full?")
    return frozenset(canonical(from_file_name(str(name))) for name in names)


def without_images(records: Sequence[R], path: str | Path) -> list[R]:
    """The records none of whose images is on the list.

    Raises:
        DataError: see `read_image_list`.
    """
    listed = read_image_list(path)
    return [record for record in records if listed.isdisjoint(map(canonical, record.images))]


def _read_array(path: Path) -> list[object]:
    if not path.is_file():
        raise DataError(f"no list of images {path}. Check the path.")
    try:
        array = read_array(path)
    except DataError as error:
        raise DataError(f"{path} is no array of image ids: {error}") from error
    if array.dtype.kind not in "iuSU":
        raise DataError(f"{path} is no array of image ids: it holds {array.dtype}. Download it again.")
    if array.ndim != 1:
        raise DataError(f"{path} must hold a list of image ids; found an array of shape {array.shape}.")
    names: list[object] = array.tolist()
    return names
