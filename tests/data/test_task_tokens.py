"""The number of the task that texts name: through layout and collate, for every kind of row."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from visling import runtime
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.errors import ConfigError, DataError
from visling.types import Example, InputSpec

SPEC = InputSpec(num_tasks=4, max_tokens=12)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer("bert-base-uncased")


def test_every_row_of_a_layout_names_its_task(tokenizer: Tokenizer) -> None:
    layout = TextLayout(tokenizer, SPEC, task_token=3)
    rows = (
        layout.row("a red star"),
        layout.row("what is it", answer=True),
        layout.row("a red star", "on the left"),
        layout.row("a very long text that does not fit into the row, and has to be cut"),
        layout.named([("stars", 0), ("shine", None)], [("here", None)]),
    )
    assert [row.task for row in rows] == [3] * len(rows)
    without = TextLayout(tokenizer, dataclasses.replace(SPEC, num_tasks=0))
    assert without.row("a red star").task is None


def test_a_batch_has_the_number_of_each_row(tokenizer: Tokenizer) -> None:
    layouts = [TextLayout(tokenizer, SPEC, task_token=token) for token in (0, 2)]
    examples = [
        Example(id=str(number), rows=(layout.row("a star"), layout.row("no star")), images=())
        for number, layout in enumerate(layouts)
    ]
    rngs = [runtime.generator_for(0)] * 2
    batch, _ = Collator(None, SPEC, tokenizer)(examples, rngs)
    assert batch.text.task is not None
    assert torch.equal(batch.text.task, torch.tensor([0, 0, 2, 2]))
    bare = dataclasses.replace(examples[1], rows=tuple(dataclasses.replace(row, task=None) for row in examples[1].rows))
    with pytest.raises(DataError, match="2 of 4 rows have a task: one batch holds rows with one or rows without"):
        Collator(None, SPEC, tokenizer)([examples[0], bare], rngs)


@pytest.mark.parametrize(
    ("num_tasks", "token", "message"),
    [
        (4, None, "every text must name its task, and this run names none"),
        (0, 1, "the model has no task tokens"),
        (4, 4, "must be a number from 0 to 3"),
        (4, -1, "must be a number from 0 to 3"),
    ],
)
def test_a_number_that_does_not_belong_to_the_model(
    tokenizer: Tokenizer, num_tasks: int, token: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TextLayout(tokenizer, dataclasses.replace(SPEC, num_tasks=num_tasks), task_token=token)
