"""Pre-training runs: which corpora, which objectives, which optimiser. A recipe is a function that returns a `Pretraining`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

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
from visling.train.state import State
from visling.types import Batch, Loss, Record, Targets

CorpusKind = Literal["captions", "caption_pairs", "single_captions", "statements", "unmasked_statements", "true_statements", "questions"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One body of sentences about images; which folders it is read from comes from the command line."""

    kind: CorpusKind
    """captions: one, always right, nothing to match. caption_pairs: two, does the second fit (VisualBERT). single_captions: one, half of the
    time a wrong one. statements: true or false (NLVR's layout). unmasked_statements: the same with every word shown. true_statements: the true
    ones as captions, nothing to match. questions: VQA question and answer as one text."""
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", assembly.encoder_config(self.model, self.encoder))


class RecordSource(Source, Protocol):
    """Examples that are made of annotations."""

    @property
    def records(self) -> Sequence[Record]: ...


def visualbert_scenes() -> Pretraining:
    """VisualBERT's COCO phase on drawn scenes, small and from scratch: masked words of captions, and caption pairs, as the release makes them.

    Half of the words in caption pairs speak of another image and teach nothing about this one: single captions learn in half the steps.
    """
    return Pretraining(
        recipe="visualbert-scenes",
        model="visualbert",
        encoder=models.spec("visualbert").presets["scenes"],
        corpora=(Corpus(kind="captions"), Corpus(kind="caption_pairs", weight=0.05)),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TokenMasking(rate=0.35),
        batch_size=32,
        train=TrainConfig(epochs=12, precision="auto", log_every=200, validate_every=4, save_every=2000, optim=_small_optimiser(2e-3)),
    )


def visualbert_panels() -> Pretraining:
    """VisualBERT's caption phase on drawn NLVR panels: masked words of captions that name every attribute. First step towards visualbert-nlvr."""
    return Pretraining(
        recipe="visualbert-panels",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        corpora=(Corpus(kind="captions"),),
        objectives={"masked_lm": 1.0},
        masking=TokenMasking(rate=0.35),
        batch_size=32,
        train=TrainConfig(epochs=4, precision="auto", log_every=200, save_every=2000, optim=_small_optimiser(2e-3)),
    )


