"""What a detector offers if it can be trained on annotated pictures."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.types import Loss
from visling.vision.detector_config import DetectorConfig
from visling.vision.region_detector import RegionDetector, ScaledImage
from visling.vision.visual_genome_config import VisualGenomeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Annotated objects of one image."""

    boxes: NDArray[np.float32]
    """(N, 4) pixel corners of the original image."""
    classes: NDArray[np.int64]
    """(N,) class, or IGNORE for areas in which nothing should be learnt (crowds)."""
    attributes: NDArray[np.bool_]
    """(N, attributes) which of them the object has."""
    has_attributes: NDArray[np.bool_]
    """(N,) whether the object's attributes were annotated."""


class TrainableDetector(RegionDetector):
    """A detector with a training loss."""

    config: DetectorConfig | VisualGenomeConfig
    """Size, vocabulary and thresholds."""

    @property
    def feature_size(self) -> int:
        """F."""
        return self.config.feature_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes, without the background."""
        return self.config.class_names

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Of the attributes; empty without an attribute head."""
        return self.config.attribute_names

    def limit_regions(self, least: int | None = None, most: int | None = None) -> None:
        """Change `min_regions` and `max_regions` of the configuration, and with them the fingerprint; with other
        numbers than its own, the features are of no known kind.

        Raises:
            ConfigError: more than there are proposals, or more at least than at most.
        """
        changes = {"min_regions": least, "max_regions": most}
        given: dict[str, Any] = {name: number for name, number in changes.items() if number is not None}
        limited = dataclasses.replace(self.config, **given)
        if limited != self.config:
            self.kind = ""
        self.config = limited

    @abstractmethod
    def freeze(self, stages: int) -> None:
        """Freeze parts of the backbone, from the pixels on: their weights receive no gradient, and their statistics
        do not change.

        Raises:
            ConfigError: more stages than there are.
        """

    @abstractmethod
    def row_names(self) -> Mapping[str, tuple[str, ...]]:
        """Tensor of `state_dict` -> class or attribute of each of its rows, or of as many rows as each has; empty for
        the background. Tensors without such rows are not listed."""

    @abstractmethod
    def losses_scaled(self, images: Sequence[ScaledImage], truths: Sequence[Truth]) -> Loss:
        """Sum of the proposal, class, box and attribute losses of a batch of pictures with their objects."""

    def losses(self, images: Sequence[NDArray[Any]], truths: Sequence[Truth]) -> Loss:
        """Losses of RGB pictures (H, W, 3) of uint8, as `losses_scaled` returns them."""
        return self.losses_scaled([self.scale(image) for image in images], truths)
