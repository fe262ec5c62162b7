"""Scores of every text with every image, in tiles: caption retrieval, by a fine-tuned model or by the matching head of
a pre-trained one.

A tile is some texts with some images. What a model computes of a text or an image alone (`Encoder.encode_text`,
`Encoder.encode_regions`) is computed once; a tile runs the layers that read both, and its logits are all that is held
of them. Processes share the images; the tiles are the ones that a single process would score, so that scores do not
depend on the number of processes.

Letters  I images, T texts, B pairs of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling import models, runtime
from visling.data.batches.collate import Collator
from visling.data.corpora.base import check_images
from visling.errors import CheckpointError, ConfigError, DataError, RunError
from visling.models.task_model import TaskModel
from visling.nn.extraction import extract_features
from visling.pickles import read_arrays
from visling.pretrained.features import check_features
from visling.pretrained.folder import ModelFolder, load_part, objective_heads, read_model_folder
from visling.regions.store import NativeStore
from visling.runs.inputs import Inputs
from visling.runs.pictures import open_pictures
from visling.tasks.base import AllPairs, Report, distinct_images, read_records
from visling.tasks.retrieval import Retrieval, RetrievalConfig
from visling.train.exchange import gather
from visling.types import Batch, Example, Prediction, Record, Regions, Text

Progress = Callable[[int, int], None]
"""Called with the pairs that this process has scored, and those that it has to."""

_MATCHING = "objectives.matching.head"
"""Where a model folder keeps the head of image-text matching."""


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """What `retrieve` returns."""

    scores: NDArray[np.float32]
    """(I, T); -inf where a pair was left out."""
    images: tuple[str, ...]
    texts: tuple[str, ...]
    """Ids of the captions."""
    captions: tuple[str, ...]
    """As they were written."""
    owners: tuple[str, ...]
    """Image that each caption describes."""
    predictions: list[Prediction]
    report: Report
    notice: str
    """How the features differ from those that the model was trained on, where they only come near."""
    zero_shot: bool
    """Whether a pre-trained model ranked by its head of image-text matching."""

    def save(self, path: Path) -> None:
        """Write the scores to an .npz file, which `read_shortlist` takes.

        Raises:
            RunError: it cannot be written.
        """
        try:
            with path.open("wb") as file:
                np.savez(file, scores=self.scores, images=np.array(self.images), texts=np.array(self.texts))
        except OSError as error:
            raise RunError(f"cannot write the scores to {path}: {error}. Name another file.") from error


def retrieve(
    model: Path,
    *,
    data: Path,
    store: Path,
    split: str,
    images: Path | None = None,
    device: str = "auto",
    precision: runtime.Precision = "fp32",
    batch_size: int = 256,
    limit: int | None = None,
    shortlist: Path | None = None,
    top: int = 100,
    other_features: bool = False,
    progress: Progress | None = None,
) -> Retrieved:
    """Rank the images of a split for its captions, and the captions for its images.

    Args:
        model: run or model folder of a retrieval model; or of a pre-trained one with a head of image-text matching,
            which then ranks as it is (zero-shot).
        images: folder of the images, for a model that computes the features of regions from pixels.
        batch_size: pairs per tile.
        limit: only the first so many images and their captions.
        shortlist: scores of a cheaper model (`Retrieved.save`): only the `top` images of a caption by them, and the
            `top` captions of an image, are scored.
        other_features: accept features of another detector.
    Raises:
        CheckpointError, DataError, StoreError: see their messages.
    """
    saved = read_model_folder(model)
    scorer, task = retrieval_model(saved)
    regions = NativeStore.open(store)
    extracts = saved.extractor is not None
    notice = check_features(saved, regions, override=other_features, extracts=extracts)
    records = limit_images(read_records(task, data, split), limit)
    if not records:
        raise DataError(f"split {split!r} of {data} holds no caption.")
    check_images(records, regions)
    inputs = Inputs(
        saved.model, saved.config, None if saved.text_only else regions, device,
        vocabulary=saved.path / "vocab.txt", task_token=saved.task_token,
    )  # fmt: skip
    inputs.pictures = open_pictures(saved, records, images, regions)
    wanted = None if shortlist is None else read_shortlist(shortlist, records, top)
    scores = score_pairs(
        scorer.to(inputs.device), task, inputs, records,
        batch_size=batch_size, precision=precision, wanted=wanted, progress=progress,
    )  # fmt: skip
    predictions = task.predictions(scores, records)
    return Retrieved(
        scores=scores,
        images=tuple(distinct_images(records)),
        texts=tuple(record.id for record in records),
        captions=tuple(record.caption for record in records),
        owners=tuple(record.images[0] for record in records),
        predictions=predictions,
        report=task.report(predictions, records),
        notice=notice,
        zero_shot=saved.task is None,
    )


def retrieval_model(saved: ModelFolder) -> tuple[TaskModel, Retrieval]:
    """A model that scores pairs: fine-tuned for retrieval, or pre-trained with image-text matching.

    Raises:
        CheckpointError: the folder holds neither.
    """
    if saved.task is None:
        return _zero_shot(saved)
    model, task = saved.task_model()
    if not isinstance(task, Retrieval):
        raise CheckpointError(
            f"{saved.path} is fine-tuned for {saved.task}, which ranks nothing. Name a model of the task retrieval, or "
            "a pre-trained one."
        )
    return model, task


def _zero_shot(saved: ModelFolder) -> tuple[TaskModel, Retrieval]:
    """The encoder with the matching head of its pre-training.

    Raises:
        CheckpointError: it has none.
    """
    if "matching" not in objective_heads(saved):
        raise CheckpointError(
            f"{saved.path} has no head of image-text matching: it was not pre-trained with it, or was converted from a "
            f"file without it. Fine-tune it for retrieval first: visling finetune --init {saved.path}."
        )
    task = Retrieval(RetrievalConfig(head="alignment"))
    styles = models.head_styles(saved.model)
    converted = {"alignment": saved.heads[_MATCHING]} if _MATCHING in saved.heads else None
    model = TaskModel(
        saved.encoder(),
        task.heads,
        {"classify": styles["matching"]},
        saved=converted,
        extractor=saved.region_extractor(),
    )
    load_part(model.heads["alignment"], saved.weights, f"{_MATCHING}.", saved.path)
    return model, task


def limit_images(records: Sequence[Any], most: int | None) -> Sequence[Any]:
    """The records of the first `most` images; None = all."""
    if most is None:
        return records
    if most < 1:
        raise ConfigError(f"a limit is a number of images, at least 1; found {most}.")
    kept = set(list(distinct_images(records))[:most])
    return [record for record in records if record.images[0] in kept]


def read_shortlist(path: Path, records: Sequence[Record], top: int) -> NDArray[np.bool_]:
    """(I, T) pairs that are worth scoring: the `top` images of each caption and the `top` captions of each image by the
    scores in a file.

    Raises:
        DataError: the file is missing or damaged, or lacks an image or a caption of the records.
    """
    try:
        content = read_arrays(path)
        scores, images, texts = (content[name] for name in ("scores", "images", "texts"))
        if scores.shape != (*images.shape, *texts.shape) or images.ndim != 1 or scores.dtype.kind != "f":
            raise ValueError(f"scores of {scores.dtype} {scores.shape} for {images.shape} images, {texts.shape} texts")
        if images.dtype.kind not in "SU" or texts.dtype.kind not in "SU":
            raise ValueError(f"names of type {images.dtype} and {texts.dtype}")
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{path} is not a file of scores: {error}. Expected scores, images and texts, as a retrieval saves them."
        ) from error
    rows, columns = ({name: at for at, name in enumerate(names.tolist())} for names in (images, texts))
    wanted_images, wanted_texts = list(distinct_images(records)), [record.id for record in records]
    for wanted, have in ((wanted_images, rows), (wanted_texts, columns)):
        if missing := [name for name in wanted if name not in have]:
            raise DataError(f"{path} has no scores of {missing[0]!r}, and {len(missing)} are missing in all.")
    part = scores[np.ix_([rows[name] for name in wanted_images], [columns[name] for name in wanted_texts])]
    kept = np.zeros(part.shape, bool)
    for axis in (0, 1):
        best = np.argsort(-part, axis=axis, kind="stable").take(range(min(top, part.shape[axis])), axis=axis)
        np.put_along_axis(kept, best, True, axis=axis)
    return kept


def score_pairs(
    model: TaskModel,
    ranking: AllPairs[Any],
    inputs: Inputs,
    records: Sequence[Record],
    *,
    batch_size: int,
    precision: runtime.Precision,
    wanted: NDArray[np.bool_] | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Scores (I, T) of every image with the text of every record, on every process.

    Args:
        inputs: without regions a text has one score, whatever the image.
        batch_size: pairs per tile.
        wanted: (I, T) pairs that are scored; the others are -inf. None = all.
    """
    images = list(distinct_images(records))
    if inputs.regions is None:
        shown, wanted = images[:1], None
    else:
        shown = images
    share = 1.0 if wanted is None else max(float(wanted.mean()), 1e-9)
    side = max(1, math.isqrt(int(batch_size / share)))
    blocks = [range(first, min(first + side, len(shown))) for first in range(0, len(shown), side)]
    mine = blocks[runtime.rank() :: runtime.world_size()]
    own: list[tuple[int, NDArray[np.float32]]] = []
    done, total = 0, sum(map(len, mine)) * len(records)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), runtime.autocast(inputs.device, precision):
            scorer = _Scorer(model, ranking, inputs, records, side=side, most=batch_size)
            for block in mine:
                asked = (
                    np.ones((len(block), len(records)), bool) if wanted is None else wanted[block.start : block.stop]
                )
                own.append((block.start, scorer.score([shown[number] for number in block], asked)))
                done += asked.size
                if progress is not None:
                    progress(done, total)
    finally:
        model.train(training)
    parts = sorted((part for process in gather(own) for part in process), key=lambda part: part[0])
    found = np.concatenate([scores for _, scores in parts])
    return found if inputs.regions is not None else np.repeat(found, len(images), axis=0)


