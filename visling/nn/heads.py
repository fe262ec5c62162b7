"""Heads: a task names a kind, a model family names the style, `build` joins the two, `read` applies the head.

Letters  B rows, N = B/G examples, G rows per example, P slots, R regions, V vocabulary, A outputs, Dt Dr Dp widths.

kind            call                                                -> logits
classify        head(pooled (B, Dp))                                -> (B, A)
score           head(pooled (B, Dp))                                -> (N, G)
pair            head(pooled (B, Dp))                                -> (N, A): the G pooled vectors of an example joined
vocabulary      head(states at slots (B, P, Dt))                    -> (B, P, V)
slots_regions   head(states at slots, regions (B, R, Dr), mask)     -> (B, P, R): no finite probability on padded regions
regions         head(candidates (B, R[+1], Dr))                     -> (B, R[+1]): not masked; the whole image, where a family has it, is last
region_targets  head(states of regions (B, Q, Dr))                  -> {name: (B, Q, width)}; names and widths are `Head.options`
projection      head(states (B, N, Dr))                             -> (B, N, A): an embedding of each state, to be compared with others
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
from visling.nn.layers import initialise
from visling.nn.pooling import gather
from visling.types import Batch, Dims, Encoded, Head, HeadKind


def build(head: Head, dims: Dims, *, style: str, words: nn.Embedding | None = None, group: int = 1) -> nn.Module:
    """A head of the given kind in a family's style, freshly initialised.

    Args:
        words: the encoder's word table, for kinds that are tied to it.
        group: G, for kinds that see several rows per example.
    Raises:
        ConfigError: no such style for this kind, or the kind lacks what it needs.
    """
    styles = STYLES.get(head.kind, {})
    if style not in styles:
        raise ConfigError(f"no {head.kind} head in style {style!r}. {nearest(style, styles)}")
    module = styles[style](head, dims, words, group)
    module.apply(initialise)
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
    return logits


def _select_inputs(kind: HeadKind, encoded: Encoded, batch: Batch, at: Tensor | None) -> tuple[Tensor, ...]:
    if kind in ("vocabulary", "slots_regions"):
        if kind == "slots_regions" and at is None and batch.phrases is not None:
            at = batch.phrases.at
        states = encoded.text if at is None else gather(encoded.text, at)
        return (states,) if kind == "vocabulary" else (states, encoded.regions, _mask_regions(encoded, batch))
    if kind == "regions" and encoded.whole is not None:
        return (torch.cat([encoded.regions, encoded.whole[:, None]], dim=1),)
    return (encoded.regions if kind in ("regions", "region_targets", "projection") else encoded.pooled,)


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


Builder = Callable[[Head, Dims, nn.Embedding | None, int], nn.Module]


def _linear_classify(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return Classifier(dims.pooled, head.outputs, DROPOUT_RATE)


def _plain_classify(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return Classifier(dims.pooled, head.outputs, 0.0)


def _linear_score(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    if head.outputs != 1:
        raise ConfigError(
            f"a score head gives one number per row; found outputs = {head.outputs}. Use kind classify for more."
        )
    return Scorer(dims.pooled, group, DROPOUT_RATE)


def _linear_pair(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return JoinedClassifier(dims.pooled, head.outputs, group, DROPOUT_RATE)


def _bert_vocabulary(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    if words is None:
        raise ConfigError("a vocabulary head is tied to the word table: pass words=encoder.word_embeddings.")
    return BertVocabulary(dims.text, words)


def _flickr_slots_regions(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return FlickrAttention(dims.text, dims.regions, head.options.get("head_size", HEAD_SIZE))


def _vlbert_classify(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return TransformClassifier(dims.pooled, head.outputs, DROPOUT_RATE)


def _vlbert_regions(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return RegionScorer(dims.regions)


def _vlbert_region_targets(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return RegionTargets(dims.regions, head.options, norm=False)


def _gelu_norm_classify(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return NormedClassifier(dims.pooled, head.options.get("hidden_size", 2 * dims.pooled), head.outputs)


def _gelu_norm_pair(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return NormedClassifier(dims.pooled, head.options.get("hidden_size", 2 * dims.pooled), head.outputs, group)


def _vilbert_classify(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return NormedClassifier(
        dims.pooled, head.options.get("hidden_size", 2 * dims.pooled), head.outputs, dropout_rate=DROPOUT_RATE
    )


def _vilbert_pair(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return NormedClassifier(
        dims.pooled, head.options.get("hidden_size", 2 * dims.pooled), head.outputs, group, DROPOUT_RATE
    )


def _weight_norm_classify(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return WeightNormClassifier(dims.pooled, 2 * dims.pooled, head.outputs, DROPOUT_RATE, WEIGHT_NORM_DROPOUT_RATE)


def _match_first_classify(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    if head.outputs != 2:
        raise ConfigError(
            f"style match_first tells a fitting text from another: outputs must be 2; found {head.outputs}. Use style linear for more."
        )
    return MatchFirst(dims.pooled, DROPOUT_RATE)


def _linear_regions(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return LinearRegionScorer(dims.regions, DROPOUT_RATE)


def _deep_regions(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return DeepRegionScorer(dims.regions, DROPOUT_RATE)


def _bert_region_targets(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return RegionTargets(dims.regions, head.options, norm=True)


def _cvlp_projection(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return Projection(dims.regions, head.outputs)


STYLES: Mapping[str, Mapping[str, Builder]] = {
    "classify": {
        "linear": _linear_classify,
        "plain": _plain_classify,
        "vlbert": _vlbert_classify,
        "gelu_norm": _gelu_norm_classify,
        "vilbert": _vilbert_classify,
        "weight_norm": _weight_norm_classify,
        "match_first": _match_first_classify,
    },
    "score": {"linear": _linear_score},
    "pair": {"linear": _linear_pair, "gelu_norm": _gelu_norm_pair, "vilbert": _vilbert_pair},
    "vocabulary": {"bert": _bert_vocabulary},
    "slots_regions": {"flickr": _flickr_slots_regions},
    "regions": {"vlbert": _vlbert_regions, "linear": _linear_regions, "deep": _deep_regions},
    "region_targets": {"vlbert": _vlbert_region_targets, "bert": _bert_region_targets},
    "projection": {"cvlp": _cvlp_projection},
}
"""Kind -> style -> builder. A new style is one function and one entry."""
