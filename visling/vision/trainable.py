"""What a detector offers if it can be trained on annotated pictures."""

from __future__ import annotations

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
