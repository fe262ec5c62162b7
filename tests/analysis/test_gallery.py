"""The gallery of a run's examples: which are chosen, what is said of them, and what the folder refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.evaluated_runs import make_details, make_evaluated_run, make_images

from visling.analysis.examples import list_images, measure_difference, split_choices
from visling.analysis.gallery import GalleryRun, write_gallery
from visling.analysis.gallery_entries import compare_blind, list_truth, name_candidates, read_removal
from visling.errors import DataError, RunError
from visling.types import Prediction, RegionArray


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """What the index shows."""
    text = (folder / "examples.js").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = json.loads(text.removeprefix("window.visling_gallery = ").removesuffix(";\n"))
    return entries


class Store:
    """As many regions for an image as its number says, up to 40."""

    feature_size, fingerprint, class_names, attribute_names = 4, "test", (), ()

    def __contains__(self, image_id: str) -> bool:
        return True

    def __getitem__(self, image_id: str) -> RegionArray:
        count = int(image_id[-2:])
        return RegionArray(
            features=np.zeros((count, 4), np.float16),
            boxes=np.tile(np.float32([1, 1, 9, 9]), (count, 1)),
            size=(64, 48),
        )

    def __len__(self) -> int:
        return 100


def test_a_run_becomes_a_folder_that_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", range(38))
    run = make_evaluated_run(tmp_path / "vqa", make_details(), images=images)
    page = write_gallery(GalleryRun.read(run), tmp_path / "out", store=Store())
    entries = read_entries(tmp_path / "out")
    assert [entry["id"] for entry in entries] == [f"q{number}" for number in range(40)]
    assert [entry["boxes"] for entry in entries] == list(range(40))
    first = entries[0]
    assert (first["answer"], first["truth"], first["right"]) == ("blue", "red, blue", False)
    assert first["groups"] == {"type": "verify", "truth": "red", "confidence": "50 to 70 %", "boxes": "none"}
    assert entries[37]["groups"]["boxes"] == "over 36"
    assert [entry["images"][0] is None for entry in entries] == [False] * 38 + [True] * 2, "two images are absent"
    assert all((tmp_path / "out" / entry["images"][0]).stat().st_size < 5000 for entry in entries[:38])
    text = page.read_text(encoding="utf-8")
    files = [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".html", ".js", ".css")]
    for file in files:
        found = re.findall(r"https?://(?!www\.w3\.org/)\S+|@import|\bfetch\(|XMLHttpRequest", file.read_text("utf-8"))
        assert not found, (file, found)
    assert re.findall(r'<script src="([^"]*)"', text) == ["static/inspect.js", "static/gallery.js", "examples.js"]
    assert "default-src 'none'" in text
    assert "75.0 % accuracy" in text
    assert "40 of 40" in text


def test_groups_are_scored_over_the_whole_split(tmp_path: Path) -> None:
    run = make_evaluated_run(tmp_path / "vqa", make_details())
    page = write_gallery(GalleryRun.read(run), tmp_path / "out", examples=4)
    text = page.read_text(encoding="utf-8")
    # 14 of 40 rows are of type "verify" (multiples of 3), of which four are multiples of 4.
    row = re.search(r'data-group="verify">verify</button></th><td class="count">(\d+)</td><td>.*?>([\d.]+) %', text)
    assert row is not None
    assert row.groups() == ("14", "71.4")
    assert "4 of 40, at even distances" in text
    assert [entry["id"] for entry in read_entries(tmp_path / "out")] == ["q5", "q15", "q25", "q35"]


def test_compared_runs_show_where_they_differ_most_and_an_even_sample(tmp_path: Path) -> None:
    ours = GalleryRun.read(make_evaluated_run(tmp_path / "vqa", make_details()))
    theirs = GalleryRun.read(make_evaluated_run(tmp_path / "blind", make_details(flip=3)))
    page = write_gallery(ours, tmp_path / "out", other=theirs, examples=8)
    entries = {entry["id"]: entry for entry in read_entries(tmp_path / "out")}
    assert [name for name, entry in entries.items() if entry["even"]] == ["q5", "q15", "q25", "q35"]
    assert {"q37", "q38", "q39"} < entries.keys(), "where the runs differ"
    assert entries["q39"]["other"] == {
        "answer": "blue", "confidence": pytest.approx(0.94), "right": False, "difference": pytest.approx(0.88),
    }  # fmt: skip
    assert entries["q5"]["other"]["difference"] == 0
    text = page.read_text(encoding="utf-8")
    assert "right only in vqa" in text
    assert "at even distances: 4; where the runs differ most: 4" in text


def test_difference_is_the_distance_of_the_listed_probabilities() -> None:
    first = {"prediction": "a", "top": [["a", 0.7], ["b", 0.3]]}
    second = {"prediction": "b", "top": [["b", 0.6], ["c", 0.4]]}
    assert measure_difference(first, second) == pytest.approx(0.7)
    assert measure_difference(first, first) == 0
    assert measure_difference({"prediction": "a"}, {"prediction": "b"}) == 1
    assert measure_difference({"prediction": "a"}, {"prediction": "a", "top": []}) == 0


def test_an_answer_rests_on_words_if_it_is_the_same_and_as_sure_without_the_image() -> None:
    row = {"prediction": "yes", "confidence": 0.7}
    blind = {"id": "q", "value": "yes", "confidence": 0.65, "top": (("yes", 0.65), ("no", 0.35))}
    assert compare_blind(row, Prediction(**blind)) == {"answer": "yes", "gain": 0.05, "alone": True}
    less = blind | {"confidence": 0.55, "top": (("yes", 0.55), ("no", 0.45))}
    assert compare_blind(row, Prediction(**less)) == {"answer": "yes", "gain": 0.15, "alone": False}
    other = blind | {"value": "no", "top": (("no", 0.6), ("yes", 0.4))}
    assert compare_blind(row, Prediction(**other)) == {"answer": "no", "gain": 0.3, "alone": False}


def test_removal_is_measured_against_random_orders() -> None:
    curves = [
        {"part": "regions", "method": "relevance", "order": "most_first", "area": 0.2},
        {"part": "regions", "method": "relevance", "order": "least_first", "area": 0.9},
        {"part": "regions", "method": "random", "order": "random", "area": 0.5},
        {"part": "text", "method": "random", "order": "random", "area": 0.1},
    ]
    assert read_removal({"removal": {"curves": curves}}) == pytest.approx(0.3)
    assert read_removal({"removal": {"curves": curves[2:]}}) is None
    assert read_removal({"removal": None}) is None


def test_choices_boxes_and_phrases_are_read_from_details() -> None:
    text = "why is [person1] here? | 0: it fell | 1: it | was put | 2: no"
    choices = {"text": text, "prediction": "1", "truth": "2"}
    assert split_choices(choices) == ("why is [person1] here?", ("it fell", "it | was put", "no"))
    assert list_truth(choices) == (("no",), ())
    assert split_choices({"text": "a | 1: b"}) == ("a | 1: b", ())
    assert list_truth({"text": "the left one", "truth": [1, 2, 30, 40]}) == ((), ((1.0, 2.0, 30.0, 40.0),))
    assert list_truth({"text": "how many?", "truth": ["3", "3", "4"]}) == (("3", "4"), ())
    assert list_truth({"text": "?", "truth": None}) == ((), ())
    phrases = [{"phrase": "a dog", "annotated": [[1, 2, 3, 4], [5, 6, 7, 8]]}, {"phrase": "it", "annotated": None}]
    assert list_truth({"text": "a dog", "truth": "...", "phrases": phrases})[1] == ((1, 2, 3, 4), (5, 6, 7, 8))


def test_boxes_that_are_pointed_at_get_the_names_of_their_regions() -> None:
    answers = [
        {"text": "red star", "probability": 0.7, "box": [1, 2, 3, 4]},
        {"text": "moon", "probability": 0.3, "box": None},
    ]
    entry: dict[str, Any] = {"answer": "box (1, 2, 3, 4)", "top": [["0", 0.7], ["1", 0.3]]}
    name_candidates(entry, {"answers_are": "alternatives", "answers": answers})
    assert entry == {"answer": "red star", "top": [["red star", 0.7], ["moon", 0.3]]}
    kept = dict(entry)
    name_candidates(entry, {"answers_are": "phrases", "answers": answers})
    name_candidates(entry, {"answers_are": "alternatives", "answers": [answers[0] | {"box": None, "text": "x"}]})
    assert entry == kept, "phrases and answers in words stay as the details have them"


def test_both_images_of_a_pair_are_listed() -> None:
    assert list_images({"image": "a", "images": ["a", "b"]}) == ["a", "b"]
    assert list_images({"image": "a"}) == ["a"]
    assert list_images({"image": None}) == []


def test_a_folder_is_not_overwritten_and_resumes_only_what_it_began(tmp_path: Path) -> None:
    run = GalleryRun.read(make_evaluated_run(tmp_path / "vqa", make_details()))
    out = tmp_path / "out"
    write_gallery(run, out, examples=4)
    with pytest.raises(RunError, match=r"not empty: it holds examples.js.*--out.*--resume"):
        write_gallery(run, out, examples=4)
    (out / "index.html").unlink()
    assert write_gallery(run, out, examples=4, resume=True).is_file()
    with pytest.raises(RunError, match=r"other settings: examples differ"):
        write_gallery(run, out, examples=5, resume=True)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "dear.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds dear.txt") as refused:
        write_gallery(run, notes, resume=True)
    assert "--resume" not in str(refused.value), "there is nothing to resume"
    assert [file.name for file in notes.iterdir()] == ["dear.txt"]
    with pytest.raises(RunError, match=r"cannot write the gallery .*--out"):
        write_gallery(run, notes / "dear.txt" / "below")
    (out / "gallery.json").write_text("{")
    with pytest.raises(RunError, match=r"cannot write the gallery"):
        write_gallery(run, out, examples=4, resume=True)


def test_what_is_no_evaluated_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        GalleryRun.read(tmp_path / "absent")
    run = make_evaluated_run(tmp_path / "vqa", make_details())
    with pytest.raises(
        RunError, match=r"has not been evaluated on 'val'.*It was on test.*visling evaluate .* --split val"
    ):
        GalleryRun.read(run, "val")
    (run / "details_test.jsonl").unlink()
    with pytest.raises(RunError, match=r"no details_SPLIT.jsonl.*visling evaluate"):
        GalleryRun.read(run)
    other = make_evaluated_run(tmp_path / "other", [row | {"id": f"x{row['id']}"} for row in make_details()])
    both = GalleryRun.read(other), GalleryRun.read(make_evaluated_run(tmp_path / "third", make_details()))
    with pytest.raises(RunError, match="no example in common"):
        write_gallery(both[0], tmp_path / "out", other=both[1])
    with pytest.raises(DataError, match="no image folder"):
        write_gallery(both[0], tmp_path / "out", images=tmp_path / "gone")
    assert not (tmp_path / "out").exists()


def test_a_task_of_a_run_of_several_is_shown_with_its_own_images(tmp_path: Path) -> None:
    home = make_evaluated_run(tmp_path / "several", make_details(4))
    images = make_images(tmp_path / "images", range(4))
    about = json.loads((home / "run.json").read_text()) | {"tasks": {"gqa": {"task": "gqa", "images": str(images)}}}
    (home / "run.json").write_text(json.dumps(about))
    (home / "tasks" / "gqa").mkdir(parents=True)
    (home / "details_test.jsonl").rename(home / "tasks" / "gqa" / "details_test.jsonl")
    page = write_gallery(GalleryRun.read(home, task="gqa"), tmp_path / "out")
    assert "<h1>visualbert on gqa, test</h1>" in page.read_text(encoding="utf-8")
    assert all(entry["images"][0] for entry in read_entries(tmp_path / "out"))
    with pytest.raises(RunError, match="has not been evaluated"):
        GalleryRun.read(home)


def test_missing_images_are_said_and_texts_are_escaped(tmp_path: Path) -> None:
    rows = [row | {"text": "</script><b>x", "prediction": '"><i>', "top": []} for row in make_details(4)]
    page = write_gallery(GalleryRun.read(make_evaluated_run(tmp_path / "vqa", rows)), tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert "No image folder is known" in text
    assert "<b>x" not in text
    assert '"><i>' not in text
    empty = tmp_path / "empty"
    empty.mkdir()
    run = GalleryRun.read(tmp_path / "vqa")
    assert "None of the images" in write_gallery(run, tmp_path / "two", images=empty).read_text(encoding="utf-8")
