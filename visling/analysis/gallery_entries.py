"""What a gallery says of single examples and of groups of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visling.analysis.examples import (
    Box,
    Row,
    describe,
    describe_answer,
    is_right,
    list_boxes,
    list_candidates,
    list_images,
    measure_difference,
    split_choices,
)
from visling.analysis.run_files import as_mapping, as_number
from visling.regions.store import count_regions
from visling.types import Prediction, RegionStore

_CANDIDATES = 5
"""Answers listed for an example."""
NOTHING_GAINED = 0.1
"""An answer rests on the words alone if it is the same without the image and the image adds less than this to its
probability."""
_CONFIDENCE_ENDS, _COUNT_ENDS = (0.5, 0.7, 0.9), (0, 5, 10, 20, 36)
"""Last values of the groups by confidence and by number of boxes; one more group is open."""
_CONFIDENCES = ("up to 50 %", "50 to 70 %", "70 to 90 %", "over 90 %")
_COUNTS = ("none", "1 to 5", "6 to 10", "11 to 20", "21 to 36", "over 36")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An example, and what another run says about it."""

    row: Row
    other: Row | None
    even: bool = True
    """Whether it was chosen by its place in the file, not for what the runs say about it."""

    @property
    def difference(self) -> float:
        """How far the two runs are apart, from 0 to 1."""
        return 0.0 if self.other is None else measure_difference(self.row, self.other)


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """Scores of a group of examples."""

    label: str
    count: int
    right: float | None
    """Mean score of the scored ones, from 0 to 1; None if there are none."""
    other: float | None
    """Of the run that is compared."""
    confidence: float | None
    """Mean; near `right` where the model is calibrated."""


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Examples by one of their properties."""

    title: str
    key: str
    """Name of the property in an entry's "groups"."""
    groups: Sequence[GroupScore]


def describe_entry(pair: Pair, store: RegionStore | None, pictures: Sequence[str | None]) -> dict[str, Any]:
    """What the index shows of an example, without what the model is asked for anew.

    Args:
        pictures: path of the thumbnail of each image, None where there is none.
    """
    row, other = pair.row, pair.other
    text, choices = split_choices(row)
    return {
        "id": str(row.get("id")),
        "text": text,
        "truth": describe_answer(row.get("truth"), choices),
        "answer": describe_answer(row.get("prediction"), choices),
        "confidence": as_number(row.get("confidence")),
        "score": as_number(row.get("score")),
        "right": is_right(row),
        "top": [[describe_answer(name, choices), round(share, 4)] for name, share in list_candidates(row, _CANDIDATES)],
        "images": list(pictures),
        "boxes": count_boxes(row, store),
        "groups": {key: name(row, store) for key, (_, name) in _GROUPINGS.items()},
        "other": None
        if other is None
        else {
            "answer": describe_answer(other.get("prediction"), choices),
            "confidence": as_number(other.get("confidence")),
            "right": is_right(other),
            "difference": round(pair.difference, 4),
        },
        "even": pair.even,
        "blind": None,
        "removal": None,
        "view": None,
    }


def list_truth(row: Row) -> tuple[tuple[str, ...], tuple[Box, ...]]:
    """Right answers and right boxes of an example, as its details have them."""
    truth = row.get("truth")
    _, choices = split_choices(row)
    if isinstance(row.get("phrases"), list):
        return (), tuple(box for phrase in row["phrases"] for box in list_boxes(as_mapping(phrase).get("annotated")))
    if boxes := list_boxes([truth]):
        return (), tuple(boxes)
    values = truth if isinstance(truth, (list, tuple, dict)) else [] if truth is None else [truth]
    return tuple(dict.fromkeys(describe_answer(value, choices) for value in values)), ()


def compare_blind(row: Row, blind: Prediction) -> dict[str, Any]:
    """The answer without the image, and how much probability the image adds to the answer that was given with it."""
    given = describe(row.get("prediction"), "")
    without = dict(blind.top).get(given, blind.confidence if str(blind.value) == given else 0.0)
    gain = (as_number(row.get("confidence")) or 0.0) - without
    return {
        "answer": describe_answer(blind.value, split_choices(row)[1]),
        "gain": round(gain, 4),
        "alone": str(blind.value) == given and gain < NOTHING_GAINED,
    }


