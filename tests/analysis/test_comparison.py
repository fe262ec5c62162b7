"""The pages of a comparison: every number is there, an unfinished one says so, and nothing in the file can break the
page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.result_pages import Page, assert_stands_alone, read_cells

from visling.analysis.comparison import write_comparison
from visling.errors import RunError

ATTACK = '<script>alert("x")</script>|'


def spread(*values: float) -> dict[str, Any]:
    """As comparison.json has it; the standard deviation of two values is their distance over the root of two."""
    mean = sum(values) / len(values) if values else None
    deviation = abs(values[0] - values[1]) / 2**0.5 if len(values) == 2 else None
    return {"mean": mean, "spread": deviation, "values": {str(seed): value for seed, value in enumerate(values)}}


def row(model: str, **changes: Any) -> dict[str, Any]:
    effort = {"parameters": 412345, "updates": spread(40, 40), "seconds": spread(20.0, 22.0)}
    starts = {
        "pre-trained": {**effort, "score": spread(60.0, 64.0)},
        "from scratch": {**effort, "score": spread(50.0, 51.0)},
    }
    return {
        "task": "vqa-scenes",
        "model": model,
        "metric": "accuracy",
        "examples": 2500,
        "pretraining": {"parameters": 500000, "updates": spread(900, 900), "seconds": spread(1200.0, 1300.0)},
        "starts": starts,
        "gains": {"from scratch": spread(10.0, 13.0)},
    } | changes


def comparison() -> dict[str, Any]:
    config = {
        "pretrain": {"batch_size": 32},
        "vqa-scenes": {"batch_size": 16, "train_split": "train", "train_limit": 500, "note": ATTACK},
    }
    return {
        "format": 1,
        "status": "finished",
        "jobs": [1, 2],
        "runs": {"ended": 12, "planned": 12},
        "plan": {
            "models": ["visualbert", "lxmert"],
            "recipe": "scenes",
            "tasks": ["vqa-scenes"],
            "seeds": 2,
            "split": "test",
            "updates": 900,
            "pretrain_settings": [],
            "finetune_settings": ["train_limit=500", ATTACK],
            "data": f"/data/{ATTACK}",
            "examples": {"vqa-scenes": {"splits": {"train": 9000, "val": 100, "test": 2500}, "digest": "d"}},
            "fingerprint": "0123456789abcdef",
            "feature_size": 256,
            "device": "cpu",
            "versions": {"torch": "2.13"},
            "configs": {"visualbert": config, "lxmert": config},
            "differences": {"pretrain": {"objectives.matching": {"visualbert": 1.0, "lxmert": None}}, "vqa-scenes": {}},
        },
        "rows": [row("visualbert"), row("lxmert", gains={"from scratch": spread(-2.0, -2.5)})],
        "baselines": {"vqa-scenes": {"majority answer per question type": 29.74}},
    }


def written(folder: Path, found: dict[str, Any]) -> tuple[str, Page, str]:
    """Markdown, page and the page's source."""
    (folder / "comparison.json").write_text(json.dumps(found))
    text, page = write_comparison(folder)
    assert (text, page) == (folder / "comparison.md", folder / "comparison.html")
    source = page.read_text(encoding="utf-8")
    return text.read_text(encoding="utf-8"), Page(source), source


def test_every_number_is_in_both(tmp_path: Path) -> None:
    text, page, _ = written(tmp_path, comparison())
    expected = [
        [
            "model",
            "parameters",
            "pre-training",
            "fine-tuning",
            "fine-tuning updates",
            "pre-trained",
            "from scratch",
            "pre-trained minus from scratch",
        ],
        ["visualbert", "412,345", "1,250 ± 71 s", "21 ± 1 s", "40", "62.0 ± 2.8", "50.5 ± 0.7", "+11.5 ± 2.1"],
        ["lxmert", "412,345", "1,250 ± 71 s", "21 ± 1 s", "40", "62.0 ± 2.8", "50.5 ± 0.7", "-2.2 ± 0.4"],
        ["model", "start", "seed 0", "seed 1"],
        ["visualbert", "pre-trained", "60.0", "64.0"],
        ["visualbert", "from scratch", "50.0", "51.0"],
        ["lxmert", "pre-trained", "60.0", "64.0"],
        ["lxmert", "from scratch", "50.0", "51.0"],
        ["setting", "visualbert", "lxmert"],
        ["objectives.matching", "1.0", "null"],
    ]
    assert read_cells(text) == expected
    assert page.rows == expected
    for words in (text, "".join(page.words)):
        for fact in (
            "accuracy in percent on 2,500 examples",
            "Baselines without a model: majority answer per question type: 29.7.",
            "900 updates of 32 examples",
            "500 of 9,000 labelled examples, batches of 16",
            "fingerprint 0123456789ab, width 256",
            "runs in parallel: 1 or 2",
            "torch 2.13",
        ):
            assert fact in words
        assert "Not finished" not in words


def test_a_comparison_under_way_says_so(tmp_path: Path) -> None:
    found = comparison() | {"status": "running", "runs": {"ended": 3, "planned": 12}, "baselines": {}}
    found["rows"][1] = row(
        "lxmert",
        pretraining={},
        starts={start: {"score": spread()} for start in ("pre-trained", "from scratch")},
        gains={"from scratch": spread()},
    )
    found["rows"][0]["starts"]["pre-trained"] |= {"score": spread(60.0), "updates": spread(40)}
    del found["rows"][1]["examples"]
    text, page, _ = written(tmp_path, found)
    assert "Not finished: 3 of 12 runs have ended" in text
    assert "Not finished: 3 of 12 runs have ended" in "".join(page.words)
    assert read_cells(text) == page.rows
    assert page.rows[1][4:6] == ["40", "60.0"]
    assert page.rows[2] == ["lxmert", *["–"] * 7]
    assert page.rows[4] == ["visualbert", "pre-trained", "60.0", "–"]


def test_nothing_in_the_file_breaks_the_pages(tmp_path: Path) -> None:
    text, _, source = written(tmp_path, comparison())
    assert_stands_alone(source)
    assert "<script" not in text


def test_a_folder_without_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"visling compare wrote"):
        write_comparison(tmp_path)
    for content, message in (
        ("{", "cannot read"),
        ('{"plan": {}}', "not a comparison of this version"),
        ("[]", "not a comparison"),
    ):
        (tmp_path / "comparison.json").write_text(content)
        with pytest.raises(RunError, match=message):
            write_comparison(tmp_path)
    assert not (tmp_path / "comparison.md").exists()
