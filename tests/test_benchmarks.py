"""The benchmarks run from end to end at toy sizes and leave a dated result that names what was measured."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from visling.types import RegionArray

FOLDER = Path(__file__).parents[1] / "benchmarks"
ARGUMENTS = {
    "training_step": (
        "--case small --layers 1 --batch-size 2 --tokens 32 --regions 12 --threads 1 --warmup 1 --repeats 2"
    ),
    "store": "--images 12 --regions 3 --feature-size 8 --batch-size 4 --threads 1 --warmup 0 --repeats 2",
    "retrieval": (
        "--models vilbert lxmert --images 3 --captions 6 --regions 4 --batch-size 4 --sample-images 2 "
        "--single-images 1 --threads 1 --repeats 2"
    ),
    "conversion": "--images 5 --regions 3 --feature-size 8 --threads 1 --warmup 0 --repeats 2",
    "extraction": "--size tiny --images 3 --width 90 --height 60 --threads 1 --repeats 2",
    "region_contrast": "--images 1 2 --regions 4 --queue 96 --width 8 --threads 1 --repeats 2",
}

SHARED = {"measuring", "drawn_data"}
"""Modules of the folder that are no scripts."""


class Here:
    """Stands for a new process: what would run there runs here."""

    def Pool(self, *_: object, **__: object) -> Here:
        return self

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def apply(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return work(*arguments)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a benchmark as its script finds its neighbours: the folder is on the path."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in (*ARGUMENTS, *SHARED):
        if name not in before:
            sys.modules.pop(name, None)


def test_every_benchmark_is_run_here_listed_and_made() -> None:
    names = {file.stem for file in FOLDER.glob("*.py")} - SHARED
    assert names == set(ARGUMENTS)
    page, makefile = (
        (FOLDER / "README.md").read_text(encoding="utf-8"),
        (FOLDER.parent / "Makefile").read_text(encoding="utf-8"),
    )
    for name in names:
        assert f"| `{name}.py` |" in page
        assert f"benchmarks/{name}.py --out benchmarks/results" in makefile


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("store", 1),
        ("region_contrast", 1),
        ("retrieval", 1),
        ("conversion", 1),
        ("extraction", 1),
        pytest.param("region_contrast", 2, marks=pytest.mark.slow),
        pytest.param("training_step", 2, marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_measures_and_writes(
    load: Callable[[str], ModuleType], name: str, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "training_step":
        pytest.importorskip("transformers")
    if processes == 1:
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: Here())
    module = load(name)
    runs = 2 if processes == 1 else 1  # new processes import everything again
    for _ in range(runs):
        module.main([*ARGUMENTS[name].split(), "--out", str(tmp_path)])
    written = sorted(tmp_path.glob("*.json"))
    assert len(written) == len(list(tmp_path.glob("*.md"))) == runs, "nothing is overwritten"
    for file in written:
        result = json.loads(file.read_text())
        assert result["benchmark"] == name
        assert result["not_claimed"]
        assert {"torch", "visling"} <= result["versions"].keys()
        medians = list(found(result, "median"))
        assert len(medians) >= 3
        assert all(median > 0 for median in medians)
        page = file.with_suffix(".md").read_text()
        assert result["date"] in page
        assert "nan" not in page


def test_extraction_names_what_the_port_lacks(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    (tmp_path / "utils.py").touch()
    with pytest.raises(SystemExit, match=r"lacks modeling_frcnn\.py, processing_image\.py: copy them from"):
        load("extraction").main([*ARGUMENTS["extraction"].split(), "--port", str(tmp_path), "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.json"))


def test_extraction_refuses_to_time_sides_that_differ(load: Callable[[str], ModuleType]) -> None:
    module, rng = load("extraction"), np.random.default_rng(0)
    boxes = np.cumsum(rng.random((4, 4), np.float32) + 1, axis=0) * 9
    ours = RegionArray(features=rng.random((4, 8), np.float32), boxes=boxes, size=(200, 200))
    theirs: dict[str, Any] = {
        "preds_per_image": np.array([4]), "boxes": boxes[None, ::-1], "roi_features": ours.features[None, ::-1]
    }  # fmt: skip
    assert module.check_agreement({"1": ours}, {"1": theirs}, 4) == 0
    for change in (
        {"boxes": boxes[None] + [[[30.0]]]},
        {"roi_features": ours.features[None, ::-1] + 0.1},
        {"preds_per_image": np.array([3])},
    ):
        with pytest.raises(SystemExit, match=r"differ|regions"):
            module.check_agreement({"1": ours}, {"1": {**theirs, **change}}, 4)


def found(value: Any, key: str) -> Iterator[Any]:
    """Everything under a key, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            else:
                yield from found(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from found(inner, key)
