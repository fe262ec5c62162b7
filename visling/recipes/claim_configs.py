"""What a claim of a paper is: arms that differ in one thing, what is measured, and the rule of the verdict.

A claim of your own is one TOML file with these fields (docs/claims.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from visling import config as configs
from visling.errors import ConfigError, nearest, refuse

MeasureKind = Literal["score", "validation", "heads", "syntax", "unread"]

FEWEST_SEEDS = 3
"""Seeds below which nothing is decided: an interval from two has 12.7 standard errors to each side."""

PLAIN = "plain"
"""The world that every claim has: scenes as they are drawn by default here, and the regions of the shared detector."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Drawn scenes and the regions that a detector finds in them."""

    scenes: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `ScenesConfig` that differ from those of the world `plain`."""
    label_noise: float = 0.0
    """Share of the regions whose class and attribute, as the detector gives them, are replaced by others."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Name of a split -> share of the training images whose captions it has: `train_split=NAME` trains on fewer."""
    questions: Mapping[str, Literal["gqa", "shuffled"]] = field(default_factory=dict)
    """Name of a split -> questions that it has in VQA's layout: those of GQA, or VQA's own with their answers dealt out
    anew among all of them. `train_split=train+NAME` trains on more, `train_split=NAME` on others."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise <= 1:
            raise ConfigError(f"label_noise is a share from 0 to 1; found {self.label_noise:g}.")
        for name, share in self.shares.items():
            if not 0 < share < 1:
                raise ConfigError(f"shares.{name} must lie between 0 and 1; found {share:g}.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of an arm: a recipe with changed settings."""

    recipe: str
    """Name of a pre-training or fine-tuning recipe; your own as MODULE:NAME."""
    settings: tuple[str, ...] = ()
    """`a.b=value`, as after --set. `train.seed` is the arm's."""
    world: str = PLAIN
    """What it reads: a key of `Claim.worlds`."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is read off an arm's last run, in percent.

    score: a score of its task on `split`. validation: the last value of `name` in its own validation; a share becomes
    percent. heads: how often the best head, chosen on other images, attends most to what a phrase names. syntax: the
    same of words and the region of their head or dependent, mean over relations, minus any word of the sentence.
    unread: how often a hidden region's class is named without any text.
    """

    kind: MeasureKind = "score"
    name: str = "accuracy"
    """Name of a score; heads, syntax and unread have one only."""
    split: str = "test"
    """Of `score`, `heads`, `syntax` and `unread`."""
    fewest_words: int = 0
    """Of `score`: the mean over the examples whose text has at least so many words; 0 = all."""

    def __post_init__(self) -> None:
        if self.fewest_words < 0 or (self.fewest_words and self.kind != "score"):
            raise ConfigError(
                f"fewest_words counts words of the examples of a score; found {self.fewest_words} with {self.kind}."
            )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs, each of which starts from the one before; the last one is measured."""

    about: str
    """What it is, in a few words."""
    trainings: tuple[Training, ...]
    measure: Measure | None = None
    """None = the claim's."""
    measured_in: str = ""
    """World of the measurement; empty = that of the last run."""
    random_weights: bool = False
    """Measure the same model with random weights (`heads` and `syntax`)."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A sum of arms, taken seed by seed, and what the paper says of it."""

    weights: Mapping[str, float]
    """Arm -> factor: {with: 1, without: -1} is their difference."""
    expected: Literal["above", "not below"] = "above"
    """above: the sum is positive. not below: it is at least -`size`."""
    size: float
    """Percentage points: the smallest sum that would matter here, fixed before anything was run."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of a paper, and runs on drawn scenes that can contradict it."""

    name: str
    """Of the command, `visling reproduce NAME`."""
    paper: str
    section: str
    """Where the paper says so."""
    statement: str
    """One sentence."""
    figure: str = "none given"
    """The paper's numbers, with what they measure."""
    differs: str
    """The one thing in which the arms differ."""
    measure: Measure = field(default_factory=Measure)
    arms: Mapping[str, Arm]
    contrasts: Mapping[str, Contrast]
    """The claim holds if all of them do."""
    worlds: Mapping[str, World] = field(default_factory=dict)
    """In addition to `plain`."""
    seeds: int = 5
    """Seeds, counted from 0: initial weights, order and masking of examples. All arms have the same."""
    spread: float | None = None
    """Standard deviation over seeds of the first contrast, percentage points, from earlier runs; None = unknown."""
    minutes: float = 6.0
    """Of one core for one seed, if no other claim has left a run that can be used."""
    note: str = ""
    """Where the runs differ from the paper's, beyond scenes and size."""

    def __post_init__(self) -> None:
        refuse(self._find_problems())

    def _find_problems(self) -> Iterator[ConfigError]:
        if not self.name.replace("-", "").isalnum():
            yield ConfigError(f"a claim's name has letters, digits and hyphens; found {self.name!r}.")
        if len(self.arms) < 2:
            yield ConfigError(f"claim {self.name}: a claim compares two arms or more; found {len(self.arms)}.")
        if not self.contrasts:
            yield ConfigError(f"claim {self.name}: no contrast says what is compared.")
        if self.seeds < FEWEST_SEEDS:
            yield ConfigError(
                f"claim {self.name}: seeds is {self.seeds}; fewer than {FEWEST_SEEDS} decide nothing, whatever the "
                "difference."
            )
        if PLAIN in self.worlds:
            yield ConfigError(f"claim {self.name}: the world {PLAIN!r} is the same for all claims. Use another name.")
        for name, contrast in self.contrasts.items():
            for other in contrast.weights.keys() - self.arms.keys():
                yield ConfigError(
                    f"claim {self.name}, contrast {name!r}: no arm {other!r}. {nearest(other, self.arms)}"
                )
            if not any(contrast.weights.values()):
                yield ConfigError(f"claim {self.name}, contrast {name!r}: no arm has a factor other than 0.")
            if contrast.size <= 0:
                yield ConfigError(f"claim {self.name}, contrast {name!r}: size must be positive; {contrast.size:g}.")
        worlds = {PLAIN, *self.worlds}
        for name, arm in self.arms.items():
            if not arm.trainings:
                yield ConfigError(f"claim {self.name}, arm {name!r}: it needs a training.")
            for world in [arm.measured_in or PLAIN, *(training.world for training in arm.trainings)]:
                if world not in worlds:
                    yield ConfigError(f"claim {self.name}, arm {name!r}: no world {world!r}. {nearest(world, worlds)}")
            for setting in itertools.chain.from_iterable(training.settings for training in arm.trainings):
                if setting.partition("=")[0].strip() == "train.seed":
                    yield ConfigError(f"claim {self.name}, arm {name!r}: seeds are counted by the claim itself.")
            if arm.random_weights and (arm.measure or self.measure).kind not in ("heads", "syntax"):
                yield ConfigError(f"claim {self.name}, arm {name!r}: random_weights goes with heads or syntax.")

    def measure_of(self, arm: str) -> Measure:
        """What is measured of an arm."""
        return self.arms[arm].measure or self.measure


def read_claim(path: Path) -> Claim:
    """A claim of your own from a TOML file.

    Raises:
        ConfigError: no such file, no TOML, or no claim; says which field is wrong.
    """
    return configs.from_dict(Claim, configs.load_toml(path), where=path.name)