@dataclass(frozen=True, kw_only=True)
class _TextBlock:
    """Texts of similar length, and what the model computes of them alone."""

    numbers: NDArray[np.int64]
    """Of their records."""
    text: Text
    states: Tensor | None


class _Scorer:
    """Scores blocks of images with all texts, whose own states are computed once, here.

    Args:
        side: texts of a block.
        most: pairs of a batch.
    """

    def __init__(
        self,
        model: TaskModel,
        ranking: AllPairs[Any],
        inputs: Inputs,
        records: Sequence[Record],
        *,
        side: int,
        most: int,
    ) -> None:
        self._model, self._ranking, self._device, self._most = model, ranking, inputs.device, most
        self._rows = tuple(ranking.text(record, inputs.layout) for record in records)
        self._collate_text = Collator(None, inputs.spec, inputs.tokenizer)
        self._collate_images = Collator(inputs.regions, inputs.spec, inputs.tokenizer, pictures=inputs.pictures)
        self._sees = inputs.regions is not None
        order = np.argsort([len(row.ids) for row in self._rows], kind="stable")
        self._texts = [self._encode_text(order[first : first + side]) for first in range(0, len(order), side)]

    def score(self, images: Sequence[str], asked: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Scores (images, T) of some images with all texts; -inf where `asked` (images, T) is False."""
        scores = np.full(asked.shape, -np.inf, np.float32)
        regions = self._read_images(images) if self._sees else None
        states = None if regions is None else self._model.encoder.encode_regions(regions)
        for block in self._texts:
            text = block.text.to(self._device)
            text_states = None if block.states is None else block.states.to(self._device)
            rows, columns = np.nonzero(asked[:, block.numbers])
            for first in range(0, len(rows), self._most):
                at, of = rows[first : first + self._most], columns[first : first + self._most]
                batch = Batch(
                    text=replace(text, row=self._to_device(of)),
                    regions=None if regions is None else replace(regions, row=self._to_device(at)),
                )
                encoded = self._model.encoder.encode_pairs(
                    batch, text_states, states, reads=self._model.reads_of_encoded(batch)
                )
                values = self._ranking.score(self._model.read(encoded, batch))
                scores[at, block.numbers[of]] = values.float().cpu().numpy()
        return scores

    def _encode_text(self, numbers: NDArray[np.int64]) -> _TextBlock:
        """The texts of some records, kept in main memory."""
        examples = [Example(id=str(number), rows=(self._rows[number],), images=()) for number in numbers]
        text = self._collate_text(examples, [_NO_DRAWS] * len(examples))[0].text
        states = self._model.encoder.encode_text(text.to(self._device))
        return _TextBlock(numbers=numbers, text=text, states=None if states is None else states.cpu())

    def _read_images(self, images: Sequence[str]) -> Regions:
        examples = [Example(id=image, rows=self._rows[:1], images=(image,)) for image in images]
        batch = self._collate_images(examples, [_NO_DRAWS] * len(examples))[0].to(self._device)
        regions = extract_features(self._model.extractor, batch)[0].regions
        assert regions is not None
        return regions

    def _to_device(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self._device)


_NO_DRAWS = runtime.generator_for(0)
"""For the collator, which draws nothing for what is neither masked nor mirrored."""
