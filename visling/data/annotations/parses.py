"""Dependency parses of captions, as CoNLL-U: from any parser, or written next to drawn scenes.

File     Sentences end with an empty line. `# sent_id = ...` names the caption; other comments are skipped. A word is a
         line of ten fields between tabs: number, form, lemma, universal tag, tag, features, number of its head (0: the
         root), relation, further relations, notes. `3-4` is a token as it is written, of which the words 3 and 4 are
         parts ("don't"); `5.1` is an empty node, which is skipped.
Source   universaldependencies.org/format.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visling.data.annotations.files import Layout, read_lines
from visling.errors import DataError

Span = tuple[int, int]
"""Where characters begin and end in a text."""

_FIELDS = 10
_WORD, _RANGE, _EMPTY = re.compile(r"[1-9]\d*"), re.compile(r"([1-9]\d*)-([1-9]\d*)"), re.compile(r"\d+\.[1-9]\d*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedWord:
    """A word of a sentence."""

    form: str
    head: int
    """Number of the word that it depends on, from 1; 0 for the root."""
    relation: str
    token: int
    """Number, from 0, of the token of the text that it is, or is a part of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parse:
    """A parsed sentence."""

    id: str
    words: tuple[ParsedWord, ...]
    tokens: tuple[str, ...]
    """As they are written in the text."""
    where: str
    """File and line, for errors."""

    def place(self, caption: str) -> tuple[Span, ...]:
        """Where each word stands in the caption; words of one token share its place, unless their forms make it up.

        Raises:
            DataError: the caption has other words, or more or fewer.
        """
        spans, at = [], 0
        for number, token in enumerate(self.tokens, start=1):
            at += len(caption[at:]) - len(caption[at:].lstrip())
            # Forms may have blanks of their own ("10 000").
            if not caption.startswith(token, at):
                found = caption[at:].split(" ")[0]
                raise self._refuse(caption, f"token {number} is {token!r}, where the caption has {found or 'ended'!r}")
            spans.append((at, at + len(token)))
            at += len(token)
        if rest := caption[at:].strip():
            raise self._refuse(caption, f"the caption goes on with {rest!r}")
        return tuple(self._split_token(spans))

    def _split_token(self, spans: Sequence[Span]) -> Iterator[Span]:
        """The span of each word, of those of the tokens."""
        for token, (start, stop) in enumerate(spans):
            forms = [word.form for word in self.words if word.token == token]
            if "".join(forms) != self.tokens[token]:
                yield from [(start, stop)] * len(forms)
                continue
            for form in forms:
                yield start, start + len(form)
                start += len(form)

    def _refuse(self, caption: str, what: str) -> DataError:
        return DataError(
            f"{self.where}: the parse {self.id!r} does not match its caption {caption!r}: {what}. Parse the captions "
            "as they are read here, without changing their words, and give each parse the id of its caption."
        )


def read_parses(path: str | Path) -> Iterator[Parse]:
    """The sentences of a CoNLL-U file, in their order.

    Raises:
        DataError: the file is missing, or a line is not of the format; names the line.
    """
    path = Path(path)
    lines: list[tuple[int, str]] = []
    for number, line in read_lines(path):
        if line.strip():
            lines.append((number, line))
        elif lines:
            yield _read_sentence(path, lines)
            lines = []
    if lines:
        yield _read_sentence(path, lines)


def _read_sentence(path: Path, lines: Sequence[tuple[int, str]]) -> Parse:
    """A sentence of numbered lines, comments among them."""
    with Layout(path, "the sentence in line") as at:  # a number may have thousands of digits
        at.entry = lines[0][0]
        return _parse_sentence(path, lines)


