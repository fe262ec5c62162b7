"""Many examples at once equal the same ones one by one: texts, pairing, cutting, masking, labels, in every order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch

from visling.data.annotations.captions import CaptionRecord
from visling.data.annotations.lxmert import LxmertRecord
from visling.data.answers import AnswerVocabulary
from visling.data.batches.collate import Collator
from visling.data.batches.examples import BatchSource, ExampleBatch, Source
from visling.data.batches.loader import Loader
from visling.data.batches.masking import TokenMasking
from visling.data.corpora.base import RecordSource
from visling.data.corpora.captions import CaptionPairs, SingleCaption, VilbertCaptions
from visling.data.corpora.mixture import Labelled, Mixture
from visling.data.corpora.questions import LxmertSentences
from visling.data.text import TextLayout, Tokenizer
from visling.draws import KeyedDraws, Stream
from visling.errors import DataError
from visling.types import Batch, Example, InputSpec, Record, Targets

TOKENIZER = Tokenizer()
SPEC = InputSpec(max_tokens=24)
WORDS = ["cat", "unaffable", "a", "running!", "café-crème", "on", "42", "日本語", "x" * 101]


def sentence(number: int) -> str:
    """Of 1 to 300 words: rows are cut at either end, or not at all."""
    length = 300 if number == 7 else 1 + number * 5 % 31
    return " ".join(WORDS[(number + at * at) % len(WORDS)] for at in range(length))


CAPTIONS = [CaptionRecord(id=str(n), images=(f"image {n // 3}",), caption=sentence(n)) for n in range(40)]
QUESTIONS = [
    LxmertRecord(
        id=f"q{n}",
        images=(f"image {n // 4}",),
        sentence=sentence(n + 1),
        source="vqa",
        scores=[None, {}, {"yes": 1.0}, {"yes": 0.3, "no": 0.6, "red": 0.9}, {"unlisted": 1.0}][n % 5],
    )
    for n in range(30)
]
ANSWERS = AnswerVocabulary(["no", "red", "yes"])


@dataclass(frozen=True)
class Single:
    """A source of which only single examples are known."""

    source: Source

    @property
    def records(self) -> Sequence[Record]:
        return cast(RecordSource, self.source).records

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        return self.source.example(index, rng)


def sources(layout: TextLayout) -> dict[str, BatchSource]:
    """One of every kind that makes many examples at once."""
    questions = LxmertSentences(QUESTIONS, layout, answers=ANSWERS)
    both = [Labelled(source, ("matched", "answer")) for source in (SingleCaption(CAPTIONS, layout), questions)]
    return {
        "pairs": CaptionPairs(CAPTIONS, layout),
        "single": SingleCaption(CAPTIONS, layout),
        "true": SingleCaption(CAPTIONS, layout, false_caption_ratio=None),
        "vilbert": VilbertCaptions(CAPTIONS, layout),
        "vilbert pool": VilbertCaptions(CAPTIONS, layout, pool=[sentence(n + 3) for n in range(50)], keep_above=False),
        "questions": questions,
        "captions without matching": LxmertSentences(QUESTIONS, layout, false_sentence_ratio=None),
        "lxmert": Mixture(both, [1.0, 1.0]),
        "parts of passes": Mixture(both, [0.4, 2.6]),
        "pairs and single": Mixture([CaptionPairs(CAPTIONS, layout), SingleCaption(CAPTIONS, layout)]),
        "with single examples": Mixture([Single(CaptionPairs(CAPTIONS, layout)), SingleCaption(CAPTIONS, layout)]),
        "labelled single examples": Labelled(Single(questions), ("matched", "answer")),
    }


NAMES = sorted(sources(TextLayout(TOKENIZER, SPEC)))


def make(source: BatchSource, indices: Sequence[int]) -> tuple[Sequence[Example], Sequence[Example]]:
    """The examples in a batch and one by one."""
    draws = KeyedDraws(3, 2, indices)
    choices = [source.choose(index, rng) for index, rng in zip(indices, draws.each(Stream.EXAMPLE), strict=True)]
    examples = source.lay_out(choices)
    assert source.measure(choices).tolist() == [len(example.rows[0].ids) for example in examples]
    singles = [source.example(index, rng) for index, rng in zip(indices, draws.generators(Stream.EXAMPLE), strict=True)]
    return examples, singles


def describe(example: Example) -> tuple[Any, ...]:
    """All that an example says, in comparable form."""
    rows = []
    for row in example.rows:
        assert row.words is not None
        assert row.ids.dtype == row.segments.dtype == row.words.dtype == np.int64
        rows.append((row.ids.tolist(), row.segments.tolist(), row.words.tolist(), row.answer_at, row.task, row.links))
    assert example.region_labels is None
    return example.id, rows, example.images, dict(example.labels)


@pytest.mark.parametrize("cut", ["release", "exact"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_single_examples(name: str, cut: Any) -> None:
    layout = TextLayout(TOKENIZER, SPEC, cut=cut)
    source = sources(layout)[name]
    indices = np.random.default_rng(1).permutation(len(source)).tolist()
    examples, singles = make(source, indices)
    assert [describe(example) for example in examples] == [describe(example) for example in singles]


@pytest.mark.parametrize("name", ["pairs", "single"])
def test_cut_rows_are_counted_in_both_ways(name: str) -> None:
    layouts = [TextLayout(TOKENIZER, SPEC) for _ in range(2)]
    many, single = (sources(layout)[name] for layout in layouts)
    draws = KeyedDraws(3, 2, range(len(many)))
    choices = [many.choose(index, rng) for index, rng in enumerate(draws.each(Stream.EXAMPLE))]
    many.measure(choices)
    assert layouts[0].truncated == 0, "measuring lays nothing out"
    many.lay_out(choices)
    for index, rng in enumerate(draws.each(Stream.EXAMPLE)):
        single.example(index, rng)
    assert layouts[0].truncated == layouts[1].truncated > 0


def test_a_model_with_task_tokens_reads_its_task() -> None:
    spec = InputSpec(max_tokens=24, num_tasks=3)
    examples, singles = make(CaptionPairs(CAPTIONS, TextLayout(TOKENIZER, spec, task_token=2)), [4, 1])
    assert [example.rows[0].task for example in examples] == [2, 2] == [example.rows[0].task for example in singles]
    batch, _ = Collator(None, spec, TOKENIZER)(examples, KeyedDraws(0, 0, [4, 1]))
    assert batch.text.task is not None
    assert batch.text.task.tolist() == [2, 2]


@pytest.mark.parametrize("at", [0, 1])
def test_an_empty_caption_is_refused_as_by_itself(at: int) -> None:
    layout = TextLayout(TOKENIZER, SPEC)
    records = [CaptionRecord(id=str(n), images=(str(n),), caption="" if n == 3 else "a cat") for n in range(5)]
    source = CaptionPairs(records, layout)
    choices = [source.choose(index, np.random.default_rng(index)) for index in range(5)]
    wrong = next(choice for choice in choices if choice.texts[at] == 3)
    for make_them in (source.measure, source.lay_out):
        with pytest.raises(DataError, match=rf"the {'second ' if at else ''}text is empty: found ''"):
            make_them([choices[0], wrong] if 3 not in choices[0].texts else [wrong])


MASKINGS = {
    "pieces": TokenMasking(rate=0.4),
    "words": TokenMasking(rate=0.4, whole_word=True),
    "pieces in turn": TokenMasking(rate=0.4, in_turn=True),
    "words in turn": TokenMasking(rate=0.4, whole_word=True, in_turn=True),
    "matched only": TokenMasking(rate=0.4, mismatched=False),
    "none": None,
}


def leaves(contract: Batch | Targets) -> list[Any]:
    return [
        leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in torch.utils._pytree.tree_leaves(contract)
    ]


@pytest.mark.parametrize("bucket", [1, 4])
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("name", ["pairs", "lxmert", "parts of passes", "vilbert pool"])
def test_loaded_batches_equal_those_of_single_examples(name: str, masking: str, bucket: int) -> None:
    batches = []
    for wrap in (lambda source: source, Single):
        source: Source = wrap(sources(TextLayout(TOKENIZER, SPEC))[name])
        collator = Collator(None, SPEC, TOKENIZER, masking=MASKINGS[masking])
        loader = Loader(source, collator, batch_size=8, seed=5, bucket=bucket, prefetch=0, drop_last=False)
        loader.epoch = 2
        batches.append(
            [(index.tolist(), leaves(batch), leaves(targets)) for index, batch, targets in loader.batches_with_index()]
        )
    assert batches[0] == batches[1]


@pytest.mark.parametrize("masking", ["pieces", "words", "words in turn"])
def test_masks_do_not_depend_on_the_batch(masking: str) -> None:
    source = sources(TextLayout(TOKENIZER, SPEC))["pairs"]
    collator = Collator(None, SPEC, TOKENIZER, masking=MASKINGS[masking])

    def hide(indices: Sequence[int]) -> dict[int, list[int]]:
        batch, _ = collator(make(source, indices)[0], KeyedDraws(3, 2, indices))
        rows = zip(indices, batch.text.ids, batch.text.mask, strict=True)
        return {index: ids[real].tolist() for index, ids, real in rows}

    together = hide(range(40))
    assert together == {index: hide([index])[index] for index in range(40)}
    assert any(TOKENIZER.mask in ids for ids in together.values())


def test_a_batch_makes_examples_only_for_those_who_ask() -> None:
    examples, singles = make(sources(TextLayout(TOKENIZER, SPEC))["single"], range(6))
    assert isinstance(examples, ExampleBatch)
    assert [describe(example) for example in examples[2:]] == [describe(example) for example in singles[2:]]
    assert describe(examples[-1]) == describe(singles[-1])
    with pytest.raises(IndexError):
        examples[6]
