"""What a recipe returns: everything a pre-training or fine-tuning run depends on, apart from where its files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from visling.data.masking import RegionMasking, TokenMasking
from visling.objectives.masked_regions import RegionLosses
from visling.recipes import assembly
from visling.train.engine import TrainConfig

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
    """Objective -> weight in the loss: masked_lm, matching, masked_regions, image_qa, region_contrast."""
    masking: TokenMasking = field(default_factory=TokenMasking)
    """Which word pieces are hidden."""
    region_masking: RegionMasking | None = None
    """Which regions are hidden; None = none."""
    region_losses: RegionLosses | None = None
    """What the objective masked_regions tells about them."""
    batch_size: int = 128
    """Examples per step and process."""
    train_split: str = "train"
    valid_split: str = "val"
    train: TrainConfig
    """How long and how."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", assembly.encoder_config(self.model, self.encoder))


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """One fine-tuning run; saved in run.json."""

    recipe: str
    model: str
    """Family."""
    encoder: Any
    """The family's config."""
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
    train: TrainConfig
    """How long and how."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", assembly.encoder_config(self.model, self.encoder))
