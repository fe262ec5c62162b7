"""Files of region features in every released layout."""

from __future__ import annotations

import base64
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import lmdb
import msgpack
import numpy as np
import torch
from fuzz.promises import check_reader
from fuzz.readers.base import ARRAYS_MEMORY, Reader

from visling.regions.formats import open_reader

_WIDTH, _COUNT, _CLASSES = 3, 2, 4
_SIZE = (40, 20)
_BOXES = np.array([[0, 0, 20, 10], [1, 1, 21, 11]], np.float32)
_FEATURES = np.arange(_COUNT * _WIDTH, dtype=np.float32).reshape(_COUNT, _WIDTH)
_PROBS = np.full((_COUNT, _CLASSES), 0.25, np.float32)
_LABELS, _SURE = np.array([1, 2]), np.array([0.5, 0.25], np.float32)


def _encode(values: Any, kind: str = "<f4") -> str:
    return base64.b64encode(np.asarray(values, kind).tobytes()).decode()


def _read(name: str, layout: str) -> Callable[[Path], None]:
    return lambda folder: check_reader(open_reader(folder / name, layout))


def _write_tsv(columns: tuple[str, ...]) -> Callable[[Path], None]:
    fields = {
        "width": "40", "height": "20", "number": "2", "boxes": _encode(_BOXES), "features": _encode(_FEATURES),
        "classes": _encode(_LABELS, "<i8"), "confidence": _encode(_SURE), "probs": _encode(_PROBS),
    }  # fmt: skip

    def write(folder: Path) -> None:
        lines = ("\t".join(fields.get(column, name) for column in columns) for name in ("a", "9"))
        (folder / "x.tsv").write_text("".join(line + "\n" for line in lines))

    return write


_PLAIN = ("id", "width", "height", "number", "boxes", "features")
_LXMERT = (
    "id", "height", "width", "classes", "confidence", "classes", "confidence", "number", "boxes", "features",
)  # fmt: skip


