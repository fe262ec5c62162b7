"""The files of panels: NLVR's layout, even labels, boxes where the items are drawn."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
from PIL import Image

from visling.scenes import ScenesConfig, write_scenes

SPLITS = ("train", "val", "test")
NAMES = {"yellow": "Yellow", "blue": "#0099ff", "black": "Black"}


def test_official_layout(written: Any) -> None:
    for split in SPLITS:
        rows = written.lines(f"nlvr/{split}/{split}.json")
        assert rows
        by_number = defaultdict(list)
        for row in rows:
            assert set(row) == {"sentence", "label", "identifier", "directory", "evals", "structured_rep"}
            number, place = row["identifier"].split("-")
            by_number[number].append(row)
            assert len(row["structured_rep"]) == 3
            for item in (item for box in row["structured_rep"] for item in box):
                assert set(item) == {"x_loc", "y_loc", "type", "color", "size"}
                assert item["color"] in NAMES.values()
            path = written.folder / "nlvr" / split / "images" / row["directory"] / f"{split}-{number}-{place}-0.png"
            with Image.open(path) as image:
                assert image.size == (400, 100)
                assert image.mode == "RGBA"
        for group in by_number.values():
            assert len({row["sentence"] for row in group}) == 1
            assert Counter(row["label"] for row in group) == {"true": 2, "false": 2}


def test_extra_statements_are_even_and_name_existing_pictures(written: Any) -> None:
    rows = [row for split in SPLITS for row in written.lines(f"nlvr/{split}/statements.json")]
    assert len(rows) > 100
    by_sentence: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        split = row["image"].split("-")[0]
        assert list((written.folder / "nlvr" / split / "images").glob(f"*/{row['image']}.png"))
        number, _, which = row["identifier"].split("-")
        by_sentence[number, which][row["label"]] += 1
    for counts in by_sentence.values():
        assert counts["true"] == counts["false"] > 0


def test_panel_instances_lie_where_the_items_are_drawn(written: Any) -> None:
    content = written.json("annotations/instances_nlvr_train.json")
    files = {image["id"]: image["file_name"] for image in content["images"]}
    colours = {"yellow": (255, 255, 0), "blue": (0, 153, 255), "black": (0, 0, 0)}
    sizes = {"small": 10, "medium": 20, "large": 30}
    for one in content["annotations"]:
        picture = np.asarray(
            Image.open(written.folder / "nlvr" / "train" / "images" / files[one["image_id"]]).convert("RGB")
        )
        x, y, w, h = one["bbox"]
        assert w == h == sizes[one["attributes"][1]]
        assert tuple(picture[y + h // 2, x + w // 2]) == colours[one["attributes"][0]]
        corner = tuple(picture[y, x])
        assert (corner == colours[one["attributes"][0]]) == (one["category_id"] == 2), "only a square fills its corner"


def test_forms_are_many(written: Any) -> None:
    forms = written.summary["counts"]["nlvr"]["train"]["forms"]
    assert len(forms) > 20
    assert max(forms.values()) < 0.2 * sum(forms.values())


def test_two_boxes_and_permutations(tmp_path: Any) -> None:
    write_scenes(tmp_path / "two", ScenesConfig(images=0, panels=8, panel_boxes=2, permutations=2, train=1.0, val=0.0))
    pictures = sorted((tmp_path / "two" / "nlvr" / "train" / "images" / "200").iterdir())
    assert len(pictures) == 16
    first, second = (np.asarray(Image.open(path)) for path in pictures[:2])
    assert first.shape == (100, 250, 4)
    np.testing.assert_array_equal(first[:, :100], second[:, 150:])
    np.testing.assert_array_equal(first[:, 150:], second[:, :100])


def test_a_number_of_panels_that_is_no_multiple_of_four(tmp_path: Any) -> None:
    write_scenes(tmp_path / "odd", ScenesConfig(images=0, panels=5, statements_per_panel=2, train=1.0, val=0.0))
    rows = (tmp_path / "odd" / "nlvr" / "train" / "train.json").read_text().splitlines()
    assert len(rows) == 5
