"""Pre-training runs: which corpora, which objectives, which optimiser. A recipe is a function that returns a `Pretraining`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from visling import models, runtime
from visling.data.annotations.captions import find_captions_file, read_captions
from visling.data.annotations.questions import find_vqa_files, read_questions
from visling.data.loader import Loader, Source
from visling.data.masking import TokenMasking
from visling.data.pretraining import CaptionPairs, LabelledSentences, Mixture, QuestionAnswer, SentenceRecord, SingleCaption
from visling.data.store import NativeStore
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.models.base import Encoder
from visling.objectives.base import Objective
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.matching import Matching
from visling.recipes import assembly
from visling.tasks.nlvr import NLVR
from visling.train import engine
from visling.train.engine import TrainConfig
from visling.train.optim import OptimConfig
from visling.types import Batch, Loss, Targets

CorpusKind = Literal["captions", "caption_pairs", "single_captions", "statements", "questions"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One body of sentences about images; which folders it is read from comes from the command line."""

    kind: CorpusKind
    """captions: one, always right, nothing to match. caption_pairs: two, does the second fit (VisualBERT). single_captions: one, half of the
    time a wrong one. statements: true or false (NLVR's layout). questions: VQA question and answer as one text."""
    weight: float = 1.0
    """Passes over it per epoch."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """One pre-training run; saved in run.json."""

    recipe: str
    model: str
    """Family."""
    encoder: Any
    """The family's config."""
    corpora: tuple[Corpus, ...]
    objectives: Mapping[str, float]
    """Objective -> weight in the loss: masked_lm, matching."""
    masking: TokenMasking = field(default_factory=TokenMasking)
    """Which word pieces are hidden."""
    batch_size: int = 128
    """Examples per step and process."""
    train_split: str = "train"
    valid_split: str = "val"
    train: TrainConfig
    """How long and how."""


def visualbert_scenes() -> Pretraining:
    """VisualBERT's COCO phase on drawn scenes, small and from scratch: masked words of captions, and caption pairs, as the release makes them.

    Half of the words in caption pairs speak of another image and teach nothing about this one: single captions learn in half the steps.
    """
    return Pretraining(
        recipe="visualbert-scenes",
        model="visualbert",
        encoder=models.spec("visualbert").presets["scenes"],
        corpora=(Corpus(kind="captions"), Corpus(kind="caption_pairs", weight=0.2)),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TokenMasking(rate=0.35),
        batch_size=32,
        train=TrainConfig(epochs=10, precision="auto", log_every=200, validate_every=2, save_every=2000, optim=_small_optimiser(2e-3)),
    )


def visualbert_nlvr() -> Pretraining:
    """VisualBERT's task-specific phase (masked words, and is the statement true) on drawn panels and NLVR sentences."""
    return Pretraining(
        recipe="visualbert-nlvr",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        corpora=(Corpus(kind="statements"),),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TokenMasking(rate=0.1),
        batch_size=64,
        train=TrainConfig(epochs=12, precision="auto", save_every=2000, log_every=200, optim=_small_optimiser(1e-3)),
    )


def visualbert_coco() -> Pretraining:
    """VisualBERT's COCO phase as released (VQA configuration): caption pairs on COCO, 100 regions of width 2048."""
    return Pretraining(
        recipe="visualbert-coco",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vqa"],
        corpora=(Corpus(kind="caption_pairs"),),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        batch_size=48,
        train=TrainConfig(epochs=10, optim=_release_optimiser(5e-5), patience=3),
    )


def visualbert_vqa() -> Pretraining:
    """VisualBERT's task-specific phase for VQA as released: masked words over question and answer."""
    return Pretraining(
        recipe="visualbert-vqa",
        model="visualbert",
        encoder=models.spec("visualbert").presets["vqa"],
        corpora=(Corpus(kind="questions"),),
        objectives={"masked_lm": 1.0},
        batch_size=64,
        train=TrainConfig(epochs=10, optim=_release_optimiser(5e-5), patience=3),
    )


def _small_optimiser(lr: float) -> OptimConfig:
    """For models of width 96 to 192 from scratch, found by trial (docs/log.md)."""
    return OptimConfig(name="adamw", lr=lr, weight_decay=0.01, schedule="warmup_linear", warmup_share=0.05, clip="global")


def _release_optimiser(lr: float) -> OptimConfig:
    """VisualBERT release: BertAdam, each tensor clipped by itself, the pooler left out."""
    return OptimConfig(name="bert_adam", lr=lr, clip="per_tensor", clip_norm=1.0, exclude=("pooler",), warmup_share=0.1)


RECIPES: Mapping[str, Callable[[], Pretraining]] = {
    "visualbert-scenes": visualbert_scenes,
    "visualbert-nlvr": visualbert_nlvr,
    "visualbert-coco": visualbert_coco,
    "visualbert-vqa": visualbert_vqa,
}


