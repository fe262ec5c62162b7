"""Pickled annotations are read without ever running what they name."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.errors import DataError
from visling.pickles import load_pickle, read_array, read_arrays, read_object_array, read_pickle


class Harmful:
    """Would make a folder when it is unpickled by Python's own reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


class Calls:
    """Would call a function when it is unpickled by Python's own reader."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_numbers_text_and_arrays_are_read(tmp_path: Path, protocol: int) -> None:
    content = [{"ref_id": 1, "tokens": ("a", "ä"), "raw": b"x\xff", "area": 1.5, "none": None, "set": {1, 2}}]
    (tmp_path / "a.p").write_bytes(pickle.dumps(content, protocol))
    assert read_pickle(tmp_path / "a.p") == content
    arrays = {"pool": np.arange(6.0).reshape(2, 3), "number": np.int64(3), "names": np.array(["a", "bc"])}
    (tmp_path / "b.p").write_bytes(pickle.dumps(arrays, protocol))
    found = read_pickle(tmp_path / "b.p")
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in arrays.items()
    }


def test_python_2_and_numpy_1_are_read(golden: Path) -> None:
    assert isinstance(read_pickle(golden / "vilbert_tasks" / "refer" / "data" / "refcoco+" / "refs(unc).p"), list)
    entries = read_object_array(golden / "vlbert_tasks" / "vqa" / "data" / "vqa" / "vqa_imdb" / "imdb_train2014.npy")
    assert all("question_id" in entry for entry in entries[1:])


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_files_that_would_run_code_are_refused(tmp_path: Path, protocol: int) -> None:
    folder = tmp_path / "made"
    (tmp_path / "a.p").write_bytes(pickle.dumps({"x": Harmful(folder)}, protocol))
    with pytest.raises(DataError, match=r"a\.p is not read: it names (posix|nt)\.mkdir, which no data file needs"):
        read_pickle(tmp_path / "a.p")
    np.save(tmp_path / "a.npy", np.array([Harmful(folder), 1], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"a\.npy is not an array that can be read: it names"):
        read_object_array(tmp_path / "a.npy")
    assert not folder.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_names_that_could_do_harm_are_refused(tmp_path: Path, protocol: int) -> None:
    command = f"touch {tmp_path / 'made'}"
    for harmful, name in (
        (Calls(os.system, command), r"(posix|nt)\.system"),
        (Calls(builtins.eval, f"__import__('os').system({command!r})"), r"(builtins|__builtin__)\.eval"),
        (Calls(builtins.exec, "1"), r"(builtins|__builtin__)\.exec"),
        (Calls(builtins.getattr, "x", "upper"), r"(builtins|__builtin__)\.getattr"),
        (Calls(builtins.open, str(tmp_path / "made"), "w"), r"_?io\.open"),
        (Calls(subprocess.Popen, command), r"(subprocess|commands)\.Popen"),
        (Calls(np.load, str(tmp_path / "made")), r"numpy\.load"),
        (np.memmap, r"numpy\.memmap"),
        (Path("x"), r"pathlib"),
    ):
        for content in (harmful, [{"deep": (harmful,)}], {"array": np.array([harmful, None], dtype=object)}):
            with pytest.raises(DataError, match=rf"^here is not read: it names {name}.*could execute code"):
                load_pickle(pickle.dumps(content, protocol), "here")
    assert not (tmp_path / "made").exists()


def test_a_name_is_looked_up_in_no_other_way() -> None:
    """Attributes of permitted names, extension codes and references to the outside lead nowhere."""
    for content in (
        b"cbuiltins\ndict.fromkeys\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x0cdict.mro.foo\x93.",
        b"\x80\x02\x82\x01.",
        b"Pid\n.",
        b"cbuiltins\n__import__\n(S'os'\ntR.",
    ):
        with pytest.raises(DataError, match=r"^here is not read: "):
            load_pickle(content, "here")
    assert load_pickle(b"Pid\n.", "here", load_persistent=lambda reference: [reference]) == ["id"]
    assert load_pickle(b"cmine\nname\n.", "here", names={("mine", "name"): 7}) == 7


def test_text_of_python_2_is_text_unless_bytes_are_wanted() -> None:
    content = b"(dp0\nS'image_id'\np1\nS'caf\\xe9'\np2\ns."  # protocol 0 of Python 2
    assert load_pickle(content, "here") == {"image_id": "caf\xe9"}
    assert load_pickle(content, "here", encoding="bytes") == {b"image_id": b"caf\xe9"}


def test_pickles_follow_one_another_in_a_file() -> None:
    file = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps({"a": 2}, 4) + b"rest")
    assert [load_pickle(file, "here"), load_pickle(file, "here")] == [[1], {"a": 2}]  # type: ignore[arg-type]
    assert file.read() == b"rest"


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_of_both_numpys_are_read(module: bytes) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = pickle.dumps({"array": array, "number": array[0, 1]}, 2)
    assert b"numpy._core.multiarray" in content
    found = load_pickle(content.replace(b"numpy._core.multiarray", module), "here")
    np.testing.assert_array_equal(found["array"], array)
    assert found["number"] == 1


def test_arrays_of_files_are_read(tmp_path: Path) -> None:
    info = {"bbox": np.ones((2, 4)), "names": ["a", "b"], "deep": np.array([{"x": [1]}, None], dtype=object)}
    np.save(tmp_path / "info.npy", info, allow_pickle=True)
    assert read_array(tmp_path / "info.npy").shape == ()
    assert read_array(tmp_path / "info.npy").item()["deep"].tolist() == [{"x": [1]}, None]
    np.save(tmp_path / "plain.npy", np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    np.testing.assert_array_equal(read_array(tmp_path / "plain.npy"), np.arange(6.0).reshape(2, 3))
    np.savez(tmp_path / "a.npz", x=np.arange(3), info=np.array(info))
    found = read_arrays(tmp_path / "a.npz")
    assert found["x"].tolist() == [0, 1, 2]
    assert found["info"].item()["names"] == ["a", "b"]
    with pytest.raises(DataError, match=r"info\.npy holds an array of shape \(\); expected a list"):
        read_object_array(tmp_path / "info.npy")


def test_a_header_that_lies_about_its_objects_is_noticed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content.replace(b"(2,)", b"(3,)"))
    with pytest.raises(DataError, match=r"its header says shape \(3,\)"):
        read_array(tmp_path / "a.npy")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"a\.npz is not a file of arrays that can be read"):
        read_arrays(tmp_path / "a.npz")
    with pytest.raises(DataError, match="no file"):
        read_arrays(tmp_path / "absent.npz")
    with pytest.raises(DataError, match="cannot read"):
        read_array(tmp_path)


def test_an_array_too_large_for_an_image_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1000))
    assert read_arrays(tmp_path / "a.npz")["x"].shape == (1000,)
    monkeypatch.setattr("visling.pickles._LARGEST_MEMBER", 8000)
    with pytest.raises(DataError, match=r"a\.npz is not a file of arrays .*x\.npy unpacks to 8128 bytes"):
        read_arrays(tmp_path / "a.npz")


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    whole = pickle.dumps(list(range(1000)))
    (tmp_path / "cut.p").write_bytes(whole[:500])
    with pytest.raises(DataError, match=r"cut\.p is not read"):
        read_pickle(tmp_path / "cut.p")
    with pytest.raises(DataError, match="no file"):
        read_pickle(tmp_path / "absent.p")
    np.save(tmp_path / "whole.npy", np.array([{"a": 1}, {"b": 2}], dtype=object), allow_pickle=True)
    assert read_object_array(tmp_path / "whole.npy") == [{"a": 1}, {"b": 2}]
    content = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-4])
    with pytest.raises(DataError, match=r"cut\.npy is not an array that can be read"):
        read_object_array(tmp_path / "cut.npy")
    with pytest.raises(DataError, match="no file"):
        read_object_array(tmp_path / "absent.npy")
