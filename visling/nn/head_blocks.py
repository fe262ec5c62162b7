"""The modules of which heads are built; `heads` says which of them a kind and a style stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visling.errors import ConfigError
from visling.nn.pooling import put_back, take
from visling.types import Slots

DROPOUT_RATE = 0.1
"""Before the linear classifiers of the VisualBERT release."""

NORM_EPS = 1e-12
"""Of the norm inside BERT's vocabulary head."""

WEIGHT_NORM_DROPOUT_RATE = 0.5
"""Between the two layers of the first ViLBERT release's classifier."""

HEAD_SIZE = 64
"""Width of the VisualBERT release's phrase-to-region attention (hidden size 768 over 12 heads); another one by
`options["head_size"]`."""


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
    """One number per row; an example may have any number of rows.

    Raises:
        ConfigError: more than one output per row.
    """

    def __init__(self, size: int, outputs: int, dropout_rate: float) -> None:
        super().__init__()
        if outputs != 1:
            raise ConfigError(
                f"a score head gives one number per row; found outputs = {outputs}. Use kind classify for more."
            )
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = nn.Linear(size, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, Dp) -> (B,)."""
        scores: Tensor = self.linear(self.dropout(pooled))
        return scores.squeeze(-1)


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
    """BERT's word prediction: linear, GELU, norm, then the word table itself as output matrix, with a bias of its own.

    Raises:
        ConfigError: no word table.
    """

    def __init__(self, size: int, words: nn.Embedding | None) -> None:
        super().__init__()
        if words is None:
            raise ConfigError("a vocabulary head is tied to the word table: pass words=encoder.word_embeddings.")
        self.dense = nn.Linear(size, words.embedding_dim)
        self.norm = nn.LayerNorm(words.embedding_dim, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        # In a tuple, so that the table stays the encoder's: one owner, one entry in files and optimisers
        self._words = (words,)

    def forward(self, states: Tensor) -> Tensor:
        """(B, P, Dt) -> (B, P, V)."""
        return F.linear(self.norm(F.gelu(self.dense(states))), self._words[0].weight, self.bias)


class FlickrAttention(nn.Module):
    """Scaled dot products of one head between phrase states and region states.

    Source: VisualBERT release, `flickr_attention`: one head of 64 although the paper speaks of several; its value
    projection is never used.
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


class Transform(nn.Module):
    """What BERT does to states before a prediction: linear, GELU and, in most heads, a norm."""

    def __init__(self, size: int, *, norm: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size, eps=NORM_EPS) if norm else None

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        states = F.gelu(self.dense(states))
        return states if self.norm is None else self.norm(states)


class TransformClassifier(nn.Module):
    """Transform with norm, dropout, linear layer (VL-BERT release, VQA: `CLASSIFIER_TYPE: mlm`)."""

    def __init__(self, size: int, outputs: int, dropout_rate: float) -> None:
        super().__init__()
        self.transform = Transform(size, norm=True)
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = nn.Linear(size, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, Dp) -> (B, A)."""
        logits: Tensor = self.linear(self.dropout(self.transform(pooled)))
        return logits

    @torch.no_grad()
    def start_from_words(self, words: nn.Embedding, pieces: Sequence[Sequence[int]]) -> None:
        """Set the output weights of each answer to the mean vector of its word pieces (VL-BERT release,
        `answer_vocab_file`).

        Args:
            words: a table as wide as the pooled state.
            pieces: (A) lists of piece ids; the row of an empty one becomes zero.
        """
        assert len(pieces) == self.linear.out_features, f"{len(pieces)} answers for {self.linear.out_features} outputs"
        for row, ids in zip(self.linear.weight, pieces, strict=True):
            row.copy_(words.weight[list(ids)].sum(0) / max(len(ids), 1))


class NormedClassifier(nn.Module):
    """Dropout if the rate is not zero, linear, GELU, norm, linear, over the joined rows of an example.

    Source: LXMERT release, `BertVisualAnswerHead` and `logit_fc` of its tasks; multi-task ViLBERT and VOLTA,
    `SimpleClassifier`, with dropout.
    """

    def __init__(self, size: int, hidden_size: int, outputs: int, group: int = 1, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.group = group
        self.dropout = nn.Dropout(dropout_rate)
        self.dense = nn.Linear(size * group, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.linear = nn.Linear(hidden_size, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, Dp) -> (N, A)."""
        joined = self.dropout(pooled).reshape(-1, self.group * pooled.shape[-1])
        logits: Tensor = self.linear(self.norm(F.gelu(self.dense(joined))))
        return logits

    @torch.no_grad()
    def start_from(self, trained: NormedClassifier, rows: Sequence[int | None]) -> None:
        """Take over a classifier of the same width and, for each answer, the output that stands for the same answer
        there (LXMERT release).

        Args:
            trained: a head over the answers of pre-training.
            rows: (A) its output for each answer of this head; None = it has none, and this head starts from zeros
                there.
        Raises:
            ConfigError: another width, or not one row per output.
        """
        sizes, theirs = self.dense.weight.shape, trained.dense.weight.shape
        if sizes != theirs or len(rows) != self.linear.out_features:
            raise ConfigError(
                f"an answer head of width {tuple(sizes)} with {self.linear.out_features} outputs cannot start from "
                f"one of width {tuple(theirs)} with {len(rows)} rows. Build both for one encoder and give one row "
                "(or None) per answer."
            )
        self.dense.load_state_dict(trained.dense.state_dict())
        self.norm.load_state_dict(trained.norm.state_dict())
        for number, row in enumerate(rows):
            self.linear.weight[number] = 0.0 if row is None else trained.linear.weight[row]
            self.linear.bias[number] = 0.0 if row is None else trained.linear.bias[row]


