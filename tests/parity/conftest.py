"""What all parity tests share: how close is close enough on a folder of recorded values that is not ours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

OURS = Path(__file__).parents[1] / "golden"


def stated(config: str) -> list[float]:
    """Absolute tolerance of states and tolerance of losses that a set's config.json states in words, in this order;
    empty if it states none."""
    for name, told in _named(json.loads(config)):
        if name.endswith("tolerance") and isinstance(told, str):
            return [float(number) for number in re.findall(r"\d+(?:\.\d+)?e-\d+", told)][:2]
    return []


def _named(described: object) -> list[tuple[str, object]]:
    """Every entry of nested objects, by its name."""
    if not isinstance(described, dict):
        return []
    return [entry for name, value in described.items() for entry in ((name, value), *_named(value))]


@pytest.fixture(autouse=True)
def _stated_tolerance(request: pytest.FixtureRequest, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another folder a set is compared as closely as it asks for, where that is less than what holds for ours."""
    if golden.samefile(OURS):
        return
    config = golden / request.path.stem.removeprefix("test_") / "config.json"
    limits = stated(config.read_text()) if config.exists() else []
    for name, limit in zip(("CLOSE", "LOSSES"), limits, strict=False):
        ours = getattr(request.module, name, None)
        if ours is not None:
            monkeypatch.setitem(ours, "atol", max(ours["atol"], limit))
