"""Files of caption retrieval: every layout, left-outs counted, pools and lists that do not fit refused. Their reading
in the order of ViLBERT's release is compared in tests/parity/test_vilbert_retrieval.py."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.data.annotations.retrieval import read_pool, read_retrieval, read_test_images
from visling.errors import DataError


def sentence(number: int, raw: str | None, tokens: list[str] | None = None) -> dict[str, Any]:
    return {"raw": raw, "tokens": tokens or (raw or "").lower().split(), "sentid": number}


def image(number: int, split: str, *sentences: dict[str, Any]) -> dict[str, Any]:
    return {"filename": f"COCO_val2014_{number:012d}.jpg", "split": split, "sentences": list(sentences)}


IMAGES = [
    image(7, "train", *(sentence(n, f"Dog {n}.") for n in range(7))),
    image(8, "restval", sentence(10, "A cat."), sentence(11, "  ")),
    image(9, "test", sentence(20, "One."), sentence(20, "Again.")),
    image(10, "test"),
    image(9, "test", sentence(21, "Another.")),
]


def karpathy(path: Path, images: Any = IMAGES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "dataset": "coco"}), encoding="utf-8")
    return path


def test_restval_belongs_to_train_and_five_captions_are_used(tmp_path: Path) -> None:
    karpathy(tmp_path / "dataset_coco.json")
    data = read_retrieval(tmp_path, "train")
    assert [record.caption for record in data.records] == ["Dog 0.", "Dog 1.", "Dog 2.", "Dog 3.", "Dog 4.", "A cat."]
    assert [record.id for record in data.records] == ["0", "1", "2", "3", "4", "10"]
    assert data.notes() == [
        "1 captions have no word and were left out",
        "2 captions beyond the first 5 of an image were left out",
        "1 images have fewer than 5 captions",
    ]


def test_images_listed_twice_or_without_a_caption_are_counted(tmp_path: Path) -> None:
    karpathy(tmp_path / "dataset_coco.json")
    data = read_retrieval(tmp_path, "test")
    assert [(record.caption, record.images[0][-2:]) for record in data.records] == [("One.", "09"), ("Another.", "09")]
    assert data.notes() == [
        "1 captions repeat the id of another and were left out",
        "1 images are listed more than once; their captions were joined",
        "1 images have no caption and were left out",
        "1 images have fewer than 5 captions",
    ]


def test_captions_as_written_or_as_words(tmp_path: Path) -> None:
    images = [image(1, "test", sentence(0, "A Dog!", ["a", "dog"]), sentence(1, None, ["cat"]))]
    karpathy(tmp_path / "dataset_flickr30k.json", images)
    assert [record.caption for record in read_retrieval(tmp_path, "test").records] == ["A Dog!", "cat"]
    assert [record.caption for record in read_retrieval(tmp_path, "test", text="tokens").records] == ["a dog", "cat"]


def test_one_file_per_split_in_a_folder_of_its_own(tmp_path: Path) -> None:
    for split in ("train", "test"):
        images = [{"filename": f"{split}.png", "split": split, "sentences": [sentence(0, split)]}]
        karpathy(tmp_path / "karpathy" / f"dataset_scenes_{split}.json", images)
    assert read_retrieval(tmp_path, "test").records[0].caption == "test"
    with pytest.raises(
        DataError, match=r"no captions of split 'val'.*found dataset_scenes_test.json, dataset_scenes_tr"
    ):
        read_retrieval(tmp_path, "val")


def test_lines_of_vilbert_and_volta(tmp_path: Path) -> None:
    line = {"sentences": [f"dog {n}" for n in range(6)], "id": 3, "img_path": "17.jpg"}
    (tmp_path / "valid_ann.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    data = read_retrieval(tmp_path, "val")
    assert [(record.id, record.images) for record in data.records][:1] == [("17#0", ("17",))]
    assert len(data.records) == 5
    assert read_retrieval(tmp_path, "val", image_field="id").records[0].images == ("3",)


def test_files_that_do_not_name_one_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none of this kind"):
        read_retrieval(tmp_path, "test")
    karpathy(tmp_path / "dataset_coco.json")
    with pytest.raises(DataError, match="no image of split 'val'"):
        read_retrieval(tmp_path, "val")
    karpathy(tmp_path / "dataset_flickr30k.json")
    with pytest.raises(DataError, match=r"several files.*dataset_coco.json, dataset_flickr30k.json"):
        read_retrieval(tmp_path, "test")
    (tmp_path / "dataset_coco.json").write_text('{"images": [')
    (tmp_path / "dataset_flickr30k.json").unlink()
    with pytest.raises(DataError, match="truncated or not JSON"):
        read_retrieval(tmp_path, "test")


def write_pool(path: Path, pool: Any, images: Any) -> Path:
    path.write_bytes(pickle.dumps({"train_hard_pool": np.array(pool, float), "train_image_list": images}, protocol=2))
    return path


def test_images_that_look_alike(tmp_path: Path) -> None:
    karpathy(tmp_path / "dataset_coco.json")
    write_pool(tmp_path / "hard_negative.pkl", [[0, 2, 1], [1, 0, 2], [2, 1, 0]], [7, 8, 99])
    alike = {record.images[0][-1]: record.alike for record in read_retrieval(tmp_path, "train").records}
    names = {number: f"COCO_val2014_{number:012d}" for number in (7, 8)}
    assert alike == {"7": (names[8],), "8": (names[7],)}, "images that are not trained on are left out"
    assert not any(record.alike for record in read_retrieval(tmp_path, "test").records)


@pytest.mark.parametrize(
    ("pool", "images", "message"),
    [
        ([[0, 1]], [7, 8], r"found the shape \(1, 2\)"),
        ([[0], [1]], [7, 8], r"found the shape \(2, 1\)"),
        ([[0, 1], [1, 2]], [7, 8], "names image 2 of 2"),
        ([[0, 1], [1, 0]], [70, 80], "lists none of the 2 training images"),
    ],
)
def test_pools_that_do_not_fit(tmp_path: Path, pool: Any, images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pool(write_pool(tmp_path / "hard_negative.pkl", pool, images), ["7", "8"])


def test_a_pool_of_another_layout(tmp_path: Path) -> None:
    (tmp_path / "pool.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="must hold train_hard_pool and train_image_list; found a list"):
        read_pool(tmp_path / "pool.pkl", ["7"])


def test_a_cleaned_split_lacks_the_images_of_other_tests(tmp_path: Path) -> None:
    karpathy(tmp_path / "dataset_coco.json")
    with pytest.raises(DataError, match=r"no flickr_test_ids.npy in .* Use the split without _clean"):
        read_retrieval(tmp_path, "train_clean")
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache" / "flickr_test_ids.npy", np.array(["7", "55"]))
    data = read_retrieval(tmp_path, "train_clean")
    assert [record.caption for record in data.records] == ["A cat."]
    assert "5 captions of images that other tasks are tested on were left out" in data.notes()
    (tmp_path / "cache" / "flickr_test_ids.npy").write_bytes(b"")
    with pytest.raises(DataError, match="not a list of image ids"):
        read_test_images(tmp_path / "cache" / "flickr_test_ids.npy")
