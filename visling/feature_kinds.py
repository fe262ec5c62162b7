"""Kinds of region features that published weights were trained on, and which of them can stand for one another.

A fingerprint says whether two sets of features come from the very same detector; a kind says whether they are meant to
be equal, whoever computed them: every copy of LXMERT's features is of one kind, in whatever file it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FeatureKind:
    """One kind of region features."""

    detector: str
    """What computed them."""
    width: int
    """Numbers per region."""
    regions: str
    """How many regions an image has."""


_VG_FRCNN = "bottom-up attention in PyTorch, ResNet-101"

KINDS: Mapping[str, FeatureKind] = {
    "bottom-up-36": FeatureKind(
        detector="bottom-up attention in Caffe, ResNet-101, its weights for 36 regions", width=2048, regions="36"
    ),
    "bottom-up-10-100": FeatureKind(
        detector="bottom-up attention in Caffe, ResNet-101, its weights for 10 to 100 regions",
        width=2048,
        regions="10 to 100",
    ),
    **{
        f"vg-frcnn-{regions.replace(' to ', '-')}{suffix}": FeatureKind(
            detector=f"{_VG_FRCNN}, its weights for {regions} regions, {how}", width=2048, regions=regions
        )
        for regions in ("36", "10 to 100")
        for suffix, how in (("", "regions chosen as the port does"), ("-caffe", "regions chosen as in Caffe"))
    },
    "detectron-100": FeatureKind(
        detector="Pythia's Detectron network trained on Visual Genome (fc6)", width=2048, regions="100"
    ),
    "detectron-coco-150": FeatureKind(
        detector="Detectron's Mask R-CNN ResNet-101-FPN trained on COCO (model 35861858, fc6)",
        width=1024,
        regions="up to 150",
    ),
    "resnext-152-100": FeatureKind(
        detector="vqa-maskrcnn-benchmark's ResNeXt-152 trained on Visual Genome (fc6)", width=2048, regions="100"
    ),
}
"""Name -> kind. Fingerprints of one's own detectors are of no kind."""

_AS_ORIGINAL = (
    "the weights, sizes of images and choice of regions are the same; MILVLG's port of them reports that features "
    "differ by less than 0.01, which nobody has measured here"
)
_AS_PORT = (
    "the weights are the same; the port scales images to 800 pixels instead of 600, refines its boxes, and chooses "
    "regions by one suppression over all classes"
)
NEAR: Mapping[tuple[str, str], str] = {
    (f"bottom-up-{regions}", f"vg-frcnn-{regions}{suffix}"): difference
    for regions in ("36", "10-100")
    for suffix, difference in (("", _AS_PORT), ("-caffe", _AS_ORIGINAL))
}
"""(kind that weights were trained on, kind at hand) -> how they differ, where the second may stand for the first."""


_EARLIER: Mapping[str, str] = {"lxmert-obj36": "bottom-up-36"}
"""Fingerprint that earlier versions gave to converted features, their layout -> their kind."""


def name_today(fingerprint: str) -> str:
    """A fingerprint of an existing store or model as it is written today."""
    return _EARLIER.get(fingerprint, fingerprint)


def fits(needed: str, found: str) -> bool:
    """Whether features of one kind may stand for those that weights were trained on: the same kind, or one near it."""
    return needed == found or (needed, found) in NEAR


def describe_kind(name: str) -> str:
    """A kind in words for messages, with its name; a name that is not listed, as it is."""
    kind = KINDS.get(name)
    if kind is None:
        return name
    return f"{name} ({kind.detector}; {kind.regions} regions, width {kind.width})"
