"""The runs of a claim: which folders its arms leave, what is measured in them, and which of them other claims share.

A run is known by everything that decides its weights (recipe with its changed settings, world, what it starts from), so
that two claims that need the same one find it in the same folder:

    OUT/runs/RECIPE-DIGEST/seed-K/               an ordinary run folder
    OUT/runs/RECIPE-DIGEST/seed-K/measured.json  what was read off it
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from visling import config as configs
from visling.errors import ConfigError
from visling.recipes.changes import change_recipe
from visling.recipes.claim_configs import PLAIN, Arm, Claim, Measure, Training, World
from visling.recipes.tables import find_finetuning, find_pretraining
from visling.runs.claim_measures import measure
from visling.runs.jobs import PlacedTraining, Places, read_status
from visling.runs.worlds import Worlds
from visling.train.disk import write_json

MEASURED = "measured.json"


@dataclass(frozen=True, kw_only=True)
class PlacedMeasure:
    """What is read off a run, and on which images."""

    measure: Measure
    place: Places
    world: World
    random_seed: int | None = None
    """Of random weights, which are measured in place of the trained ones."""

    @property
    def key(self) -> str:
        """Its name in measured.json."""
        about = {"measure": _list_choices(self.measure), "world": _list_choices(self.world)}
        return json.dumps({**about, "random_seed": self.random_seed}, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class ClaimRun:
    """One run of one seed, with all that is measured of it."""

    label: str
    """For messages: claim, arm and seed."""
    training: PlacedTraining
    measures: tuple[PlacedMeasure, ...] = ()

    def __str__(self) -> str:
        return self.label

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.training.folder

    @property
    def init(self) -> Path | None:
        """Folder of the run that it starts from."""
        return self.training.init

    @property
    def ended(self) -> bool:
        """Whether it is trained and measured."""
        return read_status(self.folder) == "finished" and all(
            one.key in read_measured(self.folder) for one in self.measures
        )

    def work(self, stream: TextIO | None = None) -> bool:
        """Train it to its end, and measure what has not been measured."""
        if not self.training.work(stream):
            return False
        for one in self.measures:
            if one.key in read_measured(self.folder):
                continue
            place = one.place
            found = measure(
                self.folder,
                one.measure,
                data=place.data,
                store=place.store,
                images=place.images,
                device=place.device,
                random_seed=one.random_seed,
            )
            write_json(self.folder / MEASURED, {**read_measured(self.folder), one.key: asdict(found)})
        return True


@dataclass(frozen=True, kw_only=True)
class PlacedArm:
    """An arm in one seed: its runs in order, and what is measured of the last one."""

    name: str
    runs: tuple[PlacedTraining, ...]
    measured: PlacedMeasure

    @property
    def result(self) -> Mapping[str, Any] | None:
        """What was measured ("value" in percent, "examples"); None = not yet."""
        found: Mapping[str, Any] | None = read_measured(self.runs[-1].folder).get(self.measured.key)
        return found


def place_arm(claim: Claim, name: str, seed: int, out: Path, worlds: Worlds) -> PlacedArm:
    """Where the runs of an arm are or will be.

    Raises:
        ConfigError: no such recipe or setting.
    """
    arm: Arm = claim.arms[name]
    placed: list[PlacedTraining] = []
    before = ""
    for training in arm.trainings:
        settings = (*training.settings, *worlds.size.settings)
        world = find_world(claim, training.world)
        before = _identify(training, settings, world, before)
        recipe = training.recipe.replace(":", "-")
        placed.append(
            PlacedTraining(
                verb=find_verb(training.recipe),
                recipe=training.recipe,
                settings=(*settings, f"train.seed={seed}"),
                folder=out / "runs" / f"{recipe}-{before}" / f"seed-{seed}",
                init=placed[-1].folder if placed else None,
                place=worlds.find(world),
            )
        )
    world = find_world(claim, arm.measured_in or arm.trainings[-1].world)
    return PlacedArm(
        name=name,
        runs=tuple(placed),
        measured=PlacedMeasure(
            measure=claim.measure_of(name),
            place=worlds.find(world),
            world=world,
            random_seed=seed if arm.random_weights else None,
        ),
    )


def plan_runs(claim: Claim, seeds: Sequence[int], out: Path, worlds: Worlds) -> list[ClaimRun]:
    """All runs of a claim, seed by seed, each after the one that it starts from; what several arms share, once."""
    planned: dict[Path, ClaimRun] = {}
    for seed in seeds:
        for name in claim.arms:
            arm = place_arm(claim, name, seed, out, worlds)
            for training in arm.runs:
                label = f"{claim.name}, {name}, seed {seed}: {training.recipe}"
                planned.setdefault(training.folder, ClaimRun(label=label, training=training))
            last = planned[arm.runs[-1].folder]
            if arm.measured not in last.measures:
                planned[last.folder] = replace(last, measures=(*last.measures, arm.measured))
    return list(planned.values())


def find_world(claim: Claim, name: str) -> World:
    """A world of a claim."""
    return World() if name == PLAIN else claim.worlds[name]


def find_verb(recipe: str) -> Literal["pretrain", "finetune"]:
    """Whether a recipe is one of pre-training or of fine-tuning; of a name that both have, pre-training.

    Raises:
        ConfigError: no such recipe.
    """
    try:
        find_pretraining(recipe)
    except ConfigError:
        find_finetuning(recipe)
        return "finetune"
    return "pretrain"


def _identify(training: Training, settings: Sequence[str], world: World, before: str) -> str:
    """Digest of everything but the seed that decides the weights of a run."""
    config = _describe_config(training.recipe, tuple(settings))
    about = {"config": config, "world": _list_choices(world), "before": before}
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:8]


@functools.cache
def _describe_config(recipe: str, settings: tuple[str, ...]) -> Any:
    """What decides the weights in the config of a recipe with changed settings; the same for every seed."""
    config = _list_choices(
        change_recipe(find_pretraining(recipe)(), settings)
        if find_verb(recipe) == "pretrain"
        else change_recipe(find_finetuning(recipe)(), settings)
    )
    return {name: value for name, value in config.items() if name not in ("recipe", "paper", "release")}


def _list_choices(config: Any) -> Any:
    """A config as plain values without the fields that have their defaults: a setting that a later version adds makes
    no run another one."""
    if isinstance(config, (list, tuple)):
        return [_list_choices(one) for one in config]
    if not dataclasses.is_dataclass(config):
        return configs.to_dict(config)
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        made = field.default_factory
        if value != (field.default if made is dataclasses.MISSING else made()):
            found[field.name] = _list_choices(value)
    return found


def read_measured(folder: Path) -> dict[str, Any]:
    """What has been measured of a run, by `PlacedMeasure.key`; nothing if the file is missing or torn."""
    try:
        found: dict[str, Any] = json.loads((folder / MEASURED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
