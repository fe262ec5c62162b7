"""What a fine-tuning trains on, for estimates and tests: its untrained model, and random batches of the shapes that
typical examples of its task have.

Letters  N examples, G rows per example, B = N * G rows, T tokens, R regions, S region rows, P phrases, A answers.
Limits   Every image has as many regions as the preset reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from visling import config as configs
from visling import models
from visling.data.answers import AnswerVocabulary
from visling.models.task_model import TaskModel
from visling.recipes.configs import FinetuneConfig
from visling.recipes.tables import PUBLISHED_FINETUNING
from visling.runs.finetune import fill_task_settings
from visling.runs.typical_batch import draw_pixels, draw_regions
from visling.tasks.answers import AnswerTask
from visling.tasks.base import Task
from visling.tasks.base import load as load_task
from visling.tasks.classification import Classification
from visling.types import Batch, Regions, Slots, Targets, Text


@dataclass(frozen=True, kw_only=True)
class TypicalTask:
    """Size of an example of a task; the defaults are those of a task that no published run is trained on."""

    tokens: int = 16
    """Word pieces of a row, special tokens included: a rough mean, as batches hold texts of similar lengths."""
    shows: tuple[int, ...] = (0,)
    """Row -> which of the example's images it is about; rows that share an image share its regions."""
    answers: int = 2
    """Answers that the release lists, of a task that lists some."""
    phrases: int = 0
    """To be grounded in a row."""
    splits: Mapping[str, int] = field(default_factory=dict)
    """Split -> examples of the official files."""


_REFCOCO_PLUS = {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889}
TASKS: Mapping[str, TypicalTask] = {
    "vqa": TypicalTask(
        tokens=10,
        answers=3129,
        splits={
            "train": 443_757, "val": 214_354, "minival": 25_994, "nominival": 188_360, "minval": 3_000,
            "nominval": 211_354, "test": 447_793,
        },
    ),
    "gqa": TypicalTask(
        tokens=12,
        answers=1842,
        splits={
            "train": 943_000, "val": 132_062, "valid": 132_062, "testdev": 12_578, "trainval": 1_072_062,
            "minval": 3_000,
        },
    ),
    "nlvr2": TypicalTask(
        tokens=22, shows=(0, 1), splits={"train": 86_373, "dev": 6_982, "valid": 6_982, "test1": 6_967, "test2": 6_970}
    ),
    "vcr": TypicalTask(tokens=30, shows=(0, 0, 0, 0), splits={"train": 212_923, "val": 26_534, "test": 25_263}),
    "retrieval": TypicalTask(
        tokens=16, shows=(0, 0, 1, 0), splits={"train": 145_000, "val": 5_070, "test": 5_000}
    ),
    "referring": TypicalTask(tokens=7, splits=_REFCOCO_PLUS),
    "grounding": TypicalTask(tokens=17, phrases=4, splits={"train": 148_915, "val": 5_000, "test": 5_000}),
}  # fmt: skip
"""Task -> its typical examples. VQA v2; parts of val as LXMERT and ViLBERT cut it. GQA's balanced questions. Flickr30K:
retrieval in Karpathy's split, grounding in that of Entities. RefCOCO+; the other data sets are in `VARIANTS`."""

VARIANTS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("dataset", "refcoco"): {"splits": {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095}},
    ("dataset", "refcocog"): {"tokens": 11, "splits": {"train": 80_512, "val": 4_896, "test": 9_602}},
    ("phase", "rationale"): {"tokens": 50},
    # ViLBERT's lines of COCO, Karpathy's split with five captions an image
    ("image_field", "id"): {"splits": {"train": 566_435, "val": 25_000, "test": 25_000}},
}
"""Setting of a task and its value -> what differs from `TASKS`."""

ANSWERS: Mapping[tuple[str, str], int] = {("vilbert", "gqa"): 1533}
"""Family and task -> answers that its release lists, where they are others than in `TASKS`."""


def typical_size(config: FinetuneConfig) -> TypicalTask:
    """Size of the examples of a run's task."""
    size = TASKS.get(config.task, TypicalTask())
    for (setting, value), differing in VARIANTS.items():
        if config.task_settings.get(setting) == value:
            size = replace(size, **differing)
    return replace(size, answers=ANSWERS.get((config.model, config.task), size.answers))


def count_examples(config: FinetuneConfig) -> int | None:
    """Examples of an epoch of a published run; None for other runs, and for splits of unknown size."""
    splits = typical_size(config).splits
    parts = config.train_split.split("+")
    if config.recipe not in PUBLISHED_FINETUNING or not splits.keys() >= set(parts):
        return None
    examples = sum(splits[part] for part in parts)
    return examples if config.train_limit is None else min(examples, config.train_limit)


