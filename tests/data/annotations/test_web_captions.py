"""Conceptual Captions in its three layouts and SBU in its two, clean and dirty."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.captions import CaptionRecord
from visling.data.annotations.web_captions import (
    find_conceptual_captions,
    find_vilbert_captions,
    has_sbu,
    image_name,
    read_conceptual_captions,
    read_sbu,
    read_vilbert_captions,
    read_vlbert_captions,
)
from visling.errors import DataError

# No header; blanks around words; a quote that opens and never closes; a line separator within a caption; no caption; no
# address; cut short.
TABLE = (
    "a very typical bus station\thttp://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/AAAAAAAAM6o/_11MuAAKalQ/IMG_3422.JPG?imgmax=800\n"
    'sierra looked stunning in this top and this skirt while performing with person at their former university " \thttp://i.dailymail.co.uk/a.jpg\r\n'
    "one\u2028line \thttp://a.org/é.jpg\n"
    "\thttp://a.org/no-caption.jpg\n"
    "young confused girl standing in front of a wardrobe\t\n"
    "actor attends the premi"
)


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode("utf-8"))
    return path


def test_the_released_table(tmp_path: Path) -> None:
    file = save(tmp_path / "Train_GCC-training.tsv", TABLE)
    found = read_conceptual_captions(file)
    first = TABLE.partition("\n")[0].partition("\t")[2]
    assert [record.caption for record in found.records] == [
        "a very typical bus station",
        'sierra looked stunning in this top and this skirt while performing with person at their former university "',
        "one line",
    ]
    assert found.records[0] == CaptionRecord(
        id="0", images=(str(zlib.crc32(first.encode())),), caption="a very typical bus station"
    )
    assert found.records[1].images == (str(zlib.crc32(b"http://i.dailymail.co.uk/a.jpg")),), (
        "the line's end is no part of the address"
    )
    assert (found.empty, found.malformed) == (1, 2)
    assert [record.images[0] for record in read_conceptual_captions(file, "line").records] == [
        "00000000",
        "00000001",
        "00000002",
    ]


def test_image_names() -> None:
    assert image_name("http://a.org/\u00e9.jpg", 7, "crc32") == str(zlib.crc32("http://a.org/é.jpg".encode()))
    assert image_name("http://a.org/é.jpg", 3318332, "line") == "03318332"


def test_another_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a caption, a tab and an address"):
        read_conceptual_captions(save(tmp_path / "x.tsv", "caption,url\na,b\n"))
    (tmp_path / "latin.tsv").write_bytes("a\thttp://a\nna\u00efve\thttp://b\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.tsv is not UTF-8 text: line 2, byte 2"):
        read_conceptual_captions(tmp_path / "latin.tsv")


def test_vlbert_rows(tmp_path: Path) -> None:
    rows = [
        {
            "image": "train_image.zip@/00000000.jpg",
            "caption": ["a", "bus", "station"],
            "frcnn": "train_frcnn.zip@/00000000.json",
        },
        {"image": "train_image.zip@/00000007.jpg", "caption": [], "frcnn": "train_frcnn.zip@/00000007.json"},
    ]
    file = save(tmp_path / "train_frcnn.json", "\n".join(map(json.dumps, rows)) + "\n\n")
    found = read_vlbert_captions(file)
    assert found.records == (CaptionRecord(id="0", images=("00000000",), caption="a bus station"),)
    assert found.empty == 1
    file.write_text(file.read_text()[:-60])
    with pytest.raises(DataError, match=r"line 2 is not a JSON object: .*truncated"):
        read_vlbert_captions(file)
    with pytest.raises(DataError, match="line 1: expected an object with 'image' and a list 'caption'; found caption"):
        read_vlbert_captions(save(file, '{"caption": "a"}'))


def test_vilbert_table(tmp_path: Path) -> None:
    file = save(tmp_path / "caption_train.json", {"2946434161": "a bus ", "17": "", "18": None, "0019": "the sky"})
    found = read_vilbert_captions(file)
    assert found.records == (
        CaptionRecord(id="2946434161", images=("2946434161",), caption="a bus"),
        CaptionRecord(id="0019", images=("0019",), caption="the sky"),
    )
    assert found.empty == 2
    for content, kind in (([], "a list"), ({"a": ["b"]}, "an object with a")):
        with pytest.raises(DataError, match=f"from image id to caption; found {kind}"):
            read_vilbert_captions(save(file, content))


def test_find(tmp_path: Path) -> None:
    assert (
        find_conceptual_captions(save(tmp_path / "a" / "Train_GCC-training.tsv", TABLE).parent, "train").name
        == "Train_GCC-training.tsv"
    )
    assert find_conceptual_captions(save(tmp_path / "b" / "val_frcnn.json", "").parent, "val").name == "val_frcnn.json"
    for name in ("caption_val.json", "caption_valid.json"):
        assert find_vilbert_captions(save(tmp_path / name / name, {}).parent, "val").name == name
    with pytest.raises(
        DataError,
        match=r"no Conceptual Captions of split 'val'.*"
        r"expected Validation_GCC-1\.1\.0-Validation\.tsv or val_frcnn\.json",
    ):
        find_conceptual_captions(tmp_path / "a", "val")
    with pytest.raises(DataError, match="expected a split train or val"):
        find_conceptual_captions(tmp_path / "a", "test")
    with pytest.raises(DataError, match=r"expected caption_train\.json"):
        find_vilbert_captions(tmp_path, "train")


ADDRESSES = [
    "http://static.flickr.com/2723/4385058960_b0f291553e.jpg",
    "http://static.flickr.com/2633/4190742371_f7a92b9b05.jpg",
    "http://a/b.jpg",
]
CAPTIONS = ["A wooden chair in the living room", "one of my old 33&quot; truck tires", ""]


def test_sbu_as_json(tmp_path: Path) -> None:
    save(
        tmp_path / "sbu-captions-all.json", {"image_urls": ADDRESSES, "user_ids": ["1", "2", "3"], "captions": CAPTIONS}
    )
    found = read_sbu(tmp_path)
    assert [(record.id, record.images[0], record.caption) for record in found.records] == [
        ("0", "4385058960_b0f291553e", "A wooden chair in the living room"),
        ("1", "4190742371_f7a92b9b05", 'one of my old 33" truck tires'),
    ]
    assert found.empty == 1


def test_sbu_as_lists(tmp_path: Path) -> None:
    save(tmp_path / "SBU_captioned_photo_dataset_urls.txt", "\n".join(ADDRESSES) + "\n")
    assert not has_sbu(tmp_path)
    captions = save(tmp_path / "SBU_captioned_photo_dataset_captions.txt", "\r\n".join(CAPTIONS) + "\r\n")
    assert has_sbu(tmp_path)
    assert [record.images[0] for record in read_sbu(tmp_path).records] == [
        "4385058960_b0f291553e",
        "4190742371_f7a92b9b05",
    ]
    save(captions, CAPTIONS[0])
    with pytest.raises(DataError, match="3 addresses, 1 captions"):
        read_sbu(tmp_path)


def test_no_sbu(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no SBU captions"):
        read_sbu(tmp_path)
    with pytest.raises(DataError, match="'image_urls' and 'captions'; found an object with captions"):
        read_sbu(save(tmp_path / "sbu-captions-all.json", {"captions": []}).parent)
