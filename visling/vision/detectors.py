"""Detector folders: `config.json` says which kind of detector the weights beside it are of."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visling import damage
from visling.errors import CheckpointError
from visling.vision.region_detector import RegionDetector

FORMATS: Mapping[str, str] = {
    "visling detector 1": "visling.vision.detector",
    "visling visual-genome detector 1": "visling.vision.visual_genome",
    "visling grid 1": "visling.vision.grid_features",
    "visling transformers detector 1": "visling.vision.transformers_detector",
}
"""`format` in `config.json` -> module that offers `load(directory, content)`, which returns the detector of a folder
whose `config.json` holds `content`, on the CPU."""


def find_detector(directory: Path) -> Path:
    """The folder with `config.json`: the one given, or the `model` folder of a training's folder."""
    if not (directory / "config.json").is_file() and (directory / "model" / "config.json").is_file():
        return directory / "model"
    return directory


def load_detector(directory: Path, *, device: torch.device | str = "cpu") -> RegionDetector:
    """The detector saved in a folder, or in the `model` folder of a training's folder, in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, or weights and configuration do not belong together.
    """
    directory = find_detector(Path(directory))
    content = read_description(directory)
    module = importlib.import_module(FORMATS[content["format"]])
    detector: RegionDetector = module.load(directory, content)
    detector.kind = str(content.get("features", ""))
    return detector.to(device).eval()


def read_description(directory: Path) -> dict[str, Any]:
    """`config.json` of a detector's folder.

    Raises:
        CheckpointError: it is missing, damaged, or describes no detector.
    """
    file = directory / "config.json"
    try:
        content: Any = damage.parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{directory} is not a detector: no config.json. "
            "Give the folder that training wrote, with config.json and model.safetensors."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Copy or train the detector again.") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if not isinstance(found, str) or found not in FORMATS:
        raise CheckpointError(
            f"{file} does not describe a detector: format is {found!r}, expected {' or '.join(map(repr, FORMATS))}."
        )
    return dict(content)
