"""Any object detector of the transformers package as a source of regions: DETR and its kin, YOLOS, RT-DETR, D-FINE, ...

Papers   DETR: Carion et al. 2020 (arXiv 2005.12872); YOLOS: Fang et al. 2021 (arXiv 2106.00666); RT-DETR: Zhao et al.
         2023 (arXiv 2304.08069).
Feature  The last state of a region's query: that of the decoder, or of YOLOS's detection token. Boxes and classes are
         computed from it.
Classes  A network with an output for "no object" gives a softmax, and that is the distribution. One without (deformable
         and conditional DETR, RT-DETR, D-FINE) scores each class by a sigmoid of its own: the largest score is the
         probability that there is an object, shared out among the classes in proportion to their scores.
Differs  A query is one region, of its best class. The package's post-processing of networks with sigmoids lists a
         query once for each of its classes.
Shapes   B images, Q queries, R regions of an image, C classes, F region feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visling import config as configs
from visling import runtime
from visling.errors import CheckpointError, ConfigError
from visling.runtime import Precision
from visling.types import RegionArray
from visling.vision import transformers_files as files
from visling.vision.region_detector import RegionDetector, ScaledImage
from visling.vision.transformers_files import Source

FORMAT = "visling transformers detector 1"
"""What `config.json` says that it describes."""


@dataclass(frozen=True, kw_only=True)
class TransformersDetectorConfig:
    """Which of a network's queries become regions, and how many it has."""

    num_queries: int
    """Q: what the network predicts for every picture, objects or not."""
    feature_size: int
    """F."""
    min_confidence: float = 0.3
    """Regions below this class probability are dropped, unless `min_regions` asks for them."""
    min_regions: int = 10
    """This many of the best regions are kept whatever their confidence."""
    max_regions: int = 36
    """Most regions per image."""

    def __post_init__(self) -> None:
        """Refuse numbers that the network cannot keep."""
        if not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"min_confidence is a probability, from 0 to 1; found {self.min_confidence}.")
        if not 0 <= self.min_regions <= self.max_regions:
            raise ConfigError(
                f"min_regions must lie between 0 and max_regions ({self.max_regions}); found {self.min_regions}."
            )
        if not 1 <= self.max_regions <= self.num_queries:
            raise ConfigError(
                f"max_regions must lie between 1 and the network's {self.num_queries} queries; found "
                f"{self.max_regions}."
            )


