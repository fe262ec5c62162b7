"""What the Visual Genome detector is built from, and how the configuration files of its ports spell it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from visling.checkpoints.entries import Selection
from visling.errors import CheckpointError, ConfigError

BLOCKS: Mapping[int, tuple[int, int, int]] = {50: (3, 4, 6), 101: (3, 4, 23), 152: (3, 8, 36)}
"""Depth -> bottlenecks of the three stages that run over the whole image; He et al. 2016, table 1."""


@dataclass(frozen=True, kw_only=True)
class VisualGenomeConfig:
    """Vocabulary, sizes and switches of the detector; the defaults are those of `unc-nlp/frcnn-vg-finetuned`.

    The switches from `selection` on are what released features differ in; `original_settings` has those of the original
    extraction.
    """

    class_names: tuple[str, ...]
    """Object classes in the order of the outputs, without the background, which comes last."""
    attribute_names: tuple[str, ...] = ()
    """Attributes in the order of the outputs, without "no attribute", which comes last; empty = no attribute head."""

    depth: Literal[50, 101, 152] = 101
    """Layers of the residual network."""
    stem_size: int = 64
    """Channels of the first convolution."""
    width: int = 64
    """Width of the narrow convolutions of the first stage; each later stage doubles it. A stage has four times as many
    output channels."""
    caffe_pool: bool = True
    """The pooling after the first convolution begins at the border and rounds sizes up, as in Caffe."""
    dilated_head: bool = True
    """The last stage keeps the resolution of the pooled region and spreads its windows instead."""
    pool_size: int = 14
    """Side of the grid that each region is pooled to."""
    class_specific_boxes: bool = True
    """Boxes are refined separately for each class."""
    anchor_sizes: tuple[float, ...] = (64.0, 128.0, 256.0, 512.0)
    """Square roots of the anchors' areas, in pixels of the scaled picture. Anchors in the weights' file come first."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Heights over widths; every size is combined with every ratio."""
    proposal_size: int = 512
    """Channels of the proposal network."""
    proposal_box_scale: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Factors by which the proposal network's shifts are too large."""
    box_scale: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Factors by which the refinements of the boxes are too large."""

    short_side: int = 800
    """Pictures are scaled until the shorter side has this many pixels, ..."""
    long_side: int = 1333
    """... unless the longer one would then have more than this many."""
    channel_order: Literal["BGR", "RGB"] = "BGR"
    """Order of colours that the network reads. The weights expect BGR. Features that the port computed from local files
    had RGB, because its loader forgot to swap."""
    pixel_mean: tuple[float, float, float] = (102.9801, 115.9465, 122.7717)
    """Subtracted, in `channel_order`."""
    pixel_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Divided by, in `channel_order`."""

    candidates: int = 6000
    """Best anchors per image that enter non-maximum suppression."""
    proposal_threshold: float = 0.7
    """IoU above which the weaker of two proposals is dropped."""
    proposals: int = 300
    """Most proposals per image."""
    min_side: float = 0.0
    """Proposals with a side at or below this are dropped; with `inclusive_boxes` those below it, in pixels of the
    original picture."""

    selection: Selection = "port"
    """How regions are chosen among the proposals. "port": one suppression over all classes at the best class's
    probability, at each of `thresholds` until the number fits. "original": a suppression for each class; a proposal
    counts with the largest probability that survived."""
    boxes: Literal["refined", "proposals"] = "refined"
    """What a region's box is: refined by the class's shift (port), or the proposal (original). Features and classes are
    the proposal's in both."""
    resize: Literal["sides", "factor"] = "sides"
    """"sides": sides are rounded, and sampling follows them (port). "factor": both axes are sampled by one factor,
    whatever the rounding of the sides (OpenCV)."""
    inclusive_boxes: bool = False
    """Both end pixels belong to a box: sides are x2 - x1 + 1 and boxes end at the last pixel (original)."""
    filter_first: bool = False
    """Small proposals are dropped before the best `candidates` are taken (original), not after (port)."""
    count_no_attribute: bool = False
    """Attribute probabilities leave a share for "no attribute" (original)."""
    thresholds: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """IoU above which the weaker of two regions is dropped: those that selection "port" tries in turn; "original" takes
    the first."""
    min_confidence: float = 0.2
    """Selection "original" keeps regions of at least this confidence, within the numbers that follow."""
    min_regions: int = 36
    """Fewest regions per image, if it has as many proposals."""
    max_regions: int = 36
    """Most regions per image."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built or selected."""
        if not self.class_names:
            raise ConfigError("class_names is empty: the detector needs the names of its classes, one per output.")
        if self.depth not in BLOCKS:
            raise ConfigError(f"depth is {self.depth}; expected one of {', '.join(map(str, BLOCKS))}.")
        for name in ("stem_size", "width", "pool_size", "proposal_size", "candidates", "proposals", "short_side"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.long_side < self.short_side:
            raise ConfigError(f"long_side ({self.long_side}) is less than short_side ({self.short_side}).")
        if not self.anchor_sizes or not self.anchor_ratios:
            raise ConfigError("anchor_sizes and anchor_ratios need at least one value each.")
        if not self.thresholds or not all(0 < threshold <= 1 for threshold in self.thresholds):
            raise ConfigError(f"thresholds are {self.thresholds}; expected at least one, above 0 and at most 1.")
        if not 0 <= self.min_regions <= self.max_regions:
            raise ConfigError(
                f"min_regions ({self.min_regions}) and max_regions ({self.max_regions}) must be at least 0, the first "
                "at most the second."
            )
        if self.max_regions > self.proposals or self.max_regions < 1:
            raise ConfigError(
                f"max_regions is {self.max_regions}; expected 1 to {self.proposals}, the number of proposals."
            )

    @property
    def channels(self) -> int:
        """Of the feature map that regions are pooled from."""
        return 16 * self.width

    @property
    def feature_size(self) -> int:
        """Width of a region's feature."""
        return 32 * self.width


def original_settings(least: int = 10, most: int = 100) -> dict[str, Any]:
    """Fields that make a configuration faithful to the original extraction, all of which are needed together.

    Source:
        peteanderson80/bottom-up-attention, tools/generate_tsv.py and lib/rpn/proposal_layer.py; MILVLG's port of it.
    """
    return {
        "selection": "original", "boxes": "proposals", "resize": "factor", "inclusive_boxes": True,
        "filter_first": True, "count_no_attribute": True, "short_side": 600, "long_side": 1000, "candidates": 6000,
        "proposals": 300, "min_side": 16.0, "thresholds": (0.3,), "min_confidence": 0.2, "min_regions": least,
        "max_regions": most, "channel_order": "BGR",
    }  # fmt: skip


class ReadConfig(NamedTuple):
    """A configuration file as read."""

    config: VisualGenomeConfig
    unsaid: tuple[str, ...]
    """Fields that the file does not mention, so that they have their defaults."""
    ignored: tuple[str, ...]
    """Names in the file that no prediction depends on, or that are not known."""


def _numbers(value: Any) -> tuple[float, ...]:
    """The numbers of a list, of a list with one list in it (one feature map), or a lone number."""
    value = value if isinstance(value, (list, tuple)) else [value]
    inner = value[0] if len(value) == 1 and isinstance(value[0], (list, tuple)) else value
    return tuple(float(number) for number in inner)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("a whole number")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


_FIELDS: Mapping[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "depth": (_whole, ("resnets.depth",)),
    "stem_size": (_whole, ("resnets.stem_out_channels",)),
    "width": (_whole, ("resnets.width_per_group",)),
    "caffe_pool": (_flag, ("max_pool", "caffe_maxpool")),
    "dilated_head": (lambda value: not _flag(value), ("roi_box_head.res5halve",)),
    "pool_size": (_whole, ("roi_box_head.pooler_resolution",)),
    "class_specific_boxes": (lambda value: not _flag(value), ("roi_box_head.cls_agnostic_bbox_reg",)),
    "anchor_sizes": (_numbers, ("anchor_generator.sizes",)),
    "anchor_ratios": (_numbers, ("anchor_generator.aspect_ratios",)),
    "proposal_size": (
        _whole,
        ("proposal_generator.hidden_channels", "proposal_generator.hid_channels", "bua.rpn.conv_out_channels"),
    ),
    "proposal_box_scale": (_numbers, ("rpn.bbox_reg_weights",)),
    "box_scale": (_numbers, ("roi_box_head.bbox_reg_weights",)),
    "short_side": (_whole, ("input.min_size_test",)),
    "long_side": (_whole, ("input.max_size_test",)),
    "channel_order": (str, ("input.format",)),
    "pixel_mean": (_numbers, ("pixel_mean",)),
    "pixel_std": (_numbers, ("pixel_std",)),
    "candidates": (_whole, ("rpn.pre_nms_topk_test",)),
    "proposal_threshold": (float, ("rpn.nms_thresh",)),
    "proposals": (_whole, ("rpn.post_nms_topk_test",)),
    "min_side": (float, ("proposal_generator.min_size",)),
    "thresholds": (_numbers, ("roi_heads.nms_thresh_test",)),
    "min_confidence": (float, ("bua.extractor.conf_thresh",)),
    "min_regions": (_whole, ("min_detections", "bua.extractor.min_boxes")),
    "max_regions": (_whole, ("max_detections", "bua.extractor.max_boxes")),
}
"""Field -> how its value is read, and its names in configuration files, lower case, without "model."."""

_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "resnets.num_groups": (1,),
    "resnets.stride_in_1x1": (True,),
    "resnets.norm": ("BN", "FrozenBN"),
    "resnets.out_features": (["res4"],),
    "rpn.in_features": (["res4"],),
    "roi_heads.in_features": (["res4"],),
    "anchor_generator.offset": (0,),
    "roi_box_head.pooler_type": ("ROIPool",),
    "bua.resnet_version": (1,),
    "size_divisibility": (0,),
    "pad_value": (0,),
}
"""Name in configuration files -> values that this network has; any other describes another network."""

