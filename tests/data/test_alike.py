"""Images that look alike: equal to comparing every pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from visling.data import alike
from visling.data.alike import nearest_images
from visling.types import RegionArray


class Store:
    """Images of one to four regions."""

    feature_size, fingerprint = 3, "test"

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.features = {f"{n}": rng.normal(size=(n % 4 + 1, 3)).astype(np.float16) for n in range(count)}
        self.features["bare"] = np.zeros((0, 3), np.float16)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, image_id: str) -> RegionArray:
        features = self.features[image_id]
        return RegionArray(features=features, boxes=np.zeros((len(features), 4), np.float32), size=(1, 1))


@pytest.mark.parametrize("rows", [2, 1024])
def test_nearest_by_mean_feature(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "_ROWS", rows)
    store: Any = Store(9)
    images = list(store.features)
    means = {image: (f.astype(float).mean(0) if len(f) else np.zeros(3)) for image, f in store.features.items()}
    found = nearest_images(store, images, 4)
    assert found.keys() == set(images)
    for image, near in found.items():
        others = [other for other in images if other != image]
        expected = sorted(others, key=lambda other: float(((means[image] - means[other]) ** 2).sum()))
        assert list(near) == expected[:4]


def test_no_more_than_there_are() -> None:
    store: Any = Store(2)
    assert nearest_images(store, ["0", "1"], 5) == {"0": ("1",), "1": ("0",)}