class Projection(nn.Module):
    """Linear to twice the width, GELU, norm, linear, at every position (CVLP release, `visual_embed_head`)."""

    def __init__(self, size: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(size, 2 * size)
        self.norm = nn.LayerNorm(2 * size, eps=NORM_EPS)
        self.linear = nn.Linear(2 * size, outputs)

    def forward(self, states: Tensor) -> Tensor:
        """(B, N, Dr) -> (B, N, A)."""
        embeddings: Tensor = self.linear(self.norm(F.gelu(self.dense(states))))
        return embeddings


class RegionScorer(nn.Module):
    """One number per region: transform without norm, linear layer (VL-BERT release, RefCOCO+)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.transform = Transform(size, norm=False)
        self.linear = nn.Linear(size, 1)

    def forward(self, candidates: Tensor) -> Tensor:
        """(B, R, Dr) -> (B, R)."""
        scores: Tensor = self.linear(self.transform(candidates))
        return scores.squeeze(-1)


class RegionTargets(nn.Module):
    """What hidden regions were: one transform, then a linear layer per name."""

    def __init__(self, size: int, widths: Mapping[str, int], *, norm: bool) -> None:
        super().__init__()
        self.transform = Transform(size, norm=norm)
        self.outputs = nn.ModuleDict({name: nn.Linear(size, width) for name, width in widths.items()})

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        """(..., Dr) -> name -> (..., width)."""
        states = self.transform(states)
        return {name: output(states) for name, output in self.outputs.items()}

    def at_slots(self, states: Tensor, slots: Mapping[str, Slots]) -> dict[str, Tensor]:
        """(B, R, Dr) and slots by name -> name -> (B, Q, width), zeros at free slots."""
        each = {id(own): own for own in slots.values()}
        transformed = {key: self.transform(take(states, own)[0]) for key, own in each.items()}
        return {
            name: put_back(output(transformed[id(slots[name])]), slots[name]) for name, output in self.outputs.items()
        }


class GainedLinear(nn.Module):
    """A linear layer whose matrix is a direction and one gain: gain * direction / |direction|."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # The release's normal initialisation misses matrices in this form: they stay as PyTorch makes them, only the
        # bias becomes 0.
        self.direction = nn.Parameter(nn.Linear(inputs, outputs, bias=False).weight.detach())
        self.gain = nn.Parameter(self.direction.detach().norm())
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, states: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(states, self.direction * (self.gain / self.direction.norm()), self.bias)


class WeightNormClassifier(nn.Module):
    """Dropout, linear, ReLU, much dropout, linear; both matrices weight-normalised (first ViLBERT release,
    `SimpleClassifier`)."""

    def __init__(
        self, size: int, hidden_size: int, outputs: int, dropout_rate: float, inner_dropout_rate: float
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate)
        self.dense = GainedLinear(size, hidden_size)
        self.inner_dropout = nn.Dropout(inner_dropout_rate)
        self.output = GainedLinear(hidden_size, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, Dp) -> (B, A)."""
        logits: Tensor = self.output(self.inner_dropout(F.relu(self.dense(self.dropout(pooled)))))
        return logits


class MatchFirst(nn.Module):
    """Dropout, linear, and the two logits swapped: class 0 means "fits" in ViLBERT's release and in VOLTA, class 1 here
    and everywhere else.

    Raises:
        ConfigError: not two outputs.
    """

    def __init__(self, size: int, outputs: int, dropout_rate: float) -> None:
        super().__init__()
        if outputs != 2:
            raise ConfigError(
                "style match_first says whether a text fits an image: "
                f"outputs must be 2; found {outputs}. Use style linear for more."
            )
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = nn.Linear(size, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, Dp) -> (B, 2)."""
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits.flip(-1)


class LinearRegionScorer(nn.Module):
    """One number per region: dropout, linear (ViLBERT release, `vision_logit`; VOLTA)."""

    def __init__(self, size: int, dropout_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate)
        self.linear = nn.Linear(size, 1)

    def forward(self, candidates: Tensor) -> Tensor:
        """(B, R, Dr) -> (B, R)."""
        scores: Tensor = self.linear(self.dropout(candidates))
        return scores.squeeze(-1)


class DeepRegionScorer(nn.Module):
    """One number per region: dropout, linear, GELU, dropout, linear (VOLTA, tasks with `num_clf_layers` 2)."""

    def __init__(self, size: int, dropout_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate)
        self.dense = nn.Linear(size, size)
        self.output = nn.Linear(size, 1)

    def forward(self, candidates: Tensor) -> Tensor:
        """(B, R, Dr) -> (B, R)."""
        scores: Tensor = self.output(self.dropout(F.gelu(self.dense(self.dropout(candidates)))))
        return scores.squeeze(-1)
