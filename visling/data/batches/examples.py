"""Examples in batches: sources that choose what examples show one by one, and lay out the texts of many at once.

Shapes   N examples of one row each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from visling.data.text_arrays import TextRows, merge_rows
from visling.types import IGNORE, Example


class Source(Protocol):
    """Examples by number; randomness comes only from the generator passed in."""

    def __len__(self) -> int: ...
    def example(self, index: int, rng: np.random.Generator) -> Example: ...


@runtime_checkable
class BatchSource(Source, Protocol):
    """A source that also makes many examples at once: `lay_out` of what `choose` returns for each equals what `example`
    returns for them, given the same generators."""

    def prepare(self) -> None:
        """Do what is done once before the first example."""

    def choose(self, index: int, rng: np.random.Generator) -> Any:
        """Draw what example `index` shows."""

    def measure(self, choices: Sequence[Any]) -> NDArray[np.int64]:
        """(N,) word pieces of the longest row of each example."""

    def lay_out(self, choices: Sequence[Any]) -> Sequence[Example]:
        """The examples."""


@dataclass(frozen=True)
class OneByOne:
    """A source that knows only single examples, as a `BatchSource`."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def prepare(self) -> None:
        """Nothing is done ahead."""

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`."""
        return self.source.example(index, rng)

    def choose(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`, which is its own choice."""
        return self.source.example(index, rng)

    def measure(self, choices: Sequence[Example]) -> NDArray[np.int64]:
        """See `BatchSource`."""
        return np.array([max(len(row.ids) for row in example.rows) for example in choices], np.int64)

    def lay_out(self, choices: Sequence[Example]) -> Sequence[Example]:
        """See `BatchSource`."""
        return choices


def as_batch_source(source: Source) -> BatchSource:
    """A source as it is, if it makes many examples at once, else `OneByOne`."""
    return source if isinstance(source, BatchSource) else OneByOne(source)


class ExampleBatch(Sequence[Example]):
    """Examples of one row each as arrays; an `Example` is made only for those who ask for one.

    Args:
        ids, images: of each example.
        labels: name -> (N,) integers.
    """

    def __init__(
        self,
        *,
        ids: Sequence[str],
        images: Sequence[tuple[str, ...]],
        rows: TextRows,
        labels: Mapping[str, NDArray[np.int64]],
    ) -> None:
        self.ids, self.images, self.rows, self.labels = ids, images, rows, labels

    def __len__(self) -> int:
        return len(self.ids)

    def with_labels(self, labels: Mapping[str, NDArray[np.int64]]) -> ExampleBatch:
        """The same examples with other labels."""
        return ExampleBatch(ids=self.ids, images=self.images, rows=self.rows, labels=labels)

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Example]: ...
    def __getitem__(self, number: int | slice) -> Example | Sequence[Example]:
        if isinstance(number, slice):
            return [self[at] for at in range(len(self))[number]]
        at = range(len(self))[number]
        return Example(
            id=self.ids[at],
            rows=(self.rows.row(at),),
            images=self.images[at],
            labels={name: int(values[at]) for name, values in self.labels.items()},
        )


def list_images(examples: Sequence[Example]) -> Sequence[tuple[str, ...]]:
    """The images of each example."""
    return examples.images if isinstance(examples, ExampleBatch) else [example.images for example in examples]


def offer_any(examples: Sequence[Example], name: str) -> bool:
    """Whether any example has this function of its regions (`region_labels`, `chosen_regions`, ...)."""
    return not isinstance(examples, ExampleBatch) and any(getattr(example, name) is not None for example in examples)


def merge_examples(parts: Sequence[Sequence[Example]], order: NDArray[np.int64]) -> Sequence[Example]:
    """Examples of several parts as one: example i of the result is example `order[i]` of the parts laid end to end. A
    label that a part lacks is IGNORE there."""
    batches = [part for part in parts if isinstance(part, ExampleBatch)]
    if len(batches) < len(parts):
        examples = [example for part in parts for example in part]
        return [examples[at] for at in order.tolist()]
    ids, images = ([item for part in batches for item in getattr(part, name)] for name in ("ids", "images"))
    names = dict.fromkeys(name for part in batches for name in part.labels)
    labels = {
        name: np.concatenate([part.labels.get(name, np.full(len(part), IGNORE)) for part in batches])[order]
        for name in names
    }
    return ExampleBatch(
        ids=[ids[at] for at in order.tolist()],
        images=[images[at] for at in order.tolist()],
        rows=merge_rows([part.rows for part in batches], order),
        labels=labels,
    )
