"""What stands before any layer: the vectors of a word piece, summed, and region features as a projection reads them.

Letters  B rows, T tokens, D width; N rows of features, F their width; S region rows, R regions, K packed ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visling.boxes import locate
from visling.errors import ConfigError
from visling.nn.packing import Packing, count_with_one_more
from visling.types import Regions, Text


class TextEmbeddings(nn.Module):
    """Word, absolute position and segment tables. The norm and dropout that follow belong to the model: some first add
    visual vectors.

    Args:
        freeze_first_rows: row 0 of each table (padding, the first position, the first segment) receives no gradient
            from look-ups, as in a release that builds its tables with padding_idx=0. The word table may still learn as
            output matrix.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_positions: int,
        num_segments: int,
        hidden_size: int,
        freeze_first_rows: bool = False,
    ) -> None:
        super().__init__()
        frozen_row = 0 if freeze_first_rows else None
        self.words = nn.Embedding(vocab_size, hidden_size, padding_idx=frozen_row)
        self.positions = nn.Embedding(max_positions, hidden_size, padding_idx=frozen_row)
        self.segments = nn.Embedding(num_segments, hidden_size, padding_idx=frozen_row)

    def forward(self, ids: Tensor, segments: Tensor) -> Tensor:
        """Sum of the three vectors of each token, (B, T, D), from ids and segments (B, T).

        Raises:
            ConfigError: a row is longer than the position table.
        """
        length, longest = ids.shape[1], self.positions.num_embeddings
        if length > longest:
            raise ConfigError(
                f"a text row has {length} tokens, but the position table holds {longest}. "
                "Lower max_tokens or raise max_positions."
            )
        positions = self.positions.weight[:length]
        if self.positions.padding_idx is not None:
            positions = torch.cat([positions[:1].detach(), positions[1:]])
        summed: Tensor = self.words(ids) + positions + self.segments(segments)
        return summed


class RegionFeatures(nn.Module):
    """Region features as a projection reads them: of the model's width and precision, whitened if `whiten`."""

    def __init__(self, feature_size: int, *, whiten: bool) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.whiten = Whitening(feature_size) if whiten else None

    def fit(self, features: Tensor) -> None:
        """Measure the statistics of a sample (N, F), if features are whitened."""
        if self.whiten is not None:
            self.whiten.fit(features)

    def forward(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., F) of any floating type -> (..., F) of `dtype`.

        Raises:
            ConfigError: the features are of another width than the model's.
        """
        if features.shape[-1] != self.feature_size:
            raise ConfigError(
                f"region features are {features.shape[-1]} wide; this model reads {self.feature_size}. "
                "Set feature_size to the width of the features."
            )
        features = features.to(dtype)
        return features if self.whiten is None else self.whiten(features)


def with_whole_image(regions: Regions, read: RegionFeatures, dtype: torch.dtype) -> tuple[Tensor, Tensor, Packing]:
    """Packed features (K, F) and locations (K, 5) of the regions and, behind those of each row, of the whole image; and
    their rows (S, R + 1).

    The feature of the whole image is `regions.whole` or, without it, the mean of the real regions, zeros where there is
    none.

    Source:
        ViLBERT, both releases (`_image_features_reader.py`), where it stands before the regions.
    """
    real = Packing.of(regions.mask, regions.count)
    features = real.unpack(read(real.pack(regions.features), dtype))  # (S, R, F)
    whole = _mean(features, regions.mask) if regions.whole is None else read(regions.whole, dtype)
    box = F.pad(regions.boxes.new_zeros(len(whole), 1, 2), (0, 2), value=1.0)  # corners 0, 0, 1, 1
    mask = F.pad(regions.mask, (0, 1), value=True)
    rows = Packing.of(mask, count_with_one_more(regions.count, len(mask)))
    features = rows.pack(torch.cat([features, whole[:, None]], dim=1))
    return features, locate(rows.pack(torch.cat([regions.boxes, box], dim=1))).to(dtype), rows


def without_regions(text: Text, feature_size: int, like: Tensor) -> Regions:
    """Images without any region, one for each row of a batch that has text only; on the device of `like`."""
    rows = len(text.ids if text.row is None else text.row)
    return Regions(
        features=like.new_zeros(rows, 0, feature_size),
        boxes=like.new_zeros(rows, 0, 4),
        mask=like.new_zeros(rows, 0, dtype=torch.bool),
        size=like.new_ones(rows, 2),
        count=None if text.count is None else 0,
    )


def _mean(features: Tensor, mask: Tensor) -> Tensor:
    """Mean (S, F) of the real features (S, R, F); zeros where there is none."""
    return features.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Whitening(nn.Module):
    """Features with their mean subtracted, rotated and scaled so that their directions are uncorrelated and of equal
    variance; the identity until `fit`.

    A small detector spreads its features over a few wide directions and leaves colours and textures in narrow ones,
    where a projection finds them late (docs/log.md). Mean and matrix are buffers: measured once, saved with the
    weights, never trained.
    """

    FLOOR = 1e-3
    """Variance, as a share of that of the widest direction, that is added to all: narrower directions are noise and
    stay narrow."""

    ALIKE = 1e-12
    """Variance of the widest direction, as a share of the features' mean square, up to which rows count as equal."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, feature_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_size))
        self.register_buffer("matrix", torch.eye(feature_size))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Measure the statistics of a sample (N, F); fewer than two rows change nothing, and rows that are all alike
        change the mean alone: there is no direction to scale."""
        if len(features) < 2:
            return
        sample = features.to(torch.float64)
        self.mean.copy_(sample.mean(0))
        variances, directions = torch.linalg.eigh(torch.cov(sample.T))
        widest = variances[-1]
        if widest <= self.ALIKE * sample.square().mean():
            return
        self.matrix.copy_(directions / (variances.clamp(min=0) + self.FLOOR * widest).sqrt())

    def forward(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., F)."""
        return (features - self.mean) @ self.matrix