def untrained_task(config: FinetuneConfig) -> tuple[TaskModel, Task[Any, Any]]:
    """Randomly initialised model of a run and its task, before any data is read; answers and labels that only data
    would tell are made up, as many as the release of a published run has.

    Raises:
        ConfigError: the family has no head for the task, or the task needs its data to know its heads.
    """
    config = fill_task_settings(config)
    kind = load_task(config.task)
    settings = configs.from_dict(kind.settings, config.task_settings)
    number = typical_size(config).answers if config.recipe in PUBLISHED_FINETUNING else TypicalTask.answers
    names = [f"answer {place}" for place in range(number)]
    if issubclass(kind, AnswerTask) and settings.answers is None:
        task: Task[Any, Any] = kind(settings, AnswerVocabulary(names))
    elif issubclass(kind, Classification) and settings.labels is None:
        task = kind(settings, names)
    else:
        task = kind(settings)
    encoder = models.build(config.model, config.encoder)
    extractor = None if config.extractor is None else config.extractor.build()
    styles = models.head_styles(config.model, config.head_layout)
    return TaskModel(encoder, task.heads, styles, group=task.group, extractor=extractor), task


def typical_task_batch(config: FinetuneConfig, task: Task[Any, Any], examples: int) -> tuple[Batch, Targets]:
    """Random inputs and labels of the shapes that the typical examples of a run have."""
    spec, size, group = models.spec(config.model).inputs(config.encoder), typical_size(config), task.group
    rows, tokens = examples * group, min(size.tokens, spec.max_tokens)
    text = Text(
        ids=torch.randint(1, config.encoder.vocab_size, (rows, tokens)),
        mask=torch.ones(rows, tokens, dtype=torch.bool),
        segments=torch.zeros(rows, tokens, dtype=torch.int64),
        answer_at=torch.full((rows,), tokens - 2)
        if spec.answer_slot != "none" and isinstance(task, AnswerTask)
        else None,
        task=torch.zeros(rows, dtype=torch.int64) if spec.num_tasks else None,
        count=rows * tokens,
    )
    regions = None
    if not config.text_only:
        shows = size.shows if len(size.shows) == group else (0,) * group
        images = max(shows) + 1
        joined = task.images if images < task.images else 1  # images in one row
        regions = draw_regions(examples * images, count_regions(config, task), spec, images=joined)
        if images < group:
            row = torch.arange(examples)[:, None] * images + torch.tensor(shows)
            regions = replace(regions, row=row.flatten(), shared=row.numel() * regions.mask.shape[1])
    pixels = None
    if regions is not None and (pixels := draw_pixels(config, len(regions.mask))) is not None:
        regions = replace(regions, features=regions.features[..., :0])
    batch = Batch(
        text=text, regions=regions, pixels=pixels, group=group, links=_draw_links(task, text, regions),
        phrases=_draw_phrases(rows, tokens, size.phrases),
    )  # fmt: skip
    return batch, _draw_targets(task, batch, examples)


def count_regions(config: FinetuneConfig, task: Task[Any, Any]) -> int:
    """Regions of a row: as many as the preset reads of each of its images."""
    spec, size = models.spec(config.model).inputs(config.encoder), typical_size(config)
    if config.text_only:
        return 0
    if spec.joint_limit is not None:
        return min(spec.max_regions, spec.joint_limit - min(size.tokens, spec.max_tokens) - 1)  # the whole image counts
    return spec.max_regions * (task.images if spec.pair == "sequence" and task.group == 1 else 1)


def _draw_links(task: Task[Any, Any], text: Text, regions: Regions | None) -> Tensor | None:
    """(B, T, R): one word of each row names the first region, in a task whose names are linked to objects."""
    if regions is None or getattr(task.config, "links", None) in (None, "none"):
        return None
    links = torch.zeros(*text.ids.shape, regions.mask.shape[1], dtype=torch.bool)
    links[:, 1, 0] = True
    return links


def _draw_phrases(rows: int, tokens: int, number: int) -> Slots | None:
    """(B, P) words that stand for phrases; None where there are none."""
    if not number:
        return None
    return Slots(at=torch.randint(1, tokens, (rows, number)), mask=torch.ones(rows, number, dtype=torch.bool))


def _draw_targets(task: Task[Any, Any], batch: Batch, examples: int) -> Targets:
    """Labels of all kinds; each task reads its own."""
    rows = len(batch.text.ids)
    given: dict[str, Any] = {
        "answer": torch.rand(examples, len(task.answers))
        if isinstance(task, AnswerTask)
        else torch.randint(0, 2, (examples,)),
        "choice": torch.randint(0, batch.group, (examples,)),
    }
    if batch.regions is not None:
        candidates = batch.regions.mask.shape[1] + 1
        given |= {
            "object_classes": torch.randint(0, 2, (rows, candidates)),
            "region_scores": torch.rand(rows, candidates),
        }
        if batch.phrases is not None:
            given["phrase_boxes"] = torch.rand(rows, batch.phrases.at.shape[1], candidates - 1).softmax(-1)
    return Targets(**given)
