"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg, as the refer API lays them out.

Files    {refcoco, refcoco+, refcocog}/instances.json (COCO instances) and refs(BY).p, a pickled list of references. BY
         is who split them: unc for the first two, umd for refcocog, google for other versions of refcoco and refcocog.
Records  One per sentence. A reference names one annotation, whose box it refers to, and has several sentences.
Quirk    `file_name` of a reference carries a suffix that its image's name lacks: images are named by `image_id` alone.
Source   lichengunc/refer, `refer.py`; Yu et al. 2016 (arXiv 1608.00272), Mao et al. 2016 (arXiv 1511.02283).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.data.annotations.files import Layout, entries, has_words, plain_id, read_json
from visling.data.annotations.tables import Table
from visling.errors import DataError, nearest
from visling.image_ids import canonical
from visling.pickles import read_pickle
from visling.types import Record

DATASETS: Mapping[str, str] = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
"""Folder -> who split it, unless another is asked for."""

INSTANCES = "instances.json"

_ONE_LETTER = ("testA", "testB", "testC")

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class ReferringRecord(Record):
    """One sentence that refers to one object; the id is the official `sent_id`."""

    raw: str
    """As it was written."""
    sent: str
    """In lower case, without punctuation."""
    tokens: tuple[str, ...]
    """Its words."""
    box: Box | None
    """Of the object: x, y, w, h in pixels, as it is annotated; None if it is not known."""
    size: tuple[int, int] | None = None
    """Width and height of the image in pixels; None if they are not known."""
    reference: int | None = None
    """Official `ref_id`."""
    split: str = ""
    """Of the reference: "testA" where "test" was asked for."""
    dataset: str = ""
    """Name of its folder."""

    @property
    def corners(self) -> Box | None:
        """Pixel corners x, y, x + w, y + h of the box."""
        if self.box is None:
            return None
        x, y, width, height = self.box
        return (x, y, x + width, y + height)


def find_refer(root: Path, dataset: str | None = None) -> Path:
    """The folder of one data set: `root` itself, or one of its folders.

    Args:
        dataset: name of the folder; None takes the only one that is present.
    Raises:
        DataError: none is there, or several are and none was named.
    """
    if (root / INSTANCES).is_file() and dataset in (None, root.name):
        return root
    names = [dataset] if dataset is not None else list(DATASETS)
    present = [root / name for name in names if (root / name).is_dir()]
    if len(present) == 1:
        return present[0]
    if present:
        raise DataError(
            f"{root} holds {', '.join(folder.name for folder in present)}: give the folder of one of them, or choose "
            f'one with task_settings.dataset="{present[0].name}".'
        )
    raise DataError(
        f"no referring expressions in {root}: expected {INSTANCES} and refs(BY).p there, or in its folder "
        f"{' or '.join(names)}."
    )


def read_refer(folder: Path, split: str, *, by: str | None = None) -> list[ReferringRecord]:
    """The sentences of a split, in the order of the references in their file.

    Args:
        folder: with `instances.json` and `refs(BY).p`.
        split: "train" or "val"; "test" is every test part; "testA" every part whose name has an A.
        by: who split the data; None = the usual version of the data set.
    Raises:
        DataError: a file is missing or of another layout; no such split; a reference whose annotation or image is not
            listed; a box outside its image; a sentence without words, or one whose id occurs twice.
    """
    path = _find_references(folder, by)
    listed = _read_references(path)
    chosen = [(number, reference) for number, reference in enumerate(listed) if _is_in(str(reference["split"]), split)]
    if not chosen:
        present = sorted({str(reference["split"]) for reference in listed})
        raise DataError(
            f"{path} has no references of split {split!r}; it has {', '.join(present) or 'none at all'}. "
            f"{nearest(split, present)}"
        )
    boxes, sizes = _read_objects(folder / INSTANCES)
    records: dict[str, ReferringRecord] = {}
    with Layout(path, "reference") as at:
        for at.entry, reference in chosen:
            number = at.entry
            where = f"{path}: reference {reference.get('ref_id', number)}"
            image, annotation = canonical(plain_id(reference["image_id"])), reference["ann_id"]
            if annotation not in boxes or image not in sizes:
                what = f"annotation {annotation!r}" if annotation not in boxes else f"image {image}"
                raise DataError(
                    f"{where} names {what}, which {folder / INSTANCES} does not list. The two files must come from one "
                    "release: download both again."
                )
            box = _check_box(boxes[annotation], sizes[image], f"{folder / INSTANCES}: annotation {annotation}")
            for sentence in reference["sentences"]:
                record = _make_record(sentence, where, image, box, sizes[image], reference, folder.name)
                if record.id in records:
                    raise DataError(f"{where}: sentence {record.id} occurs twice. Remove the copy.")
                records[record.id] = record
    return list(records.values())


