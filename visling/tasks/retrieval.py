"""Caption retrieval on Flickr30K and COCO: the image that a caption describes, and the captions of an image.

Letters  N examples, G rows per example, B rows, I images, T captions.
Release  ViLBERT (first and multi-task): the right pair, a caption of another image, another image, and a caption of an
         image that looks alike; one number for each, cross-entropy over the four. VOLTA does the same. The release
         ranks images for captions alone; captions are ranked for images as VSE++ and SCAN do. For VisualBERT, VL-BERT,
         LXMERT and CVLP the task is ours.
Differs  In the release, the rows of the third alternative hold leftovers of the first image behind its own regions,
         masked; here they hold zeros. An image with more regions than the model reads stops the release as third
         alternative and is cut here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visling.data.alike import nearest_images
from visling.data.annotations.retrieval import CaptionText, ImageField, RetrievalRecord, read_retrieval
from visling.data.annotations.tables import Table
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.metrics.ranking import CUTS, Ranking, Ties, average, best_ranks, sum_of_recalls, summarise
from visling.tasks.answers import classification_loss, count_rows, detail_row, mean_score
from visling.tasks.base import AllPairs, Report, Score, Task, by_id, distinct_images
from visling.types import Batch, Example, Head, Loss, Prediction, RegionStore, Targets, TextRow

TOP = 10
"""Candidates kept per query."""

NEAREST = 99
"""Images that look alike, kept per image (release: 100 columns, of which the first is the image itself)."""

IMAGES: Final = "image"
CAPTIONS: Final = "text"
"""What is retrieved: the image of a caption ("image retrieval"), the captions of an image ("text retrieval")."""


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """How alternatives are drawn, and how pairs are scored and ranked."""

    head: Literal["score", "alignment"] = "score"
    """"score": one number per pair, trained by choosing among four (ViLBERT); "alignment": log-odds of the two-way
    classifier of image-text matching, which a pre-trained model has without any fine-tuning (zero-shot)."""
    negatives: Literal["alike", "random"] = "alike"
    """The image whose caption is the fourth alternative: "alike": one that looks like the right one, from the file
    `hard_negative.pkl` (release) or, without it, among the nearest ones by mean region features (ours); "random": any,
    as in the release's validation."""
    ties: Ties = "stable"
    """Which of equal scores comes first (`metrics.ranking`)."""
    fold: int = 1000
    """Recalls are also reported as means over folds of so many images, where the split has several whole ones: COCO's
    "1K" of its 5,000 test images."""
    text: CaptionText = "raw"
    """Of Karpathy's files: captions as people wrote them, or his "tokens" without punctuation."""
    image_field: ImageField = "img_path"
    """Of JSON lines: what names the image; "id" for ViLBERT's files of COCO."""

    def __post_init__(self) -> None:
        if self.fold < 1:
            raise ConfigError(f"fold is a number of images; found {self.fold}. COCO's 1K folds have 1000.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedPrediction(Prediction):
    """The candidates of a query, best first, and where the right one stands."""

    of: Literal["image", "text"]
    """What is retrieved."""
    rank: int
    """Of the best right candidate, from 0."""
    fold_rank: int | None = None
    """Among the candidates of the query's fold; None where there are no folds."""


class Retrieval(Task[RetrievalRecord, RetrievalConfig]):
    """Find the image of a caption, and the captions of an image."""

    name: ClassVar[str] = "retrieval"
    metric: ClassVar[str] = "rsum"
    files: ClassVar[str] = "captions of Flickr30K or COCO, Karpathy's files or ViLBERT's (docs/tasks/retrieval.md)"
    settings: ClassVar[type[RetrievalConfig]] = RetrievalConfig

    def __init__(self, config: RetrievalConfig | None = None) -> None:
        super().__init__(config)
        self._training: _Training | None = None
        self._notes: dict[str, list[str]] = {}

    @property
    def heads(self) -> Mapping[str, Head]:
        """One number per pair, or the two classes of image-text matching, class 1 = the text fits."""
        if self.config.head == "score":
            return {"score": Head(kind="score", outputs=1)}
        return {"alignment": Head(kind="classify", outputs=2)}

    @property
    def group(self) -> int:
        """Alternatives of a training example; elsewhere a pair is a row of its own."""
        return 4

    def records(self, root: Path, split: str) -> list[RetrievalRecord]:
        """Captions of a split, image by image; see `read_retrieval`."""
        data = read_retrieval(root, split, text=self.config.text, image_field=self.config.image_field)
        self._notes[split] = [f"{split}: {note}" for note in data.notes()]
        return list(data.records)

    def read_table(self, table: Table) -> list[RetrievalRecord]:
        """Captions of a file of one's own, one a row: `image` and `caption` (or `text`); ids begin with the name of the
        file, because those of training and validation must differ."""
        image, caption = table.require("image", "img"), table.require("caption", "text")
        return [
            RetrievalRecord(id=f"{table.path}:{identifier}", images=(row.image(image),), caption=row.text(caption))
            for row, identifier in zip(table.rows, table.ids(), strict=True)
        ]

    def with_regions(self, records: Sequence[RetrievalRecord], store: RegionStore) -> Sequence[RetrievalRecord]:
        """The records with images that look alike, unless the file names some or none are wanted."""
        if self.config.negatives == "random" or any(record.alike for record in records):
            return records
        alike = nearest_images(store, list(distinct_images(records)), NEAREST)
        return [replace(record, alike=alike[record.images[0]]) for record in records]

    def setup(self, records: Sequence[RetrievalRecord]) -> None:
        """Remember the captions and images from which wrong alternatives are drawn.

        Raises:
            DataError: they are of a single image.
        """
        self._training = _Training(records)

    def query(self, texts: Sequence[str], images: Sequence[str]) -> RetrievalRecord:
        """A caption and an image; the prediction is how well they fit."""
        (text,), (image,) = texts, images
        return RetrievalRecord(id=image, images=(image,), caption=text)

    def example(self, record: RetrievalRecord, layout: TextLayout, rng: np.random.Generator) -> Example:
        """A training caption with its wrong alternatives, the right pair first; any other caption with its image alone.

        Draws, in the order of the release: another image, a caption of it, another image, the number of an image that
        looks alike (or another image), a caption of it.
        """
        row, image = layout.row(record.caption), record.images[0]
        if self._training is None or record.id not in self._training.ids:
            return Example(id=record.id, rows=(row,), images=record.images)
        other_caption = self._training.draw_caption(self._training.draw_image(image, rng), rng)
        other_image = self._training.draw_image(image, rng)
        alike = self._draw_alike(record, self._training, rng)
        hard_caption = self._training.draw_caption(alike, rng)
        return Example(
            id=record.id,
            rows=(row, layout.row(other_caption), row, layout.row(hard_caption)),
            images=(image, image, other_image, image),
            labels={"choice": 0},
        )

    def _draw_alike(self, record: RetrievalRecord, training: _Training, rng: np.random.Generator) -> str:
        known = [] if self.config.negatives == "random" else record.alike
        if not known:
            return training.draw_image(record.images[0], rng)
        return known[int(rng.integers(1, len(known) + 1)) - 1]  # the release numbers the image itself as 0

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Loss:
        """Cross-entropy over the scores of the G alternatives, the first of which is right; mean over examples."""
        assert targets.choice is not None
        return classification_loss(self.score(logits).view(len(targets.choice), -1), targets.choice, "retrieval")

    def count(self, targets: Targets, *, whole: bool) -> Mapping[str, Tensor]:
        assert targets.choice is not None
        return {"retrieval": count_rows(targets.choice)}

    def score(self, logits: Mapping[str, Tensor]) -> Tensor:
        """How well text and image of each row fit, (B,) float32: the head's number, or log-odds."""
        if self.config.head == "score":
            return logits["score"].float().flatten()
        classes = logits["alignment"].float()
        return classes[:, 1] - classes[:, 0]

    def decode(
        self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[RetrievalRecord]
    ) -> list[Prediction]:
        """How well the caption of each record fits its image; `confidence` is its sigmoid, the probability of
        "alignment"."""
        scores = self.score(logits).detach().view(len(records), -1)[:, 0]
        return [
            Prediction(id=record.id, value=value, confidence=confidence)
            for record, value, confidence in zip(records, scores.tolist(), scores.sigmoid().tolist(), strict=True)
        ]

    def logit(
        self, logits: Mapping[str, Tensor], batch: Batch, number: int, prediction: Prediction, place: int
    ) -> Tensor:
        """How well the caption fits the image: the score itself."""
        return self.score(logits).view(-1, batch.group)[number, 0]

    def all_pairs(self) -> AllPairs[RetrievalRecord]:
        """The task itself: it scores every caption with every image."""
        return self

    def text(self, record: RetrievalRecord, layout: TextLayout) -> TextRow:
        """The caption."""
        return layout.row(record.caption)

    def predictions(self, scores: NDArray[np.float32], records: Sequence[RetrievalRecord]) -> list[Prediction]:
        """The best images of every caption, then the best captions of every image, with the rank of the right one.

        Args:
            scores: (I, T).
        """
        images = distinct_images(records)
        owners = np.array([images[record.images[0]] for record in records])
        names, numbers = list(images), np.arange(len(images))
        captions = [record.id for record in records]
        found = (
            *self._rank(scores.T, IMAGES, captions, names, owners, numbers),
            *self._rank(scores, CAPTIONS, names, captions, numbers, owners),
        )
        return list(found)

    def _rank(
        self,
        scores: NDArray[np.float32],
        of: Literal["image", "text"],
        queries: Sequence[str],
        candidates: Sequence[str],
        asking: NDArray[np.int64],
        asked: NDArray[np.int64],
    ) -> list[RankedPrediction]:
        """One direction: `asking` (Q,) and `asked` (C,) are the images of queries and candidates."""
        ranks = best_ranks(scores, asking, asked, self.config.ties)
        fold_ranks: NDArray[Any] = np.full(len(queries), -1)
        for fold in range(self._count_folds(int(asked.max()) + 1)):
            mine, theirs = (np.flatnonzero(images // self.config.fold == fold) for images in (asking, asked))
            fold_ranks[mine] = best_ranks(scores[np.ix_(mine, theirs)], asking[mine], asked[theirs], self.config.ties)
        predictions = []
        for number, query in enumerate(queries):
            best = _order(scores[number])[:TOP]
            shares = self._probabilities(scores[number])[best].tolist()
            top = tuple((candidates[at], share) for at, share in zip(best.tolist(), shares, strict=True))
            predictions.append(
                RankedPrediction(
                    id=query,
                    value=top[0][0],
                    confidence=top[0][1],
                    top=top,
                    of=of,
                    rank=int(ranks[number]),
                    fold_rank=None if fold_ranks[number] < 0 else int(fold_ranks[number]),
                )
            )
        return predictions

    def _count_folds(self, images: int) -> int:
        """Whole folds of a split with so many images, if it has several; else 0."""
        folds, rest = divmod(images, self.config.fold)
        return folds if folds > 1 and not rest else 0

    def _probabilities(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """(C,) probability that each candidate fits, by itself with "alignment", else among all candidates."""
        row = torch.from_numpy(np.ascontiguousarray(scores, np.float64))
        shares: NDArray[np.float64] = (row.sigmoid() if self.config.head == "alignment" else row.softmax(0)).numpy()
        return shares

    def report(self, predictions: Sequence[Prediction], records: Sequence[RetrievalRecord]) -> Report:
        """Recalls of both directions with intervals over queries, whose sum is `rsum`; ranks; recalls in folds, if
        there are any.

        Raises:
            DataError: other queries than the captions and images of the records.
        """
        images = distinct_images(records)
        captions, of_images = self._split(predictions, records)
        asked = {IMAGES: [record.images[0] for record in records], CAPTIONS: list(images)}
        ranked = {IMAGES: captions, CAPTIONS: of_images}
        whole = {of: summarise([one.rank for one in queries]) for of, queries in ranked.items()}
        scores: dict[str, Score] = {}
        for of, queries in ranked.items():
            for cut, recall in zip(CUTS, whole[of].recalls, strict=True):
                hits = [float(one.rank < cut) for one in queries]
                scores[f"{of}_r{cut}"] = replace(mean_score(hits, asked[of]), value=recall)
        for of, queries in ranked.items():
            scores[f"{of}_median_rank"] = Score(whole[of].median, len(queries))
            scores[f"{of}_mean_rank"] = Score(whole[of].mean, len(queries))
        scores["rsum"] = Score(sum_of_recalls(*whole.values()), len(captions) + len(of_images))
        folds = self._count_folds(len(images))
        for of, queries in ranked.items() if folds else ():
            numbers = [images[image] // self.config.fold for image in asked[of]]
            mean = average([_summarise_fold(queries, numbers, fold) for fold in range(folds)])
            for cut, recall in zip(CUTS, mean.recalls, strict=True):
                scores[f"{of}_r{cut}_of_{self.config.fold}"] = Score(recall, len(queries))
        return Report(
            scores=scores,
            variants={
                "candidates": f"{len(images)} images, {len(captions)} captions",
                "score": self.config.head,
                "ties": self.config.ties,
            },
        )

    def _split(
        self, predictions: Sequence[Prediction], records: Sequence[RetrievalRecord]
    ) -> tuple[list[RankedPrediction], list[RankedPrediction]]:
        """The predictions for captions, in the order of the records, and those for images, in their order.

        Raises:
            DataError: other queries than the captions and images of the records.
        """
        ranked = [one for one in predictions if isinstance(one, RankedPrediction)]
        captions = [one for one in ranked if one.of == IMAGES]
        of_images = {one.id: one for one in ranked if one.of == CAPTIONS}
        images = distinct_images(records)
        if of_images.keys() != images.keys() or len(ranked) != len(predictions):
            raise DataError(
                f"{len(of_images)} images were given captions, the split has {len(images)}. "
                "Rank all pairs of one split."
            )
        paired = [one for one, _ in by_id(captions, records) if isinstance(one, RankedPrediction)]
        return paired, [of_images[image] for image in images]

    def labelled(self, records: Sequence[RetrievalRecord]) -> bool:
        """Always: a caption belongs to its image."""
        return True

    def notes(self, records: Sequence[RetrievalRecord]) -> list[str]:
        """What was left out of the files, and images with few captions."""
        return [note for notes in self._notes.values() for note in notes]

    def submission(self, predictions: Sequence[Prediction]) -> dict[str, dict[str, list[str]]]:
        """Ours, since no benchmark asks for a file: the ids of the best ten, best first, of the images of every caption
        ("image") and of the captions of every image ("text")."""
        return {
            of: {
                one.id: [name for name, _ in one.top]
                for one in predictions
                if isinstance(one, RankedPrediction) and one.of == of
            }
            for of in (IMAGES, CAPTIONS)
        }

    def details(self, predictions: Sequence[Prediction], records: Sequence[RetrievalRecord]) -> list[dict[str, Any]]:
        """One row per caption; `score` is 1 where its image is the first, `rank` counts from 1."""
        captions, _ = self._split(predictions, records)
        return [
            detail_row(
                one, record, text=record.caption, kind="caption", truth=record.images[0], score=float(one.rank == 0)
            )
            | {"rank": one.rank + 1}
            for one, record in zip(captions, records, strict=True)
        ]

    def baselines(
        self, train: Sequence[RetrievalRecord], records: Sequence[RetrievalRecord]
    ) -> Mapping[str, list[Prediction]]:
        """Chance; and what the words alone give away: the same order for every query, captions with frequent words
        first and images in the order of the file."""
        images = len(distinct_images(records))
        rng = np.random.default_rng(0)
        prior = np.array(_typicality(train, records), np.float32)
        return {
            "random order": self.predictions(rng.random((images, len(records)), np.float32), records),
            "same order for every query": self.predictions(np.tile(prior, (images, 1)), records),
        }


class _Training:
    """The captions and images from which wrong alternatives are drawn."""

    def __init__(self, records: Sequence[RetrievalRecord]) -> None:
        self.ids = frozenset(record.id for record in records)
        self.images = list(distinct_images(records))
        self.captions: dict[str, list[str]] = {image: [] for image in self.images}
        for record in records:
            self.captions[record.images[0]].append(record.caption)
        if len(self.images) < 2:
            raise DataError(
                f"the {len(records)} training captions are of {len(self.images)} image: wrong alternatives need at "
                "least two."
            )

    def draw_image(self, own: str, rng: np.random.Generator) -> str:
        """Any image but a record's own."""
        while (image := self.images[int(rng.integers(len(self.images)))]) == own:
            pass
        return image

    def draw_caption(self, image: str, rng: np.random.Generator) -> str:
        """Any caption of an image."""
        captions = self.captions[image]
        return captions[int(rng.integers(len(captions)))]


def _summarise_fold(queries: Sequence[RankedPrediction], folds: Sequence[int], fold: int) -> Ranking:
    return summarise([one.fold_rank for one, of in zip(queries, folds, strict=True) if of == fold])  # type: ignore[arg-type]


def _order(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Candidates, best first; equal ones in their order."""
    return np.argsort(-scores, kind="stable")


def _typicality(train: Sequence[RetrievalRecord], records: Sequence[RetrievalRecord]) -> list[float]:
    """Mean log frequency of each caption's words among the training captions."""
    counts = Counter(word for record in train for word in record.caption.lower().split())
    total = sum(counts.values()) + len(counts) + 1
    return [
        float(np.mean([np.log((counts[word] + 1) / total) for word in record.caption.lower().split()]))
        for record in records
    ]


TASK = Retrieval
