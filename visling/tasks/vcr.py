"""Visual commonsense reasoning: which of four answers is right, and which of four rationales explains it? (VCR, Zellers
et al. 2019)

Files    {split}.jsonl and vcr1images/ (`data/annotations/vcr.py`); regions of the image under the stem of its name.
Phases   A model learns one of the two: "answer" (Q -> A) or "rationale" (QA -> R, given the right answer). The official
         score Q -> AR joins the predictions of two models: `joint_report`, `joint_submission`.
Shapes   N examples, G choices, R regions, C object classes.
Releases VisualBERT, VL-BERT and ViLBERT call objects by other names, link, cut and learn differently; each setting that
         is None follows the family (`ModelSpec.tasks`). For other families it is what the field's text says first.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visling import config as configs
from visling.data.annotations.vcr import (
    NEUTRAL_NAMES,
    Sentence,
    VcrRecord,
    find_vcr,
    has_vcr,
    read_metadata,
    read_vcr,
    relevant_objects,
    spell_out,
    with_names,
)
from visling.data.named_objects import (
    CLASSES,
    LISTED_NAMES,
    bind_objects,
    classify_regions,
    describe_objects,
    draw_names,
    list_names,
    read_name_table,
    shows_whole_image,
)
from visling.data.named_text import Cut, Links, Order, lay_out_choices
from visling.data.text import NamedWord, TextLayout
from visling.errors import DataError
from visling.metrics.vcr import vcr_hits, write_phase, write_submission
from visling.runtime import generator_for
from visling.tasks.answers import choice_loss, class_loss, count_choices, count_classes, detail_row, mean_score
from visling.tasks.base import Report, Task, by_id
from visling.types import Batch, Example, Head, Loss, Prediction, RegionArray, Targets, TextRow

JOINT_SCORES = ("answer", "rationale", "joint")
"""Q -> A, QA -> R and Q -> AR in a joint report."""
SUBFOLDER = "vcr"
"""Where a data set of several tasks keeps the files."""


@dataclass(frozen=True, kw_only=True)
class VcrConfig:
    """Which of the two questions is asked, how it is worded, and what is learned."""

    phase: Literal["answer", "rationale"] = "answer"
    """"answer": choose the answer to the question. "rationale": choose the reason for the right answer; where it is not
    known (test), for each answer."""
    loss: Literal["softmax", "sigmoid"] | None = None
    """"softmax": cross-entropy over the choices (VisualBERT, ViLBERT); "sigmoid": each choice is right or wrong, mean
    of their binary cross-entropies (VL-BERT)."""
    positive_weight: float = 1.0
    """Weight of the right choice with loss "sigmoid" (VL-BERT; 1 as configured, 3 in a variant)."""
    names: Literal["mentioned", "listed", "drawn"] | None = None
    """What people are called. "mentioned": neutral names in the order of their mention, from the first again in every
    choice (VisualBERT, after R2C); "listed": neutral names in the order of the objects (VL-BERT); "drawn": names drawn
    once per question from `name_table` (ViLBERT)."""
    name_table: Path | None = None
    """ViLBERT's unisex_names_table.csv; None draws from the neutral names."""
    new_names: bool = False
    """With "listed": start the list at another name at every visit, as the counter of VL-BERT's release amounts to,
    which is never reset, and which changes predictions too."""
    conjunction: bool | None = None
    """Whether "and" stands between the objects of one tag; not, or with VL-BERT."""
    separated: bool | None = None
    """Whether [SEP] stands between question and answer where a rationale is chosen; not, or with ViLBERT."""
    with_question: bool = True
    """Whether rationales are chosen with the question, not by the answer alone (VL-BERT's option `qa2r_noq`)."""
    cut: Cut | None = None
    """How a row that is too long is shortened: "front" (VisualBERT), "shared" (VL-BERT), "longer" or "second" (first
    and multi-task release of ViLBERT)."""
    order: Order = "question_first"
    """How question and choice follow one another; the other orders are options of VL-BERT."""
    links: Links | None = None
    """Which pieces of a name are linked to the region of its object: "none", "first_piece" (VisualBERT), "every_piece"
    (VL-BERT)."""
    only_relevant: bool = False
    """Show only regions of relevant objects; only these use up names that are "listed"."""
    relevance: Literal["phase", "all_texts"] = "phase"
    """Which objects are relevant. "phase": those that question, answers or, for a rationale, rationales name, in the
    order of their first mention (VL-BERT's option `only_use_relevant_dets`). "all_texts": `relevant_objects`
    (VisualBERT)."""
    least_overlap: float = 0.5
    """Overlap (intersection over union) that a region needs to show an object, where the store holds other regions than
    VCR's objects (ours)."""
    class_weight: float | None = None
    """Weight of the loss that predicts the class of every region and of the whole image from its final state; 0, or 1
    with VL-BERT. Regions that show no object are not counted."""


