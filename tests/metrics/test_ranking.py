"""Ranks and recalls of retrieval: equal to the recorded ones, to a sort that is written out, and clear about ties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from visling.errors import DataError
from visling.metrics import ranking
from visling.metrics.ranking import average, best_ranks, sum_of_recalls, summarise


@pytest.fixture
def recorded(golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / "metrics" / "retrieval.json").read_text())
    return content


def test_the_recorded_numbers_in_both_directions(recorded: dict[str, Any]) -> None:
    scores, expected = np.array(recorded["similarity"]), recorded["expected"]
    images, captions = scores.shape
    owners = np.arange(captions) // (captions // images)
    text = best_ranks(scores, np.arange(images), owners)
    image = best_ranks(scores.T, owners, np.arange(images))
    assert text.tolist() == expected["i2t_ranks"]
    assert image.tolist() == expected["t2i_ranks"]
    found = {"i2t": summarise(text), "t2i": summarise(image)}
    for direction, ranks in found.items():
        names = ("r1", "r5", "r10", "medr", "meanr")
        for name, value in zip(names, (*ranks.recalls, ranks.median, ranks.mean), strict=True):
            assert value == pytest.approx(expected[direction][name], abs=1e-9), (direction, name)
    assert sum_of_recalls(*found.values()) == pytest.approx(expected["rsum"], abs=1e-9)


def sorted_ranks(scores: NDArray[Any], queries: NDArray[Any], candidates: NDArray[Any], wrong_first: bool) -> list[int]:
    """The simple way: sort every list and look for the first right candidate."""
    ranks = []
    for row, owner in zip(scores, queries, strict=True):
        right = candidates == owner
        late = [is_right and (wrong_first or score == -np.inf) for is_right, score in zip(right, row, strict=True)]
        order = sorted(range(len(row)), key=list(zip(-row, late, strict=True)).__getitem__)
        ranks.append(next(rank for rank, at in enumerate(order) if right[at]))
    return ranks


@pytest.mark.parametrize("ties", ["stable", "distractors_first"])
@pytest.mark.parametrize("cells", [7, 1 << 22])
def test_ranks_with_many_ties_and_unscored_pairs(ties: Any, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_CELLS", cells)
    rng = np.random.default_rng(0)
    for _ in range(30):
        candidates = rng.permutation(np.arange(12) % 4)
        scores = rng.integers(0, 4, (9, 12)).astype(float)
        scores[rng.random(scores.shape) < 0.3] = -np.inf
        queries = rng.integers(0, 4, 9)
        expected = sorted_ranks(scores, queries, candidates, ties == "distractors_first")
        assert best_ranks(scores, queries, candidates, ties).tolist() == expected


def test_a_model_that_scores_all_alike() -> None:
    scores, owners = np.zeros((4, 4)), np.arange(4)
    assert best_ranks(scores, owners, owners).tolist() == [0, 1, 2, 3]
    assert best_ranks(scores, owners, owners, "distractors_first").tolist() == [3, 3, 3, 3]


def test_the_mean_of_folds() -> None:
    first, second = summarise([0, 0]), summarise([3, 20])
    assert (first.recalls, second.recalls) == ((100.0, 100.0, 100.0), (0.0, 50.0, 50.0))
    assert average([first, second]).recalls == (50.0, 75.0, 75.0)
    assert average([first, second]).median == (1 + 12) / 2
    assert average([first, second]).mean == (1 + 12.5) / 2


def test_what_cannot_be_ranked() -> None:
    owners = np.arange(2)
    with pytest.raises(DataError, match="query 1 is not a number"):
        best_ranks(np.array([[0.0, 1.0], [np.nan, 1.0]]), owners, owners)
    with pytest.raises(DataError, match="query 1 has no right candidate"):
        best_ranks(np.zeros((2, 2)), owners, np.zeros(2))
    with pytest.raises(DataError, match=r"2 queries and 3 candidates.*\(2, 2\)"):
        best_ranks(np.zeros((2, 2)), owners, np.arange(3))
    with pytest.raises(DataError, match="no queries"):
        summarise([])
    with pytest.raises(DataError, match="no folds"):
        average([])
