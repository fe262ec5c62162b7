"""Files that are made to do harm: to fill the memory, to run code, to write or read elsewhere, to kill the process."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import lmdb
import numpy as np
import pytest
import torch
from fuzz.readers import READERS
from fuzz.sample import Sample
from fuzz.sandbox import Outcome, Sandbox
from PIL import Image

from visling.errors import DataError
from visling.pickle_length import find_end
from visling.pickles import load_pickle
from visling.regions.formats import open_reader

TERABYTE = 1 << 40


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


Read = Callable[..., Outcome]


@pytest.fixture
def read(sandbox: Sandbox, tmp_path: Path) -> Read:
    """Reads the sample of a reader with one file replaced."""

    def read(name: str, file: str, content: bytes) -> Outcome:
        folder = tmp_path / f"sample-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        sample = Sample(READERS[name], folder)
        assert Path(file) in sample.files
        return sandbox.read_changed(sample, Path(file), content)

    return read


def refuse(outcome: Outcome, what: str) -> None:
    assert outcome.kind == "refused", outcome
    assert what in outcome.what


# Pickles


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x80\x04\x8e" + TERABYTE.to_bytes(8, "little") + b".", "asks for"),
        (b"\x80\x02X\xff\xff\xff\x7fx.", "asks for"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "damaged"),
        (b"Np4294967295\n.", "damaged"),
        (b"c__builtin__\nbytearray\n(I1000000000000\ntR.", "makes a bytearray of a int"),
        (b"c__builtin__\nlist\n(c__builtin__\nxrange\n(I1000000000000\ntRtR.", "makes a list of a range"),
        (b"cnumpy\nndarray\n((I1000000000000\nttR.", "array without numbers"),
        (b"\x80\x02]\x85" * 100_000, ""),
    ],
)
def test_pickles_that_ask_for_more_than_they_have(read: Read, content: bytes, what: str) -> None:
    refuse(read("vocabularies, pickled answers", "a.pkl", content), what)


def test_an_array_of_objects_that_claims_more_than_it_holds(read: Read) -> None:
    honest = pickle.dumps([np.array([None, 1], object)], 2)
    claims = honest.replace(b"K\x02\x85", b"J\xff\xff\xff\x7f\x85")
    assert claims != honest
    refuse(read("vocabularies, pickled answers", "a.pkl", claims), "an array of shape")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_end_of_a_pickle_is_found(protocol: int) -> None:
    values = [
        "x" * 300, "ü" * 70_000, b"y" * 300, bytearray(b"z" * 70_000), 1, -(2**40), 10**1000, 1.5, None, True, (), (1,),
        (1, 2, 3, 4), {1: [2]}, {3}, frozenset([4]), np.arange(3), np.float32(1),
        [str(number) for number in range(70_000)],
    ]  # fmt: skip
    content = pickle.dumps(values, protocol)
    assert find_end(b"??" + content + b"more.", 2) == 2 + len(content)
    for length in (0, 1, 5, len(content) // 2, len(content) - 1):
        with pytest.raises(pickle.UnpicklingError):
            find_end(content[:length])


def test_arrays_within_pickles_are_arrays() -> None:
    found = load_pickle(pickle.dumps({"a": np.arange(3), "b": np.array([None, {}], object)}), "here")
    assert found["a"].tolist() == [0, 1, 2]
    assert found["b"].tolist() == [None, {}]
    assert type(load_pickle(pickle.dumps(np.arange(3)), "here")) is np.ndarray


# Arrays and archives


def write_array(shape: str, kind: str = "<f4") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(65536, 65536, 65536)", "(4000000000,)"])
def test_arrays_that_claim_terabytes(read: Read, shape: str) -> None:
    refuse(read("image lists, numpy", "x.npy", write_array(shape, "<i8")), "its header says shape")
    refuse(read("npy, MMF", "a.npy", write_array(shape)), "its header says shape")


def pack(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return target.getvalue()


def test_a_bomb_of_arrays(read: Read) -> None:
    large = bytes(150 << 20)
    refuse(read("npz, MILVLG", "a.npz", pack(("x.npy", large), ("bbox.npy", large))), "its arrays unpack to")
    refuse(read("runs, scores of pairs", "scores.npz", pack(("scores.npy", large), ("b.npy", large))), "unpack to")


def test_a_bomb_of_json(read: Read) -> None:
    bomb = pack(("train/7.json", bytes(300 << 20)))
    refuse(read("zip, VL-BERT", "x.zip", bomb), "an image has at most")


@pytest.mark.parametrize("name", ["../../outside.json", "/tmp/outside.json", "train/../../x.json"])
def test_archives_whose_members_lie_elsewhere(read: Read, tmp_path: Path, name: str) -> None:
    refuse(read("zip, VL-BERT", "x.zip", pack((name, b"{}"))), "expected one JSON file per image")
    assert not list(tmp_path.glob("outside*"))


def write_tar(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:  # type: ignore[call-overload]
        for member, content in members:
            archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


def make_member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    return member


def test_tar_archives_that_unpack_without_end(read: Read) -> None:
    bomb = write_tar((make_member("w.bin", 200 << 20), bytes(200 << 20)))
    refuse(read("checkpoints, tar.gz", "w.tar.gz", bomb), "unpacks to 209715200 bytes")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_tar_archives_of_links_and_devices(read: Read, kind: bytes) -> None:
    linked = write_tar((make_member("w.bin", kind=kind, link="/etc/passwd"), b""), mode="w")
    refuse(read("checkpoints, tar", "w.tar", linked), "w.tar")


def test_a_tar_header_that_claims_gigabytes(read: Read) -> None:
    """tarfile reads the whole extended header, of the size that it claims, at once."""
    member = make_member("x", 6 << 30, tarfile.XHDTYPE)
    refuse(read("checkpoints, tar", "w.tar", member.tobuf(tarfile.GNU_FORMAT) + bytes(2048)), "w.tar")


def test_archives_within_archives_are_not_opened(read: Read) -> None:
    inner = write_tar((make_member("w.bin", 3), b"abc"))
    refuse(
        read("checkpoints, tar.gz", "w.tar.gz", write_tar((make_member("w.tar.gz", len(inner)), inner))), "found none"
    )


# Weights


@pytest.mark.parametrize("new", [True, False])
def test_tensors_that_claim_more_than_the_file_has(read: Read, new: bool) -> None:
    target = io.BytesIO()
    torch.save({"a": torch.zeros(300)}, target, _use_new_zipfile_serialization=new)
    content = target.getvalue()
    claims = content.replace(b"M,\x01", b"J\xff\xff\xff\x7f"[:5]) if not new else content
    if new:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
        members = [(name, inner.replace(b"M,\x01", b"J\xff\xff\xff\x7f")) for name, inner in members]
        claims = pack(*members, method=zipfile.ZIP_STORED)
    assert claims != content
    name, file = ("checkpoints, torch zip", "w.bin") if new else ("checkpoints, torch before 1.6", "w.pth")
    refuse(read(name, file, claims), "its tensors claim 2147483647 numbers")


def test_a_header_of_terabytes(read: Read) -> None:
    forged = TERABYTE.to_bytes(8, "little") + b"{}"
    refuse(read("checkpoints, safetensors", "w.safetensors", forged), "not a whole safetensors file")
    refuse(read("stores, ids alone", "store/index.safetensors", forged), "claims a header")


# Stores


def change_manifest(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    manifest = json.loads(content)
    change(manifest)
    return json.dumps(manifest).encode()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m["shards"][0].update(file="../../secret"), "no file of the folder"),
        (lambda m: m["index"].update(file="/etc/passwd"), "no file of the folder"),
        (lambda m: m["shards"][0].update(rows=10**12), "a shard begins at row"),
        (lambda m: m.update(regions=10**12), "its shards have"),
        (lambda m: m["fields"]["features"].update(width=10**12), "features of width"),
        (lambda m: m["fields"].update({"../../x": {"dtype": "float16", "width": 1}}), "is none of a store"),
        (lambda m: m.update(settings=[]), "settings must be an object"),
    ],
)
def test_manifests_that_were_forged(
    read: Read, sandbox: Sandbox, tmp_path: Path, change: Callable[[Any], None], what: str
) -> None:
    (tmp_path / "whole").mkdir()
    sample = Sample(READERS["stores, whole"], tmp_path / "whole")
    file = Path("store/manifest.json")
    refuse(sandbox.read_changed(sample, file, change_manifest(sample.files[file], change)), what)


# LMDB and HDF5


def write_lmdb(path: Path) -> bytes:
    with (
        lmdb.open(str(path), map_size=1 << 22, subdir=False, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        for number in range(300):
            transaction.put(b"%04d" % number, bytes([number % 256]) * (10 + 100 * (number % 60)))
    return path.read_bytes()


def test_lmdb_is_read_as_its_own_library_reads_it(tmp_path: Path) -> None:
    from visling.regions.formats.lmdb_pages import LmdbPages

    content = write_lmdb(tmp_path / "x.mdb")
    with (
        lmdb.open(str(tmp_path / "x.mdb"), subdir=False, lock=False, readonly=True) as environment,
        environment.begin() as transaction,
    ):
        expected = list(transaction.cursor())
    pages = LmdbPages(io.BytesIO(content))
    assert list(pages) == expected
    assert (pages.entries, len(expected)) == (300, 300)
    assert b"0123" in pages
    assert b"absent" not in pages


def test_an_lmdb_whose_pages_lead_in_a_circle_or_away(tmp_path: Path) -> None:
    """LMDB's own library follows such numbers: the process is killed (SIGBUS), or reads for ever."""
    from visling.regions.formats.lmdb_pages import LmdbPages

    content = write_lmdb(tmp_path / "x.mdb")
    size = 4096
    root = min(struct.unpack_from("<Q", content, at + 16 + 24 + 48 + 40)[0] for at in (0, size))  # of an empty tree: -1
    assert content[root * size + 10] & 1, "the root is a branch"
    node = root * size + struct.unpack_from("<H", content, root * size + 16)[0]
    for page, what in ((root, "circle"), (1 << 30, "it names page"), (0, "it names page")):
        forged = bytearray(content)
        forged[node : node + 6] = page.to_bytes(6, "little")
        with pytest.raises(ValueError, match=what):
            list(LmdbPages(io.BytesIO(bytes(forged))))


