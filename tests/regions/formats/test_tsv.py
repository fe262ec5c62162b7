"""Files of region features as text: both layouts, their dirt, what is refused; the released sample is in
`tests/parity/test_lxmert_io.py`."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.errors import BoxError, DataError, StoreError
from visling.regions.formats.base import ConversionReport, convert_regions
from visling.regions.formats.tsv import RegionTsv
from visling.regions.store import NativeStore

F = 3


def encode(values: Any, kind: str) -> str:
    return base64.b64encode(np.asarray(values, kind).tobytes()).decode()


def line(name: str, count: int = 2, *, lxmert: bool = True, **changes: str) -> str:
    """One image of 40 x 20 pixels whose numbers follow from the region."""
    numbers = np.arange(count)
    boxes = np.stack([numbers, numbers, numbers + 20, numbers + 10], axis=1)
    fields = {"id": name, "height": "20", "width": "40"} if lxmert else {"id": name, "width": "40", "height": "20"}
    if lxmert:
        fields |= {"classes": encode(numbers + 5, "<i8"), "class_confidence": encode(numbers / 4, "<f4")}
        fields |= {"attributes": encode(numbers + 7, "<i8"), "attribute_confidence": encode(numbers / 8, "<f4")}
    fields |= {
        "number": str(count),
        "boxes": encode(boxes, "<f4"),
        "features": encode(numbers[:, None] + np.arange(F) / 10, "<f4"),
    }
    assert changes.keys() <= fields.keys()
    return "\t".join({**fields, **changes}.values())


def write(path: Path, *lines: str, end: str = "\n") -> Path:
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


@pytest.mark.parametrize("lxmert", [True, False])
def test_both_layouts_are_decoded(tmp_path: Path, lxmert: bool) -> None:
    file = RegionTsv(write(tmp_path / "x.tsv", line("a", lxmert=lxmert), line("9", 3, lxmert=lxmert)))
    assert (file.layout, file.feature_size) == ("lxmert-obj36" if lxmert else "bottom-up-attention", F)
    (first, regions, _, where), (second, more, end, _) = file.images()
    assert where == "line 1"
    assert (first, second, end) == ("a", "9", file.path.stat().st_size)
    assert regions is not None
    assert more is not None
    assert regions.size == more.size == (40, 20)
    assert more.boxes.tolist() == [[0, 0, 20, 10], [1, 1, 21, 11], [2, 2, 22, 12]]
    np.testing.assert_array_equal(more.features[2], np.array([2, 2.1, 2.2], np.float32))
    if lxmert:
        assert more.classes is not None
        assert more.attributes is not None
        assert (more.classes.tolist(), more.attributes.tolist()) == ([5, 6, 7], [7, 8, 9])
        assert more.class_confidence is not None
        assert more.attribute_confidence is not None
        assert (more.class_confidence.tolist(), more.attribute_confidence.tolist()) == (
            [0, 0.25, 0.5],
            [0, 0.125, 0.25],
        )
    else:
        assert more.classes is more.class_confidence is more.attributes is more.attribute_confidence is None


def test_dirty_files_are_converted(tmp_path: Path) -> None:
    """Line ends of Python 2's csv module, blank lines, images without a region (the first ones, too), images that come
    again, boxes on the edge."""
    edge = encode([[-0.5, 0, 40.4, 20.9]], "<f4")
    one = write(
        tmp_path / "one.tsv", line("empty", 0), line("a"), "", line("a", 3), line("edge", 1, boxes=edge), end="\r\n"
    )
    two = write(tmp_path / "two.tsv", line("b", 1), line("a", 1))
    two.write_bytes(two.read_bytes().rstrip(b"\n"))
    shown: list[tuple[int, int]] = []
    found = convert_regions(
        [RegionTsv(one), RegionTsv(two)], tmp_path / "store", progress=lambda done, total: shown.append((done, total))
    )
    assert found == ConversionReport(images=4, regions=4, existing=0, repeated=2, clipped=1)
    size = one.stat().st_size + two.stat().st_size
    assert shown[-1] == (size, size)
    assert shown == sorted(shown)
    store = NativeStore.open(tmp_path / "store")
    assert [(name, store.count(name)) for name in store.ids] == [("a", 2), ("b", 1), ("edge", 1), ("empty", 0)]
    assert store["edge"].boxes.tolist() == [[0, 0, 40, 20]]
    assert store.fingerprint == store.settings["layout"] == "lxmert-obj36"


def test_an_interrupted_conversion_resumes(tmp_path: Path) -> None:
    whole = [line(name) for name in "abc"]
    file = write(tmp_path / "x.tsv", *whole[:2], whole[2][:-8])
    with pytest.raises(DataError, match="line 3, holds"):
        convert_regions([RegionTsv(file)], tmp_path / "store")
    write(file, *whole, line("a"))
    found = convert_regions([RegionTsv(file)], tmp_path / "store", resume=True)
    assert found == ConversionReport(images=1, regions=2, existing=2, repeated=1)
    assert NativeStore.open(tmp_path / "store").ids == ["a", "b", "c"]
    with pytest.raises(StoreError, match="fingerprint is 'lxmert-obj36', this run's is 'other'"):
        convert_regions([RegionTsv(file)], tmp_path / "store", resume=True, fingerprint="other")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("b\t20\t40", r"line 2, has 3 columns; expected 10 \(id, height, width"),
        (line("b", number="two"), "'two' in the column number; expected a whole number"),
        (line("b", width="-40"), "'-40' in the column width"),
        (line("", 2), "empty column id"),
        (line("b", features="A" * 31), "has features that are not base64"),
        (
            line("b", features=encode(np.zeros((2, F - 1)), "<f4")),
            "holds 16 bytes of features; expected 24 .2 x 3 of float32.",
        ),
        (line("b", boxes=encode(np.zeros((3, 4)), "<f4")), "holds 48 bytes of boxes; expected 32"),
        (line("b", boxes=encode(np.zeros((2, 4)), "<f8")), "holds 64 bytes of boxes; expected 32"),
        (line("b", classes=encode([1, 2], "<i4")), "holds 8 bytes of classes; expected 16"),
        (line("b", classes=encode([1, -1], "<i8")), "classes from -1 to 1"),
        (line("b", attributes=encode([1, 70000], "<i8")), "attributes from 1 to 70000"),
        (line("b", number="3"), "holds 32 bytes of boxes; expected 48"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, broken: str, message: str) -> None:
    file = write(tmp_path / "x.tsv", line("a"), broken)
    with pytest.raises(DataError, match=rf"x\.tsv, line 2, .*{message.removeprefix('line 2, ')}.*download it again"):
        convert_regions([RegionTsv(file)], tmp_path / "store")


def text_file(content: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_text(content)
        return path

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "no file .* of region features"),
        (text_file("\n\n"), "is empty; expected one image per line"),
        (
            text_file("a,b,c\n"),
            r"has 1 tab-separated columns; expected 6 .bottom-up-attention., 7 ",
        ),
        (text_file(line("a", 0)), "holds no region"),
        (text_file(line("a", features="AAAA")), "holds 3 bytes of features for 2 boxes, which is not a whole width"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError, match=message):
        RegionTsv(make(tmp_path / "x.tsv"))


def test_a_column_that_is_not_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.tsv"
    file.write_bytes(line("a").encode() + b"\n" + line("b").encode().replace(b"b", b"\xff", 1))
    with pytest.raises(DataError, match="line 2, has a column id that is not text"):
        list(RegionTsv(file).images())


def test_width_and_height_the_other_way_round_are_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", line("a", height="40", width="20"))
    with pytest.raises(
        BoxError,
        match=r"line 1: a box of image 'a' leaves the image of 20 x 40 by 2\.0 pixels.* has height before width",
    ):
        convert_regions([RegionTsv(write(file, line("a", 3, height="40", width="20")))], tmp_path / "store")


def test_files_of_two_kinds_do_not_mix(tmp_path: Path) -> None:
    first, second = write(tmp_path / "x.tsv", line("a")), write(tmp_path / "y.tsv", line("b", lxmert=False))
    with pytest.raises(DataError, match=r"x\.tsv has the layout lxmert-obj36, .*y\.tsv bottom-up-attention"):
        convert_regions([RegionTsv(first), RegionTsv(second)], tmp_path / "store")
    write(second, line("b", features=encode(np.zeros((2, 5)), "<f4")))
    with pytest.raises(DataError, match=r"features of width 3, .*y\.tsv 5"):
        convert_regions([RegionTsv(first), RegionTsv(second)], tmp_path / "store")
    with pytest.raises(DataError, match="no file of region features was given"):
        convert_regions([], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_labels_without_a_name_are_refused(tmp_path: Path) -> None:
    file, names = write(tmp_path / "x.tsv", line("a")), ["sky", *map(str, range(6))]
    with pytest.raises(DataError, match="'a' has attributes up to 8, but there are only 7 names"):
        convert_regions([RegionTsv(file)], tmp_path / "store", class_names=names, attribute_names=names)
    convert_regions([RegionTsv(file)], tmp_path / "other", class_names=names, fingerprint="mine", dtype="float32")
    store = NativeStore.open(tmp_path / "other")
    assert (store.fingerprint, store.class_names[0], store.fields["features"].dtype) == ("mine", "sky", "float32")


def test_features_of_two_numbers_of_regions_are_told_apart(tmp_path: Path) -> None:
    """36 and 10 to 100 regions are two detectors in one layout; a name that is given decides."""

    def wide(name: str, count: int) -> str:
        features = encode(np.zeros((count, 2048)), "<f4")
        return line(name, count, lxmert=False, height="90", width="90", features=features)

    fixed = write(tmp_path / "fixed.tsv", wide("a", 36), wide("b", 36))
    adaptive = write(tmp_path / "adaptive.tsv", wide("c", 12))
    convert_regions([RegionTsv(fixed)], tmp_path / "store")
    store = NativeStore.open(tmp_path / "store")
    assert store.fingerprint == store.settings["features"] == "bottom-up-36"
    with pytest.raises(DataError, match=r"has the fingerprint bottom-up-36, .*adaptive\.tsv bottom-up-10-100"):
        convert_regions([RegionTsv(fixed), RegionTsv(adaptive)], tmp_path / "both")
    convert_regions([RegionTsv(fixed), RegionTsv(adaptive)], tmp_path / "both", fingerprint="mine")
    assert NativeStore.open(tmp_path / "both").settings == {"layout": "bottom-up-attention"}


def with_probs(text: str, probs: Any, *more: str) -> str:
    return "\t".join([text, encode(probs, "<f4"), *more])


@pytest.mark.parametrize("lxmert", [True, False])
def test_class_probabilities_have_the_background_last(tmp_path: Path, lxmert: bool) -> None:
    """ViLBERT's 7 columns and VOLTA's 13, the last two of which are scores or ids and not read."""
    probs, more = np.array([[0.7, 0.1, 0.2], [0.0, 0.25, 0.75]]), ("!", "!") if lxmert else ()
    empty = with_probs(line("empty", 0, lxmert=lxmert), [], *more)
    file = write(tmp_path / "x.tsv", empty, with_probs(line("a", lxmert=lxmert), probs, *more), end="\r\n")
    reader = RegionTsv(file)
    assert reader.layout == ("volta-tsv" if lxmert else "vilbert-tsv")
    convert_regions([reader], tmp_path / "store")
    stored = NativeStore.open(tmp_path / "store")["a"].probs
    np.testing.assert_array_equal(stored, probs[:, [1, 2, 0]].astype(np.float16))


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (np.ones((2, 2)), "line 2, holds 16 bytes of probs; expected 24 .2 x 3 of float32"),
        (np.ones((3, 3)), "line 2, holds 36 bytes of probs; expected 24"),
    ],
)
def test_class_probabilities_of_another_length_are_named(tmp_path: Path, probs: Any, message: str) -> None:
    first = with_probs(line("a", lxmert=False), np.ones((2, 3)))
    file = write(tmp_path / "x.tsv", first, with_probs(line("b", lxmert=False), probs))
    with pytest.raises(DataError, match=message):
        list(RegionTsv(file).images())
    with pytest.raises(DataError, match="line 1, holds 20 bytes of probs for 2 boxes, which is not a whole width"):
        RegionTsv(write(file, with_probs(line("a", lxmert=False), np.ones(5))))
