"""VL-BERT's trainable region extractor against values recorded from the official release (`golden/vlbert/fast_rcnn`).

The recorded network is narrow; its sizes are in the set's config.json. Features, plain and projected, within 1e-5 +
1e-5 |b| at real regions (the set allows 2e-5) and zero on padding. Feature map and pooled map within 1e-5 |b| and a
ten-millionth of the largest value, about 2000: the small values in them are differences of large ones. Recorded are
both forms of the last stage, dilated and halving: the map at stride 16, what RoIAlign makes of the first two regions,
the mean features, and the projected ones: plain, with features masked, and under instance masks. No gradients were
recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from visling.boxes import to_unit
from visling.models.vlbert import RegionProjection
from visling.types import Pixels, Regions
from visling.vision import ops
from visling.vision.end_to_end import KEYS, ExtractorConfig, RegionExtractor
from visling.vision.resnet import HEAD_BLOCKS, Bottleneck, FrozenNorm

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def compare_maps(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs, rtol=1e-5, atol=1e-7 * float(theirs.abs().max()))


@dataclass(frozen=True)
class Recording:
    """The recorded network and what went in and came out."""

    folder: Path
    variant: str

    @property
    def described(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return config

    @property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "fast_rcnn/inputs.safetensors")

    @property
    def outputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / f"fast_rcnn/outputs_{self.variant}.safetensors")

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict under the names of a released file."""
        return {
            f"image_feature_extractor.{name}": tensor
            for name, tensor in load_file(self.folder / "fast_rcnn/state_dict.safetensors").items()
        }

    def extractor(self) -> RegionExtractor:
        sizes = self.described["fast_rcnn_dims"][self.variant]
        assert sizes["c5_blocks"] == HEAD_BLOCKS
        extractor = RegionExtractor(
            ExtractorConfig(
                blocks=tuple(sizes["blocks"]),
                stem_size=sizes["stem"],
                widths=(*sizes["planes"][:3], sizes["c5_planes"]),
                dilated=self.variant == "dilated",
            )
        )
        KEYS["official"].load(self.weights, {"extractor": extractor})
        return extractor

    def projection(self) -> RegionProjection:
        weights = {
            name: self.weights[f"image_feature_extractor.obj_downsample.1.{name}"] for name in ("weight", "bias")
        }
        features, (outputs, inputs) = self.outputs["obj_reps_raw"].shape[-1], weights["weight"].shape
        projection = RegionProjection(
            feature_size=features, coordinate_size=(inputs - features) // 8, visual_size=outputs, dropout_rate=0.1
        )
        projection.linear.load_state_dict(weights)
        return projection.eval()


@pytest.fixture(params=["dilated", "strided"])
def recording(golden: Path, request: pytest.FixtureRequest) -> Recording:
    return Recording(golden / "vlbert", request.param)


@pytest.fixture
def dilated(golden: Path) -> Recording:
    return Recording(golden / "vlbert", "dilated")


