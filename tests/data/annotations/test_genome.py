"""Visual Genome's region descriptions and questions, in the field names of both releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.captions import CaptionRecord
from visling.data.annotations.genome import read_genome_questions, read_region_descriptions
from visling.data.annotations.questions import QuestionRecord
from visling.errors import DataError

BOX = {"x": 421, "y": 57, "width": 82, "height": 139}
REGIONS: list[dict[str, Any]] = [
    {
        "id": 1,
        "regions": [
            {"region_id": 1382, "image_id": 1, "phrase": "the clock is green in colour", **BOX},
            {"region_id": 1382, "image_id": 1, "phrase": "the same again", **BOX},
            {"region_id": 1383, "image_id": 1, "phrase": " \n", **BOX},
        ],
    },
    {
        "image_id": 2375429,
        "regions": [{"id": 4091, "phrase": "street\u00a0light", **BOX}, {"id": 4092, "phrase": "\u200b", **BOX}],
    },
    {"id": 3, "regions": []},
]
QAS: list[dict[str, Any]] = [
    {
        "id": 1,
        "qas": [
            {
                "qa_id": 986768,
                "image_id": 1,
                "question": "What color is the clock?",
                "answer": "Green.",
                "a_objects": [],
                "q_objects": [],
            },
            {
                "qa_id": 986769,
                "image_id": 1,
                "question": "How tall is the light post?",
                "answer": "  ",
                "a_objects": [],
                "q_objects": [],
            },
            {"qa_id": 986768, "image_id": 1, "question": "Again?", "answer": "Yes.", "a_objects": [], "q_objects": []},
        ],
    },
    {
        "image_id": 2,
        "qas": [{"id": 5, "question": "Who is there?", "answer": "The man.", "a_objects": [], "q_objects": []}],
    },
]


def save(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_region_descriptions(tmp_path: Path) -> None:
    found = read_region_descriptions(save(tmp_path / "region_descriptions.json", REGIONS))
    assert found.records == (
        CaptionRecord(id="1382", images=("1",), caption="the clock is green in colour"),
        CaptionRecord(id="4091", images=("2375429",), caption="street light"),
    )
    assert (found.empty, found.repeated) == (2, 1)


def test_questions(tmp_path: Path) -> None:
    records, left_out = read_genome_questions(save(tmp_path / "question_answers.json", QAS))
    assert records[0] == QuestionRecord(
        id="986768",
        images=("1",),
        question="What color is the clock?",
        question_type="",
        answer_type="",
        answers=("Green.",),
        multiple_choice_answer="Green.",
    )
    assert [(record.id, record.images, record.answers) for record in records[1:]] == [("5", ("2",), ("The man.",))]
    assert left_out == 2


def test_other_layouts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="each with a list 'qas'"):
        read_genome_questions(save(tmp_path / "x.json", REGIONS))
    with pytest.raises(DataError, match="list of images"):
        read_region_descriptions(save(tmp_path / "x.json", {"1": []}))
    with pytest.raises(DataError, match="an entry lacks 'region_id' or 'id'; found phrase"):
        read_region_descriptions(save(tmp_path / "x.json", [{"id": 1, "regions": [{"phrase": "a"}]}]))
    file = save(tmp_path / "x.json", QAS)
    file.write_text(file.read_text()[:-9])
    with pytest.raises(DataError, match=r"x\.json is truncated or not JSON"):
        read_genome_questions(file)
