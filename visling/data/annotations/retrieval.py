"""Caption retrieval: the captions of a split image by image, images that look alike, and cleaned training sets.

Files  Karpathy's `dataset_{coco,flickr30k,...}.json` with all splits, or `dataset_NAME_{split}.json` with one;
       ViLBERT's and VOLTA's JSON lines (`all_data_final_{split}*.jsonline`, `{split}_ann.jsonl`); ViLBERT's
       `hard_negative.pkl` and `cache/flickr_test_ids.npy`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from visling.data.annotations.captions import CaptionRecord, Captions, read_flickr30k_lines, read_karpathy
from visling.data.annotations.files import Layout, the_one
from visling.errors import DataError
from visling.image_ids import Aliases, canonical, from_file_name
from visling.pickles import read_array, read_pickle

MOST_CAPTIONS = 5
"""Captions of an image that are used: the first five, as in all published numbers; a few images of COCO have more."""

CLEAN = "_clean"
"""End of the name of a split without the images that other tasks are tested on: `train_clean`."""

ImageField = Literal["img_path", "id"]
CaptionText = Literal["raw", "tokens"]


@dataclass(frozen=True, kw_only=True)
class RetrievalRecord(CaptionRecord):
    """A caption with its image."""

    alike: tuple[str, ...] = ()
    """Images of the same split that look like it, the most similar first, without itself; empty where none are
    known."""


@dataclass(frozen=True, kw_only=True)
class RetrievalData:
    """The captions of a split and what was left out."""

    records: tuple[RetrievalRecord, ...]
    """In the order of the file."""
    captions: Captions
    """As they were read, with counts."""
    cleaned: int = 0
    """Captions of images that a cleaned split leaves out."""

    def notes(self) -> list[str]:
        """What there is to say about the file."""
        counts = Counter(record.images[0] for record in self.captions.records)
        few = sum(count < MOST_CAPTIONS for count in counts.values())
        read, bare = self.captions, len(self.captions.bare_images)
        said = (
            (read.empty, "captions have no word and were left out"),
            (read.repeated, "captions repeat the id of another and were left out"),
            (read.surplus, f"captions beyond the first {MOST_CAPTIONS} of an image were left out"),
            (read.listed_twice, "images are listed more than once; their captions were joined"),
            (bare, "images have no caption and were left out"),
            (few, f"images have fewer than {MOST_CAPTIONS} captions"),
            (self.cleaned, "captions of images that other tasks are tested on were left out"),
        )
        return [f"{number} {what}" for number, what in said if number]


def read_retrieval(
    root: str | Path, split: str, *, text: CaptionText = "raw", image_field: ImageField = "img_path"
) -> RetrievalData:
    """The captions of a split in a folder or its sub-folder `karpathy`, with images that look alike for "train" where
    there is a pool of them.

    Args:
        split: of the file; `train_clean` is "train" without the images of `flickr_test_ids.npy`.
        text: of Karpathy's files, see `read_karpathy`.
        image_field: of JSON lines, see `read_flickr30k_lines`.
    Raises:
        DataError: no file of the split or several, one of another layout, a cleaned split without the list of images,
            or a pool that does not fit.
    """
    root = Path(root)
    part = split.removesuffix(CLEAN)
    file = _find_captions(root, part)
    if file.suffix == ".json":
        captions = read_karpathy(file, part, most=MOST_CAPTIONS, text=text)
    else:
        captions = read_flickr30k_lines(file, most=MOST_CAPTIONS, image_field=image_field)
    kept: Sequence[CaptionRecord] = captions.records
    if part != split:
        removed = read_test_images(_find_test_images(file.parent))
        kept = [record for record in kept if canonical(record.images[0]) not in removed]
    pool = file.parent / ("hard_negative.pkl" if part == split else "hard_negative_cleaned.pkl")
    alike: Mapping[str, tuple[str, ...]] = {}
    if part == "train" and pool.is_file():
        alike = read_pool(pool, list(dict.fromkeys(record.images[0] for record in kept)))
    return RetrievalData(
        records=tuple(
            RetrievalRecord(
                id=record.id, images=record.images, caption=record.caption, alike=alike.get(record.images[0], ())
            )
            for record in kept
        ),
        captions=captions,
        cleaned=len(captions.records) - len(kept),
    )


_KARPATHY = re.compile(r"dataset_[a-z0-9]+(?:_([a-z0-9]+))?\.json")


def _find_captions(root: Path, split: str) -> Path:
    """The file of a split: Karpathy's, if there is one, else JSON lines."""
    name = {"val": "valid"}.get(split, split)
    seen: list[Path] = []
    for folder in (root, root / "karpathy"):
        named = [(file, _KARPATHY.fullmatch(file.name)) for file in sorted(folder.glob("dataset_*.json"))]
        karpathy = [file for file, match in named if match and match[1] in (split, None)]
        lines = [*folder.glob(f"{name}_ann.jsonl"), *sorted(folder.glob(f"all_data_final_{split}*.jsonline"))]
        if found := karpathy or lines:
            return the_one(found, "dataset_NAME.json or one file of JSON lines", folder, found)
        seen += [file for file, _ in named] + sorted(folder.glob("*.jsonl*"))
    raise DataError(
        f"no captions of split {split!r} in {root}: expected Karpathy's dataset_NAME.json (or "
        f"dataset_NAME_{split}.json), {name}_ann.jsonl or all_data_final_{split}*.jsonline there or in karpathy; found "
        f"{', '.join(file.name for file in seen) or 'none of this kind'}."
    )


