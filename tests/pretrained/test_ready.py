"""One word from a photograph to an answer: files of the true names and random weights, fetched from this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from fixtures.file_server import FileServer
from fixtures.published import Published, add_repository, publish
from PIL import Image

from visling import api
from visling.checkpoints import catalog
from visling.cli import app
from visling.errors import CheckpointError
from visling.pretrained.folder import read_model_folder
from visling.pretrained.ready import is_ready_name
from visling.regions.store import NativeStore
from visling.vision.detectors import load_detector

QUESTION = "what is the man holding?"


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ended]:
    """Runs a command in a folder with photo.jpg."""
    folder = tmp_path / "work"
    folder.mkdir()
    rows = torch.arange(90).view(-1, 1, 1) * 2 + torch.arange(120).view(1, -1, 1) + torch.tensor([0, 40, 90])
    Image.fromarray((rows % 256).to(torch.uint8).numpy()).save(folder / "photo.jpg")
    monkeypatch.chdir(folder)

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["visling", *map(str, words)])
        status = 0
        try:
            app.run()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        return Ended(status, *capsys.readouterr())

    return run


def ask(call: Callable[..., Ended], *more: object, name: str = "lxmert-vqa") -> Ended:
    return call("predict", "--run", name, "photo.jpg", QUESTION, "--device", "cpu", *more)


def refused(ended: Ended, *words: str) -> None:
    assert ended.status == 2, ended
    for word in words:
        assert word in ended.err, ended.err


def made(published: Published) -> set[str]:
    return {
        str(file.parent.relative_to(published.home)) for file in published.home.rglob("config.json")
    }  # both kinds of folder


def test_one_word_answers_and_the_second_call_uses_what_was_converted(
    published: Published, call: Callable[..., Ended]
) -> None:
    first = ask(call)
    assert first.status == 0, first.err
    assert first.out.startswith("photo.jpg: ")
    assert "36 regions, drawn in answers/photo-what-is-the-man-holding.png" in first.out
    assert Path("answers/photo-what-is-the-man-holding.png").stat().st_size > 1000
    assert "note: the regions are vg-frcnn-36-caffe" in first.err
    assert "comes near bottom-up-36" in first.err
    assert "Fetching unc-nlp/lxmert-vqa-uncased" in first.err
    assert made(published) == {"models/lxmert-vqa", "detectors/vg-frcnn"}
    saved = read_model_folder(published.home / "models/lxmert-vqa")
    assert (saved.features, saved.task, saved.source["release"]) == ("bottom-up-36", "vqa", "lxmert-vqa-uncased")
    detector = load_detector(published.home / "detectors/vg-frcnn")
    assert detector.kind == "vg-frcnn-36-caffe"
    shutil.rmtree(published.cache)  # neither the hub nor the server is needed any more
    second = ask(call, "--offline")
    assert second.out.splitlines()[0] == first.out.splitlines()[0]
    assert "Fetching" not in second.err
    assert [path for path, _ in published.server.asked] == ["/answers.json"]


def test_from_python(published: Published, call: Callable[..., Ended]) -> None:
    model = api.load("lxmert-vqa", device="cpu")
    assert "comes near" in model.notice
    assert model.answer("photo.jpg", QUESTION).text in model.task.state()["answers"]
    assert api.load("lxmert-vqa", device="cpu", detector="vg-frcnn", other_features=True).notice == ""


def test_a_folder_of_that_name_comes_first(published: Published, call: Callable[..., Ended]) -> None:
    assert is_ready_name("lxmert-vqa")
    Path("lxmert-vqa").mkdir()
    assert not is_ready_name("lxmert-vqa")
    refused(ask(call), "no model in lxmert-vqa")


def test_an_interrupted_download_continues(published: Published, call: Callable[..., Ended]) -> None:
    published.server.cut_at = 5000
    refused(ask(call), "ended after 5,000 of", "Repeat the command")
    assert made(published) == set()
    published.server.cut_at = None
    assert ask(call).status == 0
    assert [wanted for _, wanted in published.server.asked] == ["", "bytes=5000-"]


def test_another_answer_list_is_refused(published: Published, call: Callable[..., Ended]) -> None:
    published.server.files["/answers.json"] = published.server.files["/answers.json"].replace(b'"net"', b'"ten"')
    refused(ask(call), "has the SHA-256", "expected", "is kept as")
    assert made(published) == set()


def test_a_page_in_place_of_the_answer_list_is_refused(published: Published, call: Callable[..., Ended]) -> None:
    published.server.files["/answers.json"] = b"<html><body>Sign in to continue</body></html>"
    refused(ask(call), "answered with a web page", "Sign in to continue")


@pytest.mark.parametrize("how", ["option", "VISLING_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_downloads_nothing(
    published: Published, call: Callable[..., Ended], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how != "option":
        monkeypatch.setenv(how, "1")
    refused(ask(call, *(["--offline"] if how == "option" else [])), "is not asked while offline")
    assert published.server.asked == []
    assert made(published) == set()


def test_no_network(published: Published, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = tuple(replace(entry, source="http://127.0.0.1:9/answers.json") for entry in catalog.ANSWERS)
    monkeypatch.setattr(catalog, "ANSWERS", answers)
    refused(ask(call), "cannot download http://127.0.0.1:9/answers.json", "Check the connection")
    shutil.rmtree(published.folder(published.weights).parents[1])
    refused(ask(call), "cannot fetch lxmert-vqa-uncased", "nor in the hub's cache", "Fetch it once online")


def test_weights_that_the_hub_lacks_can_be_put_where_the_message_says(
    published: Published, call: Callable[..., Ended]
) -> None:
    weights = published.folder(published.weights)
    here = published.home / "downloads" / "lxmert-vqa-uncased"
    shutil.copytree(weights, here.with_name("elsewhere"))
    shutil.rmtree(weights.parents[1])
    refused(ask(call), f"can be put into {here}")
    here.with_name("elsewhere").rename(here)
    assert ask(call).status == 0


def test_a_data_folder_that_cannot_be_written_is_found_before_anything_is_fetched(
    published: Published, call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISLING_HOME", "photo.jpg")
    for command in (["predict", "--run", "lxmert-vqa", "photo.jpg", QUESTION], _extract("vg-frcnn")):
        ended = call(*command, "--device", "cpu")
        refused(ended, "cannot write to the data folder photo.jpg", "VISLING_HOME")
        assert "Fetching" not in ended.err
    assert published.server.asked == []


def test_regions_are_extracted_with_a_detector_of_the_catalogue(
    published: Published, call: Callable[..., Ended]
) -> None:
    ended = call(*_extract("vg-frcnn"), "--device", "cpu")
    assert ended.status == 0, ended.err
    assert made(published) == {"detectors/vg-frcnn"}
    assert NativeStore.open("regions").counts.tolist() == [36]


def test_a_name_that_is_nearly_right(call: Callable[..., Ended]) -> None:
    refused(ask(call, name="lxmert-vqb"), "no model in lxmert-vqb", "Did you mean 'lxmert-vqa'?")


def _extract(detector: str) -> list[str]:
    return ["regions", "extract", "photo.jpg", "--detector", detector, "--out", "regions"]


def test_a_detector_that_the_hub_lacks_comes_from_its_mirror(published: Published, call: Callable[..., Ended]) -> None:
    folder = published.folder(published.detector)
    for file in folder.iterdir():
        published.server.files[f"/mirror/{file.name}"] = file.read_bytes()
    shutil.rmtree(folder.parents[1])
    assert ask(call).status == 0
    assert made(published) == {"models/lxmert-vqa", "detectors/vg-frcnn"}


def test_a_detector_that_is_nowhere_names_the_others(published: Published, call: Callable[..., Ended]) -> None:
    (published.folder(published.detector) / "pytorch_model.bin").unlink()
    refused(
        ask(call),
        "cannot fetch the detector vg-frcnn",
        "lacks pytorch_model.bin",
        "/mirror/config.yaml does not exist (any more): the server answered 404",
        "also listed as vg-frcnn-pickle",
        f"can be put into {published.home / 'downloads/vg-frcnn'}",
    )
    assert made(published) == set(), "nothing is converted before everything is here"


def test_a_detector_that_does_not_fit_is_refused(published: Published, world: Any, call: Callable[..., Ended]) -> None:
    refused(
        ask(call, "--detector", world.detector),
        "was trained on region features of the kind bottom-up-36",
        "are of a detector that is not known to compute them",
        "Detectors that come near it: vg-frcnn",
        "--other-features",
    )
    refused(ask(call, "--detector", "vg-frcnn-10-100"), "faster_rcnn_from_caffe_attr_original.pkl")


def test_weights_without_a_detector_are_refused_before_anything_is_downloaded(
    published: Published, call: Callable[..., Ended]
) -> None:
    refused(
        ask(call, name="visualbert-vqa"),
        "visualbert-vqa reads detectron-100",
        "no detector here makes such features",
        "measured 40 to 46 %",
        "--other-features",
    )
    assert published.server.asked == []


def test_what_only_a_person_can_download_has_a_place(published: Published, call: Callable[..., Ended]) -> None:
    place = published.home / "downloads/vilbert_beta_vqa"
    refused(ask(call, name="vilbert-vqa"), "published at https://drive.google.com/drive/folders/1nrcVww0u", str(place))
    place.mkdir(parents=True)
    (place / "pytorch_model_19.bin").write_bytes(b"")
    refused(ask(call, name="vilbert-vqa"), "vilbert-vqa-answers is not downloaded automatically")


def test_a_repository_with_damaged_weights_leaves_nothing(published: Published, call: Callable[..., Ended]) -> None:
    file = published.folder(published.weights) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])
    refused(ask(call), "pytorch_model.bin", "truncated")
    assert made(published) == {"detectors/vg-frcnn"}
    assert not any(path.name.endswith(".part") for path in published.home.rglob("*"))


def test_a_hub_that_answers_with_a_page_is_named(file_server: FileServer, tmp_path: Path) -> None:
    page = "/api/models/unc-nlp/lxmert-vqa-uncased/revision/main"
    file_server.files[page], file_server.types[page] = b"<!DOCTYPE html><html>Maintenance</html>", "text/html"
    environment = os.environ | {"HF_ENDPOINT": file_server.address, "HF_HOME": str(tmp_path / "hf")}
    ended = subprocess.run(
        [sys.executable, "-m", "visling", "fetch", "lxmert-vqa-uncased"],
        env=environment | {"VISLING_HOME": str(tmp_path / "home")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended
    assert "the hub answered with a page that is not for programs" in ended.stderr
    assert page in [path for path, _ in file_server.asked]


def test_fetch_brings_all_parts_of_a_name(published: Published, call: Callable[..., Ended], tmp_path: Path) -> None:
    ended = call("fetch", "lxmert-vqa", "--json")
    assert ended.status == 0, ended.err
    found = {name: Path(path) for name, path in json.loads(ended.out).items()}
    assert found.keys() == {"lxmert-vqa-uncased", "lxmert-vqa-answers", "vg-frcnn"}
    assert (found["lxmert-vqa-uncased"] / "pytorch_model.bin").is_file()
    assert found["lxmert-vqa-answers"] == published.home / "downloads/lxmert-vqa-answers/trainval_label2ans.json"
    ended = call("fetch", "lxmert-vqa-answers", "--to", tmp_path / "elsewhere")
    assert ended.status == 0, ended.err
    assert (tmp_path / "elsewhere/lxmert-vqa-answers/trainval_label2ans.json").is_file()
    refused(call("fetch", "lxmert-vqb"), "nothing is called 'lxmert-vqb'", "Did you mean 'lxmert-vqa'")


def test_convert_takes_what_was_fetched(published: Published, call: Callable[..., Ended]) -> None:
    assert call("fetch", "lxmert-vqa-answers").status == 0
    answers = published.home / "downloads/lxmert-vqa-answers/trainval_label2ans.json"
    ended = call("convert", "lxmert-vqa-uncased", "--answers", answers, "--to", "model")
    assert ended.status == 0, ended.err
    assert read_model_folder(Path("model")).features == "bottom-up-36"


def test_every_ready_set_names_what_exists() -> None:
    for ready in catalog.READY:
        weights = catalog.find(ready.weights)
        assert weights.features
        assert bool(ready.detector) != bool(ready.why_no_detector)
        if ready.answers:
            listed = catalog.find_answers(ready.answers)
            assert listed.answers in {head.outputs for head in weights.heads.values()}
        same = [entry.name for entry in catalog.entries() if entry.name == ready.name]
        assert same == [ready.name] or (same == [ready.name] * 2 and ready.weights == ready.name)


@pytest.mark.slow
def test_the_whole_way_at_full_size(
    published: Published, call: Callable[..., Ended], full_size: Any, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All names and shapes of the released files, random values."""
    shutil.rmtree(published.cache)
    shapes = full_size("lxmert")["transformers"].shapes
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn([3129 if size == 9500 else size for size in shape], generator=generator) * 0.02
        for name, shape in shapes.items()
        if name.startswith(("lxmert.", "answer_head."))
    }
    torch.save(weights, add_repository(published.cache, published.weights) / "pytorch_model.bin")
    folder = add_repository(published.cache, published.detector)
    shapes = json.loads((golden / "frcnn" / "manifest_full.json").read_text())
    detector = {
        name: torch.zeros(shape, dtype=torch.int64)
        if name.endswith("tracked")
        else torch.rand(shape, generator=generator) + 0.5
        if name.endswith("running_var")
        else torch.randn(shape, generator=generator) * 0.02
        for name, shape in shapes.items()
    }
    sides = torch.tensor([(64 * 2**size, ratio) for size in range(4) for ratio in (0.5, 1.0, 2.0)])
    half = torch.stack([sides[:, 0] / sides[:, 1].sqrt(), sides[:, 0] * sides[:, 1].sqrt()], dim=1) / 2
    detector["proposal_generator.anchor_generator.cell_anchors.0"] = torch.cat([-half, half], dim=1)
    torch.save(detector, folder / "pytorch_model.bin")
    settings = {"roi_heads": {"num_classes": 1600}, "roi_box_head": {"attr": True, "num_attrs": 400}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    publish(published, monkeypatch, preset="base", vocabulary=False)
    first = ask(call)
    assert first.status == 0, first.err
    assert "36 regions, drawn in" in first.out
    second = ask(call, "--offline")
    assert second.out.splitlines()[0] == first.out.splitlines()[0]
    with pytest.raises(CheckpointError, match="no detector here makes"):
        api.load("visualbert-vqa")
