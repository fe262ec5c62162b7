"""Weight files of every kind; wrappers; files that would run code; damaged files."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from visling.checkpoints import catalog, files
from visling.errors import CheckpointError

WEIGHTS = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)}


def same(found: dict[str, Tensor]) -> None:
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("name", ["w.bin", "w.pth", "w.model", "w.th", "w.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    same(files.read(tmp_path / name))


def test_safetensors(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    same(files.read(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_archives(tmp_path: Path, name: str) -> None:
    if name.endswith(".bin"):
        torch.save(WEIGHTS, tmp_path / name)
    else:
        save_file(WEIGHTS, tmp_path / name)
    (tmp_path / "bert_config.json").write_text("{}")
    with tarfile.open(tmp_path / "bert.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / name, name)
        archive.add(tmp_path / "bert_config.json", "bert_config.json")
    same(files.read(tmp_path / "bert.tar.gz"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": {"module." + name: tensor for name, tensor in weights.items()}, "optimizer": {}},
        lambda weights: {"_orig_mod.module." + name: tensor for name, tensor in weights.items()},
        lambda weights: {"loss": torch.tensor(0.5), "global_step": torch.tensor(3), "model_state_dict": weights},
        lambda weights: {"model": {"model_state_dict": weights, "step": torch.tensor(3)}, "loss": torch.tensor(0.5)},
        lambda weights: {"model": {"name": "bert"}, **weights},
    ],
)
def test_containers_and_wrappers_are_taken_off(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    torch.save(wrap(WEIGHTS), tmp_path / "w.pth")
    same(files.read(tmp_path / "w.pth"))


def test_a_prefix_that_some_names_lack_stays() -> None:
    assert files.strip_wrappers({"module.a": torch.zeros(1), "b": torch.zeros(1)}).keys() == {"module.a", "b"}


@pytest.mark.parametrize("zipped", [True, False])
def test_settings_of_foreign_classes_do_not_hinder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    module = types.ModuleType("somebodys_script")
    module.Settings = type("Settings", (), {"__module__": "somebodys_script"})  # type: ignore[attr-defined]
    settings = module.Settings()
    settings.rate = 0.1
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "somebodys_script", module)
        torch.save(
            {"state_dict": WEIGHTS, "settings": settings}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped
        )
    assert "somebodys_script" not in sys.modules
    same(files.read(tmp_path / "w.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_state_with_a_logger_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    """VOLTA's pytorch_ckpt_latest.tar: no archive, and with an object of a class of its own, which is written in small
    letters."""
    called: list[str] = []
    module = types.ModuleType("volta.utils")

    class tbLogger:
        def __getstate__(self) -> dict[str, Any]:
            return {"task_id2name": {"TASK1": "VQA"}, "losses": [0.5], "rank": 0}

        def __setstate__(self, state: Any) -> None:
            called.append("state")

        def __init__(self) -> None:
            called.append("init")

    tbLogger.__module__, tbLogger.__qualname__ = "volta.utils", "tbLogger"
    module.tbLogger = tbLogger  # type: ignore[attr-defined]
    states = {"model_state_dict": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}, "global_step": 3}
    monkeypatch.setitem(sys.modules, "volta", types.ModuleType("volta"))
    monkeypatch.setitem(sys.modules, "volta.utils", module)
    torch.save(
        {**states, "tb_logger": tbLogger(), "again": tbLogger()},
        tmp_path / "pytorch_ckpt_latest.tar",
        _use_new_zipfile_serialization=zipped,
    )
    called.clear()
    same(files.read(tmp_path / "pytorch_ckpt_latest.tar"))  # although the class is there to be imported
    assert not called


def touch_a_file(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_foreign_function_is_refused_and_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    module = types.ModuleType("somebodys_script")
    module.touch_a_file = touch_a_file  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_script", module)
    monkeypatch.setattr(touch_a_file, "__module__", "somebodys_script")

    class Calls:
        def __reduce__(self) -> Any:
            return touch_a_file, (str(tmp_path / "touched"),)

    torch.save({"state_dict": WEIGHTS, "x": Calls()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="might run code"):
        files.read(tmp_path / "w.pth")
    assert not (tmp_path / "touched").exists()


class Harmful:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Evaluates:
    """Calls a builtin when unpickled."""

    def __reduce__(self) -> Any:
        return eval, ("1 + 1",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    for harm in (Harmful(tmp_path / "touched"), Evaluates()):
        torch.save({"state_dict": WEIGHTS, "x": harm}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="might run code"):
            files.read(tmp_path / "w.pth")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Harmful(tmp_path / "touched")))
    with pytest.raises(CheckpointError):
        files.read(tmp_path / "plain.bin")
    assert not (tmp_path / "touched").exists()


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"abc")
    assert files.digest(tmp_path / "w") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def truncated(path: Path, size: int) -> None:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer)
    path.write_bytes(buffer.getvalue()[:size])


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.tar.gz"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(CheckpointError, match="no weight file"):
        files.read(path)
    for size in (0, 10, 400):
        truncated(path, size)
        with pytest.raises(CheckpointError):
            files.read(path)


def test_files_without_weights(tmp_path: Path) -> None:
    for content, message in (({"epoch": 3}, "found epoch"), ([1, 2], "holds a list"), ({}, "found nothing")):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=message):
            files.read(tmp_path / "w.pth")
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.add(tmp_path / "w.pth", "notes.txt")
    with pytest.raises(CheckpointError, match="found none"):
        files.read(tmp_path / "w.tar")


def test_catalogue_finds_by_name_and_hides_no_unknown() -> None:
    names = [release.name for release in catalog.RELEASED_FILES]
    assert len(set(names)) == len(names)
    assert {release.family for release in catalog.RELEASED_FILES} == {
        "visualbert",
        "vlbert",
        "vilbert",
        "lxmert",
        "cvlp",
    }
    assert catalog.find("vqa_fine_tuned").heads["classifier"].outputs == 3129
    assert all(
        release.licence and release.source.startswith(("https://", "http://nlp.cs.unc.edu/"))
        for release in catalog.RELEASED_FILES
    )
    with pytest.raises(CheckpointError, match="Did you mean 'vqa_fine_tuned'"):
        catalog.find("vqa_fine_tune")
