"""Caption files of COCO and Flickr30K, clean and dirty."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.captions import (
    CaptionRecord,
    Captions,
    find_captions_file,
    find_coco_captions,
    find_flickr30k,
    has_coco_captions,
    has_flickr30k,
    read_captions,
    read_flickr30k,
    read_flickr30k_entities,
    read_flickr30k_lines,
    read_karpathy,
)
from visling.errors import DataError

CONTENT: dict[str, Any] = {
    "info": {"description": "COCO 2014 Dataset"},
    "images": [
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 640, "height": 480},
        {"id": 42, "file_name": "train/scene_000000000042.png", "width": 64, "height": 64},
        {"id": 43, "file_name": "scene_000000000043.png", "width": 64, "height": 64},
        {"id": 44, "file_name": "scene_000000000044.png", "width": 64, "height": 64},
    ],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "Closeup of bins of food that include broccoli and bread.\n"},
        {"id": 2, "image_id": 42, "caption": "  a small  red circle "},
        {"id": 2, "image_id": 42, "caption": "the same id again"},
        {"id": 3, "image_id": 42, "caption": "  \n"},
        {"id": 4, "image_id": 44, "caption": None},
        *({"id": 10 + n, "image_id": 9, "caption": f"caption {n}"} for n in range(6)),
    ],
}


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_records_and_dirt(tmp_path: Path) -> None:
    found = read_captions(save(tmp_path / "captions_train2014.json", CONTENT))
    assert found.records[0] == CaptionRecord(
        id="1",
        images=("COCO_train2014_000000000009",),
        caption="Closeup of bins of food that include broccoli and bread.",
    )
    assert found.records[1] == CaptionRecord(id="2", images=("scene_000000000042",), caption="a small red circle")
    assert len(found.records) == 8
    assert (found.empty, found.repeated, found.surplus) == (2, 1, 0)
    assert found.bare_images == ("scene_000000000043", "scene_000000000044")


def test_five_captions_per_image(tmp_path: Path) -> None:
    found = read_captions(save(tmp_path / "captions.json", CONTENT), most=5)
    kept = [record.id for record in found.records if record.images == ("COCO_train2014_000000000009",)]
    assert kept == ["1", "10", "11", "12", "13"]
    assert found.surplus == 2


def test_truncated_file_names_file_and_position(tmp_path: Path) -> None:
    file = save(tmp_path / "captions_val.json", CONTENT)
    file.write_text(file.read_text()[:300])
    with pytest.raises(
        DataError, match=r"captions_val\.json is truncated or not JSON.*line 1, character \d+ of 300 bytes"
    ):
        read_captions(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be an object with a list 'annotations'; found a list"),
        ({"images": []}, "object with images"),
        ({"annotations": []}, "list 'images'"),
        ({"images": [], "annotations": [{"id": 1, "image_id": 5}]}, "entry 0 of 'annotations' lacks 'caption'"),
        ({"images": [], "annotations": [7]}, "entry 0 of 'annotations' must be an object; found a int"),
        ({"images": [], "annotations": [{"id": 1, "image_id": 5, "caption": "x"}]}, "caption 1 is about image 5"),
    ],
)
def test_other_layouts(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_captions(save(tmp_path / "captions.json", content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotation file"):
        read_captions(tmp_path / "absent.json")


def test_find_captions_file(tmp_path: Path) -> None:
    wanted = save(tmp_path / "annotations" / "captions_train2014.json", CONTENT)
    save(tmp_path / "annotations" / "captions_trainval2014.json", CONTENT)
    assert find_captions_file(tmp_path, "train") == wanted
    assert find_captions_file(tmp_path, "train2014") == wanted
    with pytest.raises(
        DataError, match=r"captions_val\*\.json.*found captions_train2014\.json, captions_trainval2014\.json"
    ):
        find_captions_file(tmp_path, "val")
    save(tmp_path / "captions_train.json", CONTENT)
    with pytest.raises(DataError, match="several files"):
        find_captions_file(tmp_path, "train")


def karpathy(name: str, split: str, *raw: str | None, first: int = 0) -> dict[str, Any]:
    sentences = [{"tokens": ["a", "dog"], "raw": text, "imgid": 0, "sentid": first + at} for at, text in enumerate(raw)]
    return {"filename": name, "imgid": 0, "split": split, "sentids": [], "sentences": sentences}


KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            **karpathy("COCO_val2014_000000391895.jpg", "test", "A man.", "A hill.", first=0),
            "filepath": "val2014",
            "cocoid": 391895,
        },
        {
            **karpathy("COCO_train2014_000000000009.jpg", "train", *(f"Caption {n}." for n in range(6)), first=10),
            "cocoid": 9,
        },
        {
            **karpathy("COCO_val2014_000000000042.jpg", "restval", "One.", " ", None, first=20),
            "filepath": "val2014",
            "cocoid": 42,
        },
        {**karpathy("COCO_val2014_000000000043.jpg", "restval", first=30), "filepath": "val2014", "cocoid": 43},
    ],
}


def test_karpathy_splits(tmp_path: Path) -> None:
    file = save(tmp_path / "dataset_coco.json", KARPATHY)
    assert read_karpathy(file, "test").records == (
        CaptionRecord(id="0", images=("COCO_val2014_000000391895",), caption="A man."),
        CaptionRecord(id="1", images=("COCO_val2014_000000391895",), caption="A hill."),
    )
    train = read_karpathy(file, "train", most=5)
    assert [record.caption for record in train.records] == [*(f"Caption {n}." for n in range(5)), "One.", "a dog"], (
        "restval is training data"
    )
    assert (train.empty, train.surplus, train.bare_images) == (1, 1, ("COCO_val2014_000000000043",))
    with pytest.raises(DataError, match="no image of split 'dev'; found restval, test, train"):
        read_karpathy(file, "dev")


TOKENS = (
    "1000092795.jpg#0\tTwo young guys with shaggy hair look at their hands .\n"
    "1000092795.jpg#1\t\n"
    "1000092795.jpg#0\tthe same number again\n"
    "7162685234.jpg#4\tA man\u2028in green .\n"
    "\n"
    "36979.jpg#3 no tab\n"
    "36979.jpg#0\tA group"
)


def test_flickr30k_tokens(tmp_path: Path) -> None:
    file = tmp_path / "results_20130124.token"
    file.write_text(TOKENS, encoding="utf-8")
    found = read_flickr30k(file)
    assert [(record.id, record.images[0], record.caption) for record in found.records] == [
        ("1000092795#0", "1000092795", "Two young guys with shaggy hair look at their hands ."),
        ("7162685234#4", "7162685234", "A man in green ."),
        ("36979#0", "36979", "A group"),
    ]
    assert (found.empty, found.repeated, found.malformed) == (1, 1, 1)
    assert [record.id for record in read_flickr30k(file, {"36979"}).records] == ["36979#0"]
    file.write_text("image,caption\na.jpg,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="no line of Flickr30K's layout"):
        read_flickr30k(file)


def test_flickr30k_lines(tmp_path: Path) -> None:
    file = tmp_path / "test_ann.jsonl"
    lines = [
        {"sentences": ["A man.", "", "A dog."], "id": "1007129816", "img_path": "1007129816.jpg"},
        {"sentences": ["x"], "id": "9"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = read_flickr30k_lines(file)
    assert [(record.id, record.caption) for record in found.records] == [
        ("1007129816#0", "A man."),
        ("1007129816#2", "A dog."),
        ("9#0", "x"),
    ]
    assert found.empty == 1
    for line, message in (
        ("[1]", "line 1 is a JSON list; expected one object per line"),
        ('{"sentences": 1, "id": 2}', "line 1: expected an object with"),
    ):
        file.write_text(line, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_flickr30k_lines(file)


def test_find_flickr30k(tmp_path: Path) -> None:
    (tmp_path / "results_20130124.token").write_text(TOKENS, encoding="utf-8")
    with pytest.raises(DataError, match=r"has no splits: put the list .* as train\.txt"):
        find_flickr30k(tmp_path, "train")
    assert not has_flickr30k(tmp_path, "train")
    (tmp_path / "train.txt").write_text("1000092795\n7162685234\n", encoding="utf-8")
    assert has_flickr30k(tmp_path, "train")
    assert len(find_flickr30k(tmp_path, "train").records) == 2
    for name, split in (("valid_ann.jsonl", "val"), ("all_data_final_test_set0_2014.jsonline", "test")):
        (tmp_path / name).write_text(json.dumps({"sentences": [name], "img_path": "1.jpg"}), encoding="utf-8")
        assert has_flickr30k(tmp_path, split)
        assert find_flickr30k(tmp_path, split).records[0].caption == name
    save(tmp_path / "dataset_flickr30k.json", KARPATHY)
    assert has_flickr30k(tmp_path, "val")
    assert len(find_flickr30k(tmp_path, "test").records) == 2
    with pytest.raises(DataError, match=r"expected dataset_flickr30k\.json, train_ann\.jsonl.*found none of this kind"):
        find_flickr30k(tmp_path / "nowhere", "train")


def coco(folder: Path) -> Path:
    """COCO's two parts, two images each, and what may lie next to them."""
    for split, number in (("train", 1), ("val", 3)):
        images = [{"id": image, "file_name": f"COCO_{split}2014_{image:012d}.jpg"} for image in (number, number + 1)]
        told = [
            {"id": 10 + image["id"], "image_id": image["id"], "caption": f"caption {image['id']}"} for image in images
        ]
        save(folder / "annotations" / f"captions_{split}2014.json", {"images": images, "annotations": told})
    save(folder / "annotations" / "captions_val2014_fakecap_results.json", [])
    return folder


