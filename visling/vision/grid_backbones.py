"""Image backbones of grid features: our ResNet from a weight file of torchvision's layout, or any of transformers.

Shapes   B images, H x W pixels, F channels, h x w cells of the feature map.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from visling.checkpoints import files as weight_files
from visling.checkpoints.keymap import KeyMap
from visling.errors import CheckpointError
from visling.vision import transformers_files as files
from visling.vision.resnet import (
    EXPANSION,
    HEAD_BLOCKS,
    MEAN_RGB,
    PLAIN_NETWORK,
    STD_RGB,
    FrozenNorm,
    build_stage,
    build_trunk,
    feature_map,
)
from visling.vision.transformers_files import Source

_SPARE = ("pooler", "mask_token")
"""Parts of weight names that nothing of the feature map reads."""


class Backbone(Protocol):
    """A module from pixels to a feature map."""

    resample: Image.Resampling
    """How pictures are scaled to its input."""

    def forward(self, images: Sequence[NDArray[Any]]) -> Tensor:
        """(B, F, h, w) of pictures (H, W, 3) of uint8 that have one size."""
        ...

    def digest(self, settings: Mapping[str, Any]) -> str:
        """SHA-256 of what it computes and of further settings."""
        ...

    def save(self, directory: Path, description: Mapping[str, Any]) -> None:
        """Write its files and, last, `description` with its own settings as config.json."""
        ...


@dataclass(frozen=True, kw_only=True)
class ResNetSizes:
    """Size of a residual network of bottlenecks."""

    stem_size: int
    """Channels of the first convolution."""
    widths: tuple[int, ...]
    """Width inside the bottlenecks of each of the four stages."""
    blocks: tuple[int, ...]
    """Bottlenecks of the first three stages; the last one has three."""


class PlainResNet(nn.Module):
    """ResNet-50, -101 or -152 as torchvision defines it: a quarter of the stride in the stem, a half in each later
    stage, in its wide window; 32 pixels a cell."""

    resample = Image.Resampling.BILINEAR

    def __init__(self, sizes: ResNetSizes) -> None:
        super().__init__()
        self.sizes = sizes
        *widths, last = sizes.widths
        self.stem, self.stages = build_trunk(
            sizes.stem_size, widths, sizes.blocks, [FrozenNorm] * 4, stride_in_window=True
        )
        self.head = build_stage(EXPANSION * widths[-1], last, blocks=HEAD_BLOCKS, stride=2, stride_in_window=True)

    def forward(self, images: Sequence[NDArray[Any]]) -> Tensor:
        """(B, F, H / 32, W / 32)."""
        weight = self.stem.convolution.weight
        pixels = torch.from_numpy(np.stack(images)).to(weight.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN_RGB, STD_RGB))
        maps: Tensor = self.head(feature_map(self.stem, self.stages, (pixels - mean) / std))
        return maps

    def digest(self, settings: Mapping[str, Any]) -> str:
        """SHA-256 of sizes, weights and further settings."""
        digest = hashlib.sha256(json.dumps([asdict(self.sizes), dict(settings)], sort_keys=True).encode())
        digest.update(files.digest_weights(self.state_dict()))
        return digest.hexdigest()

    def save(self, directory: Path, description: Mapping[str, Any]) -> None:
        """Write model.safetensors and config.json."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, directory / files.WEIGHTS)
        files.write_json(directory / files.CONFIG, {**description, "resnet": asdict(self.sizes)})


