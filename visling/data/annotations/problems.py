"""What is wrong with the files of a user, collected, so that one attempt shows all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from visling.errors import DataError, VislingError

MOST_KINDS = 10
"""Kinds of problems that are described."""
MOST_PLACES = 8
"""Places that are named of a kind that occurs more than once."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands in a file."""

    path: Path
    unit: str = "file"
    """What `number` counts: lines, or entries of a JSON list; "file": the whole of it."""
    number: int = 0

    def __str__(self) -> str:
        return str(self.path) if self.unit == "file" else f"{self.path}, {self.unit} {self.number}"


@dataclass
class Problems:
    """Problems by kind; those of one kind in one file differ in their place and in what was found."""

    _found: dict[tuple[str, Path], list[tuple[Place, str]]] = field(default_factory=dict)
    """What they have in common, and the file -> where, and what is said of it."""

    def add(self, place: Place, what: str, mend: str, *, kind: str = "") -> None:
        """
        Args:
            what: what is wrong, what was found and what is expected, without a full stop.
            mend: what to do, in sentences.
            kind: what problems that are shown together have in common; `what` up to a semicolon if left out.
        """
        self._found.setdefault((kind or what.partition(";")[0], place.path), []).append(
            (place, f"{place}: {what}. {mend}")
        )

    def add_error(self, path: Path, error: VislingError) -> None:
        """
        Args:
            error: why the file, or what belongs to it, cannot be read; names it.
        """
        self._found.setdefault((str(error), path), []).append((Place(path), str(error)))

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))

    def refuse(self) -> None:
        """Report everything that was collected.

        Raises:
            DataError: something was.
        """
        if not self._found:
            return
        described = list(self._describe())
        if len(self) == 1:
            raise DataError(described[0])
        hidden = len(described) - MOST_KINDS
        rest = [f"and {hidden} more kinds of problems"] if hidden > 0 else []
        listed = "\n".join(f"- {line}" for line in [*described[:MOST_KINDS], *rest])
        raise DataError(f"{len(self)} problems were found:\n{listed}")

    def _describe(self) -> Iterator[str]:
        """The first problem of each kind, and where the others are."""
        for members in self._found.values():
            (place, said), *others = members
            if place.unit == "file":
                yield from dict.fromkeys(text for _, text in members)
                continue
            more = ""
            if others:
                shown = ", ".join(str(other.number) for other, _ in others[:MOST_PLACES])
                rest = f" and {len(others) - MOST_PLACES} more" if len(others) > MOST_PLACES else ""
                plural = {"line": "lines", "entry": "entries"}[place.unit]
                more = f" The same in {len(others)} more: {plural if len(others) > 1 else place.unit} {shown}{rest}."
            yield said + more
