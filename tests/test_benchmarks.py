"""The benchmarks run from end to end at toy sizes and leave a dated result that names what was measured."""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from visling.types import RegionArray

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = "--preset tiny --layers 1 --batch-size 5 --threads 1 --warmup 1 --pairs 2 --product-size 64"
ARGUMENTS = {
    "pretraining": f"--models lxmert visualbert vilbert vlbert {SMALL}",
    "vqa_training": f"--models lxmert visualbert vilbert vlbert {SMALL}",
    "vqa_inference": f"--models lxmert visualbert vilbert vlbert {SMALL}",
    "step_memory": f"--models lxmert visualbert {SMALL}",
    "small_models": "--models visualbert --preset tiny --batch-size 4 --steps 1 --warmup 0 --pairs 2 --threads 1",
    "attention": "--batch-size 3 --threads 1 --warmup 0 --repeats 2",
    "roofline": f"--models lxmert {SMALL}",
    "log_cost": f"--models lxmert {SMALL}",
    "needed": f"--models lxmert cvlp {SMALL}",
    "store": "--images 12 --regions 3 --feature-size 8 --batch-size 4 --threads 1 --warmup 0 --repeats 2",
    "retrieval": (
        "--models vilbert lxmert --preset tiny --images 3 --captions 6 --fewest-regions 2 --regions 4 --batch-size 4 "
        "--sample-images 2 --single-images 1 --threads 1 --repeats 2 --product-size 64"
    ),
    "conversion": "--images 5 --regions 3 --feature-size 8 --threads 1 --warmup 0 --repeats 2",
    "extraction": "--size tiny --images 3 --width 90 --height 60 --threads 1 --repeats 2",
    "region_contrast": "--images 1 2 --regions 4 --queue 96 --width 8 --threads 1 --repeats 2",
    "table": "",
    "gpu": f"{SMALL} --device cpu --precision fp32",
    "serving": (
        "--size tiny --images 30 --steps 2 --clients 5 --questions 2 --documents 1 --rounds 2 --width 90 --height 60"
    ),
    "scale": (
        "--examples 20000000 --world-size 2 --batch-size 4 --sorted-together 2 --batches 2 --lists 1000 --images 50 "
        "--captions 20 --state-mib 1 --repeats 1"
    ),
    "faults": "--only 'path_under_a_file or every_state_is_damaged'",
    "startup": "--images 60 --regions 3 --feature-size 8 --batch-size 4 --threads 1 --repeats 1",
}
WITH_TRANSFORMERS = {"gpu", "needed", "pretraining", "vqa_training", "vqa_inference", "step_memory"}
SHARED = {"measuring", "scale_tables", "drawn_data", "sides", "steps", "transformers_sides", "dense_sides"}
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
        *((name, 1) for name in ARGUMENTS if name not in ("small_models", "startup", "step_memory", "table")),
        pytest.param("region_contrast", 2, marks=pytest.mark.slow),
        pytest.param("step_memory", 2, marks=pytest.mark.slow),
        pytest.param("startup", 2, marks=pytest.mark.slow),
    ],
)
def test_a_benchmark_measures_and_writes(
    load: Callable[[str], ModuleType], name: str, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in WITH_TRANSFORMERS:
        pytest.importorskip("transformers")
    if processes == 1:
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: Here())
    monkeypatch.setattr(load("measuring"), "PRODUCT_SECONDS", 0.0)
    load(name).main([*shlex.split(ARGUMENTS[name]), "--out", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert result["benchmark"] == name
    assert result["not_claimed"]
    assert {"torch", "visling"} <= result["versions"].keys()
    measured = [*found(result, "median"), *(each for one in found(result, "peak_mib") for each in one.values())]
    measured += [each for each in found(result, "gflop") if each]  # computed; what is no product has none
    measured += [each for each in found(result, "seconds") if isinstance(each, float) and each]  # rounded
    assert len(measured) >= 2
    assert all(value > 0 for value in measured)
    assert not result.get("left_out")
    assert not result.get("claims"), "a small model claims nothing"
    page = file.with_suffix(".md").read_text()
    assert result["date"] in page
    assert "nan" not in page


def test_nothing_is_overwritten(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    measuring = load("measuring")
    for number in range(3):
        measuring.write_result(tmp_path, "speed_2026-11-30", {"number": number}, "page")
    names = {file.stem: json.loads(file.read_text())["number"] for file in tmp_path.glob("*.json")}
    assert names == {"speed_2026-11-30": 0, "speed_2026-11-30-2": 1, "speed_2026-11-30-3": 2}
    assert len(list(tmp_path.glob("*.md"))) == 3


def test_sides_that_differ_are_not_timed(load: Callable[[str], ModuleType]) -> None:
    """A nudged matrix of the peer is enough, or one that it does not learn."""
    pytest.importorskip("transformers")
    measuring, sides, peers = load("measuring"), load("sides"), load("transformers_sides")
    options = argparse.Namespace(preset="tiny", layers=1)
    device = torch.device("cpu")
    ours = sides.Answering("lxmert", sides.vqa_config("lxmert", options), device)
    (batch,) = ours.draw(4, 1, device)

    def agree(nudge: float = 0.0, *, frozen: bool = False) -> None:
        theirs = peers.LxmertAnswering(ours, device)
        weight = theirs.module.lxmert.encoder.layer[0].output.dense.weight
        with torch.no_grad():
            weight *= 1 + nudge
        weight.requires_grad_(not frozen)
        pair = {"visling": ours, "transformers": theirs}
        trained = {name: measuring.Trained(side, device, "fp32") for name, side in pair.items()}
        fed = {name: side.feed(*batch) for name, side in pair.items()}
        measuring.check_agreement(trained, fed, "fp32")

    agree()
    with pytest.raises(SystemExit, match="the sides disagree, nothing is timed: loss "):
        agree(0.1)
    with pytest.raises(SystemExit, match="the sides disagree, nothing is timed: gradient norms differ by up to "):
        agree(frozen=True)
    with pytest.raises(SystemExit, match=r"outputs of a and b differ by up to 0\.5"):
        measuring.require_equal_outputs({"a": torch.zeros(2), "b": torch.full((2,), 0.5)}, "fp32")


def test_the_table_puts_the_last_claims_of_a_day_beside_their_targets(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    claim = load("measuring").claim
    written = {
        "pretraining_2026-11-30_a": [claim("LXMERT", "ratio", 1.1, 1.25), claim("LXMERT", "efficiency", 0.8, 0.75)],
        "pretraining_2026-11-30_b": [claim("LXMERT", "ratio", 1.3, 1.25)],
        "step-memory_2026-11-30": [
            claim("LXMERT, memory", "share", 0.7, 0.6, better="lower"),
            claim("VisualBERT, memory", "share", None, 0.6, better="lower"),
        ],
        "pretraining_2026-11-29": [claim("yesterday", "ratio", 9.0, 1.0)],
    }
    for number, (name, claims) in enumerate(written.items()):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"benchmark": "pretraining", "settings": {"precision": "fp32"}, "claims": claims}))
        os.utime(file, (number, number))
    table = load("table")
    table.main(["--out", str(tmp_path), "--date", "2026-11-30"])
    result = json.loads((tmp_path / "table_2026-11-30.json").read_text())
    assert [(each["work"], each["what"], each["measured"], each["met"]) for each in result["claims"]] == [
        ("LXMERT", "efficiency", 0.8, True),
        ("LXMERT", "ratio", 1.3, True),
        ("LXMERT, memory", "share", 0.7, False),
        ("VisualBERT, memory", "share", None, None),
    ]
    page = (tmp_path / "table_2026-11-30.md").read_text()
    assert "| LXMERT | fp32 | ratio | 1.30 | at least 1.25 | met | [file](pretraining_2026-11-30_b.md) |" in page
    assert "2 met, 1 not met, 1 not measured." in page
    with pytest.raises(SystemExit, match=r"no result of 2026-12-01 .* makes a claim"):
        table.main(["--out", str(tmp_path), "--date", "2026-12-01"])


def test_an_older_checkout_is_measured_in_turn(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = load("small_models")
    module.main([*ARGUMENTS["small_models"].split(), "--against", str(FOLDER.parent), "--out", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    works = json.loads(file.read_text())["works"]
    assert [one["work"] for one in works] == ["pre-training step", "answering"]
    for one in works:
        here, older = (one["seconds"][side]["all"] for side in ("here", "older"))
        assert len(here) == len(older) == 2
        assert one["ratio"]["all"] == pytest.approx([b / a for a, b in zip(here, older, strict=True)], rel=1e-4)
    assert str(FOLDER.parent) not in file.read_text(), "results name no folder"
    assert "| visualbert | answering |" in file.with_suffix(".md").read_text()
    with pytest.raises(SystemExit, match="is no checkout"):
        module.main([*ARGUMENTS["small_models"].split(), "--against", str(tmp_path), "--out", str(tmp_path)])


def test_the_time_of_a_gpu_bounds_what_is_measured(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("gpu")

    def refuse(*_: object) -> dict[str, Any]:
        raise SystemExit("the sides disagree, nothing is timed")

    monkeypatch.setattr(module, "MEASURES", {**module.MEASURES, "pre-training": refuse})
    for seconds, why in ((60, "the sides disagree, nothing is timed"), (-1, "the time was up")):
        folder = tmp_path / str(seconds)
        arguments = f"{ARGUMENTS['gpu']} --models vilbert --works pre-training --seconds {seconds} --out {folder}"
        module.main(arguments.split())
        (file,) = folder.glob("*.json")
        result = json.loads(file.read_text())
        assert result["left_out"]["vilbert, pre-training"] == why
        assert f"Not measured: vilbert, pre-training: {why}" in file.with_suffix(".md").read_text()
        assert (result["feed"] is None) == (seconds < 0)


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
