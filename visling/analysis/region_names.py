"""What a region is called: its confident attributes and its class, in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visling.types import RegionArray

ATTRIBUTE_CONFIDENCE, MOST_ATTRIBUTES = 0.3, 3
"""Least confidence of an attribute in a region's name, and most attributes in it."""


def name_regions(
    regions: RegionArray, *, class_names: Sequence[str] = (), attribute_names: Sequence[str] = ()
) -> list[str]:
    """Name of each region: its confident attributes and its class ("red star"), or its number from 1 where neither has
    a name."""
    return [_name_region(regions, number, class_names, attribute_names) for number in range(len(regions))]


def _name_region(regions: RegionArray, number: int, class_names: Sequence[str], attribute_names: Sequence[str]) -> str:
    parts: list[str] = []
    if regions.attributes is not None and attribute_names:
        ids = np.atleast_1d(regions.attributes[number])
        confidence = regions.attribute_confidence
        sure = np.ones(len(ids)) if confidence is None else np.atleast_1d(confidence[number])
        named = [
            attribute_names[int(i)]
            for i, share in zip(ids, sure, strict=True)
            if 0 <= i < len(attribute_names) and share >= ATTRIBUTE_CONFIDENCE
        ]
        parts += named[:MOST_ATTRIBUTES]
    if regions.classes is not None and class_names:
        number_of_class = int(regions.classes[number])
        known = 0 <= number_of_class < len(class_names)
        parts.append(class_names[number_of_class] if known else f"class {number_of_class}")
    return " ".join(parts) or f"{number + 1}"
