"""What a task is: records from files, examples for a model, a loss, predictions, and a report in the official numbers.

Shapes   N examples, A outputs.
Scores   In percent everywhere in reports; counts say over how many examples.
"""

from __future__ import annotations

import itertools
import pkgutil
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visling import config as configs
from visling.data.annotations.tables import Table, find_table
from visling.data.answers import AnswerVocabulary
from visling.data.batches.examples import Source
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError, nearest
from visling.types import (
    Batch,
    Example,
    Head,
    Loss,
    Prediction,
    Record,
    RegionArray,
    RegionStore,
    Targets,
    TextRow,
)

R = TypeVar("R", bound=Record)
C = TypeVar("C")
S = TypeVar("S", bound=Record, contravariant=True)


@dataclass(frozen=True, slots=True)
class Score:
    """One number of a report."""

    value: float
    """In percent; ranks and sums of recalls, which say so in their name, are as they are."""
    count: int
    """Examples (or groups of examples) it is the mean of."""
    low: float | None = None
    """Lower end of the 95 % interval, in percent (`tasks.answers.mean_score`); None = not computed."""
    high: float | None = None
    """Upper end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Scores of a task on a split, whole and broken down."""

    scores: Mapping[str, Score]
    by: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    """Category (such as "question_type") -> its value -> score of the main metric."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Choice between official definitions (such as "script") -> the one that was computed ("2021")."""

    def to_dict(self, task: str, split: str) -> dict[str, Any]:
        """Contents of a run folder's `evaluation_{split}.json`."""

        def plain(scores: Mapping[str, Score]) -> dict[str, Any]:
            return {
                name: {key: value for key, value in asdict(score).items() if value is not None}
                for name, score in scores.items()
            }

        found = {
            "task": task,
            "split": split,
            "scores": plain(self.scores),
            "by": {name: plain(scores) for name, scores in self.by.items()},
        }
        return found | ({"variants": dict(self.variants)} if self.variants else {})


class AllPairs(Protocol[S]):
    """How a task ranks: its model scores every text with every image of the records, a pair as one row."""

    def text(self, record: S, layout: TextLayout) -> TextRow:
        """The text of a record, as the model reads it with any image."""
        ...

    def score(self, logits: Mapping[str, Tensor]) -> Tensor:
        """How well text and image of each row fit, (B,), from a batch's logits; higher is better."""
        ...

    def predictions(self, scores: NDArray[np.float32], records: Sequence[S]) -> list[Prediction]:
        """Predictions from the scores of all pairs.

        Args:
            scores: (I, N) of every image, in the order in which the records name them first, with the text of every
                record; -inf where a pair was left out.
        """
        ...


def distinct_images(records: Sequence[Record]) -> dict[str, int]:
    """First image of the records -> its number, in the order in which they name them first."""
    return {image: number for number, image in enumerate(dict.fromkeys(record.images[0] for record in records))}


