"""Sentences that are true or false of their images, as a model is shown them."""

from __future__ import annotations

from fixtures.corpus_draws import LAYOUT, TOKENIZER

from visling.data.batches.masking import TokenMasking, mask_tokens
from visling.data.corpora.base import SentenceRecord
from visling.data.corpora.statements import LabelledSentences
from visling.data.text import TextLayout
from visling.runtime import generator_for
from visling.types import IGNORE, InputSpec


def test_labelled_sentences() -> None:
    records = [
        SentenceRecord(id="a", images=("x",), sentence="true", label=True),
        SentenceRecord(id="b", images=("x", "y"), sentence="false", label=False),
        SentenceRecord(id="c", images=("x",), sentence="hidden", label=None),
    ]
    made = [LabelledSentences(records, LAYOUT).example(index, generator_for(0)) for index in range(3)]
    assert [example.labels for example in made] == [{"matched": 1}, {"matched": 0}, {"matched": IGNORE}]
    assert [len(example.rows) for example in made] == [1, 2, 1]
    joined = TextLayout(TOKENIZER, InputSpec(pair="sequence"))
    assert len(LabelledSentences(records, joined).example(1, generator_for(0)).rows) == 1


def test_labelled_sentences_can_stay_unmasked() -> None:
    records = [SentenceRecord(id="a", images=("x",), sentence="there is a red star", label=True)]
    everything = TokenMasking(rate=1.0)
    for masked, chosen in ((True, 5), (False, 0)):
        row = LabelledSentences(records, LAYOUT, masked=masked).example(0, generator_for(0)).rows[0]
        assert len(mask_tokens(row, everything, TOKENIZER, generator_for(0))[1]) == chosen
