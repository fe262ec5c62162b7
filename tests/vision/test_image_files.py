"""Images from folders, files, lists, patterns and archives: which ones, in which order, under which ids."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visling.errors import DataError
from visling.image_ids import Aliases, from_file_name
from visling.vision.image_files import (
    ImageFile,
    ImageReader,
    as_images,
    check_ids,
    find_images,
    is_image_name,
    list_images,
)
from visling.vision.images import SUFFIXES


def picture(shade: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, shade, shade)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images in a folder, with what is no image; it lies in the working folder."""
    for name in ("1.jpg", "trip/2.JPG", "trip/day/3.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(picture())
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / ".hidden.jpg").write_bytes(picture())
    monkeypatch.chdir(tmp_path)
    return Path("photos")


def archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as target:
        for shade, name in enumerate(names):
            target.writestr(name, picture(shade))
    return path


def ids(*places: str | Path, **settings: object) -> list[str]:
    return [image.id for image in list_images(places, **settings)]  # type: ignore[arg-type]


def test_folders_and_files(photos: Path) -> None:
    assert ids("photos") == ["1", "2", "3"]
    assert ids("photos", ids="path") == ["1", "trip/2", "trip/day/3"]
    assert ids("photos/trip/2.JPG", photos / "1.jpg") == ["2", "1"]
    assert ids("photos/trip/2.JPG", ids="path") == ["photos/trip/2"]
    assert ids("photos/notes.txt") == ["notes"], "what is named is taken as it is"
    assert ids("photos", "photos/1.jpg") == ["1", "2", "3"], "once"
    assert [str(path) for path in find_images(photos)] == ["photos/1.jpg", "photos/trip/2.JPG", "photos/trip/day/3.png"]


def test_patterns(photos: Path) -> None:
    archive(photos / "more.zip", "4.png")
    assert ids("photos/**/*.[jJ][pP][gG]") == ["1", "2"]
    assert ids("photos/**/*", ids="path") == ["1", "4", "trip/2", "trip/day/3"]
    assert ids("photos/t*") == ["2", "3"], "folders are searched"
    assert ids("photos/t*", ids="path") == ["trip/2", "trip/day/3"]
    (photos / "[a].png").write_bytes(picture())
    assert ids("photos/[a].png") == ["[a]"], "a file of this very name"
    with pytest.raises(DataError, match="no image fits the pattern 'photos/x\\*'"):
        ids("photos/x*")


def test_lists(photos: Path, tmp_path: Path) -> None:
    archive(Path("more.zip"), "4.png", "5.png")
    Path("list.txt").write_text("\ufeffphotos/trip/day/3.png\r\n\r\nphotos/1.jpg\nphotos/1.jpg\nmore.zip@/5.png\n")
    assert ids("@list.txt") == ids(lists=[Path("list.txt")]) == ["3", "1", "5"]
    assert ids("@list.txt", ids="path") == ["photos/trip/day/3", "photos/1", "5"]
    (tmp_path / "elsewhere").mkdir()
    Path("elsewhere/list.txt").write_text(f"trip/2.JPG\n{tmp_path}/photos/1.jpg\n")
    assert ids("@elsewhere/list.txt", base=photos) == ["2", "1"]
    with pytest.raises(DataError, match=r"1 of 2 lines .*: line 1, 'trip/2.JPG', does not .*elsewhere.*--base"):
        ids("@elsewhere/list.txt")
    Path("list.txt").write_text("photos/trip\n")
    with pytest.raises(DataError, match="'photos/trip', is a folder"):
        ids("@list.txt")
    for content, message in ((b"\n \n", "is empty"), (b"\xff\xfe\x00\x81", "not a list of images: expected UTF-8")):
        Path("list.txt").write_bytes(content)
        with pytest.raises(DataError, match=message):
            ids("@list.txt")
    with pytest.raises(DataError, match="photos is a folder, not a list"):
        ids("@photos")
    with pytest.raises(DataError, match=r"cannot read the list of images gone\.txt"):
        ids("@gone.txt")


def test_archives_are_read_in_place(photos: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    place = archive(Path("a.zip"), "set/1.png", "__MACOSX/set/._1.png", "set/notes.txt", "set/b/2.png", "3.png")
    assert ids(place) == ["3", "1", "2"]
    assert ids(place, ids="path") == ["3", "set/1", "set/b/2"]
    assert ids("a.zip@/set") == ["1", "2"]
    (image,) = list_images(["a.zip@/set/b/2.png"])
    assert (image.id, str(image)) == ("2", "a.zip@/set/b/2.png")
    with ImageReader() as reader:
        assert reader.read(image).pixels.tolist() == np.full((3, 4, 3), 3).tolist()
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "a.zip"])
    with pytest.raises(DataError, match=r"no image in the archive a\.zip@/other"):
        ids("a.zip@/other")


