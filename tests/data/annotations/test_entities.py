"""Flickr30K Entities: invented files of the official layout and what the official reader makes of them, and broken
ones."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.entities import (
    EntitiesData,
    find_entities,
    listed_images,
    parse_sentence,
    read_boxes,
    read_entities,
    read_sentences,
)
from visling.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, golden: Path) -> Path:
    """The recorded files, all images as the split val."""
    shutil.copytree(golden / "flickr30k_entities_files", tmp_path, dirs_exist_ok=True)
    (tmp_path / "val.txt").write_text("".join(f"{image}\n" for image in expected(tmp_path)), encoding="utf-8")
    return tmp_path


def expected(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return content


def test_sentences_and_phrases_are_those_of_the_official_reader(folder: Path) -> None:
    phrases = 0
    for image, told in expected(folder).items():
        for (_, found), wanted in zip(read_sentences(folder, image), told["sentences"], strict=True):
            assert found.text == wanted["sentence"]
            assert [
                {
                    "first_word_index": found.text[: phrase.start].count(" "),
                    "phrase": phrase.text,
                    "phrase_id": phrase.chain,
                    "phrase_type": list(phrase.types),
                }
                for phrase in found.phrases
            ] == wanted["phrases"]
            assert all(found.text[phrase.start : phrase.stop] == phrase.text for phrase in found.phrases)
            phrases += len(found.phrases)
    assert phrases > 0


def test_boxes_are_those_of_the_official_reader(folder: Path) -> None:
    """The depth of an image, three channels, is not kept."""
    for image, told in expected(folder).items():
        found, wanted = read_boxes(folder / "Annotations" / f"{image}.xml"), told["annotations"]
        less_one = {
            chain: [[side - 1 for side in box] for box in boxes] for chain, boxes in found.boxes.items()
        }  # what the official reader does
        assert less_one == wanted["boxes"]
        assert found.size == (wanted["width"], wanted["height"])
        assert list(found.scene) == wanted["scene"]
        assert list(found.unboxed) == wanted["nobox"]


@pytest.mark.parametrize("first_pixel", [0, 1])
def test_records_have_the_phrases_with_a_box(folder: Path, first_pixel: Any) -> None:
    told = expected(folder)
    data = read_entities(folder, "val", first_pixel=first_pixel)
    kept: dict[str, list[tuple[str, list[list[float]]]]] = {}
    every = 0
    for image, content in told.items():
        boxes = content["annotations"]["boxes"]
        for number, sentence in enumerate(content["sentences"]):
            every += len(sentence["phrases"])
            own = [
                (phrase["phrase"], [[side + first_pixel for side in box] for box in boxes[phrase["phrase_id"]]])
                for phrase in sentence["phrases"]
                if phrase["phrase_id"] in boxes
            ]
            kept |= {f"{image}#{number}": own} if own else {}
    assert {
        record.id: [(phrase.text, [list(box) for box in phrase.boxes or ()]) for phrase in record.phrases]
        for record in data.records
    } == kept
    assert data.unboxed_phrases == every - sum(map(len, kept.values())) > 0
    worded = sum(bool(sentence["sentence"].strip()) for content in told.values() for sentence in content["sentences"])
    assert data.unboxed_sentences == worded - len(kept) > 0
    left_out = {record.images[0]: record.left_out for record in data.records}
    assert sum(left_out.values()) <= data.unboxed_sentences
    assert all(record.size == tuple(told[record.images[0]]["annotations"][side] for side in ("width", "height"))
               for record in data.records)  # fmt: skip


def write(folder: Path, *sentences: str, objects: str = "", split: str = "train", image: str = "7") -> Path:
    """One image of 100 x 50 pixels; chain 1 has two boxes, chain 2 shares one of them, chain 3 has none."""
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "Sentences" / f"{image}.txt").write_text("".join(f"{line}\n" for line in sentences), encoding="utf-8")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>{}</xmax><ymax>50</ymax></bndbox>"
    (folder / "Annotations" / f"{image}.xml").write_text(
        "<annotation><filename>7.jpg</filename><size><width>100</width><height>50</height><depth>3</depth></size>"
        f"<object><name>1</name><name>2</name>{box.format(100)}</object><object><name>1</name>{box.format(9)}</object>"
        f"<object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object>{objects}</annotation>",
        encoding="utf-8",
    )
    (folder / f"{split}.txt").write_text(f"{image}\n", encoding="utf-8")
    return folder


def counts(data: EntitiesData) -> tuple[int, int, int]:
    """Phrases and sentences without a box, and unrelated sentences."""
    return data.unboxed_phrases, data.unboxed_sentences, data.unrelated


def test_messy_sentences(tmp_path: Path) -> None:
    write(
        tmp_path,
        "  [/EN#1/people/other Two  men]'s hats ,[/EN#3/scene a park]. ",
        "Nobody is here .",
        "",
        "[/EN#0/notvisual It] is [/EN#2/clothing half-[striped].",
        "[/EN#9/other A hat] that no file knows .",
    )
    data = read_entities(tmp_path, "train")
    first, second = data.records
    assert first.sentence == "Two men's hats ,a park."
    (phrase,) = first.phrases
    assert (phrase.text, phrase.types, phrase.start, phrase.stop) == ("Two men", ("people", "other"), 0, 7)
    assert list(phrase.boxes or ()) == [(1, 2, 100, 50), (1, 2, 9, 50)]
    assert (first.unboxed, first.left_out, first.size) == (1, 2, (100, 50))
    assert (second.id, second.sentence) == ("7#3", "It is half-[striped.")
    assert list(second.phrases[0].boxes or ()) == [(1, 2, 100, 50)]
    assert counts(data) == (3, 2, 0)


def test_sentences_about_something_else_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "[/EN#1/people men]", "[/EN#2/people men]")
    listed = tmp_path / "UNRELATED_CAPTIONS"
    listed.write_text("Image_ID Caption_Number\n7 2\n8 1\n\n", encoding="utf-8")
    data = read_entities(tmp_path, "train")
    assert [record.id for record in data.records] == ["7#0"]
    assert counts(data) == (0, 0, 1)
    assert len(read_entities(tmp_path, "train", unrelated=True).records) == 2
    listed.write_text("a comment\n7 second\n", encoding="utf-8")
    with pytest.raises(DataError, match="UNRELATED_CAPTIONS, line 2: expected an image id"):
        read_entities(tmp_path, "train")


def test_where_files_may_be(tmp_path: Path) -> None:
    for number, name in enumerate((".", "Flickr30kEntities", "flickr30k_entities")):
        root = tmp_path / str(number)
        write(root / name, "[/EN#1/people men]")
        assert len(read_entities(root, "train").records) == 1
        assert find_entities(root, "val") is None
        with pytest.raises(DataError, match=r"no Flickr30K Entities of 'val': expected Sentences, Annotations and val"):
            read_entities(root, "val")


def test_bans_table_lists_images_too(tmp_path: Path, golden: Path) -> None:
    recorded = golden / "visualbert_tasks" / "flickr"
    cases = json.loads((recorded / "rows.json").read_text(encoding="utf-8"))["cases"]
    for case in cases:
        split = case["split"]
        _, file = find_entities(recorded / "data", split) or pytest.fail(split)
        assert file.name == f"{split}_imgid2idx.pkl"
        assert list(dict.fromkeys(str(row["image_id"]) for row in case["rows"])) == listed_images(file)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="holds a list; expected a table"):
        listed_images(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("[/EN#1/people men here", "a phrase is not closed"),
        ("men] here", "'\\]' closes no phrase"),
        ("[/EN#1/people two [/EN#2/people men]]", "begins within another"),
        ("[/EN#1/people ] here", "has no words"),
    ],
)
def test_broken_mark_up_is_named(tmp_path: Path, sentence: str, message: str) -> None:
    write(tmp_path, "[/EN#1/people men]", sentence)
    with pytest.raises(DataError, match=rf"7\.txt, line 2: .*{message}"):
        read_entities(tmp_path, "train")
    with pytest.raises(DataError, match=f"here: .*{message}"):
        parse_sentence(sentence, "here")


def xml_box(*corners: Any) -> str:
    sides = "".join(
        f"<{name}>{at}</{name}>" for name, at in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>4</name><bndbox>{sides}</bndbox></object>"


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((101, 1, 120, 5), r"of 4 has no pixel of the image of 100 x 50 pixels"),
        ((1, -9, 5, 0), "no pixel of the image"),
        ((9, 1, 5, 9), "no pixel of the image"),
        (("left", 1, 5, 9), "expected a number of pixels; found 'left'"),
        (("nan", 1, 5, 9), "no pixel of the image"),
    ],
)
def test_broken_boxes_are_named(tmp_path: Path, box: tuple[Any, ...], message: str) -> None:
    write(tmp_path, "[/EN#1/people men]", objects=xml_box(*box))
    with pytest.raises(DataError, match=rf"7\.xml.*{message}"):
        read_entities(tmp_path, "train")


def test_a_box_that_sticks_out_is_kept(tmp_path: Path) -> None:
    write(tmp_path, "[/EN#4/people men]", objects=xml_box(0, 1, 101, 50))
    (record,) = read_entities(tmp_path, "train").records
    assert record.phrases[0].boxes == ((0, 1, 101, 50),)


def test_broken_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, "[/EN#1/people men]")
    file = tmp_path / "Annotations" / "7.xml"
    whole = file.read_text(encoding="utf-8")
    for content, message in (
        (whole[:60], "is truncated or not XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + whole, "declares a document type"),
        (whole.replace("<width>100</width>", ""), "expected a number of pixels; found None"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=rf"7\.xml.*{message}"):
            read_entities(tmp_path, "train")
    file.write_bytes(whole.encode("utf-16"))
    with pytest.raises(DataError, match=r"7\.xml is not UTF-8 text"):
        read_entities(tmp_path, "train")
    file.unlink()
    with pytest.raises(DataError, match=r"no annotation file .*7\.xml"):
        read_entities(tmp_path, "train")
    file.write_text(whole, encoding="utf-8")
    (tmp_path / "train.txt").write_text("7\n8\n7.jpg\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.txt lists image 7 more than once \(1 such images\)"):
        read_entities(tmp_path, "train")
    (tmp_path / "train.txt").write_text("7\n8\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no annotation file .*8\.xml"):
        read_entities(tmp_path, "train")
