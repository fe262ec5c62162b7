"""Pre-training runs: which corpora, which objectives, which optimiser. A recipe is a function that returns a `Pretraining`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from visling import models, runtime
from visling.data.annotations.captions import find_captions_file, read_captions
from visling.data.annotations.questions import find_vqa_files, read_questions
from visling.data.loader import Loader, Source
from visling.data.pretraining import CaptionPairs, LabelledSentences, Mixture, QuestionAnswer, SentenceRecord, SingleCaption
from visling.data.store import NativeStore
from visling.data.text import TextLayout
from visling.errors import ConfigError, DataError
from visling.models.base import Encoder
from visling.objectives.base import Objective
from visling.objectives.image_qa import ImageQA
from visling.objectives.masked_lm import MaskedLM
from visling.objectives.masked_regions import MaskedRegions
from visling.objectives.matching import Matching
from visling.objectives.region_contrast import RegionContrast
from visling.recipes import assembly, releases, scenes
from visling.recipes.plans import CorpusKind, Pretraining
from visling.tasks.nlvr import NLVR
from visling.train import engine
from visling.train.state import State
from visling.types import Batch, Loss, Record, Targets


class RecordSource(Source, Protocol):
    """Examples that are made of annotations."""

    @property
    def records(self) -> Sequence[Record]: ...


RECIPES: Mapping[str, Callable[[], Pretraining]] = {**scenes.PRETRAINING, **releases.PRETRAINING}


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
        objectives = _objectives(run, encoder)
        model = assembly.PretrainModel(encoder, objectives, run.objectives).to(target)
        needs = frozenset[str]().union(*(objective.reads() for objective in objectives.values()))
        pool = _images(training) if run.region_masking is not None and run.region_masking.random else []

        def loader(source: Source, *, shuffle: bool) -> Loader:
            return Loader(
                source, regions, spec, tokenizer, batch_size=run.batch_size, seed=run.train.seed, masking=run.masking,
                region_masking=run.region_masking, needs=needs, pool=pool, shuffle=shuffle, drop_last=shuffle, pin=target.type == "cuda",
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

_OBJECTIVES: Mapping[str, tuple[Callable[..., Objective], str]] = {
    "masked_lm": (MaskedLM, "vocabulary"),
    "matching": (Matching, "matching"),
    "masked_regions": (MaskedRegions, "region_targets"),
    "image_qa": (ImageQA, "classify"),
    "region_contrast": (RegionContrast, "projection"),
}
"""Name -> class and the kind under which a model names the style of its head."""


def _objectives(run: Pretraining, encoder: Encoder) -> dict[str, Objective]:
    unknown = run.objectives.keys() - _OBJECTIVES.keys()
    if unknown:
        raise ConfigError(f"unknown objectives {sorted(unknown)}; known: {', '.join(_OBJECTIVES)}.")
    styles = assembly.head_styles(run.model)
    built = {}
    for name in run.objectives:
        kind, head = _OBJECTIVES[name]
        if head not in styles:
            raise ConfigError(f"{run.model} has no head for the objective {name}. Leave it out of the recipe's objectives.")
        built[name] = kind(encoder.dims, styles[head], encoder.word_embeddings, **_settings(run, encoder, name))
    return built


def _settings(run: Pretraining, encoder: Encoder, objective: str) -> dict[str, Any]:
    """What an objective takes beside its head."""
    if objective == "masked_regions":
        if run.region_losses is None or run.region_masking is None:
            raise ConfigError("the objective masked_regions needs region_losses and region_masking in the recipe; found none.")
        return {"losses": run.region_losses}
    return {"encoder": encoder} if objective == "region_contrast" else {}


def _images(source: Source) -> list[str]:
    """Image of every example, where the features of random regions come from."""
    parts: Sequence[Any] = source.sources if isinstance(source, Mixture) else [source]
    return [record.images[0] for part in parts for record in part.records]
