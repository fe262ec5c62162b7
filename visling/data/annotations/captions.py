"""Captions of COCO and Flickr30K, and the Karpathy splits of both: sentences about images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from visling.data.annotations.entities import find_entities, read_entities
from visling.data.annotations.files import (
    Layout,
    entries,
    has_words,
    is_split,
    optional_text,
    plain_id,
    read_ids,
    read_json,
    read_json_lines,
    read_lines,
    the_one,
)
from visling.errors import DataError
from visling.image_ids import canonical, from_file_name
from visling.types import Record


@dataclass(frozen=True, kw_only=True)
class CaptionRecord(Record):
    """One caption of one image."""

    caption: str


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What a caption file holds, and what was left out of it."""

    records: tuple[CaptionRecord, ...]
    """In the order of the file."""
    empty: int
    """Captions without a word, left out."""
    repeated: int
    """Annotations whose id had occurred before, left out."""
    surplus: int
    """Captions beyond the most per image, left out."""
    bare_images: tuple[str, ...] = ()
    """Listed images for which no caption is left."""
    malformed: int = 0
    """Lines that are not of the file's layout, left out."""
    unboxed: int = 0
    """Sentences of Flickr30K Entities that name no entity with a box, left out."""
    listed_twice: int = 0
    """Images that the file lists again; their captions are joined."""


def read_captions(*paths: str | Path, most: int | None = None, wanted: Callable[[str], bool] | None = None) -> Captions:
    """Captions of a COCO file (`captions_{split}.json`), or of several one after the other.

    Args:
        most: most captions per image, the first ones; retrieval uses 5. None keeps all.
        wanted: whether captions of an image are kept; None keeps all.
    Raises:
        DataError: a file is missing, truncated or of another layout, or a caption names an image that its file does not
            list.
    """
    listed: list[str] = []

    def rows() -> Iterator[tuple[str, str, Any]]:
        for path in map(Path, paths):
            content = read_json(path)
            annotations = entries(content, "annotations", ("id", "image_id", "caption"), path)
            with Layout(path, "image") as at:
                images = {}
                for at.entry, entry in enumerate(entries(content, "images", ("id", "file_name"), path)):
                    images[entry["id"]] = from_file_name(optional_text(entry["file_name"]))
            listed.extend(image for image in images.values() if wanted is None or wanted(image))
            with Layout(path, "annotation") as at:
                for at.entry, annotation in enumerate(annotations):
                    image = images.get(annotation["image_id"])
                    if image is None:
                        number, missing = annotation["id"], annotation["image_id"]
                        raise DataError(
                            f"{path}: caption {number} is about image {missing}, which the file's images do not list."
                        )
                    if wanted is None or wanted(image):
                        yield plain_id(annotation["id"]), image, optional_text(annotation["caption"])

    return collect(rows(), images=listed, most=most)


def read_karpathy(
    path: str | Path, split: str, *, most: int | None = None, text: Literal["raw", "tokens"] = "raw"
) -> Captions:
    """Captions of one of Karpathy's files (`dataset_coco.json`, `dataset_flickr30k.json`).

    Args:
        split: "train" includes COCO's "restval", as all retrieval work does.
        most: most captions per image, the first ones; retrieval uses 5.
        text: "raw": captions as people wrote them; "tokens": Karpathy's words, in lower case and without punctuation,
            joined by blanks. Where a caption lacks the one, the other is read.
    Raises:
        DataError: the file is missing, truncated or of another layout, or has no such split.
    """
    path = Path(path)
    images = entries(read_json(path), "images", ("filename", "split", "sentences"), path)
    wanted = {"train", "restval"} if split == "train" else {split}
    with Layout(path, "image") as at:
        chosen = []
        for at.entry, image in enumerate(images):
            if image["split"] in wanted:
                chosen.append((from_file_name(image["filename"]), image["sentences"]))
    if not chosen:
        present = ", ".join(sorted({str(image["split"])[:40] for image in images})) or "none"
        raise DataError(f"{path} has no image of split {split!r}; found {present}.")

    def rows() -> Iterator[tuple[str, str, Any]]:
        with Layout(path, "image") as at:
            for at.entry, sentences in chosen:
                for number, sentence in enumerate(sentences):
                    raw, tokens = optional_text(sentence.get("raw")), _join_tokens(sentence)
                    name = plain_id(sentence.get("sentid", f"{at.entry}#{number}"))
                    yield name, at.entry, (raw or tokens) if text == "raw" else (tokens or raw)

    return collect(rows(), images=[image for image, _ in chosen], most=most)


