from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from visling.errors import ConfigError
from visling.runtime import generator_for
from visling.scenes import ScenesConfig, write_scenes
from visling.scenes.panels.panel import sample_panel
from visling.scenes.panels.plain import plain_captions, plain_statements

NUMBER = {
    word: n
    for n, word in enumerate(["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
SIZE = {"small": 10, "medium": 20, "large": 30}
COLOR = {"yellow": "Yellow", "blue": "#0099ff", "black": "Black"}
PLACE = {"left": 0, "middle": 1, "right": -1}


def reading(text: str, panel: list[list[dict[str, Any]]]) -> bool:
    """Truth of every plain caption and statement from structured_rep alone."""
    scope, where = (
        [item for box in panel for item in box],
        re.compile(r"^the (left|middle|right) (box|tower) has | in the (left|middle|right) (box|tower)$"),
    )
    if found := where.search(text):
        scope = panel[PLACE[found[1] or found[3]]]
        text = where.sub("", text)
    if m := re.fullmatch(r"an? (\w+) base", text):
        return bool(scope[0]["color"] == COLOR[m[1]])
    if m := re.fullmatch(r"an? (\w+) block at the top", text):
        return bool(scope[-1]["color"] == COLOR[m[1]])
    if m := re.fullmatch(r"there is a tower with (\w+) blocks?", text):
        return any(len(tower) == NUMBER[m[1]] for tower in panel)
    m = re.fullmatch(r"(?:there (?:is|are) )?(?:exactly )?(an?|many|\w+) ([\w ]+)", text)
    assert m is not None, text
    words = [re.sub("s$", "", word) for word in m[2].split()]
    tests = {
        **{word: lambda item, size=size: item["size"] == size for word, size in SIZE.items()},
        **{word: lambda item, color=color: item["color"] == color for word, color in COLOR.items()},
        **{word: lambda item, word=word: item["type"] == word for word in ("circle", "square", "triangle")},
        **{word: lambda item: True for word in ("item", "block")},
    }
    count = sum(all(tests[word](item) for word in words) for item in scope)
    return count > 0 if m[1] in ("a", "an") else count > 10 if m[1] == "many" else count == NUMBER[m[1]]


@pytest.mark.parametrize("num_boxes", [2, 3])
@pytest.mark.parametrize("towers", [True, False])
def test_captions_are_true_and_different(towers: bool, num_boxes: int) -> None:
    for seed in range(100):
        rng = generator_for(seed)
        panel = sample_panel(rng, num_boxes, towers)
        official = [[piece.official() for piece in box] for box in panel.boxes]
        captions = plain_captions(panel, rng, 4)
        assert 0 < len(captions) == len(set(captions)) <= 4
        for caption in captions:
            assert reading(caption, official), (caption, official)


@pytest.mark.parametrize("num_boxes", [2, 3])
@pytest.mark.parametrize("towers", [True, False])
def test_truth_of_every_form_by_another_reader(towers: bool, num_boxes: int) -> None:
    read: dict[str, Counter[bool]] = {}
    for seed in range(200):
        rng = generator_for(seed, 1)
        panel = sample_panel(rng, num_boxes, towers)
        official = [[piece.official() for piece in box] for box in panel.boxes]
        other = sample_panel(rng, num_boxes, towers)
        statements = plain_statements(panel, rng, 6)
        assert len({sentence.text for sentence, _ in statements}) == len(statements) >= 5
        for sentence, truth in statements:
            assert truth is sentence.truth(panel) is reading(sentence.text, official), (sentence.text, official)
            assert sentence.truth(other) is reading(
                sentence.text, [[piece.official() for piece in box] for box in other.boxes]
            )
            read.setdefault(sentence.form, Counter())[truth] += 1
    assert len(read) == 4
    for counts in read.values():
        assert min(counts[True], counts[False]) > 0.15 * counts.total(), read


def test_panels_are_written_in_plain_words(tmp_path: Any) -> None:
    written = write_scenes(
        tmp_path / "plain",
        ScenesConfig(images=0, panels=40, panel_language="plain", statements_per_panel=4, train=1.0, val=0.0),
    )
    counts = written["counts"]["nlvr"]["train"]
    assert all(form.startswith("plain ") for form in counts["forms"])
    folder = tmp_path / "plain" / "nlvr"
    rows = [json.loads(line) for line in (folder / "train" / "train.json").read_text().splitlines()]
    assert len(rows) == len({row["identifier"] for row in rows}) == 40
    for row in rows:
        assert reading(row["sentence"], row["structured_rep"]) is (row["label"] == "true")
    drawn = {f"train-{row['identifier']}-0": row["structured_rep"] for row in rows}
    extra = [json.loads(line) for line in (folder / "train" / "statements.json").read_text().splitlines()]
    for row in extra:
        assert reading(row["sentence"], drawn[row["image"]]) is (row["label"] == "true")
    assert counts["labels"]["true"] == pytest.approx(80, abs=3)
    assert counts["labels"]["false"] == pytest.approx(80, abs=3)
    captions = json.loads((folder / "annotations" / "captions_train.json").read_text())
    panels = {f"{row['directory']}/train-{row['identifier']}-0.png": row["structured_rep"] for row in rows}
    names = {image["id"]: image["file_name"] for image in captions["images"]}
    for one in captions["annotations"]:
        assert reading(one["caption"], panels[names[one["image_id"]]])


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ConfigError, match="plain"):
        ScenesConfig(panel_language="plan")  # type: ignore[arg-type]
