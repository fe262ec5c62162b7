from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling.runtime import generator_for
from visling.scenes import ScenesConfig, write_scenes
from visling.scenes.panels.panel import Panel, Piece, draw_panel, sample_panel, vary_panel
from visling.scenes.panels.sentences import sample_sentences

SPLITS = ("train", "val", "test")
NAMES = {"yellow": "Yellow", "blue": "#0099ff", "black": "Black"}
NUMBER = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7} | {
    str(n): n for n in range(1, 8)
}


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


def test_drawing_matches_measured_pixels_of_the_real_pictures() -> None:
    """Coverage of a 10-pixel triangle and circle, and the two grounds, as measured on NLVR's development pictures."""
    boxes = (
        (
            Piece(x=10, y=10, shape="triangle", color="black", size=10),
            Piece(x=40, y=40, shape="circle", color="black", size=10),
        ),
        (Piece(x=70, y=70, shape="square", color="blue", size=30),),
        (),
    )
    picture = np.asarray(draw_panel(Panel(boxes=boxes, towers=False))).astype(int)
    assert picture.shape == (100, 400, 4)
    assert picture[50, 5].tolist() == [211, 211, 211, 255]
    assert picture[50, 120].tolist() == [128, 128, 128, 255]
    assert picture[99, 249].tolist() == [0, 153, 255, 255]
    cover = np.rint(255 * (1 - picture[10:20, 10:20, 0] / 211))
    np.testing.assert_allclose(cover[0], [0, 0, 0, 0, 64, 64, 0, 0, 0, 0], atol=2)
    np.testing.assert_allclose(cover[9], [192, 255, 255, 255, 255, 255, 255, 255, 255, 191], atol=2)
    cover = np.rint(255 * (1 - picture[40:50, 40:50, 0] / 211))
    np.testing.assert_allclose(cover[0], [0, 0, 64, 191, 238, 238, 191, 64, 0, 0], atol=16)


@pytest.mark.parametrize("towers", [True, False])
def test_items_keep_apart_and_inside(towers: bool) -> None:
    for seed in range(40):
        rng = generator_for(seed)
        panel = sample_panel(rng, 3, towers)
        varied = vary_panel(panel, rng)
        for one in (panel, varied):
            for box in one.boxes:
                for i, a in enumerate(box):
                    assert min(a.edges.values()) >= 0
                    for b in box[i + 1 :]:
                        gap_x = max(a.x, b.x) - min(a.x + a.size, b.x + b.size)
                        gap_y = max(a.y, b.y) - min(a.y + a.size, b.y + b.size)
                        assert max(gap_x, gap_y) >= 1
        assert sum(map(len, varied.boxes)) == sum(map(len, panel.boxes))


def reading(text: str, panel: list[list[dict[str, Any]]]) -> bool | None:
    """Truth of a few frequent constructions from structured_rep alone; None for all others."""
    text = text.lower().rstrip(".").replace("gray", "grey").replace("atleast", "at least").replace("colour", "color")
    items = [item for box in panel for item in box]

    def compare(how: str | None, found: int, said: str) -> bool:
        n = NUMBER[said]
        if said == "a":
            return found >= 1
        return found >= n if how == "at least" else found <= n if how == "at most" else found == n

    quantity = r"(?:(exactly|only|at least|at most) )?(a|one|two|three|four|five|\d)"
    if m := re.fullmatch(
        rf"there (?:is|are) {quantity} (yellow|blue|black) (circle|square|triangle|item|object|block)s?", text
    ):
        how, n, color, shape = m.groups()
        return compare(
            how, sum(i["color"] == NAMES[color] and shape in (i["type"], "item", "object", "block") for i in items), n
        )
    if m := re.fullmatch(
        rf"there (?:is|are) {quantity} towers? (?:with|having|which has|that has) (?:a|one|1) (\w+) block at (?:the )?(base|bottom|top)",
        text,
    ):
        how, n, color, end = m.groups()
        return compare(how, sum(tower[-1 if end == "top" else 0]["color"] == NAMES[color] for tower in panel), n)
    if m := re.fullmatch(r"there is a (\w+) block (?:on|over|on top of) a (\w+) block", text):
        upper, lower = (NAMES[color] for color in m.groups())
        return any(a["color"] == lower and b["color"] == upper for tower in panel for a, b in pairwise(tower))
    if m := re.fullmatch(
        rf"there (?:is|are) {quantity} (yellow|blue|black) (\w+?)s? (not )?touching (?:any|the|an|a) (?:edge|wall)",
        text,
    ):
        how, n, color, shape, away = m.groups()
        fits = [i for i in items if i["color"] == NAMES[color] and shape in (i["type"], "item", "object")]
        touching = [
            min(i["x_loc"], i["y_loc"], 100 - i["x_loc"] - i["size"], 100 - i["y_loc"] - i["size"]) == 0 for i in fits
        ]
        return compare(how, sum(t != bool(away) for t in touching), n)
    if m := re.fullmatch(rf"there is a box with {quantity} (?:item|object)s?", text):
        return any(compare(m[1], len(box), m[2]) for box in panel)
    if m := re.fullmatch(
        r"(?:each|every) (?:grey )?(?:box|square) (?:has|contains) (?:a|at least (?:one|1)) (yellow|blue|black) (\w+)",
        text,
    ):
        return all(
            any(i["color"] == NAMES[m[1]] and m[2] in (i["type"], "item", "object") for i in box) for box in panel
        )
    return None


def test_truth_of_frequent_constructions_by_another_reader() -> None:
    read = Counter[bool]()
    for seed in range(700):
        rng = generator_for(seed, 2)
        panel = sample_panel(rng, 3, seed % 2 == 0)
        official = [[piece.official() for piece in box] for box in panel.boxes]
        for sentence in sample_sentences(rng, panel.towers, 3, tries=8):
            truth, expected = sentence.truth(panel), reading(sentence.text, official)
            if truth is None or expected is None:
                continue
            assert truth is expected, (sentence.text, official)
            read[truth] += 1
    assert read[True] > 100
    assert read[False] > 100, read


# Sentences of NLVR's development split with label and boxes (each block's color from the base up); CC BY 4.0, Suhr et
# al. 2017.
REAL = [
    ("There are at least two towers with the same height", True, ("bb", "by", "yb")),
    ("There are at least two towers with the same height", False, ("bbb", "by", "y")),
    ("There is a yellow block on a blue block", True, ("yby", "kbk", "yy")),
    ("There is a yellow block on a blue block", False, ("yyyk", "kyky", "bk")),
    ("There is a black block on a yellow block", True, ("yyk", "kkbb", "kbb")),
    ("There is a black block on a yellow block", False, ("bybk", "ybkk", "bk")),
]
"""b is blue, k black, y yellow. In the last one a black block is above a yellow one, but not on it."""


def test_sentences_of_human_writers_are_produced_and_judged_alike() -> None:
    colours = {"b": "blue", "k": "black", "y": "yellow"}
    wanted = {text.lower() for text, _, _ in REAL}
    produced = {}
    rng = generator_for(4)
    for _ in range(3000):
        for sentence in sample_sentences(rng, True, 3, tries=4):
            produced[sentence.text.lower().rstrip(".")] = sentence
    assert wanted <= set(produced)
    for text, label, towers in REAL:
        boxes = tuple(
            tuple(
                Piece(x=40, y=80 - 21 * k, shape="square", color=colours[letter], size=20)
                for k, letter in enumerate(tower)
            )
            for tower in towers
        )
        assert produced[text.lower()].truth(Panel(boxes=boxes, towers=True)) is label, (text, towers)


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
