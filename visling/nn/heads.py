"""Heads: a task names a kind, a model family names the style, `build` joins the two, `read` applies the head.

Letters  B rows, N = B/G examples, G rows per example, P slots, R regions, V vocabulary, A outputs, Dt Dr Dp widths.

kind            call                                             -> logits
classify        head(pooled (B, Dp))                             -> (B, A)
score           head(pooled (B, Dp))                             -> (B,), which `read` lays out as (N, G)
pair            head(pooled (B, Dp))                             -> (N, A): of the G joined pooled vectors of an example
vocabulary      head(states at slots (B, P, Dt))                 -> (B, P, V)
slots_regions   head(states at slots, regions (B, R, Dr), mask)  -> (B, P, R): lowest finite number on padding
regions         head(candidates (B, R[+1], Dr))                  -> (B, R[+1]): unmasked; the whole image, if any, last
region_targets  head(states of regions (B, Q, Dr))               -> {name: (B, Q, width)}, as `Head.options` has them;
                                                                    read at every region, the whole image, if any, last
projection      head(states (B, N, Dr))                          -> (B, N, A): embeddings, to be compared with others
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visling.errors import ConfigError, nearest
from visling.nn.head_blocks import (
    DROPOUT_RATE,
    HEAD_SIZE,
    WEIGHT_NORM_DROPOUT_RATE,
    BertVocabulary,
    Classifier,
    DeepRegionScorer,
    FlickrAttention,
    JoinedClassifier,
    LinearRegionScorer,
    MatchFirst,
    NormedClassifier,
    Projection,
    RegionScorer,
    RegionTargets,
    Scorer,
    TransformClassifier,
    WeightNormClassifier,
)
from visling.nn.layers import initialise, initialise_xavier
from visling.nn.pooling import gather
from visling.types import NOTHING, POOLED, Batch, Dims, Encoded, Head, HeadKind, Reads


def build(head: Head, dims: Dims, *, style: str, words: nn.Embedding | None = None, group: int = 1) -> nn.Module:
    """A head of the given kind in a family's style, randomly initialised.

    Args:
        words: the encoder's word table, for kinds that are tied to it.
        group: G, for kinds that see several rows per example.
    Raises:
        ConfigError: no such style for this kind, or the kind lacks what it needs.
    """
    styles = STYLES.get(head.kind, {})
    if style not in styles:
        raise ConfigError(f"no {head.kind} head in style {style!r}. {nearest(style, styles)}")
    module = styles[style](_Request(head, dims, words, group))
    module.apply(initialise_xavier if (head.kind, style) in _XAVIER else initialise)
    return module


def read(
    kind: HeadKind, head: nn.Module, encoded: Encoded, batch: Batch, *, at: Tensor | None = None
) -> Tensor | dict[str, Tensor]:
    """Logits of a head, shaped as in the table above; it takes what its kind needs from the encoded batch.

    Args:
        at: (B, P) int64 text positions for vocabulary and slots_regions; None = the batch's phrases for slots_regions,
            if it has any, else every token.
    """
    logits: Tensor | dict[str, Tensor] = head(*_select_inputs(kind, encoded, batch, at))
    return logits.view(-1, batch.group) if kind == "score" and isinstance(logits, Tensor) else logits


def _select_inputs(kind: HeadKind, encoded: Encoded, batch: Batch, at: Tensor | None) -> tuple[Tensor, ...]:
    if kind in ("vocabulary", "slots_regions"):
        if kind == "slots_regions" and at is None and batch.phrases is not None:
            at = batch.phrases.at
        states = encoded.text if at is None else gather(encoded.text, at)
        return (states,) if kind == "vocabulary" else (states, encoded.regions, _mask_regions(encoded, batch))
    if kind in ("regions", "region_targets") and encoded.whole is not None:
        return (torch.cat([encoded.regions, encoded.whole[:, None]], dim=1),)
    return (encoded.regions if kind in ("regions", "region_targets", "projection") else encoded.pooled,)


def reads_of_encoded(kind: HeadKind, batch: Batch) -> Reads:
    """What `read` takes of the encoded batch for a head of this kind, without `at`."""
    if kind in ("classify", "score", "pair"):
        return POOLED
    if kind == "vocabulary":
        return replace(NOTHING, text=None)
    if kind == "slots_regions":
        return replace(NOTHING, text=None if batch.phrases is None else (batch.phrases,), regions=None)
    return replace(NOTHING, regions=None, whole=kind != "projection")


def flatten(name: str, logits: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits by name: those of one output as `name`, those of region_targets as `name.target`."""
    if isinstance(logits, Tensor):
        return {name: logits}
    return {f"{name}.{target}": values for target, values in logits.items()}