_CHECKED = frozenset({
    "resnets.res2_out_channels", "resnets.res5_dilation", "roi_heads.num_classes", "roi_box_head.attr",
    "roi_box_head.num_attrs", "bua.attribute_on", "bua.attribute.num_classes",
})  # fmt: skip


class _Loader(yaml.SafeLoader):
    """Plain values only; Python's tuples, which detectron2 writes, are lists."""


def _construct_tuple(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return list(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def read_config(
    file: Path, class_names: tuple[str, ...], attribute_names: tuple[str, ...], **changes: Any
) -> ReadConfig:
    """The configuration that a `config.yaml` of the transformers port, of detectron2 or of MILVLG's port describes.

    Args:
        changes: fields that replace those of the file.
    Raises:
        CheckpointError: the file is missing or damaged.
        ConfigError: it describes another network, contradicts itself or the vocabulary, or a value cannot be read.
    """
    values = _flatten(_load_yaml(file))
    fields: dict[str, Any] = {"class_names": class_names, "attribute_names": attribute_names}
    for field, (convert, names) in _FIELDS.items():
        said = {name: values[name] for name in names if name in values}
        try:
            read = {name: convert(value) for name, value in said.items()}
        except (TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"{file}: {' and '.join(said)} cannot be read as {field}: {said}. {error}") from error
        if len(set(read.values())) > 1:
            raise ConfigError(f"{file} contradicts itself: {read}. Remove all but one.")
        fields.update(dict.fromkeys([field] * len(read), next(iter(read.values()), None)))
    _check_required(values, file)
    _check_vocabulary(values, len(class_names), len(attribute_names), file)
    if values.get("resnets.res5_dilation") == 2:
        fields["dilated_head"] = True
    if fields.get("proposal_size") == -1:
        fields["proposal_size"] = 16 * fields.get("width", VisualGenomeConfig.width)
    if any(name.startswith("bua.") for name in values):
        fields = {**original_settings(), "caffe_pool": True, "box_scale": (1.0,) * 4, **fields}
        # Caffe's sizes are multiples of the 16 pixels of a cell.
        fields["anchor_sizes"] = tuple(16 * size for size in fields.get("anchor_sizes", (4, 8, 16, 32)))
    known = {name for _, names in _FIELDS.values() for name in names} | _REQUIRED.keys() | _CHECKED
    unsaid = tuple(name for name in _FIELDS if name not in fields)
    for name, length in (("box_scale", 4), ("proposal_box_scale", 4), ("pixel_mean", 3), ("pixel_std", 3)):
        if name in fields and len(fields[name]) != length:
            raise ConfigError(f"{file}: {name} has {len(fields[name])} numbers; expected {length}.")
    if fields.get("channel_order", "BGR") not in ("BGR", "RGB"):
        raise ConfigError(f"{file}: input.format is {fields['channel_order']!r}; expected BGR or RGB.")
    config = VisualGenomeConfig(**{**fields, **changes})
    return ReadConfig(
        config, tuple(name for name in unsaid if name not in changes), tuple(sorted(values.keys() - known))
    )


def _load_yaml(file: Path) -> Mapping[str, Any]:
    try:
        content: Any = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise CheckpointError(f"no configuration {file}. Check the path.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} is not a configuration in YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; expected the names and values of a detector.")
    base = content.pop("_BASE_", None)
    return content if base is None else _merge(_load_yaml(file.parent / str(base)), content)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one configuration, replaced by those of another."""
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        merged[name] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names, lower case and without the "model." that detectron2 has in front -> values."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        dotted = f"{prefix}{name}".lower().removeprefix("model.")
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{dotted}." if dotted != "model" else ""))
        else:
            flat[dotted] = _parse_tuple(value)
    return flat


def _parse_tuple(value: Any) -> Any:
    """detectron2 writes tuples as Python does, which YAML reads as text."""
    if isinstance(value, str) and value.startswith(("(", "[")):
        try:
            return ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return value
    return value


def _check_required(values: Mapping[str, Any], file: Path) -> None:
    for name, expected in _REQUIRED.items():
        found = values.get(name, expected[0])
        if (list(found) if isinstance(found, tuple) else found) not in expected:
            raise ConfigError(
                f"{file} describes another network: {name} is {found!r}, expected {' or '.join(map(repr, expected))}. "
                "What is built is Faster R-CNN on the res4 feature map of a ResNet with strides in 1x1 convolutions."
            )
    outputs = values.get("resnets.res2_out_channels")
    width = values.get("resnets.width_per_group", VisualGenomeConfig.width)
    if outputs is not None and outputs != 4 * width:
        raise ConfigError(
            f"{file} describes another network: resnets.res2_out_channels is {outputs}, expected 4 x width_per_group, "
            f"{4 * width}."
        )


def _check_vocabulary(values: Mapping[str, Any], classes: int, attributes: int, file: Path) -> None:
    """MILVLG's port counts the background, and "no attribute"; the others do not."""
    counted = int(any(name.startswith("bua.") for name in values))
    has_attributes = values.get("roi_box_head.attr", values.get("bua.attribute_on"))
    stated = {
        "roi_heads.num_classes": (values.get("roi_heads.num_classes"), classes + counted, "class"),
        "roi_box_head.num_attrs": (values.get("roi_box_head.num_attrs"), attributes, "attribute"),
        "bua.attribute.num_classes": (values.get("bua.attribute.num_classes"), attributes + counted, "attribute"),
    }
    for name, (found, expected, kind) in stated.items():
        if found is not None and found != expected and not (kind == "attribute" and has_attributes is False):
            raise ConfigError(
                f"{file}: {name} is {found}, but the vocabulary makes it {expected}. Give the file with the {kind} "
                "names of these weights."
            )
    if has_attributes is False and attributes:
        raise ConfigError(f"{file} says that there is no attribute head, but {attributes} attribute names were given.")
