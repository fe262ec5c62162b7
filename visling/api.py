"""A trained model as an object: load it and ask it about an image, or take its encoder, settings and answers.

model = api.load("demo/small/visualbert/vqa")
answer = model.answer("picture.png", "what colour is the star?")
print(answer)  # Answer(red 87 %, blue 9 %; "what colour is the star?", 7 regions)
answer.save("answer.png")  # drawn: the picture with its regions, the question, bars; a notebook shows the same
print(model.answer("picture.png", "why is it here?", choices=["it fell", "it was put here"]))  # VCR
for image, score in model.rank(["a.png", "b.png"], "two red stars"): ...                     # retrieval

encoding = model.encode("picture.png", "what colour is the star?", capture=True)
word, region = encoding.word("star"), encoding.region("red star")
encoding.maps.text_to_regions["layers.3"][:, word.tokens, region.at]  # (heads, pieces of the word)

questions = [Question("a.png", "how many?"), Question("a.png", "what colour?"), Question("b.png", "how many?")]
for answer in model.answer_each(questions): ...  # several in a batch; each image is looked at once
for encoding in model.encode_each(questions): print(encoding.text_states.shape)

encoder = api.from_pretrained("owner/name").encoder()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from visling import models, runtime
from visling.analysis.answer import Answer as Answer
from visling.analysis.asked_together import Asked, ImageKey, Together, image_key
from visling.analysis.attention import Attention, attend
from visling.analysis.encoded_rows import split_examples
from visling.analysis.encoding import Encoding as Encoding
from visling.analysis.inspection import Inspection, inspect
from visling.analysis.question import ImageLike as ImageLike
from visling.analysis.question import Prepared as Prepared
from visling.analysis.question import Question as Question
from visling.analysis.question import SeenImage as SeenImage
from visling.analysis.question import check_question, check_questions
from visling.analysis.relevance import METHODS, PUBLISHED, Explanation, explain
from visling.analysis.relevance_rules import Rules
from visling.checkpoints import hub
from visling.checkpoints.catalog import READY
from visling.data.spelling import count_spelled
from visling.data.text import TextLayout, Tokenizer
from visling.errors import CheckpointError, DataError, nearest
from visling.nn.extraction import extract_features
from visling.pretrained import folder as folder_module
from visling.pretrained.features import check_features
from visling.pretrained.fetch import Report
from visling.pretrained.folder import ModelFolder
from visling.pretrained.ready import is_detector_name, is_ready_name, prepare, prepare_detector
from visling.types import Batch, Prediction, RegionArray
from visling.vision.detectors import load_detector
from visling.vision.images import read_image, read_open_image
from visling.vision.region_detector import RegionDetector

_Result = TypeVar("_Result")


class Predictor:
    """A fine-tuned model with its detector."""

    def __init__(
        self, folder: ModelFolder, detector: RegionDetector | None, device: torch.device, *, notice: str = ""
    ) -> None:
        self.folder, self.detector, self.device = folder, detector, device
        self.notice = notice
        """How the detector's features differ from those of the training, where they only come near."""
        self.model, self.task = folder.task_model()
        self.model.to(device).eval()
        self.spec = models.spec(folder.model).inputs(folder.config)
        self.tokenizer = Tokenizer(str(folder.path / "vocab.txt"))
        self._seen: dict[ImageKey, SeenImage] = {}
        """Image files of the last batch, so that many texts about one image detect its regions once."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the detector's classes."""
        return () if self.detector is None else self.detector.class_names

    @property
    def attribute_names(self) -> Sequence[str]:
        """Names of the detector's attributes."""
        return () if self.detector is None else self.detector.attribute_names

    def answer(self, image: ImageLike | Sequence[ImageLike], text: str, choices: Sequence[str] = ()) -> Answer:
        """Answer a question about one raw image, or about as many as the task reads together: judge a sentence, choose
        among answers, point at what an expression or the phrases of a sentence mean.

        Args:
            choices: answers to choose from, for tasks that read them.
        Raises:
            DataError: an image cannot be read, the text is empty, the number of images is not the one that the task
                reads, or it lacks choices or reads none.
        """
        (answer,) = self.answer_each([Question(image, text, choices)])
        return answer

    def answer_each(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Answer many questions, in their order; an image that several of them are about is looked at once if they
        follow one another.

        Raises:
            DataError: as `answer` does, once the questions before the one at fault are answered.
        """
        return self._process_together(questions, self._answer_together)

    def encode(
        self,
        image: ImageLike | Sequence[ImageLike],
        text: str,
        choices: Sequence[str] = (),
        *,
        capture: bool = False,
    ) -> Encoding:
        """Words, named regions and their states; see `answer` for the arguments and errors.

        Args:
            capture: also attention maps and the hidden states of every layer.
        """
        (encoding,) = self.encode_each([Question(image, text, choices)], capture=capture)
        return encoding

    def encode_each(self, questions: Iterable[Question], *, capture: bool = False) -> Iterator[Encoding]:
        """`encode` for many questions, in their order, several in a batch."""
        return self._process_together(questions, partial(self._encode_together, capture=capture))

    def explain(
        self,
        image: ImageLike | Sequence[ImageLike],
        text: str,
        choices: Sequence[str] = (),
        *,
        methods: Sequence[str] = METHODS,
        most: int = 10,
        rules: Rules = PUBLISHED,
    ) -> Explanation:
        """What each of the `most` best answers rests on, by some of `relevance.METHODS`; see `answer` for the rest.

        Raises:
            DataError: as `answer`.
            ConfigError: no such method, or a task that does not define which output speaks for an answer.
        """
        prepared = self.prepare(Question(image, text, choices))
        given = self.model, self.task, prepared.batch, [prepared.record]
        (found,) = explain(*given, methods=methods, most=most, rules=rules)
        return found

    def attend(self, image: ImageLike | Sequence[ImageLike], text: str, choices: Sequence[str] = ()) -> Attention:
        """Attention maps with names, and statistics of the heads; see `answer` for the arguments and errors."""
        return attend(self.encode(image, text, choices, capture=True), text_only=self.folder.text_only)

    def prepare(self, question: Question) -> Prepared:
        """A question laid out for the model, its images looked at.

        Raises:
            DataError: as `answer`.
        """
        together = Together()
        together.asked.append(self._read_question(question, together))
        (asked,) = together.asked
        with torch.no_grad():
            batch, _ = extract_features(self.model.extractor, self._collate(together))
        own = together.list_images(asked)
        return Prepared(
            question=question,
            record=asked.record,
            example=asked.example,
            batch=batch.unshared(),
            regions=tuple(found.regions for found in own),
            images=tuple(Image.fromarray(found.pixels) for found in own),
            truncated=asked.truncated,
        )

    def inspect(
        self,
        image: ImageLike | Sequence[ImageLike],
        text: str,
        choices: Sequence[str] = (),
        *,
        most: int = 10,
        removal: bool = True,
    ) -> Inspection:
        """What the model answers and what it looks at, to be read, saved (`to_json`) or shown (`to_html`); see `answer`
        for the other arguments and errors.

        Args:
            most: answers that are explained.
            removal: also ask again without parts of the question, which takes most of the time.
        """
        return self.inspect_prepared(self.prepare(Question(image, text, choices)), most=most, removal=removal)

    def inspect_prepared(self, asked: Prepared, *, most: int = 10, removal: bool = True) -> Inspection:
        """`inspect` for a question that was prepared, and perhaps changed by `analysis.changing`."""
        return inspect(
            self.model,
            self.task,
            asked,
            folder=self.folder,
            tokenizer=self.tokenizer,
            class_names=self.class_names,
            attribute_names=self.attribute_names,
            notices=(self.notice, self._describe_unseen(asked.question.images, asked.regions)),
            most=most,
            removal=removal,
        )

    def _process_together(
        self, questions: Iterable[Question], process: Callable[[Together], Iterator[_Result]]
    ) -> Iterator[_Result]:
        """What becomes of each question when they are processed in batches."""
        check_questions(questions)
        together = Together()
        for question in questions:
            if not together.has_room(question):
                yield from process(together)
                together = Together()
            try:
                together.asked.append(self._read_question(question, together))
            except DataError:
                yield from process(together)
                raise
        yield from process(together)

    def _read_question(self, question: Question, together: Together) -> Asked:
        """A question laid out for the model, after its images were looked at."""
        check_question(question)
        given, text, choices = question.images, question.text, question.choices
        self.check_query(len(given), choices)
        names = [self._look_at(image, together) for image in given]
        layout = TextLayout(self.tokenizer, self.spec, task_token=self.folder.task_token)
        # A model of the words alone is asked without images, but its task may count them.
        record = self.task.query([text, *choices], names or [str(number) for number in range(self.task.images)])
        example = self.task.example(record, layout, runtime.generator_for(0))
        if self.folder.text_only:
            example = replace(example, images=())
        return Asked(question, names, record, example, layout.truncated > 0)

    def _answer_together(self, together: Together) -> Iterator[Answer]:
        """Answers to the questions of a batch, in their order."""
        asked = together.asked
        if not asked:
            return
        batch = self._collate(together)
        with torch.inference_mode():
            predictions = self.task.decode(self.model(batch), batch.unshared(), [one.record for one in asked])
        for one, prediction in zip(asked, predictions, strict=True):
            yield self._word_answer(one, together.list_images(one), prediction)

    def _encode_together(self, together: Together, *, capture: bool) -> Iterator[Encoding]:
        """Encodings of the questions of a batch, in their order."""
        asked = together.asked
        if not asked:
            return
        batch = self._collate(together)
        with torch.no_grad():
            batch, _ = extract_features(self.model.extractor, batch)
            encoded = self.model.encoder(batch, capture=capture).to("cpu")
        own = [together.list_images(one) for one in asked]
        split = split_examples(
            self.model.encoder,
            encoded,
            batch.to("cpu"),
            [one.example for one in asked],
            tokenizer=self.tokenizer,
            regions=[[] if self.folder.text_only else [one.regions for one in images] for images in own],
            class_names=self.class_names,
            attribute_names=self.attribute_names,
        )
        for one, images, rows in zip(asked, own, split, strict=True):
            yield Encoding(
                question=one.question.text, images=tuple(Image.fromarray(found.pixels) for found in images), rows=rows
            )

    def _collate(self, together: Together) -> Batch:
        """The batch of some questions, on the model's device."""
        self._seen = {key: found for key, found in together.seen.items() if isinstance(key, tuple)}
        return together.collate(self.folder, self.spec, self.tokenizer).to(self.device)

    def _word_answer(self, asked: Asked, seen: Sequence[SeenImage], prediction: Prediction) -> Answer:
        """The answer that a prediction stands for."""
        text, choices = asked.question.text, asked.question.choices
        regions = tuple(found.regions for found in seen)
        spelled = count_spelled(asked.example.rows, self.tokenizer)
        # An expression has one box among candidates that have numbers; phrases have a box each.
        one = bool(prediction.boxes) and prediction.value == prediction.boxes[0]
        pointed_at = ((text, prediction.confidence),) if one else prediction.top[: len(prediction.boxes)]
        value = "no box" if prediction.value is None else str(prediction.value)
        return Answer(
            text=choices[int(prediction.value)] if choices else value,
            confidence=prediction.confidence,
            top=tuple((choices[int(name)], share) for name, share in prediction.top) if choices else prediction.top,
            boxes=prediction.boxes,
            pointed_at=pointed_at,
            question=text,
            images=tuple(Image.fromarray(found.pixels) for found in seen),
            regions_by_image=regions,
            class_names=tuple(self.class_names),
            attribute_names=tuple(self.attribute_names),
            max_tokens=self.spec.max_tokens,
            truncated=asked.truncated,
            spelled_out=tuple(spelled.unknown) if spelled.share > 0.5 else (),
            notice=self._describe_unseen(asked.question.images, regions),
        )

    def rank(self, images: Sequence[ImageLike], text: str) -> list[tuple[ImageLike, float]]:
        """Images with their scores, the one that a text fits best first.

        Raises:
            DataError: the task does not compare a text with images, an image cannot be read, or the text is empty.
        """
        if self.task.all_pairs() is None:
            raise DataError(
                f"the task {self.task.name} does not rank images: use answer(image, text). Retrieval ranks them."
            )
        check_question(Question(images, text))
        images = Question(images, text).images
        answers = self.answer_each([Question(image, text) for image in images])
        scored = [(image, float(answer.text)) for image, answer in zip(images, answers, strict=True)]
        return sorted(scored, key=lambda pair: -pair[1])

    def check_query(self, images: int, choices: Sequence[str]) -> None:
        task, blind = self.task, self.folder.text_only
        if images != task.images and not (blind and images == 0):
            raise DataError(
                f"the task {task.name} reads {task.images} image{'s' if task.images > 1 else ''} at a "
                f"time; found {images}."
            )
        if task.choices and len(choices) < 2:
            raise DataError(f"the task {task.name} chooses among answers: give at least two; found {len(choices)}.")
        if choices and not task.choices:
            raise DataError(
                f"the task {task.name} reads no answers to choose from; found {len(choices)}. Leave them out."
            )

    def _describe_unseen(self, images: Sequence[ImageLike], regions: Sequence[RegionArray]) -> str:
        """Which images the answer does not depend on, because the detector found nothing in them; empty if there is
        none. A network that is trained jointly sees the whole image, too."""
        if self.folder.text_only or self.folder.extractor is not None:
            return ""
        names = [
            f"image {number}" if isinstance(image, (Image.Image, SeenImage)) else str(image)
            for number, image in enumerate(images, 1)
        ]
        unseen = [name for name, found in zip(names, regions, strict=True) if not len(found)]
        if not unseen:
            return ""
        alone = "from the words alone" if len(unseen) == len(images) else "without it"
        return f"the detector found nothing in {' and '.join(unseen)}; this is answered {alone}"

    def _look_at(self, image: ImageLike, together: Together) -> str:
        """Name of an image in its batch, which takes it up; regions of a file that was in the last batch are
        remembered."""
        key = image_key(image)
        if key not in together.seen:
            together.seen[key] = self._seen.get(key) or self.look(image)
        return together.name(key)

    def look(self, image: ImageLike | NDArray[np.uint8]) -> SeenImage:
        """An image, or its pixels as `SeenImage` has them, with its regions, to be asked about in its place.

        Raises:
            DataError: the file cannot be read.
        """
        if isinstance(image, SeenImage):
            return image
        if not isinstance(image, np.ndarray):
            image = read_open_image(image) if isinstance(image, Image.Image) else read_image(Path(image))
        return SeenImage(image, self._detect(image))

    def detect(self, image: Image.Image) -> RegionArray:
        """Regions of an image, as the model was trained on; in pixels of the upright image."""
        return self._detect(read_open_image(image))

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
        offline: use the hub's cache only; None = follow the variables VISLING_OFFLINE and HF_HUB_OFFLINE.
    Raises:
        CheckpointError: not found, not a model folder, damaged files, or a newer layout.
    """
    return folder_module.from_pretrained(source, revision=revision, offline=offline)


def load(
    path: str | Path,
    *,
    task: str | None = None,
    detector: str | Path | None = None,
    other_features: bool = False,
    device: str = "auto",
    offline: bool | None = None,
    report: Report | None = None,
) -> Predictor:
    """Load a fine-tuned model for use on raw images.

    Args:
        path: run folder or model folder, a name of the catalogue (what it stands for is downloaded and converted when
            it is first used), or owner/name on the Hugging Face hub.
        task: of a model of several tasks: the name of the one to ask.
        detector: folder of the detector, or its name in the catalogue; None = the one kept with the model, or listed
            with its name.
        other_features: accept a detector whose features the model was not trained on.
        offline: download nothing; None = follow the variables VISLING_OFFLINE and HF_HUB_OFFLINE.
        report: called while files are downloaded, see `pretrained.fetch.Report`.
    Raises:
        CheckpointError: no model, no detector, one whose features the model was not trained on, or a download failed.
    """
    target = runtime.pick_device(device)
    if detector is not None and is_detector_name(detector):
        detector = prepare_detector(str(detector), offline=offline, report=report)
    if is_ready_name(path):
        found = prepare(str(path), detector=detector, offline=offline, report=report)
        path, detector = found.model, found.detector
    elif not Path(path).exists() and not hub.is_id(path):
        hint = nearest(str(path), [ready.name for ready in READY], otherwise="Check the path.")
        raise CheckpointError(f"no model in {path}: there is no such folder, and no such name in the catalogue. {hint}")
    saved = folder_module.from_pretrained(path, offline=offline).for_task(task)
    if saved.text_only:
        return Predictor(saved, None, target)
    folder = Path(detector) if detector is not None else saved.path / "detector"
    if detector is None and not folder.is_dir():
        raise CheckpointError(
            f"{saved.path} holds no detector, so raw images cannot be turned into regions. Name one with --detector."
        )
    network = load_detector(folder, device=target)
    notice = check_features(saved, network, override=other_features, extracts=saved.extractor is not None)
    return Predictor(saved, network, target, notice=notice)
