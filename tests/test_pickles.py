"""Pickled annotations are read without ever running what they name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visling.errors import DataError
from visling.pickles import read_object_array, read_pickle


class Harmful:
    """Would make a folder when it is unpickled by Python's own reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


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
