"""Sentences that know their own grammar: words, and the relations of Universal Dependencies between them.

A pattern gives words, each with its relation to the head, which has a star; `{}` stands for the words of another tree,
whose own head then has that relation, or is the head of the whole:

tree("there:expl is/VERB* {}:nsubj", star)   there is a star
tree("above:case {}*", star)                 above a star, whose head is "star"
tree("{}* {}:conj", star, tree("+,:punct {}*", circle))   a star, a circle: "+" stands before a word without a blank

Source   Universal Dependencies 2, universaldependencies.org: relations, tags and the format CoNLL-U.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

_TAGS = {
    "det": "DET",
    "amod": "ADJ",
    "nummod": "NUM",
    "case": "ADP",
    "cop": "AUX",
    "cc": "CCONJ",
    "punct": "PUNCT",
    "expl": "PRON",
    "advmod": "ADV",
}
"""Relation -> universal part of speech of the words that have it in our sentences; all others are nouns, unless the
pattern names a part of speech."""
_WORD = re.compile(r"(?P<glued>\+?)(?P<form>\{\}|.+?)(?:/(?P<tag>[A-Z]+))?(?:(?P<head>\*)|:(?P<relation>[a-z]+))")


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a tree."""

    form: str
    tag: str
    """Universal part of speech."""
    head: int | None = None
    """Number of the word that it depends on, from 0; None = it is the head of the whole."""
    relation: str = "root"
    glued: bool = False
    """Whether no blank stands before it."""
    mark: str = ""
    """Of the marked phrase that it belongs to; empty if it belongs to none."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A sentence or a part of one."""

    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        """The words as they are written."""
        return "".join(f"{'' if word.glued else ' '}{word.form}" for word in self.words).lstrip()

    @property
    def marked_text(self) -> str:
        """The words with a phrase of each mark in brackets: `[MARK the red star]`."""
        written = ""
        for number, word in enumerate(self.words):
            before = self.words[number - 1].mark if number else ""
            after = self.words[number + 1].mark if number + 1 < len(self.words) else ""
            written += "" if word.glued else " "
            written += f"[{word.mark} " if word.mark and word.mark != before else ""
            written += word.form
            written += "]" if word.mark and word.mark != after else ""
        return written.lstrip()

    def marked(self, mark: str) -> Tree:
        """The same tree with all its words marked as one phrase."""
        return Tree(tuple(replace(word, mark=mark) for word in self.words))


class _Part(NamedTuple):
    """A word of a pattern."""

    form: str | None
    """None = the words of another tree."""
    tag: str
    relation: str | None
    """None = it is the head."""
    glued: bool


@lru_cache
def _read_pattern(pattern: str) -> tuple[_Part, ...]:
    parts = []
    for written in pattern.split(" "):
        found = _WORD.fullmatch(written)
        assert found is not None, f"{written!r} of the pattern {pattern!r} is no word with a relation or a star"
        relation = found["relation"]
        tag = found["tag"] or _TAGS.get(relation or "", "NOUN")
        parts.append(_Part(None if found["form"] == "{}" else found["form"], tag, relation, bool(found["glued"])))
    assert sum(part.relation is None for part in parts) == 1, f"the pattern {pattern!r} must have one head"
    return tuple(parts)


def tree(pattern: str, *inner: Tree) -> Tree:
    """The tree of a pattern, described above; `inner` are the trees of its braces, in their order."""
    words: list[Word] = []
    tops: list[tuple[int, str | None]] = []
    rest = iter(inner)
    for part in _read_pattern(pattern):
        start = len(words)
        own = (Word(part.form, part.tag),) if part.form is not None else next(rest).words
        words += [word if word.head is None else replace(word, head=word.head + start) for word in own]
        if part.glued:
            words[start] = replace(words[start], glued=True)
        tops.append((start + next(k for k, word in enumerate(own) if word.head is None), part.relation))
    assert next(rest, None) is None, f"the pattern {pattern!r} has fewer braces than {len(inner)}"
    head = next(top for top, relation in tops if relation is None)
    for top, relation in tops:
        if relation is not None:
            words[top] = replace(words[top], head=head, relation=relation)
    return Tree(tuple(words))


def join_and(trees: Sequence[Tree], *, comma: str = "+,") -> Tree:
    """Parts of an enumeration: "a star, a circle and a ring".

    Args:
        comma: "+," or, with a blank before it, ",".
    """
    first, *others = trees
    if not others:
        return first
    *middle, last = others
    joined = [*(tree(f"{comma}:punct {{}}*", part) for part in middle), tree("and:cc {}*", last)]
    return tree(" ".join(["{}*"] + ["{}:conj"] * len(joined)), first, *joined)


def write_conllu(sentences: Iterable[tuple[str, Tree]]) -> str:
    """Trees with their ids as the text of a CoNLL-U file."""
    return "".join(_write_sentence(number, sentence) for number, sentence in sentences)


def _write_sentence(number: str, sentence: Tree) -> str:
    lines = [f"# sent_id = {number}", f"# text = {sentence.text}"]
    for at, word in enumerate(sentence.words):
        glued = at + 1 < len(sentence.words) and sentence.words[at + 1].glued
        head = 0 if word.head is None else word.head + 1
        fields = (
            at + 1,
            word.form,
            "_",
            word.tag,
            "_",
            "_",
            head,
            word.relation,
            "_",
            "SpaceAfter=No" if glued else "_",
        )
        lines.append("\t".join(map(str, fields)))
    return "\n".join(lines) + "\n\n"