def _join_tokens(sentence: Mapping[str, Any]) -> str:
    return " ".join(sentence.get("tokens", ()))


def read_flickr30k(path: str | Path, images: Collection[str] | None = None) -> Captions:
    """Captions of Flickr30K's `results_20130124.token`, one per line: `1000092795.jpg#0`, a tab, the caption.

    Args:
        images: ids to keep, since the file has no splits; None keeps all.
    Raises:
        DataError: the file is missing, not text, or no line has this layout.
    """
    path = Path(path)
    malformed = 0

    def rows() -> Iterator[tuple[str, str, Any]]:
        nonlocal malformed
        for _, line in read_lines(path):
            name, tab, caption = line.partition("\t")
            file, hash_, _ = name.rpartition("#")
            if not (tab and hash_):
                malformed += bool(line.strip())
                continue
            image = from_file_name(file)
            if images is None or image in images:
                yield f"{image}#{name.rpartition('#')[2]}", image, caption

    captions = collect(rows())
    if malformed and not captions.records and not captions.empty:
        raise DataError(f"{path} has no line of Flickr30K's layout: expected NAME.jpg#NUMBER, a tab and a caption.")
    return replace(captions, malformed=malformed)


def read_flickr30k_lines(
    path: str | Path, *, most: int | None = None, image_field: Literal["img_path", "id"] = "img_path"
) -> Captions:
    """Captions of ViLBERT's and VOLTA's files: one JSON object per line with `sentences` and `img_path` (or `id`).

    Args:
        most: most captions per image, the first ones.
        image_field: what names the image: of Flickr30K the file, whose `id` may be another number; of COCO the `id`.
            Where a line lacks the one, the other is read.
    Raises:
        DataError: the file is missing or truncated, or a line is of another layout.
    """
    path = Path(path)
    listed: list[str] = []

    def rows() -> Iterator[tuple[str, str, Any]]:
        for number, entry in read_json_lines(path):
            other = "id" if image_field == "img_path" else "img_path"
            name = entry.get(image_field, entry.get(other))
            if name is None or not isinstance(entry.get("sentences"), list):
                raise DataError(
                    f"{path}, line {number}: expected an object with 'sentences' and 'img_path' or 'id'; "
                    f"found {', '.join(entry)}."
                )
            image = from_file_name(str(name))
            listed.append(image)
            for at, sentence in enumerate(entry["sentences"]):
                yield f"{image}#{at}", image, sentence

    return collect(rows(), images=listed, most=most)


def read_flickr30k_entities(root: str | Path, split: str) -> Captions:
    """Sentences of Flickr30K Entities without their mark-up, but for those in which no phrase names an entity with a
    box (`annotations.entities` describes the files).

    Raises:
        DataError: a file is missing or cannot be read.
    Source:
        VisualBERT release, `dataloaders/flickr_ban/dataset.py`.
    """
    found = read_entities(root, split, unrelated=True)
    captions = collect((record.id, record.images[0], record.sentence) for record in found.records)
    return replace(captions, unboxed=found.unboxed_sentences)