def test_hdf5_files_that_point_elsewhere(tmp_path: Path) -> None:
    """Numbers of a dataset may lie in any file, which would then be read as features."""
    (tmp_path / "secret").write_bytes(bytes(range(48)))
    (tmp_path / "x_imgid2idx.pkl").write_bytes(pickle.dumps({9: 0}))
    boxes = np.array([[[0, 0, 2, 2]]], np.float32)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file.create_dataset("image_features", (1, 1, 12), np.float32, external=[(str(tmp_path / "secret"), 0, 48)])
        file["image_bb"], file["spatial_features"] = boxes, np.ones((1, 1, 6), np.float32)
    with pytest.raises(DataError, match="takes /image_features from other files"):
        open_reader(tmp_path / "x.hdf5")
    with h5py.File(tmp_path / "y.hdf5", "w") as file:
        file["image_features"] = h5py.ExternalLink("x.hdf5", "image_bb")
        file["image_bb"], file["spatial_features"] = boxes, np.ones((1, 1, 6), np.float32)
    with pytest.raises(DataError, match="from other files"):
        open_reader(tmp_path / "y.hdf5")


def test_an_hdf5_file_that_claims_terabytes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file.create_dataset("image_features", (10**6, 36, 2048), np.float32, chunks=(1, 36, 2048))
        file["image_bb"], file["spatial_features"] = np.zeros(1), np.zeros(1)
    with pytest.raises(DataError, match="claims 294912000000 bytes of /image_features"):
        open_reader(tmp_path / "x.hdf5")


# Images, text


def test_a_picture_of_billions_of_pixels(read: Read) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )
    refuse(read("images, PNG", "x.png", bomb), "exceeds limit")
    assert Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b"9" * 200_000, b"[1e999999999, NaN]", b""])
def test_json_without_end(read: Read, content: bytes) -> None:
    refuse(read("questions, GQA", "x.json", content), "x.json")
    refuse(read("vocabularies, answers as JSON", "a.json", content), "a.json")


def test_xml_that_expands_without_end(read: Read) -> None:
    laughs = '<!DOCTYPE x [<!ENTITY a "haha">' + "".join(
        f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9)
    )
    refuse(read("XML, Flickr30K Entities", "Annotations/a.xml", f"{laughs}]><x>&j;</x>".encode()), "document type")
