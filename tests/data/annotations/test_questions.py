"""Question files of VQA v2 and GQA, clean and dirty."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations.questions import (
    UNTOLD,
    QuestionRecord,
    find_gqa,
    find_lxmert_questions,
    find_vqa_files,
    has_gqa,
    has_vqa,
    read_gqa,
    read_lxmert_questions,
    read_questions,
    read_vqa,
    release_text,
)
from visling.errors import DataError
from visling.image_ids import Aliases
from visling.metrics.answers import vqa_score

QUESTIONS: dict[str, Any] = {
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 458752, "question": "What position is this man playing?", "question_id": 458752001},
        {"image_id": 262146, "question": "Is it day?", "question_id": 262146000},
    ],
}


def annotation(number: int, image: int, answers: list[str], kind: str = "other") -> dict[str, Any]:
    return {
        "question_id": number,
        "image_id": image,
        "question_type": "what is this",
        "answer_type": kind,
        "multiple_choice_answer": answers[0],
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": at + 1} for at, answer in enumerate(answers)
        ],
    }


# In another order than the questions, and with one question more.
ANNOTATIONS: dict[str, Any] = {
    "annotations": [
        annotation(262146000, 262146, ["yes"] * 10, "yes/no"),
        annotation(458752000, 458752, ["net"] * 9 + ["netting"]),
        annotation(999, 5, ["no"] * 10),
        annotation(458752001, 458752, ["pitcher"] * 10),
    ]
}


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_joined_by_question_id(tmp_path: Path) -> None:
    records = read_questions(save(tmp_path / "q.json", QUESTIONS), save(tmp_path / "a.json", ANNOTATIONS))
    assert [record.id for record in records] == ["458752000", "458752001", "262146000"]
    assert records[0] == QuestionRecord(
        id="458752000",
        images=("COCO_train2014_000000458752",),
        question="What is this photo taken looking through?",
        question_type="what is this",
        answer_type="other",
        answers=("net",) * 9 + ("netting",),
        multiple_choice_answer="net",
    )
    assert (records[2].answer_type, records[2].answers) == ("yes/no", ("yes",) * 10)


@pytest.mark.parametrize(
    ("changed", "image"),
    [
        ({"data_subtype": "val2014"}, "COCO_val2014_000000458752"),
        ({"data_subtype": "test-dev2015"}, "COCO_test2015_000000458752"),
        ({"data_subtype": "abstract_v002"}, "458752"),
        ({"data_type": "scenes"}, "458752"),
        ({"data_type": None}, "458752"),
    ],
)
def test_images_of_coco_have_its_names(tmp_path: Path, changed: dict[str, Any], image: str) -> None:
    assert read_questions(save(tmp_path / "q.json", QUESTIONS | changed))[0].images == (image,)


def test_a_number_of_coco_is_not_taken_for_one_of_visual_genome(tmp_path: Path) -> None:
    image = read_questions(save(tmp_path / "q.json", QUESTIONS))[0].images[0]
    assert Aliases(["458752", "COCO_train2014_000000458752"]).find(image) == "COCO_train2014_000000458752"
    assert Aliases(["458752", "9"]).find(image) == "458752", "a store of numbers alone"


def test_without_annotations(tmp_path: Path) -> None:
    record = read_questions(save(tmp_path / "q.json", QUESTIONS))[0]
    assert record.answers is None
    assert record.multiple_choice_answer is None
    assert (record.question_type, record.answer_type) == ("", "")


def test_missing_annotations_are_counted(tmp_path: Path) -> None:
    short = {"annotations": ANNOTATIONS["annotations"][:1]}
    with pytest.raises(
        DataError, match=r"a\.json has no annotation for 2 of the 3 questions of q\.json, first 458752000"
    ):
        read_questions(save(tmp_path / "q.json", QUESTIONS), save(tmp_path / "a.json", short))


def test_contradicting_images(tmp_path: Path) -> None:
    wrong = {"annotations": [annotation(q["question_id"], 1, ["x"]) for q in QUESTIONS["questions"]]}
    with pytest.raises(DataError, match=r"about image 458752 in .* about image 1 in"):
        read_questions(save(tmp_path / "q.json", QUESTIONS), save(tmp_path / "a.json", wrong))


def test_repeated_question(tmp_path: Path) -> None:
    twice = {"questions": QUESTIONS["questions"][:1] * 2}
    with pytest.raises(DataError, match="question 458752000 comes twice"):
        read_questions(save(tmp_path / "q.json", twice))


def test_truncated_file(tmp_path: Path) -> None:
    file = save(tmp_path / "q.json", QUESTIONS)
    file.write_text(file.read_text()[:-20])
    with pytest.raises(DataError, match=r"q\.json is truncated or not JSON.*character \d+"):
        read_questions(file)


def test_a_result_file_is_not_a_question_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="list 'questions'; found a list"):
        read_questions(save(tmp_path / "q.json", [{"question_id": 1, "answer": "x"}]))


@pytest.mark.parametrize(
    ("questions", "annotations", "split"),
    [
        (
            "Questions/v2_OpenEnded_mscoco_train2014_questions.json",
            "Annotations/v2_mscoco_train2014_annotations.json",
            "train",
        ),
        (
            "annotations/v2_OpenEnded_scenes_train_questions.json",
            "annotations/v2_scenes_train_annotations.json",
            "train",
        ),
        ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014"),
        ("Questions/v2_OpenEnded_mscoco_test-dev2015_questions.json", None, "test-dev"),
        ("OpenEnded_abstract_v002_val2015_questions.json", "abstract_v002_val2015_annotations.json", "val"),
    ],
)
def test_find_files(tmp_path: Path, questions: str, annotations: str | None, split: str) -> None:
    expected = save(tmp_path / questions, QUESTIONS)
    answers = save(tmp_path / annotations, ANNOTATIONS) if annotations else None
    save(tmp_path / "Questions" / "v2_OpenEnded_mscoco_trainval2014_questions.json", QUESTIONS)
    save(tmp_path / "Questions" / "v2_OpenEnded_mscoco_test2015_questions.json", QUESTIONS)
    found, found_answers = find_vqa_files(tmp_path, split)
    assert found.samefile(expected)
    assert (found_answers is None) == (answers is None)
    if answers is not None and found_answers is not None:
        assert found_answers.samefile(answers)


def test_the_second_version_is_preferred(tmp_path: Path) -> None:
    save(tmp_path / "OpenEnded_mscoco_train2014_questions.json", QUESTIONS)
    second = save(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", QUESTIONS)
    assert find_vqa_files(tmp_path, "train")[0].samefile(second)


def test_none_and_several(tmp_path: Path) -> None:
    save(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", QUESTIONS)
    with pytest.raises(
        DataError, match=r"v2_OpenEnded_\*train\*_questions\.json .*found v2_OpenEnded_mscoco_val2014_questions\.json"
    ):
        find_vqa_files(tmp_path, "train")
    save(tmp_path / "v2_OpenEnded_scenes_val_questions.json", QUESTIONS)
    with pytest.raises(DataError, match="several files"):
        find_vqa_files(tmp_path, "val")
    assert find_vqa_files(tmp_path, "val2014")[0].name == "v2_OpenEnded_mscoco_val2014_questions.json"


def test_has_vqa(tmp_path: Path) -> None:
    save(tmp_path / "train_balanced_questions.json", {})
    assert not has_vqa(tmp_path, "train"), "GQA's"
    save(tmp_path / "Questions" / "v2_OpenEnded_mscoco_train2014_questions.json", QUESTIONS)
    assert has_vqa(tmp_path, "train")
    assert not has_vqa(tmp_path, "val")


GQA = {
    "07333408": {
        "question": "What is on the white wall?",
        "imageId": "2375429",
        "answer": "pipe",
        "fullAnswer": "The pipe is on the wall.",
        "isBalanced": True,
        "groups": {"global": "", "local": "14-wall_on,s"},
        "types": {"structural": "query", "semantic": "rel", "detailed": "relS"},
        "semantic": [{"operation": "select", "dependencies": [], "argument": "wall (722332)"}],
        "semanticStr": "select: wall (722332)",
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
        "entailed": [],
        "equivalent": ["07333408"],
    },
    "201640614": {"isBalanced": True, "question": "Who is wearing the dress?", "imageId": "n161313"},
}


def test_gqa(tmp_path: Path) -> None:
    records = read_gqa(save(tmp_path / "testdev_balanced_questions.json", GQA))
    assert records == [
        QuestionRecord(
            id="07333408",
            images=("2375429",),
            question="What is on the white wall?",
            question_type="query",
            answer_type="rel",
            answers=("pipe",),
            multiple_choice_answer="pipe",
        ),
        QuestionRecord(
            id="201640614",
            images=("n161313",),
            question="Who is wearing the dress?",
            question_type="",
            answer_type="",
            answers=None,
            multiple_choice_answer=None,
        ),
    ]


def test_gqa_in_chunks(tmp_path: Path) -> None:
    folder = tmp_path / "train_all_questions"
    for chunk in range(11):
        save(folder / f"train_all_questions_{chunk}.json", {f"{chunk:02d}": {"question": "?", "imageId": "1"}})
    assert [record.id for record in read_gqa(folder)] == [f"{chunk:02d}" for chunk in range(11)], "10 after 9"
    save(folder / "train_all_questions_11.json", {"03": {"question": "?", "imageId": "1"}})
    with pytest.raises(DataError, match=r"_11\.json: question 03 comes twice"):
        read_gqa(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no chunk empty_"):
        read_gqa(tmp_path / "empty")


def test_find_gqa(tmp_path: Path) -> None:
    balanced = save(tmp_path / "questions1.2" / "train_balanced_questions.json", GQA)
    chunks = save(tmp_path / "questions1.2" / "train_all_questions" / "train_all_questions_0.json", GQA).parent
    assert find_gqa(tmp_path, "train") == balanced
    assert find_gqa(tmp_path, "train_all") == chunks
    assert has_gqa(tmp_path, "train")
    assert not has_gqa(tmp_path, "val")
    with pytest.raises(
        DataError, match=r"no val_balanced_questions\.json .*found train_all_questions, train_balanced_questions\.json"
    ):
        find_gqa(tmp_path, "val")


@pytest.mark.parametrize("empty", [None, "", " \n", "\u0301", "\u200b\ufffd"])
def test_questions_without_a_word(tmp_path: Path, empty: str | None) -> None:
    asked = {"questions": [{**QUESTIONS["questions"][0], "question": empty}, QUESTIONS["questions"][2]]}
    vqa, gqa = (
        save(tmp_path / "q.json", asked),
        save(tmp_path / "gqa.json", {**GQA, "7": {"question": empty, "imageId": "1"}}),
    )
    left_out = Counter[str]()
    assert [record.id for record in read_questions(vqa, save(tmp_path / "a.json", ANNOTATIONS), left_out=left_out)] == [
        "262146000"
    ]
    assert len(read_gqa(gqa, left_out=left_out)) == 2
    assert left_out == {"questions without a word": 2}
    with pytest.raises(DataError, match=r"q\.json: question 458752000 is empty: found .*at least one word"):
        read_questions(vqa)
    with pytest.raises(DataError, match=r"gqa\.json: question 7 is empty"):
        read_gqa(gqa)


def test_an_answer_that_is_null_says_nothing(tmp_path: Path) -> None:
    content = {"annotations": [annotation(262146000, 262146, ["yes"])]}
    content["annotations"][0]["answers"].append({"answer": None})
    asked = save(tmp_path / "q.json", {"questions": QUESTIONS["questions"][2:]})
    assert read_questions(asked, save(tmp_path / "a.json", content))[0].answers == ("yes", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [([], "found a list"), ({"1": {"question": "?"}}, "question 1 lacks 'question' or 'imageId'")],
)
def test_not_gqa(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_gqa(save(tmp_path / "x.json", content))


def test_the_most_frequent_answer_is_counted_where_none_is_named(tmp_path: Path) -> None:
    given = [["net"], ["racket", "net", "net"], ["yes", "no"]]
    bare = [
        annotation(question["question_id"], question["image_id"], answers)
        for question, answers in zip(QUESTIONS["questions"], given, strict=True)
    ]
    for entry in bare:
        del entry["multiple_choice_answer"], entry["question_type"], entry["answer_type"]
    records = read_questions(save(tmp_path / "q.json", QUESTIONS), save(tmp_path / "a.json", {"annotations": bare}))
    assert [record.multiple_choice_answer for record in records] == ["net", "net", "yes"]


# Parts of val


def val_of(folder: Path, count: int = 3) -> Path:
    """Questions 1000 and 1001 about image 1, 2000 and 2001 about image 2, and so on."""
    asked = [
        {"image_id": image, "question": "is it?", "question_id": image * 1000 + number}
        for image in range(1, count + 1)
        for number in (0, 1)
    ]
    content = {"data_type": "mscoco", "data_subtype": "val2014", "questions": asked}
    save(folder / "v2_OpenEnded_mscoco_val2014_questions.json", content)
    notes = [annotation(entry["question_id"], entry["image_id"], ["yes"] * 10) for entry in asked]
    save(folder / "v2_mscoco_val2014_annotations.json", {"annotations": notes})
    return folder


def ids(folder: Path, split: str) -> list[int]:
    return [int(record.id) for record in read_vqa(folder, split)]


@pytest.mark.parametrize(
    ("name", "content", "held"),
    [
        ("minival.txt", "COCO_val2014_000000000002\n", [2000, 2001]),
        ("minival.txt", "3\n1\n", [1000, 1001, 3000, 3001]),
        ("minival.txt", "1001\n2000\n", [1001, 2000]),
        ("minival.json", "[1, 2]", [1000, 1001, 2000, 2001]),
        ("minival.json", '["2001"]', [2001]),
        ("minival.json", '[{"question_id": 3000, "img_id": "COCO_val2014_000000000003", "sent": "?"}]', [3000]),
    ],
)
def test_a_list_holds_a_part_of_val_out(tmp_path: Path, name: str, content: str, held: list[int]) -> None:
    val_of(tmp_path)
    (tmp_path / name).write_text(content)
    assert has_vqa(tmp_path, "minival")
    assert has_vqa(tmp_path, "nominival")
    assert ids(tmp_path, "minival") == held
    assert ids(tmp_path, "nominival") == [number for number in ids(tmp_path, "val") if number not in held]


def test_vilbert_holds_out_the_last_questions_by_id(tmp_path: Path) -> None:
    val_of(tmp_path, count=1505)
    assert len(ids(tmp_path, "minval")) == 3000
    assert ids(tmp_path, "nominval") == [image * 1000 + n for image in range(1, 6) for n in (0, 1)]


def test_what_is_no_part_of_val_is_refused(tmp_path: Path) -> None:
    assert not has_vqa(val_of(tmp_path), "minival")
    with pytest.raises(DataError, match=r"found v2_OpenEnded_mscoco_val2014.*minival.txt or minival.json next to"):
        read_vqa(tmp_path, "nominival")
    with pytest.raises(DataError, match=r"no file v2_OpenEnded_\*trian\*_questions.json .*the split.$"):
        read_vqa(tmp_path, "trian")
    (tmp_path / "minival.txt").write_text("77\n78\n")
    with pytest.raises(DataError, match="lists 2 ids, none of which is a question or an image of val"):
        read_vqa(tmp_path, "minival")
    (tmp_path / "minival.txt").unlink()
    save(tmp_path / "minival.json", {"ids": [1]})
    with pytest.raises(DataError, match="must be a JSON list of question or image ids"):
        read_vqa(tmp_path, "minival")


def test_lxmerts_files_keep_their_scores(tmp_path: Path) -> None:
    scores = {"net": 1.0, "racket": 0.3, "nets": 0.6, "bat": 0.9}
    entry = {"question_id": 9, "img_id": "COCO_train2014_000000458752", "sent": "What is it?", "label": scores}
    entry |= {"answer_type": "other", "question_type": "what is"}
    bare = {"question_id": 10, "img_id": "COCO_test2015_000000000001", "sent": "Is it?"}
    file = save(tmp_path / "nominival.json", [entry, bare, entry | {"question_id": 11, "label": {}}])
    assert find_lxmert_questions(tmp_path, "nominival") == file
    assert find_lxmert_questions(tmp_path, "train") is None
    answered, unanswered, unlisted = read_lxmert_questions(file)
    assert (answered.images, answered.question_type) == (("COCO_train2014_000000458752",), "what is")
    assert answered.multiple_choice_answer == "net"
    assert answered.answers is not None
    assert len(answered.answers) == 10
    for answer, score in scores.items():
        assert vqa_score(answer, answered.answers) == pytest.approx(score)
    assert unanswered.answers is None
    assert unlisted.answers == (UNTOLD,) * 10
    with pytest.raises(DataError, match="must be a list of objects with question_id, img_id, sent"):
        read_lxmert_questions(save(tmp_path / "train.json", QUESTIONS))


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("What is this?", "what is this"),
        ("Is it red, green, or blue?", "is it red green or blue"),
        ("What? Is it?", "what is it"),
        ("What's the man's hat?", "what ' s the man ' s hat"),
        ("1,000 e.g. or more", "1000 e . g . or more"),
        ("?", "?"),
    ],
)
def test_questions_as_the_release_tokenises_them(question: str, text: str) -> None:
    assert release_text(question) == text
