"""Words to pieces: BERT's WordPiece and the text layouts of the five systems.

Shapes   T word pieces of one row.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from visling.data.text_arrays import TextRows, Texts, count_up
from visling.errors import ConfigError, DataError, nearest
from visling.types import InputSpec, TextRow

VOCABULARIES = Path(__file__).parent / "vocabularies"

_REMEMBERED = 1_000_000
"""Distinct sentences whose pieces are kept; about 300 bytes each."""

_RULES = "bert-uncased"
"""Name of the rules by which a `Tokenizer` splits; another one whenever they change."""

NamedWord = tuple[str, int | None]
"""A word, and the number of the region that it names, if any."""

_FRONT_KEPT = 32
"""Pieces of the first of two texts that cutting leaves, if it has them (VisualBERT release)."""


class Tokenizer:
    """BERT's lower-casing WordPiece tokeniser; caches the pieces of each distinct sentence.

    Special tokens written out in a text ("[MASK]") are ordinary characters, so that no sentence can forge them; layouts
    add them by id.

    Args:
        vocabulary: a name shipped with the package, or a path to a vocab.txt (one piece per line, line number = id).
    Raises:
        ConfigError: no such vocabulary.
        DataError: the file repeats a piece or lacks a special token.
    """

    def __init__(self, vocabulary: str = "bert-base-uncased") -> None:
        self.vocabulary_file = _find_vocabulary(vocabulary)
        # Split at "\n" only: the vocabulary itself holds characters that `splitlines` treats as line ends.
        try:
            text = self.vocabulary_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.vocabulary_file} is not UTF-8 text: byte {error.start}: {error.reason}. Copy it again."
            ) from error
        pieces = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        ids = {piece: number for number, piece in enumerate(pieces)}
        if len(ids) != len(pieces):
            raise DataError(
                f"{self.vocabulary_file} repeats {len(pieces) - len(ids)} of its {len(pieces)} pieces: "
                "every line must differ."
            )
        lacking = [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if piece not in ids]
        if lacking:
            raise DataError(
                f"{self.vocabulary_file} lacks {', '.join(lacking)}: "
                "expected a BERT vocab.txt with its five special tokens."
            )
        self.size = len(pieces)
        self.pad, self.unk, self.cls, self.sep, self.mask = (
            ids[p] for p in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        )
        self._pieces, self._ids = pieces, ids
        self._engine = tokenizers.Tokenizer(WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self._engine.normalizer = BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
        )
        self._engine.pre_tokenizer = BertPreTokenizer()
        self._remembered: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """What the pieces of a text depend on: the vocabulary, the rules, and the library that follows them."""
        vocabulary = hashlib.sha256("\n".join(self._pieces).encode()).hexdigest()
        return f"{vocabulary} {_RULES} tokenizers {tokenizers.__version__}"

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces of a text, without special tokens."""
        return [int(piece) for piece in self.pieces(text)[0]]

    def words(self, text: str) -> list[list[int]]:
        """Ids of the pieces of each word; punctuation marks are words."""
        ids, numbers = self.pieces(text)
        words: list[list[int]] = [[] for _ in range(int(numbers[-1]) + 1 if len(numbers) else 0)]
        for piece, number in zip(ids, numbers, strict=True):
            words[number].append(int(piece))
        return words

    def pieces(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and word numbers (T,) of a text, both read-only."""
        pieces = self._remembered.get(text)
        if pieces is None:
            pieces = self._remember(text, self._engine.encode(text, add_special_tokens=False))
        return pieces

    def spans(self, text: str) -> NDArray[np.int64]:
        """(T, 2) where each of the `pieces` of a text begins and ends in it, in characters."""
        offsets = self._engine.encode(text, add_special_tokens=False).offsets
        return np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def split(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Ids and word numbers (P,) of the pieces of many texts, one text after the other, and how many pieces each has
        (M,); on all cores, and not remembered."""
        ids, words, lengths = ([np.zeros(0, np.int32)] for _ in range(3))
        for start in range(0, len(texts), 10_000):
            encodings = self._engine.encode_batch(texts[start : start + 10_000], add_special_tokens=False)
            for found, values in (
                (ids, chain.from_iterable(encoding.ids for encoding in encodings)),
                (words, chain.from_iterable(encoding.word_ids for encoding in encodings)),
                (lengths, map(len, encodings)),
            ):
                found.append(np.fromiter(values, np.int32))
        return np.concatenate(ids), np.concatenate(words), np.concatenate(lengths)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The pieces as written in the vocabulary ("##ing")."""
        return [self._pieces[int(number)] for number in ids]

    def id(self, token: str) -> int:
        """Id of one piece; `unk` if the vocabulary lacks it."""
        return self._ids.get(token, self.unk)

    def decode(self, ids: Iterable[int]) -> str:
        """The pieces as text, words separated by spaces; without padding, [CLS] and [SEP], with [MASK] and [UNK]."""
        silent = {self.pad, self.cls, self.sep}
        return " ".join(self.tokens(number for number in ids if int(number) not in silent)).replace(" ##", "")

    def _remember(self, text: str, encoding: tokenizers.Encoding) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        pieces = np.array(encoding.ids, dtype=np.int64), np.array(encoding.word_ids, dtype=np.int64)
        for array in pieces:
            array.flags.writeable = False
        if len(self._remembered) < _REMEMBERED:
            self._remembered[text] = pieces
        return pieces


class TextLayout:
    """Lays texts out with special tokens, as a model preset wants them, and cuts rows that are too long.

    Args:
        cut: how a pair over `spec.max_tokens` is shortened from its front: "release" removes more than needed, as
            VisualBERT's released code does; "exact" removes just the excess.
        task_token: number of the task that every row names, for a preset with task tokens.
    Raises:
        ConfigError: a preset with task tokens without a number, or with one beyond its table; a number for a preset
            without them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        spec: InputSpec,
        *,
        cut: Literal["release", "exact"] = "release",
        task_token: int | None = None,
    ) -> None:
        check_task_token(task_token, spec.num_tasks)
        self.tokenizer = tokenizer
        self.spec = spec
        self.task_token = task_token
        self.cut = cut
        self.truncated = 0
        """Rows cut so far."""
        self._question_mark = tokenizer.id("?")

    def row(self, first: str, second: str | None = None, *, answer: bool = False) -> TextRow:
        """`[CLS] first [SEP]`, or `[CLS] first [SEP] second [SEP]` with segment 1 from `second` on.

        With `answer`, presets that read the answer from a [MASK] get `[CLS] first ? [MASK] [SEP]` ("same_segment"; the
        question mark is added where the question lacks one, as in the tokens of the release) or
        `[CLS] first [SEP] [MASK] [SEP]` ("second_segment"); others a plain row.

        Raises:
            DataError: a text without any word piece.
            ConfigError: an answer slot is requested after two texts.
        Source:
            VisualBERT release (pre-training pairs, VQA), VL-BERT release (VQA).
        """
        if second is not None:
            if answer:
                raise ConfigError(
                    "an answer slot follows one text, not two: join question and context into one text, "
                    "or leave `answer` out."
                )
            return self._join_shortened(self._split_text(first, "text"), self._split_text(second, "second text"))
        ids, words = self._split_text(first, "question" if answer else "text")
        slot = self.spec.answer_slot if answer else "none"
        if slot == "same_segment" and ids[-1] != self._question_mark:
            ids, words = np.append(ids, self._question_mark), np.append(words, words[-1] + 1)
        tokens = self.tokenizer
        tail = {
            "none": (tokens.sep,),
            "same_segment": (tokens.mask, tokens.sep),
            "second_segment": (tokens.sep, tokens.mask, tokens.sep),
        }[slot]
        room = self.spec.max_tokens - 1 - len(tail)
        if len(ids) > room:
            self.truncated += 1
            ids, words = ids[:room], words[:room]
        row, numbers, segments = _blank_row(1 + len(ids) + len(tail))
        row[0], row[1 : 1 + len(ids)], row[1 + len(ids) :] = tokens.cls, ids, tail
        numbers[1 : 1 + len(ids)] = words
        if slot == "second_segment":
            segments[-2:] = 1
        answer_at = None if slot == "none" else len(row) - 2
        return TextRow(ids=row, segments=segments, words=numbers, answer_at=answer_at, task=self.task_token)

    def rows(self, texts: Texts, numbers: NDArray[np.int64]) -> TextRows:
        """`row` of many single texts or pairs at once.

        Args:
            numbers: (N, 1) or (N, 2) numbers of texts, all of them with a word piece.
        """
        starts, lengths, cut = self._cut_rows(texts, numbers)
        self.truncated += int(cut.sum())
        width = numbers.shape[1]
        totals = lengths.sum(1) + 1 + width
        begins = np.cumsum(totals) - totals
        # In each row, part by part: a special token, then the pieces of a text; the last [SEP] stands at the end.
        parts = begins[:, None] + 1 + np.cumsum(lengths + 1, axis=1) - (lengths + 1)
        steps = count_up(lengths.ravel())
        source, place = (np.repeat(first.ravel(), lengths.ravel()) + steps for first in (starts, parts))
        ids = np.full(int(totals.sum()), self.tokenizer.sep, np.int64)
        ids[begins], ids[place] = self.tokenizer.cls, texts.ids[source]
        words, segments = np.full(len(ids), -1, np.int64), np.zeros(len(ids), np.int64)
        words[place] = texts.words[source]
        if width == 2:
            # The words of the second text are counted on from those that are left of the first.
            last = texts.words[np.maximum(starts[:, 0] + lengths[:, 0] - 1, 0)].astype(np.int64) + 1
            before = np.stack([np.zeros_like(last), np.where(lengths[:, 0] > 0, last, 0)], axis=1)
            words[place] += np.repeat(before.ravel(), lengths.ravel())
            spans = np.stack([lengths[:, 0] + 2, lengths[:, 1] + 1], axis=1)
            segments = np.repeat(np.tile(np.arange(2), len(spans)), spans.ravel())
        return TextRows(
            lengths=totals,
            ids=ids,
            segments=segments,
            words=words,
            answer_at=[None] * len(numbers),
            task=[self.task_token] * len(numbers),
            links=[()] * len(numbers),
            phrases=[()] * len(numbers),
        )

    def measure(self, texts: Texts, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) lengths of the `rows` of the same texts, which are not laid out."""
        lengths: NDArray[np.int64] = self._cut_rows(texts, numbers)[1].sum(1) + 1 + numbers.shape[1]
        return lengths

    def _cut_rows(
        self, texts: Texts, numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Where the pieces of each text begin and how many are left (N, 1 or 2), and which rows were cut (N,)."""
        starts = texts.offsets[numbers]
        lengths = texts.offsets[numbers + 1] - starts
        excess = lengths.sum(1) - (self.spec.max_tokens - 1 - numbers.shape[1])
        cut = excess > 0
        if numbers.shape[1] == 1:
            lengths[cut, 0] -= excess[cut]
        elif cut.any():
            fronts = np.stack(self._find_cuts(lengths[cut, 0], lengths[cut, 1], excess[cut]), axis=1)
            starts[cut] += fronts
            lengths[cut] -= fronts
        return starts, lengths, cut

    def named(self, first: Sequence[NamedWord], second: Sequence[NamedWord], *, by_word: bool = False) -> TextRow:
        """`row(first, second)` of texts given word by word, each with the region that it names, if any: its first piece
        is linked to that region.

        A row that is too long loses the front of the second text, and then that of the first.

        Args:
            by_word: link the piece whose number in its text is that of the word, as the release does by mistake: after
                the first word of several pieces, links are too far to the left.
        Raises:
            DataError: a text without any word piece.
        Source:
            VisualBERT release, VCR: `process_ctx_ans_for_bert` (cut), `get_alignment_original` (links).
        """
        (a, a_owners), (b, b_owners) = self._split_named(first, "text"), self._split_named(second, "second text")
        excess = len(a[0]) + len(b[0]) - (self.spec.max_tokens - 3)
        if excess > 0:
            self.truncated += 1
            # Quirk: the release means to cut the first text too, but mistakes the length of a pair for that of the text
            # and leaves it whole.
            from_second = min(excess, len(b[0]))
            from_first = excess - from_second
            (a, a_owners), (b, b_owners) = (
                _drop_front(a, a_owners, from_first),
                _drop_front(b, b_owners, from_second),
            )
        row = self.join(a, b)
        links = []
        for words, owners, start in ((first, a_owners, 1), (second, b_owners, len(a[0]) + 2)):
            naming = [(number, region) for number, (_, region) in enumerate(words) if region is not None]
            # Owners ascend; a word without a piece, or one that was cut, is not among them.
            places = np.searchsorted(owners, [number for number, _ in naming]).tolist()
            for (number, region), place in zip(naming, places, strict=True):
                if place < len(owners) and owners[place] == number:
                    links.append((start + (number if by_word else place), region))
        # Where a text lost its front, the number of a word may lie beyond the end of the row.
        return replace(row, links=tuple(link for link in links if link[0] < len(row.ids)))

    def _split_named(self, text: Sequence[NamedWord], what: str) -> tuple[_Pieces, NDArray[np.int64]]:
        """Pieces of a text given word by word, and for each the number of its word."""
        pieces = [self.tokenizer.pieces(word) for word, _ in text]
        owners = np.repeat(np.arange(len(pieces)), [len(ids) for ids, _ in pieces])
        if not len(owners):
            raise DataError(
                f"the {what} is empty: found {[word for word, _ in text]}, expected at least one word. "
                "Fill it in, or drop it from its file."
            )
        # Punctuation within a word counts as words of its own for masking.
        before = np.cumsum([0, *(int(words[-1]) + 1 if len(words) else 0 for _, words in pieces[:-1])])
        return (
            np.concatenate([ids for ids, _ in pieces]),
            np.concatenate([words for _, words in pieces]) + before[owners],
        ), owners

    def _join_shortened(self, first: _Pieces, second: _Pieces) -> TextRow:
        excess = len(first[0]) + len(second[0]) - (self.spec.max_tokens - 3)
        if excess > 0:
            self.truncated += 1
            first, second = self._shorten(first, second, excess)
        return self.join(first, second)

    def join(self, first: _Pieces, second: _Pieces) -> TextRow:
        """`[CLS] first [SEP] second [SEP]` of pieces and their word numbers, as long as they are."""
        (a, a_words), (b, b_words) = first, second
        end = 1 + len(a)
        row, numbers, segments = _blank_row(end + 2 + len(b))
        row[0], row[1:end], row[end], row[end + 1 : -1], row[-1] = (
            self.tokenizer.cls,
            a,
            self.tokenizer.sep,
            b,
            self.tokenizer.sep,
        )
        numbers[1:end] = a_words
        numbers[end + 1 : -1] = b_words + (a_words[-1] + 1 if len(a) else 0)
        segments[end + 1 :] = 1
        return TextRow(ids=row, segments=segments, words=numbers, task=self.task_token)

    def _shorten(self, first: _Pieces, second: _Pieces, excess: int) -> tuple[_Pieces, _Pieces]:
        lengths = np.array([len(first[0])]), np.array([len(second[0])])
        from_first, from_second = (int(count[0]) for count in self._find_cuts(*lengths, np.array([excess])))
        return (first[0][from_first:], first[1][from_first:]), (second[0][from_second:], second[1][from_second:])

    def _find_cuts(
        self, first: NDArray[np.int64], second: NDArray[np.int64], excess: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pieces to be cut from the front of the two texts of pairs, of their lengths and what they have in excess."""
        from_first = np.minimum(-(-excess // 2), np.maximum(first - _FRONT_KEPT, 0))
        # Quirk: the release adds what the first text lost where it should subtract it, so a pair loses more than its
        # excess.
        from_second = np.minimum(excess + from_first if self.cut == "release" else excess - from_first, second)
        # A second text too short for its part would leave the row too long (the release fails there): the first loses
        # the rest.
        return np.maximum(from_first, excess - from_second), from_second

    def _split_text(self, text: str, what: str) -> _Pieces:
        pieces = self.tokenizer.pieces(text)
        if not len(pieces[0]):
            raise DataError(
                f"the {what} is empty: found {text!r}, expected at least one word. "
                "Fill it in, or drop it from its file."
            )
        return pieces


def check_task_token(token: int | None, num_tasks: int) -> None:
    """Refuse the number of a task that does not belong to a model with `num_tasks` task tokens.

    Raises:
        ConfigError: it lacks, is not in the table, or the model has no task tokens.
    """
    if token is None and num_tasks:
        raise ConfigError(
            f"the model has {num_tasks} task tokens (encoder.num_tasks), so every text must name its task, and this "
            f"run names none: set task_token to a number from 0 to {num_tasks - 1} (convert: --task-token), or train a "
            "model without task tokens with --set encoder.num_tasks=0."
        )
    if token is not None and not num_tasks:
        raise ConfigError(
            f"task_token is {token}, but the model has no task tokens (encoder.num_tasks is 0). Leave task_token out, "
            "or use a preset that has them, such as ViLBERT's multitask."
        )
    if token is not None and not 0 <= token < num_tasks:
        raise ConfigError(
            f"task_token must be a number from 0 to {num_tasks - 1}, a row of the model's {num_tasks} task tokens; "
            f"found {token}."
        )


def swap_words(text: str) -> str:
    """The text with the words left and right exchanged, also in leftmost and rightmost."""
    return _SIDES.sub(lambda word: "right" if word[0] == "left" else "left", text)


_SIDES = re.compile(r"\b(?:left|right)(?=most\b|\b)")


def swap_sides(row: TextRow, tokenizer: Tokenizer) -> TextRow:
    """The row with the pieces "left" and "right" exchanged, for a text about an image that is mirrored.

    Source:
        VL-BERT release, `flip_tokens` of VQA and RefCOCO+, on word pieces: "leftmost" becomes "rightmost". Its
        pre-training leaves captions as they are.
    """
    left, right = tokenizer.id("left"), tokenizer.id("right")
    ids = row.ids.copy()
    ids[row.ids == left], ids[row.ids == right] = right, left
    return replace(row, ids=ids)


_Pieces = tuple[NDArray[np.int64], NDArray[np.int64]]


def _drop_front(pieces: _Pieces, owners: NDArray[np.int64], count: int) -> tuple[_Pieces, NDArray[np.int64]]:
    return (pieces[0][count:], pieces[1][count:]), owners[count:]


def _blank_row(length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ids, word numbers (-1: special token) and segments of a row to be filled."""
    return np.empty(length, np.int64), np.full(length, -1, np.int64), np.zeros(length, np.int64)


def _find_vocabulary(vocabulary: str) -> Path:
    shipped = VOCABULARIES / f"{vocabulary}.txt"
    if shipped.is_file():
        return shipped
    if Path(vocabulary).is_file():
        return Path(vocabulary)
    names: Sequence[str] = [file.stem for file in VOCABULARIES.glob("*.txt")]
    raise ConfigError(
        f"no vocabulary {vocabulary!r}: expected a shipped name or the path of a vocab.txt. "
        f"{nearest(vocabulary, names)}"
    )
