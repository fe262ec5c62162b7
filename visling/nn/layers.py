"""The post-norm Transformer layer of BERT: attention block, feed-forward block (Devlin et al. 2019; Vaswani et al.
2017, section 3).

Letters  B rows, M query positions, N key positions, D width of the stream, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from visling.nn.attention import Attention
from visling.nn.trace import LayerTrace


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
        self.dropout = nn.Dropout(sizes.dropout_rate)
        self.norm = nn.LayerNorm(sizes.hidden_size, eps=sizes.norm_eps)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, *, capture: bool = False) -> tuple[Tensor, Tensor | None]:
        """New states of `x` (B, M, D) after reading `y` (B, N, .) where `mask` (B, N) holds; probabilities (B, H, M, N)
        if captured."""
        context, probs = self.attention(x, y, mask, capture=capture)
        return self.norm(x + self.dropout(self.output(context))), probs


class FeedForwardBlock(nn.Module):
    """Linear up, GELU (exact, by erf), linear down, dropout, residual, norm."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.down = nn.Linear(sizes.intermediate_size, sizes.hidden_size)
        self.dropout = nn.Dropout(sizes.dropout_rate)
        self.norm = nn.LayerNorm(sizes.hidden_size, eps=sizes.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """New states, (B, M, D)."""
        output: Tensor = self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return output


class TransformerLayer(nn.Module):
    """Self-attention block, then feed-forward block."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.self_attention = AttentionBlock(sizes)
        self.feed_forward = FeedForwardBlock(sizes)

    def forward(self, states: Tensor, mask: Tensor, trace: LayerTrace | None = None) -> Tensor:
        """New states (B, N, D); states and attention are reported to `trace`."""
        attended, probs = self.self_attention(states, states, mask, capture=trace is not None)
        states = self.feed_forward(attended)
        if trace is not None:
            trace.add(states, probs)
        return states


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