def visualbert_nlvr() -> Pretraining:
    """VisualBERT's task-specific phase for NLVR on drawn panels and NLVR sentences: masked words, and is the statement true.

    The release hides words of the very statement it judges. NLVR shows each sentence with pictures it is true of and as many it is false of, so
    hidden words cannot be told from the picture and the label is a guess: nothing was learnt that way (docs/log.md). Words are hidden in true
    statements, and statements are judged with every word shown.
    """
    return Pretraining(
        recipe="visualbert-nlvr",
        model="visualbert",
        encoder=models.spec("visualbert").presets["nlvr"],
        corpora=(Corpus(kind="true_statements"), Corpus(kind="unmasked_statements")),
        objectives={"masked_lm": 1.0, "matching": 1.0},
        masking=TokenMasking(rate=0.25),
        batch_size=64,
        train=TrainConfig(epochs=8, precision="auto", save_every=2000, log_every=200, optim=_small_optimiser(1e-3)),
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
    "visualbert-panels": visualbert_panels,
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
    other_features: bool = False,
    stream: TextIO | None = None,
    command: Sequence[str] = (),
) -> State:
    """Train an encoder from scratch or from another model folder; leaves a run folder.

    Args:
        data: folders of annotations; every corpus is read from every folder. `DIR@SPLIT` reads that split instead of the recipe's
            training split and takes nothing from it for validation (NLVR: dev.train leaves out what fine-tuning holds out).
        store: region store that holds every image of the corpora.
        other_features: accept that `init` was trained on features of another detector.
        stream: where progress is written.
    Returns:
        How far it came; `stopped` says why it ended.
    Raises:
        ConfigError, DataError, StoreError, RunError: see their messages; nothing is trained before all inputs have been looked at.
    """
    regions = NativeStore.open(store)
    run = assembly.fit_to_store(run, regions)
    spec = models.spec(run.model).inputs(run.encoder)
    tokenizer = assembly.tokenizer(run)
    layout = TextLayout(tokenizer, spec)
    training, validation = corpus(run, data, layout, regions, valid=False), corpus(run, data, layout, regions, valid=True)
    if not len(validation):
        raise DataError(f"split {run.valid_split!r} of {', '.join(data)} holds no example to validate on. Name another with --set valid_split=NAME.")
    target = runtime.pick_device(device)
    with assembly.started(run, out, data=data, store=regions, task=None, resume=resume, stream=stream, command=command) as (folder, log):
        runtime.seed_everything(run.train.seed)
        encoder = assembly.fresh_encoder(run, regions)
        if init is not None:
            saved = assembly.read(init)
            assembly.check_fingerprint(saved, regions.fingerprint, override=other_features)
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

        state = engine.fit(
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
        assembly.note_truncation(log, layout, state.step)
        assembly.keep_detector(folder, regions, log, state.step)
    return state


def corpus(run: Pretraining, data: Sequence[str], layout: TextLayout, store: NativeStore, *, valid: bool) -> Source:
    """The training or validation examples of a run: every corpus, read from every folder that has it, mixed by weight.

    Raises:
        DataError: no folder has a corpus, or no folder is left to validate on.
        StoreError: the store lacks an image of an example.
        StoreError: an image of an example is not in the store.
    """
    sources: list[Source] = []
    weights: list[float] = []
    own = run.valid_split if valid else run.train_split
    places = [(folder, split or own) for folder, split in map(assembly.folder_and_split, data) if not (valid and split)]
    for part in run.corpora:
        read, there = _READERS[part.kind]
        # A corpus that no folder has is read all the same: its reader says what it looked for.
        for folder, split in [place for place in places if there(*place)] or places[:1]:
            source = read(folder, split, layout)
            assembly.check_images(source.records, store)
            sources.append(source)
            weights.append(part.weight)
    if not sources:
        raise DataError("every --data folder names its own split, so none is left to validate on: give one without @SPLIT.")
    return sources[0] if len(sources) == 1 and weights == [1.0] else Mixture(sources, weights)


def _has_captions(root: Path, split: str) -> bool:
    return any(file for place in (root, root / "annotations") for file in place.glob(f"captions_*{split}*.json"))


def _has_questions(root: Path, split: str) -> bool:
    return any(root.glob(f"**/*{split}*_questions.json"))


def _has_statements(root: Path, split: str) -> bool:
    name = split.partition(".")[0]
    return any(path.exists() for path in (root / name / f"{name}.json", root / name / "statements.json", root / "statements" / f"{name}.json"))


def _only_captions(root: Path, split: str, layout: TextLayout) -> RecordSource:
    return SingleCaption(_captions(root, split), layout, false_caption_ratio=None)


def _caption_pairs(root: Path, split: str, layout: TextLayout) -> RecordSource:
    return CaptionPairs(_captions(root, split), layout)


def _single_captions(root: Path, split: str, layout: TextLayout) -> RecordSource:
    return SingleCaption(_captions(root, split), layout)


def _captions(root: Path, split: str) -> Any:
    return read_captions(find_captions_file(root, split)).records


def _statements(root: Path, split: str, layout: TextLayout) -> RecordSource:
    return LabelledSentences(_sentences(root, split), layout)


def _unmasked_statements(root: Path, split: str, layout: TextLayout) -> RecordSource:
    return LabelledSentences(_sentences(root, split), layout, masked=False)


def _true_statements(root: Path, split: str, layout: TextLayout) -> RecordSource:
    return LabelledSentences([replace(record, label=None) for record in _sentences(root, split) if record.label], layout)


def _sentences(root: Path, split: str) -> list[SentenceRecord]:
    records = NLVR().records(root, split)
    return [SentenceRecord(id=record.id, images=record.images, sentence=record.sentence, label=record.label) for record in records]


def _questions(root: Path, split: str, layout: TextLayout) -> RecordSource:
    questions, annotations = find_vqa_files(root, split)
    if annotations is None:
        raise DataError(f"{root} has questions for {split!r} but no annotations: pre-training on questions needs their answers.")
    return QuestionAnswer(read_questions(questions, annotations), layout)


_READERS: Mapping[CorpusKind, tuple[Callable[[Path, str, TextLayout], RecordSource], Callable[[Path, str], bool]]] = {
    "captions": (_only_captions, _has_captions),
    "caption_pairs": (_caption_pairs, _has_captions),
    "single_captions": (_single_captions, _has_captions),
    "statements": (_statements, _has_statements),
    "unmasked_statements": (_unmasked_statements, _has_statements),
    "true_statements": (_true_statements, _has_statements),
    "questions": (_questions, _has_questions),
}
"""Kind -> reader, and whether a folder has it."""

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
