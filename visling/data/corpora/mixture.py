"""Several sources of examples as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from visling.data.batches.loader import Source
from visling.data.corpora.base import RecordSource
from visling.errors import ConfigError
from visling.types import IGNORE, Example, Record


class Labelled:
    """A source whose examples have all of some labels, IGNORE where they lack one: a batch of captions alone has them
    too."""

    def __init__(self, source: RecordSource, names: Sequence[str]) -> None:
        self.source, self.names = source, names

    @property
    def records(self) -> Sequence[Record]:
        """Annotations of the examples."""
        return self.source.records

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index` with all of the labels."""
        example = self.source.example(index, rng)
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
        self._ends = np.cumsum([round(weight * len(source)) for source, weight in zip(sources, weights, strict=True)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example `index`: numbers run through the sources in order; the part of a pass that is not whole is drawn at
        random."""
        source, number = self._find_source(index, rng)
        return source.example(number, rng)

    def record(self, index: int, rng: np.random.Generator) -> Record:
        """The annotation of which `example` makes example `index` with the same generator; only of sources that have
        annotations."""
        source, number = self._find_source(index, rng)
        return cast(RecordSource, source).records[number]

    def _find_source(self, index: int, rng: np.random.Generator) -> tuple[Source, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        begin, end = (int(self._ends[which - 1]) if which else 0), int(self._ends[which])
        source = self.sources[which]
        within = index - begin
        whole = (end - begin) // len(source) * len(source)
        return source, within % len(source) if within < whole else int(rng.integers(len(source)))
