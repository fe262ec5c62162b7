"""Features that a model was trained on, those at hand, and kinds that stand for one another: refused, accepted, or
accepted with a notice."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling import api, models
from visling import config as configs
from visling.checkpoints import catalog
from visling.errors import CheckpointError
from visling.feature_kinds import KINDS, NEAR, describe_kind
from visling.pretrained import convert as conversion
from visling.pretrained.features import check_features, measure_features
from visling.pretrained.folder import ModelFolder, read_model_folder
from visling.recipes.tables import FINETUNING
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runs import finetune as finetuning
from visling.types import RegionArray
from visling.vision.detectors import find_detector


@pytest.fixture
def store_of(tmp_path: Path) -> Callable[..., NativeStore]:
    """A store of one image whose features are of a kind, or have a fingerprint."""

    def write(fingerprint: str, **settings: str) -> NativeStore:
        path = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        with StoreWriter(path, feature_size=8, fingerprint=fingerprint, settings=settings) as writer:
            writer.add("one", RegionArray(features=np.ones((1, 8)), boxes=np.array([[0, 0, 5, 5]]), size=(9, 9)))
        return NativeStore.open(path)

    return write


@pytest.fixture
def released(recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFolder:
    """A small file under the name of one that was trained on bottom-up-36, converted."""
    source = recorded("lxmert")
    monkeypatch.setitem(conversion.models.spec("lxmert").presets, "base", source.config)
    conversion.convert(source.save(tmp_path / "model_LXRT.pth"), tmp_path / "model")
    return read_model_folder(tmp_path / "model")


@pytest.mark.parametrize("whitens", [True, False])
def test_a_sample_is_read_only_where_something_is_measured(
    store_of: Callable[..., NativeStore], monkeypatch: pytest.MonkeyPatch, whitens: bool
) -> None:
    store, tiny = store_of("x"), models.spec("lxmert").presets["tiny"]
    encoder = models.build("lxmert", dataclasses.replace(tiny, feature_size=8, whiten_features=whitens))
    samples: list[int] = []
    read = NativeStore.__getitem__

    def noting(self: NativeStore, image_id: str) -> RegionArray:
        samples.append(len(read(self, image_id)))
        return read(self, image_id)

    monkeypatch.setattr(NativeStore, "__getitem__", noting)
    assert measure_features(encoder, store, ["one"]) is encoder
    assert samples == ([1] if whitens else [])


def test_every_name_of_a_kind_is_known() -> None:
    used = {entry.features for entry in (*catalog.RELEASED_FILES, *catalog.FEATURES)} - {""}
    used |= {kind for detector in catalog.DETECTORS for kind in detector.kinds.values()}
    assert used <= KINDS.keys()
    assert {name for pair in NEAR for name in pair} <= KINDS.keys()
    assert all(KINDS[needed].width == KINDS[found].width for needed, found in NEAR)
    for release in catalog.RELEASED_FILES:
        width = conversion.models.spec(release.family).presets[release.preset].feature_size
        assert not release.features or KINDS[release.features].width == width, release.name


def test_a_released_model_accepts_its_kind_whatever_file_it_came_from(
    released: ModelFolder, store_of: Callable[..., NativeStore]
) -> None:
    assert (released.features, released.fingerprint) == ("bottom-up-36", "")
    assert store_of("bottom-up-36").kind == "bottom-up-36"
    assert check_features(released, store_of("bottom-up-36"), override=False) == ""
    assert check_features(released, store_of("lxmert-obj36"), override=False) == "", "an earlier version's"
    assert check_features(released, store_of("a-hash", features="bottom-up-36"), override=False) == ""


@pytest.mark.parametrize("kind", ["vg-frcnn-36", "vg-frcnn-36-caffe"])
def test_a_kind_that_comes_near_is_accepted_with_a_notice(
    released: ModelFolder, store_of: Callable[..., NativeStore], kind: str
) -> None:
    notice = check_features(released, store_of("a-hash", features=kind), override=False)
    assert notice.startswith(f"the regions are {describe_kind(kind)}, which comes near bottom-up-36")
    assert NEAR["bottom-up-36", kind] in notice
    assert check_features(released, store_of("a-hash", features=kind), override=True) == ""


@pytest.mark.parametrize(
    ("fingerprint", "settings", "message"),
    [
        ("bottom-up-10-100", {}, r"these are bottom-up-10-100 \(bottom-up attention.*10 to 100 regions"),
        ("a-hash", {"features": "resnext-152-100"}, r"these are resnext-152-100"),
        ("0123456789abcdef", {}, r"these \(0123456789ab\) are of a detector that is not known to compute them"),
    ],
)
def test_another_kind_is_refused_with_the_reason(
    released: ModelFolder,
    store_of: Callable[..., NativeStore],
    fingerprint: str,
    settings: dict[str, str],
    message: str,
) -> None:
    store = store_of(fingerprint, **settings)
    with pytest.raises(CheckpointError, match=rf"kind bottom-up-36 .*{message}.*vg-frcnn.*--other-features"):
        check_features(released, store, override=False)
    assert check_features(released, store, override=True) == ""


def test_a_store_of_another_kind_does_not_vouch_for_a_release(
    recorded: Any, tmp_path: Path, store_of: Callable[..., NativeStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = recorded("lxmert")
    monkeypatch.setitem(conversion.models.spec("lxmert").presets, "base", source.config)
    file = source.save(tmp_path / "model_LXRT.pth")
    with pytest.raises(CheckpointError, match=r"resnext-152-100.*but model_LXRT was trained on bottom-up-36"):
        conversion.convert(file, tmp_path / "model", features=store_of("resnext-152-100").path)
    conversion.convert(file, tmp_path / "model", features=store_of("mine", features="vg-frcnn-36").path)
    saved = read_model_folder(tmp_path / "model")
    assert (saved.fingerprint, saved.features) == ("mine", "bottom-up-36")


def name_kind(folder: Path, kind: str) -> Path:
    """State the kind of a detector's features in its folder."""
    file = find_detector(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "features": kind}))
    return folder