def pretrain(
    run: Pretraining,
    out: Path,
    *,
    data: Sequence[str],
    store: Path,
    init: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    stream: TextIO | None = None,
    command: Sequence[str] = (),
) -> None:
    """Train an encoder from scratch or from another model folder; leaves a run folder.

    Args:
        data: folders of annotations; every corpus is read from every folder. `DIR@SPLIT` reads that split instead of the recipe's
            training split and takes nothing from it for validation (NLVR: dev.train leaves out what fine-tuning holds out).
        store: region store that holds every image of the corpora.
        stream: where progress is written.
    Raises:
        ConfigError, DataError, StoreError, RunError: see their messages; nothing is trained before all inputs have been looked at.
    """
    regions = NativeStore.open(store)
    run = assembly.fit_to_store(run, regions)
    spec = models.spec(run.model).inputs(run.encoder)
    tokenizer = assembly.tokenizer(run)
    layout = TextLayout(tokenizer, spec)
    training, validation = corpus(run, data, layout, valid=False), corpus(run, data, layout, valid=True)
    target = runtime.pick_device(device)
    with assembly.started(run, out, data=data, store=regions, task=None, resume=resume, stream=stream, command=command) as (folder, log):
        runtime.seed_everything(run.train.seed)
        encoder = models.build(run.model, run.encoder)
        if init is not None:
            saved = assembly.read(init)
            assembly.check_fingerprint(saved, regions.fingerprint, override=False)
            assembly.load_part(encoder, saved.weights, "encoder.", saved.path)
        model = assembly.PretrainModel(encoder, _objectives(run, encoder), run.objectives).to(target)

        def loader(source: Source, *, shuffle: bool) -> Loader:
            return Loader(
                source, regions, spec, tokenizer, batch_size=run.batch_size, seed=run.train.seed, masking=run.masking,
                shuffle=shuffle, drop_last=shuffle, pin=target.type == "cuda",
            )  # fmt: skip

        train, valid = loader(training, shuffle=True), loader(validation, shuffle=False)
        assembly.record_size(folder, model, spec, regions)

        def step(batch: Batch, targets: Targets) -> Loss:
            loss: Loss = model(batch, targets)
            return loss

        def validate() -> Mapping[str, float]:
            return assembly.mean_parts(engine.predict(step, valid, model=model, precision=run.train.precision), run.objectives)

        engine.fit(
            model,
            step,
            train,
            config=run.train,
            log=log,
            validate=validate,
            run_folder=folder,
            save_best=lambda path: assembly.save(path, model, run=run, task=None, text_only=False, store=regions, tokenizer=tokenizer),
            after_update=model.after_update,
        )
        assembly.note_truncation(log, layout)
        assembly.keep_detector(folder, regions)


def corpus(run: Pretraining, data: Sequence[str], layout: TextLayout, *, valid: bool) -> Source:
    """The training or validation examples of a run: every corpus, read from every folder, mixed by weight.

    Raises:
        DataError: a folder lacks the corpus, or no folder is left to validate on.
    """
    sources: list[Source] = []
    weights: list[float] = []
    for part in run.corpora:
        for root in data:
            folder, at, split = root.partition("@")
            if valid and at:
                continue
            sources.append(_READERS[part.kind](Path(folder), split or (run.valid_split if valid else run.train_split), layout))
            weights.append(part.weight)
    if not sources:
        raise DataError("every --data folder names its own split, so none is left to validate on: give one without @SPLIT.")
    return sources[0] if len(sources) == 1 and weights == [1.0] else Mixture(sources, weights)


def _only_captions(root: Path, split: str, layout: TextLayout) -> Source:
    return SingleCaption(_captions(root, split), layout, false_caption_ratio=None)


def _caption_pairs(root: Path, split: str, layout: TextLayout) -> Source:
    return CaptionPairs(_captions(root, split), layout)


def _single_captions(root: Path, split: str, layout: TextLayout) -> Source:
    return SingleCaption(_captions(root, split), layout)


def _captions(root: Path, split: str) -> Any:
    return read_captions(find_captions_file(root, split)).records


def _statements(root: Path, split: str, layout: TextLayout) -> Source:
    records = NLVR().records(root, split)
    sentences = [SentenceRecord(id=r.id, images=r.images, sentence=r.sentence, label=r.label) for r in records]
    return LabelledSentences(sentences, layout)


def _questions(root: Path, split: str, layout: TextLayout) -> Source:
    questions, annotations = find_vqa_files(root, split)
    if annotations is None:
        raise DataError(f"{root} has questions for {split!r} but no annotations: pre-training on questions needs their answers.")
    return QuestionAnswer(read_questions(questions, annotations), layout)


_READERS: Mapping[CorpusKind, Callable[[Path, str, TextLayout], Source]] = {
    "captions": _only_captions,
    "caption_pairs": _caption_pairs,
    "single_captions": _single_captions,
    "statements": _statements,
    "questions": _questions,
}

_OBJECTIVES: Mapping[str, tuple[type[Objective], str]] = {"masked_lm": (MaskedLM, "vocabulary"), "matching": (Matching, "matching")}
"""Name -> class and the kind under which a model names the style of its head."""


def _objectives(run: Pretraining, encoder: Encoder) -> dict[str, Objective]:
    unknown = run.objectives.keys() - _OBJECTIVES.keys()
    if unknown:
        raise ConfigError(f"unknown objectives {sorted(unknown)}; known: {', '.join(_OBJECTIVES)}.")
    styles = assembly.head_styles(run.model)
    built = {}
    for name in run.objectives:
        kind, head = _OBJECTIVES[name]
        built[name] = kind(encoder.dims, styles[head], encoder.word_embeddings)
    return built
