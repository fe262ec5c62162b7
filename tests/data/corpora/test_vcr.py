"""VCR's questions and choices as a model is shown them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixtures.corpus_draws import LAYOUT, sentences_of

from visling.data.annotations.vcr import VcrRecord
from visling.data.corpora.vcr import VcrChoices
from visling.errors import DataError
from visling.runtime import generator_for


def vcr(number: int, **changed: Any) -> VcrRecord:
    """A question about two people and a dog; its second answer and its last rationale are right."""
    given: dict[str, Any] = {
        "id": f"val-{number}",
        "images": (f"{number}@0",),
        "objects": ("person", "dog", "person"),
        "question": ("does", (2,), "see", (1,), "?"),
        "answer_choices": (("yes",), ((0,), "does"), ("no",), ("maybe",)),
        "rationale_choices": (("look",), ((2,), "smiles"), ("why",), ((0, 1), "left")),
        "answer_label": 1,
        "rationale_label": 3,
        "movie": "movie",
        "question_number": number,
        "metadata": Path("none"),
    }
    return VcrRecord(**(given | changed))


def test_every_choice_of_vcr_is_shown_once_with_its_name_for_everybody() -> None:
    source = VcrChoices([vcr(0), vcr(1)], LAYOUT, objects_from={"1@0": 1})
    assert len(source) == 16
    made = [source.example(index, generator_for(0, index)) for index in range(16)]
    asked, right = "does casey see dog ?", "does casey see dog ? riley does"
    expected = [[asked, choice] for choice in ("yes", "casey does", "no", "maybe")]
    expected += [[right, choice] for choice in ("look", "casey smiles", "why", "riley dog left")]
    assert [sentences_of(example) for example in made] == expected * 2
    assert [example.labels["matched"] for example in made] == [0, 1, 0, 0, 0, 0, 0, 1] * 2
    assert len({example.id for example in made}) == 16
    assert [record.images for record in source.records] == [example.images for example in made]
    assert not any(example.rows[0].links for example in made[:8]), "the store holds other regions of this image"
    assert [example.rows[0].links for example in made[8:10]] == [((2, 3), (4, 2)), ((2, 3), (4, 2), (7, 1))]


def test_quirk_a_question_of_vcr_is_shown_with_one_choice_in_the_release() -> None:
    source = VcrChoices([vcr(number) for number in range(10)], LAYOUT, objects_from={}, same_choice=True)
    shown = [source.example(index, generator_for(0)).id for index in range(len(source))]
    assert shown == [f"val-{number}:{number % 8}" for number in range(10) for _ in range(8)]
    assert source.example(8 * 9, generator_for(0)).labels == {"matched": 1}, "choice 1 of question 9"


@pytest.mark.parametrize("label", ["answer_label", "rationale_label"])
def test_choices_of_vcr_without_labels(label: str) -> None:
    with pytest.raises(
        DataError, match="'val-1' has no labels: pre-training on VCR needs a split with the right choices"
    ):
        VcrChoices([vcr(0), vcr(1, **{label: None})], LAYOUT, objects_from={})
