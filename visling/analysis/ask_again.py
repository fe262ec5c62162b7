"""A trained model with its regions and annotations, to be asked again about examples that its details list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from visling import runtime
from visling.analysis.examples import Row, split_choices
from visling.analysis.question import Prepared, Question
from visling.data.batches.collate import Collator
from visling.data.batches.pixels import Pictures
from visling.data.text import TextLayout, Tokenizer
from visling.errors import DataError
from visling.models.task_model import TaskModel
from visling.nn.extraction import extract_features
from visling.pretrained.folder import ModelFolder
from visling.tasks.base import Task, TaskSource, TextOnly
from visling.types import Batch, Example, Prediction, Record, RegionStore
from visling.vision.images import read_image

_POINTING = ("regions", "slots_regions", "region_targets")
"""Kinds of heads that have no output where there is no region."""
_NO_PICTURE = (200, 200, 200)
"""Colour in place of an image that is absent."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Examples as the model reads them."""

    records: Sequence[Record]
    examples: Sequence[Example]
    batch: Batch
    """Each row with its own text and regions, on the model's device; features are computed."""
    truncated: bool
    """Whether a text was longer than the model reads and was cut."""


@dataclass(frozen=True, kw_only=True)
class AskAgain:
    """A run's model and the examples that it was evaluated on; `runs.examples.open_run` reads what it is made of."""

    saved: ModelFolder
    model: TaskModel
    """On its device, in evaluation mode."""
    task: Task[Any, Any]
    layout: TextLayout
    records: Mapping[str, Record]
    """Annotations of the split by id."""
    store: RegionStore | None
    """None of a model of the words alone."""
    pictures: Pictures | None
    """Of a model that computes the features of regions itself."""
    device: torch.device

    @property
    def tokenizer(self) -> Tokenizer:
        """That of its texts."""
        return self.layout.tokenizer

    @property
    def answers_blind(self) -> bool:
        """Whether the model has an answer where it sees no image; what points at regions, or ranks images, has none."""
        return self.task.all_pairs() is None and not any(kind in _POINTING for kind in self.model.kinds.values())

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the detector's classes."""
        return getattr(self.store, "class_names", ())

    @property
    def attribute_names(self) -> Sequence[str]:
        """Names of the detector's attributes."""
        return getattr(self.store, "attribute_names", ())

    def prepare(self, row: Row, images: Mapping[str, Path]) -> Prepared:
        """The example of a row of the details, as the model reads it.

        Args:
            images: files by image id; in place of one that is absent or damaged there is a grey area of its size.
        Raises:
            DataError: the annotations do not have it.
        """
        asked = self.ask([row])
        text, choices = split_choices(row)
        (record,), (example,) = asked.records, asked.examples
        regions = tuple(self.store[image] for image in example.images) if self.store is not None else ()
        pictures = tuple(
            _open_image(images.get(image), found.size) for image, found in zip(example.images, regions, strict=True)
        )
        return Prepared(
            question=Question(pictures, text, choices if self.task.choices else ()),
            record=record,
            example=example,
            batch=asked.batch,
            regions=regions,
            images=pictures,
            truncated=asked.truncated,
        )

    def predict(self, rows: Sequence[Row], *, blind: bool = False) -> list[Prediction]:
        """What the model answers to the examples of some rows; see `ask`."""
        asked = self.ask(rows, blind=blind)
        with torch.inference_mode():
            return self.task.decode(self.model(asked.batch), asked.batch, asked.records)

    def ask(self, rows: Sequence[Row], *, blind: bool = False) -> Asked:
        """The examples of some rows of the details, in their order.

        Args:
            blind: without their images.
        Raises:
            DataError: the annotations do not have one of them.
        """
        ids = [str(row.get("id")) for row in rows]
        if lacking := [name for name in ids if name not in self.records]:
            raise DataError(
                f"the annotations have no example {lacking[0]!r}, which the details name: they have changed since the "
                "run was evaluated. Evaluate it again with --overwrite."
            )
        records = [self.records[name] for name in ids]
        sees = self.store is not None and not blind
        layout = TextLayout(self.tokenizer, self.layout.spec, task_token=self.saved.task_token)
        source = TaskSource(self.task, records, layout)
        shown = source if sees else TextOnly(source)
        draws = [runtime.generator_for(0) for _ in records]
        examples = [shown.example(number, draw) for number, draw in enumerate(draws)]
        store, pictures = (self.store, self.pictures) if sees else (None, None)
        collate = Collator(store, self.layout.spec, self.tokenizer, pictures=pictures)
        batch = collate(examples, draws)[0].to(self.device)
        with torch.no_grad():
            batch, _ = extract_features(self.model.extractor, batch)
        return Asked(records=records, examples=examples, batch=batch.unshared(), truncated=layout.truncated > 0)


def _open_image(file: Path | None, size: tuple[int, int]) -> Image.Image:
    """An image at the size in which its boxes are given; grey where it cannot be read."""
    if file is not None:
        try:
            return Image.fromarray(read_image(file))
        except DataError:
            pass
    return Image.new("RGB", size, _NO_PICTURE)
