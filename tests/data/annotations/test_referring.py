"""The refer API's folders: data sets, splits, sentences, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.referring import find_refer, read_refer
from visling.errors import DataError


def reference(number: int, split: str, *sentences: int, image: int = 9) -> dict[str, Any]:
    return {
        "ref_id": number,
        "ann_id": 100 + number,
        "image_id": image,
        "split": split,
        "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",
        "sentences": [
            {
                "sent_id": sent,
                "raw": f"The {sent}. MAN!",
                "sent": f"the {sent} man",
                "tokens": ["the", str(sent), "man"],
            }
            for sent in sentences
        ],
    }


PARTS = ("train", "val", "testA", "testB", "testAB")
REFERENCES = [reference(number, split, 2 * number, 2 * number + 1) for number, split in enumerate(PARTS)]


def write(folder: Path, references: Any = REFERENCES, by: str = "unc", **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": 9, "width": 100, "height": 50, "file_name": "COCO_train2014_000000000009.jpg"}],
        "annotations": [{"id": 100 + number, "bbox": [number, 2.5, 30, 20]} for number in range(len(PARTS))],
    }
    (folder / "instances.json").write_text(json.dumps(content | changes))
    (folder / f"refs({by}).p").write_bytes(pickle.dumps(references, protocol=2))
    return folder


def test_one_record_per_sentence_in_the_order_of_the_file(tmp_path: Path) -> None:
    first, second = read_refer(write(tmp_path / "refcoco+"), "train")
    assert (first.id, second.id) == ("0", "1")
    assert (first.raw, first.sent, first.tokens) == ("The 0. MAN!", "the 0 man", ("the", "0", "man"))
    assert first.images == ("9",), "named by its number, not by the file name of the reference"
    assert (first.box, first.corners, first.size) == ((0, 2.5, 30, 20), (0, 2.5, 30, 22.5), (100, 50))
    assert (first.reference, first.split, first.dataset) == (0, "train", "refcoco+")
    backwards = read_refer(write(tmp_path / "refcoco", REFERENCES[::-1]), "test")
    assert [record.reference for record in backwards] == [4, 4, 3, 3, 2, 2]


@pytest.mark.parametrize(
    ("split", "references"),
    [("val", [1]), ("test", [2, 3, 4]), ("testA", [2, 4]), ("testB", [3, 4]), ("testAB", [4])],
)
def test_splits_by_the_rules_of_the_api(tmp_path: Path, split: str, references: list[int]) -> None:
    records = read_refer(write(tmp_path), split)
    assert list(dict.fromkeys(record.reference for record in records)) == references


@pytest.mark.parametrize("split", ["testC", "valid", "trainval"])
def test_unknown_and_absent_splits_are_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match=f"no references of split '{split}'; it has testA, testAB, testB, train, val"):
        read_refer(write(tmp_path), split)


def test_the_usual_version_is_read_unless_another_is_asked_for(tmp_path: Path) -> None:
    for by in ("google", "umd"):
        write(tmp_path / "refcocog", [reference(0, "train", 5 if by == "umd" else 7)], by=by)
    assert read_refer(tmp_path / "refcocog", "train")[0].id == "5"
    assert read_refer(tmp_path / "refcocog", "train", by="google")[0].id == "7"
    with pytest.raises(DataError, match=r"no references .*refs\(unc\)\.p; found refs\(google\)\.p, refs\(umd\)\.p"):
        read_refer(tmp_path / "refcocog", "train", by="unc")
    write(tmp_path / "mine", [reference(0, "train", 3)], by="me")
    assert read_refer(tmp_path / "mine", "train")[0].id == "3", "the only file of a folder of one's own"
    (tmp_path / "refcocog" / "refs(umd).p").unlink()
    with pytest.raises(DataError, match=r"refs\(umd\)\.p; found refs\(google\)\.p"):
        read_refer(tmp_path / "refcocog", "train")


def test_the_folder_of_a_data_set_is_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no referring expressions in .*refcoco or refcoco"):
        find_refer(tmp_path)
    only = write(tmp_path / "refcoco+")
    assert find_refer(tmp_path) == find_refer(only) == find_refer(tmp_path, "refcoco+") == only
    other = write(tmp_path / "refcocog", by="umd")
    with pytest.raises(DataError, match=r'holds refcoco\+, refcocog.*task_settings.dataset="refcoco\+"'):
        find_refer(tmp_path)
    assert find_refer(tmp_path, "refcocog") == other
    with pytest.raises(DataError, match="or in its folder refclef"):
        find_refer(tmp_path, "refclef")
    with pytest.raises(DataError, match="or in its folder refcoco"):
        find_refer(only, "refcoco")


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.update(ann_id=999), "names annotation 999, which .* does not list"),
        (lambda one: one.update(image_id=8), "names image 8, which .* does not list"),
        (lambda one: one["sentences"].append(one["sentences"][0]), "sentence 0 occurs twice"),
        (lambda one: one["sentences"][0].update(raw=" ", sent="", tokens=[]), "sentence 0 has no words"),
        (lambda one: one["sentences"].append({"raw": "a"}), "must be an object with 'sent_id'"),
        (lambda one: one.pop("sentences"), "lacks 'sentences'"),
    ],
)
def test_broken_references_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    broken = reference(0, "train", 0, 1)
    change(broken)
    with pytest.raises(DataError, match=message):
        read_refer(write(tmp_path, [broken]), "train")


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([100, 2, 30, 20], "lies outside its image of 100 x 50 pixels"),
        ([-31, 2, 30, 20], "lies outside its image"),
        ([1, 2, 0, 20], "has no area"),
        ([1, 2, 3], "must be four finite numbers"),
        ([1, 2, 3, float("inf")], "must be four finite numbers"),
    ],
)
def test_boxes_that_cannot_be_referred_to(tmp_path: Path, box: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_refer(write(tmp_path, REFERENCES[:1], annotations=[{"id": 100, "bbox": box}]), "train")


def test_a_box_that_reaches_beyond_its_image_is_kept_as_annotated(tmp_path: Path) -> None:
    folder = write(tmp_path, REFERENCES[:1], annotations=[{"id": 100, "bbox": [-2, 40, 30, 20]}])
    assert read_refer(folder, "train")[0].box == (-2, 40, 30, 20)


def test_missing_words_and_sizes_are_made_up_for(tmp_path: Path) -> None:
    bare = reference(0, "train", 0)
    bare["sentences"] = [{"sent_id": 0, "sent": "red hat"}, {"sent_id": 1, "raw": "?!", "sent": "", "tokens": []}]
    first, second = read_refer(write(tmp_path, [bare], images=[{"id": 9}]), "train")
    assert (first.raw, first.tokens, first.size) == ("red hat", ("red", "hat"), None)
    assert (second.raw, second.tokens) == ("?!", ()), "punctuation is a word for BERT"


def test_damaged_and_other_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {"not": "a list"})
    with pytest.raises(DataError, match="must be a pickled list of references; found a dict"):
        read_refer(folder, "train")
    (folder / "refs(unc).p").write_bytes(b"\x80\x02")
    with pytest.raises(DataError, match="is not read"):
        read_refer(folder, "train")
    write(tmp_path)
    (folder / "instances.json").unlink()
    with pytest.raises(DataError, match="no annotation file"):
        read_refer(folder, "train")
