"""The report page: complete for a finished run, and honest about whatever an unfinished one lacks."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visling.analysis.examples import sample_evenly
from visling.analysis.report import write_report
from visling.errors import DataError, RunError
from visling.regions.writer import StoreWriter
from visling.types import RegionArray

ATTACK = '<script>alert("x")</script>'
VOID = {"meta", "img", "br", "line", "polyline", "circle"}


class Page(HTMLParser):
    """Elements, texts and unbalanced tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


class Store:
    """Two regions for one image."""

    feature_size = 4
    fingerprint = "test"
    class_names = ("circle", "square")
    attribute_names = ("red", "blue")

    def __contains__(self, image_id: str) -> bool:
        return image_id == "scene_000000000001"

    def __getitem__(self, image_id: str) -> RegionArray:
        boxes = np.array([[4, 4, 30, 30], [40, 50, 60, 62]], dtype=np.float32)
        return RegionArray(features=np.zeros((2, 4), np.float16), boxes=boxes, size=(64, 64), classes=np.array([0, 1]))

    def __len__(self) -> int:
        return 1


def make_run(path: Path, **changes: Any) -> Path:
    """A small finished run; `changes` replace fields of run.json."""
    path.mkdir()
    about = {
        "command": "visling finetune --recipe vqa",
        "recipe": "vqa",
        "task": "vqa",
        "model": "visualbert",
        "config": {"train": {"epochs": 3, "lr": 2e-5}, "note": ATTACK},
        "versions": {"torch": "2.13", "visling": "0.1.0"},
        "parameters": 11234567,
        "seed": 0,
        "status": "finished",
        "started": "2030-01-01T10:00:00",
        "finished": "2030-01-01T10:24:00",
    }
    (path / "run.json").write_text(json.dumps(about | changes))
    with (path / "log.jsonl").open("w") as log:
        for step in range(1, 1001):
            parts = {"answer": 3 / step, "masked_lm": 2 + 1 / step}
            entry = {
                "kind": "train",
                "step": step,
                "epoch": step / 400,
                "loss": sum(parts.values()),
                "parts": parts,
                "lr": 1e-4,
                "seconds": step * 1.44,
            }
            machine = {"examples_per_second": 900.0, "data_wait": 0.25, "memory": 3_000_000_000, "utilisation": 0.5}
            log.write(json.dumps(entry | machine) + "\n")
        for step in (400, 800):
            log.write(
                json.dumps(
                    {"kind": "valid", "step": step, "epoch": step / 400, "scores": {"accuracy": step / 20, "loss": 1.5}}
                )
                + "\n"
            )
        log.write(json.dumps({"kind": "event", "message": f"best so far {ATTACK}"}) + "\n")
    by = {"colour": {"value": 75.0, "count": 512}, "count": {"value": 50.0, "count": 256}}
    evaluation = {
        "task": "vqa",
        "split": "test",
        "scores": {
            "accuracy": {"value": 61.23, "count": 8192, "low": 60.1, "high": 62.3},
            "median_rank": {"value": 1.0, "count": 8192},
        },
        "by": {"question_type": by},
        "baselines": {
            "question only": {
                "scores": {"accuracy": {"value": 40.0, "count": 8192}},
                "by": {"question_type": {"colour": {"value": 33.0}}},
            }
        },
    }
    (path / "evaluation_test.json").write_text(json.dumps(evaluation))
    with (path / "details_test.jsonl").open("w") as details:
        for number in range(40):
            row = {
                "id": f"q{number}",
                "image": f"scene_{number:012d}",
                "text": f"What colour is it? {ATTACK if number < 4 else number}",
                "type": "colour" if number % 4 else "count",
                "truth": ["red", "red", "blue"],
                "prediction": "red" if number % 2 else "blue",
                "confidence": 0.8,
                "top": [["red", 0.8], [ATTACK, 0.1]],
                "score": float(number % 2),
            }
            details.write(json.dumps(row) + "\n")
    return path


