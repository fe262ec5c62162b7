"""What a word piece is before any layer: word, position and segment vectors, summed.

Letters  B rows, T tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from visling.errors import ConfigError


class TextEmbeddings(nn.Module):
    """Word, absolute position and segment tables. The norm and dropout that follow belong to the model: some add visual vectors first."""

    def __init__(self, *, vocab_size: int, max_positions: int, num_segments: int, hidden_size: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(max_positions, hidden_size)
        self.segments = nn.Embedding(num_segments, hidden_size)

    def forward(self, ids: Tensor, segments: Tensor) -> Tensor:
        """Sum of the three vectors of each token, (B, T, D), from ids and segments (B, T).

        Raises:
            ConfigError: a row is longer than the position table.
        """
        length, longest = ids.shape[1], self.positions.num_embeddings
        if length > longest:
            raise ConfigError(f"a text row has {length} tokens, but the position table holds {longest}. Lower max_tokens or raise max_positions.")
        summed: Tensor = self.words(ids) + self.positions.weight[:length] + self.segments(segments)
        return summed
