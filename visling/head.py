"""A contract without tensors: what a task or an objective asks of a model's head. `types` offers it with the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

HeadKind = Literal[
    "classify", "score", "pair", "regions", "slots_regions", "vocabulary", "region_targets", "projection"
]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a task asks of `nn.heads.build`; the model names the style."""

    kind: HeadKind
    outputs: int
    options: Mapping[str, Any] = field(default_factory=dict)
