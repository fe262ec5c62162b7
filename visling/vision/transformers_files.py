"""Networks and image processors of the transformers package in folders: what its adapters share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from visling.checkpoints import hub
from visling.checkpoints.files import add_tensors
from visling.errors import CheckpointError, ConfigError

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
SOURCE_FILES = (CONFIG, PROCESSOR, "*.safetensors", "*.safetensors.index.json")
"""Files of a repository on the hub that are fetched; no pickles."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A network with its image processor, and the settings of both as their files hold them."""

    network: nn.Module
    """In float32 and in evaluation mode."""
    processor: Any
    """Image processor on Pillow, so that equal pictures give equal pixels whether torchvision is installed or not."""
    network_config: Mapping[str, Any]
    """Content of the network's config.json."""
    processor_config: Mapping[str, Any]
    """Content of preprocessor_config.json."""

    def digest(self, settings: Mapping[str, Any]) -> str:
        """SHA-256 of the network, its weights, the preparation of pictures, and further settings."""
        parts = [self.network_config, self.processor_config, settings]
        digest = hashlib.sha256(json.dumps(list(map(dict, parts)), sort_keys=True).encode())
        digest.update(digest_weights(self.network.state_dict()))
        return digest.hexdigest()

    def save(self, directory: Path, description: Mapping[str, Any]) -> None:
        """Write weights and processor, then `description` with the network's settings as config.json: until that exists
        the folder is no detector."""
        directory.mkdir(parents=True, exist_ok=True)
        network: Any = self.network
        with quiet():
            network.save_pretrained(directory, max_shard_size="1TB")  # one file, tied weights once
        write_json(directory / PROCESSOR, self.processor_config)
        write_json(directory / CONFIG, {**description, "network": self.network_config})


def digest_weights(weights: Mapping[str, Tensor]) -> bytes:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    add_tensors(digest, weights)
    return digest.digest()


def import_transformers() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "this detector is a network of the transformers package, which is not installed. "
            "Install it with: pip install 'visling[hf]'."
        ) from error
    return transformers


def find_folder(source: str | Path, *, offline: bool | None = None) -> Path:
    """A folder, or that of a repository on the hub in the hub's cache.

    Raises:
        CheckpointError: neither exists, or the hub cannot be reached.
    """
    if hub.is_id(source):
        return hub.fetch(str(source), files=SOURCE_FILES, offline=offline)
    folder = Path(source)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {source}. Give a folder that transformers wrote (save_pretrained), or the owner/name "
            "of a model on the hub. (`visling detect grid` also reads a weight file of torchvision.)"
        )
    return folder


def read_network(folder: Path) -> dict[str, Any]:
    """Settings of the network in a folder that transformers wrote.

    Raises:
        CheckpointError: the file is missing or damaged, or is not one of transformers.
    """
    content = _read_json(folder / CONFIG, "settings of a network of transformers")
    if not isinstance(content.get("model_type"), str):
        raise CheckpointError(
            f"{folder / CONFIG} describes no network of transformers: it has no model_type. "
            "Give a folder that save_pretrained wrote."
        )
    return content


def read_processor(folder: Path) -> dict[str, Any]:
    """Settings of the image processor in a folder.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return _read_json(folder / PROCESSOR, "settings of an image processor, which say how pictures are prepared")


def build_source(
    folder: Path,
    network_config: Mapping[str, Any],
    processor_config: Mapping[str, Any],
    read: Callable[[Any, Any], tuple[nn.Module, Mapping[str, Any]]],
    *,
    spare: Callable[[str], bool] = lambda name: False,
) -> Source:
    """The network and the image processor of a folder, on the CPU.

    Args:
        network_config, processor_config: of `read_network` and `read_processor`, or as `Source.save` kept them.
        read: (the package, the config as its object) -> the network, and what transformers says of the loading.
        spare: whether a weight may be missing in the files, because nothing reads it; it becomes 0, since a random one
            would change the digest.
    Raises:
        CheckpointError: the weights are missing, damaged or incomplete, or a package that they need is missing.
    """
    transformers = import_transformers()
    try:
        with quiet():
            kind = network_config["model_type"]
            config = transformers.CONFIG_MAPPING[kind].from_dict(dict(network_config))
            network, loading = read(transformers, config)
            processor = transformers.AutoImageProcessor.from_pretrained(
                folder, config=config, backend="pil", local_files_only=True
            )
    except ImportError as error:
        raise CheckpointError(
            f"{folder} needs a package that is not installed: {_shorten(error)}. Install it, or take a model without "
            "it; those on the hub often have a variant whose backbone is not timm's."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load {folder}: {_shorten(error)}. The files must be whole "
            "and of one model; a newer transformers may know more kinds."
        ) from error
    missing = sorted(name for name in loading["missing_keys"] if not spare(name))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of {type(network).__name__}, such as {missing[0]}: they would stay "
            "random. Give a model that was trained for this."
        )
    weights = network.state_dict()
    for name in loading["missing_keys"]:
        weights[name].zero_()
    return Source(
        network=network.eval(),
        processor=processor,
        network_config=network_config,
        # The name of the class makes the file readable without the network's own config.json.
        processor_config={**processor_config, "image_processor_type": processor.to_dict()["image_processor_type"]},
    )


def normalise(processor: Any, images: Sequence[NDArray[Any]]) -> dict[str, Tensor]:
    """What the network reads of pictures of one size, (H, W, 3) of uint8, that are already scaled."""
    prepared: dict[str, Tensor] = processor(
        images=list(images),
        do_resize=False,
        do_center_crop=False,
        input_data_format="channels_last",
        return_tensors="pt",
    )
    return prepared


def group_by_size(pictures: Sequence[NDArray[Any]]) -> list[list[int]]:
    """Numbers of the pictures of each size: a network reads them together without padding, and none depends on the
    others."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(number)
    return list(groups.values())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the package's progress bars and notes; what matters of them is an error here."""
    logging = import_transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def probe_picture() -> NDArray[np.uint8]:
    """A small grey picture, to see what a network returns."""
    return np.full((64, 64, 3), 128, np.uint8)


def _read_json(file: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} has no {file.name} ({what}). Save or fetch the model again.") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Save or fetch the model again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {type(content).__name__}, expected an object with {what}.")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an object as a file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shorten(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
