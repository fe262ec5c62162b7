"""Hidden states and attention maps that a caller asked to capture.

Letters  B rows, S rows before they are shared out to the batch, N positions, T tokens, R regions, K packed positions
         (Kt, Kr: tokens, regions), H heads, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from visling.nn.packing import Packing
from visling.types import Maps

Stream = Literal["joint", "text", "regions"]
"""What a layer runs over: text and regions in one sequence, or one of the two."""


class Trace:
    """Collects what a caller asked to capture; keeps nothing otherwise, so that states can be freed.

    A model hands `at(name)` to each layer, and the layer reports its states and attention there.

    Args:
        on: whether anything is captured.
        num_tokens: T, length of the text in joint sequences, whose attention is cut there into four quadrants.
    """

    def __init__(self, on: bool, *, num_tokens: int = 0) -> None:
        self._on = on
        self._num_tokens = num_tokens
        self._states: dict[str, Tensor] = {}
        self._maps = Maps(text_to_text={}, text_to_regions={}, regions_to_text={}, regions_to_regions={})
        self._attention: dict[str, Tensor] = {}

    def at(self, name: str, stream: Stream = "joint", row: Tensor | None = None) -> LayerTrace | None:
        """Where the layer of this name reports; None if nothing is captured.

        Args:
            row: (B,) int64: row of the layer for each row of the batch; None = one to one.
        """
        return LayerTrace(self, name, stream, row) if self._on else None

    def add_states(self, name: str, states: Tensor, rows: Packing, row: Tensor | None = None) -> Tensor:
        """Keep packed states (K, D), laid out as (S, N, D), under a name; `row` as in `at`.

        Returns:
            The states to go on with: what is computed from them also has a gradient with respect to those that are
            kept, where rows share nothing.
        """
        if not self._on:
            return states
        padded = rows.unpack_real(states)
        self._states[name] = _share(padded, row)
        return rows.pack(padded)

    def add_maps(self, name: str, stream: Stream, probs: Tensor, row: Tensor | None = None) -> None:
        """Keep the self-attention (S, H, N, N) of a layer."""
        if not self._on:
            return
        probs = _share(probs, row)
        self._attention[f"{name}/{stream}"] = probs
        if stream == "text":
            self._maps.text_to_text[name] = probs
        elif stream == "regions":
            self._maps.regions_to_regions[name] = probs
        else:
            text, regions = slice(None, self._num_tokens), slice(self._num_tokens, None)
            self._maps.text_to_text[name] = probs[:, :, text, text]
            self._maps.text_to_regions[name] = probs[:, :, text, regions]
            self._maps.regions_to_text[name] = probs[:, :, regions, text]
            self._maps.regions_to_regions[name] = probs[:, :, regions, regions]

    def add_cross_maps(self, name: str, text_to_regions: Tensor, regions_to_text: Tensor) -> None:
        """Keep the attention of two streams to one another, (B, H, T, R) and (B, H, R, T)."""
        if self._on:
            self._attention[f"{name}/text_to_regions"] = text_to_regions
            self._attention[f"{name}/regions_to_text"] = regions_to_text
            self._maps.text_to_regions[name] = text_to_regions
            self._maps.regions_to_text[name] = regions_to_text

    def states(self) -> dict[str, Tensor] | None:
        """Hidden states by layer name; None if nothing is captured."""
        return self._states if self._on else None

    def maps(self) -> Maps | None:
        """Attention by quadrant and layer name; None if nothing is captured."""
        return self._maps if self._on else None

    def attention(self) -> dict[str, Tensor] | None:
        """Attention as it was computed, see `Encoded.attention`; None if nothing is captured."""
        return self._attention if self._on else None


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """Where one layer reports."""

    trace: Trace
    name: str
    stream: Stream
    row: Tensor | None

    def add(self, states: Tensor, rows: Packing, probs: Tensor | None) -> None:
        """The output (K, D), packed, and the self-attention (S, H, N, N) of a layer of one stream."""
        self.trace.add_states(self.name, states, rows, self.row)
        if probs is not None:
            self.trace.add_maps(self.name, self.stream, probs, self.row)

    def add_streams(self, text: Tensor, regions: Tensor, text_rows: Packing, region_rows: Packing) -> None:
        """The outputs of a layer of two streams, packed: (Kt, Dt) and (Kr, Dr)."""
        self.trace.add_states(f"{self.name}.text", text, text_rows)
        self.trace.add_states(f"{self.name}.regions", regions, region_rows)

    def add_cross_attention(self, text: Tensor | None, regions: Tensor | None, *, part: str = "") -> None:
        """Its attention from text to regions (B, H, T, R) and back (B, H, R, T); `part` follows the layer's name."""
        assert text is not None
        assert regions is not None
        self.trace.add_cross_maps(f"{self.name}{part}", text, regions)

    def add_self_attention(self, text: Tensor | None, regions: Tensor | None, *, part: str = "") -> None:
        """Its attention within text (B, H, T, T) and within regions (B, H, R, R)."""
        assert text is not None
        assert regions is not None
        self.trace.add_maps(f"{self.name}{part}", "text", text)
        self.trace.add_maps(f"{self.name}{part}", "regions", regions)


def _share(states: Tensor, row: Tensor | None) -> Tensor:
    """Rows (S, ...) of the batch, (B, ...)."""
    return states if row is None else states[row]
