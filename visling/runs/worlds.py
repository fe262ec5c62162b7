"""The worlds of claims: scenes drawn once, regions that one detector finds in all of them, and what is made of these.

    OUT/worlds/detector/                      trained on the world `plain`
    OUT/worlds/plain/{scenes,regions}/        what every claim reads
    OUT/worlds/plain/regions-noise-20/        the same regions, a fifth of their labels replaced
    OUT/worlds/drawn-DIGEST/{scenes,regions}/ scenes of other settings

The scenes also get splits with captions of fewer images, and with other questions, where claims ask for them.
Every step is a command that a user would type, prints it, and is skipped where its result exists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from visling.errors import RunError
from visling.recipes.claim_configs import World
from visling.regions.relabelling import replace_labels
from visling.regions.store import NativeStore
from visling.runs.demo import finished, stage
from visling.runs.jobs import Places
from visling.train.claim import REGIONS
from visling.train.disk import write_json

SCENES = "scenes"
FIRST_GQA = 1_000_000_000
"""Number of the first of GQA's questions in VQA's layout: above all of VQA's."""
PEOPLE = 10
"""Answers to a question in VQA's layout."""

PLAIN_SCENES: Mapping[str, Any] = {"train": 2 / 3, "val": 1 / 12, "min_objects": 2, "max_objects": 4, "seed": 0}
"""Settings of the scenes of every world, unless it has its own: few objects, so that a small model learns within a
thousand updates which word belongs to which region, and many test images, so that scores are precise."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is drawn and how long is trained."""

    images: int
    detector_steps: int
    settings: tuple[str, ...] = ()
    """Of every training, after those of the claim."""
    min_regions: int = 0
    """Regions that an image has at least, whatever their confidence: a detector of few updates finds nothing."""


SIZES: Mapping[str, Size] = {
    # Does it run; learns nothing
    "tiny": Size(
        images=120,
        detector_steps=20,
        settings=("train.max_steps=3", "batch_size=8", "train.validate_every=100"),
        min_regions=3,
    ),
    "small": Size(images=3000, detector_steps=450),
}


