"""From one's own table and pictures to a trained model: docs/own_data.md as it is typed, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from test_docs_commands import list_commands, list_outputs, run_in_this_process

import visling
from visling.cli.own_data import OwnOptions
from visling.errors import ConfigError, DataError
from visling.regions.store import NativeStore
from visling.runs.own_files import OwnFiles, hold_out
from visling.types import Record

PAGE = Path(__file__).parents[1] / "docs" / "own_data.md"
COLORS = ("red", "green", "blue")


def draw(path: Path, color: str = "red") -> Path:
    """A tiny picture of a square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).rectangle((10, 12, 40, 44), fill=color)
    picture.save(path)
    return path


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A table in the format of its suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file
    with file.open("w", encoding="utf-8", newline="") as target:
        table = csv.DictWriter(target, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)
    return file


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photos in two sub-folders, train.jsonl and valid.csv, which is made the working folder."""
    rows = []
    for number in range(12):
        color = COLORS[number % len(COLORS)]
        draw(tmp_path / "photos" / f"ward{number % 2}" / f"a{number:02}.png", color)
        rows.append({"image": f"ward{number % 2}/a{number:02}.png", "question": "what colour is it?", "answer": color})
    write(tmp_path / "train.jsonl", rows[:9])
    write(tmp_path / "valid.csv", rows[9:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tune(world: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call `visling finetune` for two updates, with photos and the detector of the tiny world unless others are
    named."""

    def run(*words: str, task: str = "vqa", images: bool = True) -> None:
        pictures = ["--images", "photos", "--detector", str(world.detector)] if images else []
        files = ["--train", "train.jsonl", "--valid", "valid.csv"] if "--train" not in words else []
        line = ["finetune", "--task", task, *files, *pictures, *words]
        line += ["--out", "run", "--set", "train.max_steps=2", "--set", "encoder.hidden_size=16", "--set",
                 "encoder.num_layers=1", "--set", "encoder.num_heads=2", "--device", "cpu"]  # fmt: skip
        run_in_this_process(line, monkeypatch)

    return run


def refused(capsys: pytest.CaptureFixture[str], run: Callable[[], None]) -> str:
    """What a command that must fail prints."""
    with pytest.raises(AssertionError, match="ended with status 2"):
        run()
    return capsys.readouterr().err


