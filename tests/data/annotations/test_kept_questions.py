"""Questions of large files: the same from the kept file as from the sources, read again when anything is amiss."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visling.data.annotations import kept_questions as module
from visling.data.annotations import questions as reader
from visling.data.annotations.questions import EMPTY, QuestionRecord, read_questions
from visling.errors import DataError


@pytest.fixture(autouse=True)
def _small_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder of the test's own, in which small files are large enough to be kept."""
    monkeypatch.setenv("VISLING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "KEPT_FROM", 1)


@pytest.fixture
def count_readings(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often the sources have been read."""
    readings: list[None] = []
    read: Any = reader._read_files

    def counted(*arguments: Any) -> list[QuestionRecord]:
        readings.append(None)
        records: list[QuestionRecord] = read(*arguments)
        return records

    monkeypatch.setattr(reader, "_read_files", counted)
    return lambda: len(readings)


def write(folder: Path, *questions: str, answered: bool = True) -> tuple[Path, Path | None]:
    asked = [
        {"question_id": number, "image_id": number // 2, "question": text} for number, text in enumerate(questions)
    ]
    answers = [
        {
            "question_id": number,
            "image_id": number // 2,
            "question_type": "what is",
            "answers": [{"answer": answer} for answer in ("yes", 'a "cat"\n', "日本")[:number]],
        }
        for number in range(len(questions))
    ]
    folder.mkdir(exist_ok=True)
    files = folder / "questions.json", folder / "annotations.json"
    about = {"data_type": "mscoco", "data_subtype": "val2014", "questions": asked}
    files[0].write_text(json.dumps(about), encoding="utf-8")
    files[1].write_text(json.dumps({"annotations": answers}), encoding="utf-8")
    return files[0], files[1] if answered else None


def kept(home: Path) -> list[Path]:
    return sorted((home / "home" / "questions").glob("*"))


@pytest.mark.parametrize("answered", [True, False])
def test_the_kept_questions_are_those_of_the_sources(
    tmp_path: Path, count_readings: Callable[[], int], answered: bool
) -> None:
    files = write(tmp_path / "vqa", "is it?", 'a "quoted"\nlong one', "日本?", "what", answered=answered)
    first = read_questions(*files)
    assert [record.answers for record in first] == (
        [(), ("yes",), ("yes", 'a "cat"\n'), ("yes", 'a "cat"\n', "日本")] if answered else [None] * 4
    )
    assert read_questions(*files) == first
    assert count_readings() == 1
    assert len(kept(tmp_path)) == 1


def test_small_files_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_FROM", 10_000)
    assert len(read_questions(*write(tmp_path / "vqa", "is it?"))) == 1
    assert not kept(tmp_path)


def test_changed_sources_are_read_again(tmp_path: Path, count_readings: Callable[[], int]) -> None:
    files = write(tmp_path / "vqa", "is it?")
    read_questions(*files)
    write(tmp_path / "vqa", "is he?")  # of the same size
    os.utime(files[0], ns=(1, 1))
    assert [record.question for record in read_questions(*files)] == ["is he?"]
    assert count_readings() == 2
    assert len(kept(tmp_path)) == 1, "the old ones are replaced"


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"", lambda b: b"{}\n", lambda b: b"7\n"],
)
def test_a_damaged_file_is_made_again(
    tmp_path: Path, count_readings: Callable[[], int], damage: Callable[[bytes], bytes]
) -> None:
    files = write(tmp_path / "vqa", "is it?", "what")
    first = read_questions(*files)
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert read_questions(*files) == first
    assert count_readings() == 2
    assert file.read_bytes() == whole


def test_what_was_left_out_is_still_counted_and_refused(tmp_path: Path) -> None:
    files = write(tmp_path / "vqa", "is it?", " ", "what", "\t")
    for _ in range(2):
        left_out = Counter[str]()
        assert [record.id for record in read_questions(*files, left_out=left_out)] == ["0", "2"]
        assert left_out == {EMPTY: 2}
        with pytest.raises(DataError, match="question 1 is empty"):
            read_questions(*files)


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    assert len(read_questions(*write(tmp_path / "vqa", "is it?"))) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    files = write(tmp_path / "vqa", "is it?")
    with pytest.raises(DataError, match=r"no annotation file .*absent\.json"):
        read_questions(files[0], tmp_path / "absent.json")
