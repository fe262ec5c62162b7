"""Answer vocabularies and soft scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visling.data.answers import AnswerVocabulary, soft_scores
from visling.errors import DataError

WORDS = ("<unk>", "yes", "no", "2", "", "don't know")


def test_index_and_unknown() -> None:
    plain, pythia = AnswerVocabulary(WORDS[1:]), AnswerVocabulary(WORDS)
    assert (plain.index("yes"), plain.index("never"), plain.unknown) == (0, None, None)
    assert (pythia.index("yes"), pythia.index("never"), pythia.unknown) == (1, 0, 0)
    assert plain.index("") == 3
    assert "Yes" not in plain
    assert (pythia[5], len(pythia), list(plain)[1]) == ("don't know", 6, "no")


@pytest.mark.parametrize("name", ["answers.json", "answers.txt"])
def test_save_and_load(tmp_path: Path, name: str) -> None:
    vocabulary = AnswerVocabulary((*WORDS, "café", ""[:0] + "trash can"))
    vocabulary.save(tmp_path / name)
    loaded = AnswerVocabulary.load(tmp_path / name)
    assert loaded == vocabulary
    assert loaded.fingerprint == vocabulary.fingerprint


def test_an_empty_last_answer_survives_a_text_file(tmp_path: Path) -> None:
    vocabulary = AnswerVocabulary(["a", ""])
    vocabulary.save(tmp_path / "answers.txt")
    assert AnswerVocabulary.load(tmp_path / "answers.txt") == vocabulary


def test_lxmert_table(tmp_path: Path) -> None:
    (tmp_path / "all_ans.json").write_text(json.dumps([{"ans": "red", "dsets": ["vqa"]}, {"ans": "blue", "dsets": []}]))
    assert AnswerVocabulary.load(tmp_path / "all_ans.json").answers == ("red", "blue")


def test_order_changes_the_fingerprint() -> None:
    assert AnswerVocabulary(["a", "b"]).fingerprint != AnswerVocabulary(["b", "a"]).fingerprint
    assert AnswerVocabulary(["a", "b"]).fingerprint == AnswerVocabulary(("a", "b")).fingerprint


def test_build() -> None:
    counts = {"no": 20, "yes": 30, "b": 9, "a": 9, "rare": 8, "<unk>": 50}
    assert AnswerVocabulary.build(counts, unknown="<unk>").answers == ("<unk>", "yes", "no", "a", "b")
    assert AnswerVocabulary.build(counts, minimum=10).answers == ("<unk>", "yes", "no")
    with pytest.raises(DataError, match="no answer occurs 99 times"):
        AnswerVocabulary.build(counts, minimum=99)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "not JSON"),
        ('{"a": 1}', "must be a list"),
        ('["a", "b", "a"]', "more than once, first 'a'"),
        ("[1]", "strings; found 1"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(DataError, match=message):
        AnswerVocabulary.load(tmp_path / "answers.json")
    with pytest.raises(DataError, match="no answer vocabulary"):
        AnswerVocabulary.load(tmp_path / "absent.json")


@pytest.mark.parametrize(("count", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
@pytest.mark.parametrize("formula", ["counts", "leave_one_out"])
def test_the_published_table(count: int, score: float, formula: str) -> None:
    answers = ["yes"] * count + [f"other {number}" for number in range(10 - count)]
    dense = soft_scores(answers, AnswerVocabulary(WORDS), formula=formula).dense()  # type: ignore[arg-type]
    assert dense[1] == pytest.approx(score)
    assert np.delete(dense, 1).tolist() == [0.0] * 5, "unknown answers have no score"


@given(answers=st.lists(st.sampled_from([*WORDS, "other"]), min_size=10, max_size=10))
def test_both_formulas_agree_on_ten_answers(answers: list[str]) -> None:
    vocabulary = AnswerVocabulary(WORDS)
    counts, left_out = soft_scores(answers, vocabulary), soft_scores(answers, vocabulary, formula="leave_one_out")
    assert counts.indices.tolist() == left_out.indices.tolist() == sorted(counts.indices)
    np.testing.assert_allclose(counts.scores, left_out.scores, rtol=1e-6)
    # The definition, person by person.
    for index, score in zip(left_out.indices, left_out.scores, strict=True):
        per_person = [
            min(1, sum(other == vocabulary[index] for at, other in enumerate(answers) if at != person) / 3)
            for person in range(10)
        ]
        assert score == pytest.approx(np.mean(per_person), rel=1e-6)


def test_fewer_answers() -> None:
    vocabulary = AnswerVocabulary(WORDS)
    assert soft_scores(["yes"], vocabulary).dense()[1] == pytest.approx(0.3)
    assert soft_scores(["yes"], vocabulary, formula="leave_one_out").dense()[1] == 1.0
    for formula in ("counts", "leave_one_out"):
        assert soft_scores([], vocabulary, formula=formula).dense().tolist() == [0.0] * 6


def test_matching_is_exact() -> None:
    assert not soft_scores(["Yes", "yes.", " yes"], AnswerVocabulary(WORDS[1:])).dense().any()


@given(answers=st.lists(st.sampled_from([*WORDS, "other"]), max_size=3))
def test_shares_of_few_answers_sum_to_one(answers: list[str]) -> None:
    scores = soft_scores(answers, AnswerVocabulary(WORDS), formula="share")
    listed = [answer for answer in answers if answer in WORDS[1:]]
    for index, score in zip(scores.indices, scores.scores, strict=True):
        assert score == pytest.approx(listed.count(WORDS[index]) / len(listed))
    assert scores.scores.sum() == pytest.approx(1 if listed else 0)
