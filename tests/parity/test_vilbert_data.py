"""What ViLBERT's code makes of region features before its model reads them (`data.*` in `golden/vilbert`; its
config.json describes every tensor): masking, the whole image, locations, overlaps.

Counts and sizes come from the recorded tensors. `data.refer.train_target` belongs to a task and is not compared here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn

from visling import boxes, models
from visling.data.batches.collate import Collator
from visling.data.batches.masking import RegionMasking
from visling.data.batches.region_targets import Shown, hide_regions, whole_image
from visling.data.text import TextLayout, Tokenizer
from visling.draws import as_draws
from visling.models.vilbert import Vilbert
from visling.recipes.vilbert import MULTITASK_REGION_MASKING
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.runtime import generator_for
from visling.types import Example, RegionArray

CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
MASKING = MULTITASK_REGION_MASKING

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Recording:
    """Recorded tensors about data, `data.` taken off their names."""

    inputs: Arrays
    outputs: Arrays


@pytest.fixture
def recording(golden: Path) -> Recording:
    both = (load_file(golden / "vilbert" / f"{name}.safetensors") for name in ("inputs", "outputs"))
    inputs, outputs = (
        {name.removeprefix("data."): array for name, array in found.items() if name.startswith("data.")}
        for found in both
    )
    return Recording(inputs, outputs)


class Script:
    """A generator of prescribed numbers."""

    def __init__(self, draws: list[float]) -> None:
        self.draws = draws

    def random(self, count: int) -> NDArray[np.float64]:
        taken, self.draws = self.draws[:count], self.draws[count:]
        assert len(taken) == count, "more numbers are drawn than were recorded"
        return np.array(taken)


def compare_masking(recording: Recording, masking: RegionMasking = MASKING, **changes: NDArray[Any]) -> None:
    inputs, outputs = {**recording.inputs, **changes}, recording.outputs
    corners, features = inputs["boxes_xyxy"], inputs["mask.features"][None].copy()
    count, slots = len(corners), features.shape[1]
    real = np.arange(slots)[None] < count
    padded = np.zeros((1, slots, 4), np.float32)
    padded[0, :count] = corners
    script: Any = Script(inputs["mask.draws"].tolist())
    none: Any = None  # no feature of another image is asked for
    draws = as_draws([script])
    shown: Shown = hide_regions(features, padded, real, masking, draws, store=none, pool=(), max_regions=slots)
    assert not script.draws
    np.testing.assert_array_equal(features[0], outputs["mask.features"])
    np.testing.assert_array_equal(np.where(shown.chosen[0, :count], 1, -1), outputs["mask.image_label"])
    np.testing.assert_array_equal(shown.overlapping[0], outputs["mask.overlap_flag"])
    np.testing.assert_array_equal(
        np.append(True, real), outputs["mask.loader_image_mask"]
    )  # the release puts the whole image in front
    kind = "unflagged" if masking.whole == "unflagged" else "visible"
    np.testing.assert_allclose(
        whole_image(features, real, shown, kind, slots)[0], outputs["mask.loader_global_feature"], **CLOSE
    )


def test_masking_of_the_multitask_release_with_its_draws(recording: Recording) -> None:
    compare_masking(recording)


def moved(draws: NDArray[Any]) -> NDArray[Any]:
    return np.roll(draws, 1)


def all_chosen(draws: NDArray[Any]) -> NDArray[Any]:
    return draws * 0.1


def none_hidden(draws: NDArray[Any]) -> NDArray[Any]:
    return np.where(draws < 0.15, 0.149, draws)


@pytest.mark.parametrize("change", [moved, all_chosen, none_hidden], ids=lambda change: change.__name__)
def test_other_draws_are_noticed(recording: Recording, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    with pytest.raises(AssertionError):
        compare_masking(recording, **{"mask.draws": change(recording.inputs["mask.draws"])})


@pytest.mark.parametrize(
    "masking",
    [
        replace(MASKING, rate=0.14),
        replace(MASKING, hide=1.0),
        replace(MASKING, hide=0.3),
        replace(MASKING, whole="visible"),
        replace(MASKING, overlap=0.05),
        replace(MASKING, overlap=0.99),
        replace(MASKING, hide_overlapping=True),
    ],
    ids=["rate", "hide all", "hide few", "whole", "low overlap", "high overlap", "hide overlapping"],
)
def test_other_masking_is_noticed(recording: Recording, masking: RegionMasking) -> None:
    with pytest.raises(AssertionError):
        compare_masking(recording, masking)


def test_a_nudged_feature_and_a_moved_box_are_noticed(recording: Recording) -> None:
    label = recording.outputs["mask.image_label"]
    features, corners = recording.inputs["mask.features"].copy(), recording.inputs["boxes_xyxy"].copy()
    features[int((label == -1).argmax()), 0] += 1e-4
    with pytest.raises(AssertionError):
        compare_masking(recording, **{"mask.features": features})
    corners[int((recording.outputs["mask.overlap_flag"][: len(label)] == 0).argmax())] = corners[
        int((label == 1).argmax())
    ]
    with pytest.raises(AssertionError):
        compare_masking(recording, boxes_xyxy=corners)


def compare_overlaps(recording: Recording, *, inclusive: bool = True) -> None:
    corners, referred = (
        torch.from_numpy(recording.inputs[name]).double() for name in ("boxes_xyxy", "refer.gt_box_xyxy")
    )
    np.testing.assert_allclose(
        boxes.iou(corners, corners, inclusive=inclusive), recording.outputs["iou_plus1"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        boxes.iou(corners, referred, inclusive=inclusive), recording.outputs["refer.iou"], rtol=1e-5, atol=1e-6
    )


def test_overlaps_count_both_end_pixels(recording: Recording) -> None:
    compare_overlaps(recording)
    with pytest.raises(AssertionError):
        compare_overlaps(recording, inclusive=False)


def compare_reading(recording: Recording, folder: Path, **changes: Any) -> None:
    """From a store through collate into the model: features and locations that its two projections are given."""
    features = recording.inputs["reader.features_fp16"]
    width, height = recording.inputs["image_wh"].astype(int).tolist()
    array = RegionArray(features=features, boxes=recording.inputs["boxes_xyxy"][: len(features)], size=(width, height))
    with StoreWriter(folder, feature_size=features.shape[1], fingerprint="test") as writer:
        writer.add("image", replace(array, **changes))
    family = models.spec("vilbert")
    config = replace(family.presets["tiny"], feature_size=features.shape[1], whiten_features=False)
    model, spec = models.build("vilbert", config).eval(), family.inputs(config)
    assert isinstance(model, Vilbert)
    example = Example(id="1", rows=(TextLayout(Tokenizer(), spec).row("a cat"),), images=("image",))
    batch, _ = Collator(NativeStore.open(folder), spec, Tokenizer())([example], [generator_for(0)])
    given: list[Tensor] = []

    def keep(module: nn.Module, entering: tuple[Tensor, ...]) -> None:
        given.append(entering[0])

    for module in (model.projection, model.box_projection):
        module.register_forward_pre_hook(keep)
    with torch.inference_mode():
        model(batch)
    read, locations = (
        tensor.roll(1, 0).numpy() for tensor in given
    )  # the release puts the whole image in front, we behind
    assert len(read) == recording.outputs["reader.num_boxes"].item()
    np.testing.assert_array_equal(read[1:], features.astype(np.float32))
    mean = recording.outputs["reader.global_feature_first64"]
    np.testing.assert_allclose(read[0, : len(mean)], mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(locations, recording.outputs["reader.locations"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(locations[0], recording.outputs["mask.loader_global_loc"], rtol=0, atol=0)


def test_regions_are_read_as_in_the_release(recording: Recording, tmp_path: Path) -> None:
    compare_reading(recording, tmp_path / "store")


def test_regions_that_are_read_otherwise_are_noticed(recording: Recording, tmp_path: Path) -> None:
    features = recording.inputs["reader.features_fp16"]
    corners = recording.inputs["boxes_xyxy"][: len(features)]
    width, height = recording.inputs["image_wh"].astype(int).tolist()
    spoilt = features.copy()
    spoilt[0, 0] += 1
    for number, changes in enumerate(
        ({"features": spoilt}, {"boxes": corners + 1}, {"size": (width + 1, height)}, {"size": (width, height + 1)})
    ):
        with pytest.raises(AssertionError):
            compare_reading(recording, tmp_path / str(number), **changes)