class Task(ABC, Generic[R, C]):
    """Interface of a task over records `R` with settings `C`. A module in `visling.tasks`, or anyone's module, offers
    its task as `TASK`."""

    name: ClassVar[str]
    metric: ClassVar[str]
    """The score by which the best model of a run is chosen; higher is better."""
    images: ClassVar[int] = 1
    """Images of one example."""
    choices: ClassVar[bool] = False
    """Whether `query` reads a question and then the answers to choose from; predictions name them by their number."""
    files: ClassVar[str] = ""
    """What `records` reads, in a few words for people."""
    settings: ClassVar[type[Any]]
    """Config class `C`."""

    def __init__(self, config: C | None = None) -> None:
        self.config: C = self.settings() if config is None else config

    @classmethod
    def configured(cls, settings: Mapping[str, Any]) -> Self:
        """The task with settings that differ from its defaults.

        Raises:
            ConfigError: no such setting.
        """
        return cls(configs.from_dict(cls.settings, settings))

    @property
    @abstractmethod
    def heads(self) -> Mapping[str, Head]:
        """Heads by name; the logits of `loss` and `decode` have the same names."""

    @property
    def group(self) -> int:
        """Rows of one example, which its heads see together."""
        return 1

    @property
    def answers(self) -> AnswerVocabulary | None:
        """The answers that a classifier's outputs stand for, in their order; None if the task lists none.

        Raises:
            ConfigError: they are derived from training records that have not been seen yet.
        """
        return None

    def records(self, root: Path, split: str) -> Sequence[R]:
        """Annotations of a split; no image is opened. Without official files: those of the table {split}.jsonl, .json,
        .csv or .tsv.

        Raises:
            DataError: a file that is missing or not of its documented layout.
        """
        table = Table(find_table(root, split))
        records = self.read_table(table)
        table.problems.refuse()
        return records

    def read_table(self, table: Table) -> Sequence[R]:
        """Examples of a file of one's own, row by row; what is wrong with them is added to the table's problems.

        Raises:
            ConfigError: the task reads its official files only.
        """
        raise ConfigError(
            f"the task {self.name} reads no files of one's own: give the folder of its official files with --data, or "
            "write `read_table` in a task of your own."
        )

    def check(self, records: Sequence[R]) -> None:
        """Refuse records to be scored that are of another kind than those of training; called after `setup`.

        Raises:
            DataError: they are.
        """

    @abstractmethod
    def query(self, texts: Sequence[str], images: Sequence[str]) -> R:
        """A record without labels that asks the task about raw input.

        Args:
            texts: one; where the task has `choices`, the question and then at least two answers.
            images: `images` image ids.
        """

    @abstractmethod
    def example(self, record: R, layout: TextLayout, rng: np.random.Generator) -> Example:
        """One record as rows of word pieces, image ids and, if it has any, labels."""

    def region_targets(self, record: R, regions: Sequence[RegionArray]) -> Mapping[str, Any]:
        """Labels that depend on the regions of the record's images, such as overlaps with a box that is asked for; not
        called where `example` gives `region_labels` of its own.

        Args:
            regions: of each image, as they are shown: in the order of the batch, cut to those that the model reads.
        """
        return {}

    def with_regions(self, records: Sequence[R], store: RegionStore) -> Sequence[R]:
        """The training records with what only the regions of all images tell, such as images that look alike; called
        once, before a training that sees regions."""
        return records

    def all_pairs(self) -> AllPairs[R] | None:
        """How the task ranks, if predictions compare all texts with all images; None = `decode`, record by record."""
        return None

    @abstractmethod
    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Loss:
        """Loss of a labelled batch, in float32."""

    def count(self, targets: Targets, *, whole: bool) -> Mapping[str, Tensor]:
        """What the terms of `loss` divide by, by name, before anything is computed: an update of several micro-batches
        needs it.

        Args:
            whole: whether logits of regions have that of the whole image behind them.
        Raises:
            ConfigError: the task does not define it.
        """
        raise ConfigError(
            f"the task {self.name} does not say beforehand what its loss divides by, so that the exact average over "
            'several micro-batches is not known. Use train.normalise = "micro_steps" or train.accumulation = 1, or '
            "define `count` in the task, as visling.tasks.base.Task describes."
        )

    @abstractmethod
    def decode(self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[R]) -> list[Prediction]:
        """Predictions for the records of a batch, in their order.

        Args:
            batch: what the model read, with the boxes, masks and sizes of the regions; every row has its own
                (`Batch.unshared`).
        """

    def logit(
        self, logits: Mapping[str, Tensor], batch: Batch, number: int, prediction: Prediction, place: int
    ) -> Tensor:
        """The output that speaks for a candidate, before any softmax or sigmoid: a scalar that keeps its graph. By
        default the classifier's output for one of `answers`.

        Args:
            number: of the record in the batch.
            prediction: what `decode` returned for it.
            place: of the candidate in `prediction.top`; 0 where that is empty.
        Raises:
            ConfigError: the task has another kind of head and does not define this.
        """
        answer = None if self.answers is None else self.answers.index(prediction.top[place][0])
        if answer is None or "classify" not in logits:
            raise ConfigError(
                f"the task {self.name} does not define which output speaks for a prediction, so that nothing can be "
                "traced back from it. Define `logit` in it, as visling.tasks.base.Task describes."
            )
        return logits["classify"][number, answer]

    @abstractmethod
    def report(self, predictions: Sequence[Prediction], records: Sequence[R]) -> Report:
        """The official numbers.

        Raises:
            DataError: predictions and records are not of the same examples, or a record has no label.
        """

    @abstractmethod
    def labelled(self, records: Sequence[R]) -> bool:
        """Whether every record has its label, so that `report` can be computed; official test splits have none."""

    def notes(self, records: Sequence[R]) -> Sequence[str]:
        """What there is to say about how these records are scored."""
        return ()

    @abstractmethod
    def submission(self, predictions: Sequence[Prediction]) -> Any:
        """Contents of the official result file: a string is written as it is, anything else as JSON."""

    @abstractmethod
    def details(self, predictions: Sequence[Prediction], records: Sequence[R]) -> list[dict[str, Any]]:
        """One row per example for `details_{split}.jsonl`: id, image, text, type, truth, prediction, confidence, top,
        score (a fraction, or None)."""

    def join_phases(
        self, predictions: Sequence[Prediction], others: Sequence[Prediction], records: Sequence[R]
    ) -> tuple[Report | None, str | None]:
        """Of a task in two phases, each with a model of its own: the scores of both together, or where the records have
        no labels the official result file of both.

        Args:
            predictions: of this task's phase.
            others: of the other phase.
        Raises:
            ConfigError: the task has one phase.
        """
        raise ConfigError(f"the task {self.name} has one phase: there is nothing to join.")

    def baselines(self, train: Sequence[R], records: Sequence[R]) -> Mapping[str, list[Prediction]]:
        """Predictions for the records by name of a predictor that looks at nothing but the labels of the training
        records."""
        return {}

    def setup(self, records: Sequence[R]) -> None:
        """Derive what the heads need (an answer vocabulary) from the training records; called once, before the heads
        are built."""

    def state(self) -> dict[str, Any]:
        """What `from_state` needs to rebuild this task with its weights; JSON-able."""
        return {"config": configs.to_dict(self.config)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The task of a saved model.

        Raises:
            ConfigError: a state of another task.
        """
        return cls(configs.from_dict(cls.settings, state.get("config", {})))


def read_records(task: Task[R, Any], root: Path, split: str) -> Sequence[R]:
    """Annotations of a split, or of several that "+" (or a comma) joins: "train+val".

    Raises:
        DataError: see `Task.records`; or an example is in two of the splits.
    """
    parts = re.split("[+,]", split)
    if len(parts) == 1:
        return task.records(root, split)
    records = [record for part in parts for record in task.records(root, part)]
    if len({record.id for record in records}) < len(records):
        twice = next(name for name, count in Counter(record.id for record in records).items() if count > 1)
        raise DataError(
            f"example {twice!r} of {root} is in more than one of the splits {', '.join(parts)}: leave one out."
        )
    return records


def list_images(records: Sequence[Record]) -> Iterator[str]:
    """Images of the records, in their order; one occurs as often as records name it."""
    return (image for record in records for image in record.images)


class JoinedRecords(Sequence[R]):
    """Several sequences of records as one, without a copy: those of the largest files are not built all at once."""

    def __init__(self, *parts: Sequence[R]) -> None:
        self._parts = parts
        self._starts = list(itertools.accumulate(map(len, parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> list[R]: ...
    def __getitem__(self, index: int | slice) -> R | list[R]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        part = bisect_right(self._starts, places) - 1
        return self._parts[part][places - self._starts[part]]

    def __iter__(self) -> Iterator[R]:
        return itertools.chain.from_iterable(self._parts)


@dataclass(frozen=True)
class TaskSource(Generic[R]):
    """The examples of a task, as the loader wants them."""

    task: Task[R, Any]
    records: Sequence[R]
    layout: TextLayout

    def __len__(self) -> int:
        return len(self.records)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example number `index`.

        Raises:
            DataError: names the record that cannot be used.
        """
        record = self.records[index]
        try:
            example = self.task.example(record, self.layout, rng)
        except DataError as error:
            raise DataError(f"example {record.id!r}: {error}") from error
        if example.region_labels is not None or type(self.task).region_targets is Task.region_targets:
            return example
        return replace(example, region_labels=partial(self.task.region_targets, record))


@dataclass(frozen=True)
class TextOnly:
    """Examples without their images, for a model that must answer from the words alone."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example number `index`."""
        return replace(
            self.source.example(index, rng),
            images=(),
            region_labels=None,
            chosen_regions=None,
            linked_regions=None,
            region_objects=None,
        )


_SHARED = ("base", "answers")
"""Modules of this package that are no task."""


def names() -> list[str]:
    """Tasks of this package."""
    return sorted(
        module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name not in _SHARED
    )


def load(name: str) -> type[Task[Any, Any]]:
    """Task class by short name ("vqa" is `visling.tasks.vqa`) or by dotted module path ("my_package.my_task").

    Raises:
        ConfigError: no such module, or it does not offer `TASK`.
    """
    path = name if "." in name else f"{__package__}.{name}"
    module = configs.load_module(path)
    if module is None:
        raise ConfigError(
            f"no task {name!r}. {nearest(name, names())} A task of your own is given as my_package.my_module."
        )
    task = getattr(module, "TASK", None)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ConfigError(
            f"module {path} offers no task: expected TASK = a subclass of visling.tasks.base.Task. "
            f"{nearest(name, names())}"
        )
    return task


def by_id(predictions: Sequence[Prediction], records: Sequence[R]) -> list[tuple[Prediction, R]]:
    """Each record with its prediction, in the order of the records.

    Raises:
        DataError: two predictions for one example, a record without one, or a prediction without a record.
    """
    given = {prediction.id: prediction for prediction in predictions}
    wanted = {record.id for record in records}
    missing, extra = wanted - given.keys(), given.keys() - wanted
    if missing or extra or len(given) != len(predictions) or len(wanted) != len(records):
        raise DataError(
            f"{len(predictions)} predictions ({len(given)} different ids) for {len(records)} records "
            f"({len(wanted)} different ids): "
            f"{len(missing)} missing, {len(extra)} in excess"
            f"{', first ' + repr(min(missing | extra)) if missing | extra else ''}. "
            "Predict every record of one split exactly once."
        )
    return [(given[record.id], record) for record in records]
