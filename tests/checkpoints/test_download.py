"""Downloads from a server on this machine: whole, interrupted, wrong, and refused."""

from __future__ import annotations

import errno
import hashlib
import socket
import threading
from pathlib import Path

import pytest
from fixtures.file_server import FileServer

from visling.checkpoints import download as module
from visling.checkpoints.download import download
from visling.errors import CheckpointError

CONTENT = bytes(range(256)) * 40_000  # ten million bytes: several chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def address(file_server: FileServer) -> str:
    file_server.files["/weights.bin"] = CONTENT
    return f"{file_server.address}/weights.bin"


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if not file.name.endswith(".lock")}


def test_a_file_arrives_whole_and_is_not_asked_for_again(file_server: FileServer, address: str, tmp_path: Path) -> None:
    target, seen = tmp_path / "new" / "weights.bin", []
    for _ in range(2):
        found = download(
            address, target, size=len(CONTENT), sha256=SHA256, progress=lambda done, total: seen.append((done, total))
        )
        assert found.read_bytes() == CONTENT
    assert file_server.asked == [("/weights.bin", "")]
    assert names(target.parent) == {"weights.bin"}
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_interrupted_download_is_never_taken_for_finished_and_continues(
    file_server: FileServer, address: str, tmp_path: Path
) -> None:
    target = tmp_path / "weights.bin"
    file_server.cut_at = 3_000_000
    with pytest.raises(CheckpointError, match=r"ended after 3,000,000 of 10,240,000 bytes. Repeat the command"):
        download(address, target)
    assert not target.exists()
    assert (tmp_path / "weights.bin.part").stat().st_size == 3_000_000
    file_server.cut_at = None
    assert download(address, target, sha256=SHA256).read_bytes() == CONTENT
    assert file_server.asked[-1] == ("/weights.bin", "bytes=3000000-")
    assert names(tmp_path) == {"weights.bin"}


def test_a_file_that_changed_meanwhile_is_begun_anew(file_server: FileServer, address: str, tmp_path: Path) -> None:
    file_server.cut_at = 3_000_000
    with pytest.raises(CheckpointError, match="ended after"):
        download(address, tmp_path / "weights.bin")
    file_server.cut_at, file_server.files["/weights.bin"] = None, CONTENT[::-1]
    assert download(address, tmp_path / "weights.bin").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("note", [True, False])
def test_a_server_without_ranges_and_a_part_of_unknown_origin_begin_anew(
    file_server: FileServer, address: str, tmp_path: Path, note: bool
) -> None:
    if note:
        file_server.cut_at, file_server.ranges = 3_000_000, False
        with pytest.raises(CheckpointError, match="ended after"):
            download(address, tmp_path / "weights.bin")
        file_server.cut_at = None
    else:
        (tmp_path / "weights.bin.part").write_bytes(b"something else")
    assert download(address, tmp_path / "weights.bin", sha256=SHA256).read_bytes() == CONTENT


def test_a_part_that_was_whole_already_is_only_checked(file_server: FileServer, address: str, tmp_path: Path) -> None:
    target = tmp_path / "weights.bin"
    with pytest.raises(CheckpointError, match="expected 3"):
        download(address, target, size=3)
    file_server.cut_at = 5_000_000
    with pytest.raises(CheckpointError, match="ended after"):
        download(address, target)
    (tmp_path / "weights.bin.part").write_bytes(CONTENT)  # as if the process was killed just before the renaming
    file_server.cut_at = None
    assert download(address, target, sha256=SHA256).read_bytes() == CONTENT
    assert file_server.asked[-1] == ("/weights.bin", f"bytes={len(CONTENT)}-")
    (tmp_path / "other.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "other.bin.part.json").write_text(f'{{"address": "{address}", "version": ""}}')
    assert download(address, tmp_path / "other.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"sha256": "0" * 64}, r"has the SHA-256 [0-9a-f]{64}; expected 0000"),
        ({"size": 17}, r"has 10,240,000 bytes; expected 17"),
    ],
)
def test_another_file_than_expected_is_kept_apart_and_downloaded_again(
    file_server: FileServer, address: str, tmp_path: Path, known: dict[str, object], message: str
) -> None:
    target = tmp_path / "weights.bin"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=message + ".*kept as .*weights.bin.part"):
            download(address, target, **known)
    assert names(tmp_path) == {"weights.bin.part"}
    assert file_server.asked == [("/weights.bin", "")] * 2
    assert download(address, target, sha256=SHA256) == target


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>", "text/html; charset=utf-8"),
        (b"\n<?xml version='1.0'?><Error><Code>NoSuchBucket</Code></Error>", "application/octet-stream"),
    ],
)
def test_a_page_in_place_of_a_file_is_recognised(
    file_server: FileServer, tmp_path: Path, content: bytes, content_type: str
) -> None:
    file_server.files["/features.zip"], file_server.types["/features.zip"] = content, content_type
    with pytest.raises(CheckpointError, match=r"answered with a web page .*Open the address in a browser.*begins: <"):
        download(f"{file_server.address}/features.zip", tmp_path / "features.zip")
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, r"does not exist \(any more\): the server answered 404"),
        (403, r"is not open to the public.*403 Forbidden"),
        (503, r"cannot be downloaded now: the server answered 503"),
    ],
)
def test_refusals_say_what_they_mean(file_server: FileServer, tmp_path: Path, status: int, message: str) -> None:
    file_server.statuses["/gone.bin"] = status
    with pytest.raises(CheckpointError, match=message):
        download(f"{file_server.address}/gone.bin", tmp_path / "gone.bin")
    assert names(tmp_path) == set()


def test_an_empty_file_is_refused(file_server: FileServer, tmp_path: Path) -> None:
    file_server.files["/empty.bin"] = b""
    with pytest.raises(CheckpointError, match="is empty"):
        download(f"{file_server.address}/empty.bin", tmp_path / "empty.bin")
    assert not (tmp_path / "empty.bin").exists()


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(CheckpointError, match=r"cannot download .*refused.*Check the connection.*put there as"):
        download(f"http://127.0.0.1:{port}/weights.bin", tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match="is not an address"):
        download("file:///etc/passwd", tmp_path / "passwd")


def test_offline_asks_nobody(file_server: FileServer, address: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights.bin is not here, and .* is not asked while offline"):
        download(address, tmp_path / "weights.bin", offline=True)
    assert file_server.asked == []
    (tmp_path / "weights.bin").write_bytes(b"put there by hand")
    assert download(address, tmp_path / "weights.bin", offline=True).read_bytes() == b"put there by hand"


def test_a_folder_that_cannot_be_written(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*Use another folder \(VISLING_HOME, --to\)"):
        download(address, tmp_path / "file" / "weights.bin")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_fill_part", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device. The disk is full: free space"):
        download(address, tmp_path / "weights.bin")


def test_two_downloads_at_once_make_one_file(file_server: FileServer, address: str, tmp_path: Path) -> None:
    target = tmp_path / "weights.bin"
    threads = [threading.Thread(target=download, args=(address, target)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert file_server.asked == [("/weights.bin", "")], "the others waited"
