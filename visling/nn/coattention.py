"""The layers in which a text stream and a region stream meet.

Letters  B rows, T tokens, R regions, Kt and Kr packed ones, H heads, D width of both streams, or Dt and Dr, A attention
         width.
Rows     States of both streams are packed (`nn.packing`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from visling.nn.layers import AttentionBlock, FeedForwardBlock, LayerSizes
from visling.nn.packing import Packing, Reading
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
        text_rows: Packing,
        region_rows: Packing,
        trace: LayerTrace | None = None,
    ) -> tuple[Tensor, Tensor]:
        """New text (Kt, Dt) and region states (Kr, Dr); states and attention are reported to `trace`."""
        capture = trace is not None
        informed_text, text_probs = self.text_attention(text, regions, text_rows, region_rows, capture=capture)
        informed_regions, region_probs = self.region_attention(regions, text, region_rows, text_rows, capture=capture)
        text, regions = self.text_feed_forward(informed_text), self.region_feed_forward(informed_regions)
        if trace is not None:
            trace.add_streams(text, regions, text_rows, region_rows)
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
        self,
        regions: Tensor,
        rows: Packing,
        text: Tensor,
        text_rows: Packing,
        trace: LayerTrace | None = None,
        *,
        read: Reading | None = None,
    ) -> Tensor:
        """New region states (Kr, Dr), or only those that are read; states and attention are reported to `trace`."""
        block, attention = self.self_attention, self.self_attention.attention
        read = rows.read_all() if read is None else read
        queries = read.take(regions)
        real = text_rows.mask[..., None]
        mean = text_rows.unpack(text).masked_fill(~real, 0.0).sum(1) / real.sum(1)  # (B, Dt)
        query_gate, key_gate = (1 + torch.sigmoid(gate(mean)) for gate in (self.query_gate, self.key_gate))
        context, probs = attention.mix(
            attention.query(queries) * query_gate[read.rows.row],
            attention.key(regions) * key_gate[rows.row],
            attention.value(regions),
            read.rows,
            rows,
            capture=trace is not None,
        )
        states: Tensor = self.feed_forward(block.add(queries, context))
        if trace is not None:
            trace.add(states, rows, probs)
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
        text_rows: Packing,
        region_rows: Packing,
        trace: LayerTrace | None = None,
    ) -> tuple[Tensor, Tensor]:
        """New text (Kt, D) and region states (Kr, D); states and attention are reported to `trace`, as parts .cross and
        .self."""
        capture = trace is not None
        text_cross, to_regions = self.cross_attention(text, regions, text_rows, region_rows, capture=capture)
        regions_cross, to_text = self.cross_attention(regions, text, region_rows, text_rows, capture=capture)
        text_self, within_text = self.text_self_attention.attend_within(text_cross, text_rows, capture=capture)
        regions_self, within_regions = self.region_self_attention.attend_within(
            regions_cross, region_rows, capture=capture
        )
        text, regions = self.text_feed_forward(text_self), self.region_feed_forward(regions_self)
        if trace is not None:
            trace.add_streams(text, regions, text_rows, region_rows)
            trace.add_cross_attention(to_regions, to_text, part=".cross")
            trace.add_self_attention(within_text, within_regions, part=".self")
        return text, regions

    def read(
        self,
        text: Tensor,
        regions: Tensor,
        text_rows: Packing,
        region_rows: Packing,
        read_text: Reading,
        read_regions: Reading,
    ) -> tuple[Tensor, Tensor]:
        """New states of the positions that are read, of a last layer: a stream of which nothing is read is not
        computed."""
        return (
            self._read(
                text, regions, text_rows, region_rows, read_text, self.text_self_attention, self.text_feed_forward
            ),
            self._read(
                regions,
                text,
                region_rows,
                text_rows,
                read_regions,
                self.region_self_attention,
                self.region_feed_forward,
            ),
        )

    def _read(
        self,
        x: Tensor,
        y: Tensor,
        x_rows: Packing,
        y_rows: Packing,
        read: Reading,
        self_attention: AttentionBlock,
        feed_forward: FeedForwardBlock,
    ) -> Tensor:
        if len(read.rows.at) == 0:
            return x[:0]
        crossed, _ = self.cross_attention(x, y, x_rows, y_rows)
        attended, _ = self_attention.attend_within(crossed, x_rows, read)
        states: Tensor = feed_forward(attended)
        return states