def find_flickr30k(root: str | Path, split: str) -> Captions:
    """Flickr30K's captions of a split, from the first of these that a folder has: Flickr30K Entities (`Sentences` and
    `Annotations` with the list `{split}.txt`), of which sentences without a boxed entity are left out, as in
    VisualBERT's release; Karpathy's `dataset_flickr30k.json`;
    the line files `{split}_ann.jsonl` (VOLTA) or `all_data_final_{split}*.jsonline` (ViLBERT); `results_20130124.token`
    with the list `{split}.txt` of image ids.

    The splits of Karpathy and of Flickr30K Entities (the lists) differ: most test images of one are training images of
    the other.

    Raises:
        DataError: none of them, or a `.token` file without a list for the split.
    """
    root = Path(root)
    if find_entities(root, split) is not None:
        return read_flickr30k_entities(root, split)
    if (root / "dataset_flickr30k.json").is_file():
        return read_karpathy(root / "dataset_flickr30k.json", split)
    name = {"val": "valid"}.get(split, split)
    lines = [
        file
        for file in (root / f"{name}_ann.jsonl", *sorted(root.glob(f"all_data_final_{split}*.jsonline")))
        if file.is_file()
    ]
    if lines:
        return read_flickr30k_lines(
            the_one(lines, f"{name}_ann.jsonl or all_data_final_{split}*.jsonline", root, lines)
        )
    tokens = root / "results_20130124.token"
    if not tokens.is_file():
        present = sorted(root.glob("*.json*")) + sorted(root.glob("*.token"))
        raise DataError(
            f"no captions of Flickr30K's split {split!r} in {root}: expected dataset_flickr30k.json, {name}_ann.jsonl, "
            f"all_data_final_{split}*.jsonline or results_20130124.token; "
            f"found {', '.join(file.name for file in present) or 'none of this kind'}."
        )
    if not (root / f"{split}.txt").is_file():
        raise DataError(
            f"{tokens} has no splits: put the list of the split's image ids next to it as {split}.txt, one per line."
        )
    return read_flickr30k(tokens, read_ids(root / f"{split}.txt"))


def has_flickr30k(root: Path, split: str) -> bool:
    """Whether `find_flickr30k` has something to read for a split."""
    name = {"val": "valid"}.get(split, split)
    if (
        find_entities(root, split) is not None
        or (root / "dataset_flickr30k.json").is_file()
        or (root / f"{name}_ann.jsonl").is_file()
        or any(root.glob(f"all_data_final_{split}*.jsonline"))
    ):
        return True
    return (root / "results_20130124.token").is_file() and (root / f"{split}.txt").is_file()


def collect(rows: Iterable[tuple[str, str, Any]], *, images: Collection[str] = (), most: int | None = None) -> Captions:
    """Rows of id, image and caption as records, without those that are empty, repeated or too many.

    Args:
        images: ids of all images that the file lists; read when the rows are through.
        most: most captions per image, the first ones.
    """
    records: list[CaptionRecord] = []
    seen: set[str] = set()
    per_image: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for number, image, text in rows:
        caption = " ".join(str(text or "").split())
        if number in seen:
            left_out["repeated"] += 1
        elif not has_words(caption):
            left_out["empty"] += 1
        elif most is not None and per_image[image] >= most:
            left_out["surplus"] += 1
        else:
            records.append(CaptionRecord(id=number, images=(image,), caption=caption))
            per_image[image] += 1
        seen.add(number)
    return Captions(
        records=tuple(records),
        empty=left_out["empty"],
        repeated=left_out["repeated"],
        surplus=left_out["surplus"],
        bare_images=tuple(image for image in dict.fromkeys(images) if image not in per_image),
        listed_twice=sum(count > 1 for count in Counter(images).values()),
    )


