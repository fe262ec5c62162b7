"""LXMERT's merged pre-training data: for every image its captions and questions from five data sets, questions with
their answers.

Source   LXMERT release, `data/lxmert/*.json` and `lxmert_data.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.data.annotations.files import Layout, has_words, optional_text, plain_id, read_json
from visling.data.annotations.questions import QuestionRecord
from visling.data.answer_table import table_form
from visling.errors import DataError
from visling.types import Record

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("mscoco_train", "mscoco_nominival", "vgnococo"),
    "val": ("mscoco_minival",),
}
"""Parts that the release trains on and validates on; nominival and minival are COCO's validation images, vgnococo
those of Visual Genome only."""

_SCORES = (0.3, 0.6, 0.9, 1.0)
"""Of an answer that 1, 2, 3, 4 or more people gave."""


@dataclass(frozen=True, kw_only=True)
class LxmertRecord(Record):
    """A sentence about an image, with its answers if it is a question."""

    sentence: str
    source: str
    """Data set that it comes from: mscoco, vg, vqa, gqa, visual7w."""
    scores: Mapping[str, float] | None
    """Answer as written -> score; None = not a question."""


@dataclass(frozen=True, kw_only=True)
class LxmertData:
    """What merged files hold, and what was left out of them."""

    records: tuple[LxmertRecord, ...]
    """In the order of the files: image by image, data set by data set."""
    empty: int
    """Sentences without a word, left out."""
    repeated: int
    """Sentences whose id had occurred before, left out."""


def read_lxmert(*paths: str | Path) -> LxmertData:
    """Sentences of merged files; ids are `{image}_{source}_{number:03d}`, as in the release.

    Raises:
        DataError: a file is missing, truncated or of another layout, or sentences and answers of an image differ in
            number.
    """
    records: list[LxmertRecord] = []
    seen: set[str] = set()
    empty = repeated = 0
    for path in map(Path, paths):
        content = read_json(path)
        if not isinstance(content, list) or any(
            not isinstance(image, dict) or not {"img_id", "sentf"} <= image.keys() for image in content
        ):
            raise DataError(
                f"{path} must be a list of images with 'img_id' and 'sentf'; found another layout. "
                "Is it a merged file of LXMERT?"
            )
        with Layout(path, "image") as at:
            for at.entry, image in enumerate(content):
                for source, sentences in image["sentf"].items():
                    labels = (image.get("labelf") or {}).get(source)
                    if labels is not None and len(labels) != len(sentences):
                        raise DataError(
                            f"{path}: image {image['img_id']} has {len(sentences)} sentences of {source}, "
                            f"but answers to {len(labels)}."
                        )
                    for number, sentence in enumerate(sentences):
                        name = f"{image['img_id']}_{source}_{number:03d}"
                        if name in seen:
                            repeated += 1
                        elif not has_words(optional_text(sentence)):
                            empty += 1
                        else:
                            seen.add(name)
                            scores = None if labels is None else read_scores(labels[number])
                            records.append(
                                LxmertRecord(
                                    id=name,
                                    images=(plain_id(image["img_id"]),),
                                    sentence=sentence.strip(),
                                    source=source,
                                    scores=scores,
                                )
                            )
    return LxmertData(records=tuple(records), empty=empty, repeated=repeated)


def read_scores(label: Any) -> dict[str, float]:
    """Answer -> score of a question.

    Raises:
        TypeError: a label is something else.
    """
    if not isinstance(label, dict) or not all(
        isinstance(answer, str) and type(score) in (int, float) for answer, score in label.items()
    ):
        raise TypeError(f"the label {label!r:.60}, where answers with scores are expected")
    return label


def find_lxmert(root: str | Path, split: str) -> list[Path]:
    """The merged files of a split in a folder or its `lxmert`: "train", "val", or names of files joined by commas
    (`mscoco_train,vgnococo`).

    Raises:
        DataError: one of them is missing.
    """
    folder = _find_folder(Path(root))
    files = [folder / f"{part}.json" for part in SPLITS.get(split, tuple(split.split(",")))]
    if missing := [file.name for file in files if not file.is_file()]:
        present = ", ".join(sorted(file.name for file in folder.glob("*.json"))) or "no JSON file"
        raise DataError(
            f"LXMERT's split {split!r} in {folder} lacks {', '.join(missing)}; found {present}. "
            "Name the parts to be used as the split."
        )
    return files


def has_lxmert(root: Path, split: str) -> bool:
    """Whether a folder has a merged file of a split."""
    return any((_find_folder(root) / f"{part}.json").is_file() for part in SPLITS.get(split, tuple(split.split(","))))


def find_answer_table(root: str | Path) -> Path | None:
    """The answer table next to the merged files (`all_ans.json`), if there is one."""
    file = _find_folder(Path(root)) / "all_ans.json"
    return file if file.is_file() else None


def from_question(record: QuestionRecord, source: str) -> LxmertRecord:
    """A question of another data set as a merged file holds it: a single answer has score 1, answers of many people
    have 0.3 to 1 depending on how many gave them."""
    scores: Mapping[str, float] | None = None
    if record.answers is not None:
        counts = Counter(table_form(answer) for answer in record.answers)
        alone = len(record.answers) == 1
        scores = {answer: 1.0 if alone else _SCORES[min(count, len(_SCORES)) - 1] for answer, count in counts.items()}
    return LxmertRecord(id=record.id, images=record.images, sentence=record.question, source=source, scores=scores)


def _find_folder(root: Path) -> Path:
    return root / "lxmert" if (root / "lxmert").is_dir() else root