def _mask_regions(encoded: Encoded, batch: Batch) -> Tensor:
    """(B, R) bool: real regions of each row, also where rows share an image or the batch has text only."""
    if batch.regions is None:
        return encoded.regions.new_zeros(encoded.regions.shape[:2], dtype=torch.bool)
    mask = batch.regions.mask
    return mask if batch.regions.row is None else mask[batch.regions.row]


class _Request(NamedTuple):
    """What a style builds a head from; each takes what it needs."""

    head: Head
    dims: Dims
    words: nn.Embedding | None
    """The encoder's word table."""
    group: int
    """G."""

    @property
    def hidden_size(self) -> int:
        """Width between two layers over the pooled vector."""
        size: int = self.head.options.get("hidden_size", 2 * self.dims.pooled)
        return size


Builder = Callable[[_Request], nn.Module]


STYLES: Mapping[str, Mapping[str, Builder]] = {
    "classify": {
        "linear": lambda r: Classifier(r.dims.pooled, r.head.outputs, DROPOUT_RATE),
        "plain": lambda r: Classifier(r.dims.pooled, r.head.outputs, 0.0),
        "vlbert": lambda r: TransformClassifier(r.dims.pooled, r.head.outputs, DROPOUT_RATE),
        "gelu_norm": lambda r: NormedClassifier(r.dims.pooled, r.hidden_size, r.head.outputs),
        "vilbert": lambda r: NormedClassifier(r.dims.pooled, r.hidden_size, r.head.outputs, dropout_rate=DROPOUT_RATE),
        "weight_norm": lambda r: WeightNormClassifier(
            r.dims.pooled, 2 * r.dims.pooled, r.head.outputs, DROPOUT_RATE, WEIGHT_NORM_DROPOUT_RATE
        ),
        "weight_norm_plain": lambda r: WeightNormClassifier(
            r.dims.pooled, 2 * r.dims.pooled, r.head.outputs, 0.0, WEIGHT_NORM_DROPOUT_RATE
        ),
        "match_first": lambda r: MatchFirst(r.dims.pooled, r.head.outputs, DROPOUT_RATE),
        "match_first_plain": lambda r: MatchFirst(r.dims.pooled, r.head.outputs, 0.0),
    },
    "score": {
        "linear": lambda r: Scorer(r.dims.pooled, r.head.outputs, DROPOUT_RATE),
        "plain": lambda r: Scorer(r.dims.pooled, r.head.outputs, 0.0),
        "vlbert": lambda r: Scorer(r.dims.pooled, r.head.outputs, DROPOUT_RATE),
    },
    "pair": {
        "linear": lambda r: JoinedClassifier(r.dims.pooled, r.head.outputs, r.group, DROPOUT_RATE),
        "gelu_norm": lambda r: NormedClassifier(r.dims.pooled, r.hidden_size, r.head.outputs, r.group),
        "vilbert": lambda r: NormedClassifier(r.dims.pooled, r.hidden_size, r.head.outputs, r.group, DROPOUT_RATE),
    },
    "vocabulary": {"bert": lambda r: BertVocabulary(r.dims.text, r.words)},
    "slots_regions": {
        "flickr": lambda r: FlickrAttention(r.dims.text, r.dims.regions, r.head.options.get("head_size", HEAD_SIZE))
    },
    "regions": {
        "vlbert": lambda r: RegionScorer(r.dims.regions),
        "linear": lambda r: LinearRegionScorer(r.dims.regions, DROPOUT_RATE),
        "deep": lambda r: DeepRegionScorer(r.dims.regions, DROPOUT_RATE),
    },
    "region_targets": {
        "vlbert": lambda r: RegionTargets(r.dims.regions, r.head.options, norm=False),
        "bert": lambda r: RegionTargets(r.dims.regions, r.head.options, norm=True),
    },
    "projection": {"cvlp": lambda r: Projection(r.dims.regions, r.head.outputs)},
}
"""Kind -> style -> builder. A new style is one entry."""

_XAVIER = frozenset({("classify", "vlbert"), ("score", "vlbert"), ("regions", "vlbert")})
"""Kinds and styles that start by Xavier's rule: `final_mlp` of the VL-BERT release's tasks. Its heads of classes of
regions (`mvrc_head`, `cnn_loss_reg`) start as BERT's."""
