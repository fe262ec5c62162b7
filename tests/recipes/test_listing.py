"""The list of recipes, read from source files, is that of the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from visling.recipes import multitask
from visling.recipes.listing import list_published, list_recipes
from visling.recipes.tables import (
    FINETUNING,
    MULTITASK,
    PRETRAINING,
    PUBLISHED_FINETUNING,
    PUBLISHED_PRETRAINING,
    summarise,
)


@pytest.mark.parametrize(
    ("verb", "table"), [("pretrain", PRETRAINING), ("finetune", FINETUNING), ("multitask", MULTITASK)]
)
def test_the_list_is_that_of_the_tables(verb: str, table: Mapping[str, Callable[[], Any]]) -> None:
    described = {name: summarise(recipe) for name, recipe in table.items()}
    assert list(list_recipes()[verb].items()) == list(described.items()), (
        "a table is written in a form that recipes/listing.py does not follow"
    )
    assert all(described.values())


def test_the_list_knows_the_published_recipes() -> None:
    assert list_published() == {
        "pretrain": set(PUBLISHED_PRETRAINING),
        "finetune": set(PUBLISHED_FINETUNING),
        "multitask": set(multitask.PUBLISHED),
    }
