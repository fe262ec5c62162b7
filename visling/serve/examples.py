"""What can be asked at once: pictures and questions of the drawn scenes that a run was trained on, where they are
still found."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visling.data.annotations.captions import CaptionRecord
from visling.data.annotations.classification import LabelledText
from visling.data.annotations.entities import EntitiesRecord
from visling.data.annotations.nlvr import NlvrRecord
from visling.data.annotations.referring import ReferringRecord
from visling.data.annotations.statements import Nlvr2Record
from visling.data.annotations.vcr import Sentence, VcrRecord
from visling.errors import VislingError
from visling.image_ids import canonical
from visling.pretrained.description import find_run
from visling.scenes.clear_questions import list_questions
from visling.scenes.language import plural
from visling.serve.pictures import Pictures
from visling.serve.served import ServedModel
from visling.tasks.base import Task
from visling.types import Record

MOST_QUESTIONS = 8
"""That are offered for a model."""
_BEGINNINGS = ("what color", "what texture", "how many")
"""Of questions with one clear answer."""
_SPLITS = ("test", "test1", "testA")
"""Of the scenes, by what the tasks call them; none of them was trained on."""


@dataclass(frozen=True, kw_only=True)
class OfferedQuestion:
    """A question about examples."""

    images: tuple[str, ...]
    """Ids of examples."""
    text: str
    choices: tuple[str, ...] = ()
    truth: str | None = None
    """Its right answer, if that is one text."""


def find_scenes(run: str | Path) -> Path | None:
    """Folder of the scenes that a run was trained on: where its run.json says, or beside the run; None if it is
    neither here nor there."""
    folder = find_run(Path(run))
    if folder is None:
        return None
    try:
        data = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("data") or []
    except (OSError, ValueError, AttributeError):
        data = []
    named = [Path(str(path)) for path in ([data] if isinstance(data, str) else data)]
    beside = [above / "scenes" for above in list(folder.resolve().parents)[:2]]
    return next((path for path in (*named, *beside) if _is_scenes(path)), None)


def gallery_of(scenes: Path) -> Path:
    """Its test pictures."""
    return scenes / "images" / "test"


def list_clear_questions(scenes: Path, pictures: Pictures) -> dict[str, list[tuple[str, str]]]:
    """Questions with one clear answer, and the answer, by example."""
    ids = {one.path: one.id for one in pictures.examples.values()}
    found: dict[str, list[tuple[str, str]]] = {}
    for question in list_questions(scenes):
        name = ids.get(question.image.resolve())
        if name is not None:
            found.setdefault(name, []).append((question.text, question.answer))
    return found


def offer_questions(
    model: ServedModel, scenes: Path, pictures: Pictures, clear: Mapping[str, Sequence[tuple[str, str]]]
) -> list[OfferedQuestion]:
    """A few questions for a model: clear ones if it answers questions, else annotations of its task, each about other
    pictures; none if the task is not one of the scenes'.

    Pictures of the task's own (pairs, say) become examples that are not searched.

    Args:
        clear: of `list_clear_questions`.
    """
    if model.form == "vqa":
        return list(itertools.islice(_take_turns(clear), MOST_QUESTIONS))
    offered: list[OfferedQuestion] = []
    paths = {canonical(path.stem): path for path in _list_pictures(scenes)}
    taken: set[str] = set()
    for record in _read_records(model.predictor.task, scenes):
        question = describe_record(record, rationale=getattr(model.predictor.task.config, "phase", "") == "rationale")
        files = [paths.get(canonical(image)) for image in record.images]
        if question is None or None in files or not taken.isdisjoint(record.images):
            continue
        ids = [pictures.offer(file) for file in files if file is not None]
        taken.update(record.images)
        text, choices, truth = question
        offered.append(OfferedQuestion(images=tuple(ids), text=text, choices=choices, truth=truth))
        if len(offered) == MOST_QUESTIONS:
            break
    return offered


def describe_record(record: Record, *, rationale: bool = False) -> tuple[str, tuple[str, ...], str | None] | None:
    """Text, choices and right answer of an annotation, as a person would type them; None where it cannot be typed.

    Args:
        rationale: of VCR's questions the answer is given, and a reason for it is chosen.
    """
    match record:
        case ReferringRecord():
            return record.raw, (), None
        case EntitiesRecord():
            return _bracket_phrases(record), (), None
        case NlvrRecord() | Nlvr2Record():
            return record.sentence, (), None if record.label is None else str(record.label).lower()
        case LabelledText():
            label = record.labels[0] if record.labels and not record.several else None
            return (record.text, (), label) if record.second is None else None
        case VcrRecord():
            return _spell_choices(record, rationale)
        case CaptionRecord():
            return record.caption, (), None
    return None


def _take_turns(clear: Mapping[str, Sequence[tuple[str, str]]]) -> Iterator[OfferedQuestion]:
    """A question about each picture: for a colour, a texture and a number in turn, as far as it has them."""
    for (name, questions), beginning in zip(clear.items(), itertools.cycle(_BEGINNINGS), strict=False):
        text, truth = next((pair for pair in questions if pair[0].startswith(beginning)), questions[0])
        yield OfferedQuestion(images=(name,), text=text, truth=truth)


def _bracket_phrases(record: EntitiesRecord) -> str:
    """The sentence with its phrases in brackets."""
    parts, end = [], 0
    for phrase in sorted(record.phrases, key=lambda one: one.start):
        parts += [record.sentence[end : phrase.start], "[", record.sentence[phrase.start : phrase.stop], "]"]
        end = phrase.stop
    return "".join([*parts, record.sentence[end:]])


def _spell_choices(record: VcrRecord, rationale: bool) -> tuple[str, tuple[str, ...], str | None] | None:
    """Question and choices with "the star" in place of a tag; None if a tag could mean several."""
    context, sentences, label = [record.question], record.answer_choices, record.answer_label
    if rationale:
        if label is None:
            return None
        context, sentences, label = [*context, sentences[label]], record.rationale_choices, record.rationale_label
    told, listed = ([_spell(one, record.objects) for one in some] for some in (context, sentences))
    text, choices = [one for one in told if one is not None], [one for one in listed if one is not None]
    if len(text) < len(told) or len(choices) < max(len(listed), 2):
        return None
    return " ".join(text), tuple(choices), None if label is None else choices[label]


def _spell(sentence: Sentence, objects: Sequence[str]) -> str | None:
    """A sentence with "the star" in place of the tag of the only star, "the stars" in place of that of all stars."""
    words = []
    for token in sentence:
        if isinstance(token, str):
            words.append(token)
            continue
        (name, *others) = {objects[number] for number in token}
        if others or objects.count(name) != len(token):
            return None
        words.append(f"the {name if len(token) == 1 else plural(name)}")
    return " ".join(words).replace(" ?", "?").replace(" .", ".")


def _read_records(task: Task[Any, Any], scenes: Path) -> Sequence[Record]:
    """Annotations of a test split of the scenes."""
    for split in _SPLITS:
        try:
            records: Sequence[Record] = task.records(scenes, split)
        except (VislingError, OSError):
            continue
        return records
    return ()


def _is_scenes(folder: Path) -> bool:
    return (folder / "annotations" / "instances_test.json").is_file() and gallery_of(folder).is_dir()


def _list_pictures(scenes: Path) -> Iterator[Path]:
    """Pictures of scenes and of panels that were not trained on."""
    yield from gallery_of(scenes).glob("*.png")
    for split in _SPLITS:
        yield from (scenes / "nlvr2" / "images" / split).rglob("*.png")
        yield from (scenes / "nlvr" / split).rglob("*.png")
