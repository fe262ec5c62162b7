"""Weights of the Visual Genome detector as its ports store them: names, conventions, and files of all their kinds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visling.checkpoints import files
from visling.checkpoints.keymap import Coverage, KeyMap, fresh, rename, repair
from visling.errors import CheckpointError, DataError
from visling.pickles import read_pickle
from visling.vision.resnet import DETECTRON2, map_network
from visling.vision.visual_genome import VisualGenomeDetector

_HEADS = "proposal_generator.rpn_head"
_PREDICTOR = "roi_heads.box_predictor"

KEYS = KeyMap(
    (
        # MILVLG's port
        repair(f"{_PREDICTOR}.cls_embed.weight", f"{_PREDICTOR}.cls_embedding.weight"),
        repair(f"{_PREDICTOR}.attr_linear1.*", f"{_PREDICTOR}.fc_attr.*"),
        repair(f"{_PREDICTOR}.attr_linear2.*", f"{_PREDICTOR}.attr_score.*"),
        *map_network(
            ("backbone.stem.conv1", "backbone.stem.conv1.norm"),
            ("backbone.res2", "backbone.res3", "backbone.res4", "roi_heads.res5"),
            bottleneck=DETECTRON2,
            part="detector",
        ),
        rename("proposal_generator.anchor_generator.cell_anchors.0", "detector.base_anchors"),
        rename(f"{_HEADS}.conv.*", "detector.propose.hidden.*"),
        rename(f"{_HEADS}.objectness_logits.*", "detector.propose.objectness.*"),
        rename(f"{_HEADS}.anchor_deltas.*", "detector.propose.shift.*"),
        rename(f"{_PREDICTOR}.cls_score.*", "detector.predict.classify.*"),
        rename(f"{_PREDICTOR}.bbox_pred.*", "detector.predict.refine.*"),
        rename(f"{_PREDICTOR}.cls_embedding.weight", "detector.predict.class_embedding.weight"),
        rename(f"{_PREDICTOR}.fc_attr.*", "detector.predict.describe.*"),
        rename(f"{_PREDICTOR}.attr_score.*", "detector.predict.attribute.*"),
        fresh("detector.**.num_batches_tracked", "frozen norms lack this counter in many files; nothing reads it"),
        fresh("detector.base_anchors", "the file holds no anchors; those of the configuration are kept"),
    )
)
"""Rules for part "detector": names of the transformers port, which are detectron2's."""

_TORCH_BEFORE_1_6 = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of PyTorch files before 1.6: a pickled number. Other pickles begin with the first byte alone."""


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a weight file.

    Args:
        file: a PyTorch or safetensors file, or a pickle of detectron2, {"model": {name: array}}.
    Raises:
        CheckpointError: no such file, truncated, holds no weights, or asks for code to be run.
    """
    return _read_pickled_arrays(file) if _is_plain_pickle(file) else files.read(file)


def count_outputs(weights: Mapping[str, Tensor], file: Path) -> tuple[int, int]:
    """Classes without the background, and attributes without "no attribute", of a file's weights.

    Raises:
        CheckpointError: they are not those of such a detector.
    """
    named = {KEYS.repaired(name): value for name, value in weights.items()}
    classes, attributes = (named.get(f"{_PREDICTOR}.{name}.bias") for name in ("cls_score", "attr_score"))
    if classes is None:
        raise CheckpointError(
            f"{file} is no Faster R-CNN of detectron2's layout: {_PREDICTOR}.cls_score.bias is not among its "
            f"{len(named)} keys, the first of which are {', '.join(list(named)[:3])}."
        )
    return len(classes) - 1, 0 if attributes is None else len(attributes) - 1


def load_weights(detector: VisualGenomeDetector, weights: Mapping[str, Tensor]) -> Coverage:
    """Copy released weights, of either convention, into a detector.

    Raises:
        CheckpointError: a key that is not known or missing, or a shape that is not the configuration's.
    """
    try:
        return KEYS.load(unify(weights), {"detector": detector})
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} A detector's are depth, width and vocabulary: those of its configuration file and names."
        ) from error


def has_caffe_conventions(weights: Mapping[str, Tensor]) -> bool:
    """Whether each anchor has two logits, background and object, as in Caffe and in MILVLG's port."""
    objectness, shift = (weights.get(f"{_HEADS}.{name}.bias") for name in ("objectness_logits", "anchor_deltas"))
    return objectness is not None and shift is not None and 4 * len(objectness) == 2 * len(shift)


def unify(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Caffe's conventions, which MILVLG's port keeps, in those of the transformers port; others unchanged.

    Caffe puts the background and "no attribute" first, refines a box of the background, and has two logits for each
    anchor, background first, whose difference is the one logit of the others: the order of anchors is the same.
    """
    named = {KEYS.repaired(name): value for name, value in weights.items()}
    if not has_caffe_conventions(named):
        return dict(weights)
    for name in ("weight", "bias"):
        background, foreground = named[f"{_HEADS}.objectness_logits.{name}"].float().chunk(2)
        named[f"{_HEADS}.objectness_logits.{name}"] = foreground - background
        refinements = named[f"{_PREDICTOR}.bbox_pred.{name}"]
        named[f"{_PREDICTOR}.bbox_pred.{name}"] = refinements[4:] if len(refinements) > 4 else refinements
    for name in ("cls_score.weight", "cls_score.bias", "cls_embedding.weight", "attr_score.weight", "attr_score.bias"):
        if (value := named.get(f"{_PREDICTOR}.{name}")) is not None:
            named[f"{_PREDICTOR}.{name}"] = value.roll(-1, dims=0)
    return named


def _is_plain_pickle(file: Path) -> bool:
    try:
        with file.open("rb") as content:
            start = content.read(len(_TORCH_BEFORE_1_6))
    except OSError:
        return False  # reading reports it
    return start[:1] == b"\x80" and start != _TORCH_BEFORE_1_6


def _read_pickled_arrays(file: Path) -> dict[str, Tensor]:
    try:
        content: Any = read_pickle(file)
    except DataError as error:
        raise CheckpointError(f"{file} holds no weights that can be read without running code: {error}") from error
    arrays = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(arrays, dict) or not arrays or not all(isinstance(v, np.ndarray) for v in arrays.values()):
        raise CheckpointError(
            f"{file} is a pickle of a {type(content).__name__}; expected detectron2's, with names and arrays under "
            "'model'."
        )
    return {str(name): torch.from_numpy(np.array(value)) for name, value in arrays.items()}