@contextmanager
def passing(module: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Collects what goes into a module and what comes out."""
    hook = module.register_forward_hook(lambda _, arguments, output: calls.append((arguments[0], output)))
    yield
    hook.remove()


def compare(recording: Recording, extractor: RegionExtractor) -> None:
    inputs, recorded = recording.inputs, recording.outputs
    boxes, real = inputs["boxes"], inputs["box_mask"]
    calls: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad(), passing(extractor.head, calls):
        compare_maps(extractor.feature_map(inputs["images"]), recorded["body4"])
        features = extractor(inputs["images"], boxes, real)
    pooled, maps = calls[0]
    compare_maps(pooled[:2], recorded["roi_align"])
    assert list(maps.shape) == recorded["conv5_shape"].tolist()
    assert_close(features, recorded["obj_reps_raw"], **CLOSE)
    assert bool((features[~real] == 0).all())


def compare_projected(recording: Recording, extractor: RegionExtractor) -> None:
    inputs, recorded = recording.inputs, recording.outputs
    real, projection = inputs["box_mask"], recording.projection()
    unit = to_unit(inputs["boxes"], inputs["im_info"][:, :2])
    with torch.no_grad():
        features = extractor(inputs["images"], inputs["boxes"], real)
        assert_close(projection(features, unit)[real], recorded["obj_reps"][real], **CLOSE)
        masked = torch.where(inputs["mvrc_ops"][..., None] == 1, inputs["mask_visual_embed"], features)
        assert_close(projection(masked, unit)[real], recorded["obj_reps_masked_feature"][real], **CLOSE)
        if "obj_reps_with_segms" in recorded:
            cut = extractor(inputs["images"], inputs["boxes"], real, inputs["segms"])
            assert_close(projection(cut, unit)[real], recorded["obj_reps_with_segms"][real], **CLOSE)
            seen = describe_batch(extractor, inputs)
            assert_close(projection(seen.features, unit)[real], recorded["obj_reps_with_segms"][real], **CLOSE)


def describe_batch(extractor: RegionExtractor, inputs: Mapping[str, Tensor]) -> Regions:
    """The regions as a run hands them to the encoder, under the masks of their objects."""
    size = inputs["im_info"][:, :2]
    regions = Regions(
        features=torch.zeros(*inputs["box_mask"].shape, 0),
        boxes=to_unit(inputs["boxes"], size),
        mask=inputs["box_mask"],
        size=size,
    )
    pixels = Pixels(
        images=inputs["images"],
        size=size.flip(1).long(),
        row=torch.arange(len(size)),
        masks=inputs["segms"].bool(),
    )
    return extractor.describe(regions, pixels)[0]


def test_the_whole_image_has_no_mask(dilated: Recording) -> None:
    inputs, extractor = dilated.inputs, dilated.extractor()
    with torch.no_grad():
        seen = describe_batch(extractor, inputs)
        inputs["segms"] = torch.ones_like(inputs["segms"])
        unmasked = describe_batch(extractor, inputs)
    assert seen.whole is not None
    assert unmasked.whole is not None
    assert_close(seen.whole, unmasked.whole)
    assert not torch.allclose(seen.features, unmasked.features)


def test_features_of_regions(recording: Recording) -> None:
    compare(recording, recording.extractor().eval())


def test_features_of_regions_while_training(recording: Recording) -> None:
    compare(recording, recording.extractor().train())


def test_projected_features_shown_masked_and_under_instance_masks(recording: Recording) -> None:
    assert ("obj_reps_with_segms" in recording.outputs) == (recording.variant == "dilated")
    compare_projected(recording, recording.extractor())


def test_what_is_frozen(recording: Recording) -> None:
    """As many parameters as recorded, the two of the projection among them, and none but those of the norms, the stem
    and the first stage."""
    told = next(text for name, text in recording.described.items() if name.startswith("fast_rcnn_frozen_parameters"))
    frozen, total = map(int, re.findall(r"\d+", told)[:2])
    extractor = recording.extractor().train()
    parameters = dict(extractor.named_parameters())
    assert len(parameters) + len(list(recording.projection().parameters())) == total
    held = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    assert len(held) == frozen
    assert held == {name for name in parameters if ".norm." in name or name.startswith(("stem.", "stages.0."))}
    inputs = recording.inputs
    extractor(inputs["images"], inputs["boxes"], inputs["box_mask"]).square().sum().backward()
    assert {name for name, parameter in parameters.items() if parameter.grad is None} == held
    for name in parameters.keys() - held:
        gradient = parameters[name].grad
        assert gradient is not None
        assert float(gradient.abs().max()) > 0, name


# ------------------------------------------------------------------------------------------------------------------
# broken extractors are noticed


def _nudge(name: str) -> Callable[[RegionExtractor], None]:
    """Raise the entries of the first channel by a hundredth."""

    def change(extractor: RegionExtractor) -> None:
        with torch.no_grad():
            extractor.state_dict(keep_vars=True)[name][0] += 0.01

    return change


def _each(kind: type[nn.Module], change: Callable[[Any], None]) -> Callable[[RegionExtractor], None]:
    def apply(extractor: RegionExtractor) -> None:
        for module in extractor.modules():
            if isinstance(module, kind):
                change(module)

    return apply


def _rough(norm: FrozenNorm) -> None:
    norm.eps = 1e-4


def _stride_in_the_window(block: Bottleneck) -> None:
    stride, block.reduce.convolution.stride = block.reduce.convolution.stride, (1, 1)
    block.convolve.convolution.stride = stride


def _undilate(block: nn.Module) -> None:
    assert isinstance(block, Bottleneck)
    block.convolve.convolution.padding, block.convolve.convolution.dilation = (1, 1), (1, 1)


def _measure_batches(extractor: RegionExtractor) -> None:
    for module in extractor.head.modules():
        if isinstance(module, FrozenNorm):
            module.training = True


def _red_first(extractor: RegionExtractor) -> None:
    with torch.no_grad():
        extractor.stem.convolution.weight.copy_(extractor.stem.convolution.weight.flip(1))


MUTATIONS: Mapping[str, Callable[[RegionExtractor], None]] = {
    **{
        f"nudge {name}": _nudge(name)
        for name in (
            "stem.convolution.weight",
            "stem.norm.bias",
            "stages.0.0.shortcut.convolution.weight",
            "stages.0.0.shortcut.norm.running_mean",
            "stages.0.2.expand.convolution.weight",
            "stages.1.1.reduce.norm.weight",
            "stages.1.3.convolve.convolution.weight",
            "stages.1.3.expand.norm.running_var",
            "stages.2.0.shortcut.norm.weight",
            "stages.2.5.reduce.convolution.weight",
            "stages.2.5.expand.norm.bias",
            "head.0.shortcut.convolution.weight",
            "head.0.convolve.norm.bias",
            "head.1.convolve.norm.running_mean",
            "head.2.convolve.convolution.weight",
            "head.2.expand.norm.running_var",
            "head.2.expand.norm.bias",
        )
    },
    "epsilon of the norms": _each(FrozenNorm, _rough),
    "stride in the 3 x 3 window": _each(Bottleneck, _stride_in_the_window),
    "no dilation": _each(Bottleneck, _undilate),
    "no dilation in the first block": lambda extractor: _undilate(extractor.head[0]),
    "statistics of the batch": _measure_batches,
    "red first": _red_first,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_extractor_is_noticed(dilated: Recording, mutation: str) -> None:
    extractor = dilated.extractor()
    MUTATIONS[mutation](extractor)
    with pytest.raises(AssertionError):
        compare(dilated, extractor)


def test_every_tensor_of_the_file_is_heard(dilated: Recording) -> None:
    extractor, inputs, recorded = dilated.extractor(), dilated.inputs, dilated.outputs["obj_reps_raw"]

    def same() -> bool:
        return torch.allclose(extractor(inputs["images"], inputs["boxes"], inputs["box_mask"]), recorded, **CLOSE)

    with torch.no_grad():
        assert same()
        for name, tensor in extractor.state_dict().items():
            if not name.endswith("num_batches_tracked"):  # a counter
                kept = tensor.clone()
                tensor += 0.01
                assert not same(), name
                tensor.copy_(kept)


@pytest.mark.parametrize("change", [{"aligned": True}, {"sampling_ratio": 2}, {"scale": 1 / 15}, {"output_size": 7}])
def test_another_pooling_is_noticed(
    dilated: Recording, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    real = ops.roi_align
    monkeypatch.setattr(ops, "roi_align", lambda *arguments, **options: real(*arguments, **(options | change)))
    with pytest.raises(AssertionError):
        compare(dilated, dilated.extractor())


def test_swapped_instance_masks_are_noticed(dilated: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = dilated.inputs
    swapped["segms"] = swapped["segms"].flip(1)
    monkeypatch.setattr(Recording, "inputs", swapped)
    with pytest.raises(AssertionError):
        compare_projected(dilated, dilated.extractor())
