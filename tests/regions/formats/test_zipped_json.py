"""VL-BERT's JSON files in an archive and in a folder: what is read, what is refused. The released samples are in
`tests/formats`."""

from __future__ import annotations

import base64
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.errors import DataError
from visling.regions.formats import open_reader
from visling.regions.formats.base import ConversionReport, convert_regions
from visling.regions.formats.zip_members import list_members, read_member
from visling.regions.formats.zipped_json import ZippedJson
from visling.regions.store import NativeStore

F, CLASSES = 3, 4


def encode(values: Any) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def describe(count: int = 2, **changes: Any) -> dict[str, Any]:
    """Fields of an image of 40 x 20 pixels; one of None is left out."""
    numbers = np.arange(count)
    fields = {
        "num_boxes": count,
        "image_w": 40,
        "image_h": 20,
        "boxes": encode(np.stack([numbers, numbers, numbers + 20, numbers + 10], axis=1)),
        "features": encode(numbers[:, None] + np.arange(F) / 10),
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def write_archive(path: Path, *files: tuple[str, Any], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, json.dumps(content) if isinstance(content, dict) else content)
    return path


def read(path: Path) -> list[Any]:
    return list(ZippedJson(path).images())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_reaches_the_store(tmp_path: Path, method: int) -> None:
    """Folders, the files of a Mac, an image without regions in front, base64 with line breaks, the whole image."""
    broken = base64.encodebytes(np.ones((2, F), "<f4").tobytes()).decode()
    file = write_archive(
        tmp_path / "train.zip",
        ("train/", ""),
        ("train/9.json", describe(0)),
        ("__MACOSX/train/._9.json", "mac"),
        ("train/.DS_Store", "mac"),
        ("train/7.json", describe(image_id=7)),
        ("train/8.json", describe(features=broken, image_box_feature=encode(np.ones(F)))),
        method=method,
    )
    reader = open_reader(file)
    assert (reader.layout, reader.feature_size, reader.total, reader.unit) == ("vlbert-json", F, 3, "images")
    assert convert_regions([reader], tmp_path / "store") == ConversionReport(
        images=3, regions=4, existing=0, repeated=0
    )
    store = NativeStore.open(tmp_path / "store")
    assert [(name, store.count(name)) for name in store.ids] == [("7", 2), ("8", 2), ("9", 0)]
    assert store["8"].features.tolist() == [[1.0] * F] * 2
    assert store["9"].size == (40, 20)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("8", "7", "9"):
        (tmp_path / f"{name}.json").write_text(json.dumps(describe()))
    reader = open_reader(tmp_path)
    assert [image.image_id for image in reader.images()] == ["7", "8", "9"]
    (tmp_path / "8.json").write_text("{")
    assert [image.image_id for image in reader.images(skip={"8"}) if image.regions is None] == ["8"]
    with pytest.raises(DataError, match=r"8\.json, cannot be read"):
        list(reader.images())


def test_a_left_out_feature_of_the_whole_image_is_said(tmp_path: Path) -> None:
    assert ZippedJson(write_archive(tmp_path / "x.zip", ("1.json", describe()))).notes == ()
    (note,) = ZippedJson(write_archive(tmp_path / "x.zip", ("1.json", describe(image_box_feature="")))).notes
    assert note.startswith("image_box_feature")


def test_regions_with_probabilities_are_sorted_by_the_largest(tmp_path: Path) -> None:
    probs = np.array([[0.4, 0.3, 0.3, 0.0], [0.9, 0.1, 0.0, 0.0], [0.1, 0.2, 0.0, 0.7]], np.float32)
    file = write_archive(tmp_path / "x.zip", ("00000003.json", describe(3, classes=encode(probs))))
    reader = open_reader(file)
    (image,) = reader.images()
    assert (reader.layout, image.image_id) == ("vlbert-cc-json", "00000003")
    assert image.regions is not None
    assert image.regions.probs is not None
    assert image.regions.boxes[:, 0].tolist() == [1, 2, 0], "the background counts, as in the release"
    np.testing.assert_array_equal(image.regions.probs, np.roll(probs[[1, 2, 0]], -1, axis=1))


@pytest.mark.parametrize("name", ["../9.json", "a/../../9.json", "/etc/9.json", "..\\9.json", "9.txt"])
def test_names_that_are_no_file_of_an_image_are_refused(tmp_path: Path, name: str) -> None:
    file = write_archive(tmp_path / "x.zip", ("8.json", describe()), (name, describe()))
    with pytest.raises(DataError, match="expected one JSON file per image, in one folder") as caught:
        open_reader(file)
    assert repr(name) in str(caught.value)


def test_mixed_layouts_are_refused(tmp_path: Path) -> None:
    file = write_archive(tmp_path / "x.zip", ("a/8.json", describe()), ("b/9.json", describe()))
    with pytest.raises(DataError, match=r"files in 'a' and in 'b': two layouts are mixed"):
        open_reader(file)
    probs = encode(np.full((2, CLASSES), 0.25))
    write_archive(file, ("8.json", describe()), ("9.json", describe(classes=probs)))
    with pytest.raises(DataError, match=r"9\.json, has a field classes, others have none: two layouts are mixed"):
        read(file)
    write_archive(file, ("8.json", describe(classes=probs)), ("9.json", describe()))
    with pytest.raises(DataError, match=r"9\.json, has no field classes, others have one: two layouts are mixed"):
        read(file)
    with pytest.raises(DataError, match=r"has the layout vlbert-cc-json, not vlbert-json: 8\.json has a field classes"):
        open_reader(file, "vlbert-json")
    other = write_archive(tmp_path / "y.zip", ("8.json", describe()))
    with pytest.raises(DataError, match=r"the layout vlbert-cc-json, .*y\.zip vlbert-json"):
        convert_regions(
            [open_reader(write_archive(file, ("8.json", describe(classes=probs)))), open_reader(other)], "s"
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read .Expecting"),
        ("[1]", "holds no JSON object"),
        (b"\xff\xfe", "cannot be read"),
        (describe(boxes=None), "has no field boxes; found num_boxes, image_w"),
        (describe(num_boxes=3), "holds 32 bytes of boxes; expected 48"),
        (describe(num_boxes=-1), "has '-1' in the field num_boxes; expected a whole number"),
        (describe(image_w="40"), "has '40' in the field image_w; expected a whole number"),
        (describe(image_w=True), "has 'True' in the field image_w"),
        (describe(features=[1.0]), "has list in the field features; expected base64"),
        (describe(features="A" * 31), "has features that are not base64"),
        (describe(features="é" * 32), "has features that are not base64"),
        (describe(features=encode(np.zeros((2, F - 1)))), "holds 16 bytes of features; expected 24"),
        (describe(image_id=8), "says that it is of the image 8"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    file = write_archive(tmp_path / "x.zip", ("8.json", describe()), ("9.json", content))
    with pytest.raises(DataError, match=rf"x\.zip, 9\.json, {message}.*ownload it again"):
        read(file)


def test_archives_without_a_region_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no region: every file has 0 boxes"):
        ZippedJson(write_archive(tmp_path / "x.zip", ("8.json", describe(0))))
    with pytest.raises(DataError, match="is empty; expected one JSON file per image"):
        ZippedJson(write_archive(tmp_path / "x.zip"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="is empty"):
        ZippedJson(tmp_path / "folder")
    with pytest.raises(DataError, match="holds 3 bytes of features for 1 boxes, which is not a whole width"):
        ZippedJson(write_archive(tmp_path / "x.zip", ("8.json", describe(1, features="AAAA"))))


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    file = write_archive(tmp_path / "x.zip", ("8.json", describe()), ("9.json", describe()))
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read(file)


def test_a_changed_byte_of_a_member_is_noticed(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = write_archive(tmp_path / "x.zip", ("8.json", describe()), ("9.json", describe()), method=method)
        content = bytearray(file.read_bytes())
        at = content.rindex(b"PK\x03\x04") + 30 + len("9.json") + 20
        content[at] ^= 1
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"9\.json, .*(does not match its checksum|cannot be unpacked)"):
            read(file)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (26, 0x7FFF, r"would unpack to \d{10} bytes"),
        (8, 1, "is encrypted; only archives without a password"),
        (10, 12, "is compressed by method 12"),
        (42, 7, "is not where the archive's directory says"),
    ],
)
def test_members_that_cannot_be_read_are_named(tmp_path: Path, at: int, value: int, message: str) -> None:
    file = write_archive(tmp_path / "x.zip", ("8.json", describe()), ("9.json", describe()))
    content = bytearray(file.read_bytes())
    struct.pack_into("<H", content, content.rindex(b"PK\x01\x02") + at, value)
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"9\.json, cannot be read .*{message}"):
        read(file)


def test_a_large_archive_s_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 65,535 members or 4 GB the numbers move into fields of their own; here from the first byte on."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    file = write_archive(tmp_path / "x.zip", ("8.json", describe()), ("9.json", describe()))
    assert b"PK\x06\x06" in file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        expected = [(info.filename, info.file_size, info.header_offset) for info in archive.infolist()]
    assert [(member.name, member.size, member.start) for member in list_members(file)] == expected
    with file.open("rb") as opened:
        assert [json.loads(read_member(opened, member)) for member in list_members(file)] == [describe()] * 2
    content = bytearray(file.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    content[start + 46 + len("9.json")] ^= 0x10  # the kind of its extra field
    file.write_bytes(content)
    with pytest.raises(DataError, match="has a damaged directory: the zip archive is truncated or damaged"):
        list(list_members(file))


def test_an_interrupted_conversion_resumes(tmp_path: Path) -> None:
    file = write_archive(tmp_path / "x.zip", ("6.json", describe()), ("7.json", describe()), ("8.json", "{"))
    with pytest.raises(DataError, match=r"8\.json, cannot be read"):
        convert_regions([ZippedJson(file)], tmp_path / "store")
    write_archive(file, ("6.json", describe()), ("7.json", "{"), ("8.json", describe()))
    assert convert_regions([ZippedJson(file)], tmp_path / "store", resume=True) == ConversionReport(
        images=1, regions=2, existing=2, repeated=0
    ), "7.json is in the store and is not read again"
