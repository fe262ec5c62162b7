"""What a recipe returns: everything a pre-training or fine-tuning run depends on, apart from where its files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from visling.data.masking import RegionMasking, TokenMasking
from visling.errors import ConfigError
from visling.objectives.masked_regions import RegionLosses
from visling.recipes import assembly
from visling.train.engine import TrainConfig
from visling.vision.end_to_end import ExtractorConfig

CorpusKind = Literal[
    "captions",
    "caption_pairs",
    "single_captions",
    "statements",
    "unmasked_statements",
    "true_statements",
    "questions",
    "spelled_questions",
    "answered_questions",
    "conceptual_captions",
    "sbu",
    "flickr30k",
    "vilbert_captions",
    "vg_regions",
    "vg_qa",
    "gqa",
    "lxmert",
    "vcr",
    "text",
]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One body of sentences about images; which folders it is read from comes from the command line."""

    kind: CorpusKind
    """COCO captions, as VisualBERT shows them: captions: one, always right, nothing to match. caption_pairs: two, does the second fit.
    single_captions: one, half of the time a wrong one.
    NLVR: statements: true or false. unmasked_statements: the same with every word shown. true_statements: the true ones as captions.
    VQA: questions: question and answer as one text (VisualBERT). spelled_questions: the same, the answer letter by letter, as its release has it.
    answered_questions: questions whose answer is asked for (LXMERT).
    One caption each, half of the time a wrong one if the run learns matching: conceptual_captions (released table, or VL-BERT's rows), sbu,
    flickr30k, vg_regions (phrases of Visual Genome's regions), vilbert_captions (ViLBERT's table of Conceptual Captions; a "wrong" one may fit).
    As answered_questions: vg_qa, gqa. lxmert: its merged file, captions and questions of five data sets.
    vcr: question and one of its answers, or both and a rationale: is the choice right (VisualBERT); each of the eight choices once per pass.
    text: sentences or documents without images, in a batch of their own (VL-BERT)."""
    weight: float = 1.0
    """Passes over it per epoch; of text: rows per row with an image."""
    keep_above: bool = True
    """Of vilbert_captions: a draw above one half keeps the caption (first release) or replaces it (False, multi-task release)."""
    same_choice: bool = False
    """Of vcr: question i is shown with choice i modulo 8, eight times, as in VisualBERT's release by mistake."""
    word_links: bool = False
    """Of vcr: links from names to regions count words instead of word pieces, as in VisualBERT's release by mistake."""

    def __post_init__(self) -> None:
        owned = (
            ("keep_above", not self.keep_above, "vilbert_captions"),
            ("same_choice", self.same_choice, "vcr"),
            ("word_links", self.word_links, "vcr"),
        )
        for setting, changed, kind in owned:
            if changed and self.kind != kind:
                raise ConfigError(f"{setting} is a setting of {kind}; found it with {self.kind}. Leave it out.")


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """One pre-training run; saved in run.json."""

    recipe: str
    model: str
    """Family."""
    encoder: Any
    """The family's config."""
    any_features: bool = False
    """Whether the encoder's feature width follows the region store; a published run reads features of one width."""
    corpora: tuple[Corpus, ...]
    objectives: Mapping[str, float]
    """Objective -> weight in the loss: masked_lm, matching, masked_regions, image_qa, region_contrast."""
    from_epoch: Mapping[str, int] = field(default_factory=dict)
    """Objective -> epochs that pass before it counts; until then its weight is 0 (LXMERT's paper: image_qa 10)."""
    objective_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Objective -> settings that are not its defaults (region_contrast: temperature, clip, momentum, queue_size; image_qa: num_answers)."""
    min_answer_count: int = 9
    """Training questions whose best answer it must be for an answer to be asked by image_qa, where no file lists the answers."""
    masking: TokenMasking = field(default_factory=TokenMasking)
    """Which word pieces are hidden."""
    region_masking: RegionMasking | None = None
    """Which regions are hidden; None = none."""
    region_losses: RegionLosses | None = None
    """What the objective masked_regions tells about them."""
    extractor: ExtractorConfig | None = None
    """Network that makes regions' features of pictures, hidden ones cut out, and is trained along (VL-BERT end to end); None = stored features."""
    flip: float = 0.0
    """Share of the pictures that are mirrored in training, boxes and all, texts as they are."""
    batch_size: int = 128
    """Examples per step and process."""
    train_split: str = "train"
    valid_split: str = "val"
    start: str = "fresh"
    """What the weights start from: fresh, released text weights (bert-base-uncased), or the recipe whose model `--init` names."""
    train: TrainConfig
    """How long and how."""
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Setting (dotted) or topic -> what the paper has instead, where it is known."""
    release: Mapping[str, Any] = field(default_factory=dict)
    """Setting (dotted) or topic -> what the released code has instead."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", assembly.encoder_config(self.model, self.encoder))
        for what, named in (("from_epoch", self.from_epoch), ("objective_settings", self.objective_settings)):
            if unknown := sorted(named.keys() - self.objectives.keys()):
                raise ConfigError(
                    f"{what} names {', '.join(unknown)}, which the objectives {', '.join(self.objectives)} lack. Take it out, or add it."
                )

        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip is a share of the pictures, from 0 to 1; found {self.flip:g}.")
        if self.extractor is not None:
            self._check_extractor(self.extractor)
        elif self.flip:
            raise ConfigError("flip mirrors the pictures that an extractor reads; the recipe has none. Set flip=0.")

    def _check_extractor(self, extractor: ExtractorConfig) -> None:
        """Refuse what cannot be asked about, or done to, features that are made while training."""
        if self.encoder.feature_size != extractor.feature_size:
            raise ConfigError(
                f"the extractor makes features of width {extractor.feature_size}, four times the last of extractor.widths, but encoder.feature_size "
                f"is {self.encoder.feature_size}. Use --set encoder.feature_size={extractor.feature_size}."
            )
        for name, why in (("whiten_features", "measures stored features"), ("masks_features", "hides features, but here pixels are hidden")):
            if getattr(self.encoder, name, False):
                raise ConfigError(f"encoder.{name} {why}; the recipe's extractor makes features while it trains. Use --set encoder.{name}=false.")
        if self.region_masking is not None and self.region_masking.random:
            raise ConfigError("region_masking.random takes stored features of other images, which an extractor does not read. Set it to 0.")
        if "region_contrast" in self.objectives or (self.region_losses is not None and self.region_losses.features != "none"):
            raise ConfigError(
                "region_contrast and region_losses.features compare with stored features, but the recipe's extractor makes others while it trains. "
                "Leave them out, or set extractor=none."
            )

    def weights(self, epoch: int) -> dict[str, float]:
        """Weight of every objective in an epoch, counted from 0."""
        return {name: weight if epoch >= self.from_epoch.get(name, 0) else 0.0 for name, weight in self.objectives.items()}


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """One fine-tuning run; saved in run.json."""

    recipe: str
    model: str
    """Family."""
    encoder: Any
    """The family's config."""
    any_features: bool = False
    """Whether the encoder's feature width follows the region store; a published run reads features of one width."""
    task: str
    """A module of `visling.tasks`, or a dotted path."""
    task_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the task that differ from its defaults."""
    batch_size: int = 128
    """Examples per step and process."""
    train_split: str = "train"
    valid_split: str = "val"
    """Split by which the best weights are chosen."""
    train_limit: int | None = None
    """Use only the first so many training examples (in a random order of the run's seed)."""
    text_only: bool = False
    """Train without any region: what the words alone give away."""
    carry_answers: bool = True
    """Whether the answer head starts from that of pre-training, in the families whose release does so (LXMERT, CVLP)."""
    train: TrainConfig
    """How long and how."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", assembly.encoder_config(self.model, self.encoder))
