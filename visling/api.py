"""A trained model as an object: load it and ask it about an image, or take its encoder, settings and answers.

model = api.load("demo/small/vqa")
print(model.answer("picture.png", "what colour is the star?"))

encoder = api.from_pretrained("owner/name").encoder()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from visling import models, runtime
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.errors import CheckpointError, DataError
from visling.pretrained import folder as folder_module
from visling.pretrained.features import check_fingerprint
from visling.pretrained.folder import ModelFolder
from visling.types import RegionArray
from visling.vision.detector import Detector
from visling.vision.images import read_image, to_pixels

ImageLike = str | Path | Image.Image
"""An image file, or an open image."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's prediction for one image, or for the images that its task reads together, with their regions."""

    text: str
    """The top answer."""
    confidence: float
    """Its probability."""
    top: tuple[tuple[str, float], ...]
    """Best answers with probabilities, best first."""
    question: str
    images: tuple[Image.Image, ...]
    """As the detector saw them: upright, RGB, transparency on white."""
    regions_by_image: tuple[RegionArray, ...]
    truncated: bool
    """Whether the question was longer than the model reads and was cut."""

    @property
    def image(self) -> Image.Image:
        """The first image."""
        return self.images[0]

    @property
    def regions(self) -> RegionArray:
        """Regions of the first image."""
        return self.regions_by_image[0]


class _GivenRegions:
    """A region store of the images at hand, numbered from 0."""

    def __init__(self, regions: Sequence[RegionArray], fingerprint: str) -> None:
        self.regions, self.fingerprint = regions, fingerprint
        self.feature_size = int(regions[0].features.shape[1])

    def __contains__(self, image_id: str) -> bool:
        return True

    def __getitem__(self, image_id: str) -> RegionArray:
        return self.regions[int(image_id)]

    def __len__(self) -> int:
        return len(self.regions)


class Predictor:
    """A fine-tuned model with its detector."""

    def __init__(self, folder: ModelFolder, detector: Detector | None, device: torch.device) -> None:
        self.folder, self.detector, self.device = folder, detector, device
        self.model, self.task = folder.task_model()
        self.model.to(device).eval()
        self.spec = models.spec(folder.model).inputs(folder.config)
        self.tokenizer = Tokenizer(str(folder.path / "vocab.txt"))

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the detector's classes."""
        return () if self.detector is None else self.detector.config.class_names

    @property
    def attribute_names(self) -> Sequence[str]:
        """Names of the detector's attributes."""
        return () if self.detector is None else self.detector.config.attribute_names

    def answer(self, image: ImageLike | Sequence[ImageLike], text: str) -> Answer:
        """Answer a question or judge a sentence about one raw image, or about as many as the task reads together.

        Raises:
            DataError: an image cannot be read, the text is empty, or the number of images is not the one that the task
                reads.
        """
        given = [image] if isinstance(image, (str, Path, Image.Image)) else list(image)
        if len(given) != self.task.images:
            raise DataError(
                f"the task {self.task.name} reads {self.task.images} image{'s' if self.task.images > 1 else ''} at a "
                f"time; found {len(given)}."
            )
        pixels = [to_pixels(one) if isinstance(one, Image.Image) else read_image(Path(one)) for one in given]
        regions = tuple(self._detect(one) for one in pixels)
        layout = TextLayout(self.tokenizer, self.spec)
        record = self.task.query([text], [str(number) for number in range(len(given))])
        rng = runtime.generator_for(0)
        example = self.task.example(record, layout, rng)
        if self.folder.text_only:
            example = replace(example, images=())
        store = None if self.folder.text_only else _GivenRegions(regions, self.folder.fingerprint)
        batch, _ = Collator(store, self.spec, self.tokenizer)([example], [rng])
        batch = batch.to(self.device)
        with torch.inference_mode():
            prediction = self.task.decode(self.model(batch), batch, [record])[0]
        return Answer(
            text=str(prediction.value),
            confidence=prediction.confidence,
            top=prediction.top,
            question=text,
            images=tuple(Image.fromarray(one) for one in pixels),
            regions_by_image=regions,
            truncated=layout.truncated > 0,
        )

    def detect(self, image: Image.Image) -> RegionArray:
        """Regions of an image, as the model was trained on; in pixels of the upright image."""
        return self._detect(to_pixels(image))

    def _detect(self, pixels: NDArray[np.uint8]) -> RegionArray:
        if self.detector is None:
            assert self.folder.text_only
            size = (pixels.shape[1], pixels.shape[0])
            return RegionArray(
                features=np.zeros((0, self.spec.feature_size), np.float32),
                boxes=np.zeros((0, 4), np.float32),
                size=size,
            )
        return self.detector.detect([pixels])[0]


def from_pretrained(source: str | Path, *, revision: str | None = None, offline: bool | None = None) -> ModelFolder:
    """A model folder: its settings, its answers, and on demand its `encoder()` or `task_model()`.

    Copy or upload it with `save_pretrained(folder)` or `push_to_hub("owner/name")`.

    Args:
        source: run folder or model folder, or owner/name on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        offline: use the hub's cache only; None = follow the variable HF_HUB_OFFLINE.
    Raises:
        CheckpointError: not found, not a model folder, damaged files, or a newer layout.
    """
    return folder_module.from_pretrained(source, revision=revision, offline=offline)


def load(
    path: str | Path, *, detector: str | Path | None = None, other_features: bool = False, device: str = "auto"
) -> Predictor:
    """Load a fine-tuned model for use on raw images.

    Args:
        path: run folder or model folder, or owner/name on the Hugging Face hub.
        detector: folder of the detector; None = the one kept with the model.
        other_features: accept a detector whose features the model was not trained on.
    Raises:
        CheckpointError: no model, no detector, or a detector whose features the model was not trained on.
    """
    saved = folder_module.from_pretrained(path)
    target = runtime.pick_device(device)
    if saved.text_only:
        return Predictor(saved, None, target)
    folder = Path(detector) if detector is not None else saved.path / "detector"
    if detector is None and not folder.is_dir():
        raise CheckpointError(
            f"{saved.path} holds no detector, so raw images cannot be turned into regions. Name one with --detector."
        )
    found = Detector.load(folder, device=target)
    check_fingerprint(saved, found.fingerprint, override=other_features)
    return Predictor(saved, found, target)
