"""An encoding is searched by words and by names of regions, and shows itself in notebooks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visling.analysis.encoded_rows import _match_boxes
from visling.analysis.encoding import EncodedRow, Encoding, NamedRegion, Word
from visling.errors import DataError
from visling.types import Maps, RegionArray

NAMES = ("red star", "blue star", "large red moon", "red star")


def make_row(names: tuple[str, ...] = NAMES, *, captured: bool = False) -> EncodedRow:
    texts = ("[CLS]", "the", "star", "by", "the", "kite", "[SEP]")
    words = [
        Word(text=text, tokens=(number,), pieces=(text,), special=text.startswith("["))
        for number, text in enumerate(texts)
    ]
    words[5] = Word(text="kite", tokens=(5, 6), pieces=("ki", "##te"))
    words[6] = Word(text="[SEP]", tokens=(7,), pieces=("[SEP]",), special=True)
    regions = [NamedRegion(at=k, name=name, box=(1.0, 2.0, 30.0 + k, 40.0)) for k, name in enumerate(names)]
    probs = torch.rand(2, 8, 8)
    maps = Maps(text_to_text={"layers.0": probs}, text_to_regions={}, regions_to_text={}, regions_to_regions={})
    return EncodedRow(
        words=tuple(words),
        regions=tuple(regions),
        text_states=torch.rand(8, 3),
        region_states=torch.rand(len(names), 3),
        pooled=torch.rand(3),
        whole=None,
        maps=maps if captured else None,
        states={"layers.0": torch.rand(8, 3)} if captured else None,
    )


def make_encoding(*rows: EncodedRow, question: str = "the star by the kite") -> Encoding:
    return Encoding(question=question, images=(Image.new("RGB", (64, 64)),), rows=rows)


def test_a_word_is_found_with_its_pieces() -> None:
    encoding = make_encoding(make_row())
    assert encoding.word("kite").tokens == (5, 6)
    assert encoding.word("Star").tokens == (2,), "in any case"
    assert encoding.word("[CLS]").special
    assert encoding.word("the", 2).tokens == (4,)


def test_a_region_is_found_by_its_name_or_by_words_of_it() -> None:
    row = make_row()
    assert row.region("Blue star").at == 1
    assert row.region("moon").at == 2
    assert row.region("red large").at == 2
    assert row.region("red star", nth=2).at == 3
    assert row.region("star", nth=3).at == 3, "in the order of the regions"
    assert make_row(("star", "red star")).region("star").at == 0, "a whole name comes before words of one"


@pytest.mark.parametrize(
    ("kind", "wanted", "nth", "message"),
    [
        ("word", "stra", None, r"there is no word 'stra'\. Did you mean 'star'\?"),
        ("word", "elephant", None, r"no word 'elephant'\. There are: \[CLS\], the, star, by, the, kite, \[SEP\]"),
        ("word", "the", None, r"2 words are called 'the': choose one with nth=1 to nth=2"),
        ("word", "the", 3, r"nth must be 1 to 2, the number of words called 'the'; found 3"),
        ("region", "green stair", None, r"there is no region 'green stair'"),
        ("region", "star", None, r"3 regions are called 'star': choose one with nth=1 to nth=3"),
        ("region", "red star", 0, r"nth must be 1 to 2.*found 0"),
    ],
)
def test_what_is_not_there_or_not_alone_is_refused(kind: str, wanted: str, nth: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        getattr(make_encoding(make_row()), kind)(wanted, nth)


def test_words_and_regions_print_short() -> None:
    row = make_row()
    assert repr(row.word("kite")) == "Word('kite', tokens=(5, 6))"
    assert repr(row.region("moon")) == "NamedRegion('large red moon', at=2, box=(1, 2, 32, 40))"
    assert repr(NamedRegion(at=4, name="[END]", box=None, special=True)) == "NamedRegion('[END]', at=4)"


def test_nothing_is_found_among_no_regions() -> None:
    with pytest.raises(DataError, match=r"there is no region 'star'\. There are: none\."):
        make_row(()).region("star")


def test_an_encoding_moves_with_all_its_tensors() -> None:
    row = make_row(captured=True)
    moved = make_encoding(row).to("meta")
    assert moved.words == row.words
    tensors = [moved.text_states, moved.region_states, moved.pooled]
    assert moved.maps is not None
    assert moved.states is not None
    tensors += [*moved.maps.text_to_text.values(), *moved.states.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.whole is None


def test_rows_are_gone_through() -> None:
    first, second = make_row(), make_row(("moon",))
    encoding = make_encoding(first, second)
    assert len(encoding) == 2
    assert list(encoding) == [first, second]
    assert encoding.regions == first.regions
    assert len(repr(encoding).splitlines()) == 2


def test_an_encoding_is_drawn_with_weights() -> None:
    images = (Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64)))
    row = make_row(("star", "moon"))
    other = dataclasses.replace(row.regions[1], image=1, box=(1.0, 2.0, 30.0, 40.0))
    whole = NamedRegion(at=2, name="whole image", box=(0.0, 0.0, 64.0, 64.0), special=True)
    encoding = Encoding(
        question="?", images=images, rows=(dataclasses.replace(row, regions=(row.regions[0], other, whole)),)
    )
    plain, pale = encoding.draw(), encoding.draw(torch.tensor([1.0, 0.1, 9.0]))
    assert plain.size == pale.size == (512 + 16 + 512, 512)
    left, right = (
        np.asarray(pale.crop(box).resize((64, 64))).astype(int) for box in ((0, 0, 512, 512), (528, 0, 1040, 512))
    )
    assert left[25, 20].sum() > 5 * right[25, 20].sum() > 0, "both images share a scale, without the whole image"
    assert (np.asarray(encoding.draw([1.0, 1.0, 0.0])) != np.asarray(plain)).any()
    with pytest.raises(DataError, match=r"one weight for each of the row's 3 regions; found 2"):
        encoding.draw([1.0, 2.0])
    with pytest.raises(DataError, match=r"no row 1: the question has 1"):
        encoding.draw(row=1)


def test_a_page_shows_words_regions_and_shapes_as_text() -> None:
    hostile: Any = '<script>alert(1)</script>"'
    page = make_encoding(make_row((hostile, "moon"), captured=True), question=hostile)._repr_html_()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 2, "in the question and in the table of regions"
    assert "kite (ki ##te)" in page
    assert "maps.text_to_text[&#x27;layers.0&#x27;]" in page
    assert "(2, 8, 8)" in page
    assert page.count("<img") == 1
    assert "http" not in page
    row = make_row()._repr_html_()
    assert "<img" not in row, "a row alone has no images"
    assert "maps" not in row


def match(boxes: list[list[float]], detected: list[list[float]]) -> list[int | None]:
    regions = RegionArray(
        features=np.zeros((len(detected), 0)), boxes=np.array(detected, np.float32).reshape(-1, 4), size=(200, 100)
    )
    return _match_boxes(np.array(boxes, np.float64).reshape(-1, 4), regions)


def test_boxes_are_matched_with_the_detected_ones() -> None:
    star, moon, nearly = [10.0, 20.0, 50.0, 60.0], [11.0, 20.0, 50.0, 60.0], [0.0, 0.0, 199.0, 99.5]
    assert match([moon, star], [star, moon]) == [1, 0], "the nearest pairs first"
    assert match([star, star], [star, star]) == [0, 1], "equal ones in their order"
    whole = [0.0, 0.0, 200.0, 100.0]
    assert match([whole, star, nearly], [star, nearly]) == [None, 0, 1], "an image that a preset adds is nobody's"
    assert match([whole], []) == [None]
    assert match([], [star]) == []
    assert match([[150.0, 0.0, 199.0, 99.0]], [star, [150.0, -7.0, 230.0, 100.0]]) == [1], "cut to the last pixel"