def table_expressions(table: Table) -> list[ReferringRecord]:
    """Expressions of a file of one's own. Fields: `image`, `text` (or `expression`, `sentence`), and the corners `x1`,
    `y1`, `x2`, `y2` of the object in pixels, which a file without any box lacks; `id` if there are any."""
    image, text = table.require("image", "img"), table.require("text", "expression", "sentence")
    corners = ("x1", "y1", "x2", "y2")
    boxed = any(name in table.fields for name in corners)
    if boxed:
        for name in corners:
            table.require(name)
    records = []
    for row, identifier in zip(table.rows, table.ids(), strict=True):
        raw, box = row.text(text), None
        if boxed:
            x1, y1, x2, y2 = (row.number(name) for name in corners)
            if not (0 <= x1 < x2 and 0 <= y1 < y2):
                row.problem(
                    f"no box: x1 {x1:g}, y1 {y1:g}, x2 {x2:g}, y2 {y2:g}",
                    "Give pixels of two corners, x1 < x2 and y1 < y2; a box of width and height is x1 + w, y1 + h.",
                )
            box = (x1, y1, x2 - x1, y2 - y1)
        records.append(
            ReferringRecord(
                id=identifier,
                images=(row.image(image),),
                raw=raw,
                sent=raw.lower(),
                tokens=tuple(raw.split()),
                box=box,
            )
        )
    return records


def _find_references(folder: Path, by: str | None) -> Path:
    present = sorted(folder.glob("refs(*).p"))
    usual = DATASETS.get(folder.name)
    wanted = by or usual
    if wanted is None and len(present) == 1:
        return present[0]
    path = folder / f"refs({wanted or 'unc'}).p"
    if path not in present:
        found = ", ".join(file.name for file in present) or "no such file"
        raise DataError(
            f"no references {path}; found {found}. Download the file, or choose another with task_settings.by."
        )
    return path


def _read_references(path: Path) -> list[dict[str, Any]]:
    content = read_pickle(path)
    if not isinstance(content, list):
        raise DataError(f"{path} must be a pickled list of references; found a {type(content).__name__}.")
    keys = ("ann_id", "image_id", "split", "sentences")
    return entries({"references": content}, "references", keys, path)


def _is_in(part: str, split: str) -> bool:
    """Whether a part of the data belongs to a split, by the rules of the refer API."""
    if split in _ONE_LETTER:
        return split[-1] in part
    return "test" in part if split == "test" else part == split


def _read_objects(path: Path) -> tuple[dict[Any, Any], dict[str, tuple[int, int] | None]]:
    """Box of each annotation, as the file has it, and size of each image."""
    content = read_json(path)
    with Layout(path):
        boxes = {entry["id"]: entry["bbox"] for entry in entries(content, "annotations", ("id", "bbox"), path)}
        sizes = {}
        for image in entries(content, "images", ("id",), path):
            width, height = image.get("width"), image.get("height")
            sizes[canonical(plain_id(image["id"]))] = (int(width), int(height)) if width and height else None
    return boxes, sizes


def _check_box(box: Any, size: tuple[int, int] | None, where: str) -> Box:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise DataError(f"{where}: bbox must be four finite numbers [left, top, width, height]; found {box!r}.")
    x, y, width, height = (float(value) for value in box)
    if width <= 0 or height <= 0:
        raise DataError(f"{where}: the referred box {box} has no area. Correct it, or remove its reference.")
    if size is not None and (x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0):
        raise DataError(
            f"{where}: the referred box {box} lies outside its image of {size[0]} x {size[1]} pixels. Correct it, or "
            "remove its reference."
        )
    return (x, y, width, height)


def _check_reference(value: Any) -> int | None:
    if value is None or type(value) is int:
        return value
    raise TypeError(f"ref_id {value!r:.60}, where a number is expected")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _make_record(
    sentence: Any,
    where: str,
    image: str,
    box: Box,
    size: tuple[int, int] | None,
    reference: Mapping[str, Any],
    dataset: str,
) -> ReferringRecord:
    if not isinstance(sentence, dict) or "sent_id" not in sentence:
        raise DataError(f"{where}: a sentence must be an object with 'sent_id', 'raw', 'sent' and 'tokens'.")
    raw, sent = str(sentence.get("raw") or sentence.get("sent") or ""), str(sentence.get("sent") or "")
    tokens = tuple(str(token) for token in sentence.get("tokens") or sent.split())
    if not has_words(raw) and not has_words(" ".join(tokens)):
        raise DataError(f"{where}: sentence {sentence['sent_id']} has no words. Remove it, or fill it in.")
    return ReferringRecord(
        id=plain_id(sentence["sent_id"]),
        images=(image,),
        raw=raw,
        sent=sent,
        tokens=tokens,
        box=box,
        size=size,
        reference=_check_reference(reference.get("ref_id")),
        split=str(reference["split"]),
        dataset=dataset,
    )
