"""Pieces of a whole corpus: the same as text by text, kept for the next run, made again where the file is damaged."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from visling.data import texts as module
from visling.data.text import Tokenizer
from visling.data.text_arrays import Texts
from visling.data.texts import split_texts

TOKENIZER = Tokenizer()
TEXTS = ["a cat", "", "unaffable cats!", "日本語", "a cat", " ".join(["dog"] * 300)]


@pytest.fixture(autouse=True)
def _small_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder of the test's own, in which few texts are enough for a file."""
    monkeypatch.setenv("VISLING_HOME", str(tmp_path))
    monkeypatch.setattr(module, "KEPT_FROM", 3)


def files(home: Path) -> list[Path]:
    return sorted((home / "texts").iterdir())


def check(texts: Texts, expected: list[str] = TEXTS, tokenizer: Tokenizer = TOKENIZER) -> None:
    for number, text in enumerate(expected):
        part = slice(texts.offsets[number], texts.offsets[number + 1])
        ids, words = tokenizer.pieces(text)
        assert texts.ids[part].tolist() == ids.tolist(), text
        assert texts.words[part].tolist() == words.tolist(), text
    assert len(texts.offsets) == len(expected) + 1
    assert len(texts.ids) == len(texts.words) == texts.offsets[-1]


def test_pieces_are_those_of_each_text_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(split_texts(TEXTS, TOKENIZER))
    (file,) = files(tmp_path)
    written = file.stat().st_mtime_ns
    monkeypatch.setattr(Tokenizer, "split", lambda *_: pytest.fail("split again"))
    again = split_texts(TEXTS, TOKENIZER)
    check(again)
    assert file.stat().st_mtime_ns == written
    assert not again.ids.flags.writeable, "the mapped file cannot be changed"


def test_few_texts_leave_no_file(tmp_path: Path) -> None:
    check(split_texts(TEXTS[:2], TOKENIZER), TEXTS[:2])
    assert not (tmp_path / "texts").exists()


def test_other_texts_and_vocabularies_have_files_of_their_own(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]), encoding="utf-8")
    other = Tokenizer(str(vocabulary))
    assert other.encode("a cat") == [5, 6]
    moved = ["a ca", "t", *TEXTS[2:]]
    for number, (texts, tokenizer) in enumerate([(TEXTS, TOKENIZER), (moved, TOKENIZER), (TEXTS, other)], start=1):
        check(split_texts(texts, tokenizer), texts, tokenizer)
        assert len(files(tmp_path)) == number


def test_large_vocabularies_and_long_texts_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "size", 40_000)
    for _ in range(2):
        texts = split_texts(TEXTS, TOKENIZER)
        assert texts.ids.dtype == texts.words.dtype == np.int32
        check(texts)


@pytest.mark.parametrize("damage", ["empty", "short", "cut", "flipped", "other", "header", "longer"])
def test_a_damaged_file_is_made_again(damage: str, tmp_path: Path) -> None:
    split_texts(TEXTS, TOKENIZER)
    (file,) = files(tmp_path)
    good = file.read_bytes()
    middle = len(good) // 2
    file.write_bytes(
        {
            "empty": b"",
            "short": good[:20],
            "cut": good[:-3],
            "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "other": b"PK\3\4" * (len(good) // 4),
            "header": good[:56] + b"\xff" * 16 + good[72:],
            "longer": good + b"\0",
        }[damage]
    )
    with pytest.warns(UserWarning, match=r"It is made again\."):
        check(split_texts(TEXTS, TOKENIZER))
    assert files(tmp_path) == [file]
    assert file.read_bytes() == good


def test_a_file_of_other_texts_is_made_again(tmp_path: Path) -> None:
    split_texts(TEXTS, TOKENIZER)
    (file,) = files(tmp_path)
    split_texts(TEXTS[1:], TOKENIZER)
    (other,) = set(files(tmp_path)) - {file}
    file.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="holds no word pieces of these texts"):
        check(split_texts(TEXTS, TOKENIZER))


def test_a_folder_that_cannot_be_written_leaves_them_in_memory(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("a file is in the way")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(split_texts(TEXTS, TOKENIZER))


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        split_texts(TEXTS, TOKENIZER)
    assert files(tmp_path) == []


def test_writing_at_the_same_time_disturbs_nobody(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for texts in pool.map(lambda _: split_texts(TEXTS, TOKENIZER), range(40)):
            check(texts)
    assert len(files(tmp_path)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(split_texts(TEXTS, TOKENIZER))
