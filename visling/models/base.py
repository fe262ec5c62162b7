"""What every model family offers: an encoder from `Batch` to `Encoded`, and `SPEC`.

`SPEC` is all that the rest of the package knows about the family: presets, inputs, heads, released layouts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor, nn

from visling.checkpoints.keymap import KeyMap
from visling.types import EVERYTHING, Batch, Dims, Encoded, HeadKind, InputSpec, Reads, Regions, Text

C = TypeVar("C")
"""The config of a family."""

HeadWeights = Mapping[str, Mapping[str, Tensor]]
"""Part of a key map, or objective -> name -> tensor of that head."""


WHOLE = "whole image"
"""Name of the state of the whole image among those behind the regions."""


class Encoder(nn.Module, ABC):
    """Text and regions in, states out. No head, no loss, no file."""

    config: Any
    """The family's config that built it."""
    dims: Dims
    """Widths of its outputs."""
    behind_text: Sequence[str] = ()
    """Names of what captured states and maps have behind the tokens."""
    behind_regions: Sequence[str] = ()
    """Names of what they have behind the regions; a batch without images has the last of them, if any."""
    summarises_image: bool = False
    """Whether `Encoded.pooled` also reads the whole image, not only a token."""

    @property
    @abstractmethod
    def word_embeddings(self) -> nn.Embedding:
        """The word table, for heads that are tied to it."""

    @abstractmethod
    def forward(self, batch: Batch, *, capture: bool = False, reads: Reads = EVERYTHING) -> Encoded:
        """States of every real position, or of those that are read.

        Args:
            capture: also return attention maps and the hidden states of every layer; slower, same values.
            reads: what the caller reads of the result; the last layers compute nothing else. With `capture` everything
                is computed.
        """

    def encode_text(self, text: Text) -> Tensor | None:
        """States of the text rows before they meet any region, (U, T, Dt), to be used with many images; None if every
        layer reads both."""
        return None

    def encode_regions(self, regions: Regions) -> Tensor | None:
        """States of the region rows before they meet any text, (S, R, Dr), to be used with many texts; None if every
        layer reads both."""
        return None

    def encode_pairs(
        self, batch: Batch, text_states: Tensor | None, region_states: Tensor | None, *, reads: Reads = EVERYTHING
    ) -> Encoded:
        """As `forward`, without computing again what `encode_text` and `encode_regions` returned for the batch's text
        rows and region rows."""
        encoded: Encoded = self(batch, reads=reads)
        return encoded

    def fit_features(self, features: Tensor) -> None:
        """Measure statistics of region features on a sample (N, F); called once when training starts from scratch."""

    def after_text_weights(self) -> None:
        """Fill tables that start as copies of text tables; called once after BERT's text weights are loaded."""


@dataclass(frozen=True, kw_only=True)
class TaskStart:
    """A fine-tuning whose encoder has the weights of a pre-trained model, before its first update."""

    encoder: Encoder
    heads: Mapping[str, nn.Module]
    """Of the task, by name, randomly initialised."""
    kinds: Mapping[str, HeadKind]
    """Of each head."""
    objectives: HeadWeights
    """Objective -> name -> tensor of the head that it has trained."""
    answers: Sequence[Sequence[int]]
    """Word pieces of each answer of the task, in the order of its outputs; empty if it has none."""


@dataclass(frozen=True, kw_only=True)
class AnswerList:
    """The answers of a release's classifiers, in the order of their outputs: which file lists them, and how to
    recognise it."""

    file: str = "the list of answers that its release was trained with"
    unknown: Literal["first", "listed", "absent", "anywhere"] = "anywhere"
    """Whether, and where, the 3,129 answers of VQA include `<unk>`."""
    fingerprints: Mapping[int, str] = field(default_factory=dict)
    """Number of answers -> `AnswerVocabulary.fingerprint`, where the file has been seen."""


VOLTA_ANSWERS = AnswerList(
    file="trainval_label2ans.pkl of VOLTA's cache folder for the data set (VQA 3,129 answers, GQA 1,842)",
    unknown="absent",
)
"""Of VOLTA's reproductions of all families."""


KEPT_BY_RECIPES = frozenset({"dropout_rate", "attention_dropout_rate", "init_std", "max_tokens", "max_regions"})
"""Of `ModelSpec.kept`, what all families have: what is dropped out, how new weights are drawn, how much is read."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Generic[C]):
    """One family, for code that builds, loads, feeds or converts it by name. Fields without a default are all that a
    family without released files needs."""

    config: type[C]
    """Config class."""
    build: Callable[[C], Encoder]
    """Config -> randomly initialised encoder."""
    presets: Mapping[str, C]
    """Name -> config; every family has "tiny" for tests."""
    inputs: Callable[[C], InputSpec]
    """Config -> what collate must deliver."""
    layout: str = "official"
    """The family's main released layout; its styles are those of models that start from scratch."""
    head_styles: Mapping[tuple[str, str], str]
    """(layout, head kind) -> style in `nn.heads`; "matching" is the two-way classifier of the pre-training pairs."""
    keys: Mapping[str, KeyMap] = field(default_factory=dict)
    """Released layout -> key map; "bert" starts from BERT's text weights."""

    answers: Mapping[str, AnswerList] = field(default_factory=dict)
    """Released layout -> answers of its classifiers; other layouts have those of the main one."""
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"vqa": {"loss": "bce"}})
    """Task -> its settings as the family's release has them. A fine-tuning fills in those that its recipe leaves at
    None; a converted classifier is read by them."""
    kept: frozenset[str] = KEPT_BY_RECIPES
    """Settings of the config that stay those of the recipe when a run starts from another model. All others belong to
    the weights, even those that shape none of them, and follow the model."""
    task_tokens: Mapping[str, int] = field(default_factory=dict)
    """Task -> its number among the release's task tokens, of tasks that have one number for all data sets."""
    carries_answers: bool = False
    """Whether the answer head of a task starts from that of pre-training."""
    start_task: Callable[[TaskStart], list[str]] | None = None
    """What the release does before a fine-tuning, in addition to loading the encoder; returns what was done, for the
    log."""
    loads_from: tuple[str, ...] = ()
    """Other families with the same main layout, from whose converted weights it can start."""
    transformers: Callable[[C, HeadWeights], dict[str, Any]] | None = None
    """Config and weights of the heads, by part of the key map -> config.json of the family's classes in transformers,
    without names of answers; a family with a key map "transformers" has it."""

    def answer_list(self, layout: str) -> AnswerList:
        """Answers of the classifiers of a released layout."""
        return self.answers.get(layout, self.answers.get(self.layout, AnswerList()))
