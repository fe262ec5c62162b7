"""Released weight files: what they hold, where they are, under which terms.

Nothing here has been downloaded by this project: sizes and digests are None until somebody has; a None is shown as "unknown", never skipped silently.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from visling.errors import CheckpointError, nearest
from visling.types import Head


@dataclass(frozen=True, kw_only=True)
class Release:
    """One released file."""

    name: str
    """Unique in the catalogue; official file names without their suffix, or the hub's repository name."""
    family: str
    """Model name in `models`."""
    preset: str
    """Preset of the family that fits it."""
    layout: str
    """Key map of the family that reads it."""
    heads: dict[str, Head] = field(default_factory=dict)
    """Part name in the key map -> head to build for it."""
    source: str
    """Where it is published."""
    licence: str
    """Of the weights, as far as it is stated."""
    size: int | None = None
    """Bytes; None = unknown."""
    sha256: str | None = None
    """Hexadecimal digest; None = unknown."""
    note: str = ""
    """What a user should know before fetching it."""


_PRETRAINING = {"vocabulary": Head(kind="vocabulary", outputs=30522), "matching": Head(kind="classify", outputs=2)}
_CLASSIFIERS = {
    "vqa": {"classifier": Head(kind="classify", outputs=3129)},
    "nlvr2": {"classifier": Head(kind="classify", outputs=2)},
    "vcr": {"classifier": Head(kind="score", outputs=1)},
}
_DRIVE = "https://drive.google.com/file/d/{}/view"
_VCR_NOTE = "Also holds the region CNN (detector.*), which is dropped: extract features with it elsewhere."


def _official(name: str, preset: str, drive: str, *, heads: dict[str, Head], note: str = "") -> Release:
    """A file of the uclanlp/visualbert README; its repository is under the MIT licence, the files themselves state none."""
    return Release(
        name=name,
        family="visualbert",
        preset=preset,
        layout="official",
        heads=heads,
        source=_DRIVE.format(drive),
        licence="none stated; code MIT",
        note=note,
    )


def _hub(task: str, stage: str, heads: dict[str, Head]) -> Release:
    """A conversion of an official file by the authors of the transformers port; the repositories have no model card."""
    return Release(
        name=f"visualbert-{task}{stage}",
        family="visualbert",
        preset=task,
        layout="transformers",
        heads=heads,
        source=f"https://huggingface.co/uclanlp/visualbert-{task}{stage}",
        licence="none stated",
        note="Features are extracted by the region CNN of the official file, which this one lacks." if task == "vcr" else "",
    )


RELEASES: tuple[Release, ...] = (
    _official("nlvr2_coco_pre_trained", "nlvr2", "1QvivVfRsRF518OQSQNaN7aFk6eQ43vP_", heads=_PRETRAINING),
    _official("nlvr2_pre_trained", "nlvr2", "1Z19G_rAuKn0TQ5Cj-KCcavBKSwBhvxGq", heads=_PRETRAINING),
    _official("nlvr2_fine_tuned", "nlvr2", "1GCV6woBnWY09JhjtLOXyKUhuFiQz9L5U", heads=_CLASSIFIERS["nlvr2"]),
    _official("vqa_coco_pre_trained", "vqa", "1tgYovjB6MZZlqdSAOPzB8bZqnFezWNBO", heads=_PRETRAINING),
    _official("vqa_pre_trained", "vqa", "1kuPr187zWxSJbtCbVW87XzInXltM-i9Y", heads=_PRETRAINING),
    _official("vqa_fine_tuned", "vqa", "19FpfLYo3rwv0eybUvfkDMCoivyL4XLqB", heads=_CLASSIFIERS["vqa"]),
    _official("vcr_coco_pre_train", "vcr", "1pPobkXAL9Evlp7fDjPeXnixtG0O-efoH", heads=_PRETRAINING, note=_VCR_NOTE),
    _official("vcr_pre_train", "vcr", "1iZ7QUv_jG6E6KNofO0jM5H9ee7nMEuYM", heads=_PRETRAINING, note=_VCR_NOTE),
    _official(
        "vcr_fine_tune",
        "vcr",
        "1z7XSUpPthhBKvgKb0wOcBe2eUNGDmf2o",
        heads=_CLASSIFIERS["vcr"],
        note=f"{_VCR_NOTE} One file although there are two sub-tasks; which one it answers is not stated.",
    ),
    *(_hub(task, stage, _PRETRAINING) for task in ("vqa", "nlvr2", "vcr") for stage in ("-coco-pre", "-pre")),
    *(_hub(task, "", _CLASSIFIERS[task]) for task in ("vqa", "nlvr2", "vcr")),
)
"""All known files. The VisualBERT authors released none for Flickr30K and none with late fusion."""


def find(name: str) -> Release:
    """The entry of a name.

    Raises:
        CheckpointError: no such file is known.
    """
    for release in RELEASES:
        if release.name == name:
            return release
    raise CheckpointError(f"no released file {name!r} in the catalogue. {nearest(name, [release.name for release in RELEASES])}")
