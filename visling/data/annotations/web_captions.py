"""Captions found on the web: Conceptual Captions, as released and as ViLBERT and VL-BERT keep it, and SBU.

Most of the listed images have vanished from the web since: a run leaves out those that its store lacks.
"""

from __future__ import annotations

import html
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from visling.data.annotations.captions import Captions, collect
from visling.data.annotations.files import read_json, read_json_lines, read_lines
from visling.errors import DataError
from visling.image_ids import from_file_name

Naming = Literal["crc32", "line"]
"""How images of Conceptual Captions are named: by the CRC-32 of their address in decimal (ViLBERT, VOLTA), or by their
line number, from 0, in eight digits (VL-BERT)."""

_RELEASED = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
_VLBERT = {"train": "train_frcnn.json", "val": "val_frcnn.json"}
_VILBERT = {"train": ("caption_train.json",), "val": ("caption_val.json", "caption_valid.json")}
_SBU = "sbu-captions-all.json"
_SBU_PARTS = ("SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt")


def image_name(address: str, line: int, naming: Naming) -> str:
    """Image id under which a row of Conceptual Captions is stored.

    Args:
        line: number in the file, from 0.
    """
    return str(zlib.crc32(address.encode("utf-8"))) if naming == "crc32" else f"{line:08d}"


def read_conceptual_captions(path: str | Path, naming: Naming = "crc32") -> Captions:
    """Rows of the released table: caption, a tab, address; no header. Rows without an address are left out and counted.

    Raises:
        DataError: the file is missing, not UTF-8, or no row has this layout.
    """
    path = Path(path)
    malformed = 0

    def rows() -> Iterator[tuple[str, str, Any]]:
        nonlocal malformed
        for number, line in read_lines(path):
            caption, tab, address = line.partition("\t")
            address = address.strip()
            if tab and address:
                yield str(number - 1), image_name(address, number - 1, naming), caption
            else:
                malformed += 1

    captions = collect(rows())
    if malformed and not captions.records and not captions.empty:
        raise DataError(
            f"{path} has no row of Conceptual Captions' layout: expected a caption, a tab and an address, "
            "without a header."
        )
    return replace(captions, malformed=malformed)


def read_vlbert_captions(path: str | Path) -> Captions:
    """VL-BERT's rows of Conceptual Captions (`train_frcnn.json`): one JSON object per line with `image` and the words
    of `caption`.

    Raises:
        DataError: the file is missing or truncated, or a row is of another layout.
    """
    path = Path(path)

    def rows() -> Iterator[tuple[str, str, Any]]:
        for number, entry in read_json_lines(path):
            words = entry.get("caption")
            if "image" not in entry or not isinstance(words, list):
                raise DataError(
                    f"{path}, line {number}: expected an object with 'image' and a list 'caption'; "
                    f"found {', '.join(entry)}."
                )
            # train_image.zip@/00000000.jpg: a member of a zip file
            yield str(number - 1), from_file_name(str(entry["image"]).rpartition("@/")[2]), " ".join(map(str, words))

    return collect(rows())


def read_vilbert_captions(path: str | Path) -> Captions:
    """ViLBERT's captions (`caption_train.json`): an object from image id to its caption.

    Raises:
        DataError: the file is missing, truncated or of another layout.
    """
    path = Path(path)
    table = read_json(path)
    if not isinstance(table, dict) or not all(
        isinstance(caption, str) or caption is None for caption in table.values()
    ):
        raise DataError(f"{path} must be a JSON object from image id to caption; found {_describe(table)}.")
    return collect((str(image), str(image), caption) for image, caption in table.items())


def read_sbu(root: str | Path) -> Captions:
    """SBU's captioned photos: `sbu-captions-all.json`, or the two lists of addresses and captions. Images are named as
    in their address.

    Raises:
        DataError: neither is present, one is truncated, or addresses and captions differ in number.
    """
    root = Path(root)
    if (root / _SBU).is_file():
        content = read_json(root / _SBU)
        lists = [content.get(name) if isinstance(content, dict) else None for name in ("image_urls", "captions")]
        if not all(isinstance(entry, list) for entry in lists):
            raise DataError(
                f"{root / _SBU} must be an object with the lists 'image_urls' and 'captions'; "
                f"found {_describe(content)}."
            )
        addresses, captions = lists
    elif all((root / name).is_file() for name in _SBU_PARTS):
        addresses, captions = ([line for _, line in read_lines(root / name)] for name in _SBU_PARTS)
    else:
        raise DataError(f"no SBU captions in {root}: expected {_SBU}, or {' and '.join(_SBU_PARTS)}.")
    assert addresses is not None
    assert captions is not None
    if len(addresses) != len(captions):
        raise DataError(
            f"SBU captions in {root}: {len(addresses)} addresses, {len(captions)} captions. "
            "The files are truncated; download them again."
        )
    # Captions are stored as web pages write them: "33&quot; truck tires".
    return collect(
        (str(number), from_file_name(str(address).strip()), html.unescape(str(caption or "")))
        for number, (address, caption) in enumerate(zip(addresses, captions, strict=True))
    )


def has_sbu(root: Path) -> bool:
    """Whether `read_sbu` has something to read."""
    return (root / _SBU).is_file() or all((root / name).is_file() for name in _SBU_PARTS)


def find_conceptual_captions(root: str | Path, split: str) -> Path:
    """The released table of a split, or VL-BERT's rows of it.

    Raises:
        DataError: neither.
    """
    return _find_first(
        Path(root), split, [table[split] for table in (_RELEASED, _VLBERT) if split in table], "Conceptual Captions"
    )


def find_vilbert_captions(root: str | Path, split: str) -> Path:
    """ViLBERT's caption table of a split; the validation table has two names.

    Raises:
        DataError: none.
    """
    return _find_first(Path(root), split, _VILBERT.get(split, (f"caption_{split}.json",)), "ViLBERT's captions")


def _find_first(root: Path, split: str, names: list[str] | tuple[str, ...], what: str) -> Path:
    for name in names:
        if (root / name).is_file():
            return root / name
    raise DataError(
        f"no {what} of split {split!r} in {root}: expected {' or '.join(names) or 'a split train or val'}. "
        "Check the folder and the split."
    )


def _describe(content: Any) -> str:
    return (
        f"an object with {', '.join(list(content)[:5]) or 'nothing'}"
        if isinstance(content, dict)
        else f"a {type(content).__name__}"
    )
