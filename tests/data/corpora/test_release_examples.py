"""One example of each release, built from prescribed draws: which are made, in which order, and what the model and the
losses get to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from fixtures.releases import REGION_MASKING, TOKEN_MASKING
from numpy.typing import NDArray

from visling.data.annotations.captions import CaptionRecord
from visling.data.annotations.lxmert import LxmertRecord
from visling.data.annotations.questions import QuestionRecord
from visling.data.answers import AnswerVocabulary
from visling.data.batches.collate import Collator
from visling.data.batches.examples import Source
from visling.data.corpora.captions import CaptionPairs, SingleCaption, VilbertCaptions
from visling.data.corpora.questions import LxmertSentences, QuestionAnswer
from visling.data.corpora.text import PlainText
from visling.data.text import TextLayout, Tokenizer
from visling.types import IGNORE, Batch, InputSpec, RegionArray, Slots, Targets

TOKENIZER = Tokenizer()
CLS, SEP, MASK, SIZE = TOKENIZER.cls, TOKENIZER.sep, TOKENIZER.mask, TOKENIZER.size
F = 2
UNREAD = 0.999
"""The example and the region of a feature that is not replaced. They are drawn for every region, where the releases
draw them only for those that are replaced: the distribution is the same, and all regions are drawn at once."""


class Script:
    """A generator that gives prescribed draws and knows which kind is due: a number, (integer, bound) or {"shares":
    ..., "drawn": ...}."""

    def __init__(self, draws: Sequence[Any]) -> None:
        self.draws = list(draws)

    def random(self, count: int | None = None) -> Any:
        if count is not None:
            return np.array([self.random() for _ in range(count)])
        draw = self.draws.pop(0)
        assert isinstance(draw, float), f"a number is drawn where {draw} is due"
        return draw

    def integers(self, bound: int) -> int:
        draw = self.draws.pop(0)
        assert isinstance(draw, tuple), f"an integer is drawn where {draw} is due"
        assert draw[1] == bound, f"drawn below {bound}, due below {draw[1]}"
        return int(draw[0])

    def multinomial(self, count: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
        draw = self.draws.pop(0)
        assert isinstance(draw, dict), f"an answer is drawn where {draw} is due"
        assert count == 1
        np.testing.assert_allclose(shares, draw["shares"])
        return np.eye(len(shares), dtype=np.int64)[draw["drawn"]]


class Memory:
    """A store in memory: three regions per image whose features say image and region."""

    feature_size, fingerprint = F, "memory"

    def __contains__(self, image_id: str) -> bool:
        return True

    def __getitem__(self, image_id: str) -> RegionArray:
        left = np.arange(3, dtype=np.float32) * 10
        return RegionArray(
            features=np.stack([np.full(3, ord(image_id)), np.arange(3)], axis=1).astype(np.float32),
            boxes=np.stack([left, 0 * left, left + 5, 0 * left + 5], axis=1),
            size=(40, 20),
        )

    def __len__(self) -> int:
        return 1


def build(
    release: str, source: Source, index: int, spec: InputSpec, draws: Sequence[Any], *, text_only: bool = False
) -> tuple[Batch, Targets]:
    """A batch of one example; every draw is used. VisualBERT hides no region."""
    script = cast(Any, Script(draws))
    region_masking = REGION_MASKING.get(release)
    collator = Collator(
        None if text_only else Memory(),
        spec,
        TOKENIZER,
        masking=TOKEN_MASKING[release],
        region_masking=region_masking,
        needs={"feature_slots", "region_features"} if region_masking else (),
        pool=["a", "a", "b"],
    )
    batch, targets = collator([source.example(index, script)], [script])
    batch.validate()
    assert not script.draws, f"left over: {script.draws}"
    return batch, targets


def chosen(slots: Slots | None) -> list[int]:
    assert slots is not None
    return [int(at) for at in slots.at[0][slots.mask[0]]]


def features(batch: Batch) -> list[list[float]]:
    assert batch.regions is not None
    return [[float(value) for value in row] for row in batch.regions.features[0]]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


VISUALBERT = InputSpec(feature_size=F, max_tokens=128)


def test_visualbert_pairs_a_caption_with_another_of_its_image() -> None:
    captions = [("a", "a red cat"), ("b", "the sky"), ("a", "cats play"), ("a", "unaffable")]
    records = [
        CaptionRecord(id=str(number), images=(image,), caption=caption)
        for number, (image, caption) in enumerate(captions)
    ]
    batch, targets = build(
        "visualbert", CaptionPairs(records, TextLayout(TOKENIZER, VISUALBERT)), 2, VISUALBERT,
        [
            # Not above one half: another caption of the image, of which there are two; this one's place is the last
            # one's
            0.5, (1, 2),
            0.119, 0.15,  # cats: [MASK]; play: not chosen
            0.121, (9, SIZE), 0.136, 0.0,  # una: entry 9, drawn right after it; ##ffa: told but shown; ##ble: [MASK]
        ],
    )  # fmt: skip
    una, ffa, ble = ids("unaffable")
    assert batch.text.ids[0].tolist() == [CLS, MASK, *ids("play"), SEP, 9, ffa, MASK, SEP]
    assert batch.text.segments[0].tolist() == [0] * 4 + [1] * 4
    assert chosen(targets.token_slots) == [1, 4, 5, 6]
    assert targets.token_ids is not None
    assert targets.token_ids[0, :4].tolist() == [*ids("cats"), una, ffa, ble]
    assert targets.matched is not None
    assert targets.matched.tolist() == [1]
    assert features(batch) == [[ord("a"), 0], [ord("a"), 1], [ord("a"), 2]], "no region is hidden"
    assert targets.feature_slots is None


def test_visualbert_pairs_a_caption_with_a_random_one_and_cuts_both_from_the_front() -> None:
    long, other = " ".join(map(str, range(1, 71))), " ".join(map(str, range(99, 29, -1)))
    captions = [("a", long), ("a", "cats"), ("b", other)]
    records = [
        CaptionRecord(id=str(number), images=(image,), caption=caption)
        for number, (image, caption) in enumerate(captions)
    ]
    first, second = ids(long), ids(other)
    assert len(first) == len(second) == 70
    batch, targets = build(
        "visualbert", CaptionPairs(records, TextLayout(TOKENIZER, VISUALBERT)), 0, VISUALBERT,
        [
            0.51, (1, 3), (0, 3), (2, 3),  # above one half: any caption, again while it is of the same image
            # 140 pieces are 15 more than fit: the first loses 8, the second 15 + 8; what is cut draws nothing
            0.0, *[0.15] * 60, 0.136,
            *[0.15] * 46, 0.121, (7, SIZE),
        ],
    )  # fmt: skip
    assert batch.text.ids[0].tolist() == [CLS, MASK, *first[9:], SEP, *second[23:69], 7, SEP]
    assert chosen(targets.token_slots) == [1, 62, 110]
    assert targets.token_ids is not None
    assert targets.token_ids[0, :3].tolist() == [first[8], first[-1], second[-1]]
    assert targets.matched is not None
    assert targets.matched.tolist() == [0]


@pytest.mark.parametrize("spelled", [True, False])
def test_visualbert_spells_the_answer_letter_by_letter(spelled: bool) -> None:
    about: Any = {"question_type": "", "answer_type": "", "multiple_choice_answer": None}
    records = [QuestionRecord(id="0", images=("a",), question="is it red ?", answers=("no", "red fox"), **about)]
    answer = ids("r e d f o x" if spelled else "red fox")
    batch, targets = build(
        "visualbert", QuestionAnswer(records, TextLayout(TOKENIZER, VISUALBERT), spelled=spelled), 0, VISUALBERT,
        [(1, 2), 0.15, 0.0, 0.15, 0.15, *[0.15] * (len(answer) - 1), 0.136],  # the answer, then the pieces
    )  # fmt: skip
    assert batch.text.ids[0].tolist() == [CLS, *ids("is"), MASK, *ids("red ?"), *answer, SEP]
    assert batch.text.segments.max() == 0
    assert chosen(targets.token_slots) == [2, 4 + len(answer)]
    assert targets.matched is not None
    assert targets.matched.tolist() == [IGNORE]


SENTENCES = [
    LxmertRecord(
        id="0",
        images=("a",),
        sentence="what color is it",
        source="vqa",
        scores={"grey": 1.0, "Blue": 0.3, "silver": 0.6, "yes": 0.6},
    ),
    LxmertRecord(id="1", images=("a",), sentence="a cat", source="mscoco", scores=None),
    LxmertRecord(id="2", images=("b",), sentence=" ".join(["red"] * 30), source="mscoco", scores=None),
]
ANSWERS = AnswerVocabulary(["blue", "gray", "yes"])
LXMERT = InputSpec(feature_size=F, max_tokens=20)


@pytest.mark.parametrize("release", ["lxmert", "cvlp"])
def test_lxmert_keeps_a_question_and_draws_its_answer(release: str) -> None:
    source = LxmertSentences(SENTENCES, TextLayout(TOKENIZER, LXMERT), answers=ANSWERS)
    batch, targets = build(
        release, source, 0, LXMERT,
        [
            0.5,  # not below one half: it stays
            # Yes, gray, blue: what is respelt goes to the end; silver is not listed
            {"shares": [0.6 / 1.9, 1.0 / 1.9, 0.3 / 1.9], "drawn": 1},
            0.119, 0.15, 0.121, (7, SIZE), 0.14,  # [MASK]; not chosen; entry 7; itself
            # Of each region three numbers: zeros; region 1 of the image of example 2 of the pool; not chosen
            0.119, UNREAD, UNREAD, 0.121, 2.5 / 3, 1.5 / 3, 0.15, UNREAD, UNREAD,
        ],
    )  # fmt: skip
    assert batch.text.ids[0].tolist() == [CLS, MASK, TOKENIZER.id("color"), 7, TOKENIZER.id("it"), SEP]
    assert chosen(targets.token_slots) == [1, 3, 4]
    assert features(batch) == [[0, 0], [ord("b"), 1], [ord("a"), 2]]
    assert chosen(targets.feature_slots) == [0, 1]
    assert targets.region_features is not None
    assert targets.region_features[0].tolist() == [[ord("a"), 0], [ord("a"), 1], [ord("a"), 2]], (
        "the features to predict are those of the image itself"
    )
    assert targets.matched is not None
    assert targets.matched.tolist() == [1]
    assert targets.answer is not None
    assert targets.answer.tolist() == [ANSWERS.index("gray")]


def test_lxmert_replaces_a_question_by_a_sentence_of_another_image_and_cuts_it() -> None:
    source = LxmertSentences(SENTENCES, TextLayout(TOKENIZER, LXMERT), answers=ANSWERS)
    batch, targets = build(
        "lxmert", source, 0, LXMERT,
        [
            0.49, (1, 3), (0, 3), (2, 3),  # drawn again while it is of the same image; no answer is drawn
            *[0.15] * 17, 0.0,  # 18 pieces are left of 30
            *[0.15, UNREAD, UNREAD] * 3,
        ],
    )  # fmt: skip
    assert batch.text.ids[0].tolist() == [CLS, *[TOKENIZER.id("red")] * 17, MASK, SEP]
    assert chosen(targets.token_slots) == [18], "words of a wrong sentence are told all the same"
    assert features(batch)[0] == [ord("a"), 0], "the image stays"
    assert targets.matched is not None
    assert targets.matched.tolist() == [0]
    assert targets.answer is not None
    assert targets.answer.tolist() == [IGNORE]


@pytest.mark.parametrize(
    ("draw", "keep_above", "kept"), [(0.51, True, True), (0.5, True, False), (0.51, False, False), (0.5, False, True)]
)
def test_vilbert_may_draw_the_right_caption_and_call_it_wrong(draw: float, keep_above: bool, kept: bool) -> None:
    records = [
        CaptionRecord(id=name, images=(name,), caption=text) for name, text in (("a", "the sky"), ("b", "a dog"))
    ]
    spec = InputSpec(feature_size=F, max_tokens=36)
    source = VilbertCaptions(records, TextLayout(TOKENIZER, spec), keep_above=keep_above)
    release = "vilbert" if keep_above else "vilbert-multitask"
    batch, targets = build(
        release, source, 0, spec,
        [
            draw, *([] if kept else [(0, 2)]),
            0.13, (9, SIZE), 0.0,  # the: entry 9; sky: [MASK]
            0.134, 0.136, 0.15,  # hidden; told but shown; not chosen
        ],
    )  # fmt: skip
    assert batch.text.ids[0].tolist() == [CLS, 9, MASK, SEP]
    assert features(batch) == [[0, 0], [ord("a"), 1], [ord("a"), 2]]
    assert targets.matched is not None
    assert targets.matched.tolist() == [int(kept)]
    told = kept or keep_above  # the multi-task release asks nothing about a pair that is called wrong
    assert chosen(targets.token_slots) == ([1, 2] if told else [])
    assert chosen(targets.feature_slots) == ([0, 1] if told else [])


def test_vlbert_masks_whole_words_of_a_caption_and_then_cuts_it() -> None:
    spec = InputSpec(feature_size=F, max_tokens=64, joint_limit=9)
    records = [CaptionRecord(id="0", images=("a",), caption="zebras watch zebras")]
    pieces = TOKENIZER.encode("zebras")
    assert len(pieces) == 2
    source = SingleCaption(records, TextLayout(TOKENIZER, spec), false_caption_ratio=None)
    batch, targets = build(
        "vlbert", source, 0, spec,
        [
            # Every piece of the first word draws an entry; not chosen; both pieces hidden
            0.121, (3, SIZE), (4, SIZE), 0.15, 0.119,
            0.15, 0.134, 0.15,
        ],
    )  # fmt: skip
    # Seven pieces, three regions and the whole image are two too many: the text, being longer, gives them, and keeps
    # its [SEP].
    assert batch.text.ids[0].tolist() == [CLS, 3, 4, TOKENIZER.id("watch"), SEP]
    assert chosen(targets.token_slots) == [1, 2]
    assert targets.token_ids is not None
    assert targets.token_ids[0, :2].tolist() == pieces
    assert batch.regions is not None
    assert batch.regions.hidden is not None
    assert batch.regions.hidden.tolist() == [[False, True, False]]
    assert chosen(targets.feature_slots) == [1]


def test_vlbert_reads_text_without_an_image() -> None:
    spec = InputSpec(feature_size=F, max_tokens=5, joint_limit=64)
    source = PlainText(["watch zebras", "watch zebras ."], TextLayout(TOKENIZER, spec), min_words=4)
    batch, targets = build(
        "vlbert", source, 1, spec,
        [0.15, 0.0, 0.121, (8, SIZE), 0.0],  # words of passage 1, then of passage 0, of which one piece is left
        text_only=True,
    )  # fmt: skip
    assert batch.regions is None
    assert batch.text.ids[0].tolist() == [TOKENIZER.id("watch"), MASK, MASK, 8, MASK]
    assert chosen(targets.token_slots) == [1, 2, 3, 4]
    assert targets.token_ids is not None
    assert targets.token_ids[0, 2].item() == TOKENIZER.id(".")
    assert batch.text.segments.max() == 0
    assert targets.matched is None
    assert targets.feature_slots is None
