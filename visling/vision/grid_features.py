"""Grid features: the cells of an image backbone's feature map as regions, for pictures without any box.

Paper    Jiang et al. 2020 (arXiv 2001.03615), section 3: grid features answer questions as well as regions do.
Differs  A picture is scaled to one input size as a whole, neither cropped nor padded, so that the cells tile it and
         every picture has as many; their features are those of the map, no layer is trained on regions.
Shapes   B images, F channels, h x w cells of the map, n x n cells of the grid, R regions of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from visling import config as configs
from visling import runtime
from visling.errors import CheckpointError, ConfigError
from visling.runtime import Precision
from visling.types import RegionArray
from visling.vision import ops
from visling.vision import transformers_files as files
from visling.vision.grid_backbones import (
    Backbone,
    PlainResNet,
    ResNetSizes,
    read_resnet,
    read_transformers,
)
from visling.vision.region_detector import RegionDetector, ScaledImage

FORMAT = "visling grid 1"
"""What `config.json` says that it describes."""

RESNET_SIDE = 448
"""Default side of the input of a ResNet from a weight file: 14 x 14 cells."""


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Input of a backbone, and its cells."""

    height: int
    """Pixels of the input."""
    width: int
    rows: int
    """h: cells of the feature map."""
    columns: int
    """w."""
    feature_size: int
    """F."""
    grid: int | None = None
    """n: the map is averaged to n x n cells; None = its own cells."""

    def __post_init__(self) -> None:
        """Refuse a grid that would repeat cells."""
        if self.grid is not None and not 1 <= self.grid <= min(self.rows, self.columns):
            raise ConfigError(
                f"the feature map has {self.columns} x {self.rows} cells for a picture of {self.width} x {self.height} "
                f"pixels; a grid of {self.grid} x {self.grid} cannot be averaged from it. Choose from 1 to "
                f"{min(self.rows, self.columns)}, or a larger input."
            )

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        return (self.rows, self.columns) if self.grid is None else (self.grid, self.grid)


