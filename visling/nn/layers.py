"""The post-norm Transformer layer of BERT: attention block, feed-forward block (Devlin et al. 2019; Vaswani et al.
2017, section 3).

Letters  B rows, M query positions, N key positions, D width of the stream, H heads.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from visling.nn.attention import Attention


class AttentionBlock(nn.Module):
    """Attention, output projection, dropout, residual, norm."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        context_size: int | None = None,
        attention_size: int | None = None,
        dropout_rate: float,
        attention_dropout_rate: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        attention_size = attention_size or hidden_size
        self.attention = Attention(
            query_size=hidden_size,
            context_size=context_size or hidden_size,
            attention_size=attention_size,
            num_heads=num_heads,
            dropout_rate=attention_dropout_rate,
        )
        self.output = nn.Linear(attention_size, hidden_size)
        self.dropout = nn.Dropout(dropout_rate)
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, *, capture: bool = False) -> tuple[Tensor, Tensor | None]:
        """New states of `x` (B, M, D) after reading `y` (B, N, .) where `mask` (B, N) holds; probabilities (B, H, M, N)
        if captured."""
        context, probs = self.attention(x, y, mask, capture=capture)
        return self.norm(x + self.dropout(self.output(context))), probs


class FeedForwardBlock(nn.Module):
    """Linear up, GELU (exact, by erf), linear down, dropout, residual, norm."""

    def __init__(self, hidden_size: int, *, intermediate_size: int, dropout_rate: float, norm_eps: float) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout_rate)
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """New states, (B, M, D)."""
        output: Tensor = self.norm(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return output


class TransformerLayer(nn.Module):
    """Self-attention block, then feed-forward block."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        intermediate_size: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.self_attention = AttentionBlock(
            hidden_size,
            num_heads=num_heads,
            dropout_rate=dropout_rate,
            attention_dropout_rate=attention_dropout_rate,
            norm_eps=norm_eps,
        )
        self.feed_forward = FeedForwardBlock(
            hidden_size, intermediate_size=intermediate_size, dropout_rate=dropout_rate, norm_eps=norm_eps
        )

    def forward(self, states: Tensor, mask: Tensor, *, capture: bool = False) -> tuple[Tensor, Tensor | None]:
        """New states (B, N, D) and, if captured, the attention probabilities (B, H, N, N)."""
        states, probs = self.self_attention(states, states, mask, capture=capture)
        return self.feed_forward(states), probs


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