def test_training_records_the_kind_and_prediction_compares_it(world: Any, tmp_path: Path) -> None:
    regions = shutil.copytree(world.regions, tmp_path / "regions")
    manifest = json.loads((regions / "manifest.json").read_text())
    manifest["settings"]["features"] = "bottom-up-36"
    (regions / "manifest.json").write_text(json.dumps(manifest))
    config = configs.override(FINETUNING["visualbert-vqa-scenes"](), world.settings)
    finetuning.finetune(config, tmp_path / "vqa", data=world.scenes, store=regions, init=world.pretrained, device="cpu")
    saved = read_model_folder(tmp_path / "vqa")
    assert (saved.features, saved.fingerprint) == ("bottom-up-36", NativeStore.open(regions).fingerprint)
    assert api.load(tmp_path / "vqa", device="cpu").notice == "", "its own detector, by the fingerprint"
    other = shutil.copytree(world.other_detector, tmp_path / "other")
    with pytest.raises(CheckpointError, match="are of a detector that is not known to compute them"):
        api.load(tmp_path / "vqa", detector=other, device="cpu")
    near = api.load(tmp_path / "vqa", detector=name_kind(other, "vg-frcnn-36-caffe"), device="cpu")
    assert "comes near bottom-up-36" in near.notice
    with pytest.raises(CheckpointError, match="these are resnext-152-100"):
        api.load(tmp_path / "vqa", detector=name_kind(other, "resnext-152-100"), device="cpu")


def test_training_on_a_near_kind_says_so_in_the_log(world: Any, tmp_path: Path) -> None:
    saved = read_model_folder(world.pretrained)
    start = shutil.copytree(saved.path, tmp_path / "start")
    content = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**content, "fingerprint": "", "features": "bottom-up-36"}))
    regions = shutil.copytree(world.regions, tmp_path / "regions")
    manifest = json.loads((regions / "manifest.json").read_text())
    manifest["settings"]["features"] = "vg-frcnn-36"
    (regions / "manifest.json").write_text(json.dumps(manifest))
    config = configs.override(FINETUNING["visualbert-vqa-scenes"](), world.settings)
    finetuning.finetune(config, tmp_path / "vqa", data=world.scenes, store=regions, init=start, device="cpu")
    assert "the regions are vg-frcnn-36" in (tmp_path / "vqa" / "log.jsonl").read_text()
    assert read_model_folder(tmp_path / "vqa").features == "vg-frcnn-36"
    with pytest.raises(CheckpointError, match="not known to compute them"):
        finetuning.finetune(config, tmp_path / "no", data=world.scenes, store=world.regions, init=start, device="cpu")