class GridFeatures(RegionDetector):
    """The cells of a feature map as regions, row by row; no classes, no attributes, no confidence."""

    def __init__(self, backbone: nn.Module, config: GridConfig, *, name: str) -> None:
        """Args:
        backbone: a `Backbone`.
        name: of the file, folder or repository that it comes from.
        """
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.name = name

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of backbone, weights, preparation of pictures and grid."""
        return self._network.digest(configs.to_dict(self.config))

    @property
    def feature_size(self) -> int:
        """F."""
        return self.config.feature_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """None: cells have no class."""
        return ()

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """None."""
        return ()

    def limit_regions(self, least: int | None = None, most: int | None = None) -> None:
        """Check that the grid, whose number of cells is fixed, lies within the limits.

        Raises:
            ConfigError: it does not.
        """
        rows, columns = self.config.cells
        cells = rows * columns
        if (least is not None and least > cells) or (most is not None and most < cells):
            raise ConfigError(
                f"a grid has {columns} x {rows} cells in every picture, {cells} regions; found limits of "
                f"{least if least is not None else 'any'} to {most if most is not None else 'any'}. Make the detector "
                "with another --grid."
            )

    def scale(self, image: NDArray[Any]) -> ScaledImage:
        """The whole picture at the size of the input."""
        scaled = Image.fromarray(image).resize((self.config.width, self.config.height), self._network.resample)
        return ScaledImage(pixels=np.array(scaled), size=(image.shape[1], image.shape[0]))

    @torch.no_grad()
    def detect_scaled(self, images: Sequence[ScaledImage], *, precision: Precision = "fp32") -> list[RegionArray]:
        """The cells of each picture, row by row."""
        if not images:
            return []
        maps = self._compute_maps(images, precision)
        if self.config.grid is not None:
            maps = functional.adaptive_avg_pool2d(maps, self.config.grid)
        cells = maps.flatten(2).transpose(1, 2).cpu().numpy()  # (B, R, F)
        tiles = tile(*self.config.cells)
        return [
            RegionArray(features=features, boxes=tiles * np.array(image.size * 2, np.float32), size=image.size)
            for image, features in zip(images, cells, strict=True)
        ]

    @torch.no_grad()
    def regions_at_scaled(
        self, images: Sequence[ScaledImage], boxes: Sequence[NDArray[Any]], *, precision: Precision = "fp32"
    ) -> list[RegionArray]:
        """The mean of the feature map over given boxes (RoIAlign with one bin).

        Args:
            boxes: of each picture, (R, 4) pixel corners of the original within it, with area.
        """
        if not images:
            return []
        counts = [len(own) for own in boxes]
        to_map = (self.config.columns, self.config.rows) * 2
        corners = np.concatenate(
            [
                own.reshape(-1, 4) * (np.array(to_map) / np.array(image.size * 2))
                for own, image in zip(boxes, images, strict=True)
            ]
        )
        rows = torch.arange(len(images)).repeat_interleave(torch.tensor(counts))
        pooled = ops.roi_align(
            self._compute_maps(images, precision),
            torch.from_numpy(corners).to(self.device, torch.float32),
            rows.to(self.device),
            output_size=1,
            scale=1.0,
        )
        features = torch.split(pooled.flatten(1).cpu(), counts)
        return [
            RegionArray(features=own.numpy(), boxes=given.reshape(-1, 4).astype(np.float32), size=image.size)
            for own, given, image in zip(features, boxes, images, strict=True)
        ]

    def save(self, directory: Path) -> None:
        """Write `config.json`, the weights, and how pictures are prepared."""
        self._network.save(
            directory,
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "source": self.name,
                "config": configs.to_dict(self.config),
            },
        )

    @property
    def _network(self) -> Backbone:
        network: Any = self.backbone
        checked: Backbone = network
        return checked

    def _compute_maps(self, images: Sequence[ScaledImage], precision: Precision) -> Tensor:
        """(B, F, h, w) in float32."""
        with runtime.autocast(self.device, precision):
            maps: Tensor = self.backbone([image.pixels for image in images])
        return maps.float()


def tile(rows: int, columns: int) -> NDArray[np.float32]:
    """Unit corners of the cells of a grid, row by row: (rows * columns, 4)."""
    down, across = (np.arange(count + 1) / count for count in (rows, columns))
    left, top = np.meshgrid(across[:-1], down[:-1])
    right, bottom = np.meshgrid(across[1:], down[1:])
    return np.stack([left, top, right, bottom], axis=-1).reshape(-1, 4).astype(np.float32)


def load(directory: Path, content: Mapping[str, Any]) -> GridFeatures:
    """The grid features of a folder, on the CPU.

    Args:
        content: of `config.json`.
    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not belong to the settings.
        ConfigError: transformers is not installed, and the backbone is one of its.
    """
    try:
        config = configs.from_dict(GridConfig, content["config"])
        name = str(content["source"])
        sizes = configs.from_dict(ResNetSizes, content["resnet"]) if "resnet" in content else None
        network_config = {} if sizes is not None else dict(content["network"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / files.CONFIG} was written by another version: {error}") from error
    backbone = read_transformers(directory, network_config) if sizes is None else _load_resnet(directory, sizes)
    return GridFeatures(backbone, config, name=name)


def wrap(
    source: str | Path, *, grid: int | None = None, side: int | None = None, offline: bool | None = None
) -> GridFeatures:
    """Grid features of a backbone.

    Args:
        source: weight file of a ResNet in torchvision's layout, folder that transformers wrote, or owner/name on the
            hub.
        grid: the map is averaged to grid x grid cells; None = its own cells.
        side: height and width of the input in pixels; None = what the backbone's image processor prepares, and 448 for
            a ResNet from a weight file.
        offline: use the hub's cache only; None = follow the variable HF_HUB_OFFLINE.
    Raises:
        CheckpointError: there is no such backbone, or its files are incomplete.
        ConfigError: a grid finer than the map, an input that the backbone cannot read, or transformers is not
            installed.
    """
    if Path(source).is_file():
        backbone: nn.Module = read_resnet(Path(source))
        height, width = (side or RESNET_SIDE,) * 2
    else:
        folder = files.find_folder(source, offline=offline)
        wrapped = read_transformers(folder, files.read_network(folder))
        backbone = wrapped
        height, width = wrapped.input_size if side is None else (side, side)
    backbone.eval()
    try:
        with torch.no_grad():
            _, channels, rows, columns = backbone([np.full((height, width, 3), 128, np.uint8)]).shape
    except (ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise ConfigError(
            f"{source} cannot read pictures of {width} x {height} pixels: {error}. Leave out --size, or choose the one "
            "that it was trained with."
        ) from error
    config = GridConfig(height=height, width=width, rows=rows, columns=columns, feature_size=channels, grid=grid)
    return GridFeatures(backbone, config, name=str(source))


def _load_resnet(directory: Path, sizes: ResNetSizes) -> PlainResNet:
    network = PlainResNet(sizes)
    file = directory / files.WEIGHTS
    try:
        network.load_state_dict(load_file(file))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} has no {files.WEIGHTS}. Copy or make the detector again.") from error
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged or not of this network: {error}. Make the detector again.") from error
    return network
