"""What the catalogue lists: weights, detectors, answer lists, feature files, and sets of them that answer together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from visling.head import Head

HUB = "https://huggingface.co/"
"""Address before the owner/name of a repository on the hub."""

Selection = Literal["original", "port"]

Reach = Literal["hub", "address", "by hand"]
"""How a published file is had: a repository on the hub, an address that can be downloaded from, or a page (a drive, a
share) on which somebody has to click."""

_PAGES = ("https://drive.google.com/", "https://sid.erda.dk/", "https://github.com/", "https://www.dropbox.com/")


def reach_of(source: str) -> Reach:
    """How what is published at an address is had."""
    if source.startswith(HUB):
        return "hub"
    return "by hand" if source.startswith(_PAGES) else "address"


@dataclass(frozen=True, kw_only=True)
class ReleasedFile:
    """One released file."""

    name: str
    """Unique in the catalogue; official file names without their suffix, or the hub's repository name."""
    family: str
    """Model name in `models`."""
    preset: str
    """The family's preset that fits it."""
    layout: str
    """The family's key map that reads it."""
    heads: dict[str, Head] = field(default_factory=dict)
    """Part name in the key map -> head to build for it."""
    source: str
    """Where it is published."""
    licence: str
    """Of the weights, as far as stated."""
    size: int | None = None
    """Bytes, checked before a file is read; None = unknown."""
    megabytes: int | None = None
    """Rounded size as stated by others; not checked."""
    sha256: str | None = None
    """Hexadecimal digest; None = unknown."""
    note: str = ""
    """What a user should know before fetching it."""
    features: str = ""
    """Kind of region features that it was trained on, in `feature_kinds`; empty if it computes its own."""
    dead: str = ""
    """Which of its addresses are gone or were once unreachable, and who reported it; empty = nothing is known, and
    nobody has tried from here."""

    @property
    def reach(self) -> Reach:
        """How the file is had."""
        return reach_of(self.source)


@dataclass(frozen=True, kw_only=True)
class ReleasedDetector:
    """A published detector, and which features it computes here."""

    name: str
    """Unique in the catalogue."""
    kinds: Mapping[Selection, str]
    """How regions are chosen (`visling detect convert --selection`) -> kind of the features in `feature_kinds`."""
    regions: tuple[int, int]
    """Fewest and most regions per image."""
    source: str
    """Where it is published: a repository on the hub, or the address of its one file."""
    mirror: str = ""
    """Address of a folder with the same files, asked when the source does not have them."""
    files: tuple[str, ...] = ()
    """Names of its files in the repository and in the mirror."""
    licence: str
    size: int | None = None
    """Bytes of the weight file; None = unknown."""
    note: str = ""
    dead: str = ""
    """As of `ReleasedFile`."""

    @property
    def makes(self) -> str:
        """Kind of the features that it is converted for here: chosen as the original did, as for released files."""
        return self.kinds["original"]

    @property
    def reach(self) -> Reach:
        """How its files are had."""
        return reach_of(self.source)


@dataclass(frozen=True, kw_only=True)
class AnswerFile:
    """A published list of answers, in the order of a classifier's outputs."""

    name: str
    """Unique in the catalogue."""
    file: str
    """Name of the file; its suffix says how it is read."""
    answers: int
    """How many it lists."""
    source: str
    licence: str
    size: int | None = None
    """Bytes; None = unknown."""
    sha256: str | None = None
    """None = unknown."""
    note: str = ""
    dead: str = ""
    """As of `ReleasedFile`."""

    @property
    def reach(self) -> Reach:
        """How the file is had."""
        return reach_of(self.source)


@dataclass(frozen=True, kw_only=True)
class FeatureFile:
    """A published file of region features."""

    name: str
    """Unique in the catalogue."""
    features: str
    """Kind of its features in `feature_kinds`."""
    images: str
    """Whose regions it holds."""
    source: str
    licence: str = "none stated"
    megabytes: int | None = None
    """Rounded size as stated by others; not checked."""
    dead: str = ""
    """As of `ReleasedFile`."""

    @property
    def reach(self) -> Reach:
        """How the file is had."""
        return reach_of(self.source)


Published = ReleasedFile | ReleasedDetector | AnswerFile | FeatureFile
"""What has an address."""


@dataclass(frozen=True, kw_only=True)
class ReadyAnswer:
    """Weights, answers and detector that answer together: what `visling predict --run NAME` fetches."""

    name: str
    """Unique among these; it may be the name of its weights, which it includes."""
    task: str
    """What it answers, for `visling convert --task`."""
    weights: str
    """Name of a `ReleasedFile`."""
    answers: str = ""
    """Name of an `AnswerFile`; empty if the task has no list."""
    detector: str = ""
    """Name of the `ReleasedDetector` whose features come nearest; empty if no detector that can be read here makes any
    that fit."""
    why_no_detector: str = ""
    """Without a detector: what is missing, and what people use in its place."""
