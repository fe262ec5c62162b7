"""The post-norm Transformer layer of BERT: attention block, feed-forward block (Devlin et al. 2019; Vaswani et al.
2017, section 3).

States are packed (`nn.packing`): padding is never computed. The last layer of a model can be given the positions that
are read after it; it then computes no others.

Letters  B rows, M query positions, N key positions, K packed positions, Kx and Ky of two sequences, D width of the
         stream, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from visling.nn.attention import Attention
from visling.nn.dropout import Dropout, add_dropped
from visling.nn.gelu import linear_of_gelu
from visling.nn.packing import Packing, Reading
from visling.nn.trace import LayerTrace, Trace


class LayerSettings(Protocol):
    """A family's config, as far as the layers of one stream read it."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def dropout_rate(self) -> float: ...
    @property
    def attention_dropout_rate(self) -> float: ...
    @property
    def norm_eps(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """The numbers of a Transformer layer."""

    hidden_size: int
    """D."""
    num_heads: int
    """H."""
    intermediate_size: int
    """Width inside the feed-forward block."""
    dropout_rate: float
    """After each block."""
    attention_dropout_rate: float
    """On attention probabilities."""
    norm_eps: float
    """Of the layer norms."""

    @classmethod
    def of(cls, config: LayerSettings) -> LayerSizes:
        """The numbers that a config has under these names."""
        return cls(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            dropout_rate=config.dropout_rate,
            attention_dropout_rate=config.attention_dropout_rate,
            norm_eps=config.norm_eps,
        )


class AttentionBlock(nn.Module):
    """Attention, output projection, dropout, residual, norm.

    Args:
        context_size: width of the states that are read; None = those of the stream itself.
        attention_size: width of queries, keys and values, all heads together; None = that of the stream.
    """

    def __init__(
        self, sizes: LayerSizes, *, context_size: int | None = None, attention_size: int | None = None
    ) -> None:
        super().__init__()
        attention_size = attention_size or sizes.hidden_size
        self.attention = Attention(
            query_size=sizes.hidden_size,
            context_size=context_size or sizes.hidden_size,
            attention_size=attention_size,
            num_heads=sizes.num_heads,
            dropout_rate=sizes.attention_dropout_rate,
        )
        self.output = nn.Linear(attention_size, sizes.hidden_size)
        self.dropout = Dropout(sizes.dropout_rate)
        self.norm = nn.LayerNorm(sizes.hidden_size, eps=sizes.norm_eps)

    def forward(
        self, x: Tensor, y: Tensor, x_rows: Packing, y_rows: Packing, *, capture: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """New states of `x` (Kx, D) after reading `y` (Ky, .); probabilities (B, H, M, N) if captured."""
        context, probs = self.attention(x, y, x_rows, y_rows, capture=capture)
        return self.add(x, context), probs

    def attend_within(
        self, states: Tensor, rows: Packing, read: Reading | None = None, *, capture: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention: new states of the positions that are read (all unless `read` is given)."""
        read = rows.read_all() if read is None else read
        attended: tuple[Tensor, Tensor | None] = self(read.take(states), states, read.rows, rows, capture=capture)
        return attended

    def add(self, x: Tensor, context: Tensor) -> Tensor:
        """What follows attention: output projection of the context (Kx, A), dropout, residual, norm."""
        states: Tensor = self.norm(add_dropped(x, self.output(context), self.dropout.p, training=self.training))
        return states


class FeedForwardBlock(nn.Module):
    """Linear up, GELU (exact, by erf), linear down, dropout, residual, norm."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.down = nn.Linear(sizes.intermediate_size, sizes.hidden_size)
        self.dropout = Dropout(sizes.dropout_rate)
        self.norm = nn.LayerNorm(sizes.hidden_size, eps=sizes.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """New states, (K, D)."""
        states = linear_of_gelu(self.up(x), self.down.weight, self.down.bias)
        output: Tensor = self.norm(add_dropped(x, states, self.dropout.p, training=self.training))
        return output


class TransformerLayer(nn.Module):
    """Self-attention block, then feed-forward block."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.self_attention = AttentionBlock(sizes)
        self.feed_forward = FeedForwardBlock(sizes)

    def forward(
        self, states: Tensor, rows: Packing, trace: LayerTrace | None = None, *, read: Reading | None = None
    ) -> Tensor:
        """New states (K, D), or only those that are read; states and attention are reported to `trace`."""
        attended, probs = self.self_attention.attend_within(states, rows, read, capture=trace is not None)
        states = self.feed_forward(attended)
        if trace is not None:
            trace.add(states, rows, probs)
        return states


def through_layers(
    layers: Iterable[nn.Module], states: Tensor, rows: Packing, trace: Trace, *, read: Reading | None = None
) -> Tensor:
    """Packed states (K, D) after all layers, or only those that are read; they report as layers.0, layers.1, ..."""
    every = list(layers)
    for number, layer in enumerate(every):
        here = trace.at(f"layers.{number}")
        states = layer(states, rows, here, read=read) if number == len(every) - 1 else layer(states, rows, here)
    return states if every or read is None else read.take(states)


def initialise_xavier(module: nn.Module) -> None:
    """Xavier's uniform initialisation of a linear layer, bias 0; of any other module that of BERT. For
    `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        initialise(module)


def initialise(module: nn.Module, *, std: float = 0.02) -> None:
    """BERT's initialisation of one module: matrices and tables N(0, std), biases 0, norms 1 and 0. For
    `nn.Module.apply`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