def _write_hdf5(datasets: dict[str, Any], table: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with h5py.File(folder / "x.hdf5", "w") as file:
            for name, values in datasets.items():
                file[name] = values
        (folder / table).write_bytes(content)

    return write


_SPATIAL = np.concatenate([_BOXES / [40, 20, 40, 20], np.ones((2, 2))], 1).astype(np.float32)
_IDS = pickle.dumps({9: 0, 7: 1}, 2)
_UPDN = {"image_features": np.stack([_FEATURES] * 2), "image_bb": np.stack([_BOXES] * 2)} | {
    "spatial_features": np.stack([_SPATIAL] * 2)
}
_BAN = {"image_features": np.concatenate([_FEATURES] * 2), "image_bb": np.concatenate([_BOXES] * 2)} | {
    "spatial_features": np.concatenate([_SPATIAL] * 2), "pos_boxes": np.array([[0, 2], [2, 4]], np.int32),
}  # fmt: skip
_DESCRIBED = {
    name: np.stack([values] * 2)
    for name, values in {
        "features": _FEATURES, "boxes": _BOXES, "objects_id": _LABELS, "objects_conf": _SURE, "attrs_id": _LABELS,
        "attrs_conf": _SURE,
    }.items()
}  # fmt: skip
_DESCRIPTIONS = json.dumps([{"img_id": name, "img_w": 40, "img_h": 20} for name in "ab"]).encode()


def _write_groups(folder: Path) -> None:
    with h5py.File(folder / "x.hdf5", "w") as file:
        for image in ("a", "b"):
            for name, values in {
                "features": _FEATURES, "boxes": _BOXES, "obj_id": _LABELS, "obj_conf": _SURE, "attr_id": _LABELS,
                "attr_conf": _SURE, "img_w": 40, "img_h": 20,
            }.items():  # fmt: skip
                file.create_dataset(f"{image}/{name}", data=values)


def _describe(**more: Any) -> dict[str, Any]:
    return {
        "num_boxes": _COUNT, "image_w": 40, "image_h": 20, "boxes": _encode(_BOXES), "features": _encode(_FEATURES),
        **more,
    }  # fmt: skip


def _write_zip(method: int, **more: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / "x.zip", "w", method) as archive:
            for name in ("train/7.json", "train/9.json"):
                archive.writestr(name, json.dumps(_describe(**more)))

    return write


def _write_lmdb(entries: dict[str, bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with (
            lmdb.open(str(folder / "x.lmdb"), map_size=1 << 20, subdir=False, lock=False) as environment,
            environment.begin(write=True) as transaction,
        ):
            for name, value in entries.items():
                transaction.put(name.encode(), value)

    return write


def _pickled(*rows: dict[str, Any]) -> dict[str, bytes]:
    return {str(number): pickle.dumps(row, 2) for number, row in enumerate(rows)} | {"keys": pickle.dumps([b"0"])}


_VOLTA = {
    "img_id": "7", "img_h": 20, "img_w": 40, "num_boxes": 2, "boxes": _encode(_BOXES), "features": _encode(_FEATURES),
    "objects_id": _encode(_LABELS, "<i8"), "objects_conf": _encode(_SURE), "attrs_id": _encode(_LABELS, "<i8"),
    "attrs_conf": _encode(_SURE),
}  # fmt: skip
_ARRAYS = {"image_id": "7", "image_h": 20, "image_w": 40, "num_boxes": 2, "boxes": _BOXES, "features": _FEATURES}
_MMF = {
    "feature_path": "a", "features": _FEATURES, "image_height": 20, "image_width": 40, "num_boxes": 2,
    "objects": _LABELS, "cls_prob": _PROBS, "bbox": _BOXES,
}  # fmt: skip


def _pack_array(array: Any) -> dict[bytes, Any]:
    return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}


def _pack_record(name: str) -> bytes:
    record = [_pack_array(_FEATURES), _pack_array(_PROBS), _pack_array(_BOXES), 2, 20, 40, name, "a caption"]
    content: bytes = msgpack.packb(record, use_bin_type=True)
    return content


def _save_arrays(folder: Path) -> None:
    for name in ("a", "b"):
        np.save(folder / f"{name}.npy", _FEATURES)
        info: Any = {key: value for key, value in _MMF.items() if key not in ("features", "feature_path")}
        np.save(folder / f"{name}_info.npy", info, allow_pickle=True)


def _save_dictionary(folder: Path) -> None:
    content: Any = {**_ARRAYS, "bbox": _BOXES, "image_width": 40, "image_height": 20}
    np.save(folder / "a.npy", content, allow_pickle=True)


def _save_milvlg(folder: Path) -> None:
    info: Any = {"objects_id": _LABELS, "objects_conf": _SURE}
    np.savez(folder / "a.npz", x=_FEATURES, bbox=_BOXES, num_bbox=2, image_h=20, image_w=40, info=info)


def _save_visualbert(folder: Path) -> None:
    np.savez_compressed(folder / "a.png.npz", box_features=_FEATURES, max_conf=_SURE, cls_boxes=_BOXES)


def _save_tensors(new: bool) -> Callable[[Path], None]:
    images = {name: tuple(map(torch.tensor, (_FEATURES, _BOXES, _SURE))) for name in ("a.png", "b.png.npz")}
    return lambda folder: torch.save(images, folder / "x.th", _use_new_zipfile_serialization=new)


READERS = (
    Reader("TSV, bottom-up", _write_tsv(_PLAIN), _read("x.tsv", "bottom-up-attention")),
    Reader("TSV, LXMERT", _write_tsv(_LXMERT), _read("x.tsv", "lxmert-obj36")),
    Reader("TSV, ViLBERT", _write_tsv((*_PLAIN, "probs")), _read("x.tsv", "vilbert-tsv")),
    Reader("HDF5, fixed", _write_hdf5(_UPDN, "x_imgid2idx.pkl", _IDS), _read("x.hdf5", "updn-hdf5")),
    Reader("HDF5, adaptive", _write_hdf5(_BAN, "x_imgid2idx.pkl", _IDS), _read("x.hdf5", "ban-hdf5")),
    Reader("HDF5, groups", _write_groups, _read("x.hdf5", "volta-hdf5")),
    Reader(
        "HDF5, described",
        _write_hdf5(_DESCRIBED, "x.json", _DESCRIPTIONS),
        _read("x.hdf5", "unsupervised-visualbert-hdf5"),
    ),
    Reader(
        "zip, VL-BERT",
        _write_zip(zipfile.ZIP_STORED, image_box_feature=_encode(_FEATURES[0])),
        _read("x.zip", "vlbert-json"),
        least_memory=ARRAYS_MEMORY,
    ),
    Reader(
        "zip, VL-BERT's Conceptual Captions",
        _write_zip(zipfile.ZIP_DEFLATED, classes=_encode(_PROBS)),
        _read("x.zip", "vlbert-cc-json"),
        least_memory=ARRAYS_MEMORY,
    ),
    Reader("LMDB, base64", _write_lmdb(_pickled(_VOLTA, _VOLTA | {"img_id": "9"})), _read("x.lmdb", "volta-lmdb")),
    Reader("LMDB, arrays", _write_lmdb(_pickled(_ARRAYS)), _read("x.lmdb", "vilbert-multitask-lmdb")),
    Reader("LMDB, MMF", _write_lmdb(_pickled(_MMF)), _read("x.lmdb", "mmf-lmdb")),
    Reader(
        "tensorpack, Conceptual Captions",
        _write_lmdb({name: _pack_record(name) for name in ("a", "b")}),
        _read("x.lmdb", "conceptual-captions-lmdb"),
    ),
    Reader("npy, MMF", _save_arrays, _read(".", "mmf-npy")),
    Reader("npy, ViLBERT", _save_dictionary, _read(".", "vilbert-multitask-npy")),
    Reader("npz, MILVLG", _save_milvlg, _read(".", "milvlg-npz"), least_memory=ARRAYS_MEMORY),
    Reader("npz, VisualBERT", _save_visualbert, _read(".", "visualbert-npz"), least_memory=ARRAYS_MEMORY),
    Reader("features by torch, zip", _save_tensors(True), _read("x.th", "visualbert-th"), kind="zip"),
    Reader("features by torch, before 1.6", _save_tensors(False), _read("x.th", "visualbert-th")),
)
