"""Several sources of examples as one."""

from __future__ import annotations

from collections import Counter

import pytest
from fixtures.corpus_draws import CAPTIONS, DRAWS, LAYOUT, expect_shares

from visling.data.corpora.captions import SingleCaption
from visling.data.corpora.mixture import Labelled, Mixture
from visling.errors import ConfigError
from visling.runtime import generator_for
from visling.types import IGNORE, Example


def test_labels_are_filled_up() -> None:
    captions = SingleCaption(CAPTIONS, LAYOUT, false_caption_ratio=0.0)
    source = Labelled(captions, ("matched", "answer"))
    assert (len(source), source.records) == (12, CAPTIONS)
    assert source.example(0, generator_for(0)).labels == {"matched": 1, "answer": IGNORE}


class Numbers:
    """A source whose examples are named after their place."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def example(self, index: int, rng: object) -> Example:
        assert 0 <= index < self.count
        return Example(id=f"{self.name}{index}", rows=(), images=())


def test_mixture_passes_over_every_source_as_often_as_weighted() -> None:
    plain = Mixture([Numbers("a", 3), Numbers("b", 2)])
    assert [plain.example(index, generator_for(0)).id for index in range(len(plain))] == ["a0", "a1", "a2", "b0", "b1"]
    weighted = Mixture([Numbers("a", 4), Numbers("b", 2), Numbers("c", 10)], [0.5, 2, 1.5])
    assert len(weighted) == 2 + 4 + 15
    drawn = [weighted.example(index, generator_for(7, index)).id for index in range(len(weighted))]
    assert drawn[2:6] == ["b0", "b1", "b0", "b1"]
    assert drawn[6:16] == [f"c{number}" for number in range(10)]
    rng = generator_for(3)
    expect_shares(
        Counter(weighted.example(0, rng).id for _ in range(DRAWS)), {f"a{number}": 1 / 4 for number in range(4)}
    )
    expect_shares(
        Counter(weighted.example(20, rng).id for _ in range(DRAWS)), {f"c{number}": 1 / 10 for number in range(10)}
    )


def test_a_mixture_knows_the_annotation_of_an_example() -> None:
    parts = [SingleCaption(CAPTIONS[:7], LAYOUT), Labelled(SingleCaption(CAPTIONS[3:], LAYOUT), ("matched",))]
    mixed = Mixture(parts, [0.5, 1.7])
    for index in range(len(mixed)):
        assert mixed.record(index, generator_for(2, index)).id == mixed.example(index, generator_for(2, index)).id


@pytest.mark.parametrize(
    ("sources", "weights"), [([], None), ([Numbers("a", 1)], [0.0]), ([Numbers("a", 1)], [1.0, 1.0])]
)
def test_impossible_mixtures(sources: list[Numbers], weights: list[float] | None) -> None:
    with pytest.raises(ConfigError, match="one positive weight"):
        Mixture(sources, weights)