def name_candidates(entry: dict[str, Any], document: Mapping[str, Any]) -> None:
    """In place of the boxes that a model pointed at, the names that the document of the example has for them."""
    if document["answers_are"] == "alternatives" and any(answer["box"] for answer in document["answers"]):
        named = [[answer["text"], round(answer["probability"], 4)] for answer in document["answers"][:_CANDIDATES]]
        entry |= {"answer": named[0][0], "top": named}


def read_removal(document: Mapping[str, Any]) -> float | None:
    """How much faster than by chance the answer's probability falls when the regions that its relevance names go first:
    area under the curve of random orders less that of this order; above 0 is better than chance. None where it was not
    computed."""
    curves = as_mapping(document.get("removal")).get("curves") or ()
    areas = {(one["method"], one["order"]): one["area"] for one in curves if one["part"] == "regions"}
    named, chance = areas.get(("relevance", "most_first")), areas.get(("random", "random"))
    return None if named is None or chance is None else round(chance - named, 4)


def count_boxes(row: Row, store: RegionStore | None) -> int | None:
    """Regions of all images of an example; None where they are not known."""
    if store is None or not list_images(row):
        return None
    known = [image for image in list_images(row) if image in store]
    return int(count_regions(store, known).sum()) if known else None


def group_pairs(pairs: Sequence[Pair], store: RegionStore | None) -> list[Grouping]:
    """Scores of all examples by type, right answer, confidence and number of boxes, where there are several
    groups, of two examples on average at least."""
    found = []
    for key, (title, name) in _GROUPINGS.items():
        groups: dict[str, list[Pair]] = {}
        for pair in pairs:
            if label := name(pair.row, store):
                groups.setdefault(label, []).append(pair)
        if 1 < len(groups) <= len(pairs) / 2:
            scores = [_score_group(label, members) for label, members in groups.items()]
            if key in _ORDERS:
                scores.sort(key=lambda one: _ORDERS[key].index(one.label))
            else:
                scores.sort(key=lambda one: (-one.count, one.label))
            found.append(Grouping(title=title, key=key, groups=scores))
    return found


def _score_group(label: str, pairs: Sequence[Pair]) -> GroupScore:
    return GroupScore(
        label=label,
        count=len(pairs),
        right=_mean([as_number(pair.row.get("score")) for pair in pairs]),
        other=_mean([as_number(pair.other.get("score")) for pair in pairs if pair.other is not None]),
        confidence=_mean([as_number(pair.row.get("confidence")) for pair in pairs]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _type_of(row: Row, store: RegionStore | None) -> str:
    return describe(row.get("type"), "")


def _truth_of(row: Row, store: RegionStore | None) -> str:
    """The right answer, of several the one that most people gave; boxes make no groups."""
    truth = row.get("truth")
    if list_boxes([truth]):
        return ""
    if isinstance(truth, (list, tuple, dict)):
        return describe(truth, "").split(", ")[0]
    return describe_answer(truth, split_choices(row)[1])


def _confidence_of(row: Row, store: RegionStore | None) -> str:
    value = as_number(row.get("confidence"))
    return "" if value is None else _CONFIDENCES[bisect_left(_CONFIDENCE_ENDS, value)]


def _count_of(row: Row, store: RegionStore | None) -> str:
    value = count_boxes(row, store)
    return "" if value is None else _COUNTS[bisect_left(_COUNT_ENDS, value)]


_GROUPINGS: Mapping[str, tuple[str, Callable[[Row, RegionStore | None], str]]] = {
    "type": ("type", _type_of),
    "truth": ("right answer", _truth_of),
    "confidence": ("confidence", _confidence_of),
    "boxes": ("number of boxes", _count_of),
}
"""Key -> title, and the name of an example's group; empty for those that are in none."""
_ORDERS = {"confidence": _CONFIDENCES, "boxes": _COUNTS}
"""Key -> names of its groups in order; other groups stand by their size."""
