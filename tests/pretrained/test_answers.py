"""Scores of the questions of a validation: which are scored, by which data set, whatever the order and weight of the
corpora."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from visling.data.annotations.captions import CaptionRecord
from visling.data.annotations.lxmert import LxmertRecord
from visling.data.answers import AnswerVocabulary
from visling.data.batches.collate import Collator
from visling.data.batches.loader import Loader
from visling.data.corpora.captions import SingleCaption
from visling.data.corpora.mixture import Labelled, Mixture
from visling.data.corpora.questions import LxmertSentences
from visling.data.text import TextLayout, Tokenizer
from visling.objectives.image_qa import ImageQA
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs.question_scores import AnsweredQuestions
from visling.types import Dims, InputSpec, RegionArray

TOKENIZER, SPEC = Tokenizer(), InputSpec(feature_size=2, max_tokens=20)
LAYOUT = TextLayout(TOKENIZER, SPEC)
TABLE = AnswerVocabulary(["2", "no", "yes"])
IMAGES = tuple("abcdef")


def question(number: int, source: str, **scores: float) -> LxmertRecord:
    return LxmertRecord(
        id=str(number),
        images=(IMAGES[number % len(IMAGES)],),
        sentence=f"is it {number}?",
        source=source,
        scores=scores,
    )


VQA = [question(number, "vqa", yes=0.3 if number % 2 else 1.0, No=0.6) for number in range(6)]
GQA = [question(0, "gqa", yes=1.0), question(1, "gqa", Two=1.0), question(2, "gqa", seldom=1.0), question(3, "gqa")]
CAPTIONS = [CaptionRecord(id=f"c{number}", images=(IMAGES[number],), caption=f"a {number}") for number in range(5)]


@pytest.fixture
def store(tmp_path: Path) -> NativeStore:
    with StoreWriter(tmp_path / "store", feature_size=2, fingerprint="test") as writer:
        for image in IMAGES:
            writer.add(
                image,
                RegionArray(
                    features=np.ones((1, 2), np.float16), boxes=np.array([[0, 0, 5, 5]], np.float32), size=(10, 10)
                ),
            )
    return NativeStore.open(tmp_path / "store")


class Model:
    """An objective that always gives the same answer."""

    def __init__(self, answer: str) -> None:
        self.objective = ImageQA(
            Dims(text=4, regions=4, pooled=4), "gelu_norm", nn.Embedding(2, 4), num_answers=len(TABLE)
        ).eval()
        number = TABLE.index(answer)
        assert number is not None
        with torch.no_grad():
            for parameter in self.objective.parameters():
                parameter.zero_()
            self.objective.head.get_parameter("linear.bias")[number] = 1.0

    def __call__(self, rows: int) -> Tensor:
        found: Tensor = self.objective.head(torch.zeros(rows, 4))
        return found


def score(
    store: NativeStore, answer: str, source: Mixture, *, size: int = 3, shuffle: bool = False
) -> dict[str, float]:
    model = Model(answer)
    loader = Loader(source, Collator(store, SPEC, TOKENIZER), batch_size=size, seed=1, shuffle=shuffle, drop_last=False)
    with AnsweredQuestions(model.objective, loader, source, TABLE) as asked:
        for batch, _ in asked:
            model(len(batch.text.ids))
    found = asked.scores()
    model(1)  # nobody listens any more
    assert asked.scores() == found
    return found


def mixture(*, wrong: float | None = None, weights: tuple[float, ...] | None = None) -> Mixture:
    sources = [LxmertSentences(records, LAYOUT, answers=TABLE, false_sentence_ratio=wrong) for records in (VQA, GQA)]
    captions = SingleCaption(CAPTIONS, LAYOUT, false_caption_ratio=None if wrong is None else 0.5)
    return Mixture([Labelled(source, ("matched", "answer")) for source in (*sources, captions)], weights)


def test_every_question_counts_by_its_data_set(store: NativeStore) -> None:
    vqa = (3 * 1.0 + 3 * 0.3) / 6
    expected = {"image_qa_score": (6 * vqa + 1) / 10, "image_qa_score_gqa": 1 / 4, "image_qa_score_vqa": vqa}
    assert score(store, "yes", mixture()) == pytest.approx(expected)
    assert score(store, "yes", mixture(), size=4, shuffle=True) == pytest.approx(expected), "whatever the order"
    assert score(store, "2", mixture()) == pytest.approx(
        {"image_qa_score": 0.1, "image_qa_score_gqa": 0.25, "image_qa_score_vqa": 0.0}
    )
    assert score(store, "no", mixture())["image_qa_score_vqa"] == pytest.approx(0.6), (
        "answers are spelled the table's way"
    )


def test_weights_count(store: NativeStore) -> None:
    assert score(store, "yes", mixture(weights=(1, 3, 1)))["image_qa_score"] == pytest.approx((3 * 1.3 + 3) / 18)
    part = score(store, "yes", mixture(weights=(0.5, 1, 1)))
    assert round(part["image_qa_score_vqa"] * 3, 6) in (0.9, 1.6, 2.3, 3.0), "three drawn questions"


def test_questions_with_the_sentence_of_another_image_are_left_out(store: NativeStore) -> None:
    source = mixture(wrong=0.5)
    loader = Loader(source, Collator(store, SPEC, TOKENIZER), batch_size=1, seed=1, shuffle=False, drop_last=False)
    own = [int(targets.matched) == 1 for _, targets in loader if targets.matched is not None]
    kept = [
        scores.get("yes", 0.0)
        for scores, shown in zip([record.scores or {} for record in (*VQA, *GQA)], own, strict=False)
        if shown
    ]
    assert 0 < len(kept) < 10
    assert score(store, "yes", source)["image_qa_score"] == pytest.approx(sum(kept) / len(kept))


def test_captions_alone_have_no_score(store: NativeStore) -> None:
    captions = Mixture([Labelled(SingleCaption(CAPTIONS, LAYOUT), ("matched", "answer"))])
    assert score(store, "yes", captions) == {}