def make_pictures(path: Path, numbers: range) -> Path:
    (path / "deep").mkdir(parents=True)
    for number in numbers:
        Image.new("RGB", (64, 64), (number * 6, 90, 120)).save(path / "deep" / f"scene_{number:012d}.PNG")
    return path


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run_is_reported_in_full(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    images = make_pictures(tmp_path / "images", range(40))
    path = write_report(run, images=images, store=Store(), examples=40)
    assert path == run / "report.html"
    page = read(path)
    for words in (
        "61.2 % accuracy on test over 8,192 examples, 95 % interval 60.1 % to 62.3 %",
        "21.2 points above the best baseline (question only: 40.0 %)",
        "11,234,567",
        "24 min",
        "visling finetune --recipe vqa",
        "2.13",
        '"epochs": 3',
        "Truth: red, blue",
    ):
        assert words in page.text, words
    assert "median_rank 1 – 8,192" in page.text, "a rank is not in percent"
    assert "What is missing" not in page.text
    assert len(page.all("img")) == 40
    assert sum("with 2 regions drawn" in (image["alt"] or "") for image in page.all("img")) == 1
    charts = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    assert [label.partition(":")[0] for label in charts] == [
        "Training loss",
        "Validation scores",
        "Validation",
        "Learning rate",
        "Speed",
        "Use of the machine, %",
        "Memory",
    ]
    assert "masked_lm" in charts[0]
    assert charts[-2].endswith("waiting for data 25 → 25; of the measured product rate 50 → 50")
    assert charts[-1].endswith("GB at the peak 3 → 3")
    assert "accuracy 20 → 40" in charts[1]


def test_page_is_self_contained_and_accessible(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run"), images=make_pictures(tmp_path / "images", range(40))).read_text(
        encoding="utf-8"
    )
    page = Page(text)
    assert not re.search(r"https?://|//cdn|url\(|@import", text)
    assert all((image["src"] or "").startswith("data:image/") and image["alt"] for image in page.all("img"))
    assert not page.all("script")
    assert not page.all("link")
    assert all(header.get("scope") in ("col", "row") for header in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 1
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    for wanted in ('lang="en"', "width=device-width", "prefers-color-scheme: dark", "@media print"):
        assert wanted in text


def test_text_of_files_is_escaped(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run", model=ATTACK, command=[ATTACK], task='"><b>')).read_text(
        encoding="utf-8"
    )
    assert "<script" not in text
    assert '"><b>' not in text
    # Title, heading, facts, command, configuration, event, questions and answers all show it as text.
    assert text.count("&lt;script&gt;") > 8


def test_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    page = read(write_report(make_run(tmp_path / "run")))
    lines = [(line["points"] or "").split() for line in page.all("polyline")]
    assert max(map(len, lines)) == 240
    for points in lines:
        for point in points:
            x, y = map(float, point.split(","))
            assert 0 <= x <= 560, point
            assert 0 <= y <= 250, point


@pytest.mark.parametrize("value", [0.0, 5e-5, -3.0, 1e9])
def test_flat_and_extreme_curves_are_drawn(tmp_path: Path, value: float) -> None:
    run = make_run(tmp_path / "run")
    entries = [
        {"kind": "train", "step": step, "loss": value, "lr": value, "parts": {"answer": value}} for step in (1, 2)
    ]
    entries += [{"kind": "train", "step": 3, "loss": float("nan"), "parts": {"answer": float("inf")}}]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = read(write_report(run))
    assert len(page.all("polyline")) == 2
    assert "nan" not in page.text
    # A single part is the total: it is drawn once, under its own name.
    labels = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    assert labels[0].startswith("Training loss: answer ")


def test_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="running", finished=None)
    (run / "evaluation_test.json").unlink()
    (run / "details_test.jsonl").unlink()
    with (run / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "st')
    page = read(write_report(run))
    for words in (
        "the run has not finished; its last record is step 1000",
        "log.jsonl: 1 incomplete line left out",
        "no evaluation yet",
        "there is no gallery",
    ):
        assert words in page.text, words
    assert any((svg.get("aria-label") or "").startswith("Training loss") for svg in page.all("svg"))


def test_empty_folder_makes_a_page_and_no_folder_an_error(tmp_path: Path) -> None:
    page = read(write_report(tmp_path))
    assert "no run.json" in page.text
    assert "no log.jsonl" in page.text
    with pytest.raises(RunError, match="no run folder"):
        write_report(tmp_path / "absent")


def test_a_page_is_replaced_only_if_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("dear notes")
    with pytest.raises(RunError, match=r"report.html exists.*--overwrite.*--out"):
        write_report(run)
    assert (run / "report.html").read_text() == "dear notes"
    other = tmp_path / "other.html"
    assert write_report(run, out=other) == other
    assert (run / "report.html").read_text() == "dear notes"
    assert "61.2 % accuracy" in read(write_report(run, overwrite=True)).text
    assert read(run / "report.html").text == read(other).text
    assert {file.name for file in tmp_path.iterdir()} == {"run", "other.html"}
    with pytest.raises(RunError, match="is a folder"):
        write_report(run, out=tmp_path, overwrite=True)
    with pytest.raises(RunError, match=r"cannot write the report .*gone.*--out"):
        write_report(run, out=tmp_path / "gone" / "page.html")
    with pytest.raises(DataError, match="no image folder"):
        write_report(run, out=tmp_path / "new.html", images=tmp_path / "gone")


def test_files_of_wrong_shape_are_named_not_fatal(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        parameters={"total": 5000, "trainable": 10},
        store=str(tmp_path / "no_store"),
        started=1.0,
        finished=61.0,
    )
    (run / "evaluation_test.json").write_text('{"scores": {"accu')
    (run / "evaluation_val.json").write_text('{"scores": {"accuracy": 45.5, "odd": "text"}, "by": [1, 2]}')
    (run / "log.jsonl").write_text('[1]\n{"kind": "valid", "scores": 3}\n{"kind": "train", "step": 1, "loss": "x"}\n')
    (run / "details_test.jsonl").write_text(
        '{"id": 1}\n{"image": 7, "truth": {"red": 0.3, "blue": 1.0}, "top": [["a"], 3], "score": 1.0}\n'
    )
    page = read(write_report(run))
    for words in (
        "evaluation_test.json cannot be read",
        "log.jsonl: 1 incomplete line",
        "45.5 % accuracy on val",
        "the region store of this run cannot be opened",
        "5,000",
        "60 s",
        "Truth: blue, red",
        "image 7 was not found",
        "no image",
    ):
        assert words in page.text, words


def test_pictures_that_are_absent_or_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    images = make_pictures(tmp_path / "images", range(20))
    broken = images / "deep" / "scene_000000000003.PNG"
    broken.write_bytes(broken.read_bytes()[:60])
    (images / "deep" / "scene_000000000030.txt").write_text("not a picture")
    page = read(write_report(run, images=images, examples=40))
    assert len(page.all("img")) == 19
    assert "image scene_000000000003 cannot be read" in page.text
    assert "image scene_000000000030 was not found" in page.text
    assert "none of the images" not in page.text


def test_gallery_is_balanced_over_scores_and_types(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = read(write_report(run, examples=12))
    looks = [article["class"] for article in page.all("article")]
    assert looks == ["card wrong"] * 6 + ["card right"] * 6
    # Wrong rows are even numbers, half of them of type "count" (multiples of four).
    assert page.words.count("count") >= 3
    rows = [{"type": "a", "n": n} for n in range(10)] + [{"type": "b", "n": 0}]
    assert [(row["type"], row["n"]) for row in sample_evenly(rows, 5, set())] == [
        ("a", 0),
        ("b", 0),
        ("a", 3),
        ("a", 5),
        ("a", 8),
    ]
    assert len(sample_evenly(rows, 99, set())) == 11
    assert not read(write_report(run, examples=0, overwrite=True)).all("article")


def test_the_gallery_prefers_images_that_it_does_not_show_yet() -> None:
    # Fourteen types of question about each of twelve images, in the order of the images.
    rows = [{"type": f"t{t}", "image": f"i{i}"} for i in range(12) for t in range(14)]
    shown: set[str] = set()
    first = sample_evenly(rows, 6, shown)
    second = sample_evenly(rows, 6, shown)
    assert sorted(row["image"] for row in first + second) == sorted(f"i{i}" for i in range(12))
    assert len({row["type"] for row in first}) == 6
    assert len(sample_evenly(rows, 14, shown)) == 14, "seen images are shown again where there are no others"


def test_accuracies_have_an_axis_of_their_own_and_equal_curves_are_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    entries = [
        {"kind": "train", "step": step, "loss": 3 / step, "parts": {"answer": 3 / step, "answer_accuracy": 0.1 * step}}
        for step in (1, 2, 3)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    page = read(write_report(run))
    charts = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    assert charts == ["Training loss: answer 3 → 1", "Training accuracy: answer_accuracy 0.1 → 0.3"]
    two = [{**entry, "parts": {**entry["parts"], "same": 0.0}} for entry in entries]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in two))
    page = read(write_report(run, overwrite=True))
    charts = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    assert charts[0] == "Training loss: answer 3 → 1; same 0 → 0"


def test_the_page_names_folders_relative_to_the_run_and_wraps_the_command(tmp_path: Path) -> None:
    images = make_pictures(tmp_path / "data" / "images", range(3))
    run = make_run(tmp_path / "run", images=str(images), store=str(tmp_path / "no_store"))
    path = write_report(run)
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    page = read(path)
    assert "../data/images" in page.text
    assert "../no_store" in page.text
    assert page.all("pre")[0].get("class") == "wrap"


def test_missing_wrong_examples_leave_room_for_right_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rows = [
        json.loads(line) | {"score": 1.0 if number else 0.0}
        for number, line in enumerate((run / "details_test.jsonl").read_text().splitlines())
    ]
    (run / "details_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    looks = [article["class"] for article in read(write_report(run, examples=10)).all("article")]
    assert looks == ["card wrong"] + ["card right"] * 9


def test_test_split_speaks_before_the_others(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for split in ("train", "val"):
        (run / f"evaluation_{split}.json").write_text(json.dumps({"scores": {"accuracy": {"value": 0.9, "count": 3}}}))
    page = read(write_report(run))
    assert "61.2 % accuracy on test" in page.text
    assert "0.9 %" in page.text, "scores are in percent, small ones too"
    titles = [page.text.index(f" {split} Scores") for split in ("test", "val", "train")]
    assert titles == sorted(titles)


def test_store_named_by_the_run_is_opened(tmp_path: Path) -> None:
    with StoreWriter(
        tmp_path / "store", feature_size=4, fingerprint="test", class_names=("circle", "square")
    ) as writer:
        writer.add("scene_000000000001", Store()["scene_000000000001"])
    run = make_run(
        tmp_path / "run", store=str(tmp_path / "store"), images=str(make_pictures(tmp_path / "images", range(3)))
    )
    page = read(write_report(run, examples=40))
    assert [image["alt"] for image in page.all("img")].count("Image scene_000000000001 with 2 regions drawn") == 1
    assert "region store" not in page.text