def read_log(run: Path) -> list[str]:
    """Events of a run."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["message"] for line in lines if line["kind"] == "event"]


# The page


def _write_page_files(world: Any, folder: Path) -> None:
    """The files that the page takes for granted, with the rows that it shows first."""
    blocks = re.findall(r"^```(json|csv|python)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    shown = {language: [text for kind, text in blocks if kind == language] for language in ("json", "csv", "python")}
    (questions,), (answers, memes) = shown["json"], shown["csv"]
    for name in ("ward1/a01", "ward2/b07", "ward2/b08"):
        draw(folder / "scans" / "images" / f"{name}.png")
    (folder / "scans" / "train.jsonl").write_text(questions * 4)
    (folder / "scans" / "valid.csv").write_text(answers)
    for number in range(1, 11):
        draw(folder / "memes" / "img" / f"{number:02}.png", COLORS[number % 3])
    more = "".join(f"{number},{number:02}.png,text {number},{number % 2}\n" for number in range(3, 9))
    (folder / "memes" / "memes.csv").write_text(memes + more)
    later = [{"image": f"{number:02}.png", "text": "one more", "label": number % 2} for number in (9, 10)]
    write(folder / "memes" / "later.jsonl", later)
    ratings = [{"image": f"r{n:02}.png", "text": "crack in a wall", "rating": n / 2} for n in range(10)]
    for row in ratings:
        draw(folder / "ratings" / "images" / str(row["image"]))
    write(folder / "ratings" / "train.csv", ratings)
    (module,) = (text for text in shown["python"] if "TASK = " in text)
    (folder / "my_tasks").mkdir()
    (folder / "my_tasks" / "severity.py").write_text(module)
    small = folder / "demo" / "small"
    (small / "visualbert").mkdir(parents=True)
    (small / "visualbert" / "pretrain").symlink_to(world.pretrained)
    (small / "detector").symlink_to(world.detector)


def test_the_commands_and_snippets_of_the_page_run(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_page_files(world, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    commands = list_commands("docs/own_data.md")
    assert [words[0] for words in commands].count("finetune") == 3
    for words in commands:
        shortened = [
            re.sub(r"^\d\d$", "1", word) if words[i - 1] == "--epochs" else word for i, word in enumerate(words)
        ]
        run_in_this_process(shortened, monkeypatch)
        for name in list_outputs(words):
            assert (tmp_path / name).exists(), f"visling {' '.join(words)} wrote no {name}"
    capsys.readouterr()
    snippets = re.findall(r"^```python\n(import visling\n.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
    printed = capsys.readouterr().out.split("\n")
    assert printed[0].split()[0] in ("yes", "left"), "an answer of the training questions"
    assert {line.split()[0] for line in printed[1:3]} == {"0", "1"}, "each label with its probability"
    assert sum(float(line.split()[1]) for line in printed[1:3]) == pytest.approx(1.0, abs=1e-4)
    scored = json.loads((tmp_path / "memes-run" / "evaluation_later.json").read_text())
    assert scored["scores"]["auroc"]["count"] == 2
    assert set(NativeStore.open(tmp_path / "memes-run" / "regions").ids) == {f"{n:02}" for n in range(1, 11)}


# A run remembers its files


def test_a_run_remembers_its_files_regions_and_detector(
    scans: Path, tune: Callable[..., None], world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune()
    known = json.loads(Path("run/run.json").read_text())
    assert known["files"] == {"train": str(scans / "train.jsonl"), "valid": str(scans / "valid.csv")}
    assert known["recipe"] == "visualbert-small"
    assert known["examples"] == {"train": 9, "valid": 3}
    written = Path("run/regions/manifest.json").stat().st_mtime_ns
    monkeypatch.chdir(scans.parent)  # from anywhere
    run_in_this_process(["evaluate", str(scans / "run"), "--split", "valid"], monkeypatch)
    found = json.loads((scans / "run" / "evaluation_valid.json").read_text())
    assert found["scores"]["accuracy"]["count"] == 3
    assert found["by"] == {}, "files without types have no scores by type"
    assert "majority answer per question type" in found["baselines"]
    assert "3 of 3 questions have fewer than 4 answers" in found["notes"][0]
    answer = visling.load(scans / "run").answer(scans / "photos" / "ward1" / "a11.png", "what colour is it?")
    assert answer.text in COLORS
    assert (scans / "run" / "regions" / "manifest.json").stat().st_mtime_ns == written


def test_regions_are_extracted_once_and_an_interrupted_run_resumes(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "train.metric is 'nonsense'" in refused(capsys, lambda: tune("--set", "train.metric=nonsense"))
    written = Path("run/regions/manifest.json").stat().st_mtime_ns
    tune("--set", "train.max_seconds=0")
    assert not json.loads(Path("run/run.json").read_text())["finished"]
    tune("--resume")
    assert json.loads(Path("run/run.json").read_text())["status"] == "finished"
    assert Path("run/regions/manifest.json").stat().st_mtime_ns == written
    message = refused(capsys, tune)
    assert "is not empty" in message


def test_a_run_stopped_while_regions_are_extracted_resumes(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nothing to resume in run" in refused(capsys, lambda: tune("--resume"))
    assert "train.metric is 'nonsense'" in refused(capsys, lambda: tune("--set", "train.metric=nonsense"))
    assert [entry.name for entry in Path("run").iterdir()] == ["regions"]
    tune("--resume")
    resumed = Path("run/model/model.safetensors").read_bytes()
    shutil.rmtree("run")
    tune()
    assert Path("run/model/model.safetensors").read_bytes() == resumed


def test_a_share_of_the_images_is_held_out(scans: Path, tune: Callable[..., None]) -> None:
    tune("--train", "train.jsonl", "--valid", "0.3")
    assert json.loads(Path("run/run.json").read_text())["files"]["valid"] == 0.3
    assert json.loads(Path("run/run.json").read_text())["examples"] == {"train": 6, "valid": 3}


def test_images_held_out_are_in_no_training_example() -> None:
    pairs = [(f"i{n}", f"i{n + 1}") for n in (0, 1, 4, 6, 8, 10)] + [(f"i{n}",) for n in range(12, 40)]
    records = [Record(id=str(number), images=images) for number, images in enumerate(pairs)]
    train, valid = hold_out(records, 0.25, Path("t.csv"))
    shown = [{image for record in part for image in record.images} for part in (train, valid)]
    assert not shown[0] & shown[1]
    assert len(train) + len(valid) == len(records)
    assert 5 <= len(valid) <= 12
    turned = [replace(record, images=record.images[::-1]) for record in records[::-1]]
    again, _ = hold_out(turned, 0.25, Path("t.csv"))
    assert {record.id for record in again} == {record.id for record in train}, "no order in the file matters"
    few = [Record(id=str(number), images=(f"i{number}",)) for number in range(4)]
    assert [len(part) for part in hold_out(few, 0.9, Path("t.csv"))] == [1, 3], "something is left to train on"
    with pytest.raises(DataError, match=r"t\.csv: the examples cannot be divided .* without an image in common"):
        hold_out(records[:1], 0.5, Path("t.csv"))
    with pytest.raises(ConfigError, match=r"between 0 and 1; found 1\.5"):
        OwnFiles(train=Path("t.csv"), valid=1.5)


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("referring", {"text": "the square", "x1": 10, "y1": 12, "x2": 40, "y2": 44}),
        ("retrieval", {"caption": "a square"}),
        ("nlvr2", {"text": "both are red", "label": "true"}),
        ("classification", {"text": "a square", "labels": "red|big"}),
    ],
)
def test_other_tasks_read_tables(
    scans: Path, tune: Callable[..., None], task: str, rows: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = []
    for number in range(12):
        image = f"ward{number % 2}/a{number:02}.png"
        names = {"image1": image, "image2": "ward0/a00"} if task == "nlvr2" else {"image": image}
        table.append({**names, **rows})
    write(Path("train.csv"), table[:8])
    write(Path("valid.tsv"), table[8:])
    tune("--train", "train.csv", "--valid", "valid.tsv", task=task)
    run_in_this_process(["evaluate", "run", "--split", "valid"], monkeypatch)
    assert json.loads(Path("run/evaluation_valid.json").read_text())["scores"]


def test_texts_alone_need_no_image(scans: Path, tune: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"premise {n}", "text2": "hypothesis", "label": ("no", "yes")[n % 2]} for n in range(8)]
    write(Path("t.json").with_suffix(".jsonl"), rows)
    tune("--train", "t.jsonl", "--valid", "0.5", "--text-only", task="classification", images=False)
    run_in_this_process(["evaluate", "run", "--split", "valid"], monkeypatch)
    assert "auroc" in json.loads(Path("run/evaluation_valid.json").read_text())["scores"]


def test_a_store_names_its_images_exactly(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    tune()
    Path("run").rename("first")
    tune("--store", "first/regions", images=False)
    write(Path("valid.csv"), [{"image": "ward1/b11.png", "question": "what?", "answer": "red"}])
    Path("run").rename("second")
    message = refused(capsys, lambda: tune("--store", "first/regions", images=False))
    assert "valid.csv, line 2: image 'ward1/b11.png' has no regions in first/regions." in message, (
        "b11 ends in the number of a11 and is another image"
    )


# What is refused


def test_options_that_conflict_or_are_missing_are_reported_together() -> None:
    nothing = dict.fromkeys(
        ("recipe", "task", "data", "train", "valid", "test", "images", "detector", "store", "answers", "init", "model")
    )
    options: dict[str, Any] = {**nothing, "text_only": False}
    with pytest.raises(ConfigError) as caught:
        OwnOptions(**{**options, "valid": "v.csv", "detector": Path("d")}).source()
    message = str(caught.value)
    assert message.startswith("4 problems were found:")
    for part in ("--task NAME, or --recipe NAME", "--train FILE", "--train is missing", "which is missing"):
        assert part in message
    own = {**options, "task": "vqa", "train": Path("t.csv"), "images": Path("photos")}
    for change, words in (
        ({}, "hold out a tenth of the training images with --valid 0.1"),
        ({"valid": "0.1", "images": None}, "--images DIR, --store DIR with their regions, or --text-only"),
        ({"valid": "0.1", "store": Path("s")}, "give one"),
        ({"valid": "0.1", "data": Path("d")}, "--data names a folder of official files"),
        ({"valid": "0.1", "text_only": True}, "leave out --images"),
        ({"valid": "0.1", "recipe": "lxmert-small"}, "--recipe lxmert-small has a task"),
        ({"valid": "0.1", "recipe": "lxmert-small", "task": None, "model": "vlbert"}, "leave out --model vlbert"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            OwnOptions(**{**own, **change}).source()
    assert OwnOptions(**{**own, "valid": "0.1"}).source() == OwnFiles(train=Path("t.csv"), valid=0.1)
    assert OwnOptions(**{**own, "valid": "0.1", "model": "lxmert"}).find_recipe()().recipe == "lxmert-small"
    with pytest.raises(ConfigError, match=r"no model 'lxmart'\. Did you mean 'lxmert'"):
        OwnOptions(**{**own, "valid": "0.1", "model": "lxmart"}).find_recipe()


def test_everything_that_is_wrong_is_reported_at_once(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("t.csv").write_text(
        'id,image,question,answer\n1,ward1/a01.png,"two\nlines?",red\n1,ward0/a00.png,,red\n'
        "3,none.png,what?,red\n4,ward1/a03.png,what?,\n5,ward1/a05.png,what?\n6,broken.png,what?,red\n"
    )
    Path("photos/broken.png").write_bytes(b"no image")
    Path("empty.csv").write_text("")
    message = refused(capsys, lambda: tune("--train", "t.csv", "--valid", "empty.csv"))
    for part in (
        "7 problems were found",
        "t.csv, line 7: 3 cells; the header names 4.",
        "t.csv, line 4: id '1' is that of t.csv, line 2 too.",
        "t.csv, line 4: no text in field 'question'.",
        "t.csv, line 6: no answer in field 'answer'; 4 of 5 rows have one.",
        "t.csv, line 5: no image 'none.png' in photos.",
        "t.csv, line 8: cannot read image",
        "empty.csv: the valid file is empty.",
    ):
        assert part in message, part
    assert not Path("run").exists(), "nothing is left behind"


def test_files_the_detector_and_the_answers_are_checked_together(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path("t.csv"), [{"image": "none.png", "question": "what?", "answer": "red"}])
    files = ("--train", "t.csv", "--valid", "valid.csv")
    wrong = ("--detector", "photos", "--set", "task_settings.answers=none.txt")
    message = refused(capsys, lambda: tune(*files, *wrong))
    for part in ("no image 'none.png' in photos", "photos is not a detector", "no answer vocabulary none.txt"):
        assert part in message, part
    assert not Path("run").exists(), "nothing is left behind"


def test_folders_that_may_not_be_looked_into_are_passed_over(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (scans / "lost+found").mkdir()
    stat = os.stat

    def refuse(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if "lost+found/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    write(Path("t.csv"), [{"image": "none.png", "question": "what?", "answer": "red"}])
    monkeypatch.setattr(os, "stat", refuse)
    message = refused(capsys, lambda: tune("--train", "t.csv", "--valid", "valid.csv"))
    assert "t.csv, line 2: no image 'none.png' in photos" in message


def test_an_output_folder_that_may_not_be_made(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).name in ("run", "regions"):
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert "cannot write to run: [Errno 13] Permission denied" in refused(capsys, tune)


def test_one_label_is_refused_with_its_file(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": f"a0{number}", "text": "one", "label": "x"} for number in range(4)]
    write(Path("t.csv"), rows)
    message = refused(capsys, lambda: tune("--train", "t.csv", "--valid", "t.csv", task="classification"))
    assert "t.csv: the 4 training examples have 1 label: x. There is nothing to tell apart: add" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"imgae,question,answer\na.png,what?,red\n",
            "no field 'image' or 'img'; it has imgae, question, answer. Did you",
        ),
        (b"image,answer\nward1/a01.png,red\n", "no field 'question' or 'text'; it has image, answer. Add it"),
        (b"image,question,answer\n", "the train file holds no example"),
        ("image,question,answer\nward1/a01.png,café?,red\n".encode("cp1252"), "line 2, byte 39: .* reads .*café"),
        (b'image,question,answer\nward1/a01.png,"what?,red\n', "is not a table: .* begins in line 2"),
        (b"image,question,answer\nhttp://x.org/a.png,what?,red\n", "is an address, which is not read"),
        (b"image,image,question\na,b,c\n", "the header names 'image' twice"),
    ],
)
def test_tables_that_cannot_be_read(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    Path("t.csv").write_bytes(content)
    assert re.search(message, refused(capsys, lambda: tune("--train", "t.csv", "--valid", "valid.csv")))


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffimage;question;answer\nward1/a01;Wo, bitte?;rot\nward0\\a00.png;ünï 你好 🙂;blau\n".encode(),
        'image,question,answer\r\nward1/a01.png,"a, b?",rot\r\na00.png,c,blau\r\n'.encode("utf-16"),
    ],
    ids=["semicolons", "utf-16"],
)
def test_what_spreadsheets_write_is_read(scans: Path, tune: Callable[..., None], content: bytes) -> None:
    Path("t.csv").write_bytes(content)
    tune("--train", "t.csv", "--valid", "t.csv")
    assert json.loads(Path("run/model/answers.json").read_text())["answers"] == ["blau", "rot"]


def test_images_are_found_or_told_apart(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    draw(Path("photos/ward0/same.png"))
    draw(Path("photos/ward1/same.png"), "blue")
    write(Path("t.csv"), [{"image": f"ward{n}/same.png", "question": "what?", "answer": "red"} for n in (0, 1)])
    message = refused(capsys, lambda: tune("--train", "t.csv", "--valid", "0.5"))
    assert re.search(
        r"t\.csv, line 3: \S+ward1/same.png has the name of \S+ward0/same.png, which t.csv, line 2", message
    )
    write(Path("t.csv"), [{"image": "same", "question": "what?", "answer": "red"}])
    message = refused(capsys, lambda: tune("--train", "t.csv", "--valid", "t.csv"))
    assert "'same' may be photos/ward0/same.png or photos/ward1/same.png" in message
    Path("other").mkdir()
    draw(Path("other/x.png"))
    message = refused(capsys, lambda: tune("--images", "other"))
    assert "12 of 12 images are missing. Did you mean the folder" in message
    absolute = [scans / "photos/ward1/a01.png", scans / "photos/ward0/a00"]
    write(Path("t.csv"), [{"image": str(path), "question": "what?", "answer": "red"} for path in absolute])
    tune("--train", "t.csv", "--valid", "t.csv")
    assert NativeStore.open(Path("run/regions")).ids == ["a00", "a01"]


@pytest.mark.parametrize(("name", "found"), [("scans/photos/ward1/a01.png", True), ("ward0/a01.png", False)])
def test_a_file_in_another_folder_is_not_the_named_one(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str], name: str, found: bool
) -> None:
    """Only ward1 has a01; folders above the given one may stand before a name."""
    write(Path("t.csv"), [{"image": name, "question": "what?", "answer": "red"}])
    if found:
        tune("--train", "t.csv", "--valid", "t.csv")
        assert NativeStore.open(Path("run/regions")).ids == ["a01"]
    else:
        message = refused(capsys, lambda: tune("--train", "t.csv", "--valid", "t.csv"))
        assert "no image 'ward0/a01.png' in photos" in message


def test_a_truncated_image_is_named_and_the_others_are_kept(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Path("photos/ward1/a01.png").read_bytes()
    Path("photos/ward1/a01.png").write_bytes(whole[: len(whole) // 2])
    message = refused(capsys, tune)
    assert "1 of 12 images cannot be read" in message
    assert "ward1/a01.png" in message
    Path("photos/ward1/a01.png").write_bytes(whole)
    tune()
    assert len(NativeStore.open(Path("run/regions"))) == 12


def test_labels_of_two_kinds(scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": "a00", "text": "one", "label": "x"}, {"image": "a01", "text": "two", "label": "y"}]
    write(Path("t.csv"), rows)
    write(Path("v.jsonl"), [row | {"label": ["x", "y"]} for row in rows])
    message = refused(capsys, lambda: tune("--train", "t.csv", "--valid", "v.jsonl", task="classification"))
    assert "v.jsonl, example '1': it has a list of labels, the training examples have one label each" in message
    write(Path("v.jsonl"), [rows[0], rows[1] | {"label": ["y"]}])
    message = refused(capsys, lambda: tune("--train", "t.csv", "--valid", "v.jsonl", task="classification"))
    assert "v.jsonl, line 2: field 'label' holds a list, in the rows before it one label" in message
    write(Path("v.jsonl"), [{"image": "a00", "question": "what?", "answer": ["red"]}])
    message = refused(capsys, lambda: tune("--train", "train.jsonl", "--valid", "v.jsonl"))
    assert "v.jsonl, line 1: field 'answer' holds a list: ['red']. Name the field 'answers'" in message


def test_validation_of_one_class_is_judged_by_accuracy(
    scans: Path, tune: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": f"a{n:02}", "text": "a square", "label": n % 2} for n in range(8)]
    write(Path("t.csv"), rows)
    write(Path("v.csv"), [row for row in rows if row["label"]])
    tune("--train", "t.csv", "--valid", "v.csv", "--set", "train.metric=auroc", task="classification")
    assert any(
        "validation has no auroc (undefined: no label that some examples have and others lack): the best weights are "
        "chosen by accuracy" in event
        for event in read_log(Path("run"))
    )
    assert json.loads(Path("run/run.json").read_text())["config"]["train"]["metric"] == "accuracy"
    run_in_this_process(["evaluate", "run", "--split", "valid"], monkeypatch)
    found = json.loads(Path("run/evaluation_valid.json").read_text())
    assert "all 4 examples have the label '1': the area under the ROC curve is undefined" in found["notes"]
    Path("run").rename("first")
    tune("--train", "t.csv", "--valid", "t.csv", "--set", "train.metric=auroc", task="classification")
    assert json.loads(Path("run/run.json").read_text())["config"]["train"]["metric"] == "auroc"


def test_answers_that_training_lacks_are_counted(scans: Path, tune: Callable[..., None]) -> None:
    rows = [{"image": "a00", "question": "what?", "answer": answer} for answer in ("red", "violet", "mauve")]
    write(Path("v.csv"), rows)
    tune("--train", "train.jsonl", "--valid", "v.csv")
    assert any("2 of 12 questions have no answer that the model can give" in event for event in read_log(Path("run")))


def test_the_answers_of_a_fine_tuned_model_go_on_or_are_refused(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tune()
    Path("run").rename("first")
    line = ["finetune", "--task", "vqa", "--train", "train.jsonl", "--valid", "valid.csv", "--images", "photos"]
    line += ["--init", "first", "--out", "run", "--set", "train.max_steps=2"]
    run_in_this_process(line, monkeypatch)
    assert "the answer head starts from that of first/model, with the same 3 answers" in read_log(Path("run"))
    Path("run").rename("second")
    Path("two.txt").write_text("red\nblue\n")
    message = refused(capsys, lambda: run_in_this_process([*line, "--answers", "two.txt"], monkeypatch))
    assert re.search(
        r"the list of 2 answers \(fingerprint \w{8}, first 'red'\) does not belong to first/model", message
    )
    run_in_this_process([*line, "--answers", "two.txt", "--set", "carry_answers=false"], monkeypatch)
    assert json.loads(Path("run/model/answers.json").read_text())["answers"] == ["red", "blue"]


def test_a_model_without_a_detector_and_a_task_without_tables(
    scans: Path, tune: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, lambda: tune("--images", "photos", images=False))
    assert "images need a detector, and no model that carries one is named with --init" in message
    message = refused(capsys, lambda: tune(task="gqa"))
    assert "the task gqa reads no files of one's own" in message


def test_regions_of_another_detector_are_not_mixed(
    scans: Path, tune: Callable[..., None], world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, lambda: tune("--set", "train.metric=nonsense"))
    draw(Path("photos/ward0/new.png"))
    write(Path("valid.csv"), [{"image": "new", "question": "what?", "answer": "red"}])
    message = refused(capsys, lambda: tune("--detector", str(world.other_detector)))
    assert "fingerprint" in message


def test_images_are_not_extracted_for_a_run_on_other_regions(
    scans: Path,
    tune: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tune()
    Path("run/regions").rename("regions")
    tune_again = ["finetune", "--task", "vqa", "--train", "train.jsonl", "--valid", "valid.csv", "--store", "regions"]
    settings = ["encoder.hidden_size=16", "encoder.num_layers=1", "encoder.num_heads=2", "train.max_steps=1"]
    changes = [word for setting in settings for word in ("--set", setting)]
    run_in_this_process([*tune_again, "--out", "other", "--device", "cpu", *changes], monkeypatch)
    line = ["evaluate", "other", "--file", "valid.csv", "--images", "photos"]
    message = refused(capsys, lambda: run_in_this_process(line, monkeypatch))
    assert "so none are extracted from --images" in message
    assert "--store" in message
    run_in_this_process(line[:-2], monkeypatch)
    assert Path("other/evaluation_valid.json").exists()


def test_an_evaluation_knows_the_splits(
    scans: Path, tune: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path("test.csv"), [{"image": "a00", "question": "what?"}])
    tune("--train", "train.jsonl", "--valid", "valid.csv", "--test", "test.csv")
    run_in_this_process(["evaluate", "run"], monkeypatch)
    assert json.loads(Path("run/evaluation_test.json").read_text())["scores"] == {}, "nothing to score"
    assert json.loads(Path("run/predictions_test.json").read_text())[0]["question_id"] == 1
    message = refused(capsys, lambda: run_in_this_process(["evaluate", "run", "--split", "val"], monkeypatch))
    assert "no split 'val': the model was trained on files of one's own, which are train, valid, test" in message


def test_a_thousand_labels(scans: Path, tune: Callable[..., None]) -> None:
    write(Path("t.csv"), [{"image": f"a{n % 12:02}", "text": "t", "label": f"label {n}"} for n in range(1000)])
    tune("--train", "t.csv", "--valid", "t.csv", task="classification")
    assert len(json.loads(Path("run/model/answers.json").read_text())["answers"]) == 1000