class TransformersDetector(RegionDetector):
    """A network of `transformers.AutoModelForObjectDetection` with its image processor."""

    def __init__(self, source: Source, config: TransformersDetectorConfig, *, name: str) -> None:
        """Args: name: of the folder or repository that the network comes from."""
        super().__init__()
        self.network = source.network
        self.config = config
        self.name = name
        self._source = source

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of network, weights, preparation of pictures and selection."""
        return self._source.digest(configs.to_dict(self.config))

    @property
    def feature_size(self) -> int:
        """F."""
        return self.config.feature_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """`id2label` of the network, in the order of its outputs; of DETR's 91 classes of COCO, those that are not used
        are all called N/A."""
        return _name_classes(self.network)

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """None: these networks predict no attributes."""
        return ()

    def limit_regions(self, least: int | None = None, most: int | None = None) -> None:
        """Change `min_regions` and `max_regions` of the configuration, and with them the fingerprint.

        Raises:
            ConfigError: more than the network has queries, or a least above the most.
        """
        changes = {"min_regions": least, "max_regions": most}
        chosen: dict[str, Any] = {name: number for name, number in changes.items() if number is not None}
        self.config = dataclasses.replace(self.config, **chosen)

    def scale(self, image: NDArray[Any]) -> ScaledImage:
        """The picture as the network's own image processor scales it."""
        scaled = self._source.processor(
            images=image,
            input_data_format="channels_last",
            do_rescale=False,
            do_normalize=False,
            do_pad=False,
        )
        pixels = np.asarray(scaled["pixel_values"][0]).transpose(1, 2, 0)
        return ScaledImage(pixels=pixels, size=(image.shape[1], image.shape[0]))

    @torch.no_grad()
    def detect_scaled(self, images: Sequence[ScaledImage], *, precision: Precision = "fp32") -> list[RegionArray]:
        """Regions of each picture, most confident first; class distributions end with the background.

        Pictures of one scaled size are read together and none is padded, so that no result depends on the others.
        """
        found: dict[int, RegionArray] = {}
        for numbers in files.group_by_size([image.pixels for image in images]):
            batch = files.normalise(self._source.processor, [images[number].pixels for number in numbers])
            moved = {name: value.to(self.device) for name, value in batch.items()}
            with runtime.autocast(self.device, precision):
                output = self.network(**moved)
            values = [value.float().cpu() for value in _read_output(output, len(self.class_names))]
            for number, scores, probs, boxes, states in zip(numbers, *values, strict=True):
                found[number] = self._select(scores, probs, boxes, states, size=images[number].size)
        return [found[number] for number in range(len(images))]

    def check_given_boxes(self) -> None:
        """Refuse given boxes: a feature is the state of a query, and a query chooses its box by itself.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.name} cannot take features at given boxes: its feature is the state of a query, and a query "
            "chooses its own box. For given boxes use a detector that pools its feature map (visling detect train), or "
            "grid features of an image backbone (visling detect grid)."
        )

    def regions_at_scaled(
        self, images: Sequence[ScaledImage], boxes: Sequence[NDArray[Any]], *, precision: Precision = "fp32"
    ) -> list[RegionArray]:
        """Refused, as by `check_given_boxes`.

        Raises:
            ConfigError: always.
        """
        self.check_given_boxes()
        raise AssertionError("unreachable")

    def save(self, directory: Path) -> None:
        """Write `config.json`, `model.safetensors` and `preprocessor_config.json`: the folder needs no other."""
        self._source.save(
            directory,
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "source": self.name,
                "config": configs.to_dict(self.config),
            },
        )

    def _select(
        self, scores: Tensor, probs: Tensor, boxes: Tensor, states: Tensor, size: tuple[int, int]
    ) -> RegionArray:
        """The regions of one picture.

        Args:
            scores: (Q, C).
            probs: (Q, C + 1).
            boxes: (Q, 4) centre, width and height as shares of the picture.
            states: (Q, F).
            size: width and height of the original picture.
        """
        config = self.config
        confidence, classes = scores.max(-1)
        centre, extent = boxes[:, :2], boxes[:, 2:]
        corners = torch.cat([centre - extent / 2, centre + extent / 2], dim=1).clamp(0, 1) * torch.tensor(size * 2)
        order = confidence.argsort(descending=True, stable=True)
        order = order[(corners[:, 2:] > corners[:, :2]).all(1)[order]]
        rank = torch.arange(len(order))
        sure = confidence[order] >= config.min_confidence
        kept = order[(sure | (rank < config.min_regions)) & (rank < config.max_regions)]
        return RegionArray(
            features=states[kept].numpy(),
            boxes=corners[kept].numpy(),
            size=size,
            classes=classes[kept].numpy().astype(np.int16),
            class_confidence=confidence[kept].numpy(),
            probs=probs[kept].numpy(),
        )


def _read_output(output: Any, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores (B, Q, C), distributions (B, Q, C + 1), boxes (B, Q, 4) and states (B, Q, F)."""
    logits = output.logits.float()
    scores, probs = logits_to_scores(logits, has_background=logits.shape[-1] == num_classes + 1)
    # YOLOS's states are those of the class token, the patches and, last, the detection tokens.
    return scores, probs, output.pred_boxes, output.last_hidden_state[:, -logits.shape[1] :]


def logits_to_scores(logits: Tensor, *, has_background: bool) -> tuple[Tensor, Tensor]:
    """Score of each class, and a distribution over classes and background.

    Args:
        logits: (..., C + 1) with the background last, for a softmax; or (..., C), each for a sigmoid.
    Returns:
        (..., C) and (..., C + 1), whose sum is 1.
    """
    if has_background:
        probs = logits.softmax(-1)
        return probs[..., :-1], probs
    scores = logits.sigmoid()
    best = scores.amax(-1, keepdim=True)
    return scores, torch.cat([best * scores / scores.sum(-1, keepdim=True), 1 - best], dim=-1)


