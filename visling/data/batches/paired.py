"""Batches of sentences about images, each with a batch of text alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

from visling.data.batches.loader import Loader
from visling.types import Batch, Targets

Pair = tuple[Batch, Targets]


class PairedLoader:
    """Iterates over one epoch's pairs of pairs: batch and targets with images, batch and targets of text alone.

    The images define the epoch. Text continues across epochs and starts over, in another order, whenever it is
    exhausted; which text meets a batch of images follows from the number of batches before, so that a restart sees the
    same.

    Source:
        VL-BERT release, `MultiTaskDataLoader`.
    """

    def __init__(self, images: Loader, text: Loader) -> None:
        self.images, self.text = images, text
        self._start = 0

    @property
    def epoch(self) -> int:
        """The pass over the images that the next iteration makes."""
        return self.images.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        if value != self.images.epoch:
            self.images.epoch, self._start = value, 0

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[tuple[Pair, Pair]]:
        start, self._start = self._start, 0
        text = self._text_from(self.epoch * len(self.images) + start)
        images = iter(self.images)
        try:
            for pair in images:
                yield pair, next(text)
        finally:
            text.close()
            if isinstance(images, Generator):
                images.close()

    def state_dict(self) -> dict[str, Any]:
        """Position within the images, and what the order of both depends on."""
        return {"images": self.images.state_dict(), "text": self.text.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state_dict` was taken.

        Raises:
            ConfigError: the state belongs to another seed, number of examples or batch size.
        """
        self.text.load_state_dict(state["text"])
        self.images.load_state_dict(state["images"])
        self._start = self.images.position

    def _text_from(self, number: int) -> Generator[Pair, None, None]:
        """Text batches from number `number` on, counted over all epochs; without end."""
        epoch, batches = divmod(number, len(self.text))
        while True:
            self.text.move_to(epoch, batches)
            yield from self.text
            epoch, batches = epoch + 1, 0
