from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from visling.data.scenes import ScenesConfig, write_scenes
from visling.data.scenes.panels import sample_panel
from visling.data.scenes.plain_panels import plain_captions, plain_sentences
from visling.errors import ConfigError
from visling.runtime import generator_for

NUMBER = {word: n for n, word in enumerate(["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])}
SIZE = {"small": 10, "medium": 20, "large": 30}
COLOR = {"yellow": "Yellow", "blue": "#0099ff", "black": "Black"}
PLACE = {"left": 0, "middle": 1, "right": -1}


def reading(text: str, panel: list[list[dict[str, Any]]]) -> bool:
    """Truth of every plain caption and statement from structured_rep alone."""
    scope, where = [item for box in panel for item in box], re.compile(r"(?:^the | in the )(left|middle|right) (box|tower)( has )?")
    if found := where.search(text):
        scope = panel[PLACE[found[1]]]
        text = where.sub("", text)
    if m := re.fullmatch(r"an? (\w+) base", text):
        return bool(scope[0]["color"] == COLOR[m[1]])
    if m := re.fullmatch(r"an? (\w+) block at the top", text):
        return bool(scope[-1]["color"] == COLOR[m[1]])
    if m := re.fullmatch(r"there is a tower with (\w+) blocks?", text):
        return any(len(tower) == NUMBER[m[1]] for tower in panel)
    if m := re.fullmatch(r"(\w+) blocks?", text):
        return len(scope) == NUMBER[m[1]]
    m = re.fullmatch(r"(?:there (?:is|are) )?(exactly )?(an?|many|\w+) ([\w ]+)", text)
    assert m is not None, text
    words = [re.sub("s$", "", word) for word in m[3].split()]
    tests = {
        **{word: lambda item, size=size: item["size"] == size for word, size in SIZE.items()},
        **{word: lambda item, color=color: item["color"] == color for word, color in COLOR.items()},
        **{word: lambda item, word=word: item["type"] == word for word in ("circle", "square", "triangle")},
        **{word: lambda item: True for word in ("item", "block")},
    }
    count = sum(all(tests[word](item) for word in words) for item in scope)
    return count > 0 if m[2] in ("a", "an") else count > 10 if m[2] == "many" else count == NUMBER[m[2]]


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
    for seed in range(300):
        rng = generator_for(seed, 1)
        panel = sample_panel(rng, num_boxes, towers)
        official = [[piece.official() for piece in box] for box in panel.boxes]
        for sentence in plain_sentences(rng, towers, num_boxes, tries=5):
            truth = sentence.truth(panel)
            assert truth is reading(sentence.text, official), (sentence.text, official)
            read.setdefault(sentence.form, Counter())[bool(truth)] += 1
    assert len(read) == (5 if towers else 4)
    assert all(counts[True] and counts[False] for counts in read.values()), read


def test_panels_are_written_in_plain_words(tmp_path: Any) -> None:
    written = write_scenes(tmp_path / "plain", ScenesConfig(images=0, panels=40, panel_language="plain", statements_per_panel=4, train=1.0, val=0.0))
    counts = written["counts"]["nlvr"]["train"]
    assert all(form.startswith("plain ") for form in counts["forms"])
    assert counts["labels"]["true"] == counts["labels"]["false"]
    folder = tmp_path / "plain" / "nlvr"
    rows = [json.loads(line) for line in (folder / "train" / "train.json").read_text().splitlines()]
    for row in rows:
        assert reading(row["sentence"], row["structured_rep"]) is (row["label"] == "true")
    captions = json.loads((folder / "annotations" / "captions_train.json").read_text())
    panels = {f"{row['directory']}/train-{row['identifier']}-0.png": row["structured_rep"] for row in rows}
    names = {image["id"]: image["file_name"] for image in captions["images"]}
    for one in captions["annotations"]:
        assert reading(one["caption"], panels[names[one["image_id"]]])


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ConfigError, match="plain"):
        ScenesConfig(panel_language="plan")  # type: ignore[arg-type]