def numbers(found: Captions) -> list[int]:
    return [int(record.images[0][-12:]) for record in found.records]


def test_coco_by_file(tmp_path: Path) -> None:
    coco(tmp_path)
    assert numbers(find_coco_captions(tmp_path, "train")) == [1, 2]
    assert [has_coco_captions(tmp_path, split) for split in ("train", "val2014", "test")] == [True, True, False]
    with pytest.raises(DataError, match=r"no file captions_test\*\.json"):
        find_coco_captions(tmp_path, "test")


@pytest.mark.parametrize("listed", ["COCO_val2014_000000000004.jpg", "COCO_val2014_000000000004", "4"])
def test_coco_by_lists(tmp_path: Path, listed: str) -> None:
    lists = coco(tmp_path) / "annotations"
    (lists / "captions_val.txt").write_text(listed + "\n")
    assert numbers(find_coco_captions(tmp_path, "train")) == [1, 2, 3], "both parts without minival"
    assert numbers(find_coco_captions(tmp_path, "val")) == [4]
    assert numbers(find_coco_captions(tmp_path, "val2014")) == [3, 4], "a file named in full"
    assert [has_coco_captions(tmp_path, split) for split in ("train", "val", "val2014", "test")] == [
        True,
        True,
        True,
        False,
    ]
    with pytest.raises(DataError, match=r"split by captions_val\.txt, none of which is captions_test\.txt"):
        find_coco_captions(tmp_path, "test")
    (lists / "captions_train.txt").write_text("1\n")
    assert numbers(find_coco_captions(tmp_path, "train")) == [1]
    (lists / "captions_val.txt").write_text("12\n")
    with pytest.raises(DataError, match=r"captions_val\.txt: no image of split 'val' has a caption"):
        find_coco_captions(tmp_path, "val")
    for file in lists.glob("*.json"):
        file.unlink()
    assert not has_coco_captions(tmp_path, "train")
    with pytest.raises(DataError, match=r"no caption file captions_\*\.json next to them"):
        find_coco_captions(tmp_path, "train")


