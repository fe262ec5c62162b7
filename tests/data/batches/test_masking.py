"""Rates of token masking, and what is never masked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from fixtures.releases import TOKEN_MASKING

from visling.data.batches.masking import TokenMasking, mask_rows, mask_tokens
from visling.data.text import TextLayout, Tokenizer
from visling.data.text_arrays import TextRows
from visling.draws import GivenDraws
from visling.errors import ConfigError
from visling.runtime import generator_for
from visling.types import InputSpec, TextRow

TOKENIZER = Tokenizer()
LAYOUT = TextLayout(TOKENIZER, InputSpec(answer_slot="same_segment"))
DRAWS = 100_000


def within(count: int, expected_rate: float, total: int) -> None:
    """Five standard deviations of a binomial count."""
    spread = 5 * (total * expected_rate * (1 - expected_rate)) ** 0.5
    assert abs(count - expected_rate * total) < spread, f"got {count / total:.4f}, expected {expected_rate:.4f}"


def test_rates_over_many_draws() -> None:
    row = TextRow(ids=np.full(DRAWS, 2000), segments=np.zeros(DRAWS, np.int64))
    ids, at, original = mask_tokens(row, TokenMasking(), TOKENIZER, generator_for(1))
    within(len(at), 0.15, DRAWS)
    now = ids[at]
    within(int((now == TOKENIZER.mask).sum()), 0.8, len(at))
    within(int((now == 2000).sum()), 0.1, len(at))
    replaced = now[(now != TOKENIZER.mask) & (now != 2000)]
    within(len(replaced), 0.1, len(at))
    assert (original == 2000).all()
    untouched = np.ones(DRAWS, bool)
    untouched[at] = False
    assert (ids[untouched] == 2000).all()


def test_random_entries_cover_the_whole_vocabulary_evenly() -> None:
    row = TextRow(ids=np.full(DRAWS, 2000), segments=np.zeros(DRAWS, np.int64))
    for whole_word in (False, True):
        given = dataclasses.replace(row, words=np.arange(DRAWS)) if whole_word else row
        ids, at, _ = mask_tokens(
            given, TokenMasking(rate=1.0, mask=0.0, random=1.0, whole_word=whole_word), TOKENIZER, generator_for(2)
        )
        assert len(at) == DRAWS
        assert ids.min() >= 0
        assert ids.max() < TOKENIZER.size
        tenths = np.histogram(ids, bins=10, range=(0, TOKENIZER.size))[0]
        for tenth in tenths:
            within(int(tenth), 0.1, DRAWS)
        assert (ids < 1000).any(), "specials and unused entries are drawn too"


def test_the_same_generator_gives_the_same_masks() -> None:
    row = LAYOUT.row("a small red circle is left of a large blue square")
    first, second = (mask_tokens(row, TokenMasking(), TOKENIZER, generator_for(5, 6)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("whole_word", [False, True])
def test_specials_and_the_answer_slot_are_never_chosen(whole_word: bool) -> None:
    row = LAYOUT.row("is unaffable red?", answer=True)
    everything = TokenMasking(rate=1.0, whole_word=whole_word)
    for seed in range(20):
        ids, at, original = mask_tokens(row, everything, TOKENIZER, generator_for(seed))
        assert at.tolist() == [1, 2, 3, 4, 5, 6]
        assert original.tolist() == row.ids[1:7].tolist()
        assert ids[[0, 7, 8]].tolist() == [TOKENIZER.cls, TOKENIZER.mask, TOKENIZER.sep]


def test_rows_without_word_numbers_protect_specials_by_id() -> None:
    row = dataclasses.replace(LAYOUT.row("is it red?", answer=True), words=None)
    assert mask_tokens(row, TokenMasking(rate=1.0), TOKENIZER, generator_for(0))[1].tolist() == [1, 2, 3, 4]


def test_whole_words_share_their_fate() -> None:
    row = LAYOUT.row("unaffable unaffable unaffable unaffable")
    assert row.words is not None
    chosen_words = masked_words = 0
    rng = generator_for(3)
    for _ in range(2000):
        ids, at, _ = mask_tokens(row, TokenMasking(whole_word=True), TOKENIZER, rng)
        for word in range(4):
            pieces = np.flatnonzero(row.words == word)
            share = np.isin(pieces, at)
            assert share.all() or not share.any()
            chosen_words += int(share.all())
            masks = ids[pieces] == TOKENIZER.mask
            assert masks.all() or not masks.any()
            masked_words += int(masks.all())
    within(chosen_words, 0.15, 8000)
    within(masked_words, 0.12, 8000)


def test_whole_word_masking_needs_words() -> None:
    row = TextRow(ids=np.array([101, 2000, 102]), segments=np.zeros(3, np.int64))
    with pytest.raises(ConfigError, match="whole-word"):
        mask_tokens(row, TokenMasking(whole_word=True), TOKENIZER, generator_for(0))


@pytest.mark.parametrize("whole_word", [False, True])
def test_many_rows_equal_single_rows(whole_word: bool) -> None:
    masking = TokenMasking(rate=0.4, whole_word=whole_word)
    rows = [LAYOUT.row(text, answer=slot) for text in ("a red unaffable cat", "dogs?") for slot in (False, True)]
    ids, chosen = mask_rows(
        TextRows.pack(rows), masking, TOKENIZER, GivenDraws([generator_for(seed) for seed in range(4)])
    )
    singles = [mask_tokens(row, masking, TOKENIZER, generator_for(seed)) for seed, row in enumerate(rows)]
    assert np.array_equal(ids, np.concatenate([single[0] for single in singles]))
    assert chosen.sum() == sum(len(single[1]) for single in singles)


def test_the_row_itself_is_not_changed() -> None:
    row = LAYOUT.row("a red cat")
    before = row.ids.copy()
    mask_tokens(row, TokenMasking(rate=1.0), TOKENIZER, generator_for(0))
    assert np.array_equal(row.ids, before)


def test_rate_zero_chooses_nothing() -> None:
    assert len(mask_tokens(LAYOUT.row("a red cat"), TokenMasking(rate=0.0), TOKENIZER, generator_for(0))[1]) == 0


@pytest.mark.parametrize("shares", [{"rate": 1.5}, {"mask": -0.1}, {"mask": 0.9, "random": 0.2}])
def test_impossible_shares(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must lie in"):
        TokenMasking(**shares)  # type: ignore[arg-type]


# Draws in turn, as the releases make them


class Script:
    """A generator that gives prescribed draws and knows which kind is due: a number in [0, 1), or an integer below a
    bound."""

    def __init__(self, draws: Sequence[Any]) -> None:
        self.draws = list(draws)

    def random(self) -> Any:
        draw = self.draws.pop(0)
        assert not isinstance(draw, tuple), f"a number is drawn where {draw} is due"
        return draw

    def integers(self, bound: int) -> Any:
        draw = self.draws.pop(0)
        assert isinstance(draw, tuple), f"an integer is drawn where {draw} is due"
        assert draw[1] == bound, f"drawn below {bound}, due below {draw[1]}"
        return draw[0]


def scripted(text: str, release: str, draws: Sequence[Any]) -> tuple[list[int], list[int]]:
    """What the model reads between the special tokens, and the chosen positions, counted without [CLS]."""
    script = Script(draws)
    row = LAYOUT.row(text)
    ids, at, original = mask_tokens(row, TOKEN_MASKING[release], TOKENIZER, cast(Any, script))
    assert not script.draws, f"left over: {script.draws}"
    assert original.tolist() == row.ids[at].tolist()
    assert ids[[0, -1]].tolist() == [TOKENIZER.cls, TOKENIZER.sep], "special tokens draw nothing"
    return ids[1:-1].tolist(), [int(position) - 1 for position in at]


MASK, SIZE = TOKENIZER.mask, TOKENIZER.size


@pytest.mark.parametrize("release", ["visualbert", "vilbert", "vilbert-multitask", "lxmert", "cvlp"])
def test_pieces_are_drawn_in_turn(release: str) -> None:
    una, ffa, ble, cats = TOKENIZER.encode("unaffable cats")
    read, chosen = scripted("unaffable cats", release, [0.149, 0.15, 0.15 * 0.85, (7, SIZE), 0.15 * 0.79])
    assert (una, ffa) == (TOKENIZER.id("una"), TOKENIZER.id("##ffa"))
    assert read == [una, ffa, 7, MASK], "kept, not chosen, random, masked"
    assert chosen == [0, 2, 3]
    assert (ble, cats) == (TOKENIZER.id("##ble"), TOKENIZER.id("cats"))


def test_words_are_drawn_in_turn() -> None:
    pieces = TOKENIZER.encode("unaffable cats unaffable unaffable")
    draws = [0.15 * 0.85, (5, SIZE), (6, SIZE), (7, SIZE), 0.5, 0.0, 0.15 * 0.95]
    read, chosen = scripted("unaffable cats unaffable unaffable", "vlbert", draws)
    assert read == [5, 6, 7, pieces[3], MASK, MASK, MASK, *pieces[7:]]
    assert chosen == [0, 1, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("release", ["vilbert", "vlbert"])
def test_rates_in_turn_over_many_draws(release: str) -> None:
    row = TextRow(ids=np.full(DRAWS, 2000), segments=np.zeros(DRAWS, np.int64), words=np.arange(DRAWS))
    ids, at, _ = mask_tokens(row, TOKEN_MASKING[release], TOKENIZER, generator_for(11))
    within(len(at), 0.15, DRAWS)
    now = ids[at]
    within(int((now == TOKENIZER.mask).sum()), 0.8, len(at))
    within(int((now == 2000).sum()), 0.1, len(at))
    replaced = now[(now != TOKENIZER.mask) & (now != 2000)]
    within(len(replaced), 0.1, len(at))
    for tenth in np.histogram(replaced, bins=10, range=(0, TOKENIZER.size))[0]:
        within(int(tenth), 0.1, len(replaced))


def test_whole_words_in_turn_share_their_fate_over_many_draws() -> None:
    words = DRAWS // 3
    row = TextRow(
        ids=np.full(3 * words, 2000), segments=np.zeros(3 * words, np.int64), words=np.arange(words).repeat(3)
    )
    ids, at, _ = mask_tokens(row, TOKEN_MASKING["vlbert"], TOKENIZER, generator_for(12))
    chosen = np.zeros(3 * words, bool)
    chosen[at] = True
    assert (chosen.reshape(-1, 3).sum(1) % 3 == 0).all()
    within(int(chosen[::3].sum()), 0.15, words)
    masked = (ids == TOKENIZER.mask).reshape(-1, 3)
    assert (masked.all(1) | ~masked.any(1)).all()
    within(int(masked.all(1).sum()), 0.12, words)
    drawn = ids.reshape(-1, 3)[chosen[::3] & ~masked.any(1)]
    assert (drawn[:, 0] != drawn[:, 1]).any(), "every piece draws an entry of its own"


def test_many_rows_in_turn_equal_single_rows() -> None:
    for release in ("vilbert", "vlbert"):
        rows = [LAYOUT.row(text) for text in ("a red unaffable cat", "dogs?", "three more words")]
        ids, chosen = mask_rows(
            TextRows.pack(rows),
            TOKEN_MASKING[release],
            TOKENIZER,
            GivenDraws([generator_for(seed) for seed in range(3)]),
        )
        singles = [
            mask_tokens(row, TOKEN_MASKING[release], TOKENIZER, generator_for(seed)) for seed, row in enumerate(rows)
        ]
        assert np.array_equal(ids, np.concatenate([single[0] for single in singles]))
        assert chosen.sum() == sum(len(single[1]) for single in singles)


def test_the_answer_slot_is_not_drawn_for() -> None:
    row = LAYOUT.row("is it red?", answer=True)
    script = Script([0.5, 0.0, 0.5, 0.5])
    ids, at, _ = mask_tokens(row, TOKEN_MASKING["lxmert"], TOKENIZER, cast(Any, script))
    assert at.tolist() == [2]
    assert not script.draws
    assert ids[2] == MASK
