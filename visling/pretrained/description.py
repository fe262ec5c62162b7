"""What a model folder says of its model in config.json, without its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from visling import config as configs
from visling import damage, models
from visling.data.text import VOCABULARIES
from visling.errors import CheckpointError, ConfigError

FORMAT = 1
"""Version of the model folder's layout."""


def read_encoder_config(path: Path) -> Any:
    """Config of the encoder in a model folder or run folder, without its weights. A vocabulary that is not one of this
    package is that of the folder.

    Raises:
        CheckpointError: as `read_model_folder`.
    """
    folder = find_model(path)
    with reading(folder):
        config = parse_encoder_config(read_description(folder))
    if (VOCABULARIES / f"{config.vocabulary}.txt").is_file():
        return config
    return dataclasses.replace(config, vocabulary=os.path.abspath(folder / "vocab.txt"))


def find_model(path: Path) -> Path:
    """The model folder that a path is, or that the run folder there holds.

    Raises:
        CheckpointError: neither.
    """
    folder = path if (path / "config.json").exists() else path / "model"
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"no model in {path}: expected config.json and model.safetensors there or in {path / 'model'}. Has the "
            "run finished its first epoch?"
        )
    return folder


def find_run(path: Path) -> Path | None:
    """The run folder that a path is, or that has the model folder there as its model or in its models; None if there is
    none."""
    whole = path.absolute()
    above = whole.parent if whole.name == "model" else whole.parent.parent if whole.parent.name == "models" else whole
    return next((folder for folder in (whole, above) if (folder / "run.json").exists()), None)


def read_description(folder: Path) -> dict[str, Any]:
    """Contents of config.json.

    Raises:
        CheckpointError: it was not written by this package, or has a newer layout.
    """
    described: Any = damage.parse_json((folder / "config.json").read_text(encoding="utf-8"))
    layout = described.get("format") if isinstance(described, dict) else type(described).__name__
    if not isinstance(layout, int):
        raise CheckpointError(
            f"{folder} holds no model that pretrain or finetune wrote: the format in its config.json is "
            f"{layout!r}. Check the path; visling convert reads weights of other libraries."
        )
    if layout != FORMAT:
        raise CheckpointError(f"{folder} has layout {layout}; this version reads {FORMAT}. Update visling.")
    assert isinstance(described, dict)
    return described


def parse_encoder_config(described: Mapping[str, Any]) -> Any:
    """Config of the encoder that config.json describes."""
    return configs.from_dict(models.spec(described["model"]).config, described["config"])


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Failures of reading the files of a model folder as CheckpointErrors."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: {error} It was edited, is damaged, or was written by another version."
        ) from error
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(
            f"{folder / 'config.json'} lacks {error}: it was edited or is damaged. Train or copy the model again."
        ) from error
    except (SafetensorError, *damage.TORCH) as error:
        raise CheckpointError(
            f"cannot read the model in {folder}: {error}. The files may be truncated; train or copy it again."
        ) from error
