"""Spellings of image ids."""

from __future__ import annotations

import pytest

from visling.image_ids import Aliases, canonical, from_file_name, same


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (9, "9"),
        ("9", "9"),
        ("COCO_train2014_000000000009", "9"),
        ("scene_000000000042", "42"),
        ("0042", "42"),
        ("dev-850-0-0", "dev-850-0-0"),
        ("dev_850-0", "dev_850-0"),
        ("n161313", "n161313"),
        ("image_", "image_"),
        ("val/dev-1-0", "dev-1-0"),
        ("train2014/COCO_train2014_000000000009", "9"),
        ("scene_²", "scene_²"),
        ("7162685234", "7162685234"),
        ("", ""),
    ],
)
def test_canonical(given: str | int, expected: str) -> None:
    assert canonical(given) == expected


def test_same() -> None:
    assert same(42, "scene_000000000042")
    assert not same("dev-1-0", "dev-1-1")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train2014/COCO_train2014_000000000009.jpg", "COCO_train2014_000000000009"),
        ("a\\b\\x.PNG", "x"),
        ("dev-850-0-0.png", "dev-850-0-0"),
        ("v1.5_photo", "v1.5_photo"),
        ("plain", "plain"),
    ],
)
def test_from_file_name(name: str, expected: str) -> None:
    assert from_file_name(name) == expected


def test_aliases_prefer_the_exact_id_and_refuse_ambiguity() -> None:
    aliases = Aliases(["COCO_train2014_000000000009", "scene_000000000042", "other_42", "42x", "0007", "7"])
    assert aliases.find(9) == "COCO_train2014_000000000009"
    assert aliases.find("other_42") == "other_42"
    assert aliases.find(42) is None
    assert aliases.candidates(42) == ("other_42", "scene_000000000042")
    assert aliases.find("7") == "7"
    assert aliases.find("007") is None
    assert aliases.find("absent") is None
