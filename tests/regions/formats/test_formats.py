"""Files are recognised by what is in them, or read as the layout that was named."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from fixtures.toy_features import ToyFolder, write_folder

from visling.errors import ConfigError, DataError
from visling.feature_kinds import KINDS
from visling.regions import formats
from visling.regions.formats import open_reader, open_sources
from visling.regions.formats.base import convert_regions
from visling.regions.formats.kinds import _RELEASED, recognise_kind
from visling.regions.formats.tsv import RegionTsv
from visling.regions.store import NativeStore

BUTD = "\t".join(["7", "40", "20", "1", "AAAAAAAAAAAAAIA/AACAPw==", "AACAPwAAgD8="])
"""An image of bottom-up attention with one region and features of width 2."""


@pytest.mark.parametrize("name", ["features.tsv", "features.tsv.0", "features"])
def test_text_is_recognised_by_its_tabs_whatever_its_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text(f"\r\n{BUTD}\r\n")
    reader = open_reader(file)
    assert isinstance(reader, RegionTsv)
    assert (reader.layout, reader.feature_size, reader.unit) == ("bottom-up-attention", 2, "bytes")


def test_every_format_of_the_table_has_a_reader() -> None:
    for known in formats.FORMATS:
        assert issubclass(formats._import_reader(known.module), formats.RegionReader)
    assert len(set(formats.layouts())) == len(formats.layouts()), "two formats have a layout of one name"


def test_a_file_is_read_as_the_layout_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text(BUTD)
    assert open_reader(tmp_path / "x.tsv", "bottom-up-attention").layout == "bottom-up-attention"
    with pytest.raises(DataError, match=r"has 6 tab-separated columns; expected 10 \(lxmert-obj36\)"):
        open_reader(tmp_path / "x.tsv", "lxmert-obj36")
    with pytest.raises(DataError, match="is a folder; expected a text file"):
        open_reader(tmp_path, "lxmert-obj36")
    with pytest.raises(ConfigError, match=r"no layout 'lxmert-36' .* Did you mean 'lxmert-obj36'"):
        open_reader(tmp_path / "x.tsv", "lxmert-36")


def test_a_reader_of_ones_own_is_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "toy", 1)
    assert isinstance(open_reader(folder, "fixtures.toy_features"), ToyFolder)
    with pytest.raises(ConfigError, match=r"no module 'fixtures\.gone'"):
        open_reader(folder, "fixtures.gone")
    with pytest.raises(ConfigError, match=r"fixtures\.corpora offers no reader: expected READER ="):
        open_reader(folder, "fixtures.corpora")
    (tmp_path / "needy").mkdir()
    (tmp_path / "needy" / "reader.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ConfigError, match=r"needy\.reader needs the package a_package_that_is_not_installed"):
        open_reader(folder, "needy.reader")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file"),
        (b"{}\nabc", r"text that begins with '\{\}\\nabc'"),
        ("é".encode() * 3000, "text that begins with 'é"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"\x80\x02}q\xff\x00\x01\x02", "binary data that begins with 80 02 7d 71 ff 00 01 02"),
    ],
)
def test_an_unknown_file_is_described(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=rf"x is not a known file of region features: it is {what}") as caught:
        open_reader(tmp_path / "x")
    assert "lxmert-obj36, volta-tsv (tab-separated text, one image per line)" in str(caught.value)
    assert "--layout" in str(caught.value)


def test_unknown_folders_archives_and_missing_files_are_described(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is an empty folder"):
        open_reader(tmp_path)
    for name in "dcba":
        (tmp_path / f"{name}.dat").touch()
    with pytest.raises(DataError, match=r"it is a folder with a\.dat, b\.dat, c\.dat, \.\.\."):
        open_reader(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.tsv", BUTD)
    with pytest.raises(DataError, match=r"it is a zip archive .*unpack them first"):
        open_reader(tmp_path / "x.zip")
    for layout in (None, "lxmert-obj36", "fixtures.toy_features"):
        with pytest.raises(DataError, match=r"no file .*gone of region features"):
            open_reader(tmp_path / "gone", layout)


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    """Text files in a folder are read one by one, and what else lies there is named; a folder that is a layout is read
    as one."""
    folder = tmp_path / "mscoco_imgfeat"
    folder.mkdir()
    for name, image in (("b.tsv", "8"), ("a.tsv", "7"), (".hidden.tsv", "9")):
        (folder / name).write_text(image + BUTD[1:])
    (folder / "objects_vocab.txt").write_text("cat\ndog\n")
    readers, left_out = open_sources([folder])
    assert [reader.path.name for reader in readers] == ["a.tsv", "b.tsv"]
    assert [path.name for path in left_out] == ["objects_vocab.txt"]
    convert_regions(readers, tmp_path / "store")
    assert NativeStore.open(tmp_path / "store").ids == ["7", "8"]
    ((toy,), others) = open_sources([write_folder(tmp_path / "toy", 1)], "fixtures.toy_features")
    assert (type(toy), others) == (ToyFolder, [])
    for reader in readers:
        reader.path.unlink()
    with pytest.raises(DataError, match="is not a known file of region features: it is a folder with"):
        open_sources([folder])


def test_layouts_name_the_features_that_were_released_in_them() -> None:
    assert set(_RELEASED) == set(formats.layouts())
    assert {known.kind for released in _RELEASED.values() for known in released} <= KINDS.keys()
    assert recognise_kind("bottom-up-attention", 2048, [36, 36]) == "bottom-up-36"
    assert recognise_kind("bottom-up-attention", 2048, [36, 12, 100]) == "bottom-up-10-100"
    assert recognise_kind("bottom-up-attention", 2048, [36, 101]) is None
    assert recognise_kind("bottom-up-attention", 1024, [36]) is None, "another width: another detector"
    assert recognise_kind("lxmert-obj36", 2048, []) is None
    assert recognise_kind("toy", 2048, [36]) is None
