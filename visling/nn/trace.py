"""Hidden states and attention maps that a caller asked to capture."""

from __future__ import annotations

from torch import Tensor

from visling.types import Maps


class Trace:
    """Collects what a caller asked to capture; keeps nothing otherwise, so that states can be freed."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self._states: dict[str, Tensor] = {}
        self._probs: dict[str, Tensor] = {}

    def add(self, name: str, states: Tensor, probs: Tensor | None = None) -> None:
        """Note the output (B, N, D) and the attention (B, H, N, N) of a layer."""
        if self.on:
            self._states[name] = states
            if probs is not None:
                self._probs[name] = probs

    def states(self) -> dict[str, Tensor] | None:
        """Hidden states by layer name."""
        return self._states if self.on else None

    def joint_maps(self, num_tokens: int) -> Maps | None:
        """Attention of a single stream (text first, then regions), cut into four quadrants."""
        if not self.on:
            return None
        text, regions = slice(None, num_tokens), slice(num_tokens, None)

        def quadrant(from_: slice, to: slice) -> dict[str, Tensor]:
            return {name: probs[:, :, from_, to] for name, probs in self._probs.items()}

        return Maps(
            text_to_text=quadrant(text, text),
            text_to_regions=quadrant(text, regions),
            regions_to_text=quadrant(regions, text),
            regions_to_regions=quadrant(regions, regions),
        )


class TwoStreamTrace:
    """Collects what a caller asked to capture in two streams; keeps nothing otherwise, so that states can be freed."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self._states: dict[str, Tensor] = {}
        self._maps: dict[str, dict[str, Tensor]] = {
            name: {} for name in ("text_to_text", "text_to_regions", "regions_to_text", "regions_to_regions")
        }

    def state(self, name: str, states: Tensor) -> None:
        """Note the output (B, N, D) of a layer in one stream."""
        if self.on:
            self._states[name] = states

    def map(self, quadrant: str, name: str, probs: Tensor | None) -> None:
        """Note the attention (B, H, from, to) of a layer; `quadrant` is a field of `Maps`."""
        if self.on and probs is not None:
            self._maps[quadrant][name] = probs

    def states(self) -> dict[str, Tensor] | None:
        """Hidden states by name."""
        return self._states if self.on else None

    def maps(self) -> Maps | None:
        """Attention by quadrant and layer."""
        return Maps(**self._maps) if self.on else None