def _parse_sentence(path: Path, lines: Sequence[tuple[int, str]]) -> Parse:
    """See `_read_sentence`."""
    first = lines[0][0]
    names = [line.partition("=")[2].strip() for _, line in lines if re.match(r"#\s*sent_id\s*=", line)]
    if len(names) != 1 or not names[0]:
        raise DataError(
            f"{path}, line {first}: expected one comment `# sent_id = ...` that names the caption; found "
            f"{', '.join(map(repr, names)) or 'none'}. Write the id of the caption there."
        )
    words: list[ParsedWord] = []
    tokens: list[str] = []
    until = 0
    """Last word of the latest token of several words."""
    for number, line in lines:
        if line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        fields = line.split("\t")
        if len(fields) != _FIELDS or not all(field.strip() for field in fields):
            raise DataError(
                f"{where}: expected {_FIELDS} fields between tabs, none of them empty; found {len(fields)} in {line!r}."
            )
        if _EMPTY.fullmatch(fields[0]):
            continue
        if (joined := _RANGE.fullmatch(fields[0])) is not None:
            start, stop = int(joined[1]), int(joined[2])
            if start != len(words) + 1 or stop < start or start <= until:
                raise DataError(
                    f"{where}: the token {fields[0]} must begin with the word that follows it, {len(words) + 1}, and "
                    "must not overlap with another. Correct its numbers."
                )
            tokens.append(fields[1])
            until = stop
            continue
        words.append(_read_word(fields, len(words) + 1, where, token=len(tokens) - (len(words) < until)))
        if len(words) > until:
            tokens.append(fields[1])
    if until > len(words):
        raise DataError(f"{path}, line {first}: a token ends with word {until}, but there are {len(words)}.")
    _check_tree(words, f"{path}, line {first}")
    return Parse(id=names[0], words=tuple(words), tokens=tuple(tokens), where=f"{path}, line {first}")


def _read_word(fields: Sequence[str], number: int, where: str, *, token: int) -> ParsedWord:
    """A word from its fields; it must have this number."""
    if _WORD.fullmatch(fields[0]) is None or int(fields[0]) != number:
        raise DataError(f"{where}: expected the number {number} of the next word; found {fields[0]!r}. Correct it.")
    if not fields[6].isdecimal() or fields[7] == "_":
        raise DataError(
            f"{where}: the word {fields[1]!r} needs the number of its head and a relation; found {fields[6]!r} and "
            f"{fields[7]!r}. Parse the sentence completely."
        )
    return ParsedWord(form=fields[1], head=int(fields[6]), relation=fields[7], token=token)


def _check_tree(words: Sequence[ParsedWord], where: str) -> None:
    """Refuse words that are no tree."""
    heads = [word.head for word in words]
    beyond = [number for number, head in enumerate(heads, start=1) if head > len(words)]
    if beyond or heads.count(0) != 1:
        what = f"word {beyond[0]} depends on word {heads[beyond[0] - 1]}" if beyond else f"{heads.count(0)} roots"
        raise DataError(f"{where}: {len(words)} words must have one root and heads among them; found {what}.")
    for number in range(1, len(words) + 1):
        at, steps = number, 0
        while at and steps <= len(words):
            at, steps = heads[at - 1], steps + 1
        if at:
            raise DataError(f"{where}: the heads of word {number} lead in a circle and to no root. Correct them.")


def find_parses(path: Path, captions: Mapping[str, str]) -> dict[str, tuple[Parse, tuple[Span, ...]]]:
    """The parse of each caption and where its words stand; parses of other captions are left out.

    Args:
        captions: id -> text.
    Raises:
        DataError: as `read_parses`; or a caption has no parse, or two, or one that does not match it.
    """
    found: dict[str, tuple[Parse, tuple[Span, ...]]] = {}
    for parse in read_parses(path):
        if parse.id in found:
            raise DataError(f"{parse.where}: a second parse of {parse.id!r}. Keep one parse for each caption.")
        if parse.id in captions:
            found[parse.id] = parse, parse.place(captions[parse.id])
    if missing := [name for name in captions if name not in found]:
        raise DataError(
            f"{path} has no parse of the caption {missing[0]!r} ({len(missing)} of {len(captions)} captions have "
            f"none): {captions[missing[0]]!r}. Add a sentence with the comment `# sent_id = {missing[0]}`."
        )
    return found
