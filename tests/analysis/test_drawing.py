"""Drawing: every box where it belongs, labels inside the picture, no size of picture that breaks it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from visling.analysis.drawing import (
    _draw_label,
    _load_font,
    answer_bars,
    draw_regions,
    encode_picture,
    prediction_card,
    region_colour,
)
from visling.errors import BoxError
from visling.types import RegionArray

GREY = (128, 128, 128)


def make_regions(boxes: list[list[float]], size: tuple[int, int], **fields: object) -> RegionArray:
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return RegionArray(features=np.zeros((len(array), 4), np.float16), boxes=array, size=size, **fields)  # type: ignore[arg-type]


def changed(before: Image.Image, after: Image.Image) -> NDArray[np.bool_]:
    """Where two pictures of one size differ, (H, W) bool."""
    pixels = np.asarray(before.resize(after.size, Image.Resampling.NEAREST)), np.asarray(after)
    return np.asarray((pixels[0] != pixels[1]).any(axis=-1), dtype=np.bool_)


def describe(regions: RegionArray, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[str]:
    """The labels that a drawing writes, in order."""
    from visling.analysis import drawing

    written: list[str] = []
    monkeypatch.setattr(drawing, "_draw_label", lambda canvas, text, *rest: written.append(text))
    draw_regions(Image.new("RGB", regions.size, GREY), regions, **options)  # type: ignore[arg-type]
    return written


@pytest.mark.parametrize(
    ("size", "expected"),
    [((128, 128), (512, 512)), ((400, 100), (800, 200)), ((640, 480), (640, 480)), ((3000, 20), (3000, 20))],
)
def test_small_pictures_are_enlarged(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert draw_regions(Image.new("RGB", size), make_regions([], size)).size == expected


def test_scale_is_obeyed_and_checked() -> None:
    image, regions = Image.new("RGB", (20, 10)), make_regions([[1, 1, 5, 5]], (20, 10))
    assert draw_regions(image, regions, scale=3).size == (60, 30)
    with pytest.raises(BoxError, match="scale"):
        draw_regions(image, regions, scale=0)


def test_box_is_drawn_at_its_place_and_the_given_image_is_untouched() -> None:
    image = Image.new("RGB", (400, 300), GREY)
    drawn = draw_regions(image, make_regions([[100, 120, 300, 250]], (400, 300)), scale=1)
    marks = changed(image, drawn)
    for x, y in ((100, 200), (300, 200), (200, 120), (200, 250)):
        assert marks[y - 1 : y + 2, x - 1 : x + 2].any(), (x, y)
    assert not marks[140:240, 120:280].any(), "the inside of a box stays visible"
    assert not marks[255:].any()
    assert (np.asarray(image) == GREY).all()


@pytest.mark.parametrize("small", [0, 1])
def test_small_boxes_lie_on_top_of_large_ones(small: int) -> None:
    boxes = [[115.0, 50.0, 390.0, 290.0]]
    boxes.insert(small, [100.0, 100.0, 130.0, 130.0])
    drawn = draw_regions(Image.new("RGB", (400, 300), GREY), make_regions(boxes, (400, 300)), scale=1)
    assert drawn.getpixel((115, 129)) == region_colour(small), (
        "where the left edge of the large box crosses the lower edge of the small one"
    )


def test_boxes_follow_a_resized_image() -> None:
    regions = make_regions([[200, 200, 400, 400]], (800, 800))
    marks = changed(image := Image.new("RGB", (400, 400), GREY), draw_regions(image, regions, scale=1))
    assert marks[150, 100]
    assert not marks[:, 210:].any()


def test_label_says_attributes_class_and_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = make_regions(
        [[10, 10, 50, 50], [60, 60, 90, 90], [5, 5, 9, 9]],
        (100, 100),
        classes=np.array([1, 0, 7]),
        class_confidence=np.array([0.914, 0.5, 0.25], np.float16),
        attributes=np.array([[0, 2, 1], [-1, 1, 9], [-1, -1, -1]]),
        attribute_confidence=np.array([[0.9, 0.8, 0.1], [0.9, 0.9, 0.9], [0, 0, 0]], np.float16),
    )
    names = {"class_names": ("circle", "square"), "attribute_names": ("red", "large", "striped")}
    assert describe(regions, monkeypatch, **names) == ["red striped square 91%", "large circle 50%", "class 7 25%"]
    assert describe(regions, monkeypatch) == ["1", "2", "3"]
    assert describe(regions, monkeypatch, top=1, **names) == ["red striped square 91%"]
    assert describe(regions, monkeypatch, top=2, highlight=[0.1, 0.2, 0.7], **names) == [
        "class 7 · 0.70",
        "large circle · 0.20",
    ]


def test_highlight_marks_the_heaviest_and_is_checked() -> None:
    regions = make_regions([[20, 20, 180, 180], [220, 20, 380, 180]], (400, 200))
    image = Image.new("RGB", (400, 200), GREY)
    pixels = np.asarray(draw_regions(image, regions, highlight=[0.05, 0.9], scale=1)).astype(int)
    light, heavy = (np.abs(pixels[100, x] - 128).sum() for x in (100, 300))
    assert heavy > 10 * max(light, 1)
    with pytest.raises(BoxError, match="3 for 2 regions"):
        draw_regions(image, regions, highlight=[1, 2, 3])
    for weights in ([0.0, 0.0], [float("nan"), -1.0]):
        draw_regions(image, regions, highlight=weights)


def test_weights_on_a_scale_of_their_own_leave_light_boxes_light() -> None:
    regions = make_regions([[20, 20, 180, 180]], (200, 200))
    image = Image.new("RGB", (200, 200), GREY)

    def fill(**options: float) -> int:
        """How much the middle of the box changes."""
        drawn = draw_regions(image, regions, highlight=[0.1], scale=1, **options)  # type: ignore[arg-type]
        return int(np.abs(np.asarray(drawn).astype(int)[100, 100] - 128).sum())

    assert fill() > 5 * fill(full=1.0)
    assert fill(full=0.05) == fill(), "no weight is more than full"


def test_labels_stay_inside_and_do_not_hide_one_another() -> None:
    from PIL import ImageDraw

    width, height = 320, 200
    canvas = ImageDraw.Draw(Image.new("RGB", (width, height)), "RGBA")
    rng = np.random.default_rng(0)
    corners = [
        (0, 0),
        (310, 0),
        (0, 190),
        (310, 190),
        *((int(rng.integers(300)), int(rng.integers(180))) for _ in range(30)),
    ]
    boxes = [(float(x), float(y), x + 9.0, y + 9.0) for x, y in corners]
    placed: list[tuple[float, float, float, float]] = []
    for owner in range(len(boxes)):
        _draw_label(canvas, f"large red square {owner}", owner, boxes, _load_font(12), (width, height), placed)
    assert len(placed) > 10
    for number, (x1, y1, x2, y2) in enumerate(placed):
        assert x1 >= 0
        assert y1 >= 0
        assert x2 <= width
        assert y2 <= height
        for a1, b1, a2, b2 in placed[:number]:
            shared = max(min(x2, a2) - max(x1, a1), 0) * max(min(y2, b2) - max(y1, b1), 0)
            assert shared <= 0.4 * (x2 - x1) * (y2 - y1)
    # A label in a corner is placed next to its small box, not on it.
    for box, label in zip(boxes[:4], placed[:4], strict=True):
        assert min(box[2], label[2]) <= max(box[0], label[0]) or min(box[3], label[3]) <= max(box[1], label[1])


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (2, 2), (3, 900)])
def test_extreme_sizes_are_drawn(size: tuple[int, int]) -> None:
    regions = make_regions(
        [[0, 0, 1, 1], [5, 5, 2, 2], [-10, -10, 9999, 9999], [float("nan"), 0, 1, 1]],
        size,
        classes=np.array([0, 1, 0, 1]),
    )
    drawn = draw_regions(Image.new("RGB", size, GREY), regions, class_names=("circle", "square"))
    assert drawn.width % size[0] == 0
    assert drawn.height % size[1] == 0
    prediction_card([drawn], "Why?", [("because", 1.0)])
    prediction_card([drawn, Image.new("RGB", (60, 40))], "Why?", [("because", 1.0)])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I"])
def test_every_mode_of_picture(mode: str) -> None:
    assert draw_regions(Image.new(mode, (60, 40)), make_regions([[1, 1, 30, 30]], (60, 40))).mode == "RGB"


def test_transparency_becomes_paper() -> None:
    clear = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    assert draw_regions(clear, make_regions([], (30, 30)), scale=1).getpixel((5, 5)) == (255, 255, 255)


def test_colours_of_neighbours_differ() -> None:
    colours = [np.array(region_colour(i)) for i in range(40)]
    assert all(np.abs(a - b).sum() > 60 for a, b in pairwise(colours))
    assert len({tuple(c) for c in colours}) == 40


def test_bars_are_as_long_as_the_probabilities() -> None:
    pixels = np.asarray(answer_bars([("yes", 0.8), ("no", 0.2)], width=400)).astype(int)
    filled = [int(((pixels[y, :, 2] - pixels[y, :, 0]) > 40).sum()) for y in (6 + 29, 6 + 44 + 29)]
    assert filled[0] == pytest.approx(4 * filled[1], abs=6)
    empty = np.asarray(answer_bars([]))
    assert (empty != 255).any(), "an empty list says so"
    for strange in (float("nan"), -1.0, 7.0):
        assert answer_bars([("an answer as long as a sentence " * 9, strange)]).width == 380


def test_card_holds_picture_question_and_bars() -> None:
    regions = make_regions([[10, 10, 60, 60]], (128, 128), classes=np.array([0]))
    image, top = Image.new("RGB", (128, 128), GREY), [("blue", 0.9), ("red", 0.1)]
    bare, drawn = draw_regions(image, make_regions([], (128, 128))), draw_regions(image, regions)
    card = prediction_card([drawn], "What colour is the square?", top)
    assert card.width > card.height
    plain = prediction_card([bare], "What colour is the square?", top)
    other = prediction_card([bare], "Où est le carré? 日本", top)
    assert card.size == plain.size
    assert (np.asarray(card) != np.asarray(plain)).any(), "regions show"
    assert (np.asarray(other) != np.asarray(plain)).any(), "the question shows"
    wide = prediction_card([Image.new("RGB", (400, 100), GREY)], "word " * 200, top)
    assert wide.width < 900, "a wide picture stands above its bars"
    alone = prediction_card([], "What colour is it?", top)
    assert alone.width < plain.width, "a text-only model has no picture"


def test_pictures_of_a_card_stand_next_to_each_other() -> None:
    left, right = Image.new("RGB", (300, 300), "red"), Image.new("RGB", (100, 150), "blue")
    pixels = np.asarray(prediction_card([left, right], "Is it true?", [("true", 1.0)])).astype(int)
    red, blue = (np.argwhere((pixels == colour).all(2)) for colour in ((255, 0, 0), (0, 0, 255)))
    assert len(red) == 300 * 300
    assert len(blue) == 200 * 300, "the smaller one is enlarged to the same height"
    assert red[:, 0].min() == blue[:, 0].min()
    assert red[:, 1].max() < blue[:, 1].min()


def test_a_picture_travels_in_the_smaller_format() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8))
    assert encode_picture(Image.new("RGB", (80, 80), GREY)).startswith("data:image/png;base64,")
    assert encode_picture(noise).startswith("data:image/jpeg;base64,")