def test_coco_by_karpathy(tmp_path: Path) -> None:
    save(coco(tmp_path) / "dataset_coco.json", KARPATHY)
    assert set(numbers(find_coco_captions(tmp_path, "train"))) == {9, 42}
    assert find_coco_captions(tmp_path, "train").bare_images == ("COCO_val2014_000000000043",)
    assert numbers(find_coco_captions(tmp_path, "train2014")) == [1, 2], "a file named in full"
    assert has_coco_captions(tmp_path, "train")
    (tmp_path / "captions_val.txt").write_text("4\n")
    assert numbers(find_coco_captions(tmp_path, "train")) == [1, 2, 3], "lists are somebody's wish"


# Flickr30K Entities, in invented files of its layout

ENTITIES = Path(__file__).parents[2] / "golden" / "flickr30k_entities_files"


def entities(folder: Path) -> dict[str, Any]:
    """The sample files, with all its images as the split val; and what the official reader makes of them."""
    shutil.copytree(ENTITIES, folder, dirs_exist_ok=True)
    expected: dict[str, Any] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    (folder / "val.txt").write_text("".join(f"{image}\n" for image in expected), encoding="utf-8")
    return expected


def test_entities_sentences_are_those_of_the_official_reader(tmp_path: Path) -> None:
    expected = entities(tmp_path)
    assert has_flickr30k(tmp_path, "val")
    assert not has_flickr30k(tmp_path, "train")
    captions = find_flickr30k(tmp_path, "val")
    boxed = {
        f"{image}#{number}": " ".join(sentence["sentence"].split())
        for image, told in expected.items()
        for number, sentence in enumerate(told["sentences"])
        if any(phrase["phrase_id"] in told["annotations"]["boxes"] for phrase in sentence["phrases"])
    }
    assert {record.id: record.caption for record in captions.records} == boxed
    assert [record.images for record in captions.records] == [(name.partition("#")[0],) for name in boxed]
    every = sum(bool(sentence["sentence"].strip()) for told in expected.values() for sentence in told["sentences"])
    assert captions.unboxed == every - len(boxed) > 0


def test_entities_come_before_karpathys_split(tmp_path: Path) -> None:
    entities(tmp_path / "Flickr30kEntities")
    (tmp_path / "dataset_flickr30k.json").write_text('{"images": []}')
    assert find_flickr30k(tmp_path, "val").records
    with pytest.raises(DataError, match="has no image of split 'train'"):
        find_flickr30k(tmp_path, "train")


def test_broken_entities_are_named(tmp_path: Path) -> None:
    image = next(iter(entities(tmp_path)))
    file = tmp_path / "Annotations" / f"{image}.xml"
    file.write_text(file.read_text()[:40])
    with pytest.raises(DataError, match=rf"{image}.xml is truncated or not XML"):
        read_flickr30k_entities(tmp_path, "val")
    file.unlink()
    with pytest.raises(DataError, match=rf"no annotation file .*{image}.xml"):
        read_flickr30k_entities(tmp_path, "val")
    with pytest.raises(DataError, match="has no Flickr30K Entities of 'test'"):
        read_flickr30k_entities(tmp_path, "test")