def _find_test_images(folder: Path) -> Path:
    for file in (folder / "cache" / "flickr_test_ids.npy", folder / "flickr_test_ids.npy"):
        if file.is_file():
            return file
    raise DataError(
        f"a cleaned split needs the images that other tasks are tested on: no flickr_test_ids.npy in {folder} or "
        f"{folder / 'cache'}. Use the split without {CLEAN}, or copy the list there."
    )


def read_test_images(path: Path) -> frozenset[str]:
    """Canonical ids of the images that a list (`flickr_test_ids.npy`) names.

    Raises:
        DataError: the file is missing or holds something else.
    """
    try:
        listed = read_array(path)
    except DataError as error:
        raise DataError(f"{path} is not a list of image ids that can be read: {error}") from error
    if listed.dtype.kind not in "iuSU":
        raise DataError(f"{path} is not a list of image ids: it holds {listed.dtype}. Download it again.")
    with Layout(path):
        return frozenset(canonical(from_file_name(str(image))) for image in listed.ravel().tolist())


def read_pool(path: Path, images: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Images that look alike, from ViLBERT's `hard_negative.pkl`: of every image its nearest ones.

    Args:
        images: of the training records; those that the file does not list have none.
    Returns:
        Image -> the images nearest to it, without the first column, which is the image itself; images that no training
        record has are left out.
    Raises:
        DataError: the file is missing or damaged, its parts do not fit together, or it lists no training image.
    """
    with Layout(path):
        return _match_pool(read_pickle(path), path, images)


def _match_pool(content: Any, path: Path, images: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """See `read_pool`."""
    if not isinstance(content, Mapping) or not {"train_hard_pool", "train_image_list"} <= content.keys():
        found = ", ".join(map(str, content)) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise DataError(f"{path} must hold train_hard_pool and train_image_list; found {found}.")
    pool, listed = np.asarray(content["train_hard_pool"]), [str(image) for image in content["train_image_list"]]
    if pool.ndim != 2 or len(pool) != len(listed) or pool.shape[1] < 2 or pool.dtype.kind not in "iuf":
        raise DataError(
            f"{path}: train_hard_pool must have a row of at least two numbers for each of the {len(listed)} images of "
            f"train_image_list; found the shape {pool.shape}. The file belongs to another data set."
        )
    if pool.size and not (pool.min() >= 0 and pool.max() < len(listed)):
        raise DataError(
            f"{path}: train_hard_pool names image {pool.max():g} of {len(listed)}. The file belongs to another data "
            "set."
        )
    known = Aliases(images)
    ours = [known.find(image) for image in listed]
    alike = {
        image: tuple(name for at in row if (name := ours[at]) is not None)
        for image, row in zip(ours, pool[:, 1:].astype(np.int64).tolist(), strict=True)
        if image is not None
    }
    if not alike:
        raise DataError(
            f"{path} lists none of the {len(images)} training images, first {images[0]!r}. Remove it, or use that of "
            "this data set."
        )
    return alike