def load(directory: Path, content: Mapping[str, Any]) -> TransformersDetector:
    """The detector of a folder, on the CPU.

    Args:
        content: of `config.json`.
    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not belong to the settings.
        ConfigError: transformers is not installed.
    """
    try:
        config = configs.from_dict(TransformersDetectorConfig, content["config"])
        name, network_config = str(content["source"]), dict(content["network"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / files.CONFIG} was written by another version: {error}") from error
    source = _build_source(directory, network_config, files.read_processor(directory))
    return TransformersDetector(source, config, name=name)


def wrap(
    source: str | Path,
    *,
    min_confidence: float = TransformersDetectorConfig.min_confidence,
    min_regions: int | None = None,
    max_regions: int | None = None,
    offline: bool | None = None,
) -> TransformersDetector:
    """The detector in a folder that transformers wrote, or of a model on the hub.

    Args:
        source: folder with config.json, weights and preprocessor_config.json, or owner/name.
        min_regions, max_regions: None = 10 and 36, or as many as the network has queries.
        offline: use the hub's cache only; None = follow the variable HF_HUB_OFFLINE.
    Raises:
        CheckpointError: there is no such model, it is no object detector, or its files are incomplete.
        ConfigError: numbers that the network cannot keep, or transformers is not installed.
    """
    files.import_transformers()
    folder = files.find_folder(source, offline=offline)
    built = _build_source(folder, files.read_network(folder), files.read_processor(folder))
    num_queries, feature_size = _probe(built, source)
    most = min(TransformersDetectorConfig.max_regions, num_queries) if max_regions is None else max_regions
    least = min(TransformersDetectorConfig.min_regions, most) if min_regions is None else min_regions
    config = TransformersDetectorConfig(
        num_queries=num_queries,
        feature_size=feature_size,
        min_confidence=min_confidence,
        min_regions=least,
        max_regions=most,
    )
    return TransformersDetector(built, config, name=str(source))


def _build_source(folder: Path, network_config: Mapping[str, Any], processor_config: Mapping[str, Any]) -> Source:
    """Network and image processor of a folder.

    Raises:
        CheckpointError: as `files.build_source`, or the network detects no objects.
    """

    def read(transformers: Any, config: Any) -> tuple[nn.Module, Mapping[str, Any]]:
        if type(config) not in transformers.MODEL_FOR_OBJECT_DETECTION_MAPPING:
            raise CheckpointError(
                f"{folder} holds a {config.model_type}, which is no object detector of transformers. Take one that "
                "AutoModelForObjectDetection reads; for the features of an image backbone use visling detect grid."
            )
        network, loading = transformers.AutoModelForObjectDetection.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        return network, loading

    return files.build_source(folder, network_config, processor_config, read)


def _name_classes(network: Any) -> tuple[str, ...]:
    """Names of the C classes by number."""
    names: Mapping[int, str] = network.config.id2label
    return tuple(names.get(number, f"class {number}") for number in range(len(names)))


def _probe(source: Source, name: str | Path) -> tuple[int, int]:
    """Q and F of a network, seen on a grey picture.

    Raises:
        CheckpointError: what it returns is not what detectors of transformers return.
    """
    picture = source.processor(images=files.probe_picture(), input_data_format="channels_last", return_tensors="pt")
    with torch.no_grad():
        output = source.network(**picture)
    lacking = [part for part in ("logits", "pred_boxes", "last_hidden_state") if getattr(output, part, None) is None]
    if lacking:
        raise CheckpointError(
            f"{name} ({type(source.network).__name__}) returns no {' and no '.join(lacking)}, from which regions are "
            "made. Take a detector whose queries have classes, boxes and states, such as DETR, YOLOS or RT-DETR."
        )
    num_classes, num_outputs = len(_name_classes(source.network)), output.logits.shape[-1]
    if num_outputs not in (num_classes, num_classes + 1):
        raise CheckpointError(
            f"{name} scores {num_outputs} classes, but id2label in its config.json names {num_classes}. Expected equal "
            'numbers, or one more score for "no object".'
        )
    return int(output.logits.shape[1]), int(output.last_hidden_state.shape[-1])
