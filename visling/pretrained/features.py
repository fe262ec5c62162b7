"""The region features that a model was trained on: fingerprint, statistics measured on a sample, and the extractor's
backbone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from visling.checkpoints import catalog, files
from visling.errors import CheckpointError
from visling.feature_kinds import NEAR, describe_kind, fits, name_today
from visling.models.base import Encoder
from visling.pretrained.folder import ModelFolder, load_encoder
from visling.regions.store import NativeStore
from visling.vision.extractors import NETWORKS


class Features(Protocol):
    """What computes or holds region features: a detector or a store."""

    @property
    def fingerprint(self) -> str:
        """Identity of the detector."""

    @property
    def kind(self) -> str:
        """Kind of the features in `feature_kinds`; empty if it is of none, or not known."""


def check_features(saved: ModelFolder, found: Features, *, override: bool, extracts: bool = False) -> str:
    """Refuse region features other than those a model was trained on.

    Args:
        found: the detector or the store at hand.
        override: accept any.
        extracts: whether the run computes features with a region extractor of its own, and reads only boxes and classes
            from the store.
    Returns:
        How the features differ from those of the training, to be shown to the user, where they are near enough; else
        empty.
    Raises:
        CheckpointError: the features differ, or only one side computes its own, and `override` is off.
    """
    if saved.text_only or override:
        return ""
    if saved.extractor is not None and not extracts:
        raise CheckpointError(
            f"{saved.path} was trained jointly with a region extractor of its own and with no other features; this "
            "run reads those of a store, which give wrong answers without any error. Continue with a recipe that has "
            "an extractor, start from a model that was trained on stored features, or pass --other-features to take "
            "the encoder alone and train it on these."
        )
    if saved.extractor is None and extracts:
        raise CheckpointError(
            f"{saved.path} was trained on stored features and has no network that computes them, and this run "
            "computes its own. If a file has that network (of the release), name it with --backbone and pass "
            "--other-features too. Otherwise start from text weights or a model with an extractor, or train the "
            "encoder on the features of this one with --other-features alone."
        )
    if name_today(saved.fingerprint) == name_today(found.fingerprint):
        return ""
    if saved.features and saved.extractor is None:
        return _compare_kinds(saved, found)
    if not saved.fingerprint:
        raise CheckpointError(
            f"{saved.path} holds converted weights; which region features they were trained on is not recorded. "
            f"{saved.source.get('note', '')} If these regions are of that kind, pass --other-features, or record it "
            "once with visling convert --features STORE."
        )
    raise CheckpointError(
        f"{saved.path} was trained on region features {saved.fingerprint[:12]}; these are {found.fingerprint[:12]}. "
        "Features of another detector give wrong answers without any error. Extract regions with the same detector, "
        "or pass --other-features to continue anyway."
    )


def _compare_kinds(saved: ModelFolder, found: Features) -> str:
    """`check_features` for a model whose features are of a known kind."""
    needed = saved.features
    if found.kind == needed:
        return ""
    if fits(needed, found.kind):
        return (
            f"the regions are {describe_kind(found.kind)}, which comes near {describe_kind(needed)}, on which "
            f"{saved.path.name} was trained: {NEAR[needed, found.kind]}"
        )
    these = (
        f"these are {describe_kind(found.kind)}"
        if found.kind
        else f"these ({found.fingerprint[:12]}) are of a detector that is not known to compute them"
    )
    usable = ", ".join(detector.name for detector in catalog.DETECTORS if fits(needed, detector.makes))
    raise CheckpointError(
        f"{saved.path} was trained on region features of the kind {describe_kind(needed)}; {these}. Other features "
        "give wrong answers without any error. "
        + (f"Detectors that come near it: {usable} (visling catalog {usable.split(',')[0]}). " if usable else "")
        + "`visling catalog` lists feature files of each kind. To continue anyway, pass --other-features."
    )


def load_backbone(extractor: nn.Module, kind: str, path: Path) -> str:
    """Start a region extractor from a file: a plain ResNet (VL-BERT's is a detector converted to one, VisualBERT's that
    of torchvision), or a file of the release, whose network is used.

    Args:
        kind: of the extractor, in `vision.extractors.NETWORKS`.
    Returns:
        What was read, for the log.
    Raises:
        CheckpointError: no such file, or not a network of this size.
    """
    tensors, network = files.read(path), NETWORKS[kind]
    layout = "official" if any(name.startswith(network.prefix) for name in tensors) else "resnet"
    try:
        network.keys[layout].load(tensors, {"extractor": extractor})
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} does not fill the region extractor, read as "
            f"{network.files if layout == 'official' else 'a plain ResNet'}: {error} Give a file of the "
            "recipe's depth, or change extractor.blocks."
        ) from error
    return f"the region extractor starts from {path} ({layout})"


def start_encoder(
    encoder: Encoder, saved: ModelFolder | None, store: NativeStore | None, images: Iterable[str]
) -> list[str]:
    """Give a run's encoder the weights of the model that it starts from, and statistics of region features unless that
    model has some. Returns notes for the log.

    Args:
        saved: None = the encoder stays randomly initialised.
        store, images: of `measure_features`.
    Raises:
        CheckpointError: the weights do not fit.
    """
    notes = [] if saved is None else load_encoder(encoder, saved)
    if saved is not None and not saved.text_only:
        return notes
    measure_features(encoder, store, images)
    if saved is not None and store is not None:
        statistics = f"; statistics of features are those of {store.path}" if _keeps_statistics(encoder) else ""
        notes.append(f"all weights of the encoder are those of {saved.path}, which has seen no region{statistics}")
    return notes


SAMPLED_IMAGES = 2000
"""Images, evenly spread over the training images, on whose regions an encoder measures its statistics."""


def measure_features(encoder: Encoder, store: NativeStore | None, images: Iterable[str]) -> Encoder:
    """The encoder with its statistics of region features measured on a sample of these images, if it keeps any."""
    if not _keeps_statistics(encoder):
        return encoder  # the sample, hundreds of megabytes, is not read
    ids = [] if store is None else sorted({image_id for image_id in images if image_id in store})
    if store is not None and ids:
        ids = ids[:: max(1, len(ids) // SAMPLED_IMAGES)]
        encoder.fit_features(
            torch.cat([torch.from_numpy(store[image_id].features.astype("float32")) for image_id in ids])
        )
    return encoder


def _keeps_statistics(encoder: Encoder) -> bool:
    """Whether an encoder measures region features; one of another package is asked to."""
    return bool(getattr(encoder.config, "whiten_features", True))
