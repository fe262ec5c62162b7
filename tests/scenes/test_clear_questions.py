"""The demo's questions: three different ones, each with a single answer that the annotation files of the pictures
give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling.errors import DataError
from visling.scenes.clear_questions import ClearQuestion, choose_questions, describe_answer
from visling.scenes.language import plural
from visling.scenes.world import VALUES

SHAPES = ("circle", "cross", "star")


def write_instances(folder: Path, pictures: list[list[tuple[str, str, str]]]) -> Path:
    """Boxes of pictures 1, 2, ..., each a list of (shape, color, texture)."""
    (folder / "annotations").mkdir()
    content = {
        "images": [{"id": i, "file_name": f"scene_{i:012d}.png"} for i in range(1, len(pictures) + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(SHAPES)],
        "annotations": [
            {"image_id": i, "category_id": SHAPES.index(shape), "attributes": [texture, "large", color]}
            for i, picture in enumerate(pictures, start=1)
            for shape, color, texture in picture
        ],
    }
    (folder / "annotations" / "instances_test.json").write_text(json.dumps(content))
    return folder


def test_a_trait_is_asked_only_of_a_shape_that_occurs_once(tmp_path: Path) -> None:
    circles = [("circle", "red", "solid"), ("circle", "blue", "dotted")]
    cross = ("cross", "orange", "striped")
    folder = write_instances(tmp_path, [circles, [*circles, cross], [cross], [*circles, *circles, *circles]])
    asked = [(question.image.name, question.text, question.answer) for question in choose_questions(folder)]
    assert asked == [
        ("scene_000000000002.png", "what color is the cross?", "orange"),
        ("scene_000000000003.png", "what texture is the cross?", "striped"),
        ("scene_000000000001.png", "how many circles are there?", "2"),
    ]


def test_pictures_without_a_clear_answer_leave_questions_out(tmp_path: Path) -> None:
    six = [("star", "red", "solid")] * 6
    assert choose_questions(write_instances(tmp_path, [six, []])) == []
    with pytest.raises(DataError, match=r"instances_val\.json.*visling scenes"):
        choose_questions(tmp_path, "val")


def test_the_questions_about_drawn_scenes_are_in_the_words_and_answers_of_the_data_set(world: Any) -> None:
    asked = choose_questions(world.scenes, "train")
    assert len({question.image for question in asked}) == len({question.text.split()[1] for question in asked}) == 3
    vocabulary = {
        word
        for file in (world.scenes / "annotations").glob("v2_OpenEnded_*_questions.json")
        for question in json.loads(file.read_text())["questions"]
        for word in question["question"].rstrip("?").split()
    }
    for question in asked:
        assert question.image.is_file()
        assert set(question.text.rstrip("?").split()) <= vocabulary | {"how", "many", *map(plural, VALUES["shape"])}


def test_an_answer_is_shown_with_the_truth_and_a_verdict() -> None:
    question = ClearQuestion(image=Path("a.png"), text="what color is the cross?", answer="orange")
    top = [("orange", 0.874), ("red", 0.06), ("brown", 0.02), ("blue", 0.01)]
    assert describe_answer(question, top) == (
        "what color is the cross? orange 87%, red 6%, brown 2%; truth: orange (right)"
    )
    assert describe_answer(question, top[1:]).endswith("; truth: orange (wrong)")
    assert describe_answer(question, []) == "what color is the cross? no answer; truth: orange (wrong)"
