"""Plain text, one passage a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from visling.data.annotations.passages import Passages, find_passages, has_passages
from visling.errors import DataError


def save(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_lines_of_several_files(tmp_path: Path) -> None:
    first = save(
        tmp_path / "wiki.doc", "\ufeffAnarchism draws on many currents .\r\n\n   \nna\u00efve\u2028text\n".encode()
    )
    empty = save(tmp_path / "empty.doc", b"")
    second = save(tmp_path / "bc1g.doc", b"usually , he would be tearing around\n\x00\nno line feed at the end")
    passages = Passages([first, empty, second])
    assert list(passages) == [
        "Anarchism draws on many currents .",
        "na\u00efve\u2028text",
        "usually , he would be tearing around",
        "no line feed at the end",
    ]
    assert passages.empty == 3
    assert passages[-1] == passages[3]
    assert passages[1:3] == [passages[1], passages[2]]
    with pytest.raises(IndexError):
        passages[4]


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no passage in"):
        Passages([save(tmp_path / "a.doc", b"\n \n")])
    with pytest.raises(DataError, match="cannot read the text"):
        Passages([tmp_path / "absent.doc"])
    with pytest.raises(DataError, match=r"a\.doc is not UTF-8 text: line 2, byte 1"):
        Passages([save(tmp_path / "a.doc", b"ok\nx\xff\n")])


def test_find(tmp_path: Path) -> None:
    wiki, books = save(tmp_path / "en_corpus" / "wiki.doc", b"a"), save(tmp_path / "en_corpus" / "bc1g.doc", b"a")
    assert find_passages(tmp_path, "train") == [books, wiki]
    assert not has_passages(tmp_path, "val")
    held = save(tmp_path / "en_corpus" / "wiki_val.doc", b"a")
    assert find_passages(tmp_path, "val") == [held]
    assert find_passages(tmp_path, "train") == [books, wiki]
    assert find_passages(held, "train") == [held], "a file is itself"
    assert has_passages(held, "val")
    assert not has_passages(wiki, "val"), "training text is not validated on"
    save(tmp_path / "ids" / "train.txt", b"1000092795\n")
    with pytest.raises(DataError, match=r"no text of split 'train' in .*ids"):
        find_passages(tmp_path / "ids", "train")
