"""Several sources of examples as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from visling.data.batches.examples import ExampleBatch, Source, as_batch_source, merge_examples
from visling.data.corpora.base import RecordSource
from visling.errors import ConfigError
from visling.types import IGNORE, Example, Record


class Labelled:
    """A source whose examples have all of some labels, IGNORE where they lack one: a batch of captions alone has them
    too."""

    def __init__(self, source: RecordSource, names: Sequence[str]) -> None:
        self.source, self.names = source, names
        self._batches = as_batch_source(source)

    @property
    def records(self) -> Sequence[Record]:
        """Annotations of the examples."""
        return self.source.records

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index` with all of the labels."""
        return self._add_labels(self.source.example(index, rng))

    def prepare(self) -> None:
        """See `BatchSource`, also below."""
        self._batches.prepare()

    def choose(self, index: int, rng: np.random.Generator) -> Any:
        """What the source chooses."""
        return self._batches.choose(index, rng)

    def measure(self, choices: Sequence[Any]) -> NDArray[np.int64]:
        """(N,) word pieces of the longest row of each example."""
        return self._batches.measure(choices)

    def lay_out(self, choices: Sequence[Any]) -> Sequence[Example]:
        """The examples with all of the labels."""
        examples = self._batches.lay_out(choices)
        if not isinstance(examples, ExampleBatch):
            return [self._add_labels(example) for example in examples]
        none = np.full(len(examples), IGNORE)
        return examples.with_labels({**dict.fromkeys(self.names, none), **examples.labels})

    def _add_labels(self, example: Example) -> Example:
        return replace(example, labels={**dict.fromkeys(self.names, IGNORE), **example.labels})


class Mixture:
    """Several sources as one.

    Args:
        weights: passes over each source per epoch, 1 by default: 2 shows every example twice, 0.5 a new random half.
    Raises:
        ConfigError: no source, a weight that is not positive, or not one weight per source.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(sources) if weights is None else weights
        if not sources or len(weights) != len(sources) or min(weights) <= 0:
            raise ConfigError(
                "a mixture needs sources and one positive weight for each; "
                f"found {len(sources)} sources, weights {list(weights)}."
            )
        self.sources = tuple(sources)
        self._batches = [as_batch_source(source) for source in sources]
        sizes = [round(weight * len(source)) for source, weight in zip(sources, weights, strict=True)]
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`: numbers run through the sources in order; the part of a pass that is not whole is drawn at
        random."""
        which, number = self._find_source(index, rng)
        return self.sources[which].example(number, rng)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        """The annotation of which `example` makes example `index` with the same generator; only of sources that have
        annotations."""
        which, number = self._find_source(index, rng)
        return cast(RecordSource, self.sources[which]).records[number]

    def prepare(self) -> None:
        """See `BatchSource`, also below."""
        for source in self._batches:
            source.prepare()

    def choose(self, index: int, rng: np.random.Generator) -> tuple[int, Any]:
        """The number of a source, and what that one chooses."""
        which, number = self._find_source(index, rng)
        return which, self._batches[which].choose(number, rng)

    def measure(self, choices: Sequence[tuple[int, Any]]) -> NDArray[np.int64]:
        """(N,) word pieces of the longest row of each example."""
        parts, order = self._part(choices)
        measured = [self._batches[which].measure(part) for which, part in parts.items()]
        lengths: NDArray[np.int64] = np.concatenate(measured)[order]
        return lengths

    def lay_out(self, choices: Sequence[tuple[int, Any]]) -> Sequence[Example]:
        """The examples."""
        parts, order = self._part(choices)
        return merge_examples([self._batches[which].lay_out(part) for which, part in parts.items()], order)

    def _part(self, choices: Sequence[tuple[int, Any]]) -> tuple[dict[int, list[Any]], NDArray[np.int64]]:
        """The choices of each source that has any, and where in these, laid end to end, each choice is found."""
        parts: dict[int, list[Any]] = {}
        for which, choice in choices:
            parts.setdefault(which, []).append(choice)
        owners = np.array([which for which, _ in choices])
        places = np.concatenate([np.flatnonzero(owners == which) for which in parts])
        return parts, np.argsort(places)

    def _find_source(self, index: int, rng: np.random.Generator) -> tuple[int, int]:
        """A source, and the number of the example in it."""
        which = bisect_right(self._ends, index)
        begin, end = self._ends[which - 1] if which else 0, self._ends[which]
        size = len(self.sources[which])
        within = index - begin
        whole = (end - begin) // size * size
        return which, within % size if within < whole else int(rng.integers(size))
