"""Writes the embedded data set: pictures, annotations in the formats of COCO, VQA v2 and NLVR, and text without
pictures."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from visling.config import to_dict
from visling.errors import RunError
from visling.runtime import generator_for
from visling.scenes.captions import captions
from visling.scenes.drawing import draw_scene
from visling.scenes.files import (
    SCHEMA,
    image_entry,
    in_order,
    info,
    instance_entry,
    license_entry,
    stem,
    write_json,
    write_lines,
)
from visling.scenes.grammar import Tree, write_conllu
from visling.scenes.panels.write import write_panels
from visling.scenes.questions import FAMILIES, answer_type, candidates
from visling.scenes.quotas import Candidate, Quotas
from visling.scenes.settings import ScenesConfig
from visling.scenes.statements import statements
from visling.scenes.tasks import classification, entities, gqa, nlvr2, referring, retrieval, vcr
from visling.scenes.tasks.base import TaskWriter
from visling.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, VALUES, Scene, pick, sample_items

Progress = Callable[[int, int], None]

_WITHOUT_EFFECT = ("processes", "overwrite")
"""Settings that do not change what is written."""


@dataclass(frozen=True, kw_only=True)
class _DrawnScene:
    """One scene and what could be said about it."""

    scene: Scene
    captions: list[Tree]
    questions: list[Candidate]
    statements: list[Candidate]
    tasks: Mapping[str, Any]
    """Task -> what its writer could say."""


TASKS: tuple[type[TaskWriter], ...] = (
    gqa.WRITER,
    entities.WRITER,
    referring.WRITER,
    classification.WRITER,
    nlvr2.WRITER,
    retrieval.WRITER,
    vcr.WRITER,
)
"""Writers of the downstream tasks, in the order of their counts."""


def write_scenes(out: Path, config: ScenesConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Draw the data set into the folder `out` and return its summary (also written as scenes.json).

    Everything is written next to `out` under a temporary name and renamed at the end: a run that is killed leaves
    nothing that looks complete.

    Args:
        out: folder to write; new or empty unless `config.overwrite`.
        progress: called with (pictures done, pictures in all).
    Raises:
        RunError: the folder is not empty or cannot be written.
        ConfigError: the objects do not fit into the pictures.
    """
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; --out needs a folder.")
    try:
        if out.is_dir() and any(out.iterdir()) and not config.overwrite:
            raise RunError(f"{out} is not empty. Give a new folder, or replace it with --set overwrite=true.")
        part = out.with_name(f".{out.name}.part")
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
    except OSError as error:
        raise RunError(
            f"cannot write to {out.parent}: {error.strerror or error}. Choose a folder that you may write to."
        ) from error
    try:
        summary = _write_all(part, config, progress or (lambda done, total: None))
        _replace_folder(part, out)
    except OSError as error:
        raise RunError(
            f"writing {out} failed: {error.strerror or error}. Nothing was left behind; free some space or choose "
            "another folder."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return summary


def _replace_folder(part: Path, out: Path) -> None:
    """Put the finished folder in place; an older one is moved aside first and deleted last."""
    old = out.with_name(f".{out.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    part.rename(out)
    if old.exists():
        shutil.rmtree(old)


def _write_all(folder: Path, config: ScenesConfig, progress: Progress) -> dict[str, Any]:
    """Write every file into the folder; returns the summary."""
    total = config.images + config.panels
    counts: dict[str, Any] = {}
    (folder / "annotations").mkdir()
    if config.images:
        (folder / "statements").mkdir()
        (folder / "text").mkdir()
        for split in config.bounds(config.images):
            (folder / "images" / split).mkdir(parents=True)
        drawn = _draw_all(folder, config)
        done = 0
        for split, places in config.bounds(config.images).items():
            files, writers = _SplitFiles(split, config), [kind(split, config) for kind in TASKS]
            for one in itertools.islice(drawn, len(places)):
                files.add(one)
                for writer in writers:
                    rng = generator_for(config.seed, one.scene.image_id, writer.purpose, 1)
                    writer.add(one.scene, one.tasks[writer.name], rng)
                done += 1
                progress(done, total)
            counts[split] = files.write(folder) | {
                f"{writer.name}_{what}": number for writer in writers for what, number in writer.write(folder).items()
            }
    if config.panels:
        counts["nlvr"] = write_panels(folder, config, lambda done: progress(config.images + done, total))
    settings = {name: value for name, value in to_dict(config).items() if name not in _WITHOUT_EFFECT}
    summary = {
        "schema": SCHEMA,
        "config": settings,
        "versions": {"pillow": version("pillow"), "numpy": version("numpy")},
        "values": {name: list(values) for name, values in VALUES.items()},
        "question_types": list(FAMILIES),
        "counts": counts,
    }
    write_json(folder / "scenes.json", summary, indent=1)
    return summary


def _draw_all(folder: Path, config: ScenesConfig) -> Iterator[_DrawnScene]:
    """Every scene in order; its picture is on disk by the time it is yielded."""
    jobs = [
        (str(folder / "images" / split), config, place + 1)
        for split, places in config.bounds(config.images).items()
        for place in places
    ]
    return in_order(_draw_one, jobs, config.processes)


def _draw_one(job: tuple[str, ScenesConfig, int]) -> _DrawnScene:
    """Draw one scene and collect all that could be said about it."""
    folder, config, image_id = job
    # One generator per purpose, so that the world is the same in both styles and a new caption does not change a
    # question.
    world, pencil, voice, asker, judge = (generator_for(config.seed, image_id, purpose) for purpose in range(5))
    items = sample_items(world, config.min_objects, config.max_objects)
    picture, placed = draw_scene(items, config.size, config.style, pencil)
    picture.save(Path(folder) / f"{stem(image_id)}.png", compress_level=4)
    scene = Scene(image_id=image_id, size=config.size, items=tuple(placed))
    return _DrawnScene(
        scene=scene,
        captions=captions(scene, voice, config.captions_per_image),
        questions=candidates(scene, asker) if config.questions_per_image else [],
        statements=statements(scene, judge) if config.statements_per_image else [],
        tasks={
            kind.name: kind.describe(scene, generator_for(config.seed, image_id, kind.purpose, 0)) for kind in TASKS
        },
    )


class _SplitFiles:
    """Collects the annotations of one split and writes them."""

    def __init__(self, split: str, config: ScenesConfig) -> None:
        self.split, self.config = split, config
        self.number = ("train", "val", "test").index(split)
        self.images: list[dict[str, Any]] = []
        self.instances: list[dict[str, Any]] = []
        self.captions: list[dict[str, Any]] = []
        self.parses: list[tuple[str, Tree]] = []
        self.passages: list[str] = []
        self.questions: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self.statements: list[dict[str, Any]] = []
        self.asked, self.stated = Quotas(), Quotas()
        self.given: Counter[str] = Counter()

    def add(self, drawn: _DrawnScene) -> None:
        """Collect the annotations of one scene."""
        scene, config = drawn.scene, self.config
        self.images.append(image_entry(scene.image_id, f"{stem(scene.image_id)}.png", scene.size, scene.size))
        self.instances += [
            instance_entry(scene, k) | {"attributes": [item.color, item.size, item.texture]}
            for k, item in enumerate(scene.items)
        ]
        for k, sentence in enumerate(drawn.captions):
            number = scene.image_id * 100 + k
            self.captions.append({"id": number, "image_id": scene.image_id, "caption": sentence.text})
            self.parses.append((str(number), sentence))
        if drawn.captions:
            self.passages.append(". ".join(sentence.text for sentence in drawn.captions) + ".")
        rng = generator_for(config.seed, scene.image_id, 10)
        for k, question in enumerate(self.asked.choose(drawn.questions, config.questions_per_image, rng)):
            self._add_question(scene.image_id, scene.image_id * 1000 + k, question, rng)
        for k, statement in enumerate(self.stated.choose(drawn.statements, config.statements_per_image, rng)):
            self.statements.append(
                {
                    "sentence": statement.text,
                    "label": statement.answer,
                    "identifier": f"{scene.image_id}-{k}",
                    "image": stem(scene.image_id),
                }
            )

    def _add_question(self, image_id: int, question_id: int, question: Candidate, rng: np.random.Generator) -> None:
        """Write a question with its ten answers."""
        answers = [_add_noise(question, self.config.answer_noise, rng) for _ in range(10)]
        most = max(Counter(answers).items(), key=lambda pair: (pair[1], pair[0] == question.answer, pair[0]))[0]
        self.given[f"{question.family}: {question.answer}"] += 1
        self.questions.append({"image_id": image_id, "question": question.text, "question_id": question_id})
        self.answers.append(
            {
                "question_type": question.family,
                "multiple_choice_answer": most,
                "answers": [
                    {
                        "answer": answer,
                        "answer_confidence": "yes" if answer == question.answer else "maybe",
                        "answer_id": k + 1,
                    }
                    for k, answer in enumerate(answers)
                ],
                "image_id": image_id,
                "answer_type": answer_type(question.answer),
                "question_id": question_id,
            }
        )

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files of the split and return their counts."""
        split, notes = self.split, folder / "annotations"
        head = {"info": info("scenes"), "licenses": [license_entry()], "images": self.images}
        categories = [{"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(SHAPES)]
        write_json(
            notes / f"instances_{split}.json",
            head | {"annotations": self.instances, "categories": categories, "attributes": attribute_names()},
        )
        write_json(notes / f"captions_{split}.json", head | {"annotations": self.captions})
        (notes / f"captions_{split}.conllu").write_text(write_conllu(self.parses), encoding="utf-8", newline="\n")
        vqa = {
            "info": info("scenes questions"),
            "license": license_entry(),
            "data_type": "scenes",
            "data_subtype": split,
        }
        questions = vqa | {"task_type": "Open-Ended", "questions": self.questions}
        write_json(notes / f"v2_OpenEnded_scenes_{split}_questions.json", questions)
        write_json(notes / f"v2_scenes_{split}_annotations.json", vqa | {"annotations": self.answers})
        write_lines(folder / "statements" / f"{split}.json", self.statements)
        if self.passages:
            (folder / "text" / f"{split}.txt").write_text(
                "".join(f"{passage}\n" for passage in self.passages), encoding="utf-8", newline="\n"
            )
        return {
            "images": len(self.images),
            "objects": len(self.instances),
            "captions": len(self.captions),
            "passages": len(self.passages),
            "questions": len(self.questions),
            "statements": len(self.statements),
            "question_types": dict(sorted(self.asked.families.items())),
            "answers": dict(sorted(self.given.items())),
            "statement_labels": dict(sorted(Counter(s["label"] for s in self.statements).items())),
        }


def attribute_names() -> list[str]:
    """Attribute vocabulary of the instances, in the order in which an instance lists them."""
    return [*COLOURS, *SIZES, *TEXTURES]


def _add_noise(question: Candidate, noise: float, rng: np.random.Generator) -> str:
    """The answer or, with probability `noise`, another one of its kind."""
    if noise == 0 or rng.random() >= noise:
        return question.answer
    return pick(rng, _list_other_answers(question))


def _list_other_answers(question: Candidate) -> list[str]:
    """The other answers of the same kind."""
    answer = question.answer
    if answer in ("yes", "no"):
        return ["no" if answer == "yes" else "yes"]
    if answer.isdigit():
        return [str(n) for n in (int(answer) - 1, int(answer) + 1) if n >= 0]
    return [value for values in VALUES.values() if answer in values for value in values if value != answer]
