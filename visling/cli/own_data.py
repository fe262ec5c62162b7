"""What `visling finetune` reads and by which recipe: an official folder, or files of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from visling.errors import CheckpointError, ConfigError, refuse

if TYPE_CHECKING:
    from visling.recipes.configs import FinetuneConfig
    from visling.runs.own_files import OwnFiles

DEFAULT_FAMILY = "visualbert"
"""Family that is trained where no model is named."""


@dataclass(frozen=True, kw_only=True)
class OwnOptions:
    """The options that say what is trained on what, as they were given."""

    recipe: str | None
    task: str | None
    data: Path | None
    train: Path | None
    valid: str | None
    test: Path | None
    images: Path | None
    detector: Path | None
    store: Path | None
    answers: Path | None
    init: Path | None
    model: str | None
    text_only: bool

    def source(self) -> Path | OwnFiles:
        """The folder of annotations, or the files of one's own.

        Raises:
            ConfigError: names every option that is missing or contradicts another.
        """
        from visling.runs.own_files import OwnFiles

        refuse([ConfigError(conflict) for conflict in self._conflicts()])
        if self.data is not None:
            return self.data
        assert self.train is not None
        assert self.valid is not None
        share = _read_share(self.valid)
        return OwnFiles(train=self.train, valid=Path(self.valid) if share is None else share, test=self.test)

    def find_recipe(self) -> Callable[[], FinetuneConfig]:
        """The recipe that is named, or the one for own data of the family and the task.

        Raises:
            ConfigError: no such recipe or family.
        """
        from visling import models
        from visling.recipes.own import on_own_data
        from visling.recipes.tables import find_finetuning

        if self.recipe is not None:
            return find_finetuning(self.recipe)
        assert self.task is not None
        family = self.model or _find_family(self.init) or DEFAULT_FAMILY
        models.spec(family)  # says which families there are
        return partial(on_own_data, family, self.task)

    def settings(self, task: str) -> list[str]:
        """What the options change in a recipe of this task, as --set would."""
        listed_in = "labels" if task == "classification" else "answers"
        answers = [] if self.answers is None else [f"task_settings.{listed_in}={self.answers}"]
        return [*answers, *(["text_only=true"] if self.text_only else [])]

    def _conflicts(self) -> list[str]:
        """What is missing or contradicts, a sentence each."""
        own = self.train is not None
        found = [
            (self.recipe is None and self.task is None, "Say what is trained: --task NAME, or --recipe NAME."),
            (
                self.recipe is not None and self.task is not None,
                f"--recipe {self.recipe} has a task: leave out --task {self.task}, or the recipe.",
            ),
            (
                self.model is not None and self.recipe is not None,
                f"--recipe {self.recipe} has a family: leave out --model {self.model}.",
            ),
            (
                self.data is None and not own,
                "Say what is read: --train FILE with --valid, or --data DIR with official files.",
            ),
            (self.data is not None and own, "--data names a folder of official files, --train your own: give one."),
            (
                not own and (self.valid is not None or self.test is not None),
                "--valid and --test name your own files, but --train is missing.",
            ),
            (
                own and self.valid is None,
                "--valid is missing: name a file, or hold out a tenth of the training images with --valid 0.1.",
            ),
            (
                self.images is not None and self.store is not None and self.recipe is None,
                "--images extracts regions, --store names some that exist: give one.",
            ),
            (
                own and self.images is None and self.store is None and not self.text_only,
                "Say where the images are: --images DIR, --store DIR with their regions, or --text-only to learn from "
                "the words alone.",
            ),
            (
                self.text_only and self.images is not None,
                "--text-only sees no image: leave out --images.",
            ),
            (
                self.detector is not None and self.images is None,
                "--detector extracts the regions of --images, which is missing.",
            ),
        ]
        return [sentence for wrong, sentence in found if wrong]


def _read_share(text: str) -> float | None:
    """The share that a text names; None if it is the name of a file."""
    if Path(text).exists():
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _find_family(init: Path | None) -> str | None:
    """The family of a model folder or run folder; None without one, or where it cannot be read, which the run itself
    reports."""
    from visling.pretrained.description import find_model, read_description, reading

    if init is None:
        return None
    try:
        folder = find_model(init)
        with reading(folder):
            return str(read_description(folder)["model"])
    except CheckpointError:
        return None
