from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from visling.errors import ConfigError, RunError
from visling.scenes import ScenesConfig, write, write_scenes

SPLITS = ("train", "val", "test")
SMALL = {"images": 24, "seed": 3, "panels": 8, "statements_per_panel": 2}


def digest(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("style", ["plain", "sketch"])
def test_equal_byte_for_byte_whatever_the_number_of_processes(tmp_path: Path, style: Any) -> None:
    for name, processes in (("one", 1), ("two", 2 if style == "plain" else 1)):
        write_scenes(tmp_path / name, ScenesConfig(**SMALL, style=style, processes=processes))
    first = digest(tmp_path / "one")
    assert len(first) > 24 + 8 + 12
    assert first == digest(tmp_path / "two")
    write_scenes(tmp_path / "other", ScenesConfig(**(SMALL | {"seed": 4}), style=style))
    assert digest(tmp_path / "other")["annotations/captions_train.json"] != first["annotations/captions_train.json"]


def test_an_image_does_not_depend_on_how_many_follow(tmp_path: Path) -> None:
    for name, images in (("few", 4), ("more", 9)):
        write_scenes(tmp_path / name, ScenesConfig(images=images, train=1.0, val=0.0))
    few, more = digest(tmp_path / "few"), digest(tmp_path / "more")
    pictures = [path for path in few if path.startswith("images/")]
    assert len(pictures) == 4
    assert all(few[path] == more[path] for path in pictures)


def test_official_fields(written: Any) -> None:
    ids: list[int] = []
    for split in SPLITS:
        instances = written.json(f"annotations/instances_{split}.json")
        assert {"info", "licenses", "images", "annotations", "categories"} <= set(instances)
        assert [c["name"] for c in instances["categories"]][:2] == ["circle", "square"]
        for one in instances["annotations"]:
            assert {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "attributes"} <= set(one)
            x, y, w, h = one["bbox"]
            assert w > 0
            assert h > 0
            assert 0 <= x <= x + w <= 128
            assert 0 <= y <= y + h <= 128
        assert len({one["id"] for one in instances["annotations"]}) == len(instances["annotations"])
        captions = written.json(f"annotations/captions_{split}.json")
        assert set(captions) == {"info", "licenses", "images", "annotations"}
        assert set(captions["annotations"][0]) == {"id", "image_id", "caption"}
        questions = written.json(f"annotations/v2_OpenEnded_scenes_{split}_questions.json")
        assert set(questions) == {"info", "task_type", "data_type", "data_subtype", "license", "questions"}
        assert questions["task_type"] == "Open-Ended"
        answers = written.json(f"annotations/v2_scenes_{split}_annotations.json")
        assert set(answers) == {"info", "data_type", "data_subtype", "license", "annotations"}
        for question, annotation in zip(questions["questions"], answers["annotations"], strict=True):
            assert set(question) == {"image_id", "question", "question_id"}
            assert question["question_id"] // 1000 == question["image_id"] == annotation["image_id"]
            assert question["question_id"] == annotation["question_id"]
            assert set(annotation) == {
                "question_type",
                "multiple_choice_answer",
                "answers",
                "image_id",
                "answer_type",
                "question_id",
            }
            assert annotation["answer_type"] in ("yes/no", "number", "other")
            assert [a["answer_id"] for a in annotation["answers"]] == list(range(1, 11))
            assert all(a["answer_confidence"] in ("yes", "maybe", "no") for a in annotation["answers"])
            assert (annotation["multiple_choice_answer"] in ("yes", "no")) == (annotation["answer_type"] == "yes/no")
            assert annotation["multiple_choice_answer"].isdigit() == (annotation["answer_type"] == "number")
        for entry in instances["images"]:
            assert entry["file_name"] == f"scene_{entry['id']:012d}.png"
            assert (written.folder / "images" / split / entry["file_name"]).is_file()
            ids.append(entry["id"])
    assert sorted(ids) == list(range(1, 301))
    assert [len(list((written.folder / "images" / split).iterdir())) for split in SPLITS] == [240, 30, 30]


def test_text_holds_the_captions_of_an_image_a_line(written: Any) -> None:
    for split in SPLITS:
        captions = written.json(f"annotations/captions_{split}.json")["annotations"]
        passages = (written.folder / "text" / f"{split}.txt").read_text().splitlines()
        assert len(passages) == len({caption["image_id"] for caption in captions})
        assert [sentence for passage in passages for sentence in passage.removesuffix(".").split(". ")] == [
            one["caption"] for one in captions
        ]
        assert written.json("scenes.json")["counts"][split]["passages"] == len(passages)


def test_no_captions_make_no_text(tmp_path: Path) -> None:
    write_scenes(tmp_path / "out", ScenesConfig(images=4, captions_per_image=0))
    assert not list((tmp_path / "out" / "text").iterdir())


def test_summary_is_written(written: Any) -> None:
    content = written.json("scenes.json")
    assert content == json.loads(json.dumps(written.summary))
    assert content["config"]["seed"] == 7
    assert content["versions"]["pillow"]
    assert content["counts"]["train"]["images"] == 240
    assert content["counts"]["nlvr"]["train"]["labels"]["true"] > 0
    assert "processes" not in content["config"]


def test_noise_replaces_answers_by_others_of_their_kind(tmp_path: Path) -> None:
    write_scenes(tmp_path / "out", ScenesConfig(images=20, answer_noise=0.3, train=1.0, val=0.0))
    content = json.loads((tmp_path / "out/annotations/v2_scenes_train_annotations.json").read_text())
    doubted = total = 0
    for one in content["annotations"]:
        for given in one["answers"]:
            total += 1
            doubted += given["answer_confidence"] == "maybe"
            if one["answer_type"] == "yes/no":
                assert given["answer"] in ("yes", "no")
            assert given["answer"].isdigit() == (one["answer_type"] == "number")
    assert 0.25 < doubted / total < 0.35


def test_a_taken_folder_is_refused_unless_it_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    config = ScenesConfig(images=3)
    with pytest.raises(RunError, match="not empty"):
        write_scenes(out, config)
    assert (out / "mine.txt").read_text() == "keep"
    write_scenes(out, ScenesConfig(images=3, overwrite=True))
    assert not (out / "mine.txt").exists()
    assert (out / "scenes.json").is_file()
    with pytest.raises(RunError, match="is a file"):
        write_scenes(out / "scenes.json", config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    write_scenes(tmp_path, ScenesConfig(images=2))
    assert (tmp_path / "scenes.json").is_file()


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "out", ScenesConfig(images=6), stop)
    assert not list(tmp_path.iterdir())

    def full(path: Path, content: Any, indent: int | None = None) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_json", full)
    with pytest.raises(RunError, match="No space left"):
        write_scenes(tmp_path / "out", ScenesConfig(images=2))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_said_plainly(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match="cannot write"):
            write_scenes(tmp_path / "out", ScenesConfig(images=2))
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_below_a_file_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        write_scenes(tmp_path / "file" / "out", ScenesConfig(images=2))


def test_progress_counts_every_picture(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_scenes(tmp_path / "out", ScenesConfig(images=5, panels=4), lambda done, total: seen.append((done, total)))
    assert seen == [*((n, 9) for n in range(1, 6)), (9, 9)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "skech"}, "sketch"),
        ({"images": 0}, "nothing to draw"),
        ({"images": -1}, "at least 0"),
        ({"min_objects": 5, "max_objects": 4}, "below min_objects"),
        ({"max_objects": 400}, "at most 10"),
        ({"size": 8}, "at least 48"),
        ({"answer_noise": 1.5}, "share"),
        ({"train": 0.9, "val": 0.2}, "shares"),
        ({"panel_boxes": 4}, "2 or 3"),
        ({"panel_boxes": 2, "permutations": 3}, "orders"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScenesConfig(**settings)