class Worlds:
    """Worlds in a folder, prepared when they are asked for."""

    def __init__(self, out: Path, size: Size, device: str) -> None:
        self.folder, self.size, self.device = out / "worlds", size, device

    def find(self, world: World) -> Places:
        """Where the data and the regions of a world are, or will be."""
        drawn = self._drawn(world)
        name = REGIONS if not world.label_noise else f"{REGIONS}-noise-{100 * world.label_noise:g}"
        scenes = drawn / SCENES
        return Places(data=scenes, store=drawn / name, device=self.device, images=scenes / "images")

    def prepare(self, world: World) -> Places:
        """Draw and detect what is missing.

        Raises:
            RunError: a command failed, or another claim has a split of the same name with another share.
        """
        place = self.find(world)
        plain = self.find(World())
        detector = self.folder / "detector"
        for each in dict.fromkeys((plain.data, place.data)):
            self._draw(each, world if each == place.data else World())
        stage(
            "Train the detector of all worlds",
            finished(detector),
            "detect", "train", plain.data / "images" / "train",
            "--annotations", plain.data / "annotations" / "instances_train.json",
            "--preset", "scenes", "--steps", self.size.detector_steps, "--out", detector,
        )  # fmt: skip
        regions = place.data.parent / REGIONS
        stage(
            "Turn every picture into regions",
            (regions / "manifest.json").exists(),
            "regions", "extract", place.data / "images", place.data / "nlvr2" / "images",
            "--detector", detector, "--out", regions,
            *(("--min-regions", self.size.min_regions) if self.size.min_regions else ()),
        )  # fmt: skip
        if place.store != regions and not (place.store / "manifest.json").exists():
            print(f"\n== Replace {world.label_noise:.0%} of the labels of these regions", flush=True)
            replace_labels(NativeStore.open(regions), world.label_noise, place.store, resume=place.store.exists())
        for name, share in world.shares.items():
            _write_share(place.data / "annotations", name, share)
        for name, kind in world.questions.items():
            _write_questions(place.data, name, kind)
        return place

    def _drawn(self, world: World) -> Path:
        """Folder of the scenes of a world and of their regions."""
        if not world.scenes:
            return self.folder / "plain"
        text = json.dumps(world.scenes, sort_keys=True)
        return self.folder / f"drawn-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def _draw(self, scenes: Path, world: World) -> None:
        settings = {**PLAIN_SCENES, **world.scenes}
        stage(
            "Draw scenes",
            (scenes / "scenes.json").exists(),
            "scenes", "--out", scenes, "--images", self.size.images,
            *(word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")),
        )  # fmt: skip


def _write_questions(scenes: Path, name: str, kind: Literal["gqa", "shuffled"]) -> None:
    """Write a split of VQA: GQA's training questions, or VQA's with their answers dealt out anew."""
    annotations = scenes / "annotations"
    files = (
        annotations / f"v2_OpenEnded_scenes_{name}_questions.json",
        annotations / f"v2_scenes_{name}_annotations.json",
    )
    if files[1].exists():  # written last
        return
    asked, answered = _convert_gqa(scenes) if kind == "gqa" else _shuffle_answers(annotations)
    write_json(files[0], {"data_type": "scenes", "data_subtype": name, "questions": asked}, indent=None)
    write_json(files[1], {"data_type": "scenes", "data_subtype": name, "annotations": answered}, indent=None)


def _convert_gqa(scenes: Path) -> tuple[list[Any], list[Any]]:
    """GQA's training questions and their answers in VQA's layout."""
    asked, answered = [], []
    questions = json.loads((scenes / "gqa" / "train_balanced_questions.json").read_text(encoding="utf-8"))
    for number, one in enumerate(questions.values(), FIRST_GQA):
        about = {"image_id": int(one["imageId"].rpartition("_")[2]), "question_id": number}
        answer = {"answer": one["answer"], "answer_confidence": "yes"}
        asked.append({**about, "question": one["question"]})
        answered.append(
            {
                **about,
                "question_type": one["types"]["detailed"],
                "answer_type": "yes/no" if one["answer"] in ("yes", "no") else "other",
                "multiple_choice_answer": one["answer"],
                "answers": [{**answer, "answer_id": person} for person in range(1, PEOPLE + 1)],
            }
        )
    return asked, answered


def _shuffle_answers(annotations: Path) -> tuple[list[Any], list[Any]]:
    """VQA's training questions, each with the answers to another one."""
    asked = json.loads((annotations / "v2_OpenEnded_scenes_train_questions.json").read_text(encoding="utf-8"))
    found = json.loads((annotations / "v2_scenes_train_annotations.json").read_text(encoding="utf-8"))["annotations"]
    order = np.random.default_rng(0).permutation(len(found))
    answered = [
        {**found[other], "image_id": one["image_id"], "question_id": one["question_id"]}
        for one, other in zip(found, order, strict=True)
    ]
    return asked["questions"], answered


def _write_share(annotations: Path, name: str, share: float) -> None:
    """Write `captions_NAME.json`: the captions of the first images of split train.

    Raises:
        RunError: the file exists with another number of images.
    """
    captions = json.loads((annotations / "captions_train.json").read_text(encoding="utf-8"))
    images = captions["images"][: max(1, round(share * len(captions["images"])))]
    kept = {image["id"] for image in images}
    file = annotations / f"captions_{name}.json"
    if file.exists():
        found = len(json.loads(file.read_text(encoding="utf-8"))["images"])
        if found != len(images):
            raise RunError(
                f"{file} has {found} images, and this claim's share {name!r} has {len(images)}: give the split another "
                "name in the claim, or use another --out."
            )
        return
    chosen = [one for one in captions["annotations"] if one["image_id"] in kept]
    write_json(file, {**captions, "images": images, "annotations": chosen}, indent=None)