def test_members_outside_an_archive_stay_inside(photos: Path, tmp_path: Path) -> None:
    place = archive(tmp_path / "a.zip", "../../up.png", "/etc/root.png", "C:/x.png")
    found = list_images([place], ids="path")
    assert [image.id for image in found] == ["up", "etc/root", "C:/x"]
    with ImageReader() as reader:
        assert [int(reader.read(image).pixels[0, 0, 0]) for image in found] == [0, 1, 2]
    assert not (tmp_path.parent.parent / "up.png").exists()


def test_damaged_archives_and_members(tmp_path: Path, photos: Path) -> None:
    place = archive(tmp_path / "a.zip", "1.png", "2.png", "3.png")
    content = bytearray(place.read_bytes())
    at = content.index(picture(1)) + 20
    content[at] ^= 0xFF  # the digest of 2.png is wrong now
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 8] |= 1  # 3.png is said to be encrypted
    place.write_bytes(content)
    with ImageReader() as reader:
        first, second, third = list_images([place])
        assert reader.read(first).pixels.shape == (3, 4, 3)
        with pytest.raises(DataError, match=r"cannot read image .*a.zip@/2.png: Bad CRC-32.*Copy the archive again"):
            reader.read(second)
        with pytest.raises(DataError, match=r"a.zip@/3.png: it is encrypted"):
            reader.read(third)
    for damaged in (content[:-30], b"", b"no archive"):
        place.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read the archive .*a.zip: .*Copy or download it again"):
            list_images([place])


def test_members_that_are_no_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("text.png", "no image")
        target.writestr("empty.png", b"")
    with ImageReader() as reader:
        for image, reason in zip(
            list_images([tmp_path / "a.zip"]), ("it is empty", "not an image of a known format"), strict=True
        ):
            with pytest.raises(DataError, match=f"cannot read image .*a.zip@/{image.member} .*{reason}"):
                reader.read(image)


def test_a_member_of_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visling.vision.image_files._MOST_BYTES", 20)
    with ImageReader() as reader, pytest.raises(DataError, match="bytes, more than 20"):
        reader.read(list_images([archive(tmp_path / "a.zip", "1.png")])[0])


def test_images_of_one_name(photos: Path) -> None:
    (photos / "trip" / "1.png").write_bytes(picture())
    with pytest.raises(DataError, match=r"1 image names occur more than once.*'1'.*--ids path"):
        ids("photos")
    assert ids("photos", ids="path") == ["1", "trip/1", "trip/2", "trip/day/3"]
    with pytest.raises(DataError, match="name the folder above both"):
        ids("photos", archive(Path("a.zip"), "trip/2.png"), ids="path")


def test_an_image_stored_under_its_path_is_found_by_its_name() -> None:
    stored = Aliases(["train/dog", "val/cat", "train/same", "val/same", "train2014/COCO_train2014_000000000009"])
    assert stored.find("dog") == "train/dog"
    assert stored.find("train/dog") == "train/dog"
    assert stored.find(9) == "train2014/COCO_train2014_000000000009"
    assert stored.find("same") is None
    assert stored.candidates("same") == ("train/same", "val/same")
    assert stored.find("other/dog") == "train/dog", "the folder of an annotation may be another"


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_annotations_name_images_by_the_id_that_is_stored(suffix: str) -> None:
    assert is_image_name(f"a.b{suffix.upper()}")
    assert from_file_name(f"train/a.b{suffix}") == as_images([Path(f"train/a.b{suffix}")])[0].id == "a.b"


def test_names_that_no_store_can_hold() -> None:
    for name in ("a\nb", "caf\udce9"):
        with pytest.raises(DataError, match="has a line break or is not UTF-8"):
            check_ids([ImageFile(name, Path(f"{name}.png"))])
    check_ids([ImageFile("café \t 画像", Path("a.png"))])


def test_nothing_to_take(photos: Path) -> None:
    (photos / "none").mkdir()
    for place, message in (
        ("gone", "no image folder gone, nor a file of that name"),
        ("photos/none", "no image in photos/none or below it; image names end in"),
        ("gone.zip", "no image folder gone.zip"),
    ):
        with pytest.raises(DataError, match=message):
            ids(place)
    with pytest.raises(DataError, match="no image was given"):
        ids()
