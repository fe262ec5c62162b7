"""Weights of the Visual Genome detector, from a file, a folder or the hub, made into a detector's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from visling import config as configs
from visling.checkpoints import files, hub
from visling.checkpoints.catalog import find_detector_at
from visling.checkpoints.entries import ReleasedDetector, Selection
from visling.checkpoints.keymap import Coverage
from visling.errors import CheckpointError, ConfigError
from visling.names import VISUAL_GENOME_ATTRIBUTES, VISUAL_GENOME_CLASSES, read_names
from visling.vision.visual_genome import VisualGenomeDetector
from visling.vision.visual_genome_config import (
    ReadConfig,
    VisualGenomeConfig,
    original_settings,
    read_config,
)
from visling.vision.visual_genome_weights import count_outputs, has_caffe_conventions, load_weights, read_weights

HUB_FILES = ("*.yaml", "*.bin", "*.pth", "*.pkl", "*.safetensors", "*.txt")
"""Files of a repository with such weights."""

_WEIGHTS = ("pytorch_model.bin", "*.bin", "*.pth", "*.pkl", "*.safetensors")
_CONFIG = ("config.yaml", "*.yaml")
_CLASSES = ("objects_vocab.txt", "objects.txt")
_ATTRIBUTES = ("attributes_vocab.txt", "attributes.txt")
"""Names of each kind of file in a folder; the first that occurs counts."""


@dataclass(frozen=True, kw_only=True)
class ConvertedDetector:
    """What was written."""

    config: VisualGenomeConfig
    fingerprint: str
    coverage: Coverage
    """What became of every key of the file."""
    unsaid: tuple[str, ...]
    """Settings that neither the configuration file nor the caller gave, so that they have their defaults."""
    ignored: tuple[str, ...]
    """Names in the configuration file that no prediction depends on, or that are not known."""


def convert_detector(
    source: str | Path,
    out: Path,
    *,
    config: Path | None = None,
    classes: Path | None = None,
    attributes: Path | None = None,
    selection: Selection | None = None,
    regions: tuple[int, int] | None = None,
    settings: Iterable[str] = (),
    half: bool = False,
    offline: bool | None = None,
    listed: ReleasedDetector | None = None,
) -> ConvertedDetector:
    """Write a detector's folder from released weights.

    Args:
        source: owner/name on the hub, a folder with weights and `config.yaml`, or a weight file.
        config: configuration file; that of the folder if left out, or the defaults for a weight file.
        classes, attributes: names, one per line; those of the folder if left out, or the 1,600 and 400 of the release.
        selection: how regions are chosen and all that belongs to it; what the configuration file describes if left out.
        regions: fewest and most per image; those of the configuration file if left out.
        settings: `name=value` for single fields of `VisualGenomeConfig`.
        half: store matrices in half precision.
        offline: use the hub's cache only.
        listed: what the catalogue says of the weights, from which the kind of the features is known; None = its entry
            of that repository, if there is one.
    Raises:
        CheckpointError: there are no such weights, they are damaged or those of another network; `out` exists.
        ConfigError: the configuration contradicts itself, the vocabulary or the weights.
        DataError: a file of names cannot be read.
    """
    files.check_absent(out)
    listed = listed or find_detector_at(str(source))
    settings = tuple(settings)
    changed = bool(config or classes or attributes or settings)
    found = _locate(source, offline)
    weights_file = found["weights"]
    assert weights_file is not None
    config = config or found["config"]
    given = {"classes": classes or found["classes"], "attributes": attributes or found["attributes"]}
    weights = read_weights(weights_file)
    names = _read_vocabulary(weights, given, weights_file)
    read = _default_config(weights, *names) if config is None else read_config(config, *names)
    chosen = _choose(read.config, selection, regions)
    chosen = configs.override(chosen, settings)
    detector = VisualGenomeDetector(chosen)
    if listed is not None and not changed and (chosen.min_regions, chosen.max_regions) == listed.regions:
        detector.kind = listed.kinds[chosen.selection]
    coverage = load_weights(detector, weights)
    with files.whole_folder(out) as folder:
        detector.save(folder, half=half)
    return ConvertedDetector(
        config=chosen,
        fingerprint=detector.fingerprint,
        coverage=coverage,
        unsaid=tuple(name for name in read.unsaid if getattr(chosen, name) == getattr(read.config, name)),
        ignored=read.ignored,
    )


def _locate(source: str | Path, offline: bool | None) -> dict[str, Path | None]:
    """The files of each kind; all but the weights may be missing."""
    if hub.is_id(source):
        folder = hub.fetch(str(source), files=HUB_FILES, offline=offline)
    else:
        folder = Path(source)
        if folder.is_file():
            return {"weights": folder, "config": None, "classes": None, "attributes": None}
    if not folder.is_dir():
        raise CheckpointError(f"no detector {source}: there is no such file or folder. Check the path.")
    if (folder / "config.json").is_file() and not any(folder.glob("*.yaml")):
        raise CheckpointError(
            f"{folder} has a config.json and no config.yaml: it is a model or a detector already. Give the folder or "
            "file of released weights."
        )
    kinds = {"weights": _WEIGHTS, "config": _CONFIG, "classes": _CLASSES, "attributes": _ATTRIBUTES}
    found = {kind: _find(folder, patterns) for kind, patterns in kinds.items()}
    if found["weights"] is None or found["config"] is None:
        missing = "weights" if found["weights"] is None else "config.yaml"
        raise CheckpointError(
            f"{source} has no {missing}: found {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}; "
            "expected pytorch_model.bin and config.yaml. Name a weight file itself to use another one."
        )
    return found


def _find(folder: Path, patterns: Iterable[str]) -> Path | None:
    """The file that fits the first pattern that any file fits; it must be the only one."""
    for pattern in patterns:
        if fitting := sorted(folder.glob(pattern)):
            if len(fitting) > 1:
                raise CheckpointError(
                    f"{folder} has {len(fitting)} files {pattern}: {', '.join(path.name for path in fitting[:4])}. "
                    "Name the one to use, or keep only it."
                )
            return fitting[0]
    return None


def _read_vocabulary(
    weights: Mapping[str, Tensor], given: Mapping[str, Path | None], file: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of classes and attributes, as many as the weights have."""
    shipped = {"classes": VISUAL_GENOME_CLASSES, "attributes": VISUAL_GENOME_ATTRIBUTES}
    read = []
    for kind, count in zip(("classes", "attributes"), count_outputs(weights, file), strict=True):
        names_file = given[kind] or shipped[kind]
        names = read_names(names_file) if count else ()
        if len(names) != count:
            where = str(given[kind]) if given[kind] else "the release's list"
            raise ConfigError(
                f"{file} has {count} {kind}, but {where} names {len(names)}. Give the names in the order of the "
                f"outputs with --{kind}, one per line."
            )
        read.append(names)
    return read[0], read[1]