def find_coco_captions(root: str | Path, split: str) -> Captions:
    """COCO's captions of a split, from the first of these that a folder or its `annotations` has: the file of exactly
    this name (`captions_train2014.json` for "train2014"); all caption files together, split by lists of image ids
    `captions_{split}.txt`; Karpathy's `dataset_coco.json`; the file of the split from any year
    (`captions_train2014.json` for "train").

    With lists, "train" without one of its own is every image in no list: VisualBERT's release trains on both parts
    except the images of minival, which `captions_val.txt` then lists.

    Raises:
        DataError: none or several of them, one that cannot be read, or lists without one of the split or without an
            image of the files.
    """
    root = Path(root)
    files, lists, karpathy = _list_coco_files(root)
    if lists and not any(file.stem == f"captions_{split}" for file in files):
        return _read_by_list(files, lists, split, root)
    if karpathy is not None and not any(file.stem == f"captions_{split}" for file in files):
        return read_karpathy(karpathy, split)
    return read_captions(find_captions_file(root, split))


def has_coco_captions(root: Path, split: str) -> bool:
    """Whether `find_coco_captions` has something to read for a split."""
    files, lists, karpathy = _list_coco_files(root)
    if any(file.stem == f"captions_{split}" for file in files):
        return True
    if lists:
        return bool(files) and split in ("train", *lists)
    return karpathy is not None or any(is_split(file.stem.removeprefix("captions_"), split) for file in files)


def _list_coco_files(root: Path) -> tuple[list[Path], dict[str, Path], Path | None]:
    """Caption files of a folder, lists of image ids by split, and Karpathy's file."""
    folders = [root / folder for folder in _ANNOTATIONS]
    files = _drop_aliases(
        file for folder in folders for file in sorted(folder.glob("captions_*.json")) if _COCO_FILE.fullmatch(file.name)
    )
    lists = {
        file.stem.removeprefix("captions_"): file
        for folder in folders
        for file in sorted(folder.glob("captions_*.txt"))
    }
    return (
        files,
        lists,
        next((folder / "dataset_coco.json" for folder in folders if (folder / "dataset_coco.json").is_file()), None),
    )


def _read_by_list(files: list[Path], lists: dict[str, Path], split: str, root: Path) -> Captions:
    """Captions of all files, of the images of a split."""
    if split != "train" and split not in lists:
        raise DataError(
            f"captions of {root} are split by {', '.join(file.name for file in lists.values())}, "
            f"none of which is captions_{split}.txt. "
            "List the images of this split too, or name a caption file in full (train2014)."
        )
    if not files:
        raise DataError(
            f"{', '.join(map(str, lists.values()))}: no caption file captions_*.json next to them to split. "
            "Put them into one folder."
        )
    own = {split} & lists.keys() or lists.keys()
    # Numbers identify images as well as names do: COCO's images of all years have numbers of their own.
    listed = frozenset(canonical(image) for name in own for image in read_ids(lists[name]))
    captions = read_captions(*files, wanted=lambda image: (canonical(image) in listed) == (split in lists))
    if not captions.records:
        raise DataError(
            f"{', '.join(str(lists[name]) for name in own)}: no image of split {split!r} has a caption in "
            f"{files[0].parent}."
        )
    return captions


_ANNOTATIONS = ("annotations", "Annotations", ".")

_COCO_FILE = re.compile(r"captions_[a-z]+(\d{4})?\.json")
"""Matches parts of COCO, but no results of captioning."""


def find_captions_file(root: str | Path, split: str) -> Path:
    """The caption file of a split ("train" finds `captions_train2014.json`) in a folder or its `annotations`.

    Raises:
        DataError: none, or several.
    """
    root = Path(root)
    files = [file for folder in _ANNOTATIONS for file in sorted((root / folder).glob("captions_*.json"))]
    return the_one(
        _drop_aliases(file for file in files if is_split(file.stem.removeprefix("captions_"), split)),
        f"captions_{split}*.json",
        root,
        files,
    )


def _drop_aliases(files: Iterable[Path]) -> list[Path]:
    """Each file once, although a file system that ignores case shows it under two names."""
    return list({file.resolve(): file for file in files}.values())
