"""An evaluated run with its model, regions and annotations, so that it can be asked about its examples again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from visling import models, runtime
from visling.analysis.examples import Row, find_image_files, list_images, split_choices
from visling.analysis.question import Prepared, Question
from visling.data.annotations.tables import Table
from visling.data.batches.collate import Collator
from visling.data.batches.pixels import Pictures
from visling.data.text import TextLayout, Tokenizer
from visling.errors import DataError, RunError, StoreError
from visling.models.task_model import TaskModel
from visling.nn.extraction import extract_features
from visling.pretrained.features import check_features
from visling.pretrained.folder import ModelFolder, read_model_folder
from visling.regions.store import NativeStore
from visling.tasks.base import Task, TaskSource, TextOnly, read_records
from visling.types import Batch, Example, InputSpec, Prediction, Record, RegionStore
from visling.vision.images import read_image
from visling.vision.pictures import PictureFiles

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
class OpenedRun:
    """A run's model with what it was evaluated on."""

    saved: ModelFolder
    model: TaskModel
    """On its device, in evaluation mode."""
    task: Task[Any, Any]
    spec: InputSpec
    tokenizer: Tokenizer
    records: Mapping[str, Record]
    """Annotations of the split by id."""
    store: RegionStore | None
    """None of a model of the words alone."""
    pictures: Pictures | None
    """Of a model that computes the features of regions itself."""
    device: torch.device

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
        layout = TextLayout(self.tokenizer, self.spec, task_token=self.saved.task_token)
        source = TaskSource(self.task, records, layout)
        shown = source if sees else TextOnly(source)
        draws = [runtime.generator_for(0) for _ in records]
        examples = [shown.example(number, draw) for number, draw in enumerate(draws)]
        store, pictures = (self.store, self.pictures) if sees else (None, None)
        collate = Collator(store, self.spec, self.tokenizer, pictures=pictures)
        batch = collate(examples, draws)[0].to(self.device)
        with torch.no_grad():
            batch, _ = extract_features(self.model.extractor, batch)
        return Asked(records=records, examples=examples, batch=batch.unshared(), truncated=layout.truncated > 0)


def open_run(
    run: Path,
    about: Mapping[str, Any],
    split: str,
    rows: Sequence[Row],
    *,
    task: str | None = None,
    data: Path | None = None,
    store: RegionStore | None = None,
    images: Path | None = None,
    other_features: bool = False,
    device: str = "cpu",
) -> OpenedRun:
    """Open a run to ask about some of its examples.

    Args:
        about: contents of run.json; of a model of several tasks, those of its task.
        rows: of the details that are asked about.
        task: of a model of several tasks: the name of the one that is meant.
        data: folder of annotations; None = the folder or the file that the run was trained on.
        store: regions; None opens the store that the run was validated on.
        images: folder of the images; read for a model that computes the features of regions itself.
        other_features: accept features of another detector.
    Raises:
        CheckpointError, ConfigError, DataError, StoreError: the model, the annotations or the regions cannot be read.
        RunError: run.json does not say where the annotations or the regions are.
    """
    saved = read_model_folder(run).for_task(task)
    model, made = saved.task_model()
    target = runtime.pick_device(device)
    if saved.text_only:
        store = None
    elif store is None:
        store = _open_store(about)
    if isinstance(store, NativeStore):
        check_features(saved, store, override=other_features, extracts=saved.extractor is not None)
    pictures = None
    if saved.extractor is not None:
        wanted = {image for row in rows for image in list_images(row)}
        pictures = PictureFiles(find_image_files(images, wanted), saved.extractor)
    return OpenedRun(
        saved=saved,
        model=model.to(target).eval(),
        task=made,
        spec=models.spec(saved.model).inputs(saved.config),
        tokenizer=Tokenizer(str(saved.path / "vocab.txt")),
        records={record.id: record for record in _read_records(made, about, split, data)},
        store=store,
        pictures=pictures,
        device=target,
    )


def _open_image(file: Path | None, size: tuple[int, int]) -> Image.Image:
    """An image at the size in which its boxes are given; grey where it cannot be read."""
    if file is not None:
        try:
            return Image.fromarray(read_image(file))
        except DataError:
            pass
    return Image.new("RGB", size, _NO_PICTURE)


def _open_store(about: Mapping[str, Any]) -> NativeStore:
    named = about.get("valid_store") or about.get("store")
    if not isinstance(named, str):
        raise RunError("run.json names no region store. Name it with --store.")
    if not Path(named).is_dir():
        raise StoreError("the region store that run.json names is gone. Name it with --store.")
    return NativeStore.open(Path(named))


def _read_records(task: Task[Any, Any], about: Mapping[str, Any], split: str, folder: Path | None) -> Sequence[Record]:
    """Annotations of a split of a folder; None = of the folder, or of the file of one's own, that the run names."""
    if folder is not None:
        return read_records(task, folder, split)
    files = about.get("files")
    if isinstance(files, Mapping):
        # The examples that were held out for validation are in the training file, under the same ids.
        named = files.get(split) if isinstance(files.get(split), str) else files.get("train" if split in files else "")
        if not isinstance(named, str):
            raise RunError(
                f"run.json names no file of the split {split!r}: the run was evaluated on another file, which it does "
                "not remember."
            )
        table = Table(Path(named))
        records = task.read_table(table)
        table.problems.refuse()
        return records
    data = about.get("data")
    if not isinstance(data, list) or not data:
        raise RunError("run.json does not say where the annotations are. Name their folder with --data.")
    if not Path(data[0]).is_dir():
        raise DataError("the annotations that run.json names are gone. Name their folder with --data.")
    return read_records(task, Path(data[0]), split)
