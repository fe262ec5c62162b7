"""An answer draws itself, shows itself in notebooks, and says what makes it doubtful."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling.analysis.answer import Answer
from visling.errors import RunError
from visling.types import RegionArray

GREY = (128, 128, 128)


def make_answer(**changes: Any) -> Answer:
    regions = RegionArray(
        features=np.zeros((1, 2), np.float32),
        boxes=np.array([[10, 10, 60, 60]], np.float32),
        size=(128, 128),
        classes=np.array([0]),
    )
    fields: dict[str, Any] = {
        "text": "red",
        "confidence": 0.75,
        "top": (("red", 0.75), ("blue", 0.25)),
        "boxes": (),
        "pointed_at": (),
        "question": "what colour is it?",
        "images": (Image.new("RGB", (128, 128), GREY),),
        "regions_by_image": (regions,),
        "class_names": ("star",),
        "max_tokens": 64,
        "truncated": False,
    }
    return Answer(**fields | changes)


def test_a_drawing_holds_what_the_answer_knows() -> None:
    drawn = np.asarray(make_answer().draw())
    for changes in (
        {"class_names": ("moon",)},
        {"question": "why?"},
        {"top": (("red", 0.5),)},
        {"images": (Image.new("RGB", (128, 128), "red"),)},
    ):
        other = np.asarray(make_answer(**changes).draw())
        assert other.shape != drawn.shape or (other != drawn).any(), changes
    assert (np.asarray(make_answer().draw(max_boxes=0)) != drawn).any(), "no box is drawn"


def test_images_of_a_pair_are_drawn_next_to_each_other() -> None:
    one = make_answer()
    pair = make_answer(images=one.images * 2, regions_by_image=one.regions_by_image * 2)
    assert pair.draw().width > one.draw().width
    assert pair._repr_html_().count("<img") == 2
    assert "1 and 1 regions" in repr(pair)


def test_an_answer_without_an_image_is_drawn() -> None:
    answer = make_answer(images=(), regions_by_image=())
    assert answer.draw().width < make_answer().draw().width
    assert "<img" not in answer._repr_html_()
    assert repr(answer) == 'Answer(red 75%, blue 25%; "what colour is it?", no image)'


def test_boxes_that_the_model_points_at_are_drawn_in_place_of_the_regions() -> None:
    answer = make_answer(boxes=((70.0, 70.0, 90.0, 90.0), (1.0, 1.0, 9.0, 9.0)), pointed_at=(("the red star", 0.7),))
    picture = np.asarray(answer.draw()).astype(int)[24:-24, 24:536]
    marked = (picture != 128).any(2)
    assert marked[70 * 4 : 90 * 4, 70 * 4 : 90 * 4].any()
    assert not marked[20 * 4 : 55 * 4, 20 * 4 : 64 * 4].any(), "the detected region is left out"
    page = answer._repr_html_()
    assert "the red star" in page
    assert "blue" not in page


def test_an_answer_that_points_prints_what_at() -> None:
    answer = make_answer(
        text="(1.0, 1.0, 9.0, 9.0)", top=(("2", 0.7), ("4", 0.3)), boxes=((1.0, 1.0, 9.0, 9.0), (2.0, 2.0, 4.0, 4.0)),
        pointed_at=(("the star", 0.7),),
    )  # fmt: skip
    assert repr(answer) == 'Answer(the star 70%; "what colour is it?", 1 regions)'


def test_a_score_alone_is_shown_as_one() -> None:
    answer = make_answer(text="-0.0239001", top=(), confidence=0.49)
    assert repr(answer) == 'Answer(score -0.02 49%; "what colour is it?", 1 regions)'
    assert "score -0.02" in answer._repr_html_()
    assert repr(make_answer(top=(), confidence=0.5)).startswith("Answer(red 50%;"), "a task that lists no others"
    nothing = make_answer(text="no box", top=(), confidence=0.0)
    assert repr(nothing) == 'Answer(no box; "what colour is it?", 1 regions)'
    assert (np.asarray(answer.draw()) != np.asarray(nothing.draw())).any()


def test_a_page_shows_text_as_text_and_loads_nothing() -> None:
    hostile = "<script>alert('1')</script>\"><img src=x onerror=alert(1)>"
    answer = make_answer(
        question=hostile, top=((hostile, 1.0),), notice=hostile, class_names=(hostile,), spelled_out=(hostile,)
    )
    page = answer._repr_html_()
    assert "<script" not in page
    assert page.count("<img") == 1, "the picture alone"
    assert page.count("&lt;script&gt;") == 5
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert "http" not in page


def test_bars_of_impossible_shares_stay_in_their_track() -> None:
    page = make_answer(top=(("a", 7.0), ("b", -1.0), ("c", float("nan"))))._repr_html_()
    assert re.findall(r"#1d78c8 ([\d.]+)%", page) == ["100.0", "0.0", "0.0"]


def test_notices_are_told_by_every_view() -> None:
    answer = make_answer(truncated=True, spelled_out=("qqq", "xyzzy"), notice="the detector found nothing")
    assert answer.notices == (
        "the detector found nothing",
        "the text was cut to 64 word pieces",
        "most words are unknown to the model, which reads them letter by letter: qqq, xyzzy",
    )
    for notice in answer.notices:
        assert notice in repr(answer)
        assert notice in answer._repr_html_()
    assert make_answer().notices == ()


def test_a_drawing_is_saved(tmp_path: Path) -> None:
    make_answer().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(make_answer().draw()))
    for target in (tmp_path / "gone" / "a.png", tmp_path / "a.odd"):
        with pytest.raises(RunError, match=r"cannot write the picture .*ending in \.png"):
            make_answer().save(str(target))
