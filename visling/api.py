"""A trained model as an object: load it, ask it about an image. Or its parts: the encoder, its settings, its answers.

model = api.load("demo/small/vqa")
print(model.answer("picture.png", "what colour is the star?"))

encoder = api.from_pretrained("owner/name").encoder()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from visling import models, runtime
from visling.data.batches.collate import Collator
from visling.data.text import TextLayout, Tokenizer
from visling.errors import CheckpointError
from visling.pretrained import folder as folder_module
from visling.pretrained.features import check_fingerprint
from visling.pretrained.folder import ModelFolder
from visling.types import Example, Prediction, Record, RegionArray
from visling.vision.detector import Detector
from visling.vision.images import read_image, to_pixels


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says about one image, and what it looked at."""

    text: str
    """The top answer."""
    confidence: float
    """Its probability."""
    top: tuple[tuple[str, float], ...]
    """Best answers with probabilities, best first."""
    question: str
    image: Image.Image
    """As the detector saw it: upright RGB, on white."""
    regions: RegionArray
    truncated: bool
    """Whether the question was longer than the model reads and was cut."""


class _OneImage:
    """A region store of the image at hand."""

    def __init__(self, regions: RegionArray, fingerprint: str) -> None:
        self.regions, self.fingerprint, self.feature_size = regions, fingerprint, int(regions.features.shape[1])

    def __contains__(self, image_id: str) -> bool:
        return True

    def __getitem__(self, image_id: str) -> RegionArray:
        return self.regions

    def __len__(self) -> int:
        return 1


class Predictor:
    """A fine-tuned model with its detector."""

    def __init__(self, saved: ModelFolder, detector: Detector | None, device: torch.device) -> None:
        self.saved, self.detector, self.device = saved, detector, device
        self.model, self.task = saved.task_model()
        if self.task.images != 1:
            raise CheckpointError(
                f"{saved.path} judges {self.task.images} images together (task {self.task.name}), and raw images are answered about one by one. "
                "Score it on a data set: visling evaluate."
            )
        self.model.to(device).eval()
        self.spec = models.spec(saved.model).inputs(saved.config)
        self.tokenizer = Tokenizer(str(saved.path / "vocab.txt"))

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the detector's classes."""
        return () if self.detector is None else self.detector.config.class_names

    @property
    def attribute_names(self) -> Sequence[str]:
        """Names of the detector's attributes."""
        return () if self.detector is None else self.detector.config.attribute_names

    def answer(self, image: str | Path | Image.Image, text: str) -> Answer:
        """Answer a question about, or judge a sentence of, one raw image.

        Raises:
            DataError: the image cannot be read, or the text is empty.
        """
        pixels = to_pixels(image) if isinstance(image, Image.Image) else read_image(Path(image))
        regions = self._regions(pixels)
        layout = TextLayout(self.tokenizer, self.spec)
        example = Example(
            id="0",
            rows=(layout.row(text, answer=self.task.name == "vqa"),),
            images=() if self.saved.text_only else ("0",),
        )
        store = None if self.saved.text_only else _OneImage(regions, self.saved.fingerprint)
        batch, _ = Collator(store, self.spec, self.tokenizer)([example], [runtime.generator_for(0)])
        with torch.inference_mode():
            logits = self.model(batch.to(self.device))
        prediction: Prediction = self.task.decode(logits, [Record(id="0", images=("0",))])[0]
        return Answer(
            text=str(prediction.value),
            confidence=prediction.confidence,
            top=prediction.top,
            question=text,
            image=Image.fromarray(pixels),
            regions=regions,
            truncated=layout.truncated > 0,
        )

    def detect(self, image: Image.Image) -> RegionArray:
        """Regions of an image, as the model was trained on; in pixels of the upright image."""
        return self._regions(to_pixels(image))

    def _regions(self, pixels: NDArray[np.uint8]) -> RegionArray:
        if self.detector is None:
            assert self.saved.text_only
            size = (pixels.shape[1], pixels.shape[0])
            return RegionArray(
                features=np.zeros((0, self.spec.feature_size), np.float32),
                boxes=np.zeros((0, 4), np.float32),
                size=size,
            )
        return self.detector.detect([pixels])[0]


def from_pretrained(source: str | Path, *, revision: str | None = None, offline: bool | None = None) -> ModelFolder:
    """A model folder, read: its settings, its answers, and on demand its `encoder()` or `task_model()`.

    It goes elsewhere with `save_pretrained(folder)` or `push_to_hub("owner/name")`.

    Args:
        source: run folder or model folder, or owner/name on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        offline: look into the hub's cache only; None = as the variable HF_HUB_OFFLINE says.
    Raises:
        CheckpointError: nothing there, not a model folder, damaged files, or a newer layout.
    """
    return folder_module.from_pretrained(source, revision=revision, offline=offline)


def load(
    path: str | Path, *, detector: str | Path | None = None, other_features: bool = False, device: str = "auto"
) -> Predictor:
    """Load a fine-tuned model for use on raw images.

    Args:
        path: run folder or model folder, or owner/name on the Hugging Face hub.
        detector: folder of the detector; the one kept beside the model if left out.
        other_features: accept a detector whose features the model was not trained on.
    Raises:
        CheckpointError: no model there, a task about two images, no detector, or a detector whose features the model
            was not trained on.
    """
    saved = folder_module.from_pretrained(path)
    target = runtime.pick_device(device)
    if saved.text_only:
        return Predictor(saved, None, target)
    folder = Path(detector) if detector is not None else saved.path / "detector"
    if detector is None and not folder.is_dir():
        raise CheckpointError(
            f"{saved.path} has no detector beside it, so raw images cannot be turned into regions. Name one with --detector."
        )
    found = Detector.load(folder, device=target)
    check_fingerprint(saved, found.fingerprint, override=other_features)
    return Predictor(saved, found, target)
