"""Plain text without images: one sentence or document per line, as VL-BERT reads BooksCorpus and Wikipedia (`wiki.doc`,
`bc1g.doc`)."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import overload

from visling.data.annotations.files import has_words
from visling.errors import DataError

_FOLDERS = (("text", (".doc", ".txt")), ("en_corpus", (".doc", ".txt")), (".", (".doc",)))
"""Where texts are looked for, and their suffixes; .txt files next to annotations are lists of ids."""
_SPLITS = ("train", "val", "valid", "dev", "test")


class Passages(Sequence[str]):
    """The lines of one or several files that hold words, read from the files on demand.

    Args:
        paths: UTF-8 files, concatenated.
    Raises:
        DataError: a file is missing or not UTF-8 (names the line), or no line holds a word.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        self.paths = tuple(map(Path, paths))
        self.empty = 0
        """Lines without a word, left out."""
        self._files: list[mmap.mmap] = []
        self._ends = array("q")  # number of the first passage behind each file
        self._starts, self._lengths = array("q"), array("q")
        for path in self.paths:
            self._index_lines(path)
        if not self._starts:
            raise DataError(
                f"no passage in {', '.join(map(str, self.paths)) or 'no file'}: "
                "expected UTF-8 text, one sentence or document per line."
            )

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        index = range(len(self))[index]
        file = self._files[next(number for number, end in enumerate(self._ends) if index < end)]
        start = self._starts[index]
        return file[start : start + self._lengths[index]].decode("utf-8")

    def _index_lines(self, path: Path) -> None:
        at = number = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    begin = at + (3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0)
                    text = line[begin - at :].rstrip(b"\r\n")
                    if has_words(text.decode("utf-8")):
                        self._starts.append(begin)
                        self._lengths.append(len(text))
                    else:
                        self.empty += 1
                    at += len(line)
                if at:  # an empty file cannot be mapped
                    self._files.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                    self._ends.append(len(self._starts))
        except OSError as error:
            raise DataError(f"cannot read the text {path}: {error.strerror}. Check the path.") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text: line {number}, byte {error.start}: {error.reason}. Convert it."
            ) from error


def find_passages(root: str | Path, split: str) -> list[Path]:
    """Text files of a split: the path itself if it is a file; else the `.doc` and `.txt` files in a folder's `text` or
    `en_corpus`, or its own `.doc` files. `wiki_val.doc` and `val.doc` are validation text; a name without a split is
    training text.

    Raises:
        DataError: there are none.
    """
    root = Path(root)
    if root.is_file():
        return [root]
    for folder, suffixes in _FOLDERS:
        files = [
            file
            for file in sorted((root / folder).glob("*"))
            if file.suffix in suffixes and _infer_split(file) == split
        ]
        if files:
            return files
    raise DataError(
        f"no text of split {split!r} in {root}: expected .doc or .txt files in its folder text or en_corpus, "
        "or .doc files, one passage per line. "
        "A file of another name is given by its own path."
    )


def has_passages(root: Path, split: str) -> bool:
    """Whether there is text of a split; a file belongs to the split in its name."""
    if root.is_file():
        return _infer_split(root) == split
    with suppress(DataError):
        return bool(find_passages(root, split))
    return False


def _infer_split(file: Path) -> str:
    last = file.stem.replace(".", "_").rpartition("_")[2]
    return last if last in _SPLITS else "train"
