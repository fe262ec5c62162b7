"""Heads: a task names a kind, a model family names the style, `build` joins the two.

Letters  B rows, N = B/G examples, G rows per example, P slots, R regions, V vocabulary, A outputs, Dt Dr Dp widths.

kind            call                                                -> logits
classify        head(pooled (B, Dp))                                -> (B, A)
score           head(pooled (B, Dp))                                -> (N, G)
pair            head(pooled (B, Dp))                                -> (N, A): the G pooled vectors of an example joined
vocabulary      head(states at slots (B, P, Dt))                    -> (B, P, V)
slots_regions   head(states at slots, regions (B, R, Dr), mask)     -> (B, P, R): no finite probability on padded regions
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visling.errors import ConfigError, nearest
from visling.nn.layers import initialise
from visling.types import Dims, Head

DROPOUT_RATE = 0.1
"""Before the linear classifiers of the VisualBERT release."""
NORM_EPS = 1e-12
"""Of the norm inside BERT's vocabulary head."""
HEAD_SIZE = 64
"""Width of the VisualBERT release's phrase-to-region attention (hidden size 768 over 12 heads); another one by `options["head_size"]`."""


class Classifier(nn.Module):
    """A linear layer, after dropout if the rate is not zero."""

    def __init__(self, size: int, outputs: int, dropout_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = nn.Linear(size, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, Dp) -> (B, A)."""
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits


class Scorer(nn.Module):
    """One number per row, the rows of an example side by side."""

    def __init__(self, size: int, group: int, dropout_rate: float) -> None:
        super().__init__()
        self.group = group
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = nn.Linear(size, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, Dp) -> (N, G)."""
        scores: Tensor = self.linear(self.dropout(pooled))
        return scores.view(-1, self.group)


class JoinedClassifier(nn.Module):
    """A linear layer over the joined rows of an example."""

    def __init__(self, size: int, outputs: int, group: int, dropout_rate: float) -> None:
        super().__init__()
        self.group = group
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = nn.Linear(size * group, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, Dp) -> (N, A)."""
        logits: Tensor = self.linear(self.dropout(pooled.reshape(-1, self.group * pooled.shape[-1])))
        return logits


class BertVocabulary(nn.Module):
    """BERT's word prediction: linear, GELU, norm, then the word table itself as output matrix, with a bias of its own."""

    def __init__(self, size: int, words: nn.Embedding) -> None:
        super().__init__()
        self.dense = nn.Linear(size, words.embedding_dim)
        self.norm = nn.LayerNorm(words.embedding_dim, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        self._words = (words,)  # in a tuple, so that the table stays the encoder's: one owner, one entry in files and optimisers

    def forward(self, states: Tensor) -> Tensor:
        """(B, P, Dt) -> (B, P, V)."""
        return F.linear(self.norm(F.gelu(self.dense(states))), self._words[0].weight, self.bias)


class FlickrAttention(nn.Module):
    """Scaled dot products of one head between phrase states and region states.

    Source: VisualBERT release, `flickr_attention`: one head of 64 although the paper speaks of several; its value projection is never used.
    """

    def __init__(self, text_size: int, region_size: int, head_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(text_size, head_size)
        self.key = nn.Linear(region_size, head_size)

    def forward(self, states: Tensor, regions: Tensor, mask: Tensor) -> Tensor:
        """(B, P, Dt), (B, R, Dr) and (B, R) bool -> (B, P, R); the lowest finite number at padded regions."""
        query, key = self.query(states), self.key(regions)
        scores: Tensor = (query @ key.transpose(1, 2)) * query.shape[-1] ** -0.5
        return scores.masked_fill(~mask[:, None, :], torch.finfo(scores.dtype).min)


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


Builder = Callable[[Head, Dims, nn.Embedding | None, int], nn.Module]


def _linear_classify(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return Classifier(dims.pooled, head.outputs, DROPOUT_RATE)


def _plain_classify(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return Classifier(dims.pooled, head.outputs, 0.0)


def _linear_score(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    if head.outputs != 1:
        raise ConfigError(f"a score head gives one number per row; found outputs = {head.outputs}. Use kind classify for more.")
    return Scorer(dims.pooled, group, DROPOUT_RATE)


def _linear_pair(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return JoinedClassifier(dims.pooled, head.outputs, group, DROPOUT_RATE)


def _bert_vocabulary(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    if words is None:
        raise ConfigError("a vocabulary head is tied to the word table: pass words=encoder.word_embeddings.")
    return BertVocabulary(dims.text, words)


def _flickr_slots_regions(head: Head, dims: Dims, words: nn.Embedding | None, group: int) -> nn.Module:
    return FlickrAttention(dims.text, dims.regions, head.options.get("head_size", HEAD_SIZE))


STYLES: Mapping[str, Mapping[str, Builder]] = {
    "classify": {"linear": _linear_classify, "plain": _plain_classify},
    "score": {"linear": _linear_score},
    "pair": {"linear": _linear_pair},
    "vocabulary": {"bert": _bert_vocabulary},
    "slots_regions": {"flickr": _flickr_slots_regions},
}
"""Kind -> style -> builder. A new style is one function and one entry."""
