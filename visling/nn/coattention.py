"""The layers in which a text stream and a region stream meet.

Letters  B rows, T tokens, R regions, H heads, D width of both streams, or Dt and Dr, A attention width.
Masks    (B, T) and (B, R) boolean, True = real.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from visling.nn.layers import AttentionBlock, FeedForwardBlock, LayerSizes
from visling.nn.trace import LayerTrace


class CoAttentionLayer(nn.Module):
    """ViLBERT's connection: text attends to regions while regions attend to text, then a feed-forward block in each
    stream.

    Both directions read the states that enter the layer, and there is no self-attention in it. Each direction has its
    own projections.

    Args:
        text: numbers of the text stream; its heads are not used.
        regions: numbers of the region stream; its heads are not used.
        attention_size: A, of both directions.
        num_heads: H, of both directions.
    """

    def __init__(self, text: LayerSizes, regions: LayerSizes, *, attention_size: int, num_heads: int) -> None:
        super().__init__()
        self.text_attention = AttentionBlock(
            dataclasses.replace(text, num_heads=num_heads),
            context_size=regions.hidden_size,
            attention_size=attention_size,
        )
        self.region_attention = AttentionBlock(
            dataclasses.replace(regions, num_heads=num_heads),
            context_size=text.hidden_size,
            attention_size=attention_size,
        )
        self.text_feed_forward = FeedForwardBlock(text)
        self.region_feed_forward = FeedForwardBlock(regions)

    def forward(
        self,
        text: Tensor,
        regions: Tensor,
        text_mask: Tensor,
        region_mask: Tensor,
        trace: LayerTrace | None = None,
    ) -> tuple[Tensor, Tensor]:
        """New text (B, T, Dt) and region states (B, R, Dr); states and attention are reported to `trace`."""
        capture = trace is not None
        informed_text, text_probs = self.text_attention(text, regions, region_mask, capture=capture)
        informed_regions, region_probs = self.region_attention(regions, text, text_mask, capture=capture)
        text, regions = self.text_feed_forward(informed_text), self.region_feed_forward(informed_regions)
        if trace is not None:
            trace.add_streams(text, regions)
            trace.add_cross_attention(text_probs, region_probs)
        return text, regions


class GatedLayer(nn.Module):
    """A Transformer layer over regions whose attention the text controls: the dynamic attention of ViLBERT's release,
    off in its known models.

    Queries and keys are scaled, channel by channel, by 1 + sigmoid(linear(mean text state)).
    """

    def __init__(self, text_size: int, sizes: LayerSizes) -> None:
        super().__init__()
        self.self_attention = AttentionBlock(sizes)
        self.feed_forward = FeedForwardBlock(sizes)
        self.query_gate = nn.Linear(text_size, sizes.hidden_size)
        self.key_gate = nn.Linear(text_size, sizes.hidden_size)

    def forward(
        self, regions: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor, trace: LayerTrace | None = None
    ) -> Tensor:
        """New region states (B, R, Dr); states and attention are reported to `trace`."""
        block, attention = self.self_attention, self.self_attention.attention
        shares = text_mask[..., None].to(text.dtype)
        mean = (text * shares).sum(1, keepdim=True) / shares.sum(1, keepdim=True)  # (B, 1, Dt)
        query = attention.query(regions) * (1 + torch.sigmoid(self.query_gate(mean)))
        key = attention.key(regions) * (1 + torch.sigmoid(self.key_gate(mean)))
        context, probs = attention.mix(query, key, attention.value(regions), mask, capture=trace is not None)
        states: Tensor = self.feed_forward(block.norm(regions + block.dropout(block.output(context))))
        if trace is not None:
            trace.add(states, probs)
        return states


class CrossModalityLayer(nn.Module):
    """LXMERT's layer: each stream reads the other, then itself, then goes through a feed-forward block of its own.

    One cross-attention block serves both directions, each from the states that entered the layer.
    Source: LXMERT section 2.2; release `LXRTXLayer`, which shares the weights although the paper draws two blocks.
    """

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.cross_attention = AttentionBlock(sizes)
        self.text_self_attention, self.region_self_attention = AttentionBlock(sizes), AttentionBlock(sizes)
        self.text_feed_forward, self.region_feed_forward = FeedForwardBlock(sizes), FeedForwardBlock(sizes)

    def forward(
        self,
        text: Tensor,
        regions: Tensor,
        text_mask: Tensor,
        region_mask: Tensor,
        trace: LayerTrace | None = None,
    ) -> tuple[Tensor, Tensor]:
        """New text (B, T, D) and region states (B, R, D); states and attention are reported to `trace`, as parts .cross
        and .self."""
        capture = trace is not None
        text_cross, to_regions = self.cross_attention(text, regions, region_mask, capture=capture)
        regions_cross, to_text = self.cross_attention(regions, text, text_mask, capture=capture)
        text_self, within_text = self.text_self_attention(text_cross, text_cross, text_mask, capture=capture)
        regions_self, within_regions = self.region_self_attention(
            regions_cross, regions_cross, region_mask, capture=capture
        )
        text, regions = self.text_feed_forward(text_self), self.region_feed_forward(regions_self)
        if trace is not None:
            trace.add_streams(text, regions)
            trace.add_cross_attention(to_regions, to_text, part=".cross")
            trace.add_self_attention(within_text, within_regions, part=".self")
        return text, regions
