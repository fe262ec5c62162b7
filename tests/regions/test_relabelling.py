"""Label noise: which regions get other labels, how many, and that nothing else about them changes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from fixtures.region_stores import F, assert_same, regions, write

from visling.errors import StoreError
from visling.regions.relabelling import replace_labels
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.types import RegionArray

CLASSES = tuple("abcdefgh")
"""Eight, and the background, which the class distributions of the store have as their ninth column."""
ATTRIBUTES = tuple("wxyz")


def write_named(path: Path, images: int = 12, count: int = 50) -> NativeStore:
    """A store whose classes are the most probable ones, with attributes of which none is listed twice."""
    with StoreWriter(
        path,
        feature_size=F,
        fingerprint="det-1",
        class_names=CLASSES,
        attribute_names=ATTRIBUTES,
        settings={"precision": "fp32"},
    ) as writer:
        for number in range(images):
            found = regions(number, count, details=True)
            assert found.probs is not None
            rng = np.random.default_rng(number)
            classes = found.probs[:, : len(CLASSES)].argmax(1).astype(np.int16)
            attributes = np.stack([rng.permutation(4)[:3] for _ in range(count)]).astype(np.int16)
            attributes[0] = -1
            writer.add(f"image {number}", replace(found, classes=classes, attributes=attributes))
    return NativeStore.open(path)


def _keep_rows(found: RegionArray, kept: np.ndarray) -> RegionArray:
    arrays = {field.name: getattr(found, field.name) for field in fields(found) if field.name != "size"}
    return replace(found, **{name: array[kept] for name, array in arrays.items()})


def _find_changed(before: NativeStore, after: NativeStore) -> dict[str, np.ndarray]:
    return {name: before[name].classes != after[name].classes for name in before.ids}


def test_a_share_of_the_labels_is_replaced_and_all_else_stays(tmp_path: Path) -> None:
    store = write_named(tmp_path / "clean")
    noisy = replace_labels(store, 0.4, tmp_path / "noisy")
    changed = _find_changed(store, noisy)
    rate = np.concatenate(list(changed.values())).mean()
    assert abs(rate - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 600)
    assert noisy.fingerprint == store.fingerprint
    assert noisy.settings == {"precision": "fp32", "label_noise": 0.4, "label_noise_seed": 0}
    for name in store.ids:
        before, after = store[name], noisy[name]
        labels = {"classes": before.classes, "attributes": before.attributes, "probs": before.probs}
        assert_same(replace(after, **labels), before)
        assert_same(_keep_rows(after, ~changed[name]), _keep_rows(before, ~changed[name]))


def test_class_distribution_and_attribute_follow(tmp_path: Path) -> None:
    store = write_named(tmp_path / "clean")
    noisy = replace_labels(store, 1.0, tmp_path / "noisy")
    drawn = np.zeros(len(CLASSES), int)
    for name in store.ids:
        before, after = store[name], noisy[name]
        assert (after.classes != before.classes).all()
        highest = after.probs[:, : len(CLASSES)].max(1)
        assert np.array_equal(after.probs[np.arange(len(after)), after.classes], highest)
        assert np.array_equal(np.sort(after.probs, 1), np.sort(before.probs, 1))
        assert np.array_equal(after.probs[:, -1], before.probs[:, -1]), "the background keeps its probability"
        assert (after.attributes[0] == -1).all(), "a region without attributes stays without"
        assert (after.attributes[1:, 0] != before.attributes[1:, 0]).all()
        assert np.isin(after.attributes[1:], range(len(ATTRIBUTES))).all()
        assert all(len(set(row)) == 3 for row in after.attributes[1:].tolist())
        drawn += np.bincount((after.classes - before.classes) % len(CLASSES), minlength=len(CLASSES))
    # 600 regions, seven other classes: each is drawn 86 times, with a standard deviation of 8.6
    assert drawn[0] == 0
    assert (np.abs(drawn[1:] - 600 / 7) < 4 * 8.6).all(), drawn


def test_what_is_replaced_depends_on_seed_and_image_alone(tmp_path: Path) -> None:
    store = write_named(tmp_path / "clean")
    few, more = (replace_labels(store, share, tmp_path / str(share)) for share in (0.2, 0.4))
    one = replace_labels(write_named(tmp_path / "single", images=1), 0.4, tmp_path / "one")
    assert_same(one["image 0"], more["image 0"])
    assert len({tuple(changed) for changed in _find_changed(store, more).values()}) == len(store)
    for name, changed in _find_changed(store, few).items():
        assert (more[name].classes[changed] == few[name].classes[changed]).all(), (
            "a larger share replaces these and more"
        )
    again, other = (replace_labels(store, 0.4, tmp_path / f"seed {seed}", seed=seed) for seed in (0, 1))
    assert [file.read_bytes() for file in sorted(again.path.glob("shard-*"))] == [
        file.read_bytes() for file in sorted(more.path.glob("shard-*"))
    ]
    assert any((other[name].classes != more[name].classes).any() for name in store.ids)


def test_an_interrupted_copy_resumes_and_settings_must_be_the_same(tmp_path: Path) -> None:
    store = write_named(tmp_path / "clean")

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_labels(store, 0.4, tmp_path / "noisy", progress=stop)
    with pytest.raises(StoreError, match=r"made with label_noise 0\.4, this run has 0\.2"):
        replace_labels(store, 0.2, tmp_path / "noisy", resume=True)
    resumed = replace_labels(store, 0.4, tmp_path / "noisy", resume=True)
    whole = replace_labels(store, 0.4, tmp_path / "whole")
    for file in whole.path.iterdir():
        assert file.read_bytes() == (resumed.path / file.name).read_bytes()


def test_labels_that_cannot_be_replaced_are_refused(tmp_path: Path) -> None:
    store = write_named(tmp_path / "clean", images=1)
    for share in (-0.1, 1.5):
        with pytest.raises(StoreError, match=f"from 0 to 1; found {share}"):
            replace_labels(store, share, tmp_path / "noisy")
    with pytest.raises(StoreError, match="holds no classes of regions"):
        replace_labels(write(tmp_path / "plain"), 0.4, tmp_path / "noisy")
    with pytest.raises(StoreError, match="names 0 of them"):
        replace_labels(write(tmp_path / "nameless", details=True), 0.4, tmp_path / "noisy")
    assert not (tmp_path / "noisy").exists()


def test_one_attribute_per_region_may_stand_alone(tmp_path: Path) -> None:
    """(R,) in place of (R, 1)."""
    store = write_named(tmp_path / "store")
    flat = StoreWriter(
        tmp_path / "flat",
        feature_size=store.feature_size,
        fingerprint=store.fingerprint,
        class_names=store.class_names,
        attribute_names=store.attribute_names,
    )
    with flat as writer:
        for image_id in store.ids:
            regions = store[image_id]
            assert regions.attributes is not None
            writer.add(image_id, replace(regions, attributes=regions.attributes[:, 0]))
    changed = replace_labels(NativeStore.open(tmp_path / "flat"), 1.0, tmp_path / "noisy")
    for image_id in store.ids:
        before, after = store[image_id].attributes, changed[image_id].attributes
        assert before is not None
        assert after is not None
        assert (after[1:].reshape(-1) != before[1:, 0]).all()
