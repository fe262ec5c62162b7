"""Weight files, model folders and detectors."""

from __future__ import annotations

import sys
import tarfile
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz.promises import check_tensors, find_one
from fuzz.readers.base import Reader
from safetensors.torch import save_file

from visling import models
from visling.checkpoints import files
from visling.data.text import Tokenizer
from visling.pretrained.folder import describe_model_folder, read_model_folder
from visling.vision import detectors

_WEIGHTS = {
    "bert.embeddings.weight": torch.arange(12.0).reshape(4, 3),
    "bert.layer.weight": torch.ones(3, 3, dtype=torch.float16),
    "bert.layer.bias": torch.zeros(3, dtype=torch.int64),
}


def _read(folder: Path) -> None:
    check_tensors(files.read(find_one(folder, "w.*")))


def _save(name: str, content: Any, *, new: bool) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / name, _use_new_zipfile_serialization=new)


class _Settings:
    """Settings of somebody's script, kept with the weights."""

    rate: float


def _save_state(name: str, *, new: bool) -> Callable[[Path], None]:
    """Weights next to an object of a class that is defined elsewhere."""

    def write(folder: Path) -> None:
        module, settings = types.ModuleType("somebodys_script"), _Settings()
        settings.rate = 0.1
        module.Settings = _Settings  # type: ignore[attr-defined]
        _Settings.__module__, _Settings.__qualname__, _Settings.__name__ = "somebodys_script", "Settings", "Settings"
        sys.modules["somebodys_script"] = module
        try:
            torch.save(_STATE | {"settings": settings}, folder / name, _use_new_zipfile_serialization=new)
        finally:
            del sys.modules["somebodys_script"]

    return write


def _pack(name: str, inner: str, mode: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as outside, tarfile.open(folder / name, mode) as archive:  # type: ignore[call-overload]
            for file in (inner, "config.json"):
                path = Path(outside) / file
                if file.endswith(".safetensors"):
                    save_file(_WEIGHTS, path)
                elif file.endswith(".bin"):
                    torch.save(_WEIGHTS, path)
                else:
                    path.write_text("{}")
                archive.add(path, file)

    return write


_STATE = {
    "model": {f"module.{name}": value for name, value in _WEIGHTS.items()},
    "epoch": 3,
}


def _write_model_folder(folder: Path) -> None:
    spec = models.spec("visualbert")
    config = spec.presets["tiny"] if "tiny" in spec.presets else next(iter(spec.presets.values()))
    describe_model_folder(
        folder,
        model="visualbert",
        config=config,
        task=None,
        text_only=False,
        fingerprint="det-1",
        tokenizer=Tokenizer(),
        trained="for a test",
    )
    (folder / "vocab.txt").unlink()  # of 30,000 lines; read by another reader
    save_file(_WEIGHTS, folder / "model.safetensors")


def _read_model_folder(folder: Path) -> None:
    saved = read_model_folder(folder)
    check_tensors(saved.weights)
    assert isinstance(saved.model, str)
    assert isinstance(saved.fingerprint, str)


def _read_detector(folder: Path) -> None:
    detectors.read_description(folder)


def _write_detector(folder: Path) -> None:
    (folder / "config.json").write_text('{"format": "visling detector 1", "config": {"long_side": 64}}')


READERS = (
    Reader("checkpoints, safetensors", lambda folder: save_file(_WEIGHTS, folder / "w.safetensors"), _read),
    Reader("checkpoints, torch zip", _save("w.bin", _WEIGHTS, new=True), _read, kind="zip"),
    Reader("checkpoints, torch before 1.6", _save("w.pth", _WEIGHTS, new=False), _read),
    Reader("checkpoints, torch zip with settings", _save_state("w.pt", new=True), _read, kind="zip"),
    Reader("checkpoints, torch before 1.6 with settings", _save_state("w.th", new=False), _read),
    Reader("checkpoints, tar", _pack("w.tar", "m.safetensors", "w"), _read),
    Reader("checkpoints, tar.gz", _pack("w.tar.gz", "m.bin", "w:gz"), _read),
    Reader("checkpoints, model folder", _write_model_folder, _read_model_folder),
    Reader("checkpoints, detector", _write_detector, _read_detector),
)
