"""Which kinds of features were released in which layout: the layout alone does not tell fixed from adaptive numbers of
regions, or two detectors.

Sources  The releases' pages of data, which `visling.feature_kinds` names detector by detector.
         VOLTA's text files and the LMDBs made of them come from the Caffe network (its `data/*/extract_*_image.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from visling.feature_kinds import KINDS


class _Released(NamedTuple):
    """A kind of features that files of a layout hold, and the numbers of regions that tell it from others."""

    kind: str
    fewest: int
    """Regions of an image that has any."""
    most: int


_FIXED = _Released("bottom-up-36", 36, 36)
_ADAPTIVE = _Released("bottom-up-10-100", 10, 100)
_PORT = _Released("vg-frcnn-36", 36, 36)
_RESNEXT = _Released("resnext-152-100", 1, 100)

_RELEASED: Mapping[str, tuple[_Released, ...]] = {
    "bottom-up-attention": (_FIXED, _ADAPTIVE),
    "vilbert-tsv": (_ADAPTIVE,),
    "lxmert-obj36": (_FIXED,),
    "volta-tsv": (_FIXED,),
    "volta-hdf5": (_PORT,),
    "vlbert-json": (_FIXED, _ADAPTIVE),
    "vlbert-cc-json": (_ADAPTIVE,),
    "updn-hdf5": (_FIXED,),
    "ban-hdf5": (_ADAPTIVE,),
    "unsupervised-visualbert-hdf5": (_FIXED,),
    "volta-lmdb": (_FIXED,),
    "volta-conceptual-captions-lmdb": (_FIXED,),
    "vilbert-lmdb": (_ADAPTIVE,),
    "conceptual-captions-lmdb": (_ADAPTIVE,),
    "vilbert-multitask-lmdb": (_RESNEXT,),
    "vilbert-multitask-npy": (_RESNEXT,),
    "mmf-lmdb": (_RESNEXT,),
    "mmf-npy": (_RESNEXT,),
    "pythia-fc6-npy": (_Released("detectron-100", 100, 100),),
    "milvlg-npz": (_FIXED, _ADAPTIVE),
    "visualbert-npz": (_Released("detectron-coco-150", 1, 150),),
    "visualbert-th": (_Released("detectron-coco-150", 1, 150),),
}
"""Layout -> the kinds that were released in it, most particular first."""


def recognise_kind(layout: str, width: int, counts: Sequence[int]) -> str | None:
    """The kind of features that was released in a layout with this width and these numbers of regions; None if none
    was.

    Args:
        counts: regions of some images that have any.
    """
    for released in _RELEASED.get(layout, ()):
        fits = counts and released.fewest <= min(counts) and max(counts) <= released.most
        if fits and KINDS[released.kind].width == width:
            return released.kind
    return None
