"""Millions of GQA's questions in memory, as columns: a record is built when it is asked for.

Letters  N questions.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar, overload

import numpy as np

from visling.data.annotations.files import Layout
from visling.data.annotations.streamed import list_chunks, stream_object
from visling.errors import DataError
from visling.types import Record

V = TypeVar("V", bound=Hashable)

_LONGEST_NUMBER = 18
"""Digits of the longest id that is kept as a number of 64 bits."""
_IS_TEXT = 1 << 63
"""Marks ids that are not: the rest of the number is their place in a list."""


@dataclass(frozen=True, kw_only=True)
class GqaRecord(Record):
    """One question about one image."""

    question: str
    answer: str | None
    """None in splits without answers."""
    balanced: bool = True
    """Whether it is of the balanced set, which alone is scored."""
    structural: str = ""
    """query, verify, choose, logical or compare; empty where the file tells no types."""
    semantic: str = ""
    """obj, attr, cat, rel or global."""
    detailed: str = ""
    """Name of the pattern that it was made of."""
    global_group: str | None = None
    local_group: str | None = None
    num_steps: int = 0
    """Steps of reasoning, as the official script counts them."""
    entailed: tuple[str, ...] = ()
    """Ids of the questions whose answers follow from its answer; only those of balanced questions are kept."""
    choices: GqaChoices | None = field(default=None, repr=False)
    """Where its valid and plausible answers stand, shared by its split."""


class GqaChoices:
    """Valid and plausible answers of the questions of a split; the file is read when they are first asked for.

    Args:
        path: file or folder of chunks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_id: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] | None = None

    def __getitem__(self, question_id: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Valid and plausible answers of a question.

        Raises:
            DataError: the file is damaged, of another layout, or does not have the question.
        """
        if self._by_id is None:
            self._by_id = self._read()
        if question_id not in self._by_id:
            raise DataError(
                f"{self.path} has no choices for question {question_id}. Use the file of the same split and version."
            )
        return self._by_id[question_id]

    def _read(self) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
        answers: _Codes[str] = _Codes()
        lists: _Codes[tuple[str, ...]] = _Codes()
        found = {}
        for chunk in list_chunks(self.path):
            with Layout(chunk, "question") as at:
                for at.entry, entry in stream_object(chunk):
                    number = at.entry
                    if not isinstance(entry, dict) or not {"valid", "plausible"} <= entry.keys():
                        raise DataError(
                            f"{chunk}: question {number} lacks 'valid' or 'plausible'. Is it a choices file?"
                        )
                    # Many questions have the same list: each is kept once.
                    valid, plausible = (
                        lists.share(tuple(answers.share(str(answer)) for answer in entry[name]))
                        for name in ("valid", "plausible")
                    )
                    found[number] = (valid, plausible)
        return found


class GqaColumns:
    """What is known of N questions, one array per field; values that repeat are kept once and numbered."""

    def __init__(self) -> None:
        self.ids = _Ids()
        self.text, self.text_ends = bytearray(), array("Q")
        self.images: _Column[str] = _Column()
        self.answers: _Column[str | None] = _Column()
        self.types: _Column[tuple[str, ...]] = _Column()
        self.global_groups: _Column[str | None] = _Column()
        self.local_groups: _Column[str | None] = _Column()
        self.balanced, self.num_steps = bytearray(), bytearray()
        self.entailed, self.entailed_ends = _Ids(), array("Q")
        self.entailing = array("I")
        """Rows that entail anything, ascending; `entailed_ends` is of these."""

    def __len__(self) -> int:
        return len(self.text_ends)

    def append(
        self,
        *,
        id: str,
        image: str,
        question: str,
        answer: str | None,
        balanced: bool = True,
        types: tuple[str, ...] = ("", "", ""),
        groups: tuple[str | None, str | None] = (None, None),
        num_steps: int = 0,
        entailed: Sequence[str] = (),
    ) -> None:
        """Add a question."""
        if entailed:
            for other in entailed:
                self.entailed.append(str(other))
            self.entailing.append(len(self))
            self.entailed_ends.append(len(self.entailed))
        self.ids.append(id)
        self.text += question.encode()
        self.text_ends.append(len(self.text))
        self.images.append(image)
        self.answers.append(answer)
        self.types.append(types)
        self.global_groups.append(groups[0])
        self.local_groups.append(groups[1])
        self.balanced.append(balanced)
        self.num_steps.append(min(num_steps, 255))

    def find_repeated(self) -> str | None:
        """An id that comes twice, if there is one."""
        return self.ids.find_repeated()

    def record(self, row: int, choices: GqaChoices | None) -> GqaRecord:
        """Question number `row`."""
        structural, semantic, detailed = self.types[row]
        start = self.text_ends[row - 1] if row else 0
        return GqaRecord(
            id=self.ids[row],
            images=(self.images[row],),
            question=self.text[start : self.text_ends[row]].decode(),
            answer=self.answers[row],
            balanced=bool(self.balanced[row]),
            structural=structural,
            semantic=semantic,
            detailed=detailed,
            global_group=self.global_groups[row],
            local_group=self.local_groups[row],
            num_steps=self.num_steps[row],
            entailed=self._entailed_by(row),
            choices=choices,
        )

    def _entailed_by(self, row: int) -> tuple[str, ...]:
        at = bisect_left(self.entailing, row)
        if at == len(self.entailing) or self.entailing[at] != row:
            return ()
        start = self.entailed_ends[at - 1] if at else 0
        return tuple(self.entailed[number] for number in range(start, self.entailed_ends[at]))


class GqaRecords(Sequence[GqaRecord]):
    """Questions of a split, each built when it is asked for.

    Args:
        rows: of the columns, in the order of the records; None = all.
    """

    def __init__(
        self, columns: GqaColumns, rows: Sequence[int] | None = None, *, choices: GqaChoices | None = None
    ) -> None:
        self._columns, self._choices = columns, choices
        self._rows: Sequence[int] = range(len(columns)) if rows is None else array("I", rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> GqaRecord: ...
    @overload
    def __getitem__(self, index: slice) -> GqaRecords: ...
    def __getitem__(self, index: int | slice) -> GqaRecord | GqaRecords:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return self._columns.record(self._rows[index], self._choices)

    def __iter__(self) -> Iterator[GqaRecord]:
        return (self._columns.record(row, self._choices) for row in self._rows)

    def select(self, places: Sequence[int]) -> GqaRecords:
        """The records at these places; nothing is copied but their numbers."""
        return GqaRecords(self._columns, [self._rows[place] for place in places], choices=self._choices)

    def ids(self) -> list[str]:
        """Of all records."""
        return [self._columns.ids[row] for row in self._rows]

    def image_ids(self) -> Iterator[str]:
        """Of the one image of each record."""
        return (self._columns.images[row] for row in self._rows)


class _Ids:
    """Texts of digits, as numbers of 64 bits: "07" is kept as 107, so that leading zeros come back."""

    def __init__(self) -> None:
        self._keys = array("Q")
        self._texts: _Codes[str] = _Codes()
        """Ids of another form, or longer ones."""

    def __len__(self) -> int:
        return len(self._keys)

    def append(self, text: str) -> None:
        if len(text) <= _LONGEST_NUMBER and text.isascii() and text.isdigit():
            self._keys.append(int("1" + text))
        else:
            self._keys.append(_IS_TEXT | self._texts.code(text))

    def __getitem__(self, row: int) -> str:
        key = self._keys[row]
        return self._texts.values[key ^ _IS_TEXT] if key & _IS_TEXT else str(key)[1:]

    def find_repeated(self) -> str | None:
        if not self._keys:
            return None
        keys = np.frombuffer(self._keys, np.uint64)
        ordered = np.sort(keys)
        twice = np.flatnonzero(ordered[1:] == ordered[:-1])
        return self[int(np.argmax(keys == ordered[twice[0]]))] if len(twice) else None


class _Codes(Generic[V]):
    """Values by number, each once."""

    def __init__(self) -> None:
        self.values: list[V] = []
        self._codes: dict[V, int] = {}

    def code(self, value: V) -> int:
        """The value's number."""
        found = self._codes.get(value)
        if found is None:
            found = self._codes[value] = len(self.values)
            self.values.append(value)
        return found

    def share(self, value: V) -> V:
        """The one object that stands for equal values."""
        return self.values[self.code(value)]


class _Column(Generic[V]):
    """A field whose values repeat: 4 bytes a row."""

    def __init__(self) -> None:
        self._codes: _Codes[V] = _Codes()
        self._numbers = array("I")

    def append(self, value: V) -> None:
        self._numbers.append(self._codes.code(value))

    def __getitem__(self, row: int) -> V:
        return self._codes.values[self._numbers[row]]