class VCR(Task[VcrRecord, VcrConfig]):
    """Choose an answer, or a rationale."""

    name: ClassVar[str] = "vcr"
    metric: ClassVar[str] = "accuracy"
    choices: ClassVar[bool] = True
    files: ClassVar[str] = "one .jsonl file per split, and vcr1images (docs/tasks/vcr.md)"
    settings: ClassVar[type[VcrConfig]] = VcrConfig

    def __init__(self, config: VcrConfig | None = None, classes: Sequence[str] = CLASSES) -> None:
        super().__init__(config)
        self.classes = tuple(classes)
        """Classes of objects, by target less one."""
        self._table: Sequence[str] | None = None
        self._objects: dict[str, tuple[NDArray[np.float32], tuple[int, int]]] = {}
        self._notes: dict[tuple[Path, str], str] = {}

    @property
    def heads(self) -> Mapping[str, Head]:
        """A score per row, and the classes of all regions if they are learned."""
        heads = {"score": Head(kind="score", outputs=1)}
        if self.config.class_weight:
            outputs = len(self.classes) + 1
            heads["objects"] = Head(kind="region_targets", outputs=outputs, options={"classes": outputs})
        return heads

    @property
    def group(self) -> int:
        """Rows of an example, one per choice."""
        return 4

    def records(self, root: Path, split: str) -> list[VcrRecord]:
        """Questions of a split in the order of its file.

        Args:
            split: train, val or test; looked for in the folder, its `vcr1annots` and its `vcr`.
        Raises:
            DataError: no such split, a file that is not of the official layout, an id that occurs twice, or an image
                whose objects are needed and not described.
        """
        inner = root / SUBFOLDER
        file, images = find_vcr(inner if has_vcr(inner, split) and not has_vcr(root, split) else root, split)
        data = read_vcr(file, images)
        if data.repeated:
            raise DataError(
                f"{file}: {data.repeated} questions have the annot_id of an earlier one, by which predictions are "
                "scored. Download the file again, or leave one of each out."
            )
        if data.empty:
            self._notes[root, split] = f"{file}: left out {data.empty} questions with a sentence without a word"
        if self._reads_objects:
            for record in {record.images[0]: record for record in data.records}.values():
                if record.metadata is None or not record.metadata.is_file():
                    read_metadata(record)
        return list(data.records)

    @property
    def _reads_objects(self) -> bool:
        """Whether the boxes of objects are needed."""
        config = self.config
        return bool(config.class_weight) or config.only_relevant or (config.links or "none") != "none"

    def query(self, texts: Sequence[str], images: Sequence[str]) -> VcrRecord:
        """A question and its choices, of which none is known to be right; in phase "rationale" the first text is
        question and answer.

        Raises:
            DataError: fewer than two choices.
        """
        if len(texts) < 3:
            raise DataError(
                f"the task vcr chooses among answers: give a question and at least two choices; found {len(texts)} "
                f"text{'' if len(texts) == 1 else 's'}."
            )
        question, *choices = ((text,) for text in texts)
        asked = self.config.phase == "answer"
        return VcrRecord(
            id=images[0],
            images=tuple(images),
            objects=(),
            question=question,
            answer_choices=tuple(choices) if asked else (),
            rationale_choices=() if asked else tuple(choices),
            answer_label=None,
            rationale_label=None,
            movie="",
            question_number=0,
            metadata=None,
        )

    def setup(self, records: Sequence[VcrRecord]) -> None:
        """List the classes of the training images' objects, if some are not among those of VCR.

        Raises:
            DataError: a question without a label.
        """
        if unknown := next((record for record in records if self._label(record) is None), None):
            raise DataError(
                f"question {unknown.id!r} has no label of phase {self.config.phase!r}: training needs a split with the "
                "right choices (train or val)."
            )
        found = {kind for record in records for kind in record.objects}
        if not found <= set(CLASSES):
            self.classes = tuple(sorted(found))

    def example(self, record: VcrRecord, layout: TextLayout, rng: np.random.Generator) -> Example:
        """A row for each choice (for each choice of each answer, where the right answer is not known) and the image
        that all rows share."""
        config, rows = self.config, list[TextRow]()
        names = self._name_people(record, rng)
        wording = partial(with_names, objects=record.objects, conjunction=bool(config.conjunction))
        for parts in self._contexts(record):
            named, so_far = wording(tuple(token for part in parts for token in part), names=names)
            first = len(wording(parts[0], names=names)[0])
            spoken = [part for part in (named[:first], named[first:]) if part]
            choices: list[Sequence[NamedWord]] = [wording(choice, names=so_far)[0] for choice in self._choices(record)]
            rows += lay_out_choices(
                layout,
                spoken if config.with_question else spoken[-1:],
                choices,
                cut=config.cut or "front",
                links=config.links or "none",
                separated=bool(config.separated),
                order=config.order,
            )
        label = self._label(record)
        return Example(
            id=record.id,
            rows=tuple(rows),
            images=record.images,
            labels={} if label is None else {"choice": label},
            chosen_regions=partial(self._choose_regions, record) if config.only_relevant and record.objects else None,
            linked_regions=partial(self.bind, record) if any(row.links for row in rows) else None,
            region_objects=partial(describe_objects, record, self.bind, self.classes),
        )

    def shown_objects(self, record: VcrRecord) -> list[int]:
        """The objects of a record whose regions are shown, in the order in which they are."""
        if not self.config.only_relevant:
            return list(range(len(record.objects)))
        if self.config.relevance == "all_texts":
            return relevant_objects(record)
        sentences = [record.question, *record.answer_choices]
        if self.config.phase == "rationale":
            sentences += record.rationale_choices
        return list(
            dict.fromkeys(item for text in sentences for tag in text if not isinstance(tag, str) for item in tag)
        )

    def _choose_regions(self, record: VcrRecord, regions: RegionArray) -> NDArray[np.int64]:
        """The regions of the shown objects, after that of the whole image, if the store has one."""
        bound = self.bind(record, regions)[self.shown_objects(record)].tolist()
        whole = np.flatnonzero(shows_whole_image(regions.boxes, regions.size)).tolist()
        return np.array(list(dict.fromkeys(region for region in (*whole, *bound) if region >= 0)), np.int64)

    def _contexts(self, record: VcrRecord) -> list[tuple[Sentence, ...]]:
        """What the choices of a record are chosen by: the question, or the question with each possible answer."""
        if self.config.phase == "answer" or not record.answer_choices:
            return [(record.question,)]
        if record.answer_label is not None:
            return [(record.question, record.answer_choices[record.answer_label])]
        return [(record.question, answer) for answer in record.answer_choices]

    def _choices(self, record: VcrRecord) -> tuple[Sentence, ...]:
        return record.answer_choices if self.config.phase == "answer" else record.rationale_choices

    def _label(self, record: VcrRecord) -> int | None:
        return record.answer_label if self.config.phase == "answer" else record.rationale_label

    def _name_people(self, record: VcrRecord, rng: np.random.Generator) -> Mapping[int, str]:
        """Names that objects have before the question mentions any."""
        if self.config.names == "listed":
            shown = self.shown_objects(record)
            first = int(rng.integers(len(LISTED_NAMES))) if self.config.new_names else 0
            return dict(zip(shown, list_names([record.objects[item] for item in shown], first).values(), strict=True))
        if self.config.names == "drawn":
            if self._table is None:
                table = self.config.name_table
                self._table = tuple(dict.fromkeys(NEUTRAL_NAMES)) if table is None else read_name_table(table)
            own = generator_for(zlib.crc32(record.id.encode()))  # the same names at every visit, as in the release
            return draw_names(record.objects, self._table, lambda entries: int(own.integers(entries)))
        return {}

    def bind(self, record: VcrRecord, regions: RegionArray) -> NDArray[np.int64]:
        """(objects,) the region that shows each object, -1 where there is none.

        Raises:
            DataError: the objects of the image are not described.
        """
        return bind_objects(
            self._find_objects(record, regions.size), regions.boxes, least_overlap=self.config.least_overlap
        )

    def _find_objects(self, record: VcrRecord, size: tuple[int, int]) -> NDArray[np.float32]:
        """Boxes of the objects, in pixels of an image of `size`."""
        image = record.images[0]
        if image not in self._objects:
            described = read_metadata(record)
            self._objects[image] = described.boxes, described.size
        boxes, own = self._objects[image]
        return boxes if own == size else boxes * np.tile(np.divide(size, own), 2).astype(np.float32)

    def region_targets(self, record: VcrRecord, regions: Sequence[RegionArray]) -> Mapping[str, Any]:
        """Class of each region: that of the object that it shows, 0 for the whole image, IGNORE for others."""
        if not self.config.class_weight:
            return {}
        classes = classify_regions(record.objects, self.bind(record, regions[0]), regions[0], self.classes)
        rows = len(self._contexts(record)) * len(self._choices(record))
        return {"object_classes": np.tile(classes, (rows, 1))}

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Loss:
        """Loss of the choice over (N, G) scores, in float32, and the weighted loss of the classes of all regions."""
        scores, choice = logits["score"].float(), cast(Tensor, targets.choice)
        loss = choice_loss(scores, choice, self.config.loss, self.config.positive_weight)
        if self.config.class_weight and targets.object_classes is not None:
            loss += class_loss(logits["objects.classes"], targets.object_classes).scaled(self.config.class_weight)
        return loss

    def count(self, targets: Targets, *, whole: bool) -> Mapping[str, Tensor]:
        choice = cast(Tensor, targets.choice)
        counts = {"answer": count_choices(choice, self.group, self.config.loss, self.config.positive_weight)}
        if self.config.class_weight and targets.object_classes is not None:
            counts["object_classes"] = count_classes(targets.object_classes, whole=whole)
        return counts

    def decode(self, logits: Mapping[str, Tensor], batch: Batch, records: Sequence[VcrRecord]) -> list[Prediction]:
        """The number of the best choice; probabilities are a softmax over the choices, whatever the loss.

        Where rationales are chosen for each answer, the value is the best rationale of each, "2 0 1 1", and candidates
        are called "answer:rationale".
        """
        scores = logits["score"].detach().double().cpu()
        predictions = []
        for record, row in zip(records, scores, strict=True):
            contexts = len(self._contexts(record))
            chances = row.view(contexts, -1).softmax(1)
            named = {
                f"{answer}:{number}" if contexts > 1 else str(number): chance
                for answer, given in enumerate(chances.tolist())
                for number, chance in enumerate(given)
            }
            value, sure = " ".join(map(str, chances.argmax(1).tolist())), float(chances.max(1).values.prod())
            top = tuple(sorted(named.items(), key=lambda pair: -pair[1]))
            predictions.append(Prediction(id=record.id, value=value, confidence=sure, top=top))
        return predictions

    def logit(
        self, logits: Mapping[str, Tensor], batch: Batch, number: int, prediction: Prediction, place: int
    ) -> Tensor:
        """The score of a choice."""
        answer, _, choice = prediction.top[place][0].rpartition(":")
        return logits["score"][number].view(len(prediction.value.split()), -1)[int(answer or 0), int(choice)]

    def report(self, predictions: Sequence[Prediction], records: Sequence[VcrRecord]) -> Report:
        """Accuracy of the phase."""
        pairs = by_id(predictions, records)
        hits = [float(prediction.value == str(_known(record, self._label(record)))) for prediction, record in pairs]
        return Report(
            scores={"accuracy": mean_score(hits, [record.images[0] for record in records])},
            variants={"phase": self.config.phase},
        )

    def labelled(self, records: Sequence[VcrRecord]) -> bool:
        """Whether the right choice of every question is known."""
        return all(self._label(record) is not None for record in records)

    def notes(self, records: Sequence[VcrRecord]) -> Sequence[str]:
        """What was left out of the files."""
        return tuple(self._notes.values())

    def submission(self, predictions: Sequence[Prediction]) -> str:
        """This phase's columns of the official CSV file, which `joint_submission` completes; rationales given the right
        answer alone are `rationale_0` to `rationale_3`."""
        return write_phase({one.id: _chances(one) for one in predictions}, self.config.phase)

    def join_phases(
        self, predictions: Sequence[Prediction], others: Sequence[Prediction], records: Sequence[VcrRecord]
    ) -> tuple[Report | None, str | None]:
        """`joint_report`, or `joint_submission` where the right choices are not known."""
        asked = self.config.phase == "answer"
        answers, rationales = (predictions, others) if asked else (others, predictions)
        if all(record.answer_label is not None and record.rationale_label is not None for record in records):
            return joint_report(answers, rationales, records), None
        return None, joint_submission(answers, rationales)

    def baselines(self, train: Sequence[VcrRecord], records: Sequence[VcrRecord]) -> Mapping[str, list[Prediction]]:
        """The most frequent number of the right choice in the training questions."""
        counts = Counter(self._label(record) for record in train)
        best = min(counts, key=lambda label: (-counts[label], str(label)))
        label, share = str(best), counts[best] / len(train)
        top = ((label, share),)
        return {"majority choice": [Prediction(id=each.id, value=label, confidence=share, top=top) for each in records]}

    def details(self, predictions: Sequence[Prediction], records: Sequence[VcrRecord]) -> list[dict[str, Any]]:
        """One row per question with its choices; objects are written as in VCR's browser, `[person1]`."""
        return [
            detail_row(
                prediction,
                record,
                text=self._describe(record),
                kind=self.config.phase,
                truth=None if (label := self._label(record)) is None else str(label),
                score=None if label is None else float(prediction.value == str(label)),
            )
            for prediction, record in by_id(predictions, records)
        ]

    def _describe(self, record: VcrRecord) -> str:
        """Context and numbered choices as one text."""
        contexts = self._contexts(record)
        context = contexts[0] if len(contexts) == 1 else (record.question,)
        texts = [" ".join(spell_out(part, record.objects) for part in context)]
        choices = (spell_out(choice, record.objects) for choice in self._choices(record))
        return " | ".join([*texts, *(f"{number}: {choice}" for number, choice in enumerate(choices))])

    def state(self) -> dict[str, Any]:
        """Settings and classes of objects."""
        return {**super().state(), "classes": list(self.classes)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The task of a saved model."""
        return cls(configs.from_dict(VcrConfig, state.get("config", {})), state.get("classes", CLASSES))


def joint_report(
    answers: Sequence[Prediction], rationales: Sequence[Prediction], records: Sequence[VcrRecord]
) -> Report:
    """Accuracies Q -> A, QA -> R and Q -> AR of two models.

    Args:
        answers: predictions of phase "answer".
        rationales: predictions of phase "rationale", given the right answer or every answer.
    Raises:
        DataError: predictions and records are not of the same questions, or a label is not known.
    """
    labels = [(_known(record, record.answer_label), _known(record, record.rationale_label)) for record in records]
    chosen = [_chances(prediction)[0] for prediction, _ in by_id(answers, records)]
    reasons = []
    for (prediction, _), (answer, _) in zip(by_id(rationales, records), labels, strict=True):
        given = _chances(prediction)
        reasons.append(given[answer if len(given) > 1 else 0])
    images = [record.images[0] for record in records]
    hits = vcr_hits(chosen, reasons, labels).T.astype(float).tolist()
    return Report(scores={name: mean_score(own, images) for name, own in zip(JOINT_SCORES, hits, strict=True)})


def joint_submission(answers: Sequence[Prediction], rationales: Sequence[Prediction]) -> str:
    """The official CSV file of two models: 1 + 4 + 16 columns.

    Args:
        answers: predictions of phase "answer".
        rationales: predictions of phase "rationale" for every answer, as for a split without labels.
    Raises:
        DataError: predictions of other questions, or of rationales given one answer only.
    """
    given = {prediction.id: _chances(prediction) for prediction in rationales}
    if missing := {prediction.id for prediction in answers} ^ given.keys():
        raise DataError(
            f"{len(missing)} questions have predictions of one phase only, first {min(missing)!r}: "
            "evaluate both models on the same split."
        )
    if short := next((name for name, scores in given.items() if len(scores) == 1), None):
        raise DataError(
            f"the rationales of {short!r} were chosen given the right answer only; the official file wants those given "
            "each answer. Evaluate a split without labels, such as test."
        )
    return write_submission({one.id: (_chances(one)[0], given[one.id]) for one in answers})


def _chances(prediction: Prediction) -> NDArray[np.float64]:
    """(contexts, choices) probabilities of a prediction."""
    named = {tuple(map(int, name.split(":"))): chance for name, chance in prediction.top}
    ordered = np.array([named[place] for place in sorted(named)])
    contexts = len({place[0] for place in named}) if len(min(named)) > 1 else 1
    return ordered.reshape(contexts, -1)


def _known(record: VcrRecord, label: int | None) -> int:
    if label is None:
        raise DataError(f"{record.id} has no label, so nothing can be scored. Write the submission file instead.")
    return label


TASK = VCR