def _default_config(weights: Mapping[str, Tensor], classes: tuple[str, ...], attributes: tuple[str, ...]) -> ReadConfig:
    """The release's configuration; that of the original for weights in Caffe's conventions."""
    fields: dict[str, Any] = {"class_names": classes, "attribute_names": attributes}
    if has_caffe_conventions(weights):
        fields |= {**original_settings(), "box_scale": (1.0, 1.0, 1.0, 1.0)}
    unsaid = tuple(field.name for field in dataclasses.fields(VisualGenomeConfig) if field.name not in fields)
    return ReadConfig(VisualGenomeConfig(**fields), unsaid, ())


def _choose(
    config: VisualGenomeConfig, selection: Selection | None, regions: tuple[int, int] | None
) -> VisualGenomeConfig:
    """The configuration with a selection and all that belongs to it, and with numbers of regions."""
    least, most = regions or (config.min_regions, config.max_regions)
    if selection is None or selection == config.selection:
        return dataclasses.replace(config, min_regions=least, max_regions=most)
    changes = original_settings(least, most)
    if selection == "port":
        defaults = {field.name: field.default for field in dataclasses.fields(VisualGenomeConfig)}
        changes = {name: defaults[name] for name in changes} | {"min_regions": least, "max_regions": most}
    return dataclasses.replace(config, **changes)