def read_resnet(path: Path) -> PlainResNet:
    """The network of a weight file with torchvision's names, of the size that the file has.

    Raises:
        CheckpointError: no such file, damaged, or no residual network of bottlenecks.
    """
    tensors = weight_files.read(path)
    stages = [f"layer{number}" for number in (1, 2, 3, 4)]
    lacking = [
        name for name in ("conv1.weight", *(f"{stage}.0.conv3.weight" for stage in stages)) if name not in tensors
    ]
    if lacking:
        raise CheckpointError(
            f"{path} is no ResNet of bottlenecks in torchvision's layout: it has no {lacking[0]}. Give the weights of "
            "a ResNet-50, -101 or -152; other networks are read from folders of transformers."
        )
    counts = [len({name.split(".")[1] for name in tensors if re.match(rf"{stage}\.\d+\.", name)}) for stage in stages]
    if counts[-1] != HEAD_BLOCKS:
        raise CheckpointError(
            f"{path} has {counts[-1]} bottlenecks in layer4, expected {HEAD_BLOCKS} as in ResNet-50, -101 and -152."
        )
    sizes = ResNetSizes(
        stem_size=len(tensors["conv1.weight"]),
        widths=tuple(len(tensors[f"{stage}.0.conv1.weight"]) for stage in stages),
        blocks=tuple(counts[:3]),
    )
    network = PlainResNet(sizes)
    try:
        KeyMap(PLAIN_NETWORK).load(tensors, {"extractor": network})
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no plain ResNet (ResNeXt and wide ones are not): {error}") from error
    return network


class TransformersBackbone(nn.Module):
    """A network of `transformers.AutoModel` with its image processor: ResNet, ConvNeXt, ViT, Swin, DINOv2, the image
    side of CLIP, ..."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.network = source.network
        self._source = source
        self.resample = Image.Resampling(int(source.processor.to_dict()["resample"]))
        self._config: Any = source.network.config

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width that the image processor prepares."""
        prepared = self._source.processor.to_dict()
        size = prepared["crop_size"] if prepared.get("do_center_crop") else prepared["size"]
        edge = size.get("shortest_edge")
        return (edge, edge) if edge else (size["height"], size["width"])

    def forward(self, images: Sequence[NDArray[Any]]) -> Tensor:
        """(B, F, h, w): the last states, without those of tokens that are no patch."""
        pixels = files.normalise(self._source.processor, images)["pixel_values"]
        height, width = pixels.shape[2:]
        options: dict[str, Any] = {}
        # Position embeddings are resized for other sizes than that of pre-training, where a network can.
        if "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters:
            options["interpolate_pos_encoding"] = (height, width) != _as_pair(self._config.image_size)
        states: Tensor = self.network(pixels.to(next(self.network.parameters()).device), **options).last_hidden_state
        if states.ndim == 4:
            return states
        halvings = len(getattr(self._config, "depths", (1,))) - 1
        rows, columns = (
            side // (patch * 2**halvings)
            for side, patch in zip((height, width), _as_pair(self._config.patch_size), strict=True)
        )
        others = states.shape[1] - rows * columns
        if not 0 <= others <= 1 + getattr(self._config, "num_register_tokens", 0):
            raise CheckpointError(
                f"{type(self.network).__name__} returns {states.shape[1]} states for a picture of {width} x {height}, "
                f"which has {columns} x {rows} patches: they make no grid. Take another backbone."
            )
        return torch.unflatten(states[:, others:].transpose(1, 2), 2, (rows, columns))

    def digest(self, settings: Mapping[str, Any]) -> str:
        """SHA-256 of network, weights, preparation of pictures and further settings."""
        return self._source.digest(settings)

    def save(self, directory: Path, description: Mapping[str, Any]) -> None:
        """Write model.safetensors, preprocessor_config.json and config.json."""
        self._source.save(directory, description)


def read_transformers(folder: Path, network_config: Mapping[str, Any]) -> TransformersBackbone:
    """The backbone of a folder that transformers wrote, or that `TransformersBackbone.save` did.

    Args:
        network_config: settings of the network; of a model of images and texts the images' part is taken.
    Raises:
        CheckpointError: the files are missing, damaged or incomplete.
        ConfigError: transformers is not installed.
    """

    def read(transformers: Any, config: Any) -> tuple[nn.Module, Mapping[str, Any]]:
        network, loading = transformers.AutoModel.from_pretrained(
            folder,
            config=getattr(config, "vision_config", config),
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
        )
        return network, loading

    source = files.build_source(
        folder,
        network_config,
        files.read_processor(folder),
        read,
        spare=lambda name: any(part in name for part in _SPARE),
    )
    return TransformersBackbone(source)


def _as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
