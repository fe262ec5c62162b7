"""The layers in which a text stream and a region stream meet, and what a caller may capture in them.

Letters  B rows, T tokens, R regions, H heads, Dt and Dr widths of the two streams, A attention width.
Masks    (B, T) and (B, R) boolean, True = real.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visling.nn.attention import probabilities
from visling.nn.layers import AttentionBlock, FeedForwardBlock


class CoAttentionLayer(nn.Module):
    """ViLBERT's connection: text attends to regions while regions attend to text, then a feed-forward block in each
    stream.

    Both directions read the states that enter the layer, and there is no self-attention in it. Each direction has its
    own projections.
    """

    def __init__(
        self,
        text_size: int,
        region_size: int,
        *,
        attention_size: int,
        num_heads: int,
        text_intermediate_size: int,
        region_intermediate_size: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        norm_eps: float,
    ) -> None:
        super().__init__()

        def reader(size: int, context_size: int) -> AttentionBlock:
            return AttentionBlock(
                size,
                num_heads=num_heads,
                context_size=context_size,
                attention_size=attention_size,
                dropout_rate=dropout_rate,
                attention_dropout_rate=attention_dropout_rate,
                norm_eps=norm_eps,
            )

        self.text_attention = reader(text_size, region_size)
        self.region_attention = reader(region_size, text_size)
        self.text_feed_forward = FeedForwardBlock(
            text_size, intermediate_size=text_intermediate_size, dropout_rate=dropout_rate, norm_eps=norm_eps
        )
        self.region_feed_forward = FeedForwardBlock(
            region_size, intermediate_size=region_intermediate_size, dropout_rate=dropout_rate, norm_eps=norm_eps
        )

    def forward(
        self, text: Tensor, regions: Tensor, text_mask: Tensor, region_mask: Tensor, *, capture: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """New text (B, T, Dt) and region states (B, R, Dr); if captured, probabilities text to regions (B, H, T, R) and
        back (B, H, R, T)."""
        informed_text, text_probs = self.text_attention(text, regions, region_mask, capture=capture)
        informed_regions, region_probs = self.region_attention(regions, text, text_mask, capture=capture)
        return (
            self.text_feed_forward(informed_text),
            self.region_feed_forward(informed_regions),
            text_probs,
            region_probs,
        )


class GatedLayer(nn.Module):
    """A Transformer layer over regions whose attention the text steers: the dynamic attention of ViLBERT's release, off
    in its known models.

    Queries and keys are scaled, channel by channel, by 1 + sigmoid(linear(mean text state)).
    """

    def __init__(
        self,
        text_size: int,
        region_size: int,
        *,
        num_heads: int,
        intermediate_size: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.self_attention = AttentionBlock(
            region_size,
            num_heads=num_heads,
            dropout_rate=dropout_rate,
            attention_dropout_rate=attention_dropout_rate,
            norm_eps=norm_eps,
        )
        self.feed_forward = FeedForwardBlock(
            region_size, intermediate_size=intermediate_size, dropout_rate=dropout_rate, norm_eps=norm_eps
        )
        self.query_gate = nn.Linear(text_size, region_size)
        self.key_gate = nn.Linear(text_size, region_size)

    def forward(
        self, regions: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor, *, capture: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """New region states (B, R, Dr) and, if captured, the attention probabilities (B, H, R, R)."""
        attention = self.self_attention.attention
        shares = text_mask[..., None].to(text.dtype)
        mean = (text * shares).sum(1, keepdim=True) / shares.sum(1, keepdim=True)  # (B, 1, Dt)

        def split(states: Tensor) -> Tensor:
            return states.view(*states.shape[:2], attention.num_heads, -1).transpose(1, 2)  # (B, H, R, Dr / H)

        query = split(attention.query(regions) * (1 + torch.sigmoid(self.query_gate(mean))))
        key = split(attention.key(regions) * (1 + torch.sigmoid(self.key_gate(mean))))
        value = split(attention.value(regions))
        dropout_rate = attention.dropout_rate if self.training else 0.0
        keys_mask = mask[:, None, None, :]
        probs = None
        if capture:
            probs = probabilities(query, key, keys_mask)
            context = F.dropout(probs, dropout_rate) @ value
        else:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=keys_mask, dropout_p=dropout_rate)
        context = context.transpose(1, 2).flatten(2)
        states = self.self_attention.norm(regions + self.self_attention.dropout(self.self_attention.output(context)))
        return self.feed_forward(states), probs


class CrossModalityStates(NamedTuple):
    """What a `CrossModalityLayer` returns; attention probabilities are None unless captured."""

    text: Tensor
    """(B, T, D)."""
    regions: Tensor
    """(B, R, D)."""
    text_to_text: Tensor | None
    """(B, H, T, T)."""
    text_to_regions: Tensor | None
    """(B, H, T, R)."""
    regions_to_text: Tensor | None
    """(B, H, R, T)."""
    regions_to_regions: Tensor | None
    """(B, H, R, R)."""


class CrossModalityLayer(nn.Module):
    """LXMERT's layer: each stream reads the other, then itself, then goes through a feed-forward block of its own.

    One cross-attention block serves both directions, each from the states that entered the layer.
    Source: LXMERT section 2.2; release `LXRTXLayer`, which shares the weights although the paper draws two blocks.
    """

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
        attention = partial(
            AttentionBlock,
            hidden_size,
            num_heads=num_heads,
            dropout_rate=dropout_rate,
            attention_dropout_rate=attention_dropout_rate,
            norm_eps=norm_eps,
        )
        feed_forward = partial(
            FeedForwardBlock,
            hidden_size,
            intermediate_size=intermediate_size,
            dropout_rate=dropout_rate,
            norm_eps=norm_eps,
        )
        self.cross_attention = attention()
        self.text_self_attention, self.region_self_attention = attention(), attention()
        self.text_feed_forward, self.region_feed_forward = feed_forward(), feed_forward()

    def forward(
        self, text: Tensor, regions: Tensor, text_mask: Tensor, region_mask: Tensor, *, capture: bool = False
    ) -> CrossModalityStates:
        """New states of both streams from text (B, T, D) and regions (B, R, D), with masks (B, T) and (B, R)."""
        text_cross, text_to_regions = self.cross_attention(text, regions, region_mask, capture=capture)
        regions_cross, regions_to_text = self.cross_attention(regions, text, text_mask, capture=capture)
        text_self, text_to_text = self.text_self_attention(text_cross, text_cross, text_mask, capture=capture)
        regions_self, regions_to_regions = self.region_self_attention(
            regions_cross, regions_cross, region_mask, capture=capture
        )
        return CrossModalityStates(
            text=self.text_feed_forward(text_self),
            regions=self.region_feed_forward(regions_self),
            text_to_text=text_to_text,
            text_to_regions=text_to_regions,
            regions_to_text=regions_to_text,
            regions_to_regions=regions_to_regions,
        )
