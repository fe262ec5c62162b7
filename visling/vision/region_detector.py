"""What turns a picture into regions, whatever the network: the interface of every detector.

Shapes   R regions of an image, F region feature width, C detector classes. Boxes are pixel corners of the original
         picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from visling.runtime import Precision
from visling.types import RegionArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledImage:
    """A picture at the size at which a detector reads it."""

    pixels: NDArray[Any]
    """(h, w, 3) RGB, uint8 or float32 from 0 to 255."""
    size: tuple[int, int]
    """Width and height of the original picture."""


class RegionDetector(nn.Module, ABC):
    """Pictures in; regions with feature, box, class and attributes out.

    Extraction scales pictures in background threads and hands over batches in which all have one scaled size;
    `detect` and `regions_at` do both steps for the pictures at hand.
    """

    kind: str = ""
    """Kind of its features in `feature_kinds`, which `load_detector` reads; empty for one's own."""

    @property
    def store_settings(self) -> dict[str, str]:
        """What the settings of a store of its regions say of the features."""
        return {"features": self.kind} if self.kind else {}

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of the features: it differs between any two detectors whose features differ."""

    @property
    @abstractmethod
    def feature_size(self) -> int:
        """F."""

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names of the C classes, without the background."""

    @property
    @abstractmethod
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the attributes; empty if the detector predicts none."""

    @abstractmethod
    def limit_regions(self, least: int | None = None, most: int | None = None) -> None:
        """Change how many regions an image has: the best ones are kept below the threshold too until there are `least`.

        Raises:
            ConfigError: numbers that the detector cannot keep.
        """

    @abstractmethod
    def scale(self, image: NDArray[Any]) -> ScaledImage:
        """An RGB picture (H, W, 3) of uint8 at the size at which the detector reads it; may be called by any thread."""

    @abstractmethod
    def detect_scaled(self, images: Sequence[ScaledImage], *, precision: Precision = "fp32") -> list[RegionArray]:
        """Regions of each picture, most confident first. Class distributions end with the background."""

    def check_given_boxes(self) -> None:
        """Refuse given boxes before any picture is read, if the detector takes no features at them.

        Raises:
            ConfigError: it does not.
        """

    @abstractmethod
    def regions_at_scaled(
        self, images: Sequence[ScaledImage], boxes: Sequence[NDArray[Any]], *, precision: Precision = "fp32"
    ) -> list[RegionArray]:
        """Regions of each picture at given boxes instead of detected ones, in their order.

        Args:
            boxes: of each picture, (R, 4) pixel corners of the original within it, with area.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the folder that `detectors.load_detector` reads."""

    def detect(self, images: Sequence[NDArray[Any]], *, precision: Precision = "fp32") -> list[RegionArray]:
        """Regions of each RGB picture (H, W, 3) of uint8, as `detect_scaled` returns them.

        Pictures of different sizes are padded to a common one, which slightly changes the features near a padded
        border; group equal sizes where results must not depend on the grouping. The module should be in evaluation
        mode.
        """
        return self.detect_scaled([self.scale(image) for image in images], precision=precision)

    def regions_at(
        self, images: Sequence[NDArray[Any]], boxes: Sequence[NDArray[Any]], *, precision: Precision = "fp32"
    ) -> list[RegionArray]:
        """Regions of each RGB picture (H, W, 3) of uint8 at given boxes, as `regions_at_scaled` returns them."""
        return self.regions_at_scaled([self.scale(image) for image in images], boxes, precision=precision)
